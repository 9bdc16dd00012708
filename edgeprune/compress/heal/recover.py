"""Healing by distillation: the pruned model learns to answer as the dense one does.

Notation: ``B`` batch, ``N`` samples, ``K`` classes, ``C`` channels, ``H`` and ``W`` height and width.
"""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgeprune.compress.evaluate import quality
from edgeprune.compress.heal import checkpoint as checkpoints
from edgeprune.compress.heal import two_of_four
from edgeprune.errors import IntegrityError, ModelError
from edgeprune.progress import Bar, Progress
from edgeprune.records.files import digest_of
from edgeprune.records.workload import Preprocess, Recovery
from edgeprune.workload.answers import raw_logits
from edgeprune.workload.batches import augmented, to_input
from edgeprune.workload.dataset import Split
from edgeprune.workload.memory import channels_last, fast_copy, runs_channels_last
from edgeprune.workload.modes import eval_copy, frozen_copy, in_healing, trainable
from edgeprune.workload.outputs import as_logits

TEMPERATURE = 2.0
SOFT_SHARE = 0.9  # of the loss that follows the teacher; the rest follows the labels
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
AVERAGE_DECAY = 0.998  # of the moving average of weights, once it is warm
WARMUP_SHARE, MAX_WARMUP_STEPS = 0.05, 200
GRADIENT_LIMIT = 10.0  # norm; healthy steps stay far below, so that only a diverging one is cut
NOTE_EVERY = 10  # steps; reading the loss more often would stall an accelerator
STATE_VERSION = 2  # of the training and its checkpoint


@dataclass(frozen=True)
class EpochRow:
    """The state at the end of an epoch. ``epoch`` counts passes over the training data; row 0 is the model that came in."""

    epoch: float
    loss: float | None
    selection_quality: float
    seconds: float


@dataclass(frozen=True)
class RecoveryResult:
    """The best model by the selection split, in eval mode, and how it came about. ``best_epoch`` is an index of ``history``."""

    model: nn.Module
    epochs_run: float
    best_selection_quality: float
    best_epoch: int
    history: tuple[EpochRow, ...]
    seconds: float
    interrupted: bool


@dataclass(frozen=True)
class _Setup:
    """What stays the same during one recovery."""

    teacher: nn.Module
    train: Split
    selection: Split
    reference: Tensor  # teacher logits [N, K] of the selection split
    settings: Recovery
    preprocess: Preprocess
    seed: int
    device: torch.device
    precision: torch.dtype | None
    batch: int
    epoch_steps: int
    total_steps: int
    quick: bool  # whether images and weights are in channels_last memory


@dataclass
class _State:
    """What changes; all but the clock and the bar goes into the checkpoint."""

    student: nn.Module
    average: nn.Module
    optimiser: torch.optim.SGD
    best: dict[str, Tensor]
    rows: list[EpochRow]
    held: two_of_four.AllHeld = ()  # weights of student and average that have to stay zero
    step: int = 0
    seconds_before: float = 0.0
    started: float = 0.0
    shown: float = 0.0  # steps that the bar has been told of
    diverged: bool = False

    def seconds(self) -> float:
        """Seconds of training, over all runs of this checkpoint."""
        return self.seconds_before + time.monotonic() - self.started

    def best_epoch(self) -> int:
        """Index of the best row; the earliest of equals, so that training must earn its place."""
        return max(range(len(self.rows)), key=lambda i: (self.rows[i].selection_quality, -i))


def recover(
    student: nn.Module,
    teacher: nn.Module,
    train: Split,
    selection: Split,
    settings: Recovery,
    *,
    preprocess: Preprocess,
    seed: int,
    progress: Progress,
    checkpoint: Path | None = None,
) -> RecoveryResult:
    """The student, trained to answer as the teacher does, and never worse on the selection split than it came in.

    The loss is ``0.9 T^2 KL(teacher || student)`` at ``T = 2`` plus ``0.1`` cross-entropy with the labels; without labels it is the
    divergence alone. SGD with a cosine schedule; the moving average of the weights is what is judged after each epoch and what is
    returned. The same seed and number of threads give the same weights on a CPU, also across an interruption, as long as
    ``settings.max_minutes`` is not set: with a time limit the schedule follows the clock, so that it always comes to rest in time.

    Args:
        student: the pruned model. Not changed.
        teacher: the dense model. Not changed.
        train: raw samples, at least 2, with or without labels.
        selection: raw samples that pick the best epoch.
        settings: epochs (may be a fraction), time limit, batch, learning rate, augmentation, and a pattern of zeros to keep.
        preprocess: the recorded constants of the input.
        seed: of the order of samples, the augmentation and dropout.
        progress: a bar in steps. Ctrl-C ends the training and keeps what is done.
        checkpoint: a file that is written after each epoch, and continued from when it is of the same models, data and settings.

    Raises:
        ModelError: too few samples, or a model that does not return logits ``[N, K]``.
        NoSpace, SpecError: the checkpoint cannot be written.

    Source: loss and averaging as in https://arxiv.org/abs/1503.02531 and https://arxiv.org/abs/1803.05407 (read 2026-11-22).
    """
    setup = _setup(teacher, train, selection, settings, preprocess, seed)
    digest = "" if checkpoint is None else _digest(setup, student)
    with torch.random.fork_rng(devices=[setup.device] if setup.device.type == "cuda" else []):
        state = _start(student, setup)
        if checkpoint is not None:
            _resume(state, setup, checkpoint, digest, progress)
        if not state.rows:
            _judge(setup, state, None)
        interrupted = _train(setup, state, checkpoint, digest, progress)
    if state.diverged:
        progress.say(
            f"training diverged after {state.step} steps at learning_rate {settings.learning_rate}; "
            "the best model before that is kept"
        )
    model = eval_copy(student)
    model.load_state_dict(state.best)
    best = state.best_epoch()
    return RecoveryResult(
        model=model,
        epochs_run=state.step / setup.epoch_steps,
        best_selection_quality=state.rows[best].selection_quality,
        best_epoch=best,
        history=tuple(state.rows),
        seconds=state.seconds(),
        interrupted=interrupted,
    )


def updates_per_epoch(settings: Recovery, samples: int) -> int:
    """Updates of the weights that one pass over this many training samples makes; what does not fill a batch is left out."""
    return samples // min(settings.batch_size, samples)


def _setup(
    teacher: nn.Module,
    train: Split,
    selection: Split,
    settings: Recovery,
    preprocess: Preprocess,
    seed: int,
) -> _Setup:
    if len(train) < 2:
        raise ModelError(f"recovery needs at least 2 training samples, but got {len(train)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    epoch_steps = updates_per_epoch(settings, len(train))
    first = to_input(torch.from_numpy(selection.x[:1].copy()).to(device), preprocess)
    quick = runs_channels_last(teacher, first)
    frozen = frozen_copy(fast_copy(teacher, device, quick=quick))
    return _Setup(
        teacher=frozen,
        train=train,
        selection=selection,
        reference=raw_logits(frozen, selection.x, preprocess),
        settings=settings,
        preprocess=preprocess,
        seed=seed,
        device=device,
        precision=low_precision(device),
        batch=min(settings.batch_size, len(train)),
        epoch_steps=epoch_steps,
        total_steps=math.ceil(settings.epochs * epoch_steps),
        quick=quick,
    )


def low_precision(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware multiplies it; ``None`` where it would be emulated, which is slower than float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return None
    return torch.bfloat16 if words & {"avx512_bf16", "amx_bf16", "bf16"} else None


def _start(student: nn.Module, setup: _Setup) -> _State:
    trained = in_healing(fast_copy(student, setup.device, quick=setup.quick))
    parameters = trainable(trained)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        # Scales and biases: decay would pull a batch norm's channels toward silence.
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    average = frozen_copy(fast_copy(student, setup.device, quick=setup.quick))
    held = two_of_four.held(setup.settings.sparsity, student, (trained, average))
    rate = setup.settings.learning_rate
    return _State(
        student=trained,
        average=average,
        optimiser=torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, nesterov=True),
        best=_weights(average),
        rows=[],
        held=held,
        started=time.monotonic(),
    )


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _train(
    setup: _Setup, state: _State, path: Path | None, digest: str, progress: Progress
) -> bool:
    """Run to the end of the plan. Returns whether Ctrl-C ended it."""
    judged = state.step
    try:
        with progress.bar("recovering", setup.total_steps) as bar:
            while _show(setup, state, bar, "") < setup.total_steps and not state.diverged:
                loss = _epoch(setup, state, bar)
                _judge(setup, state, loss)
                judged = state.step
                if path is not None and not state.diverged:
                    _save(state, path, digest)
    except KeyboardInterrupt:
        # The epoch that was cut short may already be the best; a second Ctrl-C ends this, too.
        if state.step > judged:
            _judge(setup, state, None)
        return True
    return False


def _planned(setup: _Setup, state: _State) -> float:
    """Steps of the plan that are behind us: by count, or by the clock where that is further."""
    limit = setup.settings.max_minutes
    if limit is None:
        return state.step
    by_clock = setup.total_steps * state.seconds() / (60 * limit)
    return min(setup.total_steps, max(state.step, by_clock))


def _show(setup: _Setup, state: _State, bar: Bar, note: str) -> float:
    """Move the bar to where the plan is, and return that place in steps."""
    planned = _planned(setup, state)
    if planned > state.shown:
        bar.advance(planned - state.shown, note=note)
        state.shown = planned
    return planned


def _learning_rate(setup: _Setup, state: _State, planned: float) -> float:
    """A linear rise, then half a cosine down to zero at the end of the plan."""
    total = setup.total_steps
    # By whichever is done first: a plan that the clock shortens must not spend itself on warming up.
    warm = min(
        1.0, max((state.step + 1) / MAX_WARMUP_STEPS, (planned + 1) / (WARMUP_SHARE * total))
    )
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, planned / total)))
    return setup.settings.learning_rate * warm * cosine


def _epoch(setup: _Setup, state: _State, bar: Bar) -> float:
    """Train to the end of the epoch or of the plan. Returns the mean loss."""
    epoch = state.step // setup.epoch_steps
    # Each epoch has its own seed, so that a resumed run draws what an uninterrupted one would have drawn.
    key = int(np.random.SeedSequence([setup.seed, epoch]).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(key)
    generator = torch.Generator().manual_seed(key)
    order = torch.randperm(len(setup.train), generator=generator).numpy()
    total = torch.zeros((), device=setup.device)
    n_steps, where = 0, f"epoch {epoch + 1} of {math.ceil(setup.total_steps / setup.epoch_steps)}"
    note, planned = where, _planned(setup, state)
    for number in range(setup.epoch_steps):
        rate = _learning_rate(setup, state, planned)
        chosen = order[number * setup.batch : (number + 1) * setup.batch]
        loss = _step(setup, state, chosen, rate, generator)
        total += loss
        n_steps += 1
        if n_steps % NOTE_EVERY == 1:
            value = float(loss)
            state.diverged = not math.isfinite(value)
            note = f"{where}, loss {value:.3f}, selection {state.rows[-1].selection_quality:.4f}"
        planned = _show(setup, state, bar, note)
        if state.diverged or planned >= setup.total_steps:
            break
    mean = float(total) / n_steps
    state.diverged = state.diverged or not math.isfinite(mean)
    return mean


def _step(
    setup: _Setup, state: _State, chosen: np.ndarray, rate: float, generator: torch.Generator
) -> Tensor:
    """One update of the student and of its average. Returns the loss, still on the device."""
    x = _batch(setup, chosen, generator)
    with _lowered(setup), torch.no_grad():
        wanted = as_logits(setup.teacher(x), setup.teacher)
    with _lowered(setup):
        found = as_logits(state.student(x), setup.teacher)
    loss = _distillation(found, wanted)
    if setup.train.y is not None:
        y = torch.from_numpy(setup.train.y[chosen]).to(setup.device)
        loss = SOFT_SHARE * loss + (1 - SOFT_SHARE) * functional.cross_entropy(found, y)
    for group in state.optimiser.param_groups:
        group["lr"] = rate
    state.optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(state.student.parameters(), GRADIENT_LIMIT)
    state.optimiser.step()
    _follow(state)
    two_of_four.hold(state.held)
    state.step += 1
    return loss.detach()


def _lowered(setup: _Setup) -> AbstractContextManager[object]:
    enabled = setup.precision is not None
    return torch.autocast(setup.device.type, dtype=torch.bfloat16, enabled=enabled)


def _distillation(found: Tensor, wanted: Tensor) -> Tensor:
    """``T^2 KL(wanted || found)`` of logits ``[B, K]``, softened by ``T``; the square keeps gradients as large as a hard label's."""
    divergence = functional.kl_div(
        functional.log_softmax(found / TEMPERATURE, dim=1),
        functional.log_softmax(wanted / TEMPERATURE, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return TEMPERATURE**2 * divergence


@torch.no_grad()
def _follow(state: _State) -> None:
    """Move the average toward the student; fast at first, so that the weights that came in are soon forgotten."""
    decay = min(AVERAGE_DECAY, (1 + state.step) / (10 + state.step))
    current = state.student.state_dict()
    for name, tensor in state.average.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(current[name], 1 - decay)
        else:
            tensor.copy_(current[name])


def _batch(setup: _Setup, chosen: np.ndarray, generator: torch.Generator) -> Tensor:
    """Augmented inputs of the chosen samples on the device. Images travel as bytes."""
    raw = torch.from_numpy(setup.train.x[chosen])
    if setup.preprocess.kind == "image" and raw.dtype == torch.uint8:
        raw = augmented(raw, setup.settings.augment, generator)
    x = to_input(raw.to(setup.device), setup.preprocess)
    return channels_last(x) if setup.quick else x


def _judge(setup: _Setup, state: _State, loss: float | None) -> None:
    """Add a row with the average's quality on the selection split, and keep its weights if they are the best so far."""
    found = raw_logits(state.average, setup.selection.x, setup.preprocess)
    _, value = quality(found, setup.selection.y, setup.reference)
    epoch = state.step / setup.epoch_steps
    finite = loss if loss is not None and math.isfinite(loss) else None
    state.rows.append(EpochRow(epoch, finite, value, state.seconds()))
    if state.best_epoch() == len(state.rows) - 1:
        state.best = _weights(state.average)


def _digest(setup: _Setup, student: nn.Module) -> str:
    """Identifies models, data and settings; a checkpoint of anything else is not continued."""
    return digest_of(
        {
            "version": STATE_VERSION,
            "settings": setup.settings,
            "preprocess": setup.preprocess,
            "seed": setup.seed,
            "device": setup.device.type,
            "precision": str(setup.precision),
            "student": checkpoints.tensors_sha256(student.state_dict()),
            "teacher": checkpoints.tensors_sha256(setup.teacher.state_dict()),
            "splits": [checkpoints.split_sha256(split) for split in (setup.train, setup.selection)],
        }
    )


def _save(state: _State, path: Path, digest: str) -> None:
    tensors = {f"best/{name}": tensor for name, tensor in state.best.items()}
    for part, model in (("student", state.student), ("average", state.average)):
        tensors |= {f"{part}/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in state.student.named_parameters():
        buffer = state.optimiser.state[parameter].get("momentum_buffer")
        if buffer is not None:  # a parameter that the loss does not reach has none
            tensors[f"momentum/{name}"] = buffer
    plain = {
        "step": state.step,
        "seconds": state.seconds(),
        "rows": [asdict(row) for row in state.rows],
    }
    checkpoints.save(path, tensors, plain, digest)


def _newest(
    path: Path, digest: str, progress: Progress
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The last checkpoint, or the one before it when that is damaged; ``None`` when there is none to go on with."""
    problem: IntegrityError | None = None
    for candidate in (path, checkpoints.previous(path)):
        if candidate.exists():
            try:
                found = checkpoints.load(candidate, digest)
            except IntegrityError as error:
                problem = problem or error
                continue
            if problem is not None:
                progress.say(f"going on from the checkpoint before the last: {problem}")
            return found
    if problem is not None:
        progress.say(f"starting the recovery afresh: {problem}")
    return None


def _resume(state: _State, setup: _Setup, path: Path, digest: str, progress: Progress) -> None:
    """Continue from a checkpoint of the same configuration, if there is one."""
    found = _newest(path, digest, progress)
    if found is None:
        return
    tensors, plain = found
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, key = name.partition("/")
        parts.setdefault(part, {})[key] = tensor.to(setup.device)
    state.student.load_state_dict(parts["student"])
    state.average.load_state_dict(parts["average"])
    state.best = parts["best"]
    for name, parameter in state.student.named_parameters():
        if name in parts.get("momentum", {}):
            buffer = torch.empty_like(parameter).copy_(parts["momentum"][name])
            state.optimiser.state[parameter]["momentum_buffer"] = buffer
    state.step, state.seconds_before = plain["step"], plain["seconds"]
    state.rows = [EpochRow(**row) for row in plain["rows"]]
    progress.say(f"continuing the recovery after {state.rows[-1].epoch:g} epochs")

"""The best INT8 file of a model: what costs little is tried first, and nothing is tried where INT8 costs next to nothing.

The order is: the format's own ranges; other ranges; equalised layers and corrected biases; layers in float, by what they bring for a
millisecond; training with rounding. Every choice is made on the selection split. The test split is never looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeprune.compress.evaluate import kl_nats, quality, run_once
from edgeprune.compress.heal.recover import recover, updates_per_epoch
from edgeprune.compress.int8.equalise import correct_biases, equalise
from edgeprune.compress.int8.fakequant import fake_quantised, plain
from edgeprune.devices.plans import SEARCH
from edgeprune.devices.timing.measure import measure
from edgeprune.errors import EdgepruneError, FormatError
from edgeprune.formats import Inspectable, QuantizeOptions
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files.int8_warnings import calibration_report
from edgeprune.records.artifact import Artifact
from edgeprune.records.files import write_bytes
from edgeprune.records.int8 import Int8Report, Int8Try, LayerFallback
from edgeprune.workload.answers import logits
from edgeprune.workload.dataset import model_input
from edgeprune.workload.outputs import file_logits

# Of the quality: what INT8 may cost before more than the format's own ranges is tried.
ALLOWED_DROP = 0.003
JUDGED = 2000  # samples of the selection split
SCANNED = 256  # samples for each layer of a scan
MOST_LAYERS, MOST_TIMED = 16, 6
# Of the recovery's epochs and learning rate.
TRAINING_SHARE, MOST_EPOCHS, TRAINING_RATE = 0.2, 2.0, 0.1
CLIPPING = QuantizeOptions(ranges="percentile")
LEAST_ERROR = QuantizeOptions(ranges="mse")


@dataclass(frozen=True)
class Quantised:
    """The INT8 file that was chosen, the torch module whose weights it has, and how it came about."""

    artifact: Artifact
    model: nn.Module
    report: Int8Report


@dataclass(frozen=True)
class Int8Candidate:
    """An INT8 file, what it was made from, and how."""

    tried: Int8Try
    path: Path
    artifact: Artifact
    fp32: Path
    model: nn.Module
    options: QuantizeOptions

    @property
    def rank(self) -> tuple[float, float]:
        """Better ones are larger: by quality, and at equal quality by the loss."""
        return self.tried.quality, -self.tried.loss_nats


@dataclass
class Search:
    """Candidates on one selection sample. The earliest of equals is the best: more effort must earn its place."""

    context: Context
    folder: Path
    x: np.ndarray
    y: np.ndarray | None
    reference: torch.Tensor  # of the dense model
    exact: torch.Tensor  # of the FP32 file
    found: list[Int8Candidate] = field(default_factory=list)

    @property
    def best(self) -> Int8Candidate:
        """The earliest of the candidates with the highest rank."""
        return max(self.found, key=lambda c: (c.rank, -self.found.index(c)))

    @property
    def drop(self) -> float:
        """What the best file loses against the FP32 file."""
        return self._quality(self.exact) - self.best.tried.quality

    def _quality(self, found: torch.Tensor) -> float:
        return quality(found, self.y, self.reference)[1]

    def loss_nats(self, found: torch.Tensor) -> float:
        """Divergence of what a file answered to the first samples from what the FP32 file did."""
        dense, exact = self.context.model, self.exact[: len(found)]
        return kl_nats(file_logits(exact, dense), file_logits(found, dense))

    def add(
        self, name: str, fp32: Path, model: nn.Module, options: QuantizeOptions, note: str = ""
    ) -> None:
        """Write and judge one file; one that the toolchain refuses is left out and said, unless it is the first."""
        context = self.context
        path = self.folder / f"{len(self.found)}{context.whole.info.suffix}"
        try:
            artifact = context.whole.quantize(
                fp32, context.calibration, path, model=model, options=options
            )
            found = context.run_file(context.host, path, self.x)
        except FormatError as error:
            if not self.found:
                raise
            context.progress.say(f"      INT8 with {name} left out: {error.message}")
            return
        loss = self.loss_nats(found)
        tried = Int8Try(name=name, quality=self._quality(found), loss_nats=loss, note=note)
        self.found.append(Int8Candidate(tried, path, artifact, fp32, model, options))

    def export(self, name: str, model: nn.Module) -> Path:
        """The FP32 file of a changed model."""
        path = self.folder / f"{name}.fp32{self.context.whole.info.suffix}"
        self.context.whole.export(model, self.context.example, path)
        return path


def best_int8(
    context: Context, model: nn.Module, fp32: Path, path: Path, *, limit_ms: float
) -> Quantised:
    """Write the INT8 file of a model that keeps most of its quality.

    Args:
        context: data, boards, format. Where another format ships, only what its INT8 files can have too is tried.
        model: what ``fp32`` was exported from; not changed.
        fp32: its float file.
        path: where the INT8 file goes; what is tried lies in a folder beside it.
        limit_ms: latency that layers in float must keep to, on the board.
    """
    settings, split = context.job.int8, context.job.loaded.dataset.selection
    folder = path.parent / "int8"
    folder.mkdir(exist_ok=True)
    judged = split.drawn(JUDGED)
    x = model_input(judged.x, context.job.loaded.preprocess)
    search = Search(
        context,
        folder,
        x,
        judged.y,
        logits(context.model, torch.from_numpy(x)),
        context.run_file(context.host, fp32, x),
    )
    options = QuantizeOptions(io=settings.io)
    search.add("own ranges", fp32, model, options)
    layers: tuple[LayerFallback, ...] = ()
    if settings.effort == "thorough" or (settings.effort == "auto" and search.drop > ALLOWED_DROP):
        layers = _try_all(search, model, fp32, limit_ms)
    best = search.best
    write_bytes(path, best.path.read_bytes())
    artifact = best.artifact.model_copy(update={"path": path.name})
    metric, exact = quality(search.exact, search.y, search.reference)
    report = Int8Report(
        effort=settings.effort,
        metric=metric,
        n=len(x),
        fp32=exact,
        tries=tuple(c.tried for c in search.found),
        chosen=best.tried.name,
        layers=tuple(
            x.model_copy(update={"in_float": x.layer in best.options.float_layers}) for x in layers
        ),
        calibration=calibration_report(
            context.whole,
            best.fp32,
            path,
            x,
            samples=len(context.calibration),
            classes=context.job.loaded.n_classes,
            labels=_calibration_labels(context),
        ),
    )
    return Quantised(artifact, best.model, report)


def _calibration_labels(context: Context) -> np.ndarray | None:
    """Labels of the samples that :attr:`Context.calibration` holds, drawn the same way."""
    count = context.job.target.quantization.calibration_samples
    return context.job.loaded.dataset.train.drawn(count).y


def _try_all(
    search: Search, model: nn.Module, fp32: Path, limit_ms: float
) -> tuple[LayerFallback, ...]:
    """Everything in order of cost, until INT8 costs next to nothing; all of it where the effort is thorough."""
    is_thorough = search.context.job.int8.effort == "thorough"
    has_options = search.context.ship.info.int8_options
    layers: tuple[LayerFallback, ...] = ()

    def wanted() -> bool:
        return is_thorough or search.drop > ALLOWED_DROP

    own = search.best.options
    for name, change in (("percentile ranges", CLIPPING), ("least-error ranges", LEAST_ERROR)):
        if has_options:
            search.add(name, fp32, model, replace(change, io=own.io))
    if wanted():
        _try_weights(search, model)
    if has_options and wanted():
        layers = _try_float_layers(search, limit_ms)
    if wanted():
        _try_training(search, model)
    return layers


def _try_weights(search: Search, model: nn.Module) -> None:
    """Equalised layers and corrected biases, with the best ranges so far."""
    context, options = search.context, search.best.options
    x = torch.from_numpy(context.calibration)
    equalised, note = equalise(model, x[:1], x)
    if note.endswith("equalised"):
        search.add(
            "equalised layers", search.export("equalised", equalised), equalised, options, note
        )
    start = search.best.model
    try:
        corrected, note = correct_biases(start, x)
        prefix = "equalised layers, " if start is equalised else ""
        name = f"{prefix}corrected biases"
        search.add(name, search.export("corrected", corrected), corrected, options, note)
    except (RuntimeError, EdgepruneError) as error:
        context.progress.say(f"      bias correction left out: {str(error).splitlines()[0]}")


def _try_float_layers(search: Search, limit_ms: float) -> tuple[LayerFallback, ...]:
    """Scan the layers one at a time in float, then keep those in float that bring most for a millisecond, within the limit."""
    context, start = search.context, search.best
    scanned = layer_gains(search, start)
    gains = {layer: gain for layer, (gain, _) in scanned.items()}
    paths = {layer: path for layer, (_, path) in scanned.items()}
    useful = sorted((n for n in gains if gains[n] > 0), key=lambda n: -gains[n])[:MOST_TIMED]
    times = _times(context, {"": start.path, **{n: paths[n] for n in useful}})
    extra = {n: max(0.0, times[n] - times[""]) for n in useful}
    order = sorted(useful, key=lambda n: -gains[n] / max(extra[n], 1e-4))
    chosen: list[str] = []
    spent = times[""]
    for layer in order:
        if search.drop <= ALLOWED_DROP and chosen:
            break
        if spent + extra[layer] > limit_ms:
            continue
        spent += extra[layer]
        chosen.append(layer)
        options = replace(start.options, float_layers=tuple(chosen))
        count = f"{len(chosen)} float layers"
        name = count if start.tried.name == "own ranges" else f"{start.tried.name}, {count}"
        search.add(name, start.fp32, start.model, options)
    found_all = [
        LayerFallback(layer=n, gain_nats=g, extra_ms=extra.get(n)) for n, g in gains.items()
    ]
    return tuple(sorted(found_all, key=lambda item: -item.gain_nats))


def layer_gains(search: Search, start: Int8Candidate) -> dict[str, tuple[float, Path]]:
    """Nats of KL that each layer alone in float takes away from an INT8 file, and the file with that layer in float.

    Layers come in the order of the file, at most :data:`MOST_LAYERS`; the loss is that of the first :data:`SCANNED` samples. Empty for
    a format whose files cannot be looked into.
    """
    context = search.context
    if not isinstance(context.whole, Inspectable):
        return {}
    layers = _heaviest(context, start)
    few = search.x[:SCANNED]
    loss = search.loss_nats(context.run_file(context.host, start.path, few))
    scanned: dict[str, tuple[float, Path]] = {}
    with context.progress.bar("INT8 layer by layer", len(layers)) as bar:
        for layer in layers:
            path = search.folder / f"float-{len(scanned)}{context.whole.info.suffix}"
            options = replace(start.options, float_layers=(layer,))
            try:
                context.whole.quantize(
                    start.fp32, context.calibration, path, model=start.model, options=options
                )
                found = context.run_file(context.host, path, few)
                scanned[layer] = loss - search.loss_nats(found), path
            except FormatError as error:
                context.progress.say(f"      {layer} cannot stay in float: {error.message}")
            bar.advance(1)
    return scanned


def _heaviest(context: Context, start: Int8Candidate) -> list[str]:
    """Layers with weights in the order of the file; where there are too many, those with the most multiply-accumulates."""
    form = context.whole
    assert isinstance(form, Inspectable)
    in_file = {layer for _, layer, _ in form.readers(start.fp32).values() if layer}
    macs: dict[str, float] = {}

    def ran(name: str, module: nn.Module, output: torch.Tensor) -> None:
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        macs[name] = output.numel() * weight[0].numel()

    handles = [
        module.register_forward_hook(lambda m, _, out, at=name: ran(at, m, out))
        for name, module in start.model.named_modules()
        if name in in_file and isinstance(getattr(module, "weight", None), torch.Tensor)
    ]
    run_once(start.model, torch.from_numpy(context.example), handles)
    heaviest = set(sorted(macs, key=lambda n: -macs[n])[:MOST_LAYERS])
    return [name for name in macs if name in heaviest]


def _times(context: Context, paths: dict[str, Path]) -> dict[str, float]:
    """Median latency of files timed in the same rounds, in ms."""
    runtime, form = context.runtime_on(context.board), context.whole
    models = [
        context.model_file(f"float-{name or 'none'}", path, form.describe(path))
        for name, path in paths.items()
    ]
    found = measure(
        context.board,
        models,
        runtime=runtime.name,
        threads=runtime.threads,
        plan=SEARCH,
        purpose="int8 layers",
    )
    return {name: m.median_ms for name, m in zip(paths, found, strict=True)}


def _try_training(search: Search, model: nn.Module) -> None:
    """A few epochs of distillation with rounded weights and inputs, then the file from those weights."""
    context, loaded = search.context, search.context.job.loaded
    settings = loaded.workload.recovery
    epochs = min(MOST_EPOCHS, TRAINING_SHARE * settings.epochs)
    if epochs <= 0:
        return
    rate = settings.learning_rate * TRAINING_RATE
    training = settings.model_copy(
        update={
            "epochs": epochs, "learning_rate": rate, "steps": 1, "start": "kept", "rewind_weights": None,
        }
    )  # fmt: skip
    if settings.max_minutes is not None:
        training = training.model_copy(
            update={"max_minutes": TRAINING_SHARE * settings.max_minutes}
        )
    updates = int(epochs * updates_per_epoch(training, len(loaded.dataset.train)))
    try:
        student = fake_quantised(
            model, torch.from_numpy(context.calibration), frozen_after=3 * updates // 4
        )
        result = recover(
            student,
            context.model,
            loaded.dataset.train,
            loaded.dataset.selection,
            training,
            preprocess=loaded.preprocess,
            seed=context.job.seed,
            checkpoint=search.folder / ".checkpoint",
            progress=context.progress,
        )
        trained = plain(result.model)
        fp32 = search.export("trained", trained)
    except (RuntimeError, AttributeError, EdgepruneError) as error:
        context.progress.say(f"      training with rounding left out: {str(error).splitlines()[0]}")
        return
    note = f"epoch {result.best_epoch} of {result.epochs_run:g}"
    options = replace(search.best.options, float_layers=())
    search.add("training with rounding", fp32, trained, options, note)

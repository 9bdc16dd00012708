"""How channels go and from which weights the result is trained: in one step or in several, kept, rewound or fresh.

Several steps prune to budgets that are geometric in latency. Each scores the channels of the net as it stands (healed), solves for its
budget, cuts, compensates and heals for a short while; the teacher is always the dense model. Widths never grow again, so the channels
that a step keeps are among those of the step before. Only the last step is measured: by the same guarantee loop as a single one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from edgeprune.compress.groups.surgery import cut, narrowed_groups
from edgeprune.compress.heal.fresh_weights import reinitialised
from edgeprune.compress.heal.recover import STATE_VERSION, updates_per_epoch
from edgeprune.compress.heal.sparsify import masked_by_magnitude, sparsified
from edgeprune.compress.repair.compensate import compensate
from edgeprune.compress.repair.norm_statistics import best, held_back, judged
from edgeprune.compress.scores.importance import kept_channels
from edgeprune.errors import BudgetError
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files.records import PrunedResult, RecoveredResult, StepResult
from edgeprune.pipeline.run_folder import RunFolder, Stage
from edgeprune.pipeline.stages import measure
from edgeprune.pipeline.stages.finish import Planned
from edgeprune.pipeline.stages.kernels import say_plan
from edgeprune.plan import certainty
from edgeprune.plan.basis import Basis
from edgeprune.plan.measured import ScoresResult
from edgeprune.plan.solver import solve as search
from edgeprune.records.files import sha256_file
from edgeprune.records.plan import PlanResult
from edgeprune.records.report import LedgerEntry
from edgeprune.records.workload import Recovery
from edgeprune.workload.answers import logits

# Of the epochs, for each step before the last; this project's design says 10 to 20 %.
SHORT_SHARE = 0.15
# Speed-ups up to which ``auto`` takes one and two steps; same source.
ONE_STEP, TWO_STEPS = 1.5, 3.0
COMPENSATION_SAMPLES = 1024
Kept = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Current:
    """The net as it stands: which dense channels of each group it has, and the SHA-256 of its ``weights`` file once it was healed."""

    model: nn.Module
    kept: Kept
    weights: str = ""

    def places(self, kept: Kept) -> dict[str, list[int]]:
        """Where the dense channels that stay are in this net, for each group that it still has."""
        return {
            name: [i for i, c in enumerate(own) if c in set(kept[name])]
            for name, own in self.kept.items()
            if own
        }


@dataclass(frozen=True)
class LastStep:
    """What the last (or only) step works on: the plan that was measured, the net before it, the training that is left, and what is past."""

    planned: Planned
    current: Current
    recovery: Recovery
    steps: int = 1
    earlier_epochs: float = 0.0

    @property
    def kept(self) -> Kept:
        """The dense channels that the plan keeps of each group."""
        return {group.name: group.kept for group in self.planned.plan.result.plan.groups}


def step_count(steps: int | Literal["auto"], dense_ms: float, end_ms: float) -> int:
    """The number of steps; ``auto`` takes 1 up to a speed-up of 1.5x, 2 up to 3x, 3 beyond."""
    if steps != "auto":
        return steps
    speedup = dense_ms / end_ms
    return 1 if speedup <= ONE_STEP else 2 if speedup <= TWO_STEPS else 3


def budgets(dense_ms: float, end_ms: float, steps: int) -> tuple[float, ...]:
    """The budget of every step in ms: step ``i`` of ``n`` gets ``dense (end / dense)^(i / n)``, the last one ``end_ms``.

    Every step then asks for the same speed-up. A budget over the dense latency asks for none.
    Source: the steps of HALP (Shen et al. 2022, arXiv:2210.06659) are geometric in latency, too.
    """
    ratio = min(1.0, end_ms / dense_ms)
    return (*(dense_ms * ratio ** (i / steps) for i in range(1, steps)), end_ms)


def shared_epochs(recovery: Recovery, samples: int, steps: int) -> tuple[float, ...]:
    """Epochs of every step: a short share for each before the last, which gets the rest.

    Shares are whole updates of the weights, and all together make as many as one step with all epochs would.

    Args:
        recovery: epochs and batch size.
        samples: training samples.
        steps: how many, so few that the shares leave something (:data:`edgeprune.records.workload.MOST_STEPS`).
    """
    per_epoch = updates_per_epoch(recovery, samples)
    total = math.ceil(recovery.epochs * per_epoch)
    short = math.floor(SHORT_SHARE * total)
    if steps == 1:
        return (recovery.epochs,)
    counts = [*[short] * (steps - 1), total - short * (steps - 1)]
    return tuple(_epochs(count, per_epoch) for count in counts)


def _epochs(updates: int, per_epoch: int) -> float:
    """The epochs that are rounded up to this many updates."""
    epochs = updates / per_epoch
    while math.ceil(epochs * per_epoch) > updates:
        epochs = math.nextafter(epochs, 0.0)
    return epochs


def narrowed_basis(basis: Basis, kept: Kept, scores: ScoresResult) -> Basis:
    """The basis of a plan that goes on from a net with these channels.

    Args:
        basis: of the dense model; grids, latency and dense channels stay those of it.
        kept: dense channels of each group that the net has.
        scores: of the net; one score for each channel it has, one cost for each width up to its own.

    Returns:
        Widths up to the present ones, which cost nothing; channels that are gone are the first to go.
    """
    curves, orders = {}, {}
    for group in basis.groups:  # one of which nothing is left has no scores
        own, name = np.asarray(kept[group.name], dtype=int), group.name
        gone = np.setdiff1d(np.arange(group.channels), own)
        orders[name] = np.concatenate(
            [gone, own[np.argsort(scores.scores.get(name, ()), kind="stable")]]
        )
        own_curve = scores.curves.get(name, ())
        wider = len(basis.model.grids[name]) - len(own_curve)
        curves[name] = np.concatenate([own_curve, np.zeros(wider)])
    widths = {name: len(channels) for name, channels in kept.items()}
    return replace(basis, curves=curves, orders=orders, at_most=widths)


def earlier_steps(context: Context, run: RunFolder, planned: Planned) -> LastStep:
    """Run all steps but the last, and plan the last on the net that they leave; with one step there is nothing to do.

    The cost is bounded by :data:`edgeprune.records.workload.MOST_STEPS`; every part of a step is a stage of the run folder.

    Raises:
        BudgetError, ModelError, DeviceError: see :mod:`edgeprune.pipeline.stages.measure`.
    """
    job, recovery = context.job, context.job.loaded.workload.recovery
    full = {g.name: tuple(range(g.channels)) for g in context.groups[0]}
    current = Current(context.model, full)
    if recovery.steps == 1:
        return LastStep(planned, current, _training(recovery, recovery.epochs))
    basis = measure.plan_basis(
        context,
        planned.file,
        planned.table.result,
        planned.nets.result,
        planned.scores.result,
    )
    dense_ms, end_ms = basis.nets.dense_ms, job.budget.limit_ms(basis.nets.dense_ms)
    if job.widths is not None:
        least = {**context.full, **job.widths}
        basis = replace(basis, at_least=least)
        end_ms = basis.model.predict(least)
    steps = step_count(recovery.steps, dense_ms, end_ms)
    trainings = step_trainings(recovery, len(job.loaded.dataset.train), steps)
    if steps == 1:
        return LastStep(planned, current, trainings[0])
    say = context.progress.say
    past = 0.0
    for number, limit_ms in enumerate(budgets(dense_ms, end_ms, steps)[:-1], start=1):
        say(f"      step {number} of {steps}: {limit_ms / dense_ms:.1%} of dense, predicted")
        step = _PruningStep(context, run, planned, current, number, trainings[number - 1])
        current, epochs_run = step.run_to(limit_ms, basis)
        past += epochs_run
    say(f"      step {steps} of {steps}: {job.budget.text}, checked on the device")
    step = _PruningStep(context, run, planned, current, steps, trainings[-1])
    found = replace(planned, plan=step.measured_plan(basis))
    say_plan(context, found.plan.result)
    return LastStep(found, current, trainings[-1], steps, past)


def step_trainings(recovery: Recovery, samples: int, steps: int) -> tuple[Recovery, ...]:
    """The settings of the training of every step; only the last keeps a pattern of zeros."""
    *early, last = shared_epochs(recovery, samples, steps)
    # Channels that go in a later step would tear groups of four apart.
    dense = recovery.model_copy(update={"sparsity": "none"})
    return (*(_training(dense, share) for share in early), _training(recovery, last))


def _training(recovery: Recovery, epochs: float) -> Recovery:
    """The settings of one training, without those of the schedule: a time limit is shared as the epochs are."""
    minutes = recovery.max_minutes
    if minutes is not None and recovery.epochs > 0:
        minutes *= epochs / recovery.epochs
    changes: dict[str, Any] = {"epochs": epochs, "max_minutes": minutes or recovery.max_minutes}
    return recovery.model_copy(
        update={**changes, "steps": 1, "start": "kept", "rewind_weights": None}
    )


@dataclass(frozen=True)
class _PruningStep:
    """One step of several, on the net that the step before left."""

    context: Context
    run: RunFolder
    planned: Planned
    current: Current
    number: int
    training: Recovery

    def _scores(self) -> Stage[ScoresResult]:
        if self.number == 1:
            return self.planned.scores
        job, current = self.context.job, self.current
        grids = {
            name: tuple(w for w in grid if w <= len(current.kept[name]))
            for name, grid in self.planned.table.result.grids.items()
        }
        groups = narrowed_groups(self.context.groups[0], current.kept)

        def work(_: Path) -> ScoresResult:
            with self.context.board.rested():
                return measure.score(self.context, grids, current.model, groups)

        inputs = {
            "kernels": self.planned.table.digest,
            "grids": grids,
            "importance": job.importance,
            "data": job.loaded.dataset.digest,
            "weights": current.weights,
            "kept": dict(current.kept),
        }
        return self.run.stage(f"step-{self.number}-importance", "other", inputs, ScoresResult, work)

    def run_to(self, limit_ms: float, basis: Basis) -> tuple[Current, float]:
        """Solve for the limit, cut and heal; ``basis`` is the dense model's. The net that is left, and the epochs that it took."""
        job, scores = self.context.job, self._scores()
        if self.number > 1:
            basis = narrowed_basis(basis, self.current.kept, scores.result)
        inputs = {
            "importance": scores.digest,
            "nets": self.planned.nets.digest,
            "limit_ms": limit_ms,
            "at_least": dict(basis.at_least),
            "scope": job.scope,
        }
        cut = self.run.stage(
            f"step-{self.number}-prune",
            "other",
            inputs,
            StepResult,
            lambda folder: self._cut(limit_ms, basis, folder),
        )
        self._say(cut.result.pruned.entries)
        healed = self.run.stage(
            f"step-{self.number}-recover",
            "training",
            {
                "prune": cut.digest,
                "recovery": self.training,
                "version": STATE_VERSION,
                "seed": job.seed,
                "threads": torch.get_num_threads(),
            },
            RecoveredResult,
            lambda folder: self._healed(cut, folder),
            final=lambda result: not result.interrupted,
        )
        self._say((healed.result.entry,))
        if healed.result.interrupted:
            self.run.notes.append(f"the healing of step {self.number} was interrupted")
        path = healed.path("recovered.safetensors")
        model = measure.with_weights(measure.pruned_model(self.context, cut.result.kept), path)
        # The file's digest, not the stage's: an interrupted training leaves other weights than the one that is made up for it.
        return Current(model, cut.result.kept, sha256_file(path)), healed.result.epochs_run

    def _cut(self, limit_ms: float, basis: Basis, folder: Path) -> StepResult:
        problem = basis.problem()
        try:
            solution = search.solve(problem, limit_ms)
        except BudgetError:  # only by the model; the last step's search is measured
            solution = search.fastest(problem)
        kept = {n: kept_channels(basis.orders[n], w) for n, w in solution.widths.items()}
        model, pruned = cut_and_compensate(self.context, self.current, kept)
        measure.save_weights(model, folder / "compensated.safetensors")
        return StepResult(
            limit_ms=limit_ms,
            predicted_ms=solution.predicted_ms,
            cost_nats=solution.cost_nats,
            kept=kept,
            pruned=pruned,
        )

    def _healed(self, cut: Stage[StepResult], folder: Path) -> RecoveredResult:
        student = measure.with_weights(
            measure.pruned_model(self.context, cut.result.kept),
            cut.path("compensated.safetensors"),
        )
        # Another order of samples in every step, the given seed's own in the last.
        seed = self.context.job.seed + self.number
        return heal(self.context, student, folder, recovery=self.training, seed=seed)

    def measured_plan(self, basis: Basis) -> Stage[PlanResult]:
        """The plan of the last step, by the guarantee loop; ``basis`` is the dense model's."""
        job, scores = self.context.job, self._scores()
        groups = narrowed_groups(self.context.groups[0], self.current.kept)
        loss = measure.structure_loss(self.context, self.current.model, groups)
        trial = measure.structure_trial(self.context, loss)
        basis = replace(
            narrowed_basis(basis, self.current.kept, scores.result),
            at_least={},
            loss=lambda kept: loss(self.current.places(kept)),
            trial=None if trial is None else lambda kept: trial(self.current.places(kept)),
        )
        stand = replace(self.planned.stand, phase=f"step-{self.number}-")
        return self.run.stage(
            f"step-{self.number}-plan",
            "measuring",
            {
                "plan": self.planned.plan.digest,
                "importance": scores.digest,
                "budget": job.budget,
                "accepted": certainty.RULE,
            },
            PlanResult,
            lambda _: measure.plan_structure(self.context, stand, self.planned.file, basis),
        )

    def _say(self, entries: Sequence[LedgerEntry]) -> None:
        for entry in entries:
            self.context.progress.say(f"        {entry.stage}: {entry.metric} {entry.value:.2%}")


def heal(
    context: Context, student: nn.Module, folder: Path, *, recovery: Recovery, seed: int
) -> RecoveredResult:
    """Train while others may use the boards."""
    with context.board.rested(), context.proof.rested():
        return measure.heal(context, student, folder, recovery=recovery, seed=seed)


def prune_inputs(context: Context, last: LastStep) -> dict[str, Any]:
    """What the last cut depends on."""
    job = context.job
    start = job.loaded.workload.recovery.start
    inputs: dict[str, Any] = {"plan": last.planned.plan.digest}
    if last.current.weights and start == "kept":
        inputs["weights"] = last.current.weights
    if start == "rewound":
        inputs["earlier"] = job.loaded.earlier_digest
    if start == "fresh":
        inputs["fresh"] = job.seed
    if job.loaded.workload.recovery.sparsity != "none":
        inputs["sparsity"] = job.loaded.workload.recovery.sparsity
    return inputs


def prune(context: Context, last: LastStep, folder: Path) -> PrunedResult:
    """The last cut, with the weights that its training starts from in ``compensated.safetensors``.

    Kept weights are repaired as far as that goes without training; rewound ones get the batch-norm statistics that suit them best; fresh
    ones nothing. Where weights are to be sparse, they are from here on.
    """
    recovery = context.job.loaded.workload.recovery
    model, result = _start(context, last)
    if recovery.sparsity != "none":
        model, entry = _sparsified(context, model)
        result = result.model_copy(update={"entries": (*result.entries, entry)})
    measure.save_weights(model, folder / "compensated.safetensors")
    return result


def _start(context: Context, last: LastStep) -> tuple[nn.Module, PrunedResult]:
    """The model that the last training starts from."""
    recovery, seed = context.job.loaded.workload.recovery, context.job.seed
    if recovery.start == "kept":
        return cut_and_compensate(context, last.current, last.kept)
    if recovery.start == "fresh":
        model = reinitialised(measure.pruned_model(context, last.kept), seed)
        note = f"fresh weights of seed {seed}: the from-scratch control"
        entries = [context.entry("pruned", logits(model, context.development), note=note)]
    else:
        cut = measure.pruned_model(context, last.kept, context.job.loaded.earlier)
        found = best(judged(cut, *held_back(_training_samples(context), context.model)))
        model = found.model
        note = f"weights of {recovery.rewind_weights}; batch-norm statistics are {found.statistics}"
        entries = [
            context.entry("pruned", logits(cut, context.development)),
            context.entry("compensated", logits(model, context.development), note=note),
        ]
    return model, PrunedResult(entries=tuple(entries), compensation=note)


def _sparsified(context: Context, model: nn.Module) -> tuple[nn.Module, LedgerEntry]:
    """The model with 2:4 sparse weights; fresh ones are masked alone, for there is nothing that they compute yet."""
    if context.job.loaded.workload.recovery.start == "fresh":
        sparse, note = masked_by_magnitude(model), "2:4 sparse, masked by magnitude"
    else:
        sparse, found = sparsified(model, _training_samples(context), progress=context.progress)
        note = found.note
    return sparse, context.entry("sparsified", logits(sparse, context.development), note=note)


def cut_and_compensate(
    context: Context, current: Current, kept: Kept
) -> tuple[nn.Module, PrunedResult]:
    """Remove channels from the net as it stands, then repair what can be repaired without training.

    What the repaired layers must reproduce are the outputs of that net, not of the dense one: after healing, its layers no longer
    compute what the dense model's do, and only what this cut took is to be made up for.

    Args:
        context: data and progress.
        current: the net before the cut.
        kept: dense channels that stay of each group; they are among those of ``current``.
    """
    groups = narrowed_groups(context.groups[0], current.kept)
    places = current.places(kept)
    pruned, outputs = cut(current.model, groups, places, torch.from_numpy(context.example))
    entries = [context.entry("pruned", logits(pruned, context.development))]
    repaired, report = compensate(
        pruned, current.model, outputs, _training_samples(context), progress=context.progress
    )
    entries.append(
        context.entry("compensated", logits(repaired, context.development), note=report.note)
    )
    return repaired, PrunedResult(entries=tuple(entries), compensation=report.note)


def _training_samples(context: Context) -> torch.Tensor:
    train = context.job.loaded.dataset.train
    return torch.from_numpy(context.inputs(train, COMPENSATION_SAMPLES))


def note(last: LastStep, recovery: Recovery) -> str:
    """One line for the report about steps and start; empty for one step from kept weights."""
    parts = []
    if last.steps > 1:
        parts.append(
            f"pruned in {last.steps} steps with budgets geometric in latency;"
            f" {last.earlier_epochs:.3g} of the {recovery.epochs:g} epochs healed the steps before the last;"
            f" costs in nats are those of step {last.steps}, counted from the net that the step before left"
        )
    if recovery.start == "rewound":
        parts.append(f"training started from weights rewound to {recovery.rewind_weights}")
    if recovery.start == "fresh":
        parts.append("training started from fresh random weights, as the from-scratch control")
    return "; ".join(parts)

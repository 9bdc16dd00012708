"""The methods of one comparison: ours, ours with parts taken away, and the other pruners, all on one net and one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from edgeprune.compress.scores import importance as importances
from edgeprune.formats import Kernel
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.stages import measure
from edgeprune.pipeline.stages.finish import Prepared
from edgeprune.plan import guarantee
from edgeprune.plan.basis import Basis
from edgeprune.plan.latency.model import LatencyModel
from edgeprune.plan.measured import ScoresResult
from edgeprune.plan.net_model import fit, kernel_model
from edgeprune.plan.solver import solve as search
from edgeprune.plan.solver.solve import Problem
from edgeprune.records.base import read_json
from edgeprune.records.budget import parse_budget
from edgeprune.records.files import write_json
from edgeprune.records.plan import LatencyModelQuality, PruningPlan
from edgeprune.records.workload import Recovery
from edgeprune.workload.dataset import model_input
from methods import torch_pruning
from methods.candidate import Candidate, Method
from methods.paths import halp, netadapt, path_method
from methods.rig import Rig
from methods.solver import (
    Cutter,
    additive,
    for_grids,
    mac_model,
    solver_method,
    sums,
    unaligned,
    uniform,
    without_removal,
)

TAYLOR_IMAGES, NETADAPT_IMAGES = 1024, 2000
NETADAPT_STEPS = 12  # latencies on the way down
NETADAPT_SHORT = 6  # SGD steps of each short training


class Comparison:
    """Everything that one run compares."""

    def __init__(self, context: Context, ready: Prepared, run: Path, recovery: Recovery) -> None:
        self.context, self.ready = context, ready
        self.rig = Rig(context, ready, run, recovery)
        self.example = torch.from_numpy(context.example)
        self.cutter = Cutter(context.model, context.groups[0], self.example)
        measured = ready.table.result
        raw = kernel_model(ready.file, measured, context.full)
        corrected, quality = fit(raw, ready.nets.result, measured.kernels_measured)
        self.raw, self.quality = raw, quality
        self.scores = self._scores(context.job.importance)
        self.basis = self._basis(self.scores, corrected, quality)

    def _scores(self, importance: str) -> ScoresResult:
        path = self.rig.folder / f"scores-{importance}.json"
        if path.exists():
            return read_json(ScoresResult, path)
        job = dataclasses.replace(self.context.job, importance=importance)
        context = dataclasses.replace(self.context, job=job)
        grids, groups = self.ready.table.result.grids, context.groups[0]
        found = measure.score(context, grids, context.model, groups)
        write_json(found, path)
        return found

    def _basis(
        self, scores: ScoresResult, model: LatencyModel, quality: LatencyModelQuality
    ) -> Basis:
        groups, frozen = self.context.groups
        arrays = {g: np.asarray(s) for g, s in scores.scores.items()}
        loss = measure.structure_loss(self.context, self.context.model, groups)
        return Basis(
            groups=groups,
            frozen=frozen,
            model=model,
            nets=self.ready.nets.result,
            quality=quality,
            curves={g: np.asarray(c) for g, c in scores.curves.items()},
            orders=importances.removal_order(arrays),
            importance=self.context.job.importance,
            loss=loss,
            trial=measure.structure_trial(self.context, loss),
        )

    def baselines(self, wanted: Callable[[str], bool]) -> Iterator[Callable[[], Iterator[Method]]]:
        """Makers of methods with a knob, cheap ones first."""
        yield self._rules
        yield self._solvers
        yield self._torch_pruning
        yield self._halp
        if wanted("netadapt"):
            yield self._netadapt

    def _rules(self) -> Iterator[Method]:
        l2 = importances.removal_order(self._named("l2"))
        yield uniform(self.cutter, l2, rounding=8)
        yield uniform(
            self.cutter, importances.removal_order(self._named("random")), rounding=8, name="random"
        )

    def _named(self, name: str, samples: int = TAYLOR_IMAGES) -> dict[str, np.ndarray]:
        x = torch.from_numpy(self.context.inputs(self.context.job.loaded.dataset.train, samples))
        function = importances.BY_NAME[name]
        found = function(self.context.model, self.cutter.groups, x, self.context.job.seed)
        return {n: np.asarray(s) for n, s in found.items()}

    def _solvers(self) -> Iterator[Method]:
        """Ours minus one part each, sums of costs alone; the knob is searched on the device, as for the baselines."""
        basis, cut = self.basis, self.cutter
        grids, curves = basis.model.grids, basis.curves
        macs = mac_model(self.context.model, cut.groups, grids, self.example)
        raw = {g: np.asarray(s) for g, s in self.scores.scores.items()}
        random = self._scores("random")
        whole, together = without_removal(basis.model), basis.together
        problems = {
            "edgeprune-minus-blocks": (
                Problem(whole.grids, for_grids(curves, whole.grids), whole),
                basis.orders,
            ),
            "edgeprune-minus-evenness": (
                Problem(grids, curves, basis.model, together=together),
                basis.orders,
            ),
            "edgeprune-mac-budget": (Problem(grids, curves, macs, together=together), basis.orders),
            "edgeprune-minus-bilinear": (
                Problem(grids, curves, additive(basis.model), together=together),
                basis.orders,
            ),
            "edgeprune-minus-tiles": (unaligned(basis.model, curves), basis.orders),
            "edgeprune-minus-calibration": (
                Problem(grids, sums(raw, grids), basis.model, together=together),
                basis.orders,
            ),
            "edgeprune-random-importance": (
                Problem(
                    grids,
                    {g: np.asarray(c) for g, c in random.curves.items()},
                    basis.model,
                    together=together,
                ),
                importances.removal_order({g: np.asarray(s) for g, s in random.scores.items()}),
            ),
        }
        for name, (problem, orders) in problems.items():
            yield solver_method(name, cut, problem, orders, repaired=True)

    def _torch_pruning(self) -> Iterator[Method]:
        split = self.context.job.loaded.dataset.train
        assert split.y is not None
        order = np.random.default_rng(0).permutation(len(split))[:TAYLOR_IMAGES]
        x = torch.from_numpy(self._prepared(split.x[order]))
        y = torch.from_numpy(split.y[order])
        yield from torch_pruning.methods(
            self.context.model, self.cutter.groups, x, y, seed=self.context.job.seed
        )

    def _prepared(self, raw: np.ndarray) -> np.ndarray:
        return model_input(raw, self.context.job.loaded.preprocess)

    def _halp(self) -> Iterator[Method]:
        model = without_removal(self.basis.model)
        writers: dict[str, list[LatencyModel]] = {}
        for group in self.cutter.groups:
            layers = set(group.producers())
            mine = [
                k
                for k in self.ready.file.kernels
                if k.layer in layers and group.name in k.variables
            ]
            writers[group.name] = [self._alone(k, model) for k in mine]
        path = halp(self.cutter, model, writers, self._named("taylor"), steps=60)
        yield path_method("halp-like", path)

    def _alone(self, kernel: Kernel, model: LatencyModel) -> LatencyModel:
        """What one kernel takes, corrected as the whole is."""
        whole = self.ready.file
        file = SimpleNamespace(kernels=(kernel,), blocks=whole.blocks, kernel=whole.kernel)
        measured, full = self.ready.table.result, self.context.full
        alone = without_removal(kernel_model(file, measured, full))  # type: ignore[arg-type]
        return dataclasses.replace(
            alone, scale=model.scale, class_scales=model.class_scales, bend_per_ms=model.bend_per_ms
        )

    def _netadapt(self) -> Iterator[Method]:
        data = self.context.job.loaded.dataset
        assert data.train.y is not None
        assert data.selection.y is not None
        generator, y = np.random.default_rng(0), data.train.y

        def batch(_: int) -> tuple[torch.Tensor, torch.Tensor]:
            chosen = generator.integers(0, len(y), 64)
            return torch.from_numpy(self._prepared(data.train.x[chosen])), torch.from_numpy(
                y[chosen]
            )

        held = data.selection.head(NETADAPT_IMAGES)
        assert held.y is not None
        path = netadapt(
            self.cutter,
            without_removal(self.basis.model),
            importances.removal_order(self._named("l2")),
            batch,
            (torch.from_numpy(self._prepared(held.x)), torch.from_numpy(held.y)),
            steps=NETADAPT_STEPS,
            short_steps=NETADAPT_SHORT,
            progress=self.context.progress,
        )
        yield path_method("netadapt", path)

    def ours(self, budget: str) -> tuple[PruningPlan, float]:
        """The plan that ``deploy`` would make, and its measured share of the dense latency."""
        path = self.rig.folder / f"plan-{budget}.json"
        if not path.exists():
            ready = self.ready
            found = guarantee.make_plan(
                dataclasses.replace(ready.stand, phase=f"{budget}-"),
                ready.file,
                self.basis,
                budget=parse_budget(budget),
                progress=self.context.progress,
            )
            write_json(found.plan, path)
        plan = read_json(PruningPlan, path)
        self.rig.measure([plan.widths()])
        return plan, self.rig.ratios[tuple(sorted(plan.widths().items()))]

    def unverified(self, ratio: float) -> Candidate:
        """The first solution of the uncorrected kernel sums, as a table without whole nets would have it; nothing is checked."""
        basis = self.basis
        problem = Problem(basis.model.grids, dict(basis.curves), self.raw, together=basis.together)
        found = search.solve(problem, ratio * self.raw.predict({}))
        return self.cutter.candidate(found.widths, self.basis.orders, repaired=True)

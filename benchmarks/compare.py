"""Pruners side by side at equal measured latency: ``python benchmarks/compare.py --net example``.

One net, one device, one fine-tuning budget, one distillation, one INT8 recipe. The knob of each baseline is searched on the device until
its measured latency is the budget's; ours comes from the search that ``deploy`` runs. The results file is written after every training, so
a run that is cut off keeps what it has, and a second run with the same ``--run`` goes on. Then: ``python benchmarks/readme.py``.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np
import torch
from compare_records import CompareResults, CompareRow, OneShot, Trained, Versus
from methods import torch_pruning
from methods.candidate import Candidate, Method
from methods.paths import halp, netadapt, path_method
from methods.rig import Rig, mcnemar
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
from torch import nn

from edgeprune import api, catalog, guarantee, pipeline, planning, records, stages
from edgeprune.closing import Prepared, versions
from edgeprune.compress import importance as importances
from edgeprune.context import Context
from edgeprune.errors import BudgetError, SpecError
from edgeprune.feasibility import prepare
from edgeprune.formats import Kernel
from edgeprune.guarantee import Basis
from edgeprune.latency.predictor import LatencyModel
from edgeprune.options import Options
from edgeprune.progress import Terminal
from edgeprune.results import PruningPlan
from edgeprune.runfolder import RunFolder
from edgeprune.search import Problem
from edgeprune.specs import Recovery, Workload, parse_budget
from edgeprune.stage_records import ScoresResult
from edgeprune.version import VERSION
from edgeprune.workload import LoadedWorkload, from_objects, load_workload

HERE = Path(__file__).parent
RESULTS = HERE / "results"
EXAMPLE = "fashion-mnist"
OURS = "edgeprune"
SCRATCH = "edgeprune-from-scratch"
UNREPAIRED = "edgeprune-minus-compensation"
UNVERIFIED = "edgeprune-minus-verification"
TAYLOR_IMAGES, NETADAPT_IMAGES = 1024, 2000
NETADAPT_STEPS, NETADAPT_SHORT = (
    12,
    6,
)  # latencies on the way down; SGD steps of each short training


def load_net(name: str, recovery: Recovery) -> LoadedWorkload:
    """A trained net with Fashion-MNIST: ``example``, or one of ``benchmarks/nets``."""
    folder = catalog.example_dir(EXAMPLE)
    workload = records.read_yaml(Workload, folder / "edgeprune.yaml")
    workload = workload.model_copy(update={"recovery": recovery})
    if name == "example":
        return load_workload(workload, folder)
    sys.path.insert(0, str(HERE / "nets"))
    import train_nets

    return from_objects(
        train_nets.load(name), train_nets.data.load(), settings=workload, base=folder
    )


class Comparison:
    """Everything that one run compares."""

    def __init__(self, context: Context, ready: Prepared, run: Path, recovery: Recovery) -> None:
        self.context, self.ready = context, ready
        self.rig = Rig(context, ready, run, recovery)
        groups, frozen = context.groups
        self.cutter = Cutter(context.model, groups, torch.from_numpy(context.example))
        measured = ready.table.result
        raw = planning.kernel_model(ready.file, measured, context.full)
        corrected, quality = planning.fit(raw, ready.nets.result, measured.kernels_measured)
        self.raw, self.quality = raw, quality
        self.scores = self._scores(context.job.importance)
        self.basis = self._basis(self.scores, corrected, quality)
        self._frozen = frozen

    def _scores(self, importance: str) -> ScoresResult:
        path = self.rig.folder / f"scores-{importance}.json"
        if path.exists():
            return records.read_json(ScoresResult, path)
        job = dataclasses.replace(self.context.job, importance=importance)
        context = dataclasses.replace(self.context, job=job)
        grids, groups = self.ready.table.result.grids, context.groups[0]
        found = stages.score(context, grids, context.model, groups)
        records.write_json(found, path)
        return found

    def _basis(self, scores: ScoresResult, model: object, quality: object) -> Basis:
        groups, frozen = self.context.groups
        arrays = {g: np.asarray(s) for g, s in scores.scores.items()}
        return Basis(
            groups=groups,
            frozen=frozen,
            model=model,  # type: ignore[arg-type]
            nets=self.ready.nets.result,
            quality=quality,  # type: ignore[arg-type]
            curves={g: np.asarray(c) for g, c in scores.curves.items()},
            orders=importances.removal_order(arrays),
            importance=self.context.job.importance,
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
        """Ours minus one part each; the knob is searched on the device, as for the baselines."""
        basis, cut = self.basis, self.cutter
        example = torch.from_numpy(self.context.example)
        grids, curves = basis.model.grids, basis.curves
        macs = mac_model(self.context.model, cut.groups, grids, example)
        raw = {g: np.asarray(s) for g, s in self.scores.scores.items()}
        random = self._scores("random")
        whole = without_removal(basis.model)
        problems = {
            "edgeprune-minus-blocks": (
                Problem(whole.grids, for_grids(curves, whole.grids), whole),
                basis.orders,
            ),
            "edgeprune-mac-budget": (Problem(grids, curves, macs), basis.orders),
            "edgeprune-minus-bilinear": (
                Problem(grids, curves, additive(basis.model)),
                basis.orders,
            ),
            "edgeprune-minus-tiles": (unaligned(basis.model, curves), basis.orders),
            "edgeprune-minus-calibration": (
                Problem(grids, sums(raw, grids), basis.model),
                basis.orders,
            ),
            "edgeprune-random-importance": (
                Problem(grids, {g: np.asarray(c) for g, c in random.curves.items()}, basis.model),
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
        from edgeprune.datasets import model_input

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
        file = SimpleNamespace(kernels=(kernel,), blocks=self.ready.file.blocks)
        measured, full = self.ready.table.result, self.context.full
        alone = without_removal(planning.kernel_model(file, measured, full))  # type: ignore[arg-type]
        return dataclasses.replace(alone, scale=model.scale, class_scales=model.class_scales)

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
            records.write_json(found.plan, path)
        plan = records.read_json(PruningPlan, path)
        self.rig.measure([plan.widths()])
        return plan, self.rig.ratios[tuple(sorted(plan.widths().items()))]

    def unverified(self, ratio: float) -> Candidate:
        """The first solution of the uncorrected kernel sums, as a table without whole nets would have it; nothing is checked."""
        problem = Problem(self.basis.model.grids, dict(self.basis.curves), self.raw)
        from edgeprune import search

        found = search.solve(problem, ratio * self.raw.predict({}))
        return self.cutter.candidate(found.widths, self.basis.orders, repaired=True)


@dataclasses.dataclass
class Entry:
    """A structure that will be trained, with the row that is being filled."""

    row: CompareRow
    start: Callable[[], nn.Module]


def structures(
    comparison: Comparison,
    budgets: Mapping[str, float],
    wanted: Callable[[str], bool],
    ablated: Collection[str],
    say: Callable[[str], None],
) -> list[Entry]:
    """Every wanted method at every budget, measured; ours with parts taken away at the ``ablated`` budgets only. No training yet."""
    entries = []
    for budget, ratio in budgets.items():
        whole = wanted if budget in ablated else chooser(OURS)
        entries += _ours(comparison, budget, ratio, whole, say)
    for maker in comparison.baselines(wanted):
        for method in maker():
            is_part = method.name.startswith(f"{OURS}-")
            asked = {r: b for b, r in budgets.items() if b in ablated or not is_part}
            if not wanted(method.name) or not asked:
                continue
            for ratio, candidate in comparison.rig.fit(method, tuple(asked)):
                budget = asked[ratio]
                entries.append(
                    _entry(
                        comparison,
                        method.name,
                        method.family,
                        budget,
                        ratio,
                        candidate,
                        say,
                        shown=budget == next(iter(budgets)) or method.name.startswith(OURS),
                    )
                )
    return entries


def _ours(
    comparison: Comparison,
    budget: str,
    ratio: float,
    wanted: Callable[[str], bool],
    say: Callable[[str], None],
) -> list[Entry]:
    try:
        plan, _ = comparison.ours(budget)
    except BudgetError as error:
        row = CompareRow(
            method=OURS,
            family=OURS,
            budget=budget,
            asked_ratio=ratio,
            status="not reached",
            message=str(error),
        )
        return [Entry(row, nn.Identity)]
    cut, orders = comparison.cutter, comparison.basis.orders
    whole = cut.candidate(plan.widths(), orders, repaired=True)
    bare = cut.candidate(plan.widths(), orders, repaired=False)
    found = [_entry(comparison, OURS, OURS, budget, ratio, whole, say)]
    if wanted(UNREPAIRED):
        found.append(_entry(comparison, UNREPAIRED, UNREPAIRED, budget, ratio, bare, say))
    if wanted(SCRATCH):
        scratch = _entry(comparison, SCRATCH, SCRATCH, budget, ratio, bare, say)
        found.append(Entry(scratch.row, lambda: _fresh(bare.build())))
    if wanted(UNVERIFIED):
        loose = comparison.unverified(ratio)
        comparison.rig.measure([loose.widths])
        found.append(_entry(comparison, UNVERIFIED, UNVERIFIED, budget, ratio, loose, say))
    return found


def _fresh(model: nn.Module) -> nn.Module:
    """The same net with new weights."""
    torch.manual_seed(0)
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return model


def _entry(
    comparison: Comparison,
    name: str,
    family: str,
    budget: str,
    ratio: float,
    candidate: Candidate | None,
    say: Callable[[str], None],
    *,
    shown: bool = True,
) -> Entry:
    """One structure; ``shown`` says whether its accuracy before training is wanted."""
    base = {"method": name, "family": family, "budget": budget, "asked_ratio": ratio}
    if candidate is None:
        say(f"{name:32} {budget:>4}  not reached")
        return Entry(CompareRow.model_validate({**base, "status": "not reached"}), nn.Identity)
    rig = comparison.rig
    example = torch.from_numpy(comparison.context.example)
    macs = mac_model(
        comparison.context.model,
        comparison.cutter.groups,
        _single(candidate, comparison),
        example,
    )
    small, full = (macs.predict({g: grid[i] for g, grid in macs.grids.items()}) for i in (0, -1))
    row = CompareRow.model_validate(
        {
            **base,
            "status": "not run",
            "widths": dict(candidate.widths),
            "structure_ratio": rig.ratios[candidate.key],
            "macs_ratio": small / full,
            "one_shot": OneShot.model_validate(rig.one_shot(candidate)) if shown else None,
        }
    )
    shot = row.one_shot
    say(f"{name:32} {budget:>4}  {rig.ratios[candidate.key]:.3f} of dense, MACs {small / full:.3f}")
    if shot is not None:
        repaired = "" if shot.compensated is None else f", repaired {shot.compensated:.4f}"
        say(f"      one-shot: {shot.naive:.4f}, recalibrated {shot.recalibrated:.4f}{repaired}")
    return Entry(row, lambda: rig.repaired(candidate))


def _single(candidate: Candidate, comparison: Comparison) -> dict[str, tuple[int, ...]]:
    """Grids of the candidate's width and the full one."""
    full = comparison.context.full
    return {g: tuple(sorted({candidate.widths[g], full[g]})) for g in full}


def versus(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> Versus:
    """Ours against another method, by seed and image."""
    pairs = list(zip(ours, theirs, strict=False))
    only_ours = sum(int((a & ~b).sum()) for a, b in pairs)
    only_theirs = sum(int((b & ~a).sum()) for a, b in pairs)
    margins = np.array([a.mean() - b.mean() for a, b in pairs])
    low = high = None
    if len(margins) >= 3:
        half = _T95[len(margins) - 1] * margins.std(ddof=1) / np.sqrt(len(margins))
        low, high = float(margins.mean() - half), float(margins.mean() + half)
    return Versus(
        margin=float(margins.mean()),
        only_ours=only_ours,
        only_theirs=only_theirs,
        p=mcnemar(only_ours, only_theirs),
        margin_low=low,
        margin_high=high,
    )


# Two-sided 95 % of Student's t by degrees of freedom.
_T95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class Runner:
    """Trains the entries, keeps the results file up to date, and times all files once more at the end."""

    def __init__(
        self, comparison: Comparison, entries: Sequence[Entry], results: CompareResults, out: Path
    ) -> None:
        self._comparison, self._out, self._results = comparison, out, results
        self.entries = list(entries)
        self._test: dict[tuple[str, str], dict[int, np.ndarray]] = {}
        self._began = time.monotonic()

    def train(self, seeds: int, only: Callable[[str], bool], until: float) -> None:
        """Every entry with every seed, all entries of one seed before the next; none is begun after ``until``."""
        for seed in range(seeds):
            for entry in self.entries:
                if entry.row.status == "not reached" or (seed and not only(entry.row.method)):
                    continue
                if time.monotonic() > until:
                    return
                self._train(entry, seed)
                self._write()

    def _train(self, entry: Entry, seed: int) -> None:
        row, rig = entry.row, self._comparison.rig
        name = f"{row.method}-{row.budget}"
        shipped = rig.shipped(name, seed, entry.start)
        self._test.setdefault((row.method, row.budget), {})[seed] = shipped.test
        trained = Trained(
            seed=seed,
            development=float(shipped.development.mean()),
            test=float(shipped.test.mean()),
            seconds=shipped.seconds,
        )
        dense = sum(p.numel() for p in self._comparison.context.model.parameters())
        entry.row = row.model_copy(
            update={
                "status": "done",
                "trained": (*row.trained, trained),
                "parameters_ratio": shipped.parameters / dense,
            }
        )
        self._comparison.context.progress.say(
            f"{row.method:32} {row.budget:>4}  seed {seed}: development {trained.development:.4f},"
            f" test {trained.test:.4f}, {trained.seconds:.0f} s"
        )

    def time(self) -> None:
        """The shipped files of seed 0 beside dense, all files of one budget in the same rounds."""
        rig, ready = self._comparison.rig, self._comparison.ready
        dense = {
            "fp32": ready.dense.path(ready.dense.result.fp32.path),
            "int8": ready.dense.path(ready.dense.result.int8.path),
        }
        for budget in dict.fromkeys(e.row.budget for e in self.entries):
            mine = [e for e in self.entries if e.row.budget == budget and e.row.status == "done"]
            if not mine:
                continue
            files = {
                e.row.method: rig.trained
                / f"{e.row.method}-{budget}-0.int8{self._comparison.context.form.info.suffix}"
                for e in mine
            }
            found = rig.final(files, dense)
            gain = 1 / found["dense-int8"].ratio
            for entry in mine:
                c = found[entry.row.method]
                entry.row = entry.row.model_copy(
                    update={
                        "ratio": c.ratio,
                        "low": c.low,
                        "high": c.high,
                        "against_fp32": gain / c.ratio,
                    }
                )
            self._write()

    def _write(self) -> None:
        rows = []
        for entry in self.entries:
            row = entry.row
            ours, theirs = (
                self._test.get((OURS, row.budget), {}),
                self._test.get((row.method, row.budget), {}),
            )
            shared = sorted(ours.keys() & theirs.keys())
            if row.method != OURS and shared:
                found = versus([ours[s] for s in shared], [theirs[s] for s in shared])
                row = row.model_copy(update={"versus": found})
            rows.append(row)
        seconds = time.monotonic() - self._began
        self._results = self._results.model_copy(update={"rows": tuple(rows), "seconds": seconds})
        records.write_json(self._results, self._out)


def _results(comparison: Comparison, net: str, seeds: int) -> CompareResults:
    context, ready, rig = comparison.context, comparison.ready, comparison.rig
    data = context.job.loaded.dataset
    assert data.test is not None
    files = {
        "fp32": ready.dense.path(ready.dense.result.fp32.path),
        "int8": ready.dense.path(ready.dense.result.int8.path),
    }
    accuracy = {
        s: {p: float(rig.correct(f, s).mean()) for p, f in files.items()}
        for s in ("development", "test")
    }
    found = ready.latency.result
    return CompareResults(
        edgeprune_version=VERSION,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=shlex.join(["python", "benchmarks/compare.py", *sys.argv[1:]]),
        net=net,
        target=context.job.target.name,
        device=context.job.device_name,
        precision=found.precision,
        fingerprint=found.fingerprint,
        epochs=rig.recovery.epochs,
        learning_rate=rig.recovery.learning_rate,
        batch_size=rig.recovery.batch_size,
        train_images=len(data.train),
        development_n=len(data.development),
        test_n=len(data.test),
        seeds=seeds,
        dense_development=accuracy["development"],
        dense_test=accuracy["test"],
        dense_ms={p: m.median_ms for p, m in found.measurements.items()},
        latency_model=comparison.quality,
        versions=versions(),
        rows=(),
        seconds=0.0,
    )


def chooser(patterns: str) -> Callable[[str], bool]:
    """Whether a method is wanted: by its name, or by a start of it that ends in a star, separated by commas; empty means all."""
    asked = [p for p in patterns.split(",") if p]
    return lambda name: (
        not asked or name == OURS or any(fnmatch.fnmatchcase(name, p) for p in asked)
    )


@click.command()
@click.option(
    "--net", default="example", show_default=True, help="example, or a net of benchmarks/nets."
)
@click.option("--budgets", default="2x,3x,4x", show_default=True)
@click.option(
    "--methods",
    default="",
    help="Names or patterns such as tp-*, separated by commas; default: all.",
)
@click.option(
    "--ablate", default="", help="Budgets at which parts are taken away from ours; default: all."
)
@click.option("--seeds", type=click.IntRange(1, 10), default=1, show_default=True)
@click.option("--seeded", default="", help="Methods that get more than one seed; default: all.")
@click.option("--epochs", type=click.FloatRange(0, 100), default=0.3, show_default=True)
@click.option("--rate", type=click.FloatRange(0, 1), default=0.02, show_default=True)
@click.option("--target", default="rpi4", show_default=True)
@click.option("--device", help="Name in devices.yaml.")
@click.option("--run", type=click.Path(path_type=Path), help="Default: runs/compare-NET.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Default: benchmarks/results/compare-NET.json."
)
@click.option(
    "--max-hours", type=click.FloatRange(0, min_open=True), default=12.0, show_default=True
)
def main(
    net: str,
    budgets: str,
    methods: str,
    ablate: str,
    seeds: int,
    seeded: str,
    epochs: float,
    rate: float,
    target: str,
    device: str | None,
    run: Path | None,
    out: Path | None,
    max_hours: float,
) -> None:
    """Compare pruners at equal measured latency."""
    until = time.monotonic() + 3600 * max_hours
    recovery = records.read_yaml(Workload, catalog.example_dir(EXAMPLE) / "edgeprune.yaml").recovery
    recovery = recovery.model_copy(update={"epochs": epochs, "learning_rate": rate})
    asked = {}
    for text in budgets.split(","):
        budget = parse_budget(text)
        if budget.kind != "ratio":
            raise SpecError(
                f"budgets must be shares or speed-ups such as 50% or 2x, but got {text!r}"
            )
        asked[text] = budget.value
    path = run or Path("runs") / f"compare-{net}"
    progress = Terminal()
    job = api.resolve(load_net(net, recovery), Options(target=target, device=device, run=path))
    # One precision for all, whichever is faster on this device: it is what ships.
    target_spec = job.target.model_copy(update={"precisions": ("int8",)})
    job = dataclasses.replace(job, target=target_spec)
    with RunFolder(path, progress) as folder, pipeline.opened(job, progress, folder) as context:
        ready = prepare(context, folder)
        kept = (
            path / f"compare-{ready.nets.digest}"
        )  # what is kept between runs belongs to these tables
        kept.mkdir(exist_ok=True)
        comparison = Comparison(context, ready, kept, recovery)
        ablated = ablate.split(",") if ablate else list(asked)
        entries = structures(comparison, asked, chooser(methods), ablated, progress.say)
        results = _results(comparison, net, seeds)
        runner = Runner(comparison, entries, results, out or RESULTS / f"compare-{net}.json")
        runner.train(seeds, chooser(seeded), until)
        runner.time()
    progress.say("next: python benchmarks/readme.py")


if __name__ == "__main__":
    main()

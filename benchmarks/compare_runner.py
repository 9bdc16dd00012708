"""From methods to rows: every structure measured, every net trained, every file timed once more at the end."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from compare_records import OURS, CompareResults, CompareRow, OneShot, Trained, Versus
from methods.candidate import Candidate
from methods.comparison import Comparison
from methods.rig import mcnemar
from torch import nn

from edgeprune.compress.heal.fresh_weights import reinitialised
from edgeprune.compress.size import work
from edgeprune.errors import BudgetError
from edgeprune.records.files import digest_of, write_json

SCRATCH = "edgeprune-from-scratch"
UNREPAIRED = "edgeprune-minus-compensation"
UNVERIFIED = "edgeprune-minus-verification"
SCRATCH_SEED = 0


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
        entries += _ours(comparison, budget, ratio, wanted if budget in ablated else _nothing, say)
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
        found.append(Entry(scratch.row, lambda: reinitialised(bare.build(), SCRATCH_SEED)))
    if wanted(UNVERIFIED):
        loose = comparison.unverified(ratio)
        comparison.rig.measure([loose.widths])
        found.append(_entry(comparison, UNVERIFIED, UNVERIFIED, budget, ratio, loose, say))
    return found


def _nothing(_: str) -> bool:
    return False


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
    small = work(candidate.build(), comparison.example)[1]
    macs_ratio = small / work(comparison.context.model, comparison.example)[1]
    row = CompareRow.model_validate(
        {
            **base,
            "status": "not run",
            "widths": dict(candidate.widths),
            "structure_ratio": rig.ratios[candidate.key],
            "macs_ratio": macs_ratio,
            "one_shot": OneShot.model_validate(rig.one_shot(candidate)) if shown else None,
        }
    )
    shot = row.one_shot
    say(f"{name:32} {budget:>4}  {rig.ratios[candidate.key]:.3f} of dense, MACs {macs_ratio:.3f}")
    if shot is not None:
        repaired = "" if shot.compensated is None else f", repaired {shot.compensated:.4f}"
        say(f"      one-shot: {shot.naive:.4f}, recalibrated {shot.recalibrated:.4f}{repaired}")
    return Entry(row, lambda: rig.repaired(candidate))


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
        self._files: dict[tuple[str, str], Path] = {}  # of seed 0
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
        name = f"{row.method}-{row.budget}-{digest_of(row.widths)[:8]}"
        shipped = rig.shipped(name, seed, entry.start)
        place = (row.method, row.budget)
        self._test.setdefault(place, {})[seed] = shipped.test
        if seed == 0:
            self._files[place] = shipped.path
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
            files = {e.row.method: self._files[e.row.method, budget] for e in mine}
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
        write_json(self._results, self._out)

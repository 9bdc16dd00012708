"""The Markdown made from ``compare-NET.json``: every method at every budget, and the margin over the best of the others."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from compare_records import OURS, CompareResults, CompareRow

from edgeprune.report.figures import printable, share_text, signed

Table = Callable[[Sequence[str], Sequence[Sequence[str]]], str]


def compare_block(results: CompareResults, table: Table, stamp: str) -> str:
    """One net: what was asked, what each method reached, and what the best of the others reached."""
    budgets = list(dict.fromkeys(r.budget for r in results.rows))
    methods = list(dict.fromkeys(r.method for r in results.rows))
    by_place = {(r.method, r.budget): r for r in results.rows}
    head = ["method"]
    for budget in budgets:
        head += [
            f"{budget}: measured share of dense INT8 ({stamp})",
            "INT8 accuracy against dense INT8, points",
            "seeds",
        ]
    rows = []
    for method in sorted(methods, key=lambda m: _rank(m, budgets, by_place)):
        cells = [method]
        for budget in budgets:
            cells += _cells(by_place.get((method, budget)), results)
        rows.append(cells)
    parts = [_intro(results, stamp), table(head, rows), _one_shot(results, budgets, table)]
    parts += [_against_fp32(results), *_margins(results, budgets)]
    parts += [
        f"Missed: {r.method} at {r.budget}: {printable(r.message) or r.status}."
        for r in results.rows
        if r.status != "done"
    ]
    return "\n\n".join(p for p in parts if p)


def compare_summary(results: CompareResults, stamp: str) -> str:
    """The same in a few lines: ours at each budget, and the margin over the best other."""
    budgets = list(dict.fromkeys(r.budget for r in results.rows))
    ours = {r.budget: r for r in results.rows if r.method == OURS and r.trained}
    lines = []
    for budget, row in ours.items():
        share, drop, seeds = _cells(row, results)
        plural = "s" if seeds != "1" else ""
        lines.append(
            f"- {budget}: {share} of dense INT8 measured ({stamp}), {drop} points ({seeds} seed{plural})"
        )
    lines += [f"- {line}" for line in _margins(results, budgets)]
    return _intro(results, stamp) + "\n\n" + "\n".join(lines)


def _intro(results: CompareResults, stamp: str) -> str:
    cpu, dense_ms, dense = (
        printable(results.fingerprint.cpu_model),
        results.dense_ms,
        results.dense_test,
    )
    return (
        f"**{results.net}**, Fashion-MNIST, target `{results.target}` timed on `{results.device}`"
        f" ({cpu}, {results.fingerprint.threads} thread): **{stamp}**. Dense INT8: {dense['int8']:.2%} of {results.test_n} test images,"
        f" {dense_ms['int8']:.3g} ms (FP32 {dense['fp32']:.2%}, {dense_ms['fp32']:.3g} ms). Every net was distilled"
        f" for {results.epochs:g} epochs of {results.train_images} images at rate {results.learning_rate:g}, the same INT8 recipe for"
        " all; the test split was read once for each file."
    )


def _rank(
    method: str, budgets: Sequence[str], rows: dict[tuple[str, str], CompareRow]
) -> tuple[float, str]:
    found = [_drop_of(rows.get((method, b))) for b in budgets]
    known = [d for d in found if d is not None]
    return (-statistics.fmean(known) if known else 1.0, method)


def _drop_of(row: CompareRow | None) -> float | None:
    if row is None or not row.trained:
        return None
    return statistics.fmean(t.test for t in row.trained)


def _cells(row: CompareRow | None, results: CompareResults) -> list[str]:
    if row is None or not row.trained:
        return ["", row.status if row is not None else "", ""]
    share = row.ratio if row.ratio is not None else row.structure_ratio
    assert share is not None
    over = ", over the budget" if row.low is not None and row.low > row.asked_ratio else ""
    drop = (_drop_of(row) or 0.0) - results.dense_test["int8"]
    if row.low is not None and row.high is not None:
        over = f" ({100 * row.low:.1f} to {100 * row.high:.1f}){over}"
    return [share_text(share) + over, signed(100 * drop, 2), str(len(row.trained))]


def _one_shot(results: CompareResults, budgets: Sequence[str], table: Table) -> str:
    """Before any training, at the first budget."""
    first = budgets[0]
    rows = []
    for row in results.rows:
        if row.budget == first and row.one_shot is not None:
            shot = row.one_shot
            repaired = "" if shot.compensated is None else share_text(shot.compensated)
            rows.append(
                [row.method, share_text(shot.naive), share_text(shot.recalibrated), repaired]
            )
    if not rows:
        return ""
    head = (
        f"at {first}, before any training (accuracy of {results.development_n} development images)",
        "channels removed",
        "batch norm recalibrated",
        "least squares",
    )
    return table(head, rows)


def _against_fp32(results: CompareResults) -> str:
    """What pruning and INT8 gain together, ours at each budget; empty where the files were not timed at the end."""
    exact = results.dense_test["fp32"]
    found = [
        f"{row.against_fp32:.1f} times as fast at {row.budget} ({signed(100 * (drop - exact), 2)} points)"
        for row in results.rows
        if row.method == OURS and row.against_fp32 and (drop := _drop_of(row)) is not None
    ]
    return (
        f"edgeprune's INT8 file against dense FP32 in the same rounds: {', '.join(found)}."
        if found
        else ""
    )


def _margins(results: CompareResults, budgets: Sequence[str]) -> list[str]:
    """Ours against the best of the others, by budget. Ours with parts taken away do not count as others."""
    lines = []
    for budget in budgets:
        others = [
            r
            for r in results.rows
            if r.budget == budget and r.trained and r.versus and not r.method.startswith(OURS)
        ]
        if not others:
            continue
        best = max(others, key=lambda r: statistics.fmean(t.test for t in r.trained))
        found = best.versus
        assert found is not None
        n = min(len(best.trained), results.seeds)
        interval = (
            ""
            if found.margin_low is None or found.margin_high is None
            else f", 95 % over seeds {signed(100 * found.margin_low, 2)} to {signed(100 * found.margin_high, 2)}"
        )
        lines.append(
            f"At {budget}, edgeprune is {signed(100 * found.margin, 2)} points from the best of the other pruners here, `{best.method}`"
            f" ({n} seed{'s' if n > 1 else ''}{interval}; {found.only_ours} images right by it alone, {found.only_theirs} by the other,"
            f" McNemar p = {found.p:.2g})."
        )
    return lines

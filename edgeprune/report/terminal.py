"""The report as text for a terminal or a log, and several reports beside each other. Same figures as the page."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence

from edgeprune.records.plan import PruningPlan
from edgeprune.records.report import Report
from edgeprune.report import charts, facts, format_table, int8_table, plan_sections, timing_text
from edgeprune.report.figures import (
    NONE,
    bytes_text,
    change_text,
    count_text,
    in_unit,
    printable,
    quality_text,
    seconds_text,
    share_text,
    signed,
    significant,
    speed_text,
    time_text,
    time_unit,
    unit_text,
)
from edgeprune.report.sections import (
    budget_text,
    found_text,
    judged_note,
    ledger_summary,
    speed_cell,
)

WIDEST = 110
MOST_GROUPS = 12


def render_terminal(report: Report, *, width: int | None = None, color: bool = False) -> str:
    """The report as lines of text, most important first; ends with a newline.

    Args:
        report: the record; control characters in its names are made visible.
        width: columns; ``None`` takes the terminal's, at most 110.
        color: add ANSI colours.
    """
    page = Page(width, color)
    _headline(page, report)
    _gates(page, report)
    _variants(page, report)
    _formats(page, report)
    _samples(page, report)
    _ledger(page, report)
    _int8(page, report)
    _predictions(page, report)
    say_cuts(page, report.plan)
    _costs(page, report)
    _origin(page, report)
    return page.text()


def compare_text(reports: Sequence[Report], *, width: int | None = None) -> str:
    """Reports beside each other, one column a run; says when their figures cannot be compared."""
    page = Page(width, False)
    if not reports:
        page.say("No run to compare.")
        return page.text()
    columns = [_compared(report) for report in reports]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows = [(name, *(column.get(name, NONE) for column in columns)) for name in names]
    page.table(("", *(f"run {i}" for i in range(1, len(reports) + 1))), rows)
    page.say("* against dense in the precision that ships")
    for warning in _incomparable(reports):
        page.say(f"! {warning}")
    return page.text()


class Page:
    """Lines of text; every string that comes in is untrusted and is shown as it is, never as markup."""

    def __init__(self, width: int | None, color: bool) -> None:
        from rich.console import Console  # slow to import; --help does without it

        columns = min(shutil.get_terminal_size().columns, WIDEST) if width is None else width
        self._stream = io.StringIO()
        self._console = Console(
            file=self._stream,
            width=columns,
            force_terminal=color,
            color_system="standard" if color else None,
            highlight=False,
            markup=False,
            emoji=False,
            legacy_windows=False,
        )

    def say(self, text: str, style: str = "") -> None:
        """One paragraph."""
        self._console.print(printable(text), style=style or None)

    def title(self, text: str) -> None:
        """A heading after an empty line."""
        self._console.print()
        self.say(text, "bold")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
        """Aligned columns; the first ``left`` are text, the others figures on the right."""
        from rich.table import Table
        from rich.text import Text

        grid = Table(
            box=None,
            padding=(0, 2, 0, 0),
            pad_edge=False,
            header_style="dim",
            show_header=any(head),
        )
        for index, name in enumerate(head):
            justify = "left" if index < left else "right"
            grid.add_column(Text(name), justify=justify, overflow="fold")  # type: ignore[arg-type]
        for row in rows:
            grid.add_row(*(Text(printable(cell)) for cell in row))
        self._console.print(grid)

    def text(self) -> str:
        """Everything said so far, without blanks at line ends."""
        return "\n".join(line.rstrip() for line in self._stream.getvalue().splitlines()) + "\n"


def _headline(page: Page, report: Report) -> None:
    is_sure = facts.is_sure(report)
    page.say(facts.verdict(report), "bold green" if is_sure else "bold red")
    page.say(report.headline, "bold")
    missed = facts.missed_gates(report)
    if missed:
        page.say(f"missed: {', '.join(g.name for g in missed)}", "red")
    for doubt in facts.unreliable(report):
        page.say(f"UNRELIABLE TIMES: {doubt}", "bold red")
    banner = facts.stamp_banner(report)
    if banner is not None:
        page.say(f"{banner[0]}: {banner[1]}", "yellow")
    page.say(f"{report.model} for {report.target} on {report.device}, {report.created}", "dim")
    found = facts.outcome(report)
    if found is None:
        return
    row, n = found.row, facts.ledger_n(report)
    same = f"dense {row.precision.upper()}"
    speed = f"{speed_cell(report, row)} against {same}"
    quality = quality_text(row.quality, n)
    if found.quality_change is not None:
        quality += f", {change_text(found.quality_change, n)} against {same}"
    if found.quality_change_fp32 is not None and row.precision != "fp32":
        quality += f", {change_text(found.quality_change_fp32, n)} against dense FP32"
    page.title("Result")
    page.table(
        ("", ""),
        [
            ("ships", f"{charts.variant_name(row)}: {report.shipped_reason}"),
            ("latency", f"{time_text(row.median_ms)} {report.stamp}; {budget_text(report)}"),
            ("speed-up", speed),
            (facts.metric(report), quality),
            ("size", bytes_text(row.size_bytes)),
        ],
        left=2,
    )


def _gates(page: Page, report: Report) -> None:
    if not report.gates:
        return
    n = facts.ledger_n(report)
    page.title("Gates")
    rows = [
        (
            gate.name,
            "met" if gate.met else facts.verdict_text(gate).upper(),
            "-" if gate.not_run else found_text(gate, n),
            unit_text(gate.limit, gate.unit, n),
        )
        for gate in report.gates
    ]
    page.table(("gate", "verdict", "found", "limit"), rows, left=2)
    if judged := judged_note(report):
        page.say(judged, "dim")


def _variants(page: Page, report: Report) -> None:
    """The table stands on its side, so that it fits 80 columns without cutting a figure."""
    if not report.variants:
        return
    n = facts.ledger_n(report)
    unit = time_unit([r.p90_ms for r in report.variants])

    lines = {
        f"median, {unit}": [in_unit(r.median_ms, unit) for r in report.variants],
        f"p90, {unit}": [in_unit(r.p90_ms, unit) for r in report.variants],
        "spread": [f"±{share_text(r.spread_ratio)}" for r in report.variants],
        "speed-up*": [
            "reference" if r.variant == "dense" else speed_text(r.ratio_to_dense)
            for r in report.variants
        ],
        facts.metric(report): [quality_text(r.quality, n) for r in report.variants],
        "size": [bytes_text(r.size_bytes) for r in report.variants],
        "parameters": [count_text(r.parameters) for r in report.variants],
        "MACs": [count_text(r.macs) for r in report.variants],
    }
    page.title(f"{facts.variants_title(report)} ({report.stamp} times)")
    head = ("", *(charts.variant_name(r) for r in report.variants))
    page.table(head, [(name, *cells) for name, cells in lines.items()])
    page.say("* against dense in the same precision", "dim")


def _formats(page: Page, report: Report) -> None:
    """Each file in a line of figures and, where it needs one, a line with the reason: reasons are too long for a column."""
    choice = report.formats
    if choice is None:
        return
    page.title(format_table.title(choice))
    rows = format_table.cells(choice)
    short = [(*row[:-1], row[-1].partition(":")[0]) for row in rows]
    page.table(format_table.HEAD, short, left=format_table.LEFT)
    for row in rows:
        if ":" in row[-1]:
            page.say(f"{row[0]}, {row[2]}: {row[-1]}", "yellow")
    page.say(format_table.summary(choice), "dim")


def _int8(page: Page, report: Report) -> None:
    """The recipes that were tried, the layers that stay in float, and the calibration in a line."""
    found = report.int8
    if found is None:
        return
    page.title(int8_table.title(found))
    rows = [(*row[:-1], row[-1].partition(":")[0]) for row in int8_table.cells(found)]
    page.table(int8_table.HEAD, rows)
    kept = [row for row in int8_table.layer_cells(found) if row[-1] != "INT8"]
    if kept:
        page.table(int8_table.LAYER_HEAD, kept)
    if found.calibration is not None:
        told = (f"{name}: {value}" for name, value in int8_table.calibration(found.calibration))
        page.say("; ".join(told), "dim")


def _samples(page: Page, report: Report) -> None:
    """How the times were taken; on its side, as the variants are."""
    timed = facts.timed_variants(report)
    if timed:
        lines = {
            "load": [time_text(m.load_ns / 1e6) for _, m in timed],
            "first call": [time_text(m.first_ns / 1e6) for _, m in timed],
            "peak memory": [timing_text.memory_text(m) for _, m in timed],
            "p99": [timing_text.p99_text(m) for _, m in timed],
            "samples": [str(len(m.samples_ns())) for _, m in timed],
            "sessions": [str(len(m.session_medians_ms())) for _, m in timed],
            "sentinel drift": [timing_text.drift_text(m) for _, m in timed],
            "blocks left out": [f"{m.rejections().total()} of {len(m.blocks)}" for _, m in timed],
        }
        page.title("How the times were taken")
        page.table(
            ("", *(charts.variant_name(r) for r, _ in timed)),
            [(name, *cells) for name, cells in lines.items()],
        )
        for row, m in timed:
            if m.rejections():
                name = charts.variant_name(row)
                page.say(f"blocks of {name} left out: {timing_text.rejected_text(m)}", "dim")
    if report.sustained is not None:
        page.title(f"Sustained latency ({report.sustained.stamp})")
        page.table(("", ""), timing_text.sustained_rows(report.sustained), left=2)


def _ledger(page: Page, report: Report) -> None:
    steps = facts.ledger_steps(report.ledger)
    if not steps:
        return
    worst = facts.worst_step(steps)
    page.title("Accuracy ledger")
    rows = [
        (
            s.entry.stage,
            f"{s.entry.precision.upper()}, {s.entry.where}",
            quality_text(s.entry.value, s.entry.n),
            ("" if s is steps[0] else "reference")
            if s.change is None
            else change_text(s.change, s.entry.n),
            str(s.entry.n),
            "<- lost most" if s is worst else "",
        )
        for s in steps
    ]
    page.table(("stage", "file", facts.metric(report), "change", "n", ""), rows, left=2)
    page.say(" ".join(ledger_summary(report)))


def _predictions(page: Page, report: Report) -> None:
    model = report.latency_model
    page.title("Predicted against timed")
    error = "error not judged, no net was held out"
    if model.nets_held_out:
        error = (
            f"{share_text(model.mean_error_ratio)} mean and {share_text(model.worst_error_ratio)} worst error on "
            f"{model.nets_held_out} held-out nets"
        )
    fitted = f"{model.kernels_measured} kernels{facts.earlier_kernels(model)} and {model.nets_fitted} nets fitted"
    page.say(f"latency model: {error}; {fitted}")
    if report.checks:
        rows = [
            (
                str(index),
                time_text(c.predicted_ms),
                time_text(c.measured_ms),
                f"{signed(facts.check_error(c.predicted_ms, c.measured_ms) * 100, 1)} %",
                "yes" if c.within_budget else "no",
            )
            for index, c in enumerate(report.checks, 1)
        ]
        page.table(("structure", "predicted", report.stamp, "error", "within budget"), rows)


def say_cuts(page: Page, plan: PruningPlan) -> None:
    """What each cut saved and cost, the largest savings first."""
    groups = sorted(plan.groups, key=lambda g: -g.saved_ms_predicted)
    if groups:
        page.title("What each cut saved (predicted)")
        unit = time_unit([g.saved_ms_predicted for g in groups])
        rows = [
            (
                g.name,
                f"{g.channels} -> {len(g.kept) or 'block removed'}",
                in_unit(g.saved_ms_predicted, unit),
                significant(g.cost_nats),
            )
            for g in groups[:MOST_GROUPS]
        ]
        page.table(("group", "channels", f"saved, {unit}", "cost, nats"), rows)
        if len(groups) > MOST_GROUPS:
            page.say(f"and {len(groups) - MOST_GROUPS} more in the page", "dim")
    if saved := plan_sections.saved_note(plan):
        page.say(saved, "dim")
    if scope := facts.scope_note(plan):
        page.say(scope, "dim")
    for frozen in plan.frozen:
        page.say(f"frozen: {', '.join(frozen.layers)}: {frozen.reason}", "dim")


def _costs(page: Page, report: Report) -> None:
    if not report.stages:
        return
    page.title("What the run cost")
    whole = sum(s.seconds for s in report.stages)
    rows = [
        (s.name, s.kind + (", cached" if s.cached else ""), seconds_text(s.seconds))
        for s in report.stages
    ]
    page.table(("stage", "kind", "time"), [*rows, ("all", "", seconds_text(whole))], left=2)
    kinds = facts.seconds_by_kind(report.stages)
    page.say(", ".join(f"{kind} {share_text(s / whole)}" for kind, s in kinds.items()), "dim")


def _origin(page: Page, report: Report) -> None:
    page.title("Origin")
    rows = [
        (
            "device",
            f"{report.device}: {report.fingerprint.cpu_model}, {report.fingerprint.machine}",
        ),
        ("runtime", f"{report.fingerprint.runtime} {report.fingerprint.runtime_version}"),
        *(
            (f"test, {k}", f"{quality_text(v, report.test_n)} of {report.test_n}")
            for k, v in report.test_quality.items()
        ),
        ("bundle", report.bundle_name),
        ("command", report.command),
    ]
    page.table(("", ""), rows, left=2)
    for text in report.notes:
        page.say(f"- {text}")


def _compared(report: Report) -> dict[str, str]:
    n = facts.ledger_n(report)
    column = {
        "result": facts.short_verdict(report),
        "model": report.model,
        "target": report.target,
        "device": f"{report.device}, {report.stamp}",
        "budget": f"{report.budget} ({time_text(report.limit_ms)})",
    }
    found = facts.outcome(report)
    if found is not None:
        row = found.row
        column |= {
            "ships": charts.variant_name(row),
            "latency": time_text(row.median_ms),
            "p90": time_text(row.p90_ms),
            "spread": f"±{share_text(row.spread_ratio)}",
            "speed-up*": speed_cell(report, row),
            "quality": f"{quality_text(row.quality, n)} {facts.metric(report)}, n = {n}",
            "change*": NONE
            if found.quality_change is None
            else change_text(found.quality_change, n),
            "size": bytes_text(row.size_bytes),
            "parameters": count_text(row.parameters),
            "MACs": count_text(row.macs),
        }
    column |= {f"test, {k}": quality_text(v, report.test_n) for k, v in report.test_quality.items()}
    return column | {
        "run time": seconds_text(sum(s.seconds for s in report.stages)),
        "made": report.created,
    }


def _incomparable(reports: Sequence[Report]) -> list[str]:
    warnings = [
        f"the times of run {number} are unreliable: {'; '.join(doubt)}"
        for number, r in enumerate(reports, 1)
        if (doubt := facts.unreliable(r))
    ]
    if len({r.fingerprint.key() for r in reports}) > 1:
        warnings.append(
            "the runs were timed on different devices or set-ups: their times do not compare"
        )
    if len({r.stamp for r in reports}) > 1:
        warnings.append("the runs carry different stamps: only times with the same stamp compare")
    if len({(facts.metric(r), facts.ledger_n(r)) for r in reports}) > 1:
        warnings.append(
            "quality was judged by another metric or on other samples: it does not compare"
        )
    return warnings

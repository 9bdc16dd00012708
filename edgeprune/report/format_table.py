"""The formats that were measured before one of them was taken to ship."""

from __future__ import annotations

from edgeprune.records.report import FormatChoice, FormatRow, Report
from edgeprune.report.figures import NONE, in_unit, share_text, significant, time_unit
from edgeprune.report.markup import Column, Markup, table
from edgeprune.report.sections import note, section

HEAD = ("format", "runtime", "precision", "median", "spread", "of own", "same class", "verdict")
LEFT = 3


def title(choice: FormatChoice) -> str:
    """What the figures are and of what."""
    return f"The formats, dense model, {choice.stamp} times on {choice.device}"


def cells(choice: FormatChoice) -> list[tuple[str, ...]]:
    """A row for each file, in the order of :data:`HEAD`; a format that failed has the reason in place of figures."""
    timed = [r.median_ms for r in choice.rows if r.median_ms is not None]
    unit = time_unit(timed) if timed else "ms"
    won = choice.row()
    return [
        (
            row.format,
            row.runtime,
            NONE if row.precision is None else row.precision.upper(),
            NONE if row.median_ms is None else f"{in_unit(row.median_ms, unit)} {unit}",
            NONE if row.spread_ratio is None else f"±{share_text(row.spread_ratio)}",
            _ratio(choice, row),
            NONE if row.agreement is None else share_text(row.agreement),
            _verdict(row, is_best=row is won),
        )
        for row in choice.rows
    ]


def _ratio(choice: FormatChoice, row: FormatRow) -> str:
    if row.ratio is None or row.ratio_low is None or row.ratio_high is None:
        return "reference" if row.format == choice.own and row.median_ms is not None else NONE
    low, high = significant(row.ratio_low), significant(row.ratio_high)
    return f"{significant(row.ratio)} ({low} to {high})"


def _verdict(row: FormatRow, *, is_best: bool) -> str:
    if row.median_ms is None:
        return f"not run: {row.reason}"
    if not row.holds:
        return f"refused: {row.reason}"
    return "ships" if is_best else "holds"


def summary(choice: FormatChoice) -> str:
    """What was taken, and why; what it was chosen on, where that is no board of the target."""
    text = (
        f"{choice.chosen} ships: {choice.reason}. The target's own format is {choice.own}. Same class is the share of {choice.samples}"
        " samples of the selection split that a file puts into torch's class; of own is its time over that of the target's own format in"
        " the same precision, in the same rounds."
    )
    if choice.stamp == "measured":
        return text
    return (
        f"{text} The times are {choice.stamp}: they rank the formats on {choice.device}, not on the target's board;"
        " measure again there."
    )


def formats(report: Report) -> Markup | None:
    """The section of the page; nothing where the format was not chosen by measurement."""
    choice = report.formats
    if choice is None:
        return None
    columns = [Column(name, LEFT <= i < len(HEAD) - 1) for i, name in enumerate(HEAD)]
    won = choice.row()
    classes = ["shipped" if row is won else "" for row in choice.rows]
    return section(
        "formats",
        "The formats",
        table(title(choice), columns, cells(choice), row_classes=classes),
        note(summary(choice)),
    )

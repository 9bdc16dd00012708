"""Charts of the samples behind the medians: drift over rounds, and the distribution of all samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from edgeprune.records.measurement import Block, Measurement, SustainedRun
from edgeprune.records.report import Report, VariantRow
from edgeprune.report import facts
from edgeprune.report.charts import variant_class, variant_name
from edgeprune.report.figures import per_ms, share_text, signed, time_text, time_unit
from edgeprune.report.markup import Markup, join
from edgeprune.report.svg import (
    WIDTH,
    Plot,
    Point,
    Scale,
    chart,
    dot,
    label_at,
    line,
    padded,
    path,
    rect,
    steps,
)

ECDF_POINTS = 160


def drift(report: Report) -> Markup | None:
    """Block medians over rounds, one panel a variant, all on one relative axis, so that drift shows and lines up."""
    timed = facts.timed_variants(report)
    if not timed:
        return None
    rounds = [b.round for _, m in timed for b in m.blocks]
    reach = max(abs(v) for _, m in timed for b in accepted(m) for v in _quartiles(b, m))
    reach = min(max(reach * 1.1, 0.01), 0.5)
    x = Scale(*padded(rounds, 0.03), 52.0, WIDTH - 6)
    parts: list[Markup] = []
    top = 26.0
    for row, measurement in timed:
        plot = Plot(x, Scale(-reach, reach, top + 64, top))
        parts += _drift_panel(plot, row, measurement)
        top += 98
    bottom = top - 98 + 64
    for value in sorted({round(t) for t in x.ticks(8)} & set(rounds)):
        parts.append(label_at(x(value), bottom + 17, str(value), "tick", anchor="middle"))
    parts.append(label_at(WIDTH - 6, bottom + 34, "round", "axis-title", anchor="end"))
    return chart(
        "Drift: block medians over rounds",
        "Dots are block medians relative to the variant's own median; bars span the middle half of the block's samples; "
        "crosses are rejected blocks.",
        bottom + 40,
        *parts,
    )


def accepted(measurement: Measurement) -> list[Block]:
    """The blocks that count."""
    return [b for b in measurement.blocks if b.rejected is None and b.samples_ns]


def _quartiles(block: Block, measurement: Measurement) -> tuple[float, float, float]:
    """First quartile, median and third quartile of a block, relative to the measurement's median."""
    samples, centre = sorted(block.samples_ns), measurement.median_ms * 1e6
    low, high = samples[len(samples) // 4], samples[(3 * len(samples)) // 4]
    return low / centre - 1, statistics.median(samples) / centre - 1, high / centre - 1


def _drift_panel(plot: Plot, row: VariantRow, measurement: Measurement) -> list[Markup]:
    style, reach = variant_class(row), plot.y.high
    median = f"median {time_text(row.median_ms)}, spread ±{share_text(row.spread_ratio)}"
    parts = [
        label_at(plot.left, plot.top - 7, variant_name(row), "panel-name"),
        label_at(plot.right, plot.top - 7, median, "tick", anchor="end"),
        rect(plot.left, plot.top, plot.right - plot.left, plot.bottom - plot.top, "panel"),
        line((plot.left, plot.y(0)), (plot.right, plot.y(0)), "grid"),
    ]
    for value in (reach, 0.0, -reach):
        text = f"{signed(value * 100, 1 if reach < 0.1 else 0)} %"
        parts.append(label_at(plot.left - 6, plot.y(value) + 4, text, "tick", anchor="end"))
    medians: list[Point] = []
    for block in measurement.blocks:
        if not block.samples_ns:
            continue
        low, middle, high = _quartiles(block, measurement)
        at = plot.at((block.round, middle))
        hint = f"round {block.round}: {time_text(statistics.median(block.samples_ns) / 1e6)}"
        if block.rejected is not None:
            parts.append(_cross(at, f"{hint}, rejected: {block.rejected}"))
            continue
        medians.append(at)
        parts.append(
            line(plot.at((block.round, low)), plot.at((block.round, high)), f"range {style}")
        )
        parts.append(dot(at, 3.2, f"mark {style}", hint))
    return [*parts, path(medians, f"thin {style}")]


def _cross(at: Point, hint: str) -> Markup:
    (x, y), r = at, 3.5
    return join(
        line((x - r, y - r), (x + r, y + r), "cross"),
        line((x - r, y + r), (x + r, y - r), "cross"),
        dot(at, 5, "hit", hint),
    )


def ecdf(report: Report) -> Markup | None:
    """Share of samples at or under each latency. The slowest 0.5 % of a variant may lie beyond the edge."""
    timed = facts.timed_variants(report)
    if not timed:
        return None
    slowest = max(max(m.samples_ns()) for _, m in timed) / 1e6
    unit = time_unit([slowest])
    factor = per_ms(unit) / 1e6
    samples = {row.measurement: sorted(ns * factor for ns in m.samples_ns()) for row, m in timed}
    low = min(v[0] for v in samples.values())
    high = max(v[int(0.995 * (len(v) - 1))] for v in samples.values())
    log = low > 0 and high / low > 4
    span = (low * 0.93, high * 1.07) if log else padded([low, high])
    plot = Plot(Scale(*span, 52.0, WIDTH - 8, log=log), Scale(0.0, 1.0, 326.0, 50.0))
    parts = [
        plot.axes(
            f"latency, {unit}{', logarithmic' if log else ''}",
            "share of samples",
            y_text=lambda v: f"{v * 100:.0f} %",
        )
    ]
    for row, _ in timed:
        values = samples[row.measurement]
        picks = sorted({round(i * (len(values) - 1) / ECDF_POINTS) for i in range(ECDF_POINTS + 1)})
        curve = [plot.at((values[i], (i + 1) / len(values))) for i in picks]
        parts.append(steps([(curve[0][0], plot.bottom), *curve], f"curve {variant_class(row)}"))
    parts.append(_legend([(variant_name(r), f"curve {variant_class(r)}") for r, _ in timed]))
    return chart(
        "All samples",
        "Cumulative share of accepted samples; steep means steady, a long upper end means outliers.",
        370,
        *parts,
    )


def sustained(run: SustainedRun) -> Markup:
    """Latency over the time of a sustained run, with start and steady times; below it the temperature, where the board tells it."""
    minutes = run.seconds >= 300
    per_s = 1 / 60 if minutes else 1.0
    unit = time_unit([p.median_ms for p in run.points])
    ms = per_ms(unit)
    x = Scale(0.0, max(run.seconds, run.points[-1].t_s, 1.0) * per_s, 52.0, WIDTH - 8)
    plot = Plot(x, Scale(*padded((p.median_ms * ms for p in run.points), 0.15), 206.0, 34.0))
    curve = [(p.t_s * per_s, p.median_ms * ms) for p in run.points]
    parts = [plot.axes(f"time, {'min' if minutes else 's'}", f"latency, {unit}")]
    ends = (
        (run.start_ms, 0.0, 0.1 * run.seconds),
        (run.steady_ms, run.seconds * 2 / 3, run.seconds),
    )
    for value, start_s, end_s in ends:
        a, b = (plot.at((t * per_s, value * ms)) for t in (start_s, end_s))
        parts.append(line(a, b, "level"))
    parts.append(path([plot.at(point) for point in curve], "thin steady"))
    for point, at in zip(run.points, curve, strict=True):
        hint = f"{point.t_s:.0f} s: {time_text(point.median_ms)}"
        hint += "" if point.temperature_c is None else f", {point.temperature_c:.0f} °C"
        hint += "" if point.clock_hz is None else f", {point.clock_hz / 1e9:.2f} GHz"
        if point.throttled:
            parts.append(_cross(plot.at(at), f"{hint}, throttled"))
        else:
            parts.append(dot(plot.at(at), 2.2, "mark steady", hint))
    heat = [(p.t_s * per_s, p.temperature_c) for p in run.points if p.temperature_c is not None]
    if heat:
        below = Plot(x, Scale(*padded((c for _, c in heat), 0.15), 330.0, 270.0))
        parts.append(below.axes("", "temperature, °C"))
        parts.append(path([below.at(point) for point in heat], "thin heat"))
    return chart(
        "Sustained latency",
        "Median of each piece of a run without a pause; the bars are the start (first tenth) and the steady time (last third); crosses are "
        "pieces after which the board throttled.",
        360 if heat else 246,
        *parts,
    )


def _legend(items: Sequence[tuple[str, str]]) -> Markup:
    parts, x, y = [], 2.0, 13.0
    for name, class_ in items:
        parts += [line((x, y), (x + 20, y), class_), label_at(x + 26, y + 4, name, "tick")]
        x += 40 + 6.6 * len(name)
    return join(*parts)

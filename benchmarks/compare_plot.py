"""The picture made from ``compare-NET.json``: accuracy over measured latency, one line for each family of pruners."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from compare_records import OURS, CompareResults, CompareRow

from edgeprune.report import svg
from edgeprune.report.markup import tag

HEIGHT, LABEL_GAP = 360.0, 13.0
# No page around it lends its colours, so they stand here; the background is that of a light page.
STYLE = (
    "svg{background:#fff;font:12px system-ui,sans-serif}.grid{stroke:#e4e4e4}.axis{stroke:#888}.tick{fill:#666}"
    ".axis-title{fill:#444}.other{stroke:#8a8f98;fill:none}.other-dot{fill:#8a8f98}.ours{stroke:#0b67c2;stroke-width:2.5;fill:none}"
    ".ours-dot{fill:#0b67c2}.name{fill:#555;font-size:11px}.our-name{fill:#0b67c2;font-weight:600}"
)


def compare_plot(results: CompareResults) -> bytes | None:
    """A whole SVG file, or nothing while no method has a trained net. Of the settings of a family the best at each budget is shown."""
    lines = {f: p for f in _families(results.rows) if (p := _points(results.rows, f))}
    if not lines:
        return None
    flat = [p for points in lines.values() for p in points]
    dense = results.dense_test["int8"]
    x = svg.Scale(*svg.padded([p[0] for p in flat]), start=56, end=330)
    y = svg.Scale(*svg.padded([*(p[1] for p in flat), 100 * dense]), start=HEIGHT - 50, end=34)
    plot = svg.Plot(x, y)
    parts = [
        plot.axes(
            "measured latency, % of dense INT8",
            f"INT8 accuracy, % of {results.test_n} test images ({results.fingerprint.stamp})",
        )
    ]
    parts.append(svg.line((x.start, y(100 * dense)), (x.end, y(100 * dense)), "axis"))
    parts.append(svg.label_at(x.end - 2, y(100 * dense) - 5, "dense INT8", "tick", anchor="end"))
    for family, points in sorted(lines.items(), key=lambda e: e[0] == OURS):
        kind = "ours" if family == OURS else "other"
        parts.append(svg.path([plot.at(p) for p in points], kind))
        parts += [
            svg.dot(plot.at(p), 4 if kind == "ours" else 3, f"{kind}-dot", family) for p in points
        ]
    parts += _names(plot, lines)
    drawing = tag(
        "svg",
        tag("style", STYLE),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {svg.WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=f"Accuracy over measured latency of pruners on {results.net}",
    )
    return (drawing + "\n").encode()


def _families(rows: Sequence[CompareRow]) -> list[str]:
    """Ours and the others; ours with parts taken away stay in the table."""
    return [f for f in dict.fromkeys(r.family for r in rows) if f == OURS or not f.startswith(OURS)]


def _points(rows: Sequence[CompareRow], family: str) -> list[svg.Point]:
    """Measured share of the dense latency and accuracy, both in percent, the fastest first."""
    best: dict[str, svg.Point] = {}
    for row in rows:
        if row.family == family and row.trained:
            share = row.ratio if row.ratio is not None else row.structure_ratio
            assert share is not None
            point = (100 * share, 100 * statistics.fmean(t.test for t in row.trained))
            if row.budget not in best or point[1] > best[row.budget][1]:
                best[row.budget] = point
    return sorted(best.values())


def _names(plot: svg.Plot, lines: dict[str, list[svg.Point]]) -> list[str]:
    """The families by the right edge, in the order of their last points, pushed apart where they would overlap."""
    ends = sorted((plot.at(points[-1])[1], family) for family, points in lines.items())
    parts, last = [], plot.top - LABEL_GAP
    for height, family in ends:
        last = max(height, last + LABEL_GAP)
        kind = "our-name" if family == OURS else "name"
        parts.append(svg.label_at(plot.right + 10, last + 4, family, kind))
    return parts

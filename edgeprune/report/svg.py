"""Inline SVG: scales, ticks and a framed plot area. Colours are CSS classes of the page, so charts follow its light or dark theme.

Coordinates are those of the SVG (x right, y down, 1 unit about 1 CSS pixel). Every chart is 480 wide: readable on a phone, two abreast
on a desk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edgeprune.report.figures import significant
from edgeprune.report.markup import Markup, join, number, tag

WIDTH = 480.0
Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """A map from values in [low, high] to coordinates in [start, end]; clips what lies outside."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self, n: int = 5) -> list[float]:
        """About ``n`` round values inside the range."""
        return _log_ticks(self.low, self.high) if self.log else nice_ticks(self.low, self.high, n)


def padded(
    values: Iterable[float], pad: float = 0.06, *, zero: bool = False
) -> tuple[float, float]:
    """A range that holds the values with a margin, and never has zero width; from 0 where ``zero`` asks for it."""
    found = list(values) or [0.0, 1.0]
    low, high = min(found), max(found)
    if zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-12 * max(1.0, abs(high)):
        half = abs(high) * 0.5 or 0.5
        low, high = (low, high + 2 * half) if zero else (low - half, high + half)
    margin = (high - low) * pad
    return (low if zero and low == 0 else low - margin), high + margin


def nice_ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about ``n`` of them."""
    raw = (high - low) / max(1, n)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for marks in ((1, 2, 3, 4, 5, 6, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**d for d in decades for m in marks if low <= m * 10.0**d <= high]
        if len(ticks) <= 7:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 7)]


def tick_text(value: float, ticks: Sequence[float]) -> str:
    """A tick's label with just the decimals that tell it from its neighbours."""
    gaps = [abs(b - a) for a, b in itertools.pairwise(ticks)] or [abs(value) or 1.0]
    decimals = max(0, -math.floor(math.log10(min(g for g in gaps if g > 0)) + 1e-9))
    if any(abs(round(t, decimals) - t) > 0.01 * min(gaps) for t in ticks):
        return significant(value, 2)
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def trimmed(value: float) -> str:
    """Two significant digits without closing zeros, for logarithmic ticks."""
    text = significant(value, 2)
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Plot:
    """A plot area with its two scales; ``y`` runs upwards."""

    x: Scale
    y: Scale

    @property
    def left(self) -> float:
        """Left edge."""
        return self.x.start

    @property
    def right(self) -> float:
        """Right edge."""
        return self.x.end

    @property
    def bottom(self) -> float:
        """Lower edge."""
        return self.y.start

    @property
    def top(self) -> float:
        """Upper edge."""
        return self.y.end

    def at(self, point: Point) -> Point:
        """Coordinates of a point in data units."""
        return self.x(point[0]), self.y(point[1])

    def axes(
        self,
        x_title: str,
        y_title: str,
        *,
        y_text: Callable[[float], str] | None = None,
    ) -> Markup:
        """Grid lines, tick labels and axis titles."""
        x_ticks, y_ticks = self.x.ticks(6), self.y.ticks(5)
        parts = []
        for value in y_ticks:
            y = self.y(value)
            label = y_text(value) if y_text else tick_text(value, y_ticks)
            parts.append(line((self.left, y), (self.right, y), "grid"))
            parts.append(label_at(self.left - 7, y + 4, label, "tick", anchor="end"))
        for value in x_ticks:
            x = self.x(value)
            label = trimmed(value) if self.x.log else tick_text(value, x_ticks)
            parts.append(line((x, self.bottom), (x, self.bottom + 4), "axis"))
            parts.append(label_at(x, self.bottom + 17, label, "tick", anchor="middle"))
        parts.append(line((self.left, self.bottom), (self.right, self.bottom), "axis"))
        parts.append(label_at(self.right, self.bottom + 34, x_title, "axis-title", anchor="end"))
        parts.append(label_at(4, self.top - 10, y_title, "axis-title"))
        return join(*parts)


def chart(title: str, description: str, height: float, *parts: str) -> Markup:
    """A whole figure: a caption, and an SVG that scales with the page."""
    drawing = tag(
        "svg",
        tag("title", title),
        *parts,
        viewBox=f"0 0 {number(WIDTH)} {number(height)}",
        role="img",
        aria_label=f"{title}. {description}",
        class_="chart",
    )
    caption = tag("figcaption", tag("strong", title), " ", description)
    return tag("figure", caption, drawing)


def line(a: Point, b: Point, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=a[0], y1=a[1], x2=b[0], y2=b[1], class_=class_)


def path(points: Sequence[Point], class_: str) -> Markup:
    """A line through points; nothing when there are fewer than two."""
    if len(points) < 2:
        return Markup()
    d = "M" + "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return tag("path", d=d, class_=class_)


def steps(points: Sequence[Point], class_: str) -> Markup:
    """A staircase through points: horizontal first, then vertical."""
    corners: list[Point] = []
    for x, y in points:
        if corners:
            corners.append((x, corners[-1][1]))
        corners.append((x, y))
    return path(corners, class_)


def dot(at: Point, radius: float, class_: str, hint: str = "") -> Markup:
    """A round mark, with a tooltip where ``hint`` is given."""
    children = (tag("title", hint),) if hint else ()
    return tag("circle", *children, cx=at[0], cy=at[1], r=radius, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, hint: str = "") -> Markup:
    """A bar, with a tooltip where ``hint`` is given."""
    children = (tag("title", hint),) if hint else ()
    return tag(
        "rect", *children, x=x, y=y, width=max(0.0, width), height=height, rx=1.5, class_=class_
    )


def label_at(x: float, y: float, value: str, class_: str, *, anchor: str = "start") -> Markup:
    """Text whose baseline starts, centres or ends at a point."""
    return tag(
        "text", value, x=x, y=y, class_=class_, text_anchor=None if anchor == "start" else anchor
    )

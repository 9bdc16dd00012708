"""Numbers as people read them: three significant digits, a unit, a true minus sign.

Every surface (HTML, terminal, comparison) formats through this module, so that one record never shows two different figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

TimeUnit = Literal["ms", "µs"]
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EM DASH}"


def significant(value: float, digits: int = 3) -> str:
    """A number with this many significant digits and no exponent; integers above that keep all their digits.

    >>> significant(0.0123456), significant(12.3456), significant(1234.5), significant(-2.0)
    ('0.0123', '12.3', '1234', '−2.00')
    """
    if value == 0:
        return "0"
    # Rounding first, so that 9.996 becomes 10.0 and not 10.00.
    rounded = float(f"{abs(value):.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(rounded)))
    text = f"{abs(value):.{decimals}f}"
    return f"{MINUS}{text}" if value < 0 else text


def time_text(ms: float, digits: int = 3) -> str:
    """Milliseconds with their unit; under 1 ms as microseconds.

    >>> time_text(12.345), time_text(0.8127)
    ('12.3 ms', '813 µs')
    """
    unit = time_unit([ms])
    return f"{in_unit(ms, unit, digits)} {unit}"


def time_unit(values_ms: Iterable[float]) -> TimeUnit:
    """The one unit for figures that stand in a row or column together: µs when all are under 1 ms."""
    largest = max((abs(v) for v in values_ms), default=1.0)
    return "µs" if 0 < largest < 1 else "ms"


def per_ms(unit: TimeUnit) -> float:
    """How many of ``unit`` are in a millisecond."""
    return 1000.0 if unit == "µs" else 1.0


def in_unit(ms: float, unit: TimeUnit, digits: int = 3) -> str:
    """Milliseconds as a bare number in ``unit``."""
    return significant(ms * per_ms(unit), digits)


def speed_text(ratio: float) -> str:
    """The speed-up that belongs to a latency ratio (candidate / reference).

    >>> speed_text(0.4)
    '2.50×'
    """
    return f"{significant(1 / ratio)}{TIMES}" if ratio > 0 else NONE


def share_text(ratio: float, digits: int = 1) -> str:
    """A ratio as a percentage.

    >>> share_text(0.1234)
    '12.3 %'
    """
    return f"{signed(ratio * 100, digits, plus=False)} %"


def quality_text(ratio: float, n: int) -> str:
    """Accuracy or agreement, with as many digits as ``n`` samples can carry."""
    return share_text(ratio, quality_digits(n))


def change_text(change: float, n: int) -> str:
    """A change of accuracy or agreement in percentage points, always with its sign.

    >>> change_text(-0.0042, 5000)
    '−0.42 pp'
    """
    return f"{signed(change * 100, quality_digits(n))} pp"


def quality_digits(n: int) -> int:
    """Decimals of a percentage over ``n`` samples: one sample moves it by 100 / n."""
    return 2 if n >= 1000 else 1


def signed(value: float, digits: int, *, plus: bool = True) -> str:
    """A fixed-point number with a true minus; zero carries no sign.

    >>> signed(-0.004, 2), signed(1.5, 1)
    ('0.00', '+1.5')
    """
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    if value < 0:
        return f"{MINUS}{text}"
    return f"+{text}" if plus else text


def bytes_text(size: int) -> str:
    """A size in decimal units.

    >>> bytes_text(512), bytes_text(412_000), bytes_text(1_348_000)
    ('512 B', '412 kB', '1.35 MB')
    """
    return f"{size} B" if abs(size) < 1000 else _scaled(size, ("kB", "MB", "GB", "TB"))


def count_text(count: int) -> str:
    """A count with a decimal prefix above a thousand.

    >>> count_text(950), count_text(1_234_567)
    ('950', '1.23 M')
    """
    return str(count) if abs(count) < 1000 else _scaled(count, ("k", "M", "G", "T"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    scaled = value / 1000
    for unit in units[:-1]:
        # 999.95 of a unit would print as 1000 of it.
        if abs(scaled) < 999.5:
            return f"{significant(scaled)} {unit}"
        scaled /= 1000
    return f"{significant(scaled)} {units[-1]}"


def seconds_text(seconds: float) -> str:
    """A duration.

    >>> seconds_text(0.042), seconds_text(12.3), seconds_text(245), seconds_text(3725)
    ('42 ms', '12.3 s', '4 min 05 s', '1 h 02 min')
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def unit_text(value: float, unit: str, n: int = 1000) -> str:
    """A gate's figure in the unit it was judged in; times keep four digits, so that a near miss shows as one.

    >>> unit_text(6.4123, "ms"), unit_text(0.4791, "of dense int8"), unit_text(0.0066, "drop", 5000)
    ('6.412 ms', '47.91 % of dense int8', '0.66 pp drop')
    """
    if unit == "ms":
        return time_text(value, digits=4)
    if unit in ("ratio", "accuracy", "agreement"):
        return quality_text(value, n)
    if unit.startswith("of "):
        return f"{share_text(value, 2)} {unit}"
    if unit == "drop":
        return f"{signed(value * 100, quality_digits(n), plus=False)} pp drop"
    return f"{significant(value)} {unit}".rstrip()


def printable(text: str) -> str:
    """Untrusted text on one line: control, format and direction characters become visible.

    Device and model names come from files and boards; an escape sequence in one must not reach a terminal, and a direction
    override must not reorder a page.
    """
    return "".join(
        c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text
    )

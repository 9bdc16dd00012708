"""What people write for a latency budget, an allowed drop or a duration, and what it means."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from numbers import Real
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from edgeprune.records.base import Record


class Budget(Record):
    """A latency budget: absolute, or against the dense model in the precision that ships."""

    text: str
    kind: Literal["ms", "ratio"]
    value: Annotated[float, Field(gt=0)]  # milliseconds, or the allowed share of the dense latency

    def limit_ms(self, dense_ms: float) -> float:
        """The budget in milliseconds, given the dense latency in the precision that ships."""
        return self.value if self.kind == "ms" else self.value * dense_ms


def parse_budget(text: str) -> Budget:
    """Read ``15ms``, ``60%`` (of the dense latency) or ``2.5x`` (a speed-up).

    Raises:
        ValueError: any other form; zero; a share over 100 %; a speed-up under 1x.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|%|x)\s*", text)
    if match is None:
        raise ValueError(f"a latency budget must look like 15ms, 60% or 2.5x, but got {text!r}")
    number, unit = float(match[1]), match[2]
    if number <= 0 or (unit == "%" and number > 100) or (unit == "x" and number < 1):
        raise ValueError(
            f"a latency budget must be over 0ms, within 0-100%, or at least 1x, but got {text!r}"
        )
    if unit == "ms":
        return Budget(text=text.strip(), kind="ms", value=number)
    ratio = number / 100 if unit == "%" else 1 / number
    return Budget(text=text.strip(), kind="ratio", value=ratio)


def parse_duration(text: str) -> float:
    """Read ``90s``, ``10min`` or ``1h`` as seconds.

    Raises:
        ValueError: any other form; under 1s or over 24h.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*", text)
    if match is None:
        raise ValueError(f"a duration must look like 90s, 10min or 1h, but got {text!r}")
    seconds = float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]]
    if not 1 <= seconds <= 24 * 3600:
        raise ValueError(f"a duration must be between 1s and 24h, but got {text!r}")
    return seconds


def parse_drop(text: str) -> float:
    """Read an allowed accuracy drop such as ``1%`` (one percentage point) as a ratio, 0.01.

    Raises:
        ValueError: not a percentage between 0 and 100.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if match is None or float(match[1]) > 100:
        raise ValueError(f"max_drop must be between 0% and 100%, such as 1%, but got {text!r}")
    return float(match[1]) / 100


def budget_text(value: str | float) -> str:
    """A latency budget as text: text as it is, a number over 0 and below 1 as a share of the dense latency, so that 0.6 is ``60%``.

    Raises:
        ValueError: any other number, which could be milliseconds, a speed-up or percent; says how to write each.
    """
    if isinstance(value, str):
        return value
    number = _number(value, "a latency budget")
    if 0 < number < 1:
        return _percent(number)
    rule = "a latency budget as a number must be a share of the dense latency, over 0 and below 1,"
    if number <= 0:
        raise ValueError(f"{rule} but got {value}; 0.6 is 60%")
    units = ("ms", "x", "%") if number <= 100 else ("ms", "x")
    *others, last = (f"'{number:f}{unit}'" for unit in units)
    raise ValueError(f"{rule} but got {value}; write {', '.join(others)} or {last}")


def drop_text(value: str | float) -> str:
    """An allowed drop as text: text as it is, a number of at least 0 and below 1 as a ratio, so that 0.01 is ``1%``.

    Raises:
        ValueError: any other number.
    """
    if isinstance(value, str):
        return value
    number = _number(value, "max_drop")
    if 0 <= number < 1:
        return _percent(number)
    points = f"; for {number:f} points write '{number:f}%'" if 1 <= number <= 100 else ""
    raise ValueError(
        f"max_drop as a number must be at least 0 and below 1, such as 0.01 for 1%, but got {value}{points}"
    )


def _number(value: Any, what: str) -> Decimal:
    """A number as it is printed, so that a float32 of 0.6 is no 0.60000002."""
    try:
        number = Decimal(str(value)) if isinstance(value, Real) else Decimal("NaN")
    except InvalidOperation:  # such as a fraction
        number = Decimal("NaN")
    if isinstance(value, bool) or not number.is_finite():
        raise ValueError(f"{what} must be text or a finite number, but got {value!r:.100}")
    return number.normalize() + 0  # no minus zero


def _percent(ratio: Decimal) -> str:
    return f"{(100 * ratio).normalize():f}%"


def _checked_budget(text: str) -> str:
    parse_budget(text)
    return text


def _checked_drop(text: str) -> str:
    parse_drop(text)
    return text


BudgetText = Annotated[str, BeforeValidator(budget_text), AfterValidator(_checked_budget)]
DropText = Annotated[str, BeforeValidator(drop_text), AfterValidator(_checked_drop)]

"""HTML and SVG elements from Python, safe by construction: plain text is escaped, only :class:`Markup` passes unchanged."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from edgeprune.report.figures import printable

VOID = frozenset({"br", "col", "hr", "img", "link", "meta", "wbr"})
Attribute = str | int | float | bool | None


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def text(value: str) -> Markup:
    """Untrusted text, made printable and escaped."""
    return Markup(html.escape(printable(value), quote=True))


def tag(name: str, /, *children: str, **attributes: Attribute) -> Markup:
    """One element.

    Args:
        name: the element's name.
        children: :class:`Markup` as it is, other text escaped.
        attributes: a trailing underscore is dropped and inner ones become hyphens (``class_``, ``stroke_width``); ``None`` and
            ``False`` leave the attribute out, ``True`` writes it without a value; numbers are rounded to 2 decimals.
    """
    head = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Markup(f"<{head}>")
    return Markup(f"<{head}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """Several pieces one after another; plain text among them is escaped."""
    return Markup("".join(c if isinstance(c, Markup) else text(c) for c in children))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    shown = number(value) if isinstance(value, float) else str(value)
    return f' {name}="{text(shown)}"'


def number(value: float) -> str:
    """A coordinate with at most 2 decimals: enough for a screen, and it keeps the file small."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


@dataclass(frozen=True)
class Column:
    """A table column; figures are right-aligned."""

    title: str
    numeric: bool = False


def table(
    caption: str,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    *,
    row_classes: Sequence[str] = (),
) -> Markup:
    """A table whose first cell heads its row; scrolls sideways on narrow screens, by keyboard too."""
    head = tag("tr", *(tag("th", c.title, scope="col", class_=_align(c)) for c in columns))
    body = []
    for index, cells in enumerate(rows):
        first = tag("th", cells[0], scope="row", class_="short" if len(cells[0]) <= 28 else None)
        rest = (
            tag("td", cell, class_=_align(c) or _long(cell))
            for c, cell in zip(columns[1:], cells[1:], strict=True)
        )
        style = row_classes[index] if row_classes else None
        body.append(tag("tr", first, *rest, class_=style or None))
    return tag(
        "div",
        tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body)),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def pairs(entries: Sequence[tuple[str, str]]) -> Markup:
    """A list of names and values."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in entries))


def _align(column: Column) -> str | None:
    return "num" if column.numeric else None


def _long(cell: str) -> str | None:
    """Prose keeps a readable measure where a narrow screen would squeeze it to one word a line."""
    return "long" if len(cell) > 18 and not isinstance(cell, Markup) else None

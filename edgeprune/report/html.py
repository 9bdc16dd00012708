"""The report as one HTML file: no script, no network, nothing beside it; opens offline and prints."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from edgeprune.records.report import Report
from edgeprune.report import (
    charts,
    facts,
    format_table,
    int8_table,
    plan_sections,
    provenance,
    sections,
)
from edgeprune.report.figures import (
    bytes_text,
    change_text,
    quality_text,
    share_text,
    signed,
    speed_text,
    time_text,
)
from edgeprune.report.markup import Markup, tag

# The page may not load, send or run anything, whatever a name in it tries.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

CONTENTS = (
    ("gates", "Gates"),
    ("variants", "Variants"),
    ("formats", "Formats"),
    ("accuracy", "Accuracy"),
    ("int8", "INT8"),
    ("samples", "Samples"),
    ("sustained", "Sustained"),
    ("widths", "Widths"),
    ("cuts", "Cuts"),
    ("predictions", "Predictions"),
    ("costs", "Cost"),
    ("test", "Test split"),
    ("device", "Device"),
    ("settings", "Settings"),
    ("notes", "Notes"),
    ("command", "Command"),
)


def render_html(report: Report) -> bytes:
    """The whole report as a self-contained UTF-8 page.

    Args:
        report: the record; names in it are untrusted and are escaped.
    """
    return page(
        f"{report.model} for {report.target}: edgeprune report",
        masthead(f"{report.model} → {report.target}", f"{report.device}, {report.created}"),
        _body(report),
        f"edgeprune {report.edgeprune_version}, {report.created}. Times are {report.stamp}; "
        "figures that no device produced say predicted.",
    )


def page(title: str, top: Markup, body: Sequence[str], foot: str) -> bytes:
    """A whole UTF-8 page with the style and the frame that all pages share."""
    whole = tag(
        "html",
        _head(title),
        tag(
            "body",
            tag("a", "Skip to the result", href="#result", class_="skip"),
            tag("header", top, class_="masthead"),
            tag("main", *body, id="result"),
            tag("footer", foot),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{whole}\n".encode()


def _head(title: str) -> Markup:
    """The head of a page that carries its own style and may load nothing."""
    style = resources.files("edgeprune.report").joinpath("page.css").read_text("utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )


def masthead(subject: str, when: str) -> Markup:
    """The line above a page: what it is about, and of when."""
    return tag(
        "div",
        tag("span", "edgeprune", class_="brand"),
        tag("span", subject, class_="subject"),
        tag("span", when, class_="when"),
    )


def _body(report: Report) -> list[Markup]:
    return [
        *_doubts(report),
        _hero(report),
        *_banner(report),
        _contents(report),
        sections.gates(report),
        sections.variants(report),
        *([tried] if (tried := format_table.formats(report)) else []),
        sections.accuracy(report),
        *([recipes] if (recipes := int8_table.int8(report)) else []),
        sections.samples(report),
        *([steady] if (steady := sections.sustained(report)) else []),
        plan_sections.widths(report),
        plan_sections.cuts(report),
        plan_sections.predictions(report),
        provenance.costs(report),
        provenance.test_split(report),
        provenance.device(report),
        provenance.settings(report),
        provenance.notes(report),
        provenance.command(report),
    ]


def _hero(report: Report) -> Markup:
    is_sure = facts.is_sure(report)
    missed = ", ".join(g.name for g in facts.missed_gates(report))
    why = f"missed: {missed or 'see the notes'}" if facts.is_best_effort(report) else ""
    return tag(
        "section",
        tag(
            "p",
            tag("span", facts.verdict(report), class_=f"verdict {'good' if is_sure else 'bad'}"),
            tag("span", why, class_="why") if why else "",
            "" if report.stamp == "measured" else tag("span", report.stamp, class_="chip stamp"),
        ),
        tag("h1", report.headline),
        tag("div", *_tiles(report), class_="tiles"),
        class_="hero",
        aria_label="Result",
    )


def _tiles(report: Report) -> list[Markup]:
    found = facts.outcome(report)
    if found is None:
        return []
    row, same = found.row, f"dense {found.row.precision.upper()}"
    smaller = []
    if found.size_ratio is not None:
        smaller = [f"{signed((found.size_ratio - 1) * 100, 0)} % against {same}"]
    return [
        _tile(
            f"Latency, {charts.variant_name(row)}",
            time_text(row.median_ms),
            [f"{report.stamp} median", sections.budget_text(report)],
        ),
        _tile("Speed-up from pruning", speed_text(found.ratio), _speed_lines(found, same)),
        _tile(
            facts.metric(report).capitalize(),
            quality_text(row.quality, facts.ledger_n(report)),
            _quality_lines(found, same, facts.ledger_n(report)),
        ),
        _tile("File", bytes_text(row.size_bytes), smaller),
    ]


def _speed_lines(found: facts.ShippedOutcome, same: str) -> list[str]:
    lines = [f"against {same}"]
    if found.interval is not None and found.interval.low > 0:
        shown = sections.interval_text(found.interval.low, found.interval.high)
        lines.append(f"{shown} at {share_text(found.interval.confidence)} confidence")
        lines.append(f"{found.interval.rounds} loads")
    return lines


def _quality_lines(found: facts.ShippedOutcome, same: str, n: int) -> list[str]:
    lines = []
    if found.quality_change is not None:
        lines.append(f"{change_text(found.quality_change, n)} against {same}")
    if found.quality_change_fp32 is not None and found.row.precision != "fp32":
        lines.append(f"{change_text(found.quality_change_fp32, n)} against dense FP32")
    return [*lines, f"{n} samples"] if n else lines


def _tile(title: str, value: str, lines: list[str]) -> Markup:
    return tag(
        "div",
        tag("p", title, class_="tile-title"),
        tag("p", value, class_="tile-value"),
        *(tag("p", text, class_="tile-line") for text in lines),
        class_="tile",
    )


def _banner(report: Report) -> list[Markup]:
    found = facts.stamp_banner(report)
    if found is None:
        return []
    title, text = found
    return [
        tag(
            "aside",
            tag("strong", f"{title}. "),
            text,
            class_=f"banner stamp-{report.stamp}",
            role="note",
        )
    ]


def _doubts(report: Report) -> list[Markup]:
    """Times that were disturbed are called so before anything is read."""
    found = facts.unreliable(report)
    if not found:
        return []
    return [sections.unreliable_banner(found, "in this report")]


def _contents(report: Report) -> Markup:
    left_out = {
        key
        for key, part in (
            ("sustained", report.sustained),
            ("formats", report.formats),
            ("int8", report.int8),
        )
        if part is None
    }
    shown = (c for c in CONTENTS if c[0] not in left_out)
    links = (tag("a", title, href=f"#{key}") for key, title in shown)
    return tag("nav", *links, aria_label="Sections")

"""The sections of the page that say how the result was made: cost, test split, device, versions, notes and command."""

from __future__ import annotations

from edgeprune.records.report import Report
from edgeprune.report import charts, facts
from edgeprune.report.figures import bytes_text, quality_text, seconds_text, share_text
from edgeprune.report.markup import Column, Markup, pairs, table, tag
from edgeprune.report.sections import note, section


def costs(report: Report) -> Markup:
    """What the run itself cost."""
    if not report.stages:
        return section("costs", "What the run cost", note("No stage was timed."))
    whole = sum(s.seconds for s in report.stages)
    longest = max(s.seconds for s in report.stages) or 1.0
    rows = [
        (
            s.name,
            s.kind,
            seconds_text(s.seconds),
            share_text(s.seconds / whole) if whole else "0.0 %",
            charts.small_bar(s.seconds / longest, f"kind-{s.kind}"),
            "cached" if s.cached else "",
        )
        for s in report.stages
    ]
    columns = [
        Column("stage"),
        Column("kind"),
        Column("time", True),
        Column("share", True),
        Column("against the longest"),
        Column("reused"),
    ]
    reused = sum(s.seconds for s in report.stages if s.cached)
    text = f"{seconds_text(whole)} in all."
    if report.peak_memory_bytes:  # not in a bundle, where it would differ from run to run
        peak = bytes_text(report.peak_memory_bytes)
        text = f"{seconds_text(whole)} in all, peak memory {peak} on the host."
    if any(s.cached for s in report.stages):
        text += f" Stages marked cached ({seconds_text(reused)}) were reused from an earlier run."
    return section(
        "costs",
        "What the run cost",
        tag("p", text),
        tag("div", charts.stage_bar(report) or "", _kinds(report), class_="stage-bar"),
        table("Wall time of every stage", columns, rows),
    )


def _kinds(report: Report) -> Markup:
    totals = facts.seconds_by_kind(report.stages)
    whole = sum(totals.values()) or 1.0
    return tag(
        "ul",
        *(
            tag(
                "li",
                tag("span", class_=f"key key-{kind}", aria_hidden="true"),
                f"{kind}: {seconds_text(seconds)}, {share_text(seconds / whole)}",
            )
            for kind, seconds in totals.items()
        ),
        class_="legend",
    )


def test_split(report: Report) -> Markup:
    """Quality on the split that nothing was chosen on."""
    if not report.test_quality:
        text = (
            "There was no test split: every quality figure above comes from the development split."
        )
        return section("test", "Test split", note(text))
    rows = [
        (name, quality_text(value, report.test_n), _interval(value, report.test_n))
        for name, value in report.test_quality.items()
    ]
    columns = [Column("model"), Column(facts.metric(report), True), Column("95 % interval", True)]
    return section(
        "test",
        "Test split",
        tag("p", f"{report.test_n} samples, read once, after every choice was made."),
        table("Quality on the test split", columns, rows),
    )


def _interval(value: float, n: int) -> str:
    if n <= 0 or not 0 <= value <= 1:
        return "\N{EM DASH}"
    low, high = facts.wilson(value, n)
    return f"{quality_text(low, n)} to {quality_text(high, n)}"


def device(report: Report) -> Markup:
    """What the times were taken on."""
    f = report.fingerprint
    return section(
        "device",
        "Device",
        pairs(
            [
                (
                    "device",
                    f"{report.device} ({f.device})" if f.device != report.device else f.device,
                ),
                ("stamp", f.stamp),
                ("target", report.target),
                ("profile", report.profile),
                ("transport", f.transport),
                ("machine", f.machine),
                ("CPU", f"{f.cpu_model}, {f.cores} cores"),
                ("CPU flags", ", ".join(f.cpu_flags) or "none read"),
                ("memory", bytes_text(f.memory_bytes)),
                ("page size", f"{f.page_size_bytes} bytes"),
                ("kernel", f.kernel),
                ("governor", f.governor or "not readable"),
                ("Python", f.python),
                ("runtime", f"{f.runtime} {f.runtime_version}, {f.threads} {_threads(f.threads)}"),
                ("host name digest", f.hostname_digest),
                ("fingerprint", f.key()),
            ]
        ),
    )


def _threads(n: int) -> str:
    return "thread" if n == 1 else "threads"


def settings(report: Report) -> Markup:
    """Versions, seeds and every resolved setting."""
    rows = [(key, _plain(value)) for key, value in sorted(report.settings.items())]
    versions = [("edgeprune", report.edgeprune_version), *sorted(report.versions.items())]
    return section(
        "settings",
        "Versions and settings",
        tag("h3", "Versions"),
        pairs(versions),
        tag("h3", "Settings and seeds"),
        pairs(rows) if rows else note("No setting was recorded."),
    )


def _plain(value: str | int | float | bool | None) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def notes(report: Report) -> Markup:
    """What the run had to say."""
    if not report.notes:
        return section("notes", "Notes", note("None."))
    return section("notes", "Notes", tag("ul", *(tag("li", n) for n in report.notes)))


def command(report: Report) -> Markup:
    """How to make this again."""
    return section(
        "command",
        "Make it again",
        tag("pre", tag("code", report.command), tabindex="0", aria_label="the command"),
        pairs(
            [
                ("made", report.created),
                ("bundle", report.bundle_name),
                ("schema", str(report.schema_version)),
            ]
        ),
    )

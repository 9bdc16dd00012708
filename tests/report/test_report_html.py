"""The page: well-formed, self-contained, safe with hostile names, and showing what the record says."""

# ruff: noqa: RUF001  (figures are printed with a true minus sign)

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fixture import make_empty_report, make_fingerprint, make_plan, make_report, median_of

from edgeprune.records.plan import FrozenGroup
from edgeprune.records.report import Report
from edgeprune.report import render_html
from edgeprune.report.markup import VOID


class Page(HTMLParser):
    """Reads a page and fails on the first tag that is not closed in order."""

    def __init__(self, report: Report) -> None:
        super().__init__(convert_charrefs=True)
        self.source = render_html(report).decode()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pieces: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"repeated attribute in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.pieces.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.pieces))

    def section(self, key: str) -> str:
        """Visible text of one section."""
        inner = self.source.split(f'<section id="{key}"', 1)[1].split("</section>", 1)[0]
        return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", inner)))

    def rows(self, key: str) -> list[list[str]]:
        """Cells of every table row in one section."""
        inner = self.source.split(f'<section id="{key}"', 1)[1].split("</section>", 1)[0]
        rows = re.findall(r"<tr[^>]*>(.*?)</tr>", inner)
        cells = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows)
        return [[html.unescape(re.sub(r"<[^>]+>", "", c)) for c in row] for row in cells]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(make_report())


def test_the_page_is_balanced_has_a_title_and_unique_ids(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert "<!DOCTYPE html>" in page.source
    assert '<html lang="en">' in page.source


def test_every_link_in_the_contents_leads_to_a_section(page: Page) -> None:
    ids = {attrs.get("id") for _, attrs in page.tags}
    links = [str(attrs["href"]) for tag, attrs in page.tags if tag == "a"]
    assert len(links) > 10
    assert all(link.startswith("#") and link[1:] in ids for link in links)


def test_nothing_is_loaded_from_anywhere_and_no_script_runs(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attrs in page.tags:
        assert "src" not in attrs
        assert not any(name.startswith("on") for name in attrs)
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "http" not in page.source.replace("http-equiv", "")


def test_every_chart_names_itself_and_every_table_has_headers_and_a_caption(page: Page) -> None:
    charts = [attrs for tag, attrs in page.tags if tag == "svg" and attrs["class"] == "chart"]
    assert len(charts) == 7
    assert all(c["role"] == "img" and c["aria-label"] for c in charts)
    tables = page.source.count("<table>")
    assert tables == page.source.count("<caption>") == page.source.count("<thead>")
    assert tables >= 8
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in page.tags if tag == "th")


def test_no_coordinate_is_out_of_proportion(page: Page) -> None:
    numeric = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height", "r")
    shapes = [attrs for tag, attrs in page.tags if tag in ("rect", "line", "circle", "text")]
    values = [float(str(a[key])) for a in shapes for key in numeric if key in a]
    assert len(values) > 500
    assert all(-5 <= v <= 600 for v in values)


def test_the_top_says_what_shipped_how_fast_how_accurate_and_whether_it_passed(page: Page) -> None:
    top = page.source.split("<nav", 1)[0]
    report = make_report()
    ratio = median_of(report, "dense-int8") / median_of(report, "pruned-int8")
    for figure in (
        ">PASSED<",
        "2.08x faster than dense int8, accuracy -0.66 points",
        "Latency, pruned INT8",
        f"{median_of(report, 'pruned-int8'):.2f} ms",
        "judged on 47.91 % of dense int8 in the same rounds; budget 50.00 %",
        f"{ratio:.2f}\N{MULTIPLICATION SIGN}",
        "92.18 %",
        "−0.44 pp against dense INT8",
        "−0.66 pp against dense FP32",
    ):
        assert figure in top, figure
    assert "BEST EFFORT" not in page.source


def test_the_four_variants_stand_together_and_pruning_is_compared_in_its_own_precision(
    page: Page,
) -> None:
    report = make_report()
    rows = page.rows("variants")
    assert [row[0] for row in rows] == [
        "variant",
        "dense FP32",
        "dense INT8",
        "pruned FP32",
        "pruned INT8",
    ]
    for row in rows[1:]:
        name = row[0].lower().replace(" ", "-")
        assert float(row[1]) == pytest.approx(median_of(report, name), rel=0.005)
    times = "\N{MULTIPLICATION SIGN}"
    fp32 = median_of(report, "dense-fp32") / median_of(report, "pruned-fp32")
    int8 = median_of(report, "dense-int8") / median_of(report, "pruned-int8")
    assert rows[1][4] == rows[2][4] == "reference"
    assert rows[3][4].startswith(f"{fp32:.2f}{times} (")
    assert rows[4][4].startswith(f"{int8:.2f}{times} (")
    assert rows[4][5:] == ["92.18 %", "445 kB", "412 k", "21.5 M"]
    # Quantisation's gain over FP32 is shown apart, and the two gains are nowhere multiplied.
    alone = median_of(report, "dense-fp32") / median_of(report, "dense-int8")
    both = median_of(report, "dense-fp32") / median_of(report, "pruned-int8")
    assert f"{alone:.2f}{times}" in page.section("variants")
    assert f"{both:.2f}{times}" not in page.source


def test_gates_show_value_limit_and_verdict(page: Page) -> None:
    assert page.rows("gates")[1:] == [
        ["latency", "met", "47.91 % of dense int8", "50.00 % of dense int8", "6.43 ms"],
        ["accuracy", "met", "0.66 pp drop", "1.00 pp drop", "92.18% against 92.84% dense"],
        ["numerics", "met", "100.00 %", "99.00 %", "—"],
    ]


def test_the_ledger_has_a_line_per_stage_and_names_the_one_that_lost_most(page: Page) -> None:
    rows = page.rows("accuracy")
    assert [r[0] for r in rows[1:]] == [
        "dense", "dense (reference)", "pruned", "compensated", "recovered", "quantised", "exported", "on-device",
    ]  # fmt: skip
    assert rows[3] == [
        "pruned",
        "FP32",
        "torch",
        "accuracy",
        "41.32 %",
        "−51.52 pp",
        "dense FP32",
        "5000",
        "—",
    ]
    assert rows[6][4:7] == ["92.20 %", "−0.26 pp", "recovered FP32"]
    assert "The stage that lost most: pruned, −51.52 pp." in page.section("accuracy")
    assert "development split" in page.section("accuracy")


def test_samples_show_rejected_blocks_with_their_reason_and_the_device_state(page: Page) -> None:
    rows = page.rows("samples")
    assert rows[4][0] == "pruned INT8"
    assert rows[4][1:4] == ["312", "4", "13 of 14"]
    assert rows[4][-1] == "1 of 14: another process used the core"
    assert rows[1][-2] == "load 0.42 → 0.97, 51 → 56 °C, 2.10 → 2.10 GHz"
    assert page.source.count('class="cross"') == 2  # the two strokes of one cross


def test_widths_cuts_and_frozen_groups_come_from_the_plan(page: Page) -> None:
    assert ["blocks.9.conv", "conv 3x3", "192 → 112", "256 → 104", "", "41 %"] in [
        [*row[:4], "", row[5]] for row in page.rows("widths")
    ]
    plan = make_plan()
    largest = max(plan.groups, key=lambda g: g.saved_ms_predicted)
    row = page.rows("cuts")[1]
    assert row[:2] == [largest.name, f"{largest.channels} → {len(largest.kept)}"]
    assert float(row[2]) == pytest.approx(largest.saved_ms_predicted * 1000, rel=0.005)
    assert float(row[4]) == pytest.approx(largest.cost_nats, rel=0.005)
    assert ["classifier", "the outputs are the classes"] in page.rows("cuts")
    assert "all cuts together save 6.96 ms" in page.section("cuts")


def test_predictions_show_error_and_model_quality(page: Page) -> None:
    assert page.rows("predictions")[1][:4] == ["1", "7.41", "7.86", "−5.7 %"]
    assert page.rows("predictions")[4][-1] == "yes"
    text = page.section("predictions")
    assert "mean error, held out 2.1 %" in text
    assert "worst error, held out 5.8 %" in text
    assert "chosen: 6.24 ms predicted, 0.346 nats" in text


def test_costs_are_shared_by_kind_and_cached_stages_are_marked(page: Page) -> None:
    whole = 14.2 + 96.4 + 21.7 + 41.0 + 415.8 + 18.9 + 72.3 + 0.212
    text = page.section("costs")
    assert f"training: 6 min 56 s, {415.8 / whole * 100:.1f} %" in text
    assert f"measuring: 3 min 30 s, {(96.4 + 41 + 72.3) / whole * 100:.1f} %" in text
    cached = [row[0] for row in page.rows("costs") if row[-1] == "cached"]
    assert cached == ["profile"]


def test_the_page_says_how_to_make_it_again(page: Page) -> None:
    assert (
        "edgeprune deploy net.py:build --target rpi4 --latency 50% --max-drop 1%"
        in page.section("command")
    )
    assert "10000 samples" in page.section("test")
    assert page.rows("test")[2][:2] == ["shipped", "91.99 %"]
    assert "seed 7" in page.section("settings")
    assert "torch 2.13.0" in page.section("settings")
    assert "Example Xeon 2.1 GHz, 2 cores" in page.section("device")
    assert make_fingerprint().key() in page.section("device")
    assert "2 groups are frozen" in page.section("notes")


def test_a_stand_in_is_announced_and_never_called_measured_or_a_board(page: Page) -> None:
    banner = page.source.split("<aside", 1)[1].split("</aside>", 1)[0]
    assert "Stand-in figures" in banner
    assert "x86_64 machine" in banner
    assert "not on a Raspberry Pi (target rpi4)" in banner
    assert "was not run" not in banner
    top = page.source.split("<h1", 1)[0]
    assert '<span class="chip stamp">stand-in</span>' in top
    assert "judged on the exported file (this-machine, stand-in)" in page.section("gates")
    outside = page.source.replace(banner, "")
    assert "measured" not in outside
    assert "stand-in median" in outside


def test_an_emulated_board_is_announced() -> None:
    page = Page(make_report(stamp="emulated", target="jetson-orin-nano"))
    banner = page.source.split("<aside", 1)[1].split("</aside>", 1)[0]
    assert "Emulated board" in banner
    assert "not those of a Jetson (target jetson-orin-nano)" in banner
    assert "emulated median" in page.source


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("rpi3-32bit", "a Raspberry Pi (target rpi3-32bit)"),
        ("android-arm64", "an Android phone (target android-arm64)"),
        ("iphone", "an iPhone (target iphone)"),
        ("my-board", "the board of target my-board"),
    ],
)
def test_the_banner_calls_the_thing_what_people_call_it(target: str, name: str) -> None:
    assert f"not on {name}. They show" in Page(make_report(target=target)).words


def test_a_page_of_a_file_that_was_not_run_says_so_before_the_figures() -> None:
    report = make_report(target="iphone")
    numerics = next(g for g in report.gates if g.name == "numerics")
    unknown = numerics.model_copy(update={"met": False, "not_run": True})
    gates = (*(g for g in report.gates if g.name != "numerics"), unknown)
    page = Page(make_report(target="iphone", gates=gates, passed=False))
    assert ">NOT VERIFIED: THE FILE THAT SHIPS WAS NOT RUN<" in page.source.split("<h1", 1)[0]
    assert "The file that ships was not run at all" in page.source.split("<nav", 1)[0]
    assert "on another file of the same net (this-machine, stand-in)" in page.section("gates")
    assert "judged on the exported file" not in page.section("gates")
    assert page.rows("gates")[-1][:3] == ["numerics", "not run", "—"]
    assert '<span class="chip stamp">not run</span>' in page.source


def test_measured_figures_carry_no_banner() -> None:
    page = Page(make_report(stamp="measured"))
    assert "<aside" not in page.source
    assert "chip stamp" not in page.source.split("</style>", 1)[1]
    assert "judged on the exported file (this-machine)" in page.section("gates")
    assert "measured median" in page.source


def test_a_best_effort_is_marked_with_the_gates_that_were_missed() -> None:
    report = make_report()
    gates = tuple(g.model_copy(update={"met": g.name != "accuracy"}) for g in report.gates)
    page = Page(make_report(passed=False, gates=gates))
    assert ">BEST EFFORT<" in page.source
    assert "missed: accuracy" in page.words
    assert ">PASSED<" not in page.source
    assert [row[1] for row in page.rows("gates")[1:]] == ["met", "missed", "met"]


def test_an_empty_report_is_still_a_whole_page() -> None:
    page = Page(make_empty_report())
    for key in (
        "gates",
        "variants",
        "accuracy",
        "samples",
        "widths",
        "predictions",
        "costs",
        "notes",
    ):
        assert page.section(key)
    assert "svg" not in {tag for tag, _ in page.tags}
    assert "mean error, held out not judged" in page.section("predictions")
    assert "There was no test split" in page.section("test")


def test_variants_without_their_samples_or_comparisons_keep_their_rows() -> None:
    page = Page(make_report(measurements={}, comparisons=(), ledger=()))
    assert len(page.rows("variants")) == 5
    assert page.rows("variants")[4][4].endswith("\N{MULTIPLICATION SIGN}")
    assert "not in this report" in page.section("samples")


def test_times_under_a_millisecond_are_shown_in_microseconds() -> None:
    report = make_report()
    fast = tuple(
        r.model_copy(update={"median_ms": r.median_ms / 100, "p90_ms": r.p90_ms / 100})
        for r in report.variants
    )
    page = Page(make_report(variants=fast, limit_ms=0.066))
    assert page.rows("variants")[0][1] == "median, µs"
    shown = median_of(report, "pruned-int8") * 10
    assert page.rows("variants")[4][1] == f"{shown:.1f}"
    assert "which is 66.00 µs here" in page.words


HOSTILE = "</style><script>alert(1)</script><img src=x onerror=\"alert('2')\">&amp;\u202egnp.exe\x1b[2J\x00"


def test_hostile_names_are_shown_and_never_run() -> None:
    report = make_report(
        model=HOSTILE,
        device=HOSTILE,
        headline=HOSTILE,
        command=HOSTILE,
        notes=(HOSTILE,),
        settings={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        test_quality={HOSTILE: 0.5},
        fingerprint=make_fingerprint().model_copy(update={"cpu_model": HOSTILE}),
        plan=make_plan().model_copy(
            update={"frozen": (FrozenGroup(layers=(HOSTILE,), reason=HOSTILE),)}
        ),
    )
    page = Page(report)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.words
    assert "&amp;" in page.words
    assert not set(page.source) & {"\u202e", "\x1b", "\x00"}


@settings(max_examples=15, deadline=None)
@given(st.text(max_size=40), st.text(min_size=1, max_size=20))
def test_any_name_leaves_the_page_balanced(name: str, layer: str) -> None:
    report = make_report()
    measurements = {layer: report.measurements["pruned-int8"]}
    rows = tuple(r.model_copy(update={"measurement": layer}) for r in report.variants)
    ids = {a.get("id") for _, a in Page(report).tags}
    page = Page(
        make_report(model=name, device=name, bundle=name, variants=rows, measurements=measurements)
    )
    assert {a.get("id") for _, a in page.tags} == ids


def test_the_same_record_gives_the_same_bytes() -> None:
    assert render_html(make_report()) == render_html(make_report())

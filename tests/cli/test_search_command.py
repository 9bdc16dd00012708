"""``edgeprune search``: what it prints and leaves behind, and that a plan which was edited is what gets deployed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import tinynet
from report_fixture import make_search_result

from edgeprune.records.base import read_json
from edgeprune.records.plan import (
    PlanFile,
    PlanResult,
    SearchResult,
    WidthChoice,
)
from edgeprune.report.figures import significant, time_text
from edgeprune.report.plan_sections import saved_note
from edgeprune.report.search_page import (
    other_budgets,
    render_plan,
    render_search,
    render_search_html,
)

SEARCH = ("search", "--target", "this-machine", "--latency", "80%", "--run", "run")


def test_other_budgets_are_the_cheapest_structures_within_each_share():
    result = make_search_result()
    rows = other_budgets(result)
    assert rows
    for share, point in rows:
        limit = share * result.plan.dense_ms
        fitting = [p for p in result.points if p.predicted_ms <= limit]
        assert point in fitting
        assert point.cost_nats == min(p.cost_nats for p in fitting)
    assert len({(p.predicted_ms, p.cost_nats) for _, p in rows}) == len(rows)


def test_the_page_and_the_text_say_the_same_and_escape_names():
    result = make_search_result(model="<script>net.py:build")
    text, page = render_search(result, width=100), render_search_html(result).decode()
    assert "<script>net" not in page
    assert "&lt;script&gt;net.py:build" in page
    for part in ("What another budget would give", "stand-in", "Nothing was trained"):
        assert part in page
    for curve in result.curves:
        assert curve.group[-24:] in page
    assert "What each cut saved (predicted)" in text
    for _, point in other_budgets(result):
        assert significant(point.cost_nats) in text
    assert max(map(len, text.splitlines())) <= 100


def test_one_prediction_is_shown_of_the_plan_and_it_is_that_from_before_it_was_timed():
    result = make_search_result()
    chosen = result.chosen()
    early = chosen.model_copy(update={"predicted_ms": 1.5 * result.plan.predicted_ms})
    result = make_search_result(checks=(*(c for c in result.checks if c is not chosen), early))
    of_plan, before = time_text(result.plan.predicted_ms), time_text(early.predicted_ms)
    page = re.sub(r"<[^>]*>", " ", render_search_html(result).decode().partition("<svg")[0])
    dry = PlanResult(
        plan=result.plan, checks=result.checks, quality=result.latency_model, pareto=()
    )
    assert f"{before} predicted before it was timed" in " ".join(render_search(result).split())
    assert f"{before} predicted before it was timed" in page
    assert f"predicted {early.predicted_ms:.4g} ms before it was timed" in render_plan(dry)
    for text in (
        render_search(result).partition("What another budget")[0],
        page.partition("What another budget")[0],
    ):
        assert of_plan not in text
    assert f"{result.plan.predicted_ms:.4g} ms" not in render_plan(dry)


def test_savings_say_what_they_add_up_to():
    result = make_search_result()
    plan = result.plan
    rows_ms = sum(g.saved_ms_predicted for g in plan.groups)
    told = (
        f"the savings add up to {time_text(rows_ms)}, and all cuts together save"
        f" {time_text(plan.dense_ms - plan.predicted_ms)}: both predicted"
    )
    dry = PlanResult(plan=plan, checks=result.checks, quality=result.latency_model, pareto=())
    for text in (render_search(result), render_search_html(result).decode(), render_plan(dry)):
        assert told in " ".join(text.split())
    whole = tuple(g.model_copy(update={"kept": tuple(range(g.channels))}) for g in plan.groups)
    assert saved_note(plan.model_copy(update={"groups": whole})) == ""


def test_disturbed_times_are_called_so_before_anything_is_read():
    result = make_search_result()
    for shown in (render_search(result), render_search_html(result).decode()):
        assert "unreliable times" not in shown.lower()
    checks = [
        c.model_copy(update={"unreliable": "9 of 24 blocks were disturbed"}) for c in result.checks
    ]
    doubtful = make_search_result(checks=tuple(checks))
    text = render_search(doubtful, width=110)
    assert text.index("UNRELIABLE TIMES: 9 of 24 blocks") < text.index("What each cut saved")
    page = render_search_html(doubtful).decode()
    assert page.index("Unreliable times.") < page.index("What another budget")


def test_a_removed_block_is_called_one_in_text_page_and_dry_run():
    plan = make_search_result().plan
    first, *others = plan.groups
    cut = plan.model_copy(update={"groups": (first.model_copy(update={"kept": ()}), *others)})
    curves = tuple(
        c.model_copy(
            update={"choices": (WidthChoice(width=0, saved_ms=0.1, cost_nats=1.0), *c.choices)}
        )
        if c.group == first.name
        else c
        for c in make_search_result().curves
    )
    check = make_search_result().checks[-1].model_copy(update={"widths": cut.widths()})
    result = make_search_result(plan=cut, curves=curves, checks=(check,))
    assert "-> block removed" in render_search(result)
    page = render_search_html(result).decode()
    assert "→ block removed" in page
    assert "block removed: saves" in page
    dry = PlanResult(plan=cut, checks=(check,), quality=result.latency_model, pareto=())
    lines = [line for line in render_plan(dry).splitlines() if line.endswith("block removed")]
    assert [line.split()[0] for line in lines] == [first.name]


def test_a_search_without_a_faster_structure_has_no_empty_tables():
    result = make_search_result(points=(), pareto=(), curves=())
    assert "another budget" not in render_search(result, width=80)
    assert "There is no faster structure" in render_search_html(result).decode()


@pytest.fixture(scope="module")
def searched(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A project in which ``search`` ran over the measurements of a finished run."""
    home = tinynet.project(tmp_path_factory.mktemp("search") / "project")
    finished = tinynet.deployed(tmp_path_factory).folder
    tinynet.copied_run(finished, home / "run")
    return home, tinynet.edgeprune(home, *SEARCH)


def test_search_explains_and_trains_nothing(searched):
    home, done = searched
    assert done.returncode == 0, done.stderr
    assert "budget of" in done.stdout
    assert "page    run/search.html" in done.stdout
    result = read_json(SearchResult, home / "run" / "search.json")
    plan = read_json(PlanFile, home / "run" / "plan.json")
    assert plan.widths == result.plan.widths()
    assert set(plan.admissible_widths) == set(plan.widths)
    assert all(w in plan.admissible_widths[g] for g, w in plan.widths.items())
    assert "recover" not in done.stderr
    assert not (home / "run" / "report.json").exists()


def test_an_edited_plan_is_what_is_deployed(searched):
    home, done = searched
    assert done.returncode == 0, done.stderr
    plan = json.loads((home / "run" / "plan.json").read_text())
    group = max(plan["widths"], key=lambda g: len(plan["admissible_widths"][g]))
    narrowest = plan["admissible_widths"][group][0]
    plan["widths"] = {group: narrowest}  # all others stay whole
    (home / "mine.json").write_text(json.dumps(plan))
    tinynet.copied_run(home / "run", home / "other")
    # What an edited plan costs is its author's business; the budget leaves room for any noise.
    args = ("--target", "this-machine", "--latency", "95%", "--plan", "mine.json", "--run", "other")
    planned = tinynet.edgeprune_here(home, "deploy", *args, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    kept = {g["name"]: len(g["kept"]) for g in json.loads(planned.stdout)["plan"]["groups"]}
    assert kept.pop(group) == narrowest
    assert kept == {g: w[-1] for g, w in plan["admissible_widths"].items() if g != group}


@pytest.mark.parametrize(
    ("text", "says", "code"),
    [
        (None, "there is no plan mine.json", 2),
        ("{}", "mine.json", 2),
        ("no json", "mine.json", 2),
        ({"nowhere": 8}, "unknown group 'nowhere'", 2),
        ("narrow", "must be one of", 2),
        ("zero", "must be one of", 2),
        ("negative", "must be one of", 2),
        ({}, "the given plan was measured at", 6),
        ("target", "was made for the target rpi4", 2),
    ],
)
def test_a_wrong_plan_is_one_line(searched, tmp_path, text, says, code):
    home, done = searched
    assert done.returncode == 0, done.stderr
    plan = json.loads((home / "run" / "plan.json").read_text())
    group = next(iter(plan["widths"]))
    path = home / "mine.json"
    path.unlink(missing_ok=True)
    edited = (
        {"narrow": {group: 3}, "zero": {group: 0}, "negative": {group: -8}}.get(text, text)
        if isinstance(text, str)
        else text
    )
    if isinstance(edited, dict):
        path.write_text(json.dumps({**plan, "widths": edited}))
    elif edited == "target":
        path.write_text(json.dumps({**plan, "target": "rpi4"}))
    elif edited is not None:
        path.write_text(edited)
    run = home / f"run-{tmp_path.name}"
    tinynet.copied_run(home / "run", run)
    before = {p.relative_to(run): p.is_file() and p.read_bytes() for p in run.rglob("*")}
    args = ("--latency", "80%", "--plan", "mine.json", "--run", run.name)
    failed = tinynet.edgeprune_here(home, "deploy", "--target", "this-machine", *args, "--dry-run")
    assert failed.returncode == code, failed.stderr
    errors = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert says in errors[0]
    if code == 2:  # found before the run folder is touched
        assert before == {
            p.relative_to(run): p.is_file() and p.read_bytes() for p in run.rglob("*")
        }

"""The pages tell the truth: commands exist, examples parse, quoted messages are ours, figures come from their files."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import blocks
import budgets as budgets_script
import click
import demo as demo_script
import numpy as np
import pytest
import readme as readme_script
from click.testing import CliRunner
from repo import REPO
from report_fixture import make_report
from torch import nn

from edgeprune import errors
from edgeprune.cli import main as cli
from edgeprune.cli.main import main as edgeprune_main
from edgeprune.pipeline import api
from edgeprune.pipeline.options import Options
from edgeprune.progress import Silent
from edgeprune.records.base import read_yaml
from edgeprune.records.budget import parse_budget, parse_drop
from edgeprune.records.device import DeviceFile
from edgeprune.records.files import write_json
from edgeprune.records.target import Profile, Target
from edgeprune.records.workload import Preprocess, Workload
from edgeprune.workload.load import from_objects

PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
DOCS = [p for p in PAGES if p.parent.name == "docs"]
EXTRA_TARGETS = {"my-board"}  # that the page on targets makes


def fences(path: Path) -> Iterator[tuple[str, str]]:
    """Language and content of every fenced block."""
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", path.read_text("utf-8"), re.M | re.S):
        yield found[1], found[2]


def commands(path: Path) -> list[tuple[str, bool]]:
    """Every edgeprune command of a page; the flag says whether it is a whole command line or a mention in a sentence."""
    found = []
    for language, content in fences(path):
        if language in ("", "console", "bash", "sh"):
            lines = content.replace("\\\n", " ").splitlines()
            matches = (re.match(r"(?:\$ )?(edgeprune .*)", line) for line in lines)
            found += [(m[1], True) for m in matches if m]
    prose = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
    return found + [(text, False) for text in re.findall(r"`(edgeprune [a-z-][^`]*)`", prose)]


def parsed(command: str, *, whole: bool = True) -> dict[str, object]:
    """What click understands of a command; raises UsageError for what does not exist, and for what a whole command lacks."""
    words = shlex.split(command, comments=True)[1:]
    here: click.Command = cli.cli
    while isinstance(here, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        if name not in here.commands:
            raise click.UsageError(f"no command {name!r} in {command!r}; known: {[*here.commands]}")
        here = here.commands[name]
    values, rest, _ = here.make_parser(click.Context(here)).parse_args(words)
    if rest:
        raise click.UsageError(f"{rest} is left over in {command!r}")
    nothing = here.make_parser(click.Context(here)).parse_args([])[0]
    for parameter in here.params if whole else ():
        name = str(parameter.name)
        if parameter.required and values.get(name) == nothing.get(name):
            raise click.UsageError(f"{parameter.name} is missing in {command!r}")
    return values


ALL_COMMANDS = [(p.name, *c) for p in PAGES for c in commands(p)]


def test_the_pages_show_commands():
    assert {"README.md", "bring-your-model.md", "add-a-board.md"} <= {p for p, *_ in ALL_COMMANDS}
    assert len(ALL_COMMANDS) > 20


@pytest.mark.parametrize(("page", "command", "whole"), ALL_COMMANDS)
def test_every_command_and_flag_that_a_page_shows_exists(page, command, whole):
    parsed(command, whole=whole)


@pytest.mark.parametrize(
    "command",
    [
        "edgeprune fly",
        "edgeprune deploy --fast",
        "edgeprune targets show",
        "edgeprune doctor now",
        "edgeprune compare",
    ],
)
def test_a_command_that_does_not_exist_would_be_found(command):
    with pytest.raises(click.UsageError):
        parsed(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_targets_and_budgets_in_working_examples_are_real(page):
    wrong = [c for language, c in fences(page) if language == "console"]
    for command, whole in commands(page):
        if any(command in block for block in wrong):
            continue  # shown because it fails
        values = parsed(command, whole=whole)
        target = values.get("target")
        known = {p.stem for p in (REPO / "targets").glob("*.yaml")} | EXTRA_TARGETS
        assert target is None or target in known, command
        if isinstance(values.get("latency"), str):
            parse_budget(str(values["latency"]))
        if isinstance(values.get("max_drop"), str):
            parse_drop(str(values["max_drop"]))


YAML_RECORDS = {
    "bring-your-model.md": [Workload],
    "add-a-board.md": [DeviceFile],
    "add-a-target.md": [Target, Profile],
}


@pytest.mark.parametrize("page", YAML_RECORDS)
def test_the_yaml_of_a_page_is_a_valid_file(page, tmp_path):
    examples = [c for language, c in fences(REPO / "docs" / page) if language == "yaml"]
    assert len(examples) == len(YAML_RECORDS[page])
    for record, content in zip(YAML_RECORDS[page], examples, strict=True):
        path = tmp_path / "example.yaml"
        path.write_text(content, "utf-8")
        read_yaml(record, path)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_examples_compile_and_pass_arguments_that_exist(page):
    known = set(inspect.signature(api.deploy).parameters)
    for language, content in fences(page):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "edgeprune.deploy":
                assert {k.arg for k in node.keywords} <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+\.md)[^)]*\)", page.read_text("utf-8")):
        assert (page.parent / link).is_file(), link


def console_cases() -> list[tuple[str, str, int]]:
    cases = []
    for language, content in fences(REPO / "docs" / "wrong-inputs.md"):
        if language == "console":
            first, *middle, last = content.splitlines()
            code = int(last.removeprefix("exit code "))
            cases.append((first.removeprefix("$ "), "\n".join(middle), code))
    return cases


@pytest.mark.parametrize(("command", "shown", "code"), console_cases())
def test_a_wrong_input_gives_the_message_and_exit_code_that_the_page_shows(
    command, shown, code, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        edgeprune_main(shlex.split(command)[1:])
    assert stop.value.code == code
    assert capsys.readouterr().err.strip() == shown


def package_text() -> str:
    """The package's source, with strings that continue on the next line joined."""
    text = "\n".join(p.read_text("utf-8") for p in sorted((REPO / "edgeprune").rglob("*.py")))
    return re.sub(r"\"\n\s*f?\"", "", text)


def table_rows(page: str) -> list[list[str]]:
    lines = (REPO / "docs" / page).read_text("utf-8").splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return [row for row in rows if not set(row[0]) <= set("-: ")]


@pytest.mark.parametrize("page", ["wrong-inputs.md", "bring-your-model.md"])
def test_every_message_that_a_page_quotes_is_in_the_program(page):
    source = package_text()
    heads = ("message has", "it says")
    text = (REPO / "docs" / page).read_text("utf-8")
    quoted = []
    for part in text.split("\n\n"):
        if part.startswith(tuple(f"| {head} |" for head in heads)):
            quoted += re.findall(r"^\| `([^`]+)`", part, re.M)
    assert len(quoted) >= 8
    for message in quoted:
        for piece in message.split(" ... "):
            assert piece in source, message


def test_the_table_of_exit_codes_is_that_of_the_errors():
    shown = {r[1].strip("`"): int(r[0]) for r in table_rows("wrong-inputs.md") if r[0].isdigit()}
    del shown[""]  # no error of a family: all is well, busy, or stopped
    families = errors.EdgepruneError.__subclasses__()
    assert shown == {f.__name__: f.exit_code for f in families}


def achieved_from_fixture(ratio: float = 0.5, *, is_first: bool = True) -> blocks.Achieved:
    report = make_report()
    checks = tuple(
        c.model_copy(update={"widths": report.plan.widths()} if i == 3 else {})
        for i, c in enumerate(report.checks)
    )
    changed = report.model_copy(update={"checks": checks})
    return budgets_script.achieved(changed, ratio, is_first=is_first)


def budget_results() -> blocks.BudgetResults:
    done = blocks.BudgetRow(
        budget="50%", asked_ratio=0.5, status="done", seconds=100.0, achieved=achieved_from_fixture()
    )  # fmt: skip
    failed = blocks.BudgetRow(
        budget="30%", asked_ratio=0.3, status="infeasible", message="below 0.4 | ms", seconds=1.0
    )
    report = make_report()
    return blocks.BudgetResults(
        edgeprune_version="0.1.0",
        created=report.created,
        command="python benchmarks/budgets.py",
        model=report.model,
        target="rpi4",
        device="this-machine",
        fingerprint=report.fingerprint,
        epochs=1.0,
        seed=0,
        max_drop=0.01,
        versions={},
        rows=(done, failed),
        seconds=101.0,
    )


def test_a_budget_row_holds_what_the_report_says():
    found = achieved_from_fixture()
    assert (found.predicted_ms, found.plan_ratio) == (6.24, pytest.approx(6.31 / 13.2))
    assert found.low < found.ratio < found.high
    assert found.slack_ratio == pytest.approx(1 - found.ratio / 0.5)
    assert found.quality == {
        "dense": 0.9284,
        "pruned": 0.4132,
        "compensated": 0.6318,
        "recovered": 0.9246,
        "dense int8": 0.9262,
        "int8": 0.9218,
    }
    assert found.stage_seconds["training"] == pytest.approx(415.8)
    shared = found.stage_seconds["measuring"]
    later = achieved_from_fixture(is_first=False).stage_seconds["measuring"]
    stages = {s.name: s.seconds for s in make_report().stages if s.kind == "measuring"}
    # Kept or not: when they were run they took that.
    assert shared == pytest.approx(sum(stages.values()))
    assert later == pytest.approx(
        shared - sum(stages.get(n, 0) for n in budgets_script.SHARED_STAGES)
    )


def test_an_infeasible_budget_keeps_its_line_and_its_message():
    block = blocks.budgets_block(budget_results())
    rows = [line for line in block.splitlines() if line.startswith("| 30%")]
    assert len(rows) == 1
    assert "infeasible" in rows[0]
    assert "- 30%: infeasible: below 0.4 | ms" in block


@pytest.mark.parametrize(
    "make",
    [
        lambda: blocks.demo_block(make_report()),
        lambda: blocks.budgets_block(budget_results()),
        lambda: blocks.prediction_block(budget_results()),
    ],
    ids=["demo", "budgets", "prediction"],
)
def test_every_table_has_its_stamp_and_equal_columns(make):
    block = make()
    assert "**stand-in: x86-64**" in block
    for part in block.split("\n\n"):
        if part.startswith("|"):
            lines = part.splitlines()
            assert len({re.sub(r"\\\|", "", line).count("|") for line in lines}) == 1
            assert "stand-in: x86-64" in lines[0]


def test_the_prediction_error_is_that_of_the_structure_that_was_chosen():
    line = next(
        x for x in blocks.prediction_block(budget_results()).splitlines() if x.startswith("| 50%")
    )
    assert f"| {(6.24 / 6.31 - 1) * 100:.1f} % |".replace("-", "\N{MINUS SIGN}") in line


@pytest.mark.parametrize("text", ["15ms", "60%,60%", "60%,x", "", "120%"])
def test_budgets_must_be_different_shares(text):
    with pytest.raises(errors.SpecError):
        budgets_script.asked(text)


def test_the_usual_budgets_are_ten_between_30_and_90_percent():
    found = budgets_script.asked(budgets_script.BUDGETS)
    assert (len(found), min(found.values()), max(found.values())) == (10, 0.3, 0.9)


def test_a_budget_that_fails_is_a_row_and_not_the_end(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 4, 4), np.uint8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    loaded = from_objects(model, pixels, preprocess=Preprocess(color="grey"), task="classify")
    taken = tmp_path / "a-file"
    taken.write_text("not a folder")
    options = Options(target="rpi4", latency="80%", run=taken)
    row = budgets_script.run_budget(loaded, options, "80%", 0.8, Silent())
    assert (row.status, row.achieved) == ("failed", None)
    assert "cannot use the run folder" in row.message


def page_with(tmp_path: Path, text: str) -> Path:
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(text, "utf-8")
    return tmp_path


BLOCKS = "# x\n<!-- figures:demo -->\nold\n<!-- /figures:demo -->\nend\n"


def run_readme(root: Path, *flags: str) -> int:
    arguments = ["--root", str(root), "--results", str(root / "results"), *flags]
    return CliRunner().invoke(readme_script.main, arguments).exit_code


def test_figures_are_written_once_and_then_fresh(tmp_path):
    root = page_with(tmp_path, BLOCKS)
    run = tmp_path / "run"
    run.mkdir()
    write_json(make_report(), run / "report.json")
    demo = tmp_path / "results" / "demo.json"
    done = CliRunner().invoke(demo_script.main, [str(run), "--out", str(demo)])
    assert done.exit_code == 0, done.output
    assert run_readme(root, "--check") == 1
    assert (root / "README.md").read_text("utf-8") == BLOCKS
    assert run_readme(root) == 0
    written = (root / "README.md").read_text("utf-8")
    assert "pruned INT8, ships" in written
    assert "old" not in written
    assert written.endswith("<!-- /figures:demo -->\nend\n")
    assert run_readme(root, "--check") == 0


def test_a_block_without_a_results_file_is_emptied(tmp_path):
    root = page_with(tmp_path, BLOCKS)
    assert run_readme(root) == 0
    assert "old" not in (root / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    "text",
    [
        "<!-- figures:demo -->\n",
        "<!-- /figures:demo -->\n",
        "<!-- figures:none -->\n<!-- /figures:none -->\n",
        "<!-- figures:demo -->\n<!-- /figures:budgets -->\n",
    ],
)
def test_broken_marks_are_refused(tmp_path, text):
    assert run_readme(page_with(tmp_path, text)) == 2


def test_a_trimmed_report_has_no_samples_and_says_the_same(tmp_path):
    report = make_report()
    small = demo_script.trimmed(report)
    path = tmp_path / "demo.json"
    write_json(small, path)
    assert path.stat().st_size < 40_000
    assert blocks.demo_block(small) == blocks.demo_block(report)


def test_the_figures_in_the_pages_are_those_of_the_results_files():
    assert not readme_script.stale(REPO, blocks.RESULTS)


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_docs_name_no_figure_of_a_board_that_was_never_measured(page):
    outside = re.sub(
        r"<!-- figures:.*?<!-- /figures:\S+ -->", "", page.read_text("utf-8"), flags=re.S
    )
    prose = re.sub(r"```.*?```|`[^`]*`", "", outside, flags=re.S)
    assert not re.search(r"\d ?(ms|µs)\b|\d(x|\u00d7) (faster|slower)", prose)

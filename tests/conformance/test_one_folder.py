"""A format is one folder: a sixth one is found and handled by all else, and no other module names a format."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import bundle_fixture
import pytest
from click.testing import CliRunner
from report_fixture import make_report

from edgeprune import formats
from edgeprune.bundle.verify import verify
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.cli.main import cli
from edgeprune.errors import EdgepruneError
from edgeprune.records import catalog
from edgeprune.records.base import parse
from edgeprune.records.formats import all_facts, format_names
from edgeprune.records.report import FormatChoice, FormatRow, Report
from edgeprune.records.target import Target
from edgeprune.report import render_html, render_terminal

PACKAGE = Path(formats.__file__).parents[1]
FOLDER = Path(__file__).parent / "sixth_format"
# The runtimes that an agent can run stand in one Literal, beside the formats; some are called as their format.
ONE_LITERAL = "records/formats.py"
# What runs on a board knows runtimes, and what a bundle ships is read by people: neither is asked about formats.
PAYLOAD = ("devices/agent/", "bundle/samples/")
TARGET = {
    "name": "a",
    "summary": "a target",
    "profile": "cortex-a72",
    "format": "bent",
    "runtime": {"name": "onnxruntime"},
}


@pytest.fixture
def sixth(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The folder of the throw-away format among the others."""
    formats.__path__.append(str(FOLDER))
    yield
    formats.__path__.remove(str(FOLDER))
    for name in [name for name in sys.modules if name.startswith("edgeprune.formats.bent")]:
        del sys.modules[name]


@pytest.fixture
def bundle(sixth: None, tmp_path: Path) -> Path:
    file = tmp_path / "tiny.bent"
    artifact = bundle_fixture.onnx_file(file).model_copy(update={"format": "bent"})
    payload = Payload(
        model=artifact,
        model_file=file,
        golden_inputs=bundle_fixture.images(),
        golden_outputs=bundle_fixture.expected(bundle_fixture.images()),
    )
    return write_bundle(tmp_path / "bundle", bundle_fixture.facts(), payload)


def test_without_its_folder_there_is_no_such_format() -> None:
    assert "bent" not in formats.names()
    with pytest.raises(EdgepruneError, match="input should be 'tflite', 'onnx', 'tensorrt'"):
        parse(Target, TARGET, where="here")


def test_it_is_found_and_loaded(sixth: None) -> None:
    assert "bent" in formats.names()
    assert format_names()[-1] == "bent"
    assert formats.load("bent").info.suffix == ".bent"
    formats.require_tools("bent")


def test_a_target_takes_it_with_a_runtime_of_its_own(sixth: None, tmp_path: Path) -> None:
    other = {"format": "bent", "runtime": {"name": "onnxruntime"}}
    assert parse(Target, TARGET, where="here").format == "bent"
    assert parse(Target, TARGET | {"format": "onnx", "formats": [other]}, where="here").formats
    wrong = TARGET | {"format": "onnx", "formats": [other | {"runtime": {"name": "litert"}}]}
    with pytest.raises(EdgepruneError, match="files of bent are run by onnxruntime, not by litert"):
        parse(Target, wrong, where="here")
    path = tmp_path / "a.yaml"
    path.write_text(
        "name: a\nsummary: a target\nprofile: cortex-a72\nformat: bent\nruntime: {name: onnxruntime}\n"
    )
    assert catalog.target(path).format == "bent"


def test_a_bundle_of_it_is_written_and_verified(bundle: Path) -> None:
    report = verify(bundle)
    levels = {level.level: level.status for level in report.levels}
    assert levels[1] == levels[3] == levels[4] == "passed", levels
    readme = (bundle / "README.md").read_text()
    assert "Bend `models/model.fp32.bent` of tiny-net back, and run it." in readme
    assert "Nothing is written on a bent file." in readme
    assert (bundle / "samples/python/predict.py").is_file()
    assert not (bundle / "samples/cpp").exists()


def test_the_command_line_verifies_and_lists_it(bundle: Path) -> None:
    done = CliRunner().invoke(cli, ["verify", str(bundle)])
    assert done.exit_code == 0, done.output
    assert re.search(r"^bent +numpy \d", CliRunner().invoke(cli, ["doctor"]).output, re.M)


def test_a_report_shows_it(sixth: None) -> None:
    row = FormatRow(
        format="bent", runtime="onnxruntime", precision="fp32", median_ms=1.0, spread_ratio=0.01,
        ratio=0.5, ratio_low=0.4, ratio_high=0.6, agreement=1.0, holds=True,
    )  # fmt: skip
    choice = FormatChoice(
        own="onnx", chosen="bent", precision="fp32", reason="it is the fastest", rows=(row,),
        samples=8, device="desk", stamp="measured",
    )  # fmt: skip
    report = Report.model_validate(make_report(formats=choice).model_dump())
    assert "bent" in render_terminal(report)
    assert b"bent" in render_html(report)


def spoken(path: Path) -> Iterator[str]:
    """Strings of a module that are not docstrings, and what it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in silent
        ):
            yield node.value
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def names_a_format(text: str) -> bool:
    """Whether a text holds the name, the suffix or the folder of a format; a runtime such as ``tflite-runtime`` is none."""
    words = {f.name for f in all_facts()} | {f.suffix.removeprefix(".") for f in all_facts()}
    found = re.search(rf"(?<![\w/-])({'|'.join(sorted(words))})(?![\w-])", text)
    is_agent = text.startswith("edgeprune.devices.agent.")
    return found is not None and not is_agent


def modules() -> list[Path]:
    own = [PACKAGE / "formats" / name for name in formats.names()]
    return sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if not path.relative_to(PACKAGE).as_posix().startswith(PAYLOAD)
        and not any(path.is_relative_to(folder) for folder in own)
        and "_data" not in path.parts
    )


def test_no_module_outside_its_folder_names_a_format() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if any(map(names_a_format, spoken(path)))
    }
    assert found == {ONE_LITERAL}


def test_that_one_module_has_one_literal() -> None:
    (line,) = (
        line
        for line in (PACKAGE / ONE_LITERAL).read_text().splitlines()
        if names_a_format(" ".join(re.findall(r'"([^"]*)"', line)))
    )
    assert line.startswith("RuntimeName = Literal[")


@pytest.mark.parametrize(
    "text",
    ["onnx", "a .pte carries no texts", "edgeprune.formats.tflite.format", "model.mlpackage"],
)
def test_the_search_finds_what_it_should(text: str) -> None:
    assert names_a_format(text)
    assert not names_a_format("tflite-runtime and onnxruntime")

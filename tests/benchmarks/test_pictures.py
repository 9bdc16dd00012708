"""Pictures of results: what is cut from a report page, what is kept of its origin, and that the pages show pictures with a record."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import blocks
import picture_blocks
import pictures as script
import pytest
from click.testing import CliRunner
from commands import public_command
from PIL import Image, ImageDraw
from repo import REPO
from report_fixture import make_report

from edgeprune.cli.options import schedule_settings
from edgeprune.errors import FormatError, IntegrityError, SpecError, UnknownName
from edgeprune.records.base import read_json
from edgeprune.records.files import write_bytes, write_json
from edgeprune.records.report import Report
from edgeprune.report import render_html

PAGES = {
    "rpi4": "raspberry-pi.md",
    "jetson-orin-nano": "jetson.md",
    "android-arm64": "android.md",
    "iphone": "iphone.md",
}
RECORD = blocks.RESULTS / "pictures.json"
BROWSER = script.Browser("/usr/bin/browser", "Browser 1")


def page_of(report: Report) -> str:
    return render_html(report).decode()


def test_runs_are_named_by_target():
    found = script.parse_runs(["rpi4=runs/a", "iphone=runs/b=c"])
    assert found == {"rpi4": Path("runs/a"), "iphone": Path("runs/b=c")}
    assert script.parse_runs([]) == {}


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        (["rpi4"], SpecError),
        (["rpi4="], SpecError),
        (["rpi4=a", "rpi4=b"], SpecError),
        (["rpi-4=a"], UnknownName),
    ],
)
def test_runs_that_cannot_be_meant_are_refused(texts, error):
    with pytest.raises(error):
        script.parse_runs(texts)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("edgeprune deploy --run /x/y --target rpi4", "edgeprune deploy --target rpi4"),
        ("edgeprune deploy --run=/x/y --latency 50%", "edgeprune deploy --latency 50%"),
        ("a.py --run rpi4=/x/y --run iphone=z --docs b", "a.py --docs b"),
        ("edgeprune deploy /home/me/net.py:build", "edgeprune deploy net.py:build"),
        ("edgeprune deploy --data '/a b/c d'", "edgeprune deploy --data 'c d'"),
        ("a.py --net b --out /x/y.json --emulated-board", "a.py --net b --emulated-board"),
        ("edgeprune deploy --data=/a/b/c.npz", "edgeprune deploy --data=c.npz"),
    ],
)
def test_a_command_is_kept_without_the_folders_of_a_machine(command, shown):
    assert public_command(command) == shown


def test_the_head_keeps_what_it_says_and_hides_the_rest():
    page = page_of(make_report())
    head = script.head_of(page)
    assert head.replace(f"<style>{script.LEFT_OUT}</style>", "") == page
    assert ">stand-in<" in head.split('id="accuracy"')[0]
    for place in re.findall(r"#(\w+)", script.LEFT_OUT):
        assert f'id="{place}"' in page


def test_a_page_that_would_show_a_path_of_the_machine_is_refused():
    with pytest.raises(IntegrityError, match="/home/me/run"):
        script.head_of(page_of(make_report(device="/home/me/run")))
    script.head_of(page_of(make_report(command="edgeprune deploy --run /home/me/run")))  # far below


def test_another_page_is_refused():
    with pytest.raises(IntegrityError, match="accuracy"):
        script.head_of("<html><head></head><body></body></html>")


@pytest.mark.parametrize(("epochs", "flags"), [(None, []), (0.3, ["--epochs", "0.3"])])
def test_the_example_is_deployed_and_healed_for_as_long_as_was_asked(
    tmp_path, monkeypatch, epochs, flags
):
    calls = []

    def run(argv, **_):
        calls.append(argv)
        return subprocess.CompletedProcess(argv, 6)

    monkeypatch.setattr(script.subprocess, "run", run)
    assert script.deployed("rpi4", tmp_path, "50%", epochs) == tmp_path
    ((_, *argv),) = calls
    base = ["--example", "fashion-mnist", "--target", "rpi4", "--latency", "50%"]
    assert argv == ["-m", "edgeprune", "deploy", *base, "--run", str(tmp_path), *flags]
    assert schedule_settings({"epochs": "0.3"}) == {"epochs": 0.3}


def test_a_deployment_that_failed_leaves_no_picture(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 4)
    monkeypatch.setattr(script.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FormatError, match="ended with code 4"):
        script.deployed("rpi4", tmp_path, "50%", None)


def drawn(bottom: int, height: int = 100) -> Image.Image:
    picture = Image.new("RGB", (60, height), "#f6f7f8")
    if bottom:
        ImageDraw.Draw(picture).rectangle((5, 5, 40, bottom - 1), fill="#0a7d70")
    return picture


def test_empty_rows_at_the_foot_are_cut_but_for_a_margin():
    assert script.trimmed(drawn(50), 10).size == (60, 60)


@pytest.mark.parametrize("bottom", [0, 95, 100])
def test_a_picture_that_is_empty_or_cut_is_refused(bottom):
    with pytest.raises(IntegrityError):
        script.trimmed(drawn(bottom), 10)


def test_without_a_browser_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FormatError, match="apt-get install chromium"):
        script.find_browser(None)
    done = CliRunner().invoke(script.main, ["--browser", "no-such-browser"])
    assert done.exit_code == 5
    assert "no-such-browser" in done.output


def fake_draw(browser: script.Browser, page: str, out: Path) -> None:
    script.head_of(page)
    write_bytes(out, b"picture")


def run_folder(tmp_path: Path, report: Report) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(report, folder / "report.json")
    (folder / "report.html").write_bytes(render_html(report))
    return folder


def test_a_record_traces_the_picture_to_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "draw", fake_draw)
    monkeypatch.setattr(script, "find_browser", lambda _: BROWSER)
    folder = run_folder(tmp_path, make_report(command=f"edgeprune deploy --run {tmp_path / 'run'}"))
    out = tmp_path / "pictures.json"
    arguments = ["--run", f"rpi4={folder}", "--docs", str(tmp_path), "--out", str(out)]
    done = CliRunner().invoke(script.main, arguments)
    assert done.exit_code == 0, done.output
    (kept,) = read_json(picture_blocks.PictureResults, out).pictures
    page = (folder / "report.html").read_bytes()
    assert kept.report_sha256 == hashlib.sha256(page).hexdigest()
    assert kept.sha256 == hashlib.sha256((tmp_path / "result-rpi4.png").read_bytes()).hexdigest()
    assert (kept.command, kept.verdict, kept.gates["latency"]) == (
        "edgeprune deploy", "PASSED", "met",
    )  # fmt: skip
    assert str(tmp_path) not in out.read_text("utf-8")
    older = kept.model_copy(update={"target": "iphone"})
    again = kept.model_copy(update={"headline": "new"})
    write_json(picture_blocks.PictureResults(command="c", pictures=(kept, older)), out)
    assert script.merged(out, [again]) == (older, again)


@pytest.mark.parametrize("target", ["rpi4", "iphone"])
def test_a_folder_of_another_run_or_of_none_is_refused(tmp_path, target):
    folder = run_folder(tmp_path, make_report(target="rpi5"))
    with pytest.raises(SpecError, match="is one for rpi5"):
        script.pictured(target, folder, tmp_path, BROWSER)
    with pytest.raises(SpecError, match=r"report\.html"):
        script.pictured(target, tmp_path, tmp_path, BROWSER)


@pytest.mark.parametrize(("target", "page"), PAGES.items())
def test_the_five_minutes_of_a_page_end_with_their_picture(target, page):
    text = (REPO / "docs" / page).read_text("utf-8")
    parts = re.split(r"^## ", text, flags=re.M)
    section = next(p for p in parts if p.startswith("Five minutes") and "<!-- figures:" in p)
    assert section.rstrip().endswith(f"<!-- /figures:result-{target} -->")
    assert f"]({picture_blocks.picture_file(target)})" in section


def test_every_picture_is_the_one_of_its_record_and_small_enough_for_a_page():
    found = read_json(picture_blocks.PictureResults, RECORD).pictures
    assert {p.target for p in found} == set(PAGES)
    for kept in found:
        path = REPO / "docs" / kept.file
        content = path.read_bytes()
        assert hashlib.sha256(content).hexdigest() == kept.sha256
        assert len(content) <= script.MAX_BYTES
        with Image.open(path) as opened:
            assert opened.width == script.WIDTH * script.SCALE
    assert not re.search(r'"/|=/|/(home|root|tmp)/', RECORD.read_text("utf-8"))

"""Pictures of results for the pages: ``python benchmarks/pictures.py``, then ``python benchmarks/readme.py``.

Each shows the head of the report page of one run (verdict, figures, gates, the four variants, accuracy by stage) as a browser draws it.
Without ``--run`` the example is deployed to each target first, which takes minutes a target. Needs Chromium: ``apt-get install chromium``.
"""

from __future__ import annotations

import hashlib
import html
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
from blocks import RESULTS
from commands import public_command
from picture_blocks import TARGETS, Picture, PictureResults, picture_file
from PIL import Image, ImageChops

from edgeprune.errors import EdgepruneError, FormatError, IntegrityError, SpecError
from edgeprune.records import catalog
from edgeprune.records.base import read_json
from edgeprune.records.files import write_bytes, write_json
from edgeprune.records.report import Report
from edgeprune.report import facts

ROOT = Path(__file__).parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# A page as wide as a README column, sharp on a dense screen; higher than any head, for what is below it is cut off.
WIDTH, HEIGHT, SCALE = 940, 2600, 1.5
MARGIN = 20  # below the last thing that is shown
COLOURS = 128
MAX_BYTES = 200_000
BROWSER_S = 120
# What a still picture has no use for: links, the explanations beside the charts, and everything after accuracy.
LEFT_OUT = "nav, .skip, #variants .figures > div, #accuracy .scroll, #accuracy ~ *, footer { display: none !important; }"


class Browser(NamedTuple):
    """A browser and its version."""

    path: str
    version: str


def parse_runs(texts: Sequence[str]) -> dict[str, Path]:
    """Run folders by target, of texts such as ``rpi4=runs/rpi4-0123``.

    Raises:
        SpecError: another form, a target twice, or a folder without a report.
        UnknownName: no such target.
    """
    found: dict[str, Path] = {}
    for text in texts:
        target, mark, folder = text.partition("=")
        if not mark or not folder:
            raise SpecError(f"--run must look like rpi4=runs/rpi4-0123, but got {text!r}")
        if target in found:
            raise SpecError(f"every target must be given once, but {target} was given twice")
        catalog.target(target)
        found[target] = Path(folder)
    return found


def head_of(page: str) -> str:
    """The page with only what the picture shows.

    Raises:
        IntegrityError: this is no page of a report, or its head shows a path of the machine.
    """
    if "</head>" not in page or 'id="accuracy"' not in page:
        raise IntegrityError("a report page has sections, but this one has no section on accuracy")
    shown = page.split("</head>", 1)[1].split('id="samples"', 1)[0]
    words = html.unescape(re.sub(r"<[^>]+>", " ", shown))
    if found := re.search(r"(?<!\S)(/[\w.-]+){2,}", words):
        raise IntegrityError(f"a picture must show no path of a machine, but has {found[0]!r}")
    return page.replace("</head>", f"<style>{LEFT_OUT}</style></head>", 1)


def trimmed(drawn: Image.Image, margin: int) -> Image.Image:
    """The picture without the empty rows at its foot, but for ``margin`` of them.

    Raises:
        IntegrityError: there is nothing on it, or it goes on below its foot.
    """
    ground = drawn.getpixel((0, drawn.height - 1))
    box = ImageChops.difference(drawn, Image.new("RGB", drawn.size, ground)).getbbox()
    if box is None or box[3] + margin > drawn.height:
        what = "is empty" if box is None else f"is cut off at {drawn.height} pixels"
        raise IntegrityError(f"a picture must show the head of the page and no less, but it {what}")
    return drawn.crop((0, 0, drawn.width, box[3] + margin))


def find_browser(name: str | None) -> Browser:
    """The browser that draws.

    Raises:
        FormatError: there is none, or it does not start.
    """
    path = next(filter(None, map(shutil.which, (name,) if name else BROWSERS)), None)
    if path is None:
        raise FormatError(
            f"a browser is needed to draw pages, but there is no {name or ' or '.join(BROWSERS)}",
            hint="run: apt-get install chromium, or name one with --browser",
        )
    told = _run_browser([path, "--version"])
    return Browser(path, told.strip().split(" built on")[0])


def _run_browser(argv: list[str]) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=BROWSER_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FormatError(f"the browser did not draw the page: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise FormatError(f"the browser ended with code {done.returncode}: {last}")
    return done.stdout


def draw(browser: Browser, page: str, out: Path) -> None:
    """Draw a page into a PNG file of few colours.

    Raises:
        FormatError: the browser failed.
        IntegrityError: as :func:`head_of` and :func:`trimmed`, or the file is too large for a page of the docs.
    """
    with tempfile.TemporaryDirectory(prefix="edgeprune-picture-") as name:
        folder = Path(name)
        source, raw = folder / "page.html", folder / "page.png"
        source.write_text(head_of(page), "utf-8")
        _run_browser(
            [
                browser.path,
                "--headless",
                "--no-sandbox",  # refused without it for root; the page is ours and runs nothing
                "--disable-gpu",
                "--hide-scrollbars",
                "--blink-settings=preferredColorScheme=1",  # light
                f"--user-data-dir={folder / 'profile'}",
                f"--force-device-scale-factor={SCALE}",
                f"--window-size={WIDTH},{HEIGHT}",
                f"--screenshot={raw}",
                source.as_uri(),
            ]
        )
        if not raw.is_file():
            raise FormatError("the browser ended well, but wrote no picture")
        with Image.open(raw) as opened:
            cut = trimmed(opened.convert("RGB"), round(MARGIN * SCALE))
        small = cut.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        made = folder / "small.png"
        small.save(made, optimize=True)
        content = made.read_bytes()
    if len(content) > MAX_BYTES:
        raise IntegrityError(
            f"a picture must have at most {MAX_BYTES} bytes, but has {len(content)}"
        )
    write_bytes(out, content)


def described(report: Report, page: bytes, drawn: bytes, browser: str) -> Picture:
    """What is kept beside a picture, so that each of its figures can be traced."""
    return Picture(
        target=report.target,
        created=report.created,
        edgeprune_version=report.edgeprune_version,
        command=public_command(report.command),
        model=Path(report.model).name,
        headline=report.headline,
        verdict=facts.verdict(report),
        epochs=float(report.settings.get("recovery epochs") or 0),
        gates={gate.name: facts.verdict_text(gate) for gate in report.gates},
        fingerprint=report.fingerprint,
        report_sha256=hashlib.sha256(page).hexdigest(),
        file=picture_file(report.target),
        sha256=hashlib.sha256(drawn).hexdigest(),
        browser=browser,
    )


def deployed(target: str, folder: Path, latency: str, epochs: float | None) -> Path:
    """Deploy the example to a target; or go on where that stopped.

    Raises:
        FormatError: the deployment ended without a report.
    """
    argv = ["-m", "edgeprune", "deploy", "--example", "fashion-mnist"]
    argv += ["--target", target, "--latency", latency, "--run", str(folder)]
    if epochs is not None:
        argv += ["--epochs", f"{epochs:g}"]
    done = subprocess.run([sys.executable, *argv], stdout=sys.stderr)
    if done.returncode not in (0, 6):  # 6: a gate was missed, which the report says
        raise FormatError(f"the deployment to {target} ended with code {done.returncode}")
    return folder


def merged(out: Path, pictures: Sequence[Picture]) -> tuple[Picture, ...]:
    """The new pictures beside the older ones of other targets."""
    old = read_json(PictureResults, out).pictures if out.is_file() else ()
    found = {p.target: p for p in (*old, *pictures)}
    return tuple(found[target] for target in sorted(found))


@click.command()
@click.option("--run", "runs", multiple=True, help="TARGET=FOLDER of a finished run; repeatable.")
@click.option(
    "--target", "targets", multiple=True, default=TARGETS, help="To deploy without --run."
)
@click.option("--latency", default="50%", show_default=True, help="Budget without --run.")
@click.option("--epochs", type=float, help="Of healing, without --run; default: the example's.")
@click.option("--browser", help="Path or name; default: Chromium or Chrome.")
@click.option("--docs", type=click.Path(path_type=Path), default=ROOT / "docs")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "pictures.json")
def main(
    runs: tuple[str, ...],
    targets: tuple[str, ...],
    latency: str,
    epochs: float | None,
    browser: str | None,
    docs: Path,
    out: Path,
) -> None:
    """Draw docs/result-TARGET.png from finished runs, or deploy the example to get them."""
    try:
        found = find_browser(browser)
        folders = parse_runs(runs)
        if not folders:
            base = Path("runs/pictures")
            folders = {t: deployed(t, base / t, latency, epochs) for t in targets}
        pictures = []
        for target, folder in folders.items():
            pictures.append(pictured(target, folder, docs, found))
            click.echo(f"drew {pictures[-1].file}: {pictures[-1].headline}")
        command = public_command(shlex.join(["python", "benchmarks/pictures.py", *sys.argv[1:]]))
        write_json(PictureResults(command=command, pictures=merged(out, pictures)), out)
    except EdgepruneError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(f"wrote {out.name}; next: python benchmarks/readme.py")


def pictured(target: str, folder: Path, docs: Path, browser: Browser) -> Picture:
    """Draw the report of one run.

    Raises:
        SpecError: the run has no report, or one of another target.
        FormatError: the browser failed.
        IntegrityError: the report or its picture is not what it has to be.
    """
    if not (folder / "report.html").is_file():
        raise SpecError(f"a finished run has a report.html, but {folder} has none")
    report = read_json(Report, folder / "report.json")
    if report.target != target:
        raise SpecError(f"{folder} must be a run for {target}, but is one for {report.target}")
    page = (folder / "report.html").read_bytes()
    out = docs / picture_file(target)
    draw(browser, page.decode(), out)
    return described(report, page, out.read_bytes(), browser.version)


if __name__ == "__main__":
    main()

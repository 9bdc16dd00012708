"""What ``pictures.py`` writes down beside its pictures, and the lines that the pages show of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from edgeprune.records.base import Record, read_json
from edgeprune.records.measurement import Fingerprint

TARGETS = ("rpi4", "jetson-orin-nano", "android-arm64", "iphone")


class Picture(Record):
    """One picture and the report that it shows.

    ``command`` made the run; folders of that machine are left out of it. ``report_sha256`` is of the whole page, ``sha256`` of the picture.
    """

    target: str
    created: str
    edgeprune_version: str
    command: str
    model: str
    headline: str
    verdict: str
    epochs: float  # of healing
    gates: dict[str, str]
    fingerprint: Fingerprint
    report_sha256: str
    file: str
    sha256: str
    browser: str


class PictureResults(Record):
    """``pictures.json``."""

    schema_version: Literal[1] = 1
    command: str
    pictures: tuple[Picture, ...]


def picture_file(target: str) -> str:
    """Its name beside the pages."""
    return f"result-{target}.png"


def caption(picture: Picture, stamp: str) -> str:
    """The picture and one line on what it shows.

    Args:
        picture: from the results file.
        stamp: the text of its stamp, which names another architecture where there is one.
    """
    made = picture.fingerprint
    machine = f"{made.cpu_model}, {made.machine}, {made.runtime} {made.runtime_version}"
    verdicts = ", ".join(f"{name} {verdict}" for name, verdict in picture.gates.items())
    return (
        f"![The report of {picture.target}: {picture.headline}]({picture.file})\n\n"
        f"*The head of `report.html` after `{picture.command}` on the example, healed for {picture.epochs:g} epochs:"
        f" {picture.verdict.lower()}; {verdicts}."
        f" Made on {picture.created[:10]} on `{made.device}` ({machine}): **{stamp}**.*"
    )


def picture_blocks(
    results: Path, stamp_text: Callable[[Fingerprint], str]
) -> dict[str, str | None]:
    """The blocks ``result-TARGET``; ``None`` while there is no such picture. Raises ``IntegrityError``: the results file is damaged."""
    path = results / "pictures.json"
    read = read_json(PictureResults, path).pictures if path.is_file() else ()
    found = {f"result-{p.target}": caption(p, stamp_text(p.fingerprint)) for p in read}
    return {f"result-{target}": None for target in TARGETS} | found

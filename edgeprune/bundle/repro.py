"""``repro/``: what is needed to make a bundle again, without anything that tells about the machine it was made on."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Literal

import yaml

from edgeprune.errors import SpecError
from edgeprune.records.base import Record
from edgeprune.records.files import to_json

CONFIG, RECORD = "repro/edgeprune.yaml", "repro/repro.json"
_ABSOLUTE = re.compile(
    r"(?<![\w./~])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\":,;=()\[\]]*[/\\])?([^\s'\":,;=()\[\]/\\]*)"
)


class Repro(Record):
    """``repro/repro.json``. ``target`` is the resolved target file; ``git_commit`` that of the folder of ``edgeprune.yaml``, if any."""

    schema_version: Literal[1] = 1
    command: str
    seed: int
    data_digest: str
    model_digest: str
    plan_digest: str
    versions: dict[str, str]
    target: dict[str, Any]
    git_commit: str | None = None
    git_changed: bool | None = None


def repro_files(workload: Record, repro: Repro) -> dict[str, bytes]:
    """The files of ``repro/`` by path. Absolute paths keep only their last part."""
    config = scrubbed(workload.model_dump(mode="json", exclude_none=True))
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    clean = repro.model_copy(
        update={"command": scrub(repro.command), "target": scrubbed(repro.target)}
    )
    return {CONFIG: text.encode(), RECORD: to_json(clean)}


def scrub(text: str) -> str:
    """A text in which every absolute path is its last part alone."""
    return _ABSOLUTE.sub(lambda found: found[1] or ".", text)


def scrubbed(value: Any) -> Any:
    """Plain data, each text of it as :func:`scrub` leaves it."""
    if isinstance(value, str):
        return scrub(value)
    if isinstance(value, dict):
        return {key: scrubbed(item) for key, item in value.items()}
    return [scrubbed(item) for item in value] if isinstance(value, list) else value


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """The commit that a folder is at and whether tracked files differ from it; ``None`` where that cannot be told."""
    git = shutil.which("git")
    if git is None:
        return None, None
    try:
        commit = _git(git, folder, "rev-parse", "--verify", "HEAD").strip()
        changed = bool(_git(git, folder, "status", "--porcelain", "--untracked-files=no").strip())
    except (SpecError, OSError, subprocess.TimeoutExpired):
        return None, None
    return (commit, changed) if re.fullmatch(r"[0-9a-f]{40,64}", commit) else (None, None)


def _git(git: str, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [git, "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env={"PATH": "/usr/bin:/bin", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
    )
    if done.returncode:
        raise SpecError("not a git folder")
    return done.stdout

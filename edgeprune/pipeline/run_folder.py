"""The run folder: every stage's result under a digest of its inputs, so that a run can stop anywhere and go on.

::

    runs/rpi4-3f2a.../
      run.json                    the resolved request
      stages/<name>-<digest>/     files of one stage; stage.json is written last and makes it valid
      bundle/  bundle.zip  report.html  report.json

A stage that finds ``stage.json`` with its digest and the right hashes is not run again. Whatever else lies in its folder (a training
checkpoint, say) is left for the stage itself to use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import ValidationError

from edgeprune.errors import IntegrityError, SpecError
from edgeprune.progress import Progress
from edgeprune.records.base import Record, read_json
from edgeprune.records.files import (
    digest_of,
    sha256_bytes,
    sha256_file,
    to_json,
    to_json_text,
    write_json,
)
from edgeprune.records.report import StageCost

R = TypeVar("R", bound=Record)
Kind = Literal["training", "conversion", "measuring", "other"]


class StageRecord(Record):
    """``stage.json``: what a stage made, and from what. ``seal`` is :func:`sealed` of all the rest: a changed figure is still good JSON."""

    schema_version: Literal[1] = 1
    name: str
    digest: str
    kind: Kind
    seconds: float
    files: dict[str, str]
    result: dict[str, Any]
    seal: str = ""


def sealed(record: StageRecord) -> str:
    """SHA-256 of a record without its seal."""
    return sha256_bytes(to_json(record.model_copy(update={"seal": ""})))


class Stage(Generic[R]):
    """A finished stage: its record and the folder with its files."""

    def __init__(self, folder: Path, digest: str, result: R) -> None:
        self.folder, self.digest, self.result = folder, digest, result

    def path(self, name: str) -> Path:
        """A file of the stage."""
        return self.folder / name


class RunFolder:
    """One run on disk; use as a context manager, so that two processes never write one run.

    Args:
        path: the folder; made when missing.
        progress: told which stage runs.

    Raises:
        SpecError: the folder holds other files and no run, cannot be written, or another process is using it.
    """

    def __init__(self, path: Path, progress: Progress) -> None:
        self.path = path
        self.costs: list[StageCost] = []
        self.notes: list[str] = []
        self._counted: set[Path] = set()  # stages whose cost is in ``costs``
        self._progress = progress
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            self._refuse_other_files()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SpecError(
                f"cannot use the run folder {self.path}: {error.strerror}",
                hint="choose another with --run",
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise SpecError(f"another edgeprune is using the run folder {self.path}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_other_files(self) -> None:
        """Fail where the folder holds files and none of them is a run's: a run writes names that other work may use."""
        if not self.path.is_dir():
            return
        names = sorted(entry.name for entry in self.path.iterdir())
        if names and not {".lock", "run.json", "stages"} & set(names):
            raise SpecError(
                f"the folder {self.path} is no run and has other files in it, such as {names[0]!r}",
                hint="name an empty folder with --run, or a new one",
            )

    @property
    def has_stages(self) -> bool:
        """Whether a stage was finished here, now or earlier."""
        return any(self.path.glob("stages/*/stage.json"))

    @contextlib.contextmanager
    def timed(self, name: str, kind: Kind) -> Iterator[None]:
        """Count the time of work that is not cached."""
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
        self.costs.append(StageCost(name=name, seconds=seconds, kind=kind))

    def stage(
        self,
        name: str,
        kind: Kind,
        inputs: Mapping[str, Any],
        cls: type[R],
        work: Callable[[Path], R],
        *,
        final: Callable[[R], bool] = lambda _: True,
        title: str = "",
    ) -> Stage[R]:
        """Run a stage, or take its earlier result. A stage that is asked for again costs nothing more.

        Args:
            name: of the stage.
            kind: what its time goes into.
            inputs: plain data or records; everything the result depends on.
            cls: the record it makes.
            work: does it; writes its files into the folder it is given.
            final: whether a result may be kept; one that was interrupted is used now and worked on again next time.
            title: what its cost is called, where its name does not tell it from others.
        """
        digest = digest_of({"stage": name, **inputs})
        folder = self.path / "stages" / f"{name}-{digest}"
        known = self._load(folder, digest, cls)
        if known is not None:
            record, result = known
            self._count(folder, title or name, record.seconds, record.kind, cached=True)
            self._progress.say(f"  {name}: done earlier, kept")
            return Stage(folder, digest, result)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        result = work(folder)
        seconds = time.monotonic() - started
        files = {
            str(p.relative_to(folder)): sha256_file(p)
            for p in sorted(folder.rglob("*"))
            if p.is_file() and not p.name.startswith((".", "stage.json"))
        }
        record = StageRecord(
            name=name,
            digest=digest,
            kind=kind,
            seconds=seconds,
            files=files,
            result=result.model_dump(mode="json"),
        )
        if final(result):
            record = record.model_copy(update={"seal": sealed(record)})
            write_json(record, folder / "stage.json")
        self._count(folder, title or name, seconds, kind)
        return Stage(folder, digest, result)

    def _count(
        self, folder: Path, name: str, seconds: float, kind: Kind, *, cached: bool = False
    ) -> None:
        if folder in self._counted:
            return
        self._counted.add(folder)
        self.costs.append(StageCost(name=name, seconds=seconds, kind=kind, cached=cached))

    def _load(self, folder: Path, digest: str, cls: type[R]) -> tuple[StageRecord, R] | None:
        if not (folder / "stage.json").exists():
            return None
        try:
            record = read_json(StageRecord, folder / "stage.json")
            if record.digest != digest:
                raise IntegrityError(f"{folder} is of another stage")
            if record.seal != sealed(record):
                raise IntegrityError(f"{folder / 'stage.json'} is not what the stage wrote")
            for name, wanted in record.files.items():
                path = folder / name
                if not path.is_file() or sha256_file(path) != wanted:
                    raise IntegrityError(f"{path} is not what the stage wrote")
            result = _result(cls, record, folder)
        except IntegrityError as error:
            self.notes.append(f"an earlier result was damaged and made again: {error}")
            self._progress.say(f"  {self.notes[-1]}")
            return None
        return record, result


def _result(cls: type[R], record: StageRecord, folder: Path) -> R:
    try:
        return cls.model_validate_json(to_json_text(record.result))
    except ValidationError as error:
        raise IntegrityError(f"{folder / 'stage.json'} holds no valid {cls.__name__}") from error

"""``edgeprune verify``: a ladder of checks, cheapest and safest first, so that nothing parses a model whose digest is wrong.

====  ==========  =========================================================================
0     structure   safe names, no links, capped sizes, a manifest that follows its schema
1     hashes      every file is listed and is what its digest says
2     signature   who made it (bundles are not signed yet: always ``not-run``)
3     model       tensors as in the manifest, an INT8 file really stores INT8 weights
4     golden      the golden samples on this machine's runtime, in a child process
5     golden      the golden samples on each board that was asked for
====  ==========  =========================================================================
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from edgeprune.bundle.golden import judge, read_golden
from edgeprune.bundle.integrity import (
    check_hashes,
    check_small_files,
    check_structure,
    open_folder,
    read_model,
)
from edgeprune.bundle.manifest import Manifest
from edgeprune.bundle.running import (
    LOCAL,
    LOCAL_NAME,
    RuntimeMissing,
    load_model,
    run_model,
)
from edgeprune.bundle.weights import eight_bit_ratio, weight_elements
from edgeprune.devices.agent.coreml import UNITS
from edgeprune.devices.board import Board, open_board
from edgeprune.devices.measure import ModelFile, measure
from edgeprune.devices.plans import SEARCH
from edgeprune.errors import (
    DeviceError,
    EdgepruneError,
    HostKeyMismatch,
    IntegrityError,
    Unreachable,
)
from edgeprune.records import Record, sha256_bytes
from edgeprune.specs import Device

MIN_EIGHT_BIT_RATIO = 0.9
_BLOCKING = (0, 1, 3)


class Level(Record):
    """One rung: what was checked and what came of it. ``not-run`` is never a pass."""

    level: int
    name: str
    status: Literal["passed", "failed", "not-run"]
    detail: str


class VerifyReport(Record):
    """All rungs. ``ok``: none failed, and every board that was asked for passed."""

    schema_version: Literal[1] = 1
    bundle: str
    levels: tuple[Level, ...]
    ok: bool


class _NotRun(Exception):
    """A level that could not be run here, with the reason."""


def verify(path: Path, *, devices: Sequence[tuple[str, Device]] = ()) -> VerifyReport:
    """Check a bundle, level by level; a failure is reported, not raised (see :func:`require_ok`).

    Args:
        path: the folder of a bundle, or its ``.zip``.
        devices: boards to run the golden samples on, each with its name.
    """
    levels: list[Level] = []
    with contextlib.ExitStack() as stack:
        subject = _Subject(path, stack)
        checks: list[tuple[int, str, Callable[[], str]]] = [
            (0, "structure", subject.structure),
            (1, "hashes", subject.hashes),
            (2, "signature", subject.signature),
            (3, "model", subject.model),
            (4, "golden on this machine", subject.golden_here),
        ]
        for name, device in devices:
            checks.append((5, f"golden on {name}", _device_check(subject, name, device)))
        for number, name, check in checks:
            levels.append(_run(number, name, check, levels))
    ok = all(
        level.status != "failed" and (level.level < 5 or level.status == "passed")
        for level in levels
    )
    return VerifyReport(bundle=str(path), levels=tuple(levels), ok=ok)


def require_ok(report: VerifyReport) -> None:
    """Nothing, when the bundle passed.

    Raises:
        IntegrityError: a level failed; names the first and why.
        DeviceError: a board that was asked for could not be used.
    """
    for level in report.levels:
        if level.status == "failed":
            raise IntegrityError(
                f"{report.bundle} failed level {level.level} ({level.name}): {level.detail}"
            )
    for level in report.levels:
        if level.level == 5 and level.status == "not-run":
            raise DeviceError(f"{report.bundle} was not checked: {level.name}: {level.detail}")


def _run(number: int, name: str, check: Callable[[], str], before: Sequence[Level]) -> Level:
    blocker = next((x for x in before if x.status == "failed" and x.level in _BLOCKING), None)
    if blocker is not None:
        return Level(
            level=number,
            name=name,
            status="not-run",
            detail=f"level {blocker.level} ({blocker.name}) failed",
        )
    try:
        return Level(level=number, name=name, status="passed", detail=check())
    except _NotRun as reason:
        return Level(level=number, name=name, status="not-run", detail=str(reason))
    except EdgepruneError as error:
        return Level(level=number, name=name, status="failed", detail=str(error))


def _device_check(subject: _Subject, name: str, device: Device) -> Callable[[], str]:
    def check() -> str:
        return subject.golden_on(name, device)

    return check


class _Subject:
    """The bundle under test: what one level finds out is kept for the next."""

    def __init__(self, path: Path, stack: contextlib.ExitStack) -> None:
        self._path, self._stack = path, stack
        self._folder = path
        self._manifest: Manifest | None = None
        self._here: Board | None = None

    @property
    def _checked(self) -> Manifest:
        assert self._manifest is not None, "level 0 comes first"
        return self._manifest

    def structure(self) -> str:
        self._folder = self._stack.enter_context(open_folder(self._path))
        self._manifest = check_structure(self._folder)
        found = self._manifest
        gates = f", gates missed: {', '.join(found.failed_gates)}" if found.failed_gates else ""
        gates += f", not run by its maker: {', '.join(found.not_run)}" if found.not_run else ""
        return f"{found.name} for {found.target}, {found.status}{gates}"

    def hashes(self) -> str:
        return f"{check_hashes(self._folder, self._checked)} files are what their digests say"

    def signature(self) -> str:
        raise _NotRun("unsigned: the digests show that the bundle is whole, not who made it")

    def model(self) -> str:
        manifest = self._checked
        check_small_files(self._folder, manifest)
        read_golden(self._folder, manifest)
        content = read_model(self._folder, manifest)
        stored = _check_weights(manifest, content)
        board = self._stack.enter_context(open_board(LOCAL_NAME, LOCAL, exclusive=False))
        try:
            load_model(board, manifest, content)
        except RuntimeMissing as reason:
            raise _NotRun(f"{stored}; tensors not compared: {reason}") from reason
        self._here = board
        return f"{stored}; tensors as in the manifest"

    def golden_here(self) -> str:
        if self._here is None:
            raise _NotRun(f"{self._checked.runtime.name} does not run on this machine")
        detail = self._judge(self._here, "model")
        if self._checked.model.format != "tflite":
            return detail
        # ARM64 runs some INT8 graphs on the built-in kernels, which refuse files that XNNPACK takes.
        content = read_model(self._folder, self._checked)
        load_model(self._here, self._checked, content, key="built-in", delegate=False)
        raw, _ = read_golden(self._folder, self._checked)
        run_model(self._here, self._checked, raw, key="built-in")
        return f"{detail}; the built-in kernels run it too"

    def golden_on(self, name: str, device: Device) -> str:
        content = read_model(self._folder, self._checked)
        try:
            with open_board(name, device, exclusive=False) as board:
                if self._checked.runtime.name == "coreml":
                    return self._on_each_processor(board, content)
                load_model(board, self._checked, content)
                return self._judge(board, "model")
        except (RuntimeMissing, Unreachable, HostKeyMismatch) as error:
            raise _NotRun(str(error)) from error

    def _on_each_processor(self, board: Board, content: bytes) -> str:
        """The golden samples and a time for every choice of processors that Core ML offers; the time includes the call from Python."""
        threads, found = self._checked.runtime.threads, []
        for runtime, units in UNITS.items():
            loaded = load_model(board, self._checked, content, key=units, runtime_name=runtime)
            judged = self._judge(board, units)
            board.unload([units])
            file = ModelFile(units, content, self._checked.model.precision, sha256_bytes(content))
            (timed,) = measure(
                board, [file], runtime=runtime, threads=threads, plan=SEARCH, purpose=units
            )
            compiled = (
                f", compiled in {loaded.compile_ns / 1e6:.0f} ms" if loaded.compile_ns else ""
            )
            found.append(f"{units}: {judged}, median {timed.median_ms:.3g} ms{compiled}")
        return "; ".join([*found, "times are of this Mac and not of a phone"])

    def _judge(self, board: Board, key: str) -> str:
        raw, golden = read_golden(self._folder, self._checked)
        result = judge(run_model(board, self._checked, raw, key=key), golden, self._checked)
        if not result.ok:
            raise IntegrityError(f"the answers differ: {result}")
        return str(result)


def _check_weights(manifest: Manifest, content: bytes) -> str:
    counts = weight_elements(manifest.model.format, content)
    if counts is None:
        return f"weights of {manifest.model.format} files are not read here"
    ratio = eight_bit_ratio(counts)
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
    if manifest.model.precision == "int8" and ratio < MIN_EIGHT_BIT_RATIO:
        raise IntegrityError(
            f"an int8 model must store at least {MIN_EIGHT_BIT_RATIO:.0%} of its weights in 8 bits, "
            f"but {manifest.model.path} stores {ratio:.0%} ({shown})"
        )
    return f"weights: {shown}"

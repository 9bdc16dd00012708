"""``edgeprune verify``: a ladder of checks, cheapest and safest first, so that nothing parses a model whose digest is wrong.

====  ==========  =========================================================================
0     structure   safe names, no links, capped sizes, a manifest that follows its schema
1     hashes      every file is listed and is what its digest says
2     signature   the manifest is signed by the key that the user gave
3     model       texts, operators and tensors as in the manifest; an INT8 file is INT8, a float model not; the oldest runtime loads it
4     golden      the golden samples on this machine's runtime, in a child process
5     golden      golden samples, latency and delegate on each board that was asked for
====  ==========  =========================================================================
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeprune.bundle.device_check import Check, delegate_check, golden_check, latency_check
from edgeprune.bundle.golden import judge, read_golden
from edgeprune.bundle.integrity import (
    check_hashes,
    check_small_files,
    check_structure,
    open_folder,
    read_model,
)
from edgeprune.bundle.manifest import SIGNATURE, Manifest
from edgeprune.bundle.model_check import (
    float_check,
    metadata_check,
    operators_check,
    versions_check,
)
from edgeprune.bundle.on_board import LOCAL, LOCAL_NAME, RuntimeMissing, load_model, run_model
from edgeprune.bundle.sign import check_signature, read_public_key
from edgeprune.bundle.trouble import is_trouble
from edgeprune.devices.agent.coreml import UNITS
from edgeprune.devices.board import Board, open_board
from edgeprune.devices.link.wait import WAIT_MINUTES, wait_seconds
from edgeprune.devices.plans import SEARCH, Loaded
from edgeprune.devices.timing.measure import ModelFile, measure
from edgeprune.errors import (
    BudgetError,
    Busy,
    DeviceError,
    EdgepruneError,
    HostKeyMismatch,
    IntegrityError,
    SpecError,
    Unreachable,
)
from edgeprune.formats.inside.eight_bits import weights_line
from edgeprune.records.base import Record
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_bytes
from edgeprune.records.formats import format_facts

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_BLOCKING = (0, 1, 2, 3)
FREE = "free"  # what the check is called that a board held by another client does not get beyond
_FLOAT = "float"  # what a board calls the float model


class Level(Record):
    """One rung: what was checked and what came of it. ``not-run`` is never a pass, nor is it for one of its ``checks``.

    ``trouble`` says that it was not run because this computer, or the board that was asked, could not: that says nothing of the bundle.
    """

    level: int
    name: str
    status: Literal["passed", "failed", "not-run"]
    detail: str
    checks: tuple[Check, ...] = ()
    trouble: bool = False


class VerifyReport(Record):
    """All rungs. ``ok``: none failed, none had trouble, and every board that was asked for passed."""

    schema_version: Literal[1] = 1
    bundle: str
    levels: tuple[Level, ...]
    ok: bool


class _Failed(Exception):
    """A check of a level failed; the others are kept."""

    def __init__(self, detail: str, checks: tuple[Check, ...]) -> None:
        super().__init__(detail)
        self.checks = checks


class _NotRun(Exception):
    """A level that could not be run here, with the reason and what was looked at all the same."""

    def __init__(self, reason: str, checks: tuple[Check, ...] = ()) -> None:
        super().__init__(reason)
        self.checks = checks


Finding = tuple[str, tuple[Check, ...]]


def verify(
    path: Path,
    *,
    devices: Sequence[tuple[str, Device]] = (),
    key: Path | None = None,
    require_signature: bool = False,
    wait: float = WAIT_MINUTES,
    say: Callable[[str], None] = lambda _: None,
) -> VerifyReport:
    """Check a bundle, level by level; a failure is reported, not raised (see :func:`require_ok`).

    Args:
        path: the folder of a bundle, or its ``.zip``.
        devices: boards to run the golden samples on, each with its name.
        key: the public key of the maker. With one, a bundle that it did not sign fails before its model is looked at.
        require_signature: refuse to go on without a key.
        wait: minutes for a board that another client holds; 0 does not wait.
        say: told meanwhile who holds it.

    Raises:
        SpecError: ``require_signature`` without ``key``, a key that cannot be used, or ``wait`` is no number of minutes.
    """
    wait_s = wait_seconds(wait)
    if require_signature and key is None:
        raise SpecError(
            "a signature can only be required of a key",
            hint="give the maker's public key with --key",
        )
    levels: list[Level] = []
    with contextlib.ExitStack() as stack:
        subject = _Subject(path, stack, None if key is None else read_public_key(key))
        subject.open_device = functools.partial(_open, wait_s=wait_s, say=say)
        checks: list[tuple[int, str, Callable[[], Finding]]] = [
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
        level.status != "failed"
        and not level.trouble
        and (level.level < 5 or level.status == "passed")
        for level in levels
    )
    return VerifyReport(bundle=str(path), levels=tuple(levels), ok=ok)


_NEXT_STEPS = {
    0: "give a bundle's folder or its zip, such as runs/rpi4-0123/bundle; one that was copied may lack a part",
    1: "do not use it: copy it again from where it was made",
}


def require_ok(report: VerifyReport) -> None:
    """Raise unless the bundle passed.

    Raises:
        IntegrityError: a level failed; names the first and why.
        BudgetError: only the latency on a board did.
        DeviceError: this computer, or a board that was asked for, could not be used.
        Busy: another client held it for as long as it was waited for.
    """
    for level in report.levels:
        if level.status == "failed":
            failed = {check.name for check in level.checks if check.status == "failed"}
            family = BudgetError if failed == {"latency"} else IntegrityError
            raise family(
                f"{report.bundle} failed level {level.level} ({level.name}): {level.detail}",
                hint=_NEXT_STEPS.get(level.level),
            )
    for level in report.levels:
        if level.trouble or (level.level == 5 and level.status == "not-run"):
            is_held = any(check.name == FREE for check in level.checks)
            kind = Busy if is_held else DeviceError
            raise kind(f"{report.bundle} was not checked: {level.name}: {level.detail}")


def _run(number: int, name: str, check: Callable[[], Finding], before: Sequence[Level]) -> Level:
    blocker = next(
        (x for x in before if (x.status == "failed" or x.trouble) and x.level in _BLOCKING), None
    )
    if blocker is not None:
        how = "was not run" if blocker.trouble else "failed"
        return Level(
            level=number,
            name=name,
            status="not-run",
            detail=f"level {blocker.level} ({blocker.name}) {how}",
        )
    try:
        detail, checks = check()
        return Level(level=number, name=name, status="passed", detail=detail, checks=checks)
    except _Failed as failure:
        return Level(
            level=number, name=name, status="failed", detail=str(failure), checks=failure.checks
        )
    except _NotRun as reason:
        return Level(
            level=number, name=name, status="not-run", detail=str(reason), checks=reason.checks
        )
    except (EdgepruneError, OSError, MemoryError) as error:
        detail, trouble = str(error) or type(error).__name__, is_trouble(error)
        status: Literal["failed", "not-run"] = "not-run" if trouble else "failed"
        return Level(level=number, name=name, status=status, detail=detail, trouble=trouble)


def _whole(detail: str, checks: Sequence[Check]) -> Finding:
    """What a level found, once none of its checks failed."""
    for check in checks:
        if check.status == "failed":
            said = "the answers differ" if check.name == "golden" else check.name
            raise _Failed(f"{said}: {check.detail}", tuple(checks))
    return detail, tuple(checks)


def _device_check(subject: _Subject, name: str, device: Device) -> Callable[[], Finding]:
    def check() -> Finding:
        return subject.golden_on(name, device)

    return check


class _Subject:
    """The bundle under test: what one level finds out is kept for the next."""

    def __init__(
        self, path: Path, stack: contextlib.ExitStack, key: Ed25519PublicKey | None
    ) -> None:
        self._path, self._stack, self._key = path, stack, key
        self._folder = path
        self._manifest: Manifest | None = None
        self._here: tuple[Board, Loaded] | None = None
        self.open_device: Callable[[str, Device], Board] = _open

    @property
    def _checked(self) -> Manifest:
        assert self._manifest is not None, "level 0 comes first"
        return self._manifest

    def structure(self) -> Finding:
        self._folder = self._stack.enter_context(open_folder(self._path))
        self._manifest = check_structure(self._folder)
        found = self._manifest
        gates = f", gates missed: {', '.join(found.failed_gates)}" if found.failed_gates else ""
        gates += f", not run by its maker: {', '.join(found.not_run)}" if found.not_run else ""
        doubt = "; ".join(found.latency.unreliable)
        gates += f", unreliable times: {doubt}" if doubt else ""
        return f"{found.name} for {found.target}, {found.status}{gates}", ()

    def hashes(self) -> Finding:
        return f"{check_hashes(self._folder, self._checked)} files are what their digests say", ()

    def signature(self) -> Finding:
        if self._key is not None:
            return f"signed by the key {check_signature(self._folder, self._key)}", ()
        if (self._folder / SIGNATURE).is_file():
            raise _NotRun("signed, but no key was given to check it with: see --key")
        raise _NotRun("unsigned: the digests show that the bundle is whole, not who made it")

    def model(self) -> Finding:
        manifest = self._checked
        check_small_files(self._folder, manifest)
        read_golden(self._folder, manifest)
        content = read_model(self._folder, manifest)
        stored = weights_line(manifest.model, content, manifest.float_layers)
        found = operators_check(manifest, content), versions_check(manifest, content)
        checks = [check for check in found if check is not None]
        checks.append(metadata_check(manifest, content))
        twin = manifest.of_float()
        if twin is not None:
            read_golden(self._folder, twin)
            checks.append(float_check(twin, read_model(self._folder, twin), content))
        board = self._stack.enter_context(_open(LOCAL_NAME, LOCAL))
        try:
            loaded = load_model(board, manifest, content)
            if twin is not None:
                load_model(board, twin, read_model(self._folder, twin), key=_FLOAT)
        except RuntimeMissing as reason:
            why = f"tensors not compared: {reason}"
            checks.append(Check(name="tensors", status="not-run", detail=str(reason)))
            raise _NotRun(f"{stored}; {why}", tuple(checks)) from reason
        checks.append(Check(name="tensors", status="passed", detail="names, shapes and types"))
        self._here = board, loaded
        return f"{stored}; tensors as in the manifest", tuple(checks)

    def golden_here(self) -> Finding:
        manifest = self._checked
        if self._here is None:
            raise _NotRun(f"{manifest.runtime.name} does not run on this machine")
        board, loaded = self._here
        golden = golden_check(board, self._folder, manifest)
        checks = [golden, *self._float_golden(board)]
        checks.append(delegate_check(board, manifest, loaded, must=False))
        detail = golden.detail
        if format_facts(manifest.model.format).built_in_may_refuse and golden.status == "passed":
            content = read_model(self._folder, manifest)
            load_model(board, manifest, content, key="built-in", delegate=False)
            raw, _ = read_golden(self._folder, manifest)
            run_model(board, manifest, raw, key="built-in")
            detail = f"{detail}; the built-in kernels run it too"
        board.close()  # the next level may need the machine alone
        return _whole(detail, checks)

    def golden_on(self, name: str, device: Device) -> Finding:
        manifest = self._checked
        content = read_model(self._folder, manifest)
        try:
            with self.open_device(name, device) as board:
                if format_facts(manifest.model.format).compute_units:
                    return self._on_each_processor(board, content), ()
                loaded = load_model(board, manifest, content)
                golden = golden_check(board, self._folder, manifest)
                must = board.is_strict
                checks = [golden, delegate_check(board, manifest, loaded, must=must)]
                checks.append(latency_check(board, manifest))
                twin = manifest.of_float()
                if twin is not None:
                    load_model(board, twin, read_model(self._folder, twin), key=_FLOAT)
                checks += self._float_golden(board)
        except Busy as error:
            held = Check(name=FREE, status="not-run", detail=str(error))
            raise _NotRun(str(error), (held,)) from error
        except (RuntimeMissing, Unreachable, HostKeyMismatch) as error:
            raise _NotRun(str(error)) from error
        return _whole(golden.detail, checks)

    def _float_golden(self, board: Board) -> list[Check]:
        """The golden answers of the float model, where there is one; it is loaded on the board."""
        twin = self._checked.of_float()
        if twin is None:
            return []
        name = "golden of the float model"
        return [golden_check(board, self._folder, twin, key=_FLOAT, name=name)]

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


def _open(
    name: str, device: Device, *, wait_s: float = 0.0, say: Callable[[str], None] = lambda _: None
) -> Board:
    """A board, alone where nobody else measures on it, so that it may be timed and asked for its nodes; a stand-in also beside others."""
    try:
        return open_board(name, device, wait_s=0.0 if device.stand_in else wait_s, say=say)
    except Busy:
        if not device.stand_in:
            raise
        return open_board(name, device, exclusive=False)

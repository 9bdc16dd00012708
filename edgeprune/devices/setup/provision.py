"""Bring runtimes to a board: choose the wheels that fit it, send what it lacks, have them installed and tried there.

The board needs a Python 3.8 or newer and nothing else: no network, no pip, no compiler. What is there already is not sent again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field

from edgeprune.devices.link.frames import Refusal
from edgeprune.devices.link.replies import Text, checked
from edgeprune.devices.setup.runtime_pins import RUNTIME_PACKAGES, Candidate, RuntimePins, load_pins
from edgeprune.devices.setup.wheels import cache_folder, fetch
from edgeprune.errors import DeviceError
from edgeprune.progress import Progress
from edgeprune.records import catalog
from edgeprune.records.base import Record
from edgeprune.records.device import Device

# Ten times what an emulated board took, and half a minute.
INSTALL_S = 1500.0
LIST_S = 30.0
_HINTS = {
    "workdir": "set workdir of this device in devices.yaml to a folder that can be written and run from",
    "space": "free some on the board: edgeprune devices clean",
}

Seconds = Annotated[float, Field(ge=0, lt=86400)]


class ProvisionedBoard(Protocol):
    """What is needed of a board; see :class:`~edgeprune.devices.board.Board`."""

    name: str
    device: Device

    def hello(self) -> dict[str, Any]:
        """Facts about the machine."""
        ...

    def request(
        self, op: str, fields: dict[str, Any], blob: bytes = b"", *, work_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """The reply to one request."""
        ...

    def push(self, content: bytes) -> int:
        """Put a file into the board's cache; gives the bytes that had to be sent."""
        ...


class Environment(Record):
    """An environment that counts on the board: the answer to ``env_list`` has some, that to ``env_install`` is one."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9.+!_-]{1,90}$")]
    runtime: Text
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,60}$")]
    wheels: Annotated[
        tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...], Field(max_length=50)
    ]
    python: Text
    serial: Annotated[int, Field(ge=1, lt=2**53)]
    after: Annotated[tuple[Text, ...], Field(max_length=50)] = ()


class Environments(Record):
    """The answer to ``env_list``; the preferred environment of a runtime comes first."""

    environments: Annotated[tuple[Environment, ...], Field(max_length=1000)]


class Installed(Environment):
    """The answer to ``env_install``."""

    seconds: dict[str, Seconds]
    is_new: bool


class RuntimeSetup(Record):
    """What became of one runtime. ``reason`` says why it was refused, or why an older version than the first choice is there."""

    runtime: str
    version: str | None
    status: Literal["already-there", "installed", "refused"]
    reason: str | None = None


class SetupReport(Record):
    """What a setup did. ``seconds``: ``fetch`` on this computer; ``push`` on the link; ``venv``, ``pip`` and ``probe`` on the board."""

    device: str
    runtimes: tuple[RuntimeSetup, ...]
    bytes_sent: Annotated[int, Field(ge=0)]
    seconds: dict[str, Seconds]


def runtimes_of(device: Device) -> tuple[str, ...]:
    """The runtimes that the targets of a device need and that edgeprune can install, each once.

    Raises:
        UnknownName: no file defines a target that the device lists.
    """
    names = [catalog.target(name).runtime.name for name in device.targets]
    return tuple(dict.fromkeys(name for name in names if name in RUNTIME_PACKAGES))


def setup(
    board: ProvisionedBoard,
    runtimes: Sequence[str],
    *,
    progress: Progress,
    wheels: Path | None = None,
    pins: RuntimePins | None = None,
    cache: Path | None = None,
) -> SetupReport:
    """Make the board able to run these runtimes.

    Args:
        board: an open one, whose lease we hold.
        runtimes: names of runtimes; none means :func:`runtimes_of` its device.
        progress: says what is being done.
        wheels: a folder that is searched for wheels first; needed where this computer has no network.
        pins: other pins than those that ship.
        cache: another folder for wheels than :func:`~edgeprune.devices.setup.wheels.cache_folder`.

    Raises:
        DeviceError: nothing at all could be set up, the folder on the board cannot be used, its disk is full, or a wheel is not to be had.
        IntegrityError: a wheel is not the pinned one.
    """
    names = tuple(dict.fromkeys(runtimes)) or runtimes_of(board.device)
    if not names:
        raise DeviceError(
            f"no target of device {board.name!r} needs a runtime that edgeprune installs",
            hint=f"name one with --runtime: {', '.join(RUNTIME_PACKAGES)}",
        )
    job = _BoardSetup(board, progress, wheels, pins or load_pins(), cache or cache_folder())
    problems: list[DeviceError] = []
    done = []
    for name in names:
        try:
            done.append(job.one(name))
        except _Unusable as error:
            problems.append(error)
            refused = RuntimeSetup(
                runtime=name, version=None, status="refused", reason=error.message
            )
            done.append(refused)
    if len(problems) == len(names):
        raise DeviceError(problems[0].message, hint=problems[0].hint) from problems[0]
    seconds = {step: round(value, 3) for step, value in job.seconds.items()}
    return SetupReport(
        device=board.name, runtimes=tuple(done), bytes_sent=job.bytes_sent, seconds=seconds
    )


class _Unusable(DeviceError):
    """This runtime cannot be had on this board; others may."""


class _BoardSetup:
    """One call of :func:`setup`."""

    def __init__(
        self,
        board: ProvisionedBoard,
        progress: Progress,
        folder: Path | None,
        pins: RuntimePins,
        cache: Path,
    ) -> None:
        self._board, self._progress, self._folder = board, progress, folder
        self._pins, self._cache = pins, cache
        self._facts = board.hello()
        self.bytes_sent = 0
        self.seconds: dict[str, float] = {}

    def one(self, runtime: str) -> RuntimeSetup:
        """Set up one runtime with the first candidate that its import survives."""
        candidates = self._candidates(runtime)
        found = [env for env in self._listed() if env.runtime == runtime]
        dead: dict[str, str] = {}  # environments whose import died, and how
        for candidate in candidates:
            # A version that killed the import once is not tried again; its successor remembers.
            later = [env for env in found if candidate.env_name in env.after]
            if later and any(env.name == c.env_name for env in later for c in candidates):
                dead[candidate.env_name] = f"{runtime} {candidate.version} died here earlier"
                continue
            there = any(env.name == candidate.env_name for env in found)
            if found and found[0].name == candidate.env_name:
                return self._result(runtime, found[0], "already-there", dead)
            try:
                env = self._install(candidate, list(dead), send=not there)
            except Refusal as error:
                if error.kind != "runtime-signal":
                    raise self._translated(error) from error
                self._progress.say(f"{runtime} {candidate.version}: {error.message}")
                dead[candidate.env_name] = error.message
            else:
                return self._result(
                    runtime, env, "installed" if env.is_new else "already-there", dead
                )
        raise _Unusable(
            f"no pinned version of {runtime} can be imported on device {self._board.name!r}: "
            + "; ".join(dead.values())
        )

    def _candidates(self, runtime: str) -> tuple[Candidate, ...]:
        facts = self._facts
        try:
            return self._pins.candidates(
                runtime,
                python=str(facts["python"]),
                machine=str(facts["machine"]),
                bits=int(facts["bits"]),
                glibc=facts["glibc"],
            )
        except DeviceError as error:
            raise _Unusable(error.message, hint=error.hint) from error

    def _listed(self) -> tuple[Environment, ...]:
        reply, _ = self._board.request("env_list", {}, work_s=LIST_S)
        return checked(Environments, reply, self._board.name).environments

    def _install(self, candidate: Candidate, after: list[str], *, send: bool) -> Installed:
        if send:
            self._send(candidate)
        self._progress.say(f"installing {candidate.runtime} {candidate.version} on the board")
        fields = {
            "runtime": candidate.runtime,
            "wheels": [_described(wheel) for wheel in candidate.wheels],
            "pip": _described(candidate.pip),
            "system": candidate.system,
            "after": after,
            "min_free_bytes": self._board.device.min_free_bytes,
        }
        reply, _ = self._board.request("env_install", fields, work_s=INSTALL_S)
        env = checked(Installed, reply, self._board.name)
        if env.name != candidate.env_name:
            raise DeviceError(f"device {self._board.name!r} installed something else: {env.name}")
        for step, seconds in env.seconds.items():
            self._count(step, seconds)
        return env

    def _send(self, candidate: Candidate) -> None:
        start = time.monotonic()
        wheels = (*candidate.wheels, candidate.pip)
        paths = fetch(wheels, self._cache, self._progress, folder=self._folder)
        self._count("fetch", time.monotonic() - start)
        start = time.monotonic()
        title = f"sending {candidate.runtime} {candidate.version}"
        with self._progress.bar(title, candidate.size_bytes) as bar:
            for wheel in wheels:
                self.bytes_sent += self._board.push(paths[wheel.sha256].read_bytes())
                bar.advance(wheel.size_bytes, wheel.file)
        self._count("push", time.monotonic() - start)

    def _count(self, step: str, seconds: float) -> None:
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    def _result(
        self,
        runtime: str,
        env: Environment,
        status: Literal["already-there", "installed"],
        dead: dict[str, str],
    ) -> RuntimeSetup:
        reason = "; ".join(dead.values()) or None
        return RuntimeSetup(runtime=runtime, version=env.version, status=status, reason=reason)

    @staticmethod
    def _translated(error: Refusal) -> DeviceError:
        """What concerns this runtime alone does not stop the others; a full or unusable disk does."""
        if error.kind in ("runtime", "missing-package"):
            return _Unusable(error.message, hint=error.hint)
        return DeviceError(error.message, hint=_HINTS.get(error.kind, error.hint))


def _described(wheel: Any) -> dict[str, str]:
    return {key: getattr(wheel, key) for key in ("name", "version", "file", "sha256")}

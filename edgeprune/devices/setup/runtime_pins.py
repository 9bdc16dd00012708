"""Which wheels make a runtime run on which board: pinned by version and SHA-256 in ``runtime_pins.yaml``, best candidate first.

A *class* of boards is a Python (``cp311``) on a machine (``aarch64``, ``armv7l``, ``x86_64``). For each class and runtime the file lists
candidates; each candidate is the full set of wheels that the import needs, the runtime's own first. ``scripts/lock_runtimes.py`` writes
the file; nobody edits it.
"""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgeprune.devices.agent.runtimes import RUNTIMES
from edgeprune.errors import DeviceError
from edgeprune.records.base import Record, read_yaml
from edgeprune.records.formats import runtime_facts

PINS_PATH = Path(__file__).with_name("runtime_pins.yaml")
RUNTIME_PACKAGES = {n: package for n, (_, package) in RUNTIMES.items() if runtime_facts(n).wheels}
# PEP 425 and PEP 427: name-version(-build)?-python-abi-platform.whl; a platform may be several, joined by dots.
_WHEEL = re.compile(
    r"^(?P<name>[A-Za-z0-9_.]+)-(?P<version>[0-9][A-Za-z0-9_.!+]*)-(?P<python>[a-z0-9.]+)"
    r"-(?P<abi>[a-z0-9_.]+)-(?P<platforms>[a-z0-9_.]+)\.whl$"
)
# PEP 600: what the older names of the tags mean.
_LEGACY_GLIBC = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
_TAG = re.compile(
    r"^(?P<legacy>manylinux(1|2010|2014))_(?P<machine>\w+)$"
    r"|^manylinux_(?P<major>\d+)_(?P<minor>\d+)_(?P<machine_too>\w+)$"
)

MachineName = Literal["aarch64", "armv7l", "x86_64"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
WheelFile = Annotated[str, Field(pattern=_WHEEL.pattern, max_length=200)]


class Wheel(Record):
    """One wheel file, as it must be byte for byte."""

    file: WheelFile
    sha256: Sha256
    size_bytes: Annotated[int, Field(gt=0, lt=2**28)]

    def _part(self, name: str) -> str:
        match = _WHEEL.match(self.file)
        assert match is not None  # the field has this pattern
        return match[name]

    @property
    def name(self) -> str:
        """The distribution, in its normal form: ``ai-edge-litert``."""
        return re.sub(r"[-_.]+", "-", self._part("name")).lower()

    @property
    def version(self) -> str:
        """Its version."""
        return self._part("version")

    @property
    def python(self) -> str:
        """The Python tag: ``cp311``, ``py3``."""
        return self._part("python")

    @property
    def platforms(self) -> tuple[str, ...]:
        """The platform tags, any of which a board must match: ``manylinux_2_27_aarch64``, ``any``."""
        return tuple(self._part("platforms").split("."))

    @property
    def min_glibc(self) -> tuple[int, int]:
        """The oldest glibc that it runs with; ``(0, 0)`` for a wheel of pure Python."""
        return min((_glibc_of(tag) for tag in self.platforms), default=(0, 0))


def _glibc_of(platform: str) -> tuple[int, int]:
    if platform == "any":
        return (0, 0)
    match = _TAG.match(platform)
    if match is None:
        raise ValueError(f"a wheel's platform must be any or manylinux, got {platform!r}")
    if match["legacy"]:
        return _LEGACY_GLIBC[match["legacy"]]
    return int(match["major"]), int(match["minor"])


class Candidate(Record):
    """One set of wheels that makes a runtime run. ``system`` maps modules that must be there to the Debian packages that bring them."""

    runtime: str
    wheels: Annotated[tuple[Wheel, ...], Field(min_length=1)]
    pip: Wheel
    system: dict[str, str] = {}

    @property
    def version(self) -> str:
        """Version of the runtime."""
        return self.wheels[0].version

    @property
    def env_name(self) -> str:
        """Folder of its environment on the board; the agent computes the same from the request."""
        text = "\n".join(sorted(wheel.sha256 for wheel in self.wheels))
        return f"{self.runtime}-{self.version}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    @property
    def min_glibc(self) -> tuple[int, int]:
        """The oldest glibc that every wheel runs with."""
        return max(wheel.min_glibc for wheel in self.wheels)

    @property
    def size_bytes(self) -> int:
        """What has to be sent to a board that has nothing yet, pip included."""
        return sum(wheel.size_bytes for wheel in (*self.wheels, self.pip))


class _File(Record):
    sha256: Sha256
    size_bytes: Annotated[int, Field(gt=0, lt=2**28)]


class BoardClass(Record):
    """The sets of wheels for one Python on one machine, by file name."""

    python: Annotated[str, Field(pattern=r"^cp3[0-9]{1,2}$")]
    machine: MachineName
    pip: WheelFile
    system: dict[str, str] = {}
    runtimes: dict[
        str, Annotated[tuple[Annotated[tuple[WheelFile, ...], Field(min_length=1)], ...], Field()]
    ]


class RuntimePins(Record):
    """``runtime_pins.yaml``: every wheel once, and the classes of boards that use them."""

    schema_version: Literal[1] = 1
    wheels: dict[WheelFile, _File]
    classes: tuple[BoardClass, ...]

    @model_validator(mode="after")
    def _check_names(self) -> RuntimePins:
        seen: set[tuple[str, str]] = set()
        used: set[str] = set()
        for board in self.classes:
            if (board.python, board.machine) in seen:
                raise ValueError(f"{board.python} on {board.machine} must stand in one class only")
            seen.add((board.python, board.machine))
            used |= {board.pip} | {f for s in board.runtimes.values() for c in s for f in c}
        if used != set(self.wheels):
            wrong = sorted(used ^ set(self.wheels))
            raise ValueError(f"wheels and classes must name the same files, but not {wrong}")
        digests = [file.sha256 for file in self.wheels.values()]
        if len(digests) != len(set(digests)):
            raise ValueError("two wheels must not have the same sha256")
        return self

    def _wheel(self, file: str) -> Wheel:
        return Wheel(file=file, **self.wheels[file].model_dump())

    def candidates(
        self, runtime: str, *, python: str, machine: str, bits: int, glibc: str | None
    ) -> tuple[Candidate, ...]:
        """The sets of wheels for this board, best first, and at least one.

        Args:
            runtime: ``litert``, ``tflite-runtime`` or ``onnxruntime``.
            python: the board's, as ``3.11.2``.
            machine: what ``uname -m`` says there.
            bits: of its user space: 32 or 64. A 32-bit system on a 64-bit kernel says ``aarch64`` and runs only ``armv7l`` wheels.
            glibc: the board's, as ``2.36``; ``None`` where its C library is another one.

        Raises:
            DeviceError: no wheels run there; the message says what does.
        """
        tag = "cp" + "".join(python.split(".")[:2])
        real = _user_space(machine, bits)
        if runtime not in RUNTIME_PACKAGES:
            raise DeviceError(
                f"edgeprune does not install the runtime {runtime!r}",
                hint=f"it installs {', '.join(RUNTIME_PACKAGES)}; others come with the board's system",
            )
        if glibc is None:
            raise self._unsupported(runtime, f"{machine} without glibc")
        for board in self.classes:
            if (board.python, board.machine) == (tag, real):
                sets = board.runtimes.get(runtime, ())
                found = tuple(self._candidate(runtime, board, files) for files in sets)
                fit = tuple(c for c in found if c.min_glibc <= _version(glibc))
                if fit:
                    return fit
                if found:
                    least = ".".join(map(str, min(c.min_glibc for c in found)))
                    raise self._unsupported(runtime, f"glibc {glibc}, as it needs {least}")
        system = real if real == machine else f"the {bits}-bit user space of {machine}"
        raise self._unsupported(runtime, f"Python {python} on {system}")

    def _candidate(self, runtime: str, board: BoardClass, files: tuple[str, ...]) -> Candidate:
        wheels = tuple(self._wheel(file) for file in files)
        pip = self._wheel(board.pip)
        return Candidate(runtime=runtime, wheels=wheels, pip=pip, system=board.system)

    def _unsupported(self, runtime: str, what: str) -> DeviceError:
        return DeviceError(
            f"no wheels of {runtime} run on this board: {what}",
            hint=f"there are some for {self.supported(runtime)}",
        )

    def supported(self, runtime: str) -> str:
        """One line for people: the machines, Pythons and C libraries that this runtime can be installed on."""
        parts = []
        for machine in ("aarch64", "armv7l", "x86_64"):
            boards = [b for b in self.classes if b.machine == machine and b.runtimes.get(runtime)]
            if boards:
                pythons = ", ".join(f"3.{b.python[3:]}" for b in boards)
                sets = [self._candidate(runtime, b, f) for b in boards for f in b.runtimes[runtime]]
                least = ".".join(map(str, min(c.min_glibc for c in sets)))
                parts.append(f"{machine} (Python {pythons}; glibc {least} or newer)")
        return "; ".join(parts) or "no board"


def _user_space(machine: str, bits: int) -> str:
    """The machine whose wheels run there. ARMv6 (Pi Zero, Pi 1) stays ``armv6l``: nothing is built for it."""
    if bits == 32 and machine in ("aarch64", "armv8l"):
        return "armv7l"
    if bits == 32 and machine == "x86_64":
        return "i686"
    return machine


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


@functools.cache
def load_pins() -> RuntimePins:
    """The pins that ship with edgeprune."""
    return read_yaml(RuntimePins, PINS_PATH)

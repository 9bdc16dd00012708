"""Write ``edgeprune/devices/setup/runtime_pins.yaml``: the wheels that ``edgeprune devices setup`` brings to boards, with their hashes.

::

    python scripts/lock_runtimes.py [--downloads FOLDER] [--output FILE]

It downloads every wheel with this Python's pip, from where pip takes its packages, and hashes what arrives: about 1.3 GB and some
minutes; ``--downloads`` keeps them, so that a second run is quick. Run it to move a pin, read the difference, commit it.

How the versions were chosen:

- A set holds only what ``import`` loads. In fresh environments on x86_64 (Python 3.10, 3.11, 3.13) the imports of ``onnxruntime``,
  ``ai_edge_litert.interpreter`` and ``tflite_runtime.interpreter`` loaded numpy and themselves; coloredlogs, flatbuffers, ml_dtypes,
  packaging, protobuf, sympy and tqdm, which their metadata demand, serve their tools and stay out.
- One numpy for all runtimes of a board, so that it is sent once: the newest 1.x where there is one, because ``tflite-runtime`` needs
  numpy < 2, and because its wheels run with glibc 2.17 and on any processor of their machine.
- onnxruntime is at most 1.27.0: 1.28 and later crashed at import under emulation, and nobody has told real boards apart yet; 1.21.0 is
  left out because it dies of an illegal instruction on a Cortex-A72 (microsoft/onnxruntime#23957, read 2026-11-22). Older ones follow
  as second and third candidates, for processors that kill the first.
- tflite-runtime 2.14.0 needs glibc 2.34; 2.13.0 follows for JetPack 5 and Debian 11, which have 2.31.
- armv7l: the index has no numpy wheels, so that comes from the board's own system.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from edgeprune.devices.setup.runtime_pins import PINS_PATH, RUNTIME_PACKAGES, RuntimePins
from edgeprune.records.base import parse

NEWEST_GLIBC_MINOR = 36  # of Debian 12: newer boards run what older ones run
MAX_CANDIDATES = 3
CLASSES = [
    *(("aarch64", minor) for minor in range(8, 15)),
    *(("armv7l", minor) for minor in (9, 11)),
    *(("x86_64", minor) for minor in range(8, 15)),
]
VERSIONS = {  # best first; what has no wheel for a class is left out there
    "litert": ("2.3.0", "2.1.0"),
    "tflite-runtime": ("2.14.0", "2.13.0"),
    "onnxruntime": ("1.27.0", "1.24.4", "1.23.2", "1.22.1", "1.19.2"),
}
NUMPY = {8: "1.24.4", 9: "1.26.4", 10: "1.26.4", 11: "1.26.4", 12: "1.26.4", 13: "2.2.6", 14: "2.3.5"}  # fmt: skip
PIP = {8: "25.0.1", 9: "26.0.1"}
NEWEST_PIP = "26.3"
NUMPY_OF_THE_SYSTEM = {"numpy": "python3-numpy"}  # module: Debian package


def download(requirement: str, machine: str, minor: int, folder: Path) -> Path | None:
    """The wheel of one requirement for one class of boards; ``None`` where the index has none."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = requirement.partition("==")
    done = list(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if done:
        return done[0]
    platforms = [f"manylinux_2_{glibc}_{machine}" for glibc in range(17, NEWEST_GLIBC_MINOR + 1)]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version=3.{minor}"),
        *(f"--platform={platform}" for platform in (*platforms, f"manylinux2014_{machine}")),
        *(f"--dest={folder}", requirement),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode and "No matching distribution found" not in ended.stderr:
        raise SystemExit(f"{requirement} for Python 3.{minor} on {machine}: {ended.stderr}")
    found = list(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    return found[0] if found else None


def sets_of(runtime: str, machine: str, minor: int, folder: Path) -> list[list[Path]]:
    """The candidates of one runtime for one class of boards."""
    found = []
    for version in VERSIONS[runtime]:
        requirement = f"{RUNTIME_PACKAGES[runtime]}=={version}"
        wheel = download(requirement, machine, minor, folder)
        if wheel is not None and len(found) < MAX_CANDIDATES:
            numpy = None
            if machine != "armv7l":
                numpy = download(f"numpy=={NUMPY[minor]}", machine, minor, folder)
            found.append([wheel, numpy] if numpy else [wheel])
    return found


def lock(downloads: Path) -> dict[str, Any]:
    """The content of the file."""
    wheels: dict[str, dict[str, Any]] = {}
    classes = []
    for machine, minor in CLASSES:
        folder = downloads / f"{machine}-3.{minor}"
        print(f"Python 3.{minor} on {machine}", file=sys.stderr)
        pip = download(f"pip=={PIP.get(minor, NEWEST_PIP)}", machine, minor, folder)
        assert pip is not None, "pip runs everywhere"
        names = ["tflite-runtime"] if machine == "armv7l" else list(VERSIONS)
        sets = {name: sets_of(name, machine, minor, folder) for name in names}
        for path in {pip, *(path for s in sets.values() for files in s for path in files)}:
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            entry = {"sha256": digest, "size_bytes": len(content)}
            if wheels.setdefault(path.name, entry) != entry:
                raise SystemExit(f"{path.name} came in two forms")
        board: dict[str, Any] = {"python": f"cp3{minor}", "machine": machine, "pip": pip.name}
        if machine == "armv7l":
            board["system"] = NUMPY_OF_THE_SYSTEM
        board["runtimes"] = {
            name: [[path.name for path in files] for files in found]
            for name, found in sets.items()
            if found
        }
        classes.append(board)
    return {"schema_version": 1, "wheels": dict(sorted(wheels.items())), "classes": classes}


class _PlainDumper(yaml.SafeDumper):
    """Without anchors and aliases, which edgeprune's own reader refuses."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def main() -> None:
    """Lock, check and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--downloads", type=Path, help="folder that keeps the wheels")
    parser.add_argument("--output", type=Path, default=PINS_PATH)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        content = lock(given.downloads or Path(temporary))
    parse(RuntimePins, content, where="what was downloaded")
    head = "# Written by scripts/lock_runtimes.py; see there for the reasons. Do not edit.\n"
    text = yaml.dump(content, Dumper=_PlainDumper, sort_keys=False, width=160)
    given.output.write_text(head + text, encoding="utf-8")


if __name__ == "__main__":
    main()

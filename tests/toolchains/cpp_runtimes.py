"""Real C++ runtimes for the samples, in a cache folder: fetched once by ``python tests/toolchains/cpp_runtimes.py``, found by the tests.

TensorFlow Lite's C library and headers come from the npm package ``tfjs-tflite-node``; onnxruntime's headers from the Debian package
``libonnxruntime-dev`` of trixie (unpacked, not installed), and its library from the Python package that the tests use anyway.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

NPM_PACKAGE, NPM_SHA256 = (
    "tfjs-tflite-node@0.0.2",
    "3be1632328a76a2475e5b6833253763c802c859433becb4d879ee1860e3b5284",
)
DEB_PACKAGE, DEB_SHA256 = (
    "libonnxruntime-dev=1.21.0+dfsg-1",
    "14f7d959d5deacbcf1504830d4189f91fc67382b399ed9ae9d3aa9c4050ced08",
)


def home() -> Path:
    """The cache folder; ``$EDGEPRUNE_CPP_DIR`` names another."""
    named = os.environ.get("EDGEPRUNE_CPP_DIR")
    return Path(named) if named else Path.home() / ".cache" / "edgeprune" / "cpp-x86_64"


def runtime(name: str) -> Path | None:
    """The folder with ``include`` and ``lib`` of ``tflite`` or ``onnxruntime``; ``None`` where it was not fetched."""
    folder = home() / name
    if not (folder / "include").is_dir():
        return None
    if name == "onnxruntime":
        _link_library(folder)
    return folder if (folder / "lib").is_dir() else None


def _link_library(folder: Path) -> None:
    import onnxruntime

    (found,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    shutil.rmtree(folder / "lib", ignore_errors=True)
    (folder / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "lib" / name).symlink_to(found)


def checked(file: Path, sha256: str) -> Path:
    """A file that was fetched, when its digest is the pinned one; the end of the program otherwise."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{file.name} must have the digest {sha256}, but has {found}")
    return file


def fetch_tflite(scratch: Path) -> None:
    """The C library of TensorFlow Lite 2.9."""
    subprocess.run(["npm", "pack", "--silent", NPM_PACKAGE], cwd=scratch, check=True, timeout=300)
    (file,) = scratch.glob("*.tgz")
    with tarfile.open(checked(file, NPM_SHA256)) as archive:
        wanted = ("package/cc_deps/include/", "package/cc_deps/linux_amd64/libtensorflowlite_c.so")
        for member in archive.getmembers():
            if member.isfile() and member.name.startswith(wanted):
                stream = archive.extractfile(member)
                assert stream is not None
                place = re.sub("^package/cc_deps/linux_amd64", "lib", member.name)
                path = scratch / "tflite" / place.replace("package/cc_deps/", "")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stream.read())
    shutil.move(scratch / "tflite", home() / "tflite")


def fetch_onnxruntime(scratch: Path) -> None:
    """The headers of onnxruntime 1.21, from the next Debian release than bookworm; nothing is installed."""
    unpacked = unpack_deb(DEB_PACKAGE, DEB_SHA256, ("trixie",), scratch)
    (scratch / "onnxruntime").mkdir()
    shutil.move(unpacked / "usr" / "include", scratch / "onnxruntime" / "include")
    shutil.move(scratch / "onnxruntime", home() / "onnxruntime")


def unpack_deb(package: str, sha256: str, suites: Sequence[str], scratch: Path) -> Path:
    """The folder with the files of a Debian package (``name=version``) from the first of these suites that has it; nothing is installed."""
    for suite in suites:
        apt = apt_of(suite, scratch / suite)
        words = ["update", "-qq"], ["download", "-qq", package]
        runs = (subprocess.run([*apt, *w], cwd=scratch / suite, timeout=300) for w in words)
        if all(done.returncode == 0 for done in runs):
            (file,) = (scratch / suite).glob("*.deb")
            subprocess.run(["dpkg", "-x", checked(file, sha256), scratch / "deb"], check=True)
            return scratch / "deb"
    raise SystemExit(f"{package} is not in {', '.join(suites)}")


def apt_of(suite: str, folder: Path) -> list[str]:
    """An apt-get with lists of its own, of one suite."""
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    (folder / "suite.list").write_text(f"deb {_debian_mirror()} {suite} main\n")
    options = [
        f"Dir::Etc::sourcelist={folder}/suite.list", "Dir::Etc::sourceparts=/dev/null",
        f"Dir::State::lists={folder}/lists", f"Dir::Cache={folder}/cache",
        "APT::Sandbox::User=root",
    ]  # fmt: skip
    return ["apt-get", *(part for option in options for part in ("-o", option))]


def _debian_mirror() -> str:
    """Where this machine gets Debian from."""
    places = [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]
    text = "\n".join(place.read_text() for place in places if place.is_file())
    found = re.search(r"https?://\S+/debian/?(?=\s)", text)
    if found is None:
        raise SystemExit(
            "no Debian mirror in /etc/apt: packages of other releases cannot be fetched"
        )
    return found[0]


def main() -> None:
    """Fetch what is not there yet; what cannot be had is named, and the tests that need it skip."""
    home().mkdir(parents=True, exist_ok=True)
    for name, tool, fetch in (
        ("tflite", "npm", fetch_tflite),
        ("onnxruntime", "dpkg", fetch_onnxruntime),
    ):
        if (home() / name).is_dir():
            print(f"{name}: there")
        elif shutil.which(tool) is None:
            print(f"{name}: not fetched, {tool} is not installed", file=sys.stderr)
        else:
            with tempfile.TemporaryDirectory(dir=home()) as scratch:
                fetch(Path(scratch))
            print(f"{name}: fetched")


if __name__ == "__main__":
    main()

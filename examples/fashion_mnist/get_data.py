"""Put Fashion-MNIST where ``data.py`` looks for it: ``python examples/fashion_mnist/get_data.py``.

In this order: says where it is, when it is there; installs Debian's ``dataset-fashion-mnist`` package, where apt-get may be used; downloads
the four archives of the original release (MIT licence, https://github.com/zalandoresearch/fashion-mnist) into the cache folder. Content is
checked against fixed SHA-256 digests of the unpacked files, so it does not matter how it came or how it was packed. Needs the standard
library alone. Exit code 0: the data is there; 2: it could not be had.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
ADDRESSES = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    # The release's own server speaks http alone; the digests below make that safe.
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
)
# SHA-256 of the unpacked idx files: taken from Debian's package 0.0~git20200523.55506a9-1, read 2026-11-23.
CONTENT_SHA256 = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MAX_PACKED_BYTES = 64 * 1024 * 1024
MAX_CONTENT_BYTES = 64 * 1024 * 1024  # the largest unpacked file has 47 MB
TIMEOUT_S = 30


class Failed(Exception):
    """One way to the data did not work; the message says why."""


def cache_dir() -> Path:
    """The folder for downloads; the same as in ``data.py``, which needs numpy and so cannot be imported here."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "edgeprune" / "fashion-mnist"


def search_path() -> list[Path]:
    """Every folder that ``data.py`` looks into, in its order."""
    named = os.environ.get("FASHION_MNIST_DIR")
    return ([Path(named)] if named else []) + [DEBIAN_DIR, cache_dir()]


def content_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of what a gzip file unpacks to.

    Raises:
        Failed: not a whole gzip file, or it unpacks to more than 64 MiB.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with gzip.open(path, "rb") as stream:
            while piece := stream.read(1 << 20):
                size += len(piece)
                if size > MAX_CONTENT_BYTES:
                    raise Failed(f"{path.name} unpacks to more than {MAX_CONTENT_BYTES} bytes")
                digest.update(piece)
    except (OSError, EOFError, zlib.error) as error:
        raise Failed(f"{path.name} is not a whole gzip file: {error}") from error
    return digest.hexdigest()


def check(path: Path, expected: str) -> None:
    """Return if the file unpacks to the expected content.

    Raises:
        Failed: it does not.
    """
    found = content_sha256(path)
    if found != expected:
        raise Failed(f"{path.name} must unpack to SHA-256 {expected}, but has {found}")


def find(folders: Sequence[Path], digests: Mapping[str, str]) -> Path | None:
    """The first folder that holds all files, once each is checked; ``None`` when there is none.

    Raises:
        Failed: the first folder that holds all files has another content in one of them.
    """
    for folder in folders:
        if all((folder / name).is_file() for name in digests):
            for name, expected in digests.items():
                try:
                    check(folder / name, expected)
                except Failed as error:
                    raise Failed(
                        f"{folder} holds a file that is not the original: {error}; remove it"
                    ) from error
            return folder
    return None


def install_package() -> None:
    """Install the Debian package with apt-get, as root or through a sudo that asks for no password.

    Raises:
        Failed: there is no apt-get, no right to use it, or it failed.
    """
    if shutil.which("apt-get") is None:
        raise Failed("there is no apt-get")
    prefix: list[str] = []
    if os.geteuid() != 0:
        prefix = ["sudo", "-n"]
        if (
            shutil.which("sudo") is None
            or subprocess.run([*prefix, "true"], capture_output=True).returncode
        ):
            raise Failed("apt-get needs root, or sudo without a password")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", DEBIAN_PACKAGE]):
        command = [*prefix, "apt-get", *words]
        print(f"running: {' '.join(command)}", file=sys.stderr)
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=600, env=environment
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Failed(f"{' '.join(command)} did not finish: {error}") from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Failed(f"{' '.join(command)} ended with {done.returncode}: {last}")


def fetch(address: str, path: Path, expected: str) -> None:
    """Download one file, check its content, and only then give it its name.

    Raises:
        Failed: no answer, over 64 MiB, or another content; nothing is left behind.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    part = Path(name)
    try:
        with (
            os.fdopen(handle, "wb") as out,
            urllib.request.urlopen(address, timeout=TIMEOUT_S) as source,
        ):
            size = 0
            while piece := source.read(1 << 16):
                size += len(piece)
                if size > MAX_PACKED_BYTES:
                    raise Failed(f"{address} sends more than {MAX_PACKED_BYTES} bytes")
                out.write(piece)
        check(part, expected)
        part.chmod(0o644)
        part.replace(path)
    except (OSError, ValueError) as error:  # URLError and timeouts are OSErrors
        raise Failed(f"{address}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def download(addresses: Sequence[str], folder: Path, digests: Mapping[str, str]) -> None:
    """Put every file that is not there yet into the folder, each from the first address that has it whole.

    Raises:
        Failed: a file could be had from no address; says why for each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, expected in digests.items():
        if (folder / name).is_file() and content_sha256_or_empty(folder / name) == expected:
            continue
        problems = []
        for address in addresses:
            try:
                fetch(f"{address}/{name}", folder / name, expected)
                break
            except Failed as error:
                problems.append(str(error))
        else:
            raise Failed("; ".join(problems))


def content_sha256_or_empty(path: Path) -> str:
    """As :func:`content_sha256`, or ``""`` for a file that cannot be unpacked."""
    try:
        return content_sha256(path)
    except Failed:
        return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Find, install or download the data, and print the folder it is in. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Put Fashion-MNIST where data.py looks for it.")
    parser.add_argument("--no-install", action="store_true", help="do not use apt-get")
    parser.add_argument("--address", action="append", help="download from here (may be repeated)")
    options = parser.parse_args(arguments)
    ways = [] if options.no_install else [install_package]
    ways.append(lambda: download(options.address or ADDRESSES, cache_dir(), CONTENT_SHA256))
    problems: list[str] = []
    try:
        folder = find(search_path(), CONTENT_SHA256)
        while folder is None and ways:
            try:
                ways.pop(0)()
                folder = find(search_path(), CONTENT_SHA256)
            except Failed as error:
                problems.append(str(error))
    except Failed as error:
        problems.append(str(error))
        folder = None
    if folder is not None:
        print(folder)
        return 0
    print("Fashion-MNIST could not be had:", *problems, sep="\n  ", file=sys.stderr)
    print(
        f"put the four .gz files of https://github.com/zalandoresearch/fashion-mnist into {cache_dir()}",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""What the Swift sample is compiled and run with, in a cache folder: ``python tests/toolchains/swift_tools.py`` fetches it once.

Debian has a Swift compiler with Foundation from trixie on, which needs a newer C library than bookworm's. So the package ``swiftlang`` and
what it depends on are unpacked, not installed, as a root of their own, in which commands run by chroot. That takes root and namespaces. The
two packages of Swift are pinned by version and digest; of the others apt checks that Debian signed them.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cpp_runtimes import apt_of, checked

SUITE, VERSION = "trixie", "6.0.3-2"
DEBS = {
    "swiftlang": "be005017c07f0932564c48761f7f69d2f4e942d514e106932913ca8cf594c4a1",
    "libswiftlang": "8279334aaf16e6b62b8d124d6d5d94cb2a92666986cec491bf4ad03a0a9ae3e4",
}
HEADERS = "libc6-dev"  # Foundation's modules are made of them
# 1.8 of 2.5 GB: debuggers, servers for editors, the package manager, static and embedded libraries, GCC's own compilers, documentation.
UNUSED = (
    *(f"usr/libexec/swift/bin/{name}" for name in ("lld*", "clangd", "sourcekit-lsp", "swift-[bpt]*", "docc", "swift-format", "llvm-*")),
    *(f"usr/libexec/swift/lib/{name}" for name in ("swift_static", "liblldb*", "libsourcekitd*", "libLTO*")),
    *(f"usr/libexec/swift/lib/swift/{name}" for name in ("embedded", "host/lib_InternalSwiftScan*", "FrameworkABIBaseline")),
    *("usr/share", "usr/libexec/gcc", "usr/bin/*lto-dump*", "usr/lib/python3*", "usr/lib/x86_64-linux-gnu/libpython*"),
)  # fmt: skip
MERGED = ("bin", "sbin", "lib", "lib64")  # links into usr, which the package base-files would make
WORK = "/here"  # the caller's folder, seen from inside
FETCH_S, RUN_S = 400, 300
_MOUNTED = 'mount --bind "$1" "$2" && shift 2 && exec chroot "$@"'


def home() -> Path:
    """The cache folder; ``$EDGEPRUNE_SWIFT_DIR`` names another."""
    named = os.environ.get("EDGEPRUNE_SWIFT_DIR")
    return Path(named) if named else Path.home() / ".cache" / "edgeprune" / "swift"


def root() -> Path:
    """The folder with the compiler and all that it needs."""
    return home() / VERSION


def missing() -> str | None:
    """Why the sample cannot be compiled and run here; ``None`` where it can."""
    if not root().is_dir():
        return "no Swift compiler here: run python tests/toolchains/swift_tools.py"
    if os.geteuid() != 0:
        return "entering the root with the Swift compiler needs root"
    with tempfile.TemporaryDirectory() as folder:
        done = run(Path(folder), "swiftc", "--version")
    said = " | ".join(done.stderr.splitlines()[-2:])
    return f"the Swift compiler does not start: {said}" if done.returncode else None


def run(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the root, or a program that was compiled in it; there the folder is ``WORK``. Mounts vanish with the command."""
    clean = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", f"HOME={WORK}", f"TMPDIR={WORK}"]
    apart = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child=KILL"]  # fmt: skip
    mounted = [f"--mount-proc={root()}/proc", "sh", "-c", _MOUNTED, "sh", str(folder)]
    command = [*clean, *apart, *mounted, f"{root()}{WORK}", str(root()), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_S)


def fetch(scratch: Path) -> None:
    """The compiler with Foundation: 0.5 GB of packages, of which the useful part is unpacked."""
    # As if nothing were installed, so that all it depends on comes along.
    nothing = scratch / "status"
    nothing.touch()
    apt = [*apt_of(SUITE, scratch), "-o", f"Dir::State::status={nothing}"]
    wanted = [*(f"{name}={VERSION}" for name in DEBS), HEADERS]
    install = ["install", "-y", "--no-install-recommends", "--download-only", *wanted]
    for words in (["update"], install):
        done = subprocess.run([*apt, "-qq", *words], cwd=scratch, timeout=FETCH_S)
        if done.returncode != 0:
            raise SystemExit(f"swiftlang {VERSION} cannot be had from {SUITE}")
    debs = sorted((scratch / "cache" / "archives").glob("*.deb"))
    for file in debs:
        if (name := file.name.split("_")[0]) in DEBS:
            checked(file, DEBS[name])
    _unpack(debs, scratch / "root")
    shutil.move(scratch / "root", root())


def _unpack(debs: Sequence[Path], place: Path) -> None:
    for name in (*(f"usr/{merged}" for merged in MERGED), "proc", "tmp", "dev", WORK[1:]):
        (place / name).mkdir(parents=True)
    for name in MERGED:
        (place / name).symlink_to(f"usr/{name}")
    excluded = [f"--exclude=./{name}" for name in UNUSED]
    for file in debs:
        show = ["dpkg-deb", "--fsys-tarfile", str(file)]
        with subprocess.Popen(show, stdout=subprocess.PIPE) as packed:
            unpack = ["tar", "-x", "-C", str(place), "--keep-directory-symlink", *excluded]
            subprocess.run(unpack, stdin=packed.stdout, check=True, timeout=FETCH_S)
        if packed.returncode != 0:
            raise SystemExit(f"{file.name} cannot be unpacked")


def main() -> None:
    """Fetch it unless it is there; where it cannot be had that is said, and the tests that need it skip."""
    absent = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if root().is_dir():
        print("swift: there")
    elif platform.machine() != "x86_64":
        raise SystemExit(f"swift: not fetched, made for x86-64 and not for {platform.machine()}")
    elif absent:
        raise SystemExit(f"swift: not fetched, {absent[0]} is not installed")
    else:
        home().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home()) as scratch:
            fetch(Path(scratch))
        print("swift: fetched")


if __name__ == "__main__":
    main()

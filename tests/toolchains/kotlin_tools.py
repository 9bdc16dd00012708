"""What the Android sample is compiled and run with, in a cache folder: ``python tests/toolchains/kotlin_tools.py`` fetches it once.

The Kotlin compiler and its library come from the npm package ``kotlin-compiler``; the classes of Android's API level 23 from the Debian
package ``libandroid-23-java`` of sid, or of bullseye (the same file; bookworm has none), and its ``org.json``, which is code and not
declarations only, from bookworm's ``libandroid-json-org-java``. The packages are unpacked, not installed. Java must be there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cpp_runtimes import checked, unpack_deb

NPM_PACKAGE, NPM_SHA256 = (
    "kotlin-compiler@2.4.20",
    "c23dab400d7ce5ea8b6c909947c0ca5454189e4bb1108695b5f464500e5e950f",
)
ANDROID_DEB, ANDROID_SHA256 = (
    "libandroid-23-java=6.0.1+r72-6",
    "8af1b6df556971dda0a6da3536ea526a838e0c363afcdd454213d8bce94793e3",
)
JSON_DEB, JSON_SHA256 = (
    "libandroid-json-org-java=20121204-20090211-5",
    "f6759538445aabbf0f687389959d2993cf1314c2b72aed2b107ebe1290bd1648",
)
COMPILER = (
    "kotlin-compiler", "kotlin-stdlib", "kotlin-script-runtime", "kotlin-reflect", "kotlinx-coroutines-core-jvm", "annotations-13.0",
)  # fmt: skip
COMPILE_S = 400


def home() -> Path:
    """The cache folder; ``$EDGEPRUNE_KOTLIN_DIR`` names another."""
    named = os.environ.get("EDGEPRUNE_KOTLIN_DIR")
    return Path(named) if named else Path.home() / ".cache" / "edgeprune" / "kotlin"


def library() -> Path:
    """Kotlin's own library, for what was compiled."""
    return home() / "kotlin" / "lib" / "kotlin-stdlib.jar"


def android() -> Path:
    """Declarations of Android's API level 23, Java's own classes among them."""
    return home() / "android" / "android-23.jar"


def org_json() -> Path:
    """Android's ``org.json``, to run with."""
    return home() / "json" / "org-json.jar"


def missing() -> str | None:
    """Why the sample cannot be compiled and run here; ``None`` where it can."""
    if shutil.which("java") is None:
        return "java is not installed"
    absent = [path.name for path in (library(), android(), org_json()) if not path.is_file()]
    return (
        f"no {', '.join(absent)} here: run python tests/toolchains/kotlin_tools.py"
        if absent
        else None
    )


def compile_kotlin(
    sources: Sequence[Path], classpath: Sequence[Path], out: Path, *flags: str
) -> subprocess.CompletedProcess[str]:
    """Compile files and folders of Kotlin against these jars and Kotlin's library."""
    jars = ":".join(str(library().with_name(f"{name}.jar")) for name in COMPILER)
    command = [
        *("java", "-cp", jars, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"),
        *("-kotlin-home", str(library().parents[1]), "-no-stdlib", "-no-reflect", *flags),
        *("-classpath", ":".join(map(str, [library(), *classpath])), "-d", str(out)),
        *map(str, sources),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)


def fetch_kotlin(scratch: Path) -> None:
    """The compiler, without its plug-ins and its libraries for other platforms."""
    subprocess.run(["npm", "pack", "--silent", NPM_PACKAGE], cwd=scratch, check=True, timeout=300)
    (file,) = scratch.glob("*.tgz")
    wanted = {f"package/lib/{name}.jar": name for name in COMPILER}
    (scratch / "kotlin" / "lib").mkdir(parents=True)
    with tarfile.open(checked(file, NPM_SHA256)) as archive:
        for member in archive:
            if member.name in wanted:
                stream = archive.extractfile(member)
                assert stream is not None
                path = scratch / "kotlin" / "lib" / f"{wanted[member.name]}.jar"
                path.write_bytes(stream.read())
    shutil.move(scratch / "kotlin", home() / "kotlin")


def fetch_android(scratch: Path) -> None:
    """The declarations of Android's API level 23."""
    unpacked = unpack_deb(ANDROID_DEB, ANDROID_SHA256, ("sid", "bullseye"), scratch)
    _keep(unpacked / "usr/share/java/com.android.android-23.jar", android())


def fetch_json(scratch: Path) -> None:
    """Android's ``org.json``."""
    unpacked = unpack_deb(JSON_DEB, JSON_SHA256, ("bookworm",), scratch)
    _keep(unpacked / "usr/share/java/json-android.jar", org_json())


def _keep(found: Path, place: Path) -> None:
    place.parent.mkdir(parents=True)
    shutil.move(found, place)


def main() -> None:
    """Fetch what is not there yet; what cannot be had is named, and the tests that need it skip."""
    home().mkdir(parents=True, exist_ok=True)
    failed = False
    for name, tool, there, fetch in (
        ("kotlin", "npm", library(), fetch_kotlin),
        ("android", "dpkg", android(), fetch_android),
        ("org.json", "dpkg", org_json(), fetch_json),
    ):
        if there.is_file():
            print(f"{name}: there")
        elif shutil.which(tool) is None:
            failed = True
            print(f"{name}: not fetched, {tool} is not installed", file=sys.stderr)
        else:
            with tempfile.TemporaryDirectory(dir=home()) as scratch:
                fetch(Path(scratch))
            print(f"{name}: fetched")
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

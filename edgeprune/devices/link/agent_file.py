"""The agent as one file: a zip that Python runs, the same bytes every time, named by its content."""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

from edgeprune.records.files import sha256_bytes

AGENT_FOLDER = Path(__file__).parents[1] / "agent"
PACKAGE = "edgeprune_agent"
_START = f"""import sys
if sys.version_info < (3, 8):
    sys.exit("the board's Python must be 3.8 or newer, but is %d.%d" % sys.version_info[:2])
from {PACKAGE}.__main__ import run
run()
"""


@functools.cache
def agent_bytes() -> bytes:
    """The program for the board, as a zip file that Python can run."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        _add(archive, "__main__.py", _START)
        for path in sorted(AGENT_FOLDER.glob("*.py")):
            _add(archive, f"{PACKAGE}/{path.name}", path.read_text(encoding="utf-8"))
    return packed.getvalue()


def _add(archive: zipfile.ZipFile, name: str, text: str) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(entry, text)


def agent_digest() -> str:
    """SHA-256 of the program."""
    return sha256_bytes(agent_bytes())


def agent_name() -> str:
    """The name of its file on a board."""
    return f"agent-{agent_digest()[:16]}.pyz"

"""Paths as users write them: in flags, in ``edgeprune.yaml``, in Python."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from edgeprune.errors import SpecError, reason_of, shown

MAX_NAME_BYTES = 255  # of the file systems in use


def located(text: Path | str, base: Path | str = "", *, what: str) -> Path:
    """The path that a user meant, there or not; ``~`` is taken for a home folder.

    Args:
        text: as it was written.
        base: the folder that a relative path starts from; the current one without it.
        what: what errors call it: its flag or key.

    Raises:
        SpecError: nothing can be there: a name over the 255 bytes of a file system, a NUL, a home of nobody, a folder that may not be
            looked into.
    """
    try:
        path = Path(base) / Path(text).expanduser()
        # Where a folder before it is missing, the system never comes to a name that is too long.
        if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:
        raise SpecError(
            f"{what} names {shown(text)}, which cannot be used: {reason_of(error)}"
        ) from error
    return path


def user_folder(variable: str, default: str) -> Path:
    """The folder of edgeprune among the user's own, by the XDG base directory rules, which say to ignore a relative one.

    Where nobody says where the home is, as in a container with a number for a user, it is the root folder, as containers have it.

    Args:
        variable: such as ``XDG_STATE_HOME``.
        default: of it, below the home folder.
    """
    root = os.environ.get(variable, "")
    if Path(root).is_absolute():
        return Path(root) / "edgeprune"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/")
    return home / default / "edgeprune"

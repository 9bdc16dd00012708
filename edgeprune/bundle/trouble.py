"""Whose fault is it? A full disk, a folder that cannot be written or a board that is gone says nothing of the bundle under test."""

from __future__ import annotations

import errno
import re

from edgeprune.devices.link.frames import Refusal
from edgeprune.errors import DeviceError, NoSpace

# What an operating system says of itself, and of no file's content.
_OF_THE_SYSTEM = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM,
    errno.EAGAIN, errno.ENODEV, errno.ESTALE, errno.EFBIG,
})  # fmt: skip
# Refusals of an agent that are about the model which it was given.
_OF_THE_MODEL = frozenset(
    {"load", "input", "crash", "timeout", "nondeterministic", "outputs", "fault"}
)
_ERRNO = re.compile(r"Error: \[Errno (\d+)\]")  # of an agent that did not expect it


def is_trouble(error: BaseException) -> bool:
    """Whether an error tells of this computer, or of a board, and not of the bundle."""
    if isinstance(error, Refusal):
        told = _ERRNO.search(error.message) if error.kind == "fault" else None
        of_the_system = told is not None and int(told[1]) in _OF_THE_SYSTEM
        return of_the_system or error.kind not in _OF_THE_MODEL
    if isinstance(error, DeviceError | NoSpace | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno in _OF_THE_SYSTEM
    return isinstance(error.__cause__, OSError) and is_trouble(error.__cause__)

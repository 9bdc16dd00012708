"""Secrets by reference. A secret is never stored, shown or logged: messages name the reference alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NoReturn

from edgeprune.errors import SpecError
from edgeprune.records.paths import located

MAX_SECRET_BYTES = 64 * 1024


class Secret:
    """A secret that shows itself as ``***`` wherever it is printed, logged or seen in a traceback; it cannot be pickled."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The secret itself: give it straight to what needs it, and keep it in no variable."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret cannot be pickled")


def resolve(reference: str) -> Secret:
    """The secret behind ``env:NAME`` or ``file:/path``; a file's last newline does not belong to it.

    Raises:
        SpecError: the variable is not set, or the file is not a private regular file of this user.
    """
    kind, _, place = reference.partition(":")
    if kind == "env":
        if not os.environ.get(place):
            raise SpecError(f"the environment variable {place} must hold a secret, but is not set")
        return Secret(os.environ[place])
    if kind != "file":
        raise SpecError(
            f"a secret reference must start with env: or file:, but starts with {kind!r}"
        )
    try:
        return Secret(read_private(Path(place)).decode().rstrip("\r\n"))
    except UnicodeDecodeError:
        raise SpecError(f"the secret file {place} must be UTF-8 text") from None


def read_private(path: Path, what: str = "secret file") -> bytes:
    """Content of a file that only this user can read; ``what`` is what messages call it.

    Raises:
        SpecError: it cannot be read, is a link, is over 64 KiB, belongs to another user, or others may read it.
    """
    path = located(path, what=f"the {what}")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SpecError(f"cannot read the {what} {path}: {error.strerror}") from error
    try:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode) or facts.st_size > MAX_SECRET_BYTES:
            raise SpecError(
                f"the {what} {path} must be a regular file of at most {MAX_SECRET_BYTES} bytes"
            )
        if facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
            raise SpecError(
                f"the {what} {path} must be readable by its owner alone,"
                f" but has mode {stat.S_IMODE(facts.st_mode):04o}",
                hint=f"run: chmod 600 {path}",
            )
        return os.read(handle, MAX_SECRET_BYTES)
    finally:
        os.close(handle)

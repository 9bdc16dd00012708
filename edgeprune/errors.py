"""Every error that edgeprune raises on purpose; the family says who must act and fixes the exit code.

::

    EdgepruneError
     |- SpecError       2   your file or flag
     |   |- UnknownName       a name that no file defines, with the nearest one that exists
     |   `- NoSpace           the disk that holds the run or the bundle is full
     |- ModelError      3   your model, weights or data for it
     |- DeviceError     4   your board, or the way to it
     |   |- Unreachable       no answer within the deadline
     |   |   `- HungUp            the server took the call and hung up before it said who it is
     |   |- LinkLost          the connection broke, and did not come back in time
     |   |- HostKeyMismatch   the board's key is unknown, or not the pinned one
     |   |- AuthFailed        the board refused the one login that was tried
     |   |- Busy         75   another client holds the board; try again later
     |   |- NotReady          too hot, too loaded or throttled to be measured, for as long as we may wait
     |   |- Unreliable        measured, but too much of it was disturbed
     |   `- DeadlineExceeded  an operation outlasted its total deadline
     |- FormatError     5   the toolchain, or a format that is not there
     |   `- MissingTool       a package of an optional extra is not installed
     |- BudgetError     6   physics: the budget is out of reach, or too much accuracy was lost
     `- IntegrityError  7   a bundle, checkpoint or record that is not what its digest says

Messages state the rule, show the values and offer the next step: lower-case start, no full stop, one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MAX_SHOWN = 100  # characters of a name or value that a message shows


class EdgepruneError(Exception):
    """Base of all intended errors.

    Args:
        message: one line: the rule that was broken and the values that broke it.
        hint: one line: what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}; {self.hint}"


class SpecError(EdgepruneError):
    """A file or flag that the user wrote is wrong."""

    exit_code = 2


class UnknownName(SpecError, KeyError):
    """A name that no file defines.

    Args:
        kind: what the name should have been: ``target``, ``profile``, ``device``, ``key`` ...
        name: what was given.
        known: what exists.
        where: the file it stood in, when there is one.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], *, where: str = "") -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        place = f" in {where}" if where else ""
        guess = f"did you mean {near[0]!r}? " if near else ""
        super().__init__(
            f"unknown {kind} {name!r}{place}", hint=f"{guess}known: {', '.join(names) or 'none'}"
        )


class NoSpace(SpecError):
    """The disk that holds the run folder or the bundle is full."""


class ModelError(EdgepruneError):
    """The model, its weights or its data cannot be used."""

    exit_code = 3


class DeviceError(EdgepruneError):
    """The board, or the way to it, failed."""

    exit_code = 4


class Unreachable(DeviceError):
    """The board did not answer within the deadline."""


class HungUp(Unreachable):
    """The server took the call and hung up before it said who it is, as one with too many logins under way does."""


class LinkLost(DeviceError):
    """The connection to the board broke, and could not be made again in time."""


class HostKeyMismatch(DeviceError):
    """The board's host key is not pinned, or is not the pinned one."""


class AuthFailed(DeviceError):
    """The board refused the one login that was tried."""


class Busy(DeviceError):
    """Another client holds the board. The exit code is that of ``EX_TEMPFAIL``, so that a script can wait and try again."""

    exit_code = 75


class NotReady(DeviceError):
    """The board is too hot, too loaded or throttled to be measured, and stayed so for as long as we may wait."""


class Unreliable(DeviceError):
    """A measurement was made, but too much of it was disturbed to be believed."""


class DeadlineExceeded(DeviceError):
    """An operation on the board outlasted its total deadline."""


class FormatError(EdgepruneError):
    """The export toolchain failed, or the format is not available."""

    exit_code = 5


class MissingTool(FormatError):
    """A package of an optional extra is not installed.

    Args:
        package: the import that failed.
        extra: the extra that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed", hint=f"run: pip install 'edgeprune[{extra}]'"
        )


class BudgetError(EdgepruneError):
    """The budget cannot be met, or the accuracy gate was missed."""

    exit_code = 6


class IntegrityError(EdgepruneError):
    """A file is not what its digest or schema says."""

    exit_code = 7


def reason_of(error: Exception) -> str:
    """Why a path or a file cannot be used, in the words of the system."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def shown(value: object) -> str:
    """A name for one line of an error, with its end cut off where it is very long."""
    text = str(value)
    return text if len(text) <= 3 * MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"

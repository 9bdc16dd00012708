"""Where functions report what they are doing. Progress is for stderr; results belong to stdout."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Bar(Protocol):
    """One running task."""

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Count ``steps`` more as done and show ``note`` beside the bar."""
        ...


class Progress(Protocol):
    """Where functions report what they are doing."""

    def bar(self, title: str, total: float) -> AbstractContextManager[Bar]:
        """A bar of ``total`` steps, with the time left."""
        ...

    def say(self, text: str) -> None:
        """One line for the user."""
        ...


class _SilentBar:
    def advance(self, steps: float = 1, note: str = "") -> None:
        """Do nothing."""


class Silent:
    """Shows nothing: for libraries, tests and ``--json``."""

    @contextlib.contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar that is not shown."""
        yield _SilentBar()

    def say(self, text: str) -> None:
        """Drop the line."""

"""Progress of long work, on stderr; results belong to stdout."""

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


class _TerminalBar:
    def __init__(self, display: object, task: object) -> None:
        self._display, self._task = display, task

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Move the bar."""
        self._display.update(self._task, advance=steps, note=note)  # type: ignore[attr-defined]


class Terminal:
    """Bars with the time left, and lines, on stderr."""

    def __init__(self) -> None:
        from rich.console import Console  # slow to import; --help does without it

        self._console = Console(stderr=True, highlight=False)

    @contextlib.contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar that disappears when its block ends."""
        from rich import progress as rich_progress

        display = rich_progress.Progress(
            rich_progress.TextColumn("  {task.description}"),
            rich_progress.BarColumn(),
            rich_progress.TaskProgressColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,  # in a pipe or a log, a bar is but an empty line
        )
        with display:
            yield _TerminalBar(display, display.add_task(title, total=total, note=""))

    def say(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

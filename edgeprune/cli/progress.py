"""Progress on a terminal, and in a log or a pipe."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from edgeprune.progress import Bar

# In a log: nothing of what is over sooner, then one line, and one at each further tenth, unless the last is that fresh.
FIRST_LINE_S, BETWEEN_LINES_S = 30.0, 10.0


class _TerminalBar:
    def __init__(self, display: object, task: object) -> None:
        self._display, self._task = display, task

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Move the bar."""
        self._display.update(self._task, advance=steps, note=note)  # type: ignore[attr-defined]


class _LogBar:
    """Where there is no bar to move: a line now and then, at most ten in all."""

    def __init__(
        self, title: str, total: float, say: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._title, self._total, self._say, self._clock = title, total, say, clock
        self._began = self._spoke = clock()
        self._done, self._told = 0.0, -1
        self._first: tuple[float, float] | None = None  # when the first steps were done, and these

    def advance(self, steps: float = 1, note: str = "") -> None:
        """Count, and say where the work is when that is due."""
        now = self._clock()
        self._done += steps
        self._first = self._first or (now, self._done)
        share = self._done / self._total if self._total > 0 else 1.0
        if share >= 1 or now - self._began < FIRST_LINE_S or int(10 * share) <= self._told:
            return
        if self._told < 0 or now - self._spoke >= BETWEEN_LINES_S:
            self._told, self._spoke = int(10 * share), now
            words = (note, f"{share:.0%}", self._left(now))
            self._say(f"      {self._title}: {', '.join(word for word in words if word)}")

    def _left(self, now: float) -> str:
        """At the pace since the first steps, which may have been those of an earlier run."""
        began, done = self._first or (now, self._done)
        if self._done <= done or now <= began:
            return ""
        return duration((self._total - self._done) * (now - began) / (self._done - done))


def duration(seconds: float) -> str:
    """How long something still takes, as roughly as it is known."""
    if seconds < 90:
        return f"about {max(10, 10 * round(seconds / 10))} s left"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min left"
    return f"about {seconds / 3600:.1f} h left"


class Terminal:
    """Bars with the time left, and lines, on stderr. Where that is a log or a pipe, long work says now and then where it is.

    Args:
        clock: seconds, of any start.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console  # slow to import; --help does without it

        self._console, self._clock = Console(stderr=True, highlight=False), clock

    @contextlib.contextmanager
    def bar(self, title: str, total: float) -> Iterator[Bar]:
        """A bar that disappears when its block ends."""
        if not self._console.is_terminal:
            yield _LogBar(title, total, self.say, self._clock)
            return
        from rich import progress as rich_progress

        display = rich_progress.Progress(
            rich_progress.TextColumn("  {task.description}"),
            rich_progress.BarColumn(bar_width=24),  # room for the note beside it
            rich_progress.TaskProgressColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        with display:
            yield _TerminalBar(display, display.add_task(title, total=total, note=""))

    def say(self, text: str) -> None:
        """Print one line; a log gets it whole, whatever its length."""
        self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)

"""Waiting for a board that another client holds: how long, and what is said meanwhile.

The lock on a board knows no queue: who asks first after it is free has it, and everybody who waits asks once a second.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from edgeprune.devices.link.frames import Refusal, clean
from edgeprune.devices.link.replies import span
from edgeprune.errors import Busy, SpecError

WAIT_MINUTES = 10.0
MAX_MINUTES = 7 * 24 * 60.0
POLL_S = 1.0
SAY_EVERY_S = 60.0
MOST_LINES = 20.0  # however long the wait is


def wait_seconds(minutes: float | None) -> float:
    """How long to wait, from what the user gave, if anything.

    Raises:
        SpecError: it is no number of minutes from 0 to a week.
    """
    try:
        if 0 <= (found := WAIT_MINUTES if minutes is None else float(minutes)) <= MAX_MINUTES:
            return 60 * found
    except (TypeError, ValueError, OverflowError):
        pass
    raise SpecError(
        f"wait must be a number of minutes from 0 to {MAX_MINUTES:g}, but got {minutes!r:.60}",
        hint="give --wait 30, for example; --wait 0 does not wait",
    )


def take_in_turn(
    name: str,
    take: Callable[[], object],
    wait_s: float,
    say: Callable[[str], None],
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Take the lease of a board, once whoever holds it has let it go.

    Args:
        name: of the board.
        take: tries to take it; raises a ``busy`` refusal while somebody else has it.
        wait_s: for how long to try again.
        say: told who has it, at once and then from time to time.
        clock: seconds, of any start.
        sleep: does nothing for some seconds.

    Raises:
        Busy: somebody else still has it.
        Refusal: the board refuses for another reason.
    """
    began = clock()
    told: float | None = None
    while True:
        try:
            take()
            break
        except Refusal as error:
            if error.kind != "busy":
                raise
            now = clock()
            left = wait_s - (now - began)
            if left <= 0:
                raise busy(name, error, wait_s) from error
            if told is None or now - told >= max(SAY_EVERY_S, wait_s / MOST_LINES):
                still, told = "" if told is None else "still ", now
                say(f"{name} is {still}held by {_holder(error)}; waiting up to {span(left)} for it")
        sleep(min(POLL_S, left))
    if told is not None:
        say(f"{name} is free now, after {span(clock() - began)}")


def busy(name: str, refusal: Refusal, wait_s: float = 0.0) -> Busy:
    """The error for a board that another client holds, also after waiting; names them as they named themselves."""
    after = f", still after a wait of {span(wait_s)}" if wait_s > 0 else ""
    return Busy(
        f"device {name!r} is held by {_holder(refusal)}{after}",
        hint=f"give more minutes with --wait, or wait for it with: edgeprune devices wait {name}",
    )


def _holder(refusal: Refusal) -> str:
    """Who holds a board, since when and what for."""
    owner: dict[str, Any] = {}
    with contextlib.suppress(ValueError, IndexError, RecursionError):
        found = json.loads(refusal.message[refusal.message.index("{") :])
        owner = found if isinstance(found, dict) else {}
    who = f"{owner.get('user') or 'somebody'}@{owner.get('host') or 'another computer'}"
    since = owner.get("since_s")
    since_text = f" for {span(since)}" if isinstance(since, int | float) and since else ""
    return f"{clean(who, 120)}{since_text} ({clean(str(owner.get('job', '')), 80)})"

"""Converters kept off the terminal, and what they print kept for the reason of a failure."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

MAX_REASON = 300  # characters of one line of a toolchain
MAX_LOG_BYTES = 64 * 1024


class Log:
    """What was printed while :func:`quiet` held the streams; complete once it has ended."""

    def __init__(self) -> None:
        self.text = ""

    def last_error(self) -> str:
        """The last line that speaks of an error, ``""`` where there is none."""
        lines = [line.strip() for line in self.text.splitlines()]
        found = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
        return found[-1][:MAX_REASON] if found else ""


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silence what Python code prints, logs and warns: progress marks, and hints for its own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            # A real file: what a toolchain starts may ask for its number.
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def quiet() -> Iterator[Log]:
    """Keep what C++ and Python code print off the terminal.

    The converter prints dozens of progress lines on both streams, and on failure the reason. Whatever ends the block, the streams are
    as before.
    """
    log = Log()
    with tempfile.TemporaryFile(prefix="edgeprune-converter-") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved: list[tuple[int, int]] = []
        try:
            _flush()
            for number in (1, 2):
                saved.append((number, os.dup(number)))
                os.dup2(file.fileno(), number)
            yield log
        finally:
            _flush()
            for number, handle in saved:
                os.dup2(handle, number)
                os.close(handle)
            file.seek(max(0, file.seek(0, os.SEEK_END) - MAX_LOG_BYTES))
            log.text = file.read().decode("utf-8", "replace")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        # A stream may be absent, closed, or a pipe whose reader has gone; that is no reason to fail here.
        with contextlib.suppress(AttributeError, ValueError, OSError):
            stream.flush()

"""What becomes of a command that fails in a way nobody foresaw, or that nobody listens to: one line at most, and never a traceback."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from edgeprune.cli.console import plain
from edgeprune.errors import NoSpace, reason_of, shown
from edgeprune.records.version import VERSION

SOFTWARE = 70  # EX_SOFTWARE: a fault of this program
UNHEARD = 141  # as a shell says of a program that wrote into a pipe whose reader had gone
_ESCAPES = "edgeprune-escapes"


def ready_streams() -> None:
    r"""Make the standard streams fit to be written to, whatever the command was started with.

    One that was closed swallows what it is given; its number must not fall to the next file that is opened, which the output of a library
    would then go into. A character that the terminal does not have is written as ``\uXXXX``, which JSON reads as that character.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with contextlib.suppress(OSError):
                handle = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
                if handle == number:
                    os.set_inheritable(handle, True)
                else:
                    os.close(handle)
            # Open until the process ends, as the stream that it stands for.
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115, PTH123
    codecs.register_error(_ESCAPES, _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=_ESCAPES)


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an encoding lacks, and where to go on; a handler of :mod:`codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    units = error.object[error.start : error.end].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4)), error.end


class _Unheard(Exception):
    """What is written is not read any more."""


class Commands(click.Group):
    """A group that lets :func:`caught` see a broken pipe; click by itself ends the process with 1 for it."""

    def make_context(self, *args: Any, **rest: Any) -> click.Context:
        """As click's own."""
        with _heard():
            return super().make_context(*args, **rest)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's own."""
        with _heard():
            return super().invoke(ctx)


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise _Unheard from error


def caught(command: Callable[[], None]) -> None:
    """Run a command that has an exit code for everything that it foresees; here is what it does not.

    A reader of the output that went away, such as ``head``, ends the command without a word, and a full disk behind it with one line.
    """
    try:
        command()
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):  # rich ends the process itself
            _leave(UNHEARD)
        raise
    except (BrokenPipeError, _Unheard):
        _leave(UNHEARD)
    except Exception as error:
        _leave(_said(error))


def _leave(code: int) -> NoReturn:
    """End with a code; a stream that cannot be written to must not change it when Python flushes it for the last time."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            with contextlib.suppress(Exception):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _said(error: Exception) -> int:
    """Say in one line what happened and where more is to be read; gives the exit code."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = "of the output" if error.filename is None else f"of {shown(error.filename)}"
        lines, code = [f"error: no space left on the disk {where}"], NoSpace.exit_code
    else:
        lines, code = _report(error), SOFTWARE
    with contextlib.suppress(Exception):
        for line in lines:
            print(plain(line), file=sys.stderr)
    return code


def _report(error: Exception) -> list[str]:
    kind, said = type(error).__name__, shown((str(error).splitlines() or [""])[0])
    what = f"error: edgeprune failed where it should not: {kind}{': ' if said else ''}{said}"
    try:
        log = f"the log {_logged(error)}"
    except Exception as failure:  # nothing may fail here
        log = f"this line (no log could be written: {reason_of(failure)})"
    return [
        f"{what}{_place(error)}",
        f"hint: this is a fault of edgeprune; please report it with {log}",
    ]


def _place(error: Exception) -> str:
    """The last place in this program on the way to an error."""
    found, trace, home = "", error.__traceback__, str(Path(__file__).parents[1])
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file.startswith(home):
            found = f" ({Path(file).name} line {trace.tb_lineno})"
        trace = trace.tb_next
    return found


def _logged(error: Exception) -> Path:
    """Write what happened to a file of its own; gives its path.

    Raises:
        OSError: there is no place for it.
    """
    import platform
    import shlex
    import tempfile
    import time
    import traceback

    from edgeprune.records.paths import user_folder

    words = shlex.join(["edgeprune", *sys.argv[1:]])
    where = f"edgeprune {VERSION}, Python {platform.python_version()}, {platform.platform()}"
    trace = "".join(traceback.format_exception(error))
    content = f"{words}\n{where}\n\n{trace}".encode("utf-8", "backslashreplace")
    name = time.strftime("edgeprune-%Y%m%dT%H%M%S-") + f"{os.getpid()}.log"
    try:
        return _write(user_folder("XDG_STATE_HOME", ".local/state") / "errors" / name, content)
    except Exception:  # no home, or one that is full or may not be written
        return _write(Path(tempfile.mkdtemp(prefix="edgeprune-")) / name, content)


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
    return path

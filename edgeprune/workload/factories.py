"""Calling the user's own code: ``path/file.py:factory`` and ``package.module:factory``.

The code runs with the rights of whoever starts edgeprune; it is the user's, like a script they run themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeprune.errors import ModelError, SpecError, UnknownName
from edgeprune.records.paths import located

_FACTORY = re.compile(r"(?P<place>.+):(?P<name>[A-Za-z_][A-Za-z0-9_]*)")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


@dataclass(frozen=True)
class Made:
    """What a factory returned, and the file its code is in (``None`` when it has no source file)."""

    value: Any
    source: Path | None


def is_factory(text: str) -> bool:
    """Whether ``text`` names a factory: a ``.py`` file or a dotted module, a colon and a name."""
    match = _FACTORY.fullmatch(text)
    if match is None:
        return False
    return match["place"].endswith(".py") or _DOTTED.fullmatch(match["place"]) is not None


def call_factory(text: str, base: Path, *, key: str) -> Made:
    """Import a factory and call it without arguments; what it prints goes to stderr.

    Args:
        text: ``path/file.py:factory`` (relative to ``base``) or ``package.module:factory``.
        base: the folder of the file that ``text`` stands in; on ``sys.path`` while the user's code runs.
        key: what the factory is for, ``model`` or ``data``; named in errors.

    Raises:
        SpecError: ``text`` is not of these forms, or the file or module is not there.
        UnknownName: the file or module defines no such name.
        ModelError: the user's code raised an exception; names the file, the line and the exception.
    """
    match = _FACTORY.fullmatch(text)
    if match is None or not is_factory(text):
        raise SpecError(
            f"{key} must look like path/file.py:factory or package.module:factory, but got {text!r}"
        )
    place, name = match["place"], match["name"]
    is_file = place.endswith(".py")
    path = located(place, base, what=key).resolve() if is_file else base
    if is_file and not path.is_file():
        raise SpecError(f"{key} names {place}, but there is no such file in {base.resolve()}")
    folder = path.parent if is_file else base.resolve()
    with _importable(folder, base.resolve()), contextlib.redirect_stdout(sys.stderr):
        module = _run(lambda: _import_file(path) if is_file else _import_module(place, key), text)
        factory = getattr(module, name, None)
        if not callable(factory):
            raise UnknownName("factory", name, _public_callables(module), where=place)
        value = _run(factory, text)
    file = getattr(module, "__file__", None)
    return Made(value, Path(file) if file else None)


def _run(call: Callable[[], Any], text: str) -> Any:
    """The result of user code; whatever it raises becomes one line that names where."""
    try:
        return call()
    except (SpecError, ModelError):
        raise
    except (Exception, SystemExit) as error:
        raise ModelError(f"{text} failed{_place(error)}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The type and first line of an exception, at most 300 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f" in {error.filename} line {error.lineno}"
    ours = Path(__file__).resolve()
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if Path(f.filename).is_file() and Path(f.filename) != ours]
    outside = [f for f in theirs if not _is_installed(f.filename)]
    if not outside:
        return ""
    return f" in {outside[-1].filename} line {outside[-1].lineno}"


def _import_file(path: Path) -> ModuleType:
    # A private name: the user's `random.py` or `net.py` must not take the place of another module of that name.
    name = f"_edgeprune_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch.export look modules up by name
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str, key: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it imports is not
        raise SpecError(
            f"{key} names the module {name!r}, but {error.name!r} cannot be imported",
            hint="for a file, write path/file.py:factory",
        ) from error


@contextlib.contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """Folders on ``sys.path``, first one first, for as long as the block runs."""
    for folder in folders:
        _forget_namesakes(folder)
    added = [str(folder) for folder in dict.fromkeys(folders)]
    sys.path[:0] = added
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for text in added:
            with contextlib.suppress(ValueError):
                sys.path.remove(text)


def _forget_namesakes(folder: Path) -> None:
    """Drop modules that another project's folder brought under a name that this folder has too.

    Without this, the second of two projects that both have a ``net.py`` would silently get the first one's.
    """
    own = {path.stem for path in folder.glob("*.py")}
    own |= {path.parent.name for path in folder.glob("*/__init__.py")}
    own -= {*sys.stdlib_module_names, "edgeprune", "__main__"}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] not in own or file is None or _is_installed(file):
            continue
        if not Path(file).resolve().is_relative_to(folder):
            del sys.modules[name]


def _is_installed(file: str) -> bool:
    parts = Path(file).parts
    return "site-packages" in parts or "dist-packages" in parts or "<frozen" in file


def _public_callables(module: ModuleType) -> list[str]:
    own = module.__name__
    return [
        name
        for name, value in vars(module).items()
        if callable(value)
        and not name.startswith("_")
        and getattr(value, "__module__", None) == own
    ]

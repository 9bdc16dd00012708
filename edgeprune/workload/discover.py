"""What a project folder seems to hold: model factories, weights, data, normalisation; found without running its code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeprune.workload.image_folder import find

_SKIPPED_FOLDERS = {"venv", "env", "node_modules", "build", "dist", "site-packages", "__pycache__"}
_MODULE_BASES = {"Module", "Sequential", "LightningModule"}
_MODEL_VERBS = ("build", "create", "make", "get", "load")
_DATA_NAMES = ("load", "load_data", "get_data", "make_data", "splits", "dataset")
_DATA_FOLDERS = ("data", "dataset", "images", "photos")
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth")
MAX_SOURCE_BYTES = 1024 * 1024
MAX_DEPTH = 3


@dataclass(frozen=True)
class Findings:
    """Proposals for each key of ``edgeprune.yaml``, the likeliest first; paths are relative to the folder, with ``/``."""

    models: tuple[str, ...]
    weights: tuple[str, ...]
    data: tuple[str, ...]
    # Mean, std, as a transform in the code states them.
    normalise: tuple[tuple[float, ...], tuple[float, ...]] | None


def look(folder: Path) -> Findings:
    """What is in a folder and up to two levels below it. Hidden folders, environments and build outputs are passed over."""
    files = sorted(_files(folder, MAX_DEPTH), key=lambda p: (len(p.parts), p))
    sources = {
        p: tree for p in files if p.suffix == ".py" for tree in [_parse(p)] if tree is not None
    }
    models: list[tuple[int, str]] = []
    data: list[tuple[int, str]] = []
    for path, tree in sources.items():
        relative = path.relative_to(folder).as_posix()
        models += [(rank, f"{relative}:{name}") for rank, name in _model_factories(tree)]
        data += [(rank, f"{relative}:{name}") for rank, name in _data_factories(tree, path)]
    stored = [p.relative_to(folder).as_posix() for p in files if p.suffix == ".npz"]
    weights = [p for suffix in _WEIGHT_SUFFIXES for p in files if p.suffix == suffix]
    return Findings(
        models=_in_order(models),
        weights=tuple(p.relative_to(folder).as_posix() for p in weights),
        data=(*_image_folders(folder), *stored, *_in_order(data)),
        normalise=next((found for tree in sources.values() for found in _constants(tree)), None),
    )


def _in_order(ranked: list[tuple[int, str]]) -> tuple[str, ...]:
    return tuple(text for _, text in sorted(ranked, key=lambda pair: pair[0]))


def _files(folder: Path, depth: int) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith(".") or path.is_symlink():
            continue
        if path.suffix in (".py", ".npz", *_WEIGHT_SUFFIXES) and path.is_file():
            yield path
        elif depth > 1 and path.is_dir() and path.name not in _SKIPPED_FOLDERS:
            yield from _files(path, depth - 1)


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree of a file, or ``None`` for one that Python would not accept either."""
    try:
        if path.stat().st_size > MAX_SOURCE_BYTES:
            return None
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return None


def _name(node: ast.expr | None) -> str:
    """The last part of a dotted name: ``Module`` for ``nn.Module`` and for the string ``"nn.Module"``."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.rpartition(".")[2]
    return node.id if isinstance(node, ast.Name) else ""


def _callable_without_arguments(function: ast.FunctionDef, *, method: bool = False) -> bool:
    args = function.args
    required = len(args.posonlyargs) + len(args.args) - len(args.defaults) - int(method)
    return required <= 0 and all(default is not None for default in args.kw_defaults)


def _model_factories(tree: ast.Module) -> list[tuple[int, str]]:
    """Ranked names of functions and classes that give a module when called without arguments; a lower rank is likelier."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    modules: dict[str, ast.ClassDef] = {}
    for node in classes:  # a base class stands above the class that derives from it
        if any(_name(base) in _MODULE_BASES or _name(base) in modules for base in node.bases):
            modules[node.name] = node
    found = []
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        if _gives_module(function, modules) and _callable_without_arguments(function):
            verb = function.name.split("_")[0] in (*_MODEL_VERBS, "model")
            found.append((0 if verb else 1, function.name))
    parts = {name for node in modules.values() for name in _called(node)}
    for name, node in modules.items():
        if _builds_without_arguments(node) and name not in parts:
            found.append((2, name))
    return [(rank, name) for rank, name in found if not name.startswith("_")]


def _gives_module(function: ast.FunctionDef, modules: dict[str, ast.ClassDef]) -> bool:
    known = _MODULE_BASES | set(modules)
    if _name(function.returns) in known:
        return True
    returned = [n.value for n in ast.walk(function) if isinstance(n, ast.Return)]
    return any(isinstance(v, ast.Call) and _name(v.func) in known for v in returned)


def _called(node: ast.AST) -> set[str]:
    return {_name(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}


def _builds_without_arguments(node: ast.ClassDef) -> bool:
    own = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    return all(_callable_without_arguments(function, method=True) for function in own)


def _data_factories(tree: ast.Module, path: Path) -> list[tuple[int, str]]:
    """Ranked names of functions without arguments that look as if they load data."""
    about_data = "data" in path.stem.lower()
    found = []
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        usual = function.name in _DATA_NAMES
        named = usual if about_data else usual and "data" in function.name
        if named and _callable_without_arguments(function):
            found.append((0 if about_data else 1, function.name))
    return found


def _image_folders(folder: Path) -> list[str]:
    """Folders, up to two levels down, with two class folders or more (or a telling name); the outer one of two that are nested."""
    found: list[str] = []
    level = [folder]
    for _ in range(MAX_DEPTH - 1):
        inside = [p for parent in level for p in sorted(parent.iterdir()) if _may_hold_data(p)]
        level = []
        for path in inside:
            classes = find(path, nested=False).files["train"]
            in_order = len(classes) > 1 or path.name.lower() in _DATA_FOLDERS
            if in_order and any(classes.values()):
                found.append(path.relative_to(folder).as_posix())
            else:
                level.append(path)
    return found


def _may_hold_data(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".") and path.name not in _SKIPPED_FOLDERS


def _constants(tree: ast.Module) -> Iterator[tuple[tuple[float, ...], tuple[float, ...]]]:
    """(mean, std) of each ``Normalize(mean, std)`` with literal numbers, then of top-level ``MEAN`` and ``STD``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) == "Normalize":
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            given = [*node.args, *(named[k] for k in ("mean", "std") if k in named)]
            values = [_numbers(value) for value in given[:2]]
            if len(values) == 2 and values[0] and values[1]:
                yield values[0], values[1]
    assigned: dict[str, tuple[float, ...]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts))
            assigned.update({_name(t).upper(): _numbers(v) for t, v in pairs})
    if assigned.get("MEAN") and assigned.get("STD"):
        yield assigned["MEAN"], assigned["STD"]


def _numbers(node: ast.expr) -> tuple[float, ...]:
    """Literal numbers in a node, a single one or a sequence; empty when it is anything else."""
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        return ()
    return tuple(float(v) for v in values)

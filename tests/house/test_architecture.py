"""The house: which rooms there are, and who may import whom; light commands stay light, modules and functions stay small."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from repo import REPO

PACKAGE = REPO / "edgeprune"

# The rooms, and which other rooms each may import; OPEN is open to all. This is the whole list.
ROOMS = {
    "records": "",
    "workload": "records",
    "report": "records",
    "devices": "records",
    "compress": "workload records",
    "formats": "workload records",
    "bundle": "formats devices workload records",
    "plan": "compress formats devices records",
    "pipeline": "plan bundle compress formats devices report workload records",
    "cli": "pipeline plan bundle compress formats devices report workload records",
}
OPEN = {"errors", "progress"}
# What stands in the package beside the rooms. Only ``__init__`` and ``__main__`` may import any room; nothing imports them.
DOORS = {"__init__", "__main__"}

# The same inside the rooms that have sub-rooms: a sub-room, or a module that lies loose in the room, and which others it may import.
# A sub-room's own modules import each other freely, as long as there is no circle.
INSIDE = {
    "compress": {
        "readings": "",
        "evaluate": "",
        "groups": "",
        "size": "groups",
        "pruned_file": "groups",
        "plain_source": "groups",
        "repair": "groups evaluate readings",
        "heal": "repair evaluate readings",
        "structure_loss": "heal repair groups",
        "scores": "structure_loss groups evaluate readings",
        "int8": "groups evaluate",
    },
    "devices": {
        "agent": "",
        "plans": "",
        "store": "",
        "link": "agent",
        "board": "link agent plans store",
        "inventory": "link",
        "setup": "board link agent",
        "timing": "board link inventory plans",
    },
    "devices/link": {
        "agent_file": "",
        "pipe": "",
        "secrets": "",
        "frames": "pipe",
        "exchanges": "frames",
        "replies": "frames",
        "wait": "replies frames",
        "login": "secrets",
        "recording": "exchanges replies frames pipe agent_file",
        "transports": "recording exchanges login pipe",
        "session": "transports wait replies frames pipe agent_file",
    },
    "formats": {
        "__init__": "",
        "shared": "__init__",
        "inside": "shared __init__",
        "onnx": "inside shared __init__",
        "tensorrt": "onnx __init__",
        "tflite": "inside shared __init__",
        "executorch": "inside shared __init__",
        "coreml": "inside shared __init__",
    },
    "plan": {
        "latency": "",
        "solver": "latency",
        "measured": "latency",
        "bench": "",
        "table": "bench measured latency",
        "net_model": "table bench measured latency",
        "basis": "measured solver latency",
        "certainty": "bench",
        "candidates": "basis solver",
        "result": "basis bench solver",
        "guarantee": "candidates result certainty basis bench solver latency",
    },
    "pipeline": {
        "allocator": "",
        "run_folder": "",
        "options": "",
        "context": "",
        "files": "context",
        "app": "files context run_folder",
        "profile": "files context",
        "stages": "app files context run_folder options",
        "search_result": "stages context",
        "format_choice": "stages files context run_folder",
        "run": "format_choice stages app files context options run_folder allocator",
        "api": "run profile search_result stages context options run_folder",
    },
}

# Arrows that the table forbids and that a later carve takes away. The list may only become shorter.
STILL_TO_BE_CARVED = {
    ("workload.preflight", "compress.heal.recover"),
}
# Modules of the room ``workload`` that touch the model; the others are about data and files alone.
TOUCHES_THE_MODEL = {
    "load",
    "model",
    "preflight",
    "tasks",
    "trace",
    "modes",
    "outputs",
    "answers",
    "batches",
    "memory",
}
# What Python, numpy, pydantic and yaml are enough for.
PLAIN_PLACES = (
    "errors.py",
    "progress.py",
    "records/",
    "workload/",
    "plan/latency/",
    "plan/solver/",
    "plan/measured.py",
    "pipeline/files/records.py",
    "pipeline/allocator.py",
    "formats/shared/model_bytes.py",
    "cli/console.py",
)
PLAIN = {"numpy", "pydantic", "pydantic_core", "yaml", "edgeprune"}
# PIL opens image files, where it is used; click writes to the terminal.
ALSO_PLAIN = {
    ("workload/image_files.py", "PIL"),
    ("workload/init.py", "PIL"),
    ("cli/console.py", "click"),
}
NO_TORCH = ("records", "report", "devices")
# What runs on a board without edgeprune: the runtimes it times, and the arrays they take.
ON_BOARD = {
    "numpy",
    "ai_edge_litert",
    "tflite_runtime",
    "onnxruntime",
    "tensorrt",
    "coremltools",
    "PIL",
}

# Tests lie in the room of what they test. Beside the rooms: what they share, tests of more than one room, and what takes a toolchain or
# an emulated board.
TESTS = REPO / "tests"
BESIDE_THE_ROOMS = {
    "fixtures",
    "house",
    "whole_runs",
    "conformance",
    "benchmarks",
    "toolchains",
    "emulated_board",
}

MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 70
MAX_HELP_CPU_S = 0.3


def modules() -> list[Path]:
    """Modules of the package; the sample apps inside bundles are payload, not part of it."""
    samples = PACKAGE / "bundle" / "samples"
    return sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if samples not in path.parents and "_data" not in path.parts
    )


def module_id(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def short_name(path: Path) -> str:
    """A module by its dotted name inside the package; a room's ``__init__`` by that of its folder, the package's own by ``__init__``."""
    dotted = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


PATHS = {short_name(path): path for path in modules()}


def is_on_board(path: Path) -> bool:
    return path.is_relative_to(PACKAGE / "devices" / "agent")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere, type checking and functions included; relative ones made absolute."""
    parents = ("edgeprune", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def owner(dotted: str) -> str:
    """The module of the package that an imported name is, or comes from."""
    name = dotted.removeprefix("edgeprune").removeprefix(".")
    while name and name not in PATHS:
        name = name.rpartition(".")[0]
    return name or "__init__"


def arrows() -> set[tuple[str, str]]:
    """Which module imports which, by short names. ``__version__`` is a constant that anyone may read."""
    return {
        (name, owner(dotted))
        for name, path in PATHS.items()
        for dotted in imports(path)
        if dotted.split(".")[0] == "edgeprune" and dotted != "edgeprune.__version__"
    } - {(name, name) for name in PATHS}


def place(name: str, folder: str) -> str | None:
    """Which entry of a folder a module is, or lies in; ``None`` outside of it. A folder's own ``__init__`` is an entry too."""
    path, root = PATHS[name], PACKAGE / folder
    if not path.is_relative_to(root):
        return None
    return path.relative_to(root).parts[0].removesuffix(".py")


def is_legal(importer: str, imported: str) -> bool:
    """What the tables say of one import. Everything not allowed there is forbidden."""
    here, there = place(importer, ""), place(imported, "")
    if there in OPEN or here in DOORS:
        return True
    if here != there:
        return there in ROOMS.get(str(here), "").split()
    for folder, entries in INSIDE.items():
        one, other = place(importer, folder), place(imported, folder)
        if one is None or other is None or one == other:
            continue
        if other not in entries.get(one, "").split():
            return False
    return True


def test_the_package_holds_its_rooms_and_nothing_else():
    found = {p.name for p in PACKAGE.iterdir() if p.name not in {"__pycache__", "_data"}}
    files = {f"{name}.py" for name in OPEN | DOORS} | {"py.typed"}
    assert found == {*ROOMS, *files}


@pytest.mark.parametrize("folder", INSIDE)
def test_every_entry_of_a_room_with_sub_rooms_is_in_its_table(folder):
    entries = {place(name, folder) for name in PATHS} - {None}
    # A folder whose ``__init__`` is a docstring alone needs no entry for it.
    init = ast.parse((PACKAGE / folder / "__init__.py").read_text(encoding="utf-8"))
    if len(init.body) == 1:
        entries.discard("__init__")
    assert entries == set(INSIDE[folder])


def test_imports_follow_the_tables():
    forbidden = {arrow for arrow in arrows() if not is_legal(*arrow)}
    assert sorted(forbidden - STILL_TO_BE_CARVED) == []
    assert sorted(STILL_TO_BE_CARVED - forbidden) == [], "carved: take these from the list"


def in_circles(needs: dict[str, set[str]]) -> list[str]:
    """What is left of a graph when all that needs nothing, and all that nothing needs, is taken away, again and again."""
    needs = {name: set(needs[name]) for name in needs}
    while True:
        needed = set().union(*needs.values())
        settled = {name for name in needs if not needs[name] or name not in needed}
        if not settled:
            return sorted(needs)
        needs = {name: needs[name] - settled for name in needs if name not in settled}


def test_no_module_imports_itself_in_a_circle():
    needs: dict[str, set[str]] = {name: set() for name in PATHS}
    for importer, imported in arrows():
        needs[importer].add(imported)
    assert in_circles(needs) == []


def test_the_tables_allow_no_circle_of_rooms():
    for table in (ROOMS, *INSIDE.values()):
        assert in_circles({name: set(allowed.split()) for name, allowed in table.items()}) == []


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(path: Path) -> Iterator[str]:
    """Dotted ``_private`` names of the package that a module imports or reads off an imported module."""
    aliases: dict[str, str] = {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "edgeprune":
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for dotted in imports(path):
        if dotted.split(".")[0] == "edgeprune" and any(map(is_private, dotted.split("."))):
            yield dotted
    for node in ast.walk(tree):
        is_read = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if is_read and is_private(node.attr) and node.value.id in aliases:
            yield f"{aliases[node.value.id]}.{node.attr}"


@pytest.mark.parametrize("path", modules(), ids=module_id)
def test_a_private_name_belongs_to_its_folder_alone(path):
    for dotted in private_uses(path):
        first = next(i for i, part in enumerate(dotted.split(".")) if is_private(part))
        home = dotted.split(".")[1:first]
        folder = PACKAGE.joinpath(*home)
        assert path.parent == (folder if folder.is_dir() else folder.parent), dotted


@pytest.mark.parametrize("path", modules(), ids=module_id)
def test_torch_stays_where_the_model_is_touched(path):
    room, *rest = path.relative_to(PACKAGE).with_suffix("").parts
    touches = room == "workload" and rest[0] in TOUCHES_THE_MODEL
    if room in NO_TORCH or (room == "workload" and not touches):
        assert "torch" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", modules(), ids=module_id)
def test_the_lower_rooms_need_only_numpy_pydantic_and_yaml(path):
    where = module_id(path)
    if not where.startswith(PLAIN_PLACES) or path.stem in TOUCHES_THE_MODEL:
        return
    for name in {name.split(".")[0] for name in imports(path)}:
        allowed = name in PLAIN or name in sys.stdlib_module_names
        assert allowed or (where, name) in ALSO_PLAIN, name


@pytest.mark.parametrize("path", [p for p in modules() if is_on_board(p)], ids=module_id)
def test_what_runs_on_the_board_needs_nothing_of_edgeprune(path):
    for name in imports(path):
        top = name.split(".")[0]
        is_sibling = name.startswith("edgeprune.devices.agent.")
        assert is_sibling or top in sys.stdlib_module_names or top in ON_BOARD, name


def run_cli(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["targets", "list"], ["profiles", "list"], ["devices", "list"]]
)
def test_light_commands_import_no_heavy_toolchain(arguments):
    code = f"""
import runpy, sys
sys.argv = ["edgeprune", *{arguments!r}]
try:
    runpy.run_module("edgeprune", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
heavy = {{"torch", "onnx", "onnxruntime", "torch_pruning", "litert_torch"}}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    done = run_cli(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_help_starts_quickly():
    # Processor time, not wall time, and the best of five: other work on the machine must not fail this.
    spent_s = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "edgeprune", "--help"],
            capture_output=True,
            check=True,
            cwd=PACKAGE.parent,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent_s) < MAX_HELP_CPU_S


@pytest.mark.parametrize("path", modules(), ids=module_id)
def test_modules_and_functions_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_MODULE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes, and the public methods of public classes; not what functions define inside."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name.startswith("_"):
                continue
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", modules(), ids=module_id)
def test_everything_public_says_what_you_get(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the module"
    silent = [
        name
        for name, node in public_definitions(tree.body)
        if not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    assert not silent


def files_of_tests() -> list[Path]:
    """Everything below ``tests/`` that is kept, relative to it: neither what Python compiled nor what starts with a dot."""
    found = (path.relative_to(TESTS) for path in TESTS.rglob("*") if path.is_file())
    return sorted(
        path
        for path in found
        if not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
    )


def test_the_tests_mirror_the_rooms():
    files = files_of_tests()
    assert [path.name for path in files if len(path.parts) == 1] == ["conftest.py"]
    assert {path.parts[0] for path in files if len(path.parts) > 1} == {*ROOMS, *BESIDE_THE_ROOMS}
    inside = {path.parent for path in files if path.parts[0] in ROOMS}
    assert [str(folder) for folder in sorted(inside) if not (PACKAGE / folder).is_dir()] == []
    names = [path.name for path in files if path.name.startswith("test_")]
    assert sorted(set(names)) == sorted(names), "pytest tells test modules apart by their names"


def is_test(module: str) -> bool:
    """Whether a dotted name is that of a test module, or of the fixtures that pytest hands out."""
    last = module.rpartition(".")[2]
    return last.startswith("test_") or last == "conftest"


def test_no_test_imports_a_test():
    wrong = []
    for path in (TESTS / path for path in files_of_tests() if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            wrong += [f"{path.name} imports {module}" for module in modules if is_test(module)]
    assert wrong == []

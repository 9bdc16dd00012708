"""The shape of the package: imports point down, light commands stay light, modules and functions stay small."""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "edgeprune"

# Layer of each top-level module or folder of the package. Imports point to the same layer or a lower one.
LAYERS = {
    "version": 0,
    "errors": 0,
    "allocator": 0,
    "records": 0,
    "operators": 0,
    "patterns": 0,
    "paths": 0,
    "arrays": 1,
    "folders": 1,
    "orderstats": 0,
    "budgets": 1,
    "specs": 1,
    "results": 1,
    "plan_results": 1,
    "int8_results": 1,
    "intervals": 1,
    "search_results": 1,
    "progress": 1,
    "catalog": 2,
    "datasets": 2,
    "splits": 2,
    "classnumbers": 2,
    "draws": 1,
    "factories": 2,
    "enough": 2,
    "imagedata": 2,
    "imagefiles": 2,
    "imagefolder": 2,
    "discover": 2,
    "latency": 2,
    "search": 2,
    "cost": 2,
    "compress": 3,
    "intake": 3,
    "preflight": 3,
    "workload": 3,
    "tasks": 3,
    "devices": 3,
    "formats": 4,
    "bundle": 5,
    "report": 5,
    "initialise": 5,
    "profiling": 5,
    "planning": 5,
    "basis": 5,
    "guarantee": 5,
    "certainty": 5,
    "explaining": 5,
    "apps": 5,
    "context": 5,
    "stage_records": 2,
    "feasibility": 5,
    "closing": 5,
    "shipping": 5,
    "options": 5,
    "pipeline": 5,
    "stages": 5,
    "conversion": 5,
    "choosing": 5,
    "converted": 5,
    "int8_types": 5,
    "int8": 5,
    "int8_checks": 5,
    "operator_checks": 5,
    "static_checks": 5,
    "tracing": 5,
    "schedule": 5,
    "verdict": 5,
    "runfolder": 5,
    "console": 1,
    "cli": 6,
    "cli_bundle": 6,
    "cli_devices": 6,
    "cli_entries": 6,
    "cli_options": 6,
    "cli_usage": 6,
    "last_net": 6,
    "api": 6,
    "__init__": 6,
    "__main__": 6,
}
TORCH_SIDE = {"compress", "intake", "preflight", "tasks", "workload"}
BOARD_SIDE = {"devices"}
PLAIN = {
    "numpy",
    "pydantic",
    "yaml",
    "edgeprune",
}  # all that layers 0 to 2 need beside Python itself
# Imported where they are used: rich draws the bars, PIL opens image files, click writes to the terminal.
ALSO_PLAIN = {("progress", "rich"), ("imagefiles", "PIL"), ("console", "click")}
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


def top_name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


def own_imports(path: Path) -> Iterator[str]:
    """Top-level names inside the package that a module imports; ``__version__`` is a constant that anyone may read."""
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "edgeprune" and parts[1:] != ["__version__"]:
            yield parts[1] if len(parts) > 1 and parts[1] in LAYERS else "__init__"


@pytest.mark.parametrize("path", modules(), ids=module_id)
def test_every_module_has_a_layer(path):
    assert top_name(path) in LAYERS, "give it a layer in this test"


@pytest.mark.parametrize("path", modules(), ids=module_id)
def test_imports_only_point_down(path):
    layer = LAYERS[top_name(path)]
    upward = {name for name in own_imports(path) if LAYERS[name] > layer}
    assert not upward


@pytest.mark.parametrize("path", modules(), ids=module_id)
def test_the_torch_side_and_the_board_side_never_import_each_other(path):
    found = set(own_imports(path))
    if top_name(path) in TORCH_SIDE:
        assert not found & BOARD_SIDE
    if top_name(path) in BOARD_SIDE:
        assert not found & TORCH_SIDE
        assert "torch" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", modules(), ids=module_id)
def test_the_lower_layers_need_only_numpy_pydantic_and_yaml(path):
    if LAYERS[top_name(path)] > 2:
        return
    for name in {name.split(".")[0] for name in imports(path)}:
        allowed = name in PLAIN or name in sys.stdlib_module_names
        assert allowed or (top_name(path), name) in ALSO_PLAIN, name


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

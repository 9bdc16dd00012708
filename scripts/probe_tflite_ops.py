"""Ask a TFLite runtime which version of every built-in operator it knows, by loading files that hold nothing but the operator's code.

Run it with the Python of an environment that has ``tflite-runtime`` (or ``ai-edge-litert``) and ``flatbuffers``::

    python scripts/probe_tflite_ops.py schema_py_generated.py > edgeprune/formats/tflite/ops/litert.json

The runtime looks every operator code up, name and version, before it looks at anything else, and says which it does not find. The
argument is the generated schema module (it lies in ai-edge-litert); only its tables and names are used. One file for each runtime, of the
oldest version that ``edgeprune/devices/setup/runtime_pins.yaml`` may put on a board.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from datetime import datetime, timezone
from typing import Any

import flatbuffers

MOST_VERSIONS = 20
NO_BUILT_IN = ("CUSTOM", "DELEGATE")


def main() -> None:
    """Print the table as JSON."""
    spec = importlib.util.spec_from_file_location("schema", sys.argv[1])
    if spec is None or spec.loader is None:
        raise SystemExit(f"{sys.argv[1]} is no Python module")
    schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(schema)
    runtime, package, interpreter = _runtime()
    version = importlib.metadata.version(package)
    names = {
        k: v
        for k, v in vars(schema.BuiltinOperator).items()
        if isinstance(v, int) and k not in NO_BUILT_IN
    }
    versions = {}
    for name, code in sorted(names.items()):
        known = [v for v in range(1, MOST_VERSIONS + 1) if _loads(interpreter, schema, code, v)]
        if known:
            versions[name] = max(known)
    table = {
        "runtime": runtime,
        "version": version,
        "source": f"{package} {version} for {platform.system()} on {platform.machine()}, asked operator by operator",
        "asked_on": datetime.now(timezone.utc).date().isoformat(),
        "most": versions,
    }
    json.dump(table, sys.stdout, indent=1)
    sys.stdout.write("\n")


def _runtime() -> tuple[str, str, Any]:
    """Its name in a target, its package, its interpreter."""
    for name, module, package in (
        ("tflite-runtime", "tflite_runtime.interpreter", "tflite-runtime"),
        ("litert", "ai_edge_litert.interpreter", "ai-edge-litert"),
    ):
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        return name, package, found.Interpreter
    raise SystemExit("no TFLite runtime is installed here")


def _loads(interpreter: Any, schema: Any, code: int, version: int) -> bool:
    model, graph, entry = schema.ModelT(), schema.SubGraphT(), schema.OperatorCodeT()
    entry.builtinCode, entry.deprecatedBuiltinCode = code, min(code, 127)
    entry.version = version
    graph.tensors, graph.inputs, graph.outputs, graph.operators = [], [], [], []
    model.version, model.operatorCodes, model.subgraphs = 3, [entry], [graph]
    model.buffers = [schema.BufferT()]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    try:
        interpreter(model_content=bytes(builder.Output()))
    except ValueError as error:
        if "Didn't find op" in str(error) or "out of range" in str(error):
            return False
        raise
    return True


if __name__ == "__main__":
    main()

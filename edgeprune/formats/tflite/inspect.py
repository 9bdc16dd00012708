"""What happens inside a .tflite file: the values of its tensors, the ranges it quantises them in, the versions its operators need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgeprune.errors import MissingTool
from edgeprune.formats.tflite.graph import (
    DTYPES,
    WEIGHT,
    code_name,
    is_constant,
    is_quantized,
    op_name,
    read_model,
    text,
)
from edgeprune.formats.tflite.versions import oldest

FLOAT = 0


def activations(content: bytes, x: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """The float tensors of a file that are no constants, sample by sample; ``x`` is in the file's layout."""
    try:
        from ai_edge_litert import interpreter as litert
    except ImportError as error:
        raise MissingTool("ai-edge-litert", "tflite") from error
    model = read_model(content)
    graph = model.subgraphs[0]
    wanted = {
        number: text(tensor.name)
        for number, tensor in enumerate(graph.tensors)
        if tensor.type == FLOAT and not is_constant(model, tensor)
    }
    runner = litert.Interpreter(
        model_content=content,
        experimental_preserve_all_tensors=True,
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    runner.allocate_tensors()
    entry = runner.get_input_details()[0]["index"]
    for i in range(len(x)):
        runner.set_tensor(entry, np.ascontiguousarray(x[i : i + 1]))
        runner.invoke()
        yield {name: runner.get_tensor(number) for number, name in wanted.items()}


def ranges(content: bytes) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of every quantised activation."""
    model = read_model(content)
    found: dict[str, tuple[float, float]] = {}
    for tensor in model.subgraphs[0].tensors:
        if is_constant(model, tensor) or not is_quantized(tensor) or tensor.type not in DTYPES:
            continue
        limits = np.iinfo(DTYPES[tensor.type])
        scale, zero = float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])
        # An input or output that the quantiser put behind a conversion keeps the float tensor's name with this ending.
        name = text(tensor.name).removesuffix("_quantized")
        ends = ((int(limits.min) - zero) * scale, (int(limits.max) - zero) * scale)
        found.setdefault(name, ends)
    return found


def layer_of(model: Any, op: Any) -> str:
    """The torch layer of an operator: the one whose weights it reads, else the one its output is named after."""
    tensors = model.subgraphs[0].tensors
    for index in op.inputs[1:]:
        name = text(tensors[index].name) if index >= 0 else ""
        if name.endswith(f"/{WEIGHT}"):
            return name.removesuffix(f"/{WEIGHT}")
    layer, _, operation = text(tensors[op.outputs[0]].name).rpartition("/")
    return layer if operation else ""


def readers(content: bytes) -> dict[str, tuple[str, str, tuple[str, ...]]]:
    """Operator type, torch layer and inputs of every tensor that an operator writes."""
    model = read_model(content)
    tensors = model.subgraphs[0].tensors
    found: dict[str, tuple[str, str, tuple[str, ...]]] = {}
    for op in model.subgraphs[0].operators:
        inputs = [int(i) for i in op.inputs if i >= 0 and not is_constant(model, tensors[i])]
        names = tuple(text(tensors[i].name) for i in inputs)
        facts = (op_name(model, op), layer_of(model, op), names)
        found |= {text(tensors[i].name): facts for i in op.outputs}
    return found


def check_versions(content: bytes, runtime: str) -> None:
    """Raise unless the oldest supported version of a runtime can load every operator of a file.

    Args:
        content: a ``.tflite`` file.
        runtime: its name in a target; one without a table needs no check.

    Raises:
        FormatError: the file's schema, or an operator in its version, is newer; names both.
    """
    table = oldest(runtime)
    if table is None:
        return
    model = read_model(content)
    # A runtime looks up every code of the file, used or not.
    codes = [(code_name(code), int(code.version)) for code in model.operatorCodes]
    table.check(model.version, codes)

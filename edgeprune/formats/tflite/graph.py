"""TFLite flatbuffers as plain objects: read, check, write.

The schema classes are those of ai-edge-litert. Buffers that a writer placed behind the flatbuffer (``offset`` and ``size`` instead of
``data``) are brought inside on reading, so that every later step sees one form.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from edgeprune.errors import FormatError, MissingTool

# TensorType of the TFLite schema -> numpy dtype
DTYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    2: np.dtype(np.int32),
    3: np.dtype(np.uint8),
    4: np.dtype(np.int64),
    6: np.dtype(np.bool_),
    7: np.dtype(np.int16),
    9: np.dtype(np.int8),
}
WEIGHT = "weight"  # last part of the name of a layer's weights


def schema() -> Any:
    """The generated schema module.

    Raises:
        MissingTool: ai-edge-litert is not installed.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise MissingTool("ai-edge-litert", "tflite") from error
    return schema_py_generated


def read_model(content: bytes) -> Any:
    """The object tree of a ``.tflite`` file, with every reference in it checked.

    Raises:
        FormatError: not a TFLite file, a damaged one, or one with several subgraphs.
    """
    if content[4:8] != b"TFL3":
        raise FormatError("not a TFLite file: the identifier TFL3 is missing")
    reader = schema().ModelT
    try:
        model = reader.InitFromPackedBuf(bytearray(content), 0)
        graphs = model.subgraphs
        if len(graphs) != 1:
            raise FormatError(f"a TFLite file must have 1 subgraph, but has {len(graphs)}")
        for buffer in model.buffers:
            if buffer.data is None and buffer.offset > 1:
                start, end = buffer.offset, buffer.offset + buffer.size
                if end > len(content):
                    raise FormatError(f"a damaged TFLite file: a buffer ends at byte {end}")
                buffer.data = np.frombuffer(content[start:end], np.uint8)
            buffer.offset = buffer.size = 0
        sound = _references_exist(model)
    except FormatError:
        raise
    except (
        Exception
    ) as error:  # the generated reader fails in many ways on bytes that are no tables
        raise FormatError(f"a damaged TFLite file: {type(error).__name__} on reading it") from error
    if not sound:
        raise FormatError(
            "a damaged TFLite file: it refers to tensors or buffers that are not there"
        )
    return model


def _references_exist(model: Any) -> bool:
    graph = model.subgraphs[0]
    n_tensors = len(graph.tensors)
    used = [int(i) for op in graph.operators for i in op.inputs if i != -1]
    used += [int(i) for op in graph.operators for i in op.outputs]
    used += [int(i) for i in [*graph.inputs, *graph.outputs]]
    for signature in model.signatureDefs or []:
        used += [int(entry.tensorIndex) for entry in [*signature.inputs, *signature.outputs]]
    codes = all(0 <= op.opcodeIndex < len(model.operatorCodes) for op in graph.operators)
    buffers = all(0 <= t.buffer < len(model.buffers) for t in graph.tensors)
    return codes and buffers and all(0 <= i < n_tensors for i in used)


def write_model(model: Any) -> bytes:
    """The bytes of an object tree."""
    import flatbuffers

    size = sum(0 if b.data is None else len(b.data) for b in model.buffers)
    builder = flatbuffers.Builder(size + 65536)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def op_name(model: Any, operator: Any) -> str:
    """The built-in operator's name, such as ``CONV_2D``."""
    return code_name(model.operatorCodes[operator.opcodeIndex])


def code_name(code: Any) -> str:
    """The name of the built-in operator that a code of a file stands for."""
    builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
    names = {v: k for k, v in vars(schema().BuiltinOperator).items() if isinstance(v, int)}
    return str(names.get(builtin, f"OP_{builtin}"))


def operator_code(model: Any, name: str) -> int:
    """The number of a built-in operator among a model's codes; it is added, to a new list, where the model has none."""
    names = [code_name(code) for code in model.operatorCodes]
    if name in names:
        return names.index(name)
    number = getattr(schema().BuiltinOperator, name)
    fresh = schema().OperatorCodeT()
    fresh.builtinCode, fresh.deprecatedBuiltinCode, fresh.version = number, min(number, 127), 1
    model.operatorCodes = [*model.operatorCodes, fresh]
    return len(model.operatorCodes) - 1


def is_constant(model: Any, tensor: Any) -> bool:
    """Whether the tensor's values stand in the file."""
    data = model.buffers[tensor.buffer].data
    return tensor.buffer != 0 and data is not None and len(data) > 0


def constant_value(model: Any, tensor: Any) -> np.ndarray:
    """The values of a constant tensor, in its shape.

    Raises:
        FormatError: a dtype that edgeprune does not rewrite.
    """
    if tensor.type not in DTYPES:
        raise FormatError(f"constant {text(tensor.name)} has the unknown tensor type {tensor.type}")
    raw = np.asarray(model.buffers[tensor.buffer].data, np.uint8).tobytes()
    return np.frombuffer(raw, DTYPES[tensor.type]).reshape(shape_of(tensor))


def text(name: bytes | str | None) -> str:
    """A tensor's name as text."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else (name or "")


def shape_of(tensor: Any) -> tuple[int, ...]:
    """A tensor's dimensions; ``()`` for a scalar."""
    return () if tensor.shape is None else tuple(int(d) for d in tensor.shape)


def buffer_like(buffer: Any, value: np.ndarray) -> Any:
    """A copy of a buffer that holds ``value``."""
    fresh = copy.copy(buffer)
    fresh.data = np.frombuffer(value.tobytes(), np.uint8)
    return fresh


def unshare_constants(model: Any) -> None:
    """Give every use of a constant its own tensor and buffer, in place.

    Converters share equal constants (two zero biases of one width); at other widths they are no longer equal.
    """
    graph = model.subgraphs[0]
    seen: set[int] = set()
    for operator in graph.operators:
        inputs = list(operator.inputs)
        for slot, index in enumerate(inputs):
            if index < 0 or not is_constant(model, graph.tensors[index]):
                continue
            tensor = copy.copy(graph.tensors[index])
            if index in seen:
                graph.tensors.append(tensor)
                inputs[slot] = len(graph.tensors) - 1
            else:
                graph.tensors[index] = tensor
            buffer = copy.copy(model.buffers[tensor.buffer])
            model.buffers.append(buffer)
            tensor.buffer = len(model.buffers) - 1
            tensor.quantization = copy.copy(tensor.quantization)
            seen.add(index)
        operator.inputs = np.asarray(inputs, np.int32)


def is_quantized(tensor: Any) -> bool:
    """Whether a tensor has scales: a quantised bias of a few channels is no list of dimensions."""
    quantization = tensor.quantization
    scale = None if quantization is None else quantization.scale
    return scale is not None and len(scale) > 0

"""TFLite flatbuffers as plain objects: read, write, change widths, cut out single kernels.

The schema classes are those of ai-edge-litert. Buffers that a writer placed behind the flatbuffer (``offset`` and ``size`` instead of
``data``) are brought inside on reading, so that every later step sees one form.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeprune.errors import FormatError, MissingTool
from edgeprune.formats import Kernel
from edgeprune.formats._resize import WidthDecoder, WidthRule

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
SHAPE_VALUE_LIMIT = 16  # constants with at most this many integers may hold dimensions


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
    """The object tree of a ``.tflite`` file.

    Raises:
        FormatError: not a TFLite file, or one with several subgraphs.
    """
    if content[4:8] != b"TFL3":
        raise FormatError("not a TFLite file: the identifier TFL3 is missing")
    model = schema().ModelT.InitFromPackedBuf(bytearray(content), 0)
    if len(model.subgraphs) != 1:
        raise FormatError(f"a TFLite file must have 1 subgraph, but has {len(model.subgraphs)}")
    for buffer in model.buffers:
        if buffer.data is None and buffer.offset > 1:
            start, end = buffer.offset, buffer.offset + buffer.size
            buffer.data = np.frombuffer(content[start:end], np.uint8)
        buffer.offset = buffer.size = 0
    return model


def write_model(model: Any) -> bytes:
    """The bytes of an object tree."""
    import flatbuffers

    size = sum(0 if b.data is None else len(b.data) for b in model.buffers)
    builder = flatbuffers.Builder(size + 65536)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def op_name(model: Any, operator: Any) -> str:
    """The built-in operator's name, such as ``CONV_2D``."""
    code = model.operatorCodes[operator.opcodeIndex]
    builtin = max(code.builtinCode, code.deprecatedBuiltinCode)
    names = {v: k for k, v in vars(schema().BuiltinOperator).items() if isinstance(v, int)}
    return str(names.get(builtin, f"OP_{builtin}"))


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
    shape = () if tensor.shape is None else tuple(int(d) for d in tensor.shape)
    return np.frombuffer(raw, DTYPES[tensor.type]).reshape(shape)


def text(name: bytes | str | None) -> str:
    """A tensor's name as text."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else (name or "")


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


def _option_values(options: Any) -> dict[str, Any]:
    return {} if options is None else dict(vars(options))


@dataclass(frozen=True)
class _OpRules:
    """How one operator's tensors follow the widths."""

    shapes: dict[int, tuple[WidthRule, ...]]  # tensor index -> rule per dimension
    values: dict[int, tuple[WidthRule, ...]]  # small integer constants that hold dimensions
    options: dict[str, tuple[WidthRule, ...]]  # option name -> rule per entry


class TfliteResizable:
    """A TFLite file that can be written at any widths. See :class:`edgeprune.formats.Resizable`.

    Args:
        dense: bytes of the dense export.
        variant: bytes of the export at other widths.
        decoder: tells which group a changed dimension belongs to.
        layer_names: text that occurs in tensor names -> torch layer path.

    Raises:
        FormatError: the two files are not one graph at two widths.
    """

    def __init__(
        self, dense: bytes, variant: bytes, decoder: WidthDecoder, layer_names: Mapping[str, str]
    ) -> None:
        self._full = decoder.full
        self._model = read_model(dense)
        other = read_model(variant)
        unshare_constants(self._model)
        unshare_constants(other)
        ours, theirs = self._model.subgraphs[0], other.subgraphs[0]
        sequence = [op_name(self._model, op) for op in ours.operators]
        if sequence != [op_name(other, op) for op in theirs.operators]:
            raise FormatError("the dense and the narrower export are not the same graph")
        self._rules = [
            self._op_rules(op, peer, other, decoder, name)
            for op, peer, name in zip(ours.operators, theirs.operators, sequence, strict=True)
        ]
        self._shape_rules: dict[int, tuple[WidthRule, ...]] = {}
        for rules in self._rules:
            self._shape_rules.update(rules.shapes)
        self._units = _fuse_padding(self._model)
        self.kernels = tuple(
            self._describe(index, unit, layer_names) for index, unit in enumerate(self._units)
        )

    def _op_rules(
        self, op: Any, peer: Any, other: Any, decoder: WidthDecoder, name: str
    ) -> _OpRules:
        ours, theirs = self._model.subgraphs[0].tensors, other.subgraphs[0].tensors
        shapes: dict[int, tuple[WidthRule, ...]] = {}
        values: dict[int, tuple[WidthRule, ...]] = {}
        pairs = [*zip(op.inputs, peer.inputs, strict=True)]
        pairs += [*zip(op.outputs, peer.outputs, strict=True)]
        for mine, yours in pairs:
            if mine < 0:
                continue
            a, b = ours[mine], theirs[yours]
            where = f"{name} tensor {text(a.name)[-60:]}"
            shapes[int(mine)] = _dimension_rules(a.shape, b.shape, decoder, where)
            if is_constant(self._model, a) and DTYPES.get(a.type, np.dtype(bool)).kind == "i":
                x, y = constant_value(self._model, a), constant_value(other, b)
                if x.size == y.size <= SHAPE_VALUE_LIMIT and _unquantized(a):
                    values[int(mine)] = _dimension_rules(x.ravel(), y.ravel(), decoder, where)
        options: dict[str, tuple[WidthRule, ...]] = {}
        mine_options = _option_values(op.builtinOptions)
        for key, yours_value in _option_values(peer.builtinOptions).items():
            x, y = np.atleast_1d(mine_options[key]), np.atleast_1d(yours_value)
            if x.dtype.kind == "i" and x.size == y.size and (x != y).any():
                options[key] = _dimension_rules(x, y, decoder, f"{name} option {key}")
        return _OpRules(shapes, values, options)

    def _describe(self, index: int, unit: Sequence[int], layer_names: Mapping[str, str]) -> Kernel:
        graph = self._model.subgraphs[0]
        main = graph.operators[unit[-1]]
        name = op_name(self._model, main)
        variables: list[str] = []
        slots: list[str] = []
        for op_index in unit:
            op = graph.operators[op_index]
            rules = self._rules[op_index]
            for tensor_index in [*op.inputs, *op.outputs]:
                if tensor_index < 0:
                    continue
                tensor = graph.tensors[tensor_index]
                dims = []
                for rule in rules.shapes[int(tensor_index)]:
                    for group in rule.groups():
                        if group not in variables:
                            variables.append(group)
                    terms = "+".join(f"{f}*v{variables.index(g)}" for g, f in rule.terms)
                    dims.append(terms or str(rule.constant))
                slots.append(f"{tensor.type}[{','.join(dims)}]")
            slots.append(_options_text(op, rules))
        torch_layer = self._torch_layer(unit, layer_names)
        first = graph.operators[unit[0]]
        return Kernel(
            index=index,
            name=torch_layer or f"{name.lower()}_{index}",
            op=name,
            layer=torch_layer,
            signature="|".join([*(op_name(self._model, graph.operators[i]) for i in unit), *slots]),
            variables=tuple(variables),
            input_shape=tuple(int(d) for d in graph.tensors[first.inputs[0]].shape),
            output_shape=tuple(int(d) for d in graph.tensors[main.outputs[0]].shape),
        )

    def _torch_layer(self, unit: Sequence[int], layer_names: Mapping[str, str]) -> str:
        graph = self._model.subgraphs[0]
        main = graph.operators[unit[-1]]
        constants = [
            i for i in main.inputs if i >= 0 and is_constant(self._model, graph.tensors[i])
        ]
        for index in [*constants, *main.outputs]:
            name = text(graph.tensors[index].name)
            found = [key for key in layer_names if f"{key};" in name or f"{key}/" in name]
            if found and (constants or len(found) == 1):
                return layer_names[max(found, key=len)]
        return ""

    def resized(self, widths: Mapping[str, int]) -> bytes:
        """The whole file at these widths."""
        model = copy.copy(self._model)
        model.buffers = list(self._model.buffers)
        model.subgraphs = [self._subgraph(model, range(len(self._rules)), widths)]
        return write_model(model)

    def kernel(self, index: int, widths: Mapping[str, int]) -> bytes:
        """A file with only kernel ``index``: its activations are the file's inputs and outputs."""
        model = copy.copy(self._model)
        model.buffers = list(self._model.buffers)
        graph = self._subgraph(model, self._units[index], widths)
        produced = {int(i) for op in graph.operators for i in op.outputs}
        used = [int(i) for op in graph.operators for i in op.inputs if i >= 0]
        inputs = [i for i in used if i not in produced and not is_constant(model, graph.tensors[i])]
        kept = sorted({*used, *produced})
        position = {old: new for new, old in enumerate(kept)}
        for op in graph.operators:
            op.inputs = np.asarray([position.get(int(i), -1) for i in op.inputs], np.int32)
            op.outputs = np.asarray([position[int(i)] for i in op.outputs], np.int32)
        graph.inputs = np.asarray([position[i] for i in dict.fromkeys(inputs)], np.int32)
        graph.outputs = graph.operators[-1].outputs
        graph.tensors = [copy.copy(graph.tensors[i]) for i in kept]
        buffers = [self._model.buffers[0]]
        for number, tensor in enumerate(graph.tensors):
            tensor.name = f"t{number}"  # the converter's names are paths of hundreds of characters
            if is_constant(model, tensor):
                buffers.append(model.buffers[tensor.buffer])
                tensor.buffer = len(buffers) - 1
            else:
                tensor.buffer = 0
        model.buffers, model.subgraphs = buffers, [graph]
        model.signatureDefs, model.metadata, model.metadataBuffer = None, None, None
        return write_model(model)

    def _subgraph(self, model: Any, ops: Sequence[int] | range, widths: Mapping[str, int]) -> Any:
        graph = copy.copy(self._model.subgraphs[0])
        graph.tensors = list(graph.tensors)
        done: set[int] = set()
        for op_index in ops:
            for tensor_index, rules in self._rules[op_index].shapes.items():
                if tensor_index not in done:
                    shape = tuple(rule.at(widths, self._full) for rule in rules)
                    graph.tensors[tensor_index] = _resize_tensor(
                        model, graph.tensors[tensor_index], shape
                    )
                    done.add(tensor_index)
            for tensor_index, rules in self._rules[op_index].values.items():
                values = [
                    rule.at(widths, self._full) if rule.terms else rule.constant for rule in rules
                ]
                _set_values(model, graph.tensors[tensor_index], values)
        operators = [copy.copy(graph.operators[i]) for i in ops]
        for op, op_index in zip(operators, ops, strict=True):
            if self._rules[op_index].options:
                op.builtinOptions = copy.copy(op.builtinOptions)
                for key, rules in self._rules[op_index].options.items():
                    found = [rule.at(widths, self._full) for rule in rules]
                    scalar = np.ndim(getattr(op.builtinOptions, key)) == 0
                    setattr(
                        op.builtinOptions, key, found[0] if scalar else np.asarray(found, np.int32)
                    )
        graph.operators = operators
        return graph


def _dimension_rules(
    dense: Any, variant: Any, decoder: WidthDecoder, where: str
) -> tuple[WidthRule, ...]:
    a = [] if dense is None else [int(d) for d in dense]
    b = [] if variant is None else [int(d) for d in variant]
    if len(a) != len(b):
        raise FormatError(f"{where}: {len(a)} dimensions in one export, {len(b)} in the other")
    return tuple(
        decoder.rule(x, y, where=where) if x > 0 else WidthRule(x)
        for x, y in zip(a, b, strict=True)
    )


def _resize_tensor(model: Any, tensor: Any, shape: tuple[int, ...]) -> Any:
    """A copy of the tensor at a new shape; a constant keeps its leading entries."""
    old = () if tensor.shape is None else tuple(int(d) for d in tensor.shape)
    if shape == old:
        return tensor
    tensor = copy.copy(tensor)
    if is_constant(model, tensor):
        value = constant_value(model, tensor)
        if any(new > was for new, was in zip(shape, old, strict=True)):
            raise FormatError(f"{text(tensor.name)[-60:]} cannot grow from {old} to {shape}")
        sliced = np.ascontiguousarray(value[tuple(slice(0, n) for n in shape)])
        model.buffers.append(_buffer_like(model.buffers[tensor.buffer], sliced))
        tensor.buffer = len(model.buffers) - 1
    tensor.shape = np.asarray(shape, np.int32)
    quantization = tensor.quantization
    if quantization is not None and quantization.scale is not None and len(quantization.scale) > 1:
        quantization = copy.copy(quantization)
        n = shape[quantization.quantizedDimension]
        quantization.scale = quantization.scale[:n]
        if quantization.zeroPoint is not None:
            quantization.zeroPoint = quantization.zeroPoint[:n]
        tensor.quantization = quantization
    return tensor


def _set_values(model: Any, tensor: Any, values: Sequence[int]) -> None:
    dtype = DTYPES[tensor.type]
    model.buffers[tensor.buffer] = _buffer_like(
        model.buffers[tensor.buffer], np.asarray(values, dtype)
    )


def _buffer_like(buffer: Any, value: np.ndarray) -> Any:
    fresh = copy.copy(buffer)
    fresh.data = np.frombuffer(value.tobytes(), np.uint8)
    return fresh


def _options_text(op: Any, rules: _OpRules) -> str:
    values = _option_values(op.builtinOptions)
    parts = []
    for key, value in sorted(values.items()):
        shown: object = "follows" if key in rules.options else value
        parts.append(f"{key}={shown.tolist() if isinstance(shown, np.ndarray) else shown}")
    return ",".join(parts)


def _fuse_padding(model: Any) -> list[list[int]]:
    """Operators that the runtime runs as one: a PAD joins the convolution that alone reads it (XNNPACK fuses the two)."""
    graph = model.subgraphs[0]
    readers: dict[int, list[int]] = {}
    for index, op in enumerate(graph.operators):
        for tensor in op.inputs:
            readers.setdefault(int(tensor), []).append(index)
    joined: dict[int, int] = {}
    for index, op in enumerate(graph.operators):
        users = readers.get(int(op.outputs[0]), [])
        if op_name(model, op) == "PAD" and len(users) == 1:
            consumer = graph.operators[users[0]]
            if op_name(model, consumer) in ("CONV_2D", "DEPTHWISE_CONV_2D"):
                joined[users[0]] = index
    absorbed = set(joined.values())
    return [
        [joined[i], i] if i in joined else [i]
        for i in range(len(graph.operators))
        if i not in absorbed
    ]


def _unquantized(tensor: Any) -> bool:
    """Whether a tensor is plain integers: a quantised bias of a few channels is no list of dimensions."""
    quantization = tensor.quantization
    return quantization is None or quantization.scale is None or len(quantization.scale) == 0

"""TFLite files at other channel widths, and the single kernels in them.

Works on the flatbuffer's objects alone: weights are cut to their leading channels, and shapes, shape constants and options are set, so a
file at new widths costs milliseconds instead of a conversion.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from edgeprune.errors import FormatError
from edgeprune.formats import Kernel
from edgeprune.formats.shared.branches import Bypass
from edgeprune.formats.shared.widths import (
    Place,
    Rules,
    WidthDecoder,
    WidthRule,
    kind_and_roles,
    slots,
    touched_by,
)
from edgeprune.formats.tflite.blocks import bypassed, find_bypasses
from edgeprune.formats.tflite.graph import (
    DTYPES,
    WEIGHT,
    buffer_like,
    constant_value,
    is_constant,
    is_quantized,
    op_name,
    shape_of,
    text,
    write_model,
)
from edgeprune.formats.tflite.links import Twins, both_sides, find_links
from edgeprune.formats.tflite.tensor_names import drop_unused

WEIGHTED = frozenset({"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"})
SHAPE_VALUE_LIMIT = 16  # constants with at most this many integers may hold dimensions


class TfliteResizable:
    """A TFLite file that can be written at any widths. See :class:`edgeprune.formats.Resizable`.

    Args:
        dense: bytes of the dense export.
        variant: bytes of the export at other widths.
        decoder: tells which group a changed dimension belongs to.
        layers: paths of the torch model's leaf modules.

    Raises:
        FormatError: the two files are not one graph at two widths, or a dimension fits no group, or several.
    """

    def __init__(
        self, dense: bytes, variant: bytes, decoder: WidthDecoder, layers: Collection[str]
    ) -> None:
        self._full = decoder.full
        twins = Twins(dense, variant)
        self._model = twins.dense
        sizes = {place: twins.sizes(i) for i, place in twins.places.items()}
        values = {
            Place("values", i, place.name): v
            for i, place in twins.places.items()
            if (v := _held(twins, i))
        }
        options = {
            Place(key, n, name): pairs
            for n, (name, op, peer) in enumerate(twins.operators)
            for key, pairs in _changed_options(op, peer, name).items()
        }
        found = find_links(twins, decoder, {**sizes, **values, **options}).solve()
        self._shapes = {i: found[place] for i, place in twins.places.items()}
        self._values = {place.number: found[place] for place in values}
        self._options: list[dict[str, Rules]] = [{} for _ in twins.operators]
        for place in options:
            self._options[place.number][place.kind] = found[place]
        self._units = _fuse_padding(self._model)
        self.kernels = tuple(_named(self._describe(layers)))
        self._bypasses = find_bypasses(self._model, touched_by(self._rules()))
        self.blocks: Mapping[str, frozenset[int]] = {
            group: frozenset(
                i for i, u in enumerate(self._units) if u[-1] in bypass.gone | bypass.changed.keys()
            )
            for group, bypass in self._bypasses.items()
        }

    def _rules(self) -> Iterator[tuple[int, WidthRule]]:
        """What the tensors and options of each operator follow."""
        for index, op in enumerate(self._model.subgraphs[0].operators):
            tensors = [self._shapes[i] for i in both_sides(op) if i >= 0]
            followed = [*tensors, *self._options[index].values()]
            yield from ((index, rule) for rules in followed for rule in rules)

    def _describe(self, layers: Collection[str]) -> Iterator[tuple[Kernel, str]]:
        graph = self._model.subgraphs[0]
        for index, unit in enumerate(self._units):
            variables: list[str] = []
            parts = [op_name(self._model, graph.operators[i]) for i in unit]
            for i in unit:
                parts.extend(self._slots(i, variables))
            first, main = graph.operators[unit[0]], graph.operators[unit[-1]]
            output = graph.tensors[main.outputs[0]]
            own = [text(graph.tensors[i].name).rpartition("/") for i in main.inputs if i >= 0]
            scopes = [scope for scope, _, role in own if role.startswith(WEIGHT)]
            scopes.append(text(output.name).rpartition("/")[0])
            layer = next((scope for scope in scopes if scope in layers), "")
            op = op_name(self._model, main)
            given = [i for i in main.inputs if i >= 0]
            held = [i for i in given if is_constant(self._model, graph.tensors[i])]
            weights = self._shapes[held[0]] if held and op in WEIGHTED else ()
            kind, roles = kind_and_roles(
                op,
                variables,
                [self._shapes[i] for i in given if i not in held],
                [self._shapes[i] for i in main.outputs],
                weights,
                weights[1:-1],
            )
            kernel = Kernel(
                index=index,
                name=layer or text(output.name),
                op=op,
                layer=layer,
                signature="|".join(parts),
                variables=tuple(variables),
                input_shape=shape_of(graph.tensors[first.inputs[0]]),
                output_shape=shape_of(output),
                kind=kind,
                roles=roles,
            )
            yield kernel, text(output.name)

    def _slots(self, op_index: int, variables: list[str]) -> Iterator[str]:
        graph = self._model.subgraphs[0]
        op = graph.operators[op_index]
        for index in both_sides(op):
            if index >= 0:
                dims = slots(self._shapes[index], variables)
                held = slots(self._values.get(index, ()), variables)
                yield f"{graph.tensors[index].type}[{dims}]" + (f"=({held})" if held else "")
        options = []
        for key, value in sorted(_option_values(op).items()):
            follows = self._options[op_index].get(key)
            shown = value.tolist() if isinstance(value, np.ndarray) else value
            options.append(f"{key}={slots(follows, variables) if follows else shown}")
        yield ",".join(options)

    def resized(self, widths: Mapping[str, int]) -> bytes:
        """The whole file at these widths (groups not named keep their full width); width 0 leaves the group's block out.

        Raises:
            FormatError: a width is larger than the dense one, gives no whole dimension, or is 0 without a block.
        """
        model = self._copy()
        bypass: Bypass[int] = Bypass.of(self._bypasses, widths)
        ops = [i for i in range(len(self._options)) if i not in bypass.gone]
        graph = self._subgraph(model, ops, widths, bypass)
        graph.tensors = [copy.copy(tensor) for tensor in graph.tensors]
        if bypass.gone:
            model.subgraphs, model.metadata = [graph], None
            model.signatureDefs = copy.deepcopy(model.signatureDefs)
            drop_unused(model)
        return _packed(model, graph)

    def kernel(self, index: int, widths: Mapping[str, int]) -> bytes:
        """A file with only kernel ``index``: its activations are the file's inputs and outputs.

        Raises:
            FormatError: as :meth:`resized`.
        """
        model = self._copy()
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
        for number, tensor in enumerate(graph.tensors):
            tensor.name = f"t{number}"
        model.signatureDefs = None
        return _packed(model, graph)

    def _copy(self) -> Any:
        model = copy.copy(self._model)
        model.buffers = list(self._model.buffers)
        return model

    def _subgraph(
        self,
        model: Any,
        ops: Iterable[int],
        widths: Mapping[str, int],
        bypass: Bypass[int] | None = None,
    ) -> Any:
        """The graph with only these operators, its tensors at new widths; new buffers go to ``model``."""
        graph = copy.copy(self._model.subgraphs[0])
        graph.tensors = list(graph.tensors)
        operators = []
        done: set[int] = set()
        for op_index in ops:
            op = copy.copy(graph.operators[op_index])
            if bypass is not None:
                op = bypassed(model, op, op_index, bypass)
            self._set_options(op, self._options[op_index], widths)
            operators.append(op)
            for index in sorted({i for i in both_sides(op) if i >= 0} - done):
                shape = tuple(rule.at(widths, self._full) for rule in self._shapes[index])
                tensor = _resize_tensor(model, graph.tensors[index], shape)
                if index in self._values:
                    found = [rule.at(widths, self._full) for rule in self._values[index]]
                    tensor = copy.copy(tensor)
                    value = np.asarray(found, DTYPES[tensor.type])
                    model.buffers.append(buffer_like(model.buffers[tensor.buffer], value))
                    tensor.buffer = len(model.buffers) - 1
                graph.tensors[index] = tensor
                done.add(index)
        graph.operators = operators
        return graph

    def _set_options(self, op: Any, rules: Mapping[str, Rules], widths: Mapping[str, int]) -> None:
        if rules:
            op.builtinOptions = copy.copy(op.builtinOptions)
        for key, follows in rules.items():
            found = [rule.at(widths, self._full) for rule in follows]
            scalar = np.ndim(getattr(op.builtinOptions, key)) == 0
            setattr(op.builtinOptions, key, found[0] if scalar else np.asarray(found, np.int32))


def _packed(model: Any, graph: Any) -> bytes:
    """The bytes of a model with this graph, and with no buffer that nothing reads."""
    buffers = [model.buffers[0]]
    for tensor in graph.tensors:
        held = is_constant(model, tensor)
        if held:
            buffers.append(model.buffers[tensor.buffer])
        tensor.buffer = len(buffers) - 1 if held else 0
    model.buffers, model.subgraphs = buffers, [graph]
    model.metadata, model.metadataBuffer = None, None
    return write_model(model)


def _named(kernels: Iterable[tuple[Kernel, str]]) -> Iterator[Kernel]:
    """Kernels with names of their own: a layer that runs twice is told apart by its output tensor."""
    taken: set[str] = set()
    for kernel, output in kernels:
        choices = [kernel.name, output, f"{output}#{kernel.index}"]
        name = next(n for n in choices if n not in taken)
        taken.add(name)
        yield Kernel(**{**vars(kernel), "name": name})


def _held(twins: Twins, index: int) -> list[tuple[int, int]]:
    """Both values of every entry of an integer constant that holds dimensions; empty where it follows its shape alone.

    Raises:
        FormatError: its values change with the widths, and are no dimensions.
    """
    tensor = twins.pair(index)[0]
    whole = DTYPES.get(tensor.type, np.dtype(bool)).kind == "i" and not is_quantized(tensor)
    if not whole or not is_constant(twins.dense, tensor):
        return []
    mine, yours = twins.values(index)
    leading = mine[tuple(slice(0, n) for n in yours.shape)]
    if np.array_equal(leading, yours):
        return []
    if mine.shape != yours.shape or mine.size > SHAPE_VALUE_LIMIT:
        raise FormatError(
            f"{twins.places[index]}: its {mine.size} integers differ, and are no dimensions"
        )
    return [*zip(mine.ravel().tolist(), yours.ravel().tolist(), strict=True)]


def _changed_options(op: Any, peer: Any, name: str) -> dict[str, list[tuple[int, int]]]:
    """Both values of the integer options that differ; any other difference is refused."""
    mine, yours = _option_values(op), _option_values(peer)
    if mine.keys() != yours.keys():
        raise FormatError(f"a {name} has other options in the two exports")
    changed: dict[str, list[tuple[int, int]]] = {}
    for key, value in mine.items():
        a, b = np.atleast_1d(value), np.atleast_1d(yours[key])
        if np.array_equal(a, b):
            continue
        if a.dtype.kind != "i" or b.dtype.kind != "i" or a.shape != b.shape:
            raise FormatError(f"{name}: option {key} differs, and is no dimension")
        changed[key] = [*zip(a.tolist(), b.tolist(), strict=True)]
    return changed


def _option_values(op: Any) -> dict[str, Any]:
    return {} if op.builtinOptions is None else dict(vars(op.builtinOptions))


def _resize_tensor(model: Any, tensor: Any, shape: tuple[int, ...]) -> Any:
    """A copy of the tensor at a new shape; a constant keeps its leading entries."""
    old = shape_of(tensor)
    if shape == old:
        return tensor
    if any(new > was for new, was in zip(shape, old, strict=True)):
        raise FormatError(f"{text(tensor.name)} cannot grow from {old} to {shape}")
    tensor = copy.copy(tensor)
    if is_constant(model, tensor):
        value = constant_value(model, tensor)[tuple(slice(0, n) for n in shape)]
        model.buffers.append(buffer_like(model.buffers[tensor.buffer], value))
        tensor.buffer = len(model.buffers) - 1
    tensor.shape = np.asarray(shape, np.int32)
    if is_quantized(tensor) and len(tensor.quantization.scale) > 1:
        tensor.quantization = quantization = copy.copy(tensor.quantization)
        n = shape[quantization.quantizedDimension]
        for field in ("scale", "zeroPoint", "min", "max"):
            values = getattr(quantization, field)
            setattr(quantization, field, None if values is None else values[:n])
    return tensor


def _fuse_padding(model: Any) -> list[list[int]]:
    """Operators that the runtime runs as one: a PAD joins the convolution that alone reads it (XNNPACK fuses the two)."""
    graph = model.subgraphs[0]
    readers: dict[int, list[int]] = {int(i): [-1] for i in graph.outputs}
    for index, op in enumerate(graph.operators):
        for tensor in op.inputs:
            readers.setdefault(int(tensor), []).append(index)
    joined: dict[int, int] = {}
    for index, op in enumerate(graph.operators):
        users = readers.get(int(op.outputs[0]), [])
        if op_name(model, op) == "PAD" and len(users) == 1 and users[0] >= 0:
            consumer = graph.operators[users[0]]
            if op_name(model, consumer) in ("CONV_2D", "DEPTHWISE_CONV_2D"):
                joined[users[0]] = index
    absorbed = set(joined.values())
    units = [[joined[i], i] if i in joined else [i] for i in range(len(graph.operators))]
    return [unit for unit in units if unit[-1] not in absorbed]

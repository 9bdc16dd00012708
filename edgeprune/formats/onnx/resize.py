"""ONNX files at other channel widths, and the single kernels in them.

Works on the protobuf alone: the weights are cut to their leading channels, and shape constants and attributes are set, so a file at new
widths costs milliseconds instead of an export. A *unit* is what onnxruntime runs as one kernel: an operator with the activation behind it,
and in an INT8 file with the DequantizeLinear nodes in front of it and the QuantizeLinear behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgeprune.errors import FormatError
from edgeprune.formats import Kernel
from edgeprune.formats.onnx.blocks import find_bypasses
from edgeprune.formats.onnx.links import (
    DEQUANTIZE,
    QUANTIZE,
    VIEWS,
    GraphView,
    find_links,
    onnx_package,
)
from edgeprune.formats.shared.branches import Bypass
from edgeprune.formats.shared.widths import (
    Pair,
    Place,
    Rules,
    WidthDecoder,
    WidthRule,
    kind_and_roles,
    slots,
    touched_by,
)

SHAPE_VALUE_LIMIT = 16  # int64 constants with at most this many entries may hold dimensions
WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})
ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu"})


def encode(model: Any) -> bytes:
    """The bytes of a model, equal for equal models."""
    return bytes(model.SerializeToString(deterministic=True))


@dataclass
class Unit:
    """Nodes that run as one kernel; ``main`` is the operator, ``nodes`` are indices in file order."""

    main: int
    nodes: list[int]
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def find_units(graph: GraphView) -> list[Unit]:
    """The kernels of a file, in order; views (Reshape and the like) move no data and are left out."""
    producer = {o: i for i, node in enumerate(graph.nodes) for o in node.output if o}
    readers: dict[str, list[int]] = {o.name: [-1] for o in graph.model.graph.output}
    for index, node in enumerate(graph.nodes):
        for name in node.input:
            readers.setdefault(name, []).append(index)

    def op(index: int) -> str:
        return str(graph.nodes[index].op_type) if index >= 0 else ""

    def sole_reader(name: str, ops: Collection[str]) -> int | None:
        users = readers.get(name, [])
        return users[0] if len(users) == 1 and op(users[0]) in ops else None

    units: list[Unit] = []
    covered: set[int] = set()
    for index, node in enumerate(graph.nodes):
        if node.op_type in (QUANTIZE, DEQUANTIZE) or index in covered:
            continue
        members = [index]
        follower = sole_reader(node.output[0], ACTIVATIONS) if len(node.output) == 1 else None
        if follower is not None and node.op_type not in VIEWS:
            members.append(follower)
        before = {producer[n] for i in members for n in graph.nodes[i].input if n in producer}
        last = graph.nodes[members[-1]]
        after = {sole_reader(name, (QUANTIZE,)) for name in last.output} - {None}
        members += [i for i in before if op(i) == DEQUANTIZE] + [i for i in after if i is not None]
        covered.update(members)
        if node.op_type not in VIEWS:
            units.append(Unit(index, sorted(set(members))))
    for index in range(len(graph.nodes)):
        if op(index) in (QUANTIZE, DEQUANTIZE) and index not in covered:
            units.append(Unit(index, [index]))
    for unit in units:
        _find_borders(graph, unit, producer)
    return sorted(units, key=lambda unit: unit.main)


def _find_borders(graph: GraphView, unit: Unit, producer: Mapping[str, int]) -> None:
    """Fill in the activations that enter and leave a unit, in the order of the main operator's inputs."""
    inside = set(unit.nodes)
    read = {name for i in unit.nodes for name in graph.nodes[i].input}
    ordered = [unit.main, *(i for i in unit.nodes if i != unit.main)]
    for index in ordered:
        for name in graph.nodes[index].input:
            source = producer.get(name)
            if source in inside and graph.nodes[source].op_type == DEQUANTIZE:
                name = graph.nodes[source].input[0]
            entering = name and producer.get(name) not in inside and name not in graph.constants
            if entering and name not in unit.inputs:
                unit.inputs.append(name)
    unit.outputs = [n for i in unit.nodes for n in graph.nodes[i].output if n and n not in read]


class OnnxResizable:
    """An ONNX file that can be written at any widths. See :class:`edgeprune.formats.Resizable`.

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
        self._graph, other = GraphView.read(dense), GraphView.read(variant)
        self._full = decoder.full
        twins = _pair_tensors(self._graph, other)
        places = {name: Place("tensor", 0, name) for name in twins}
        sizes = {
            places[name]: _sizes(self._graph, other, name, twin) for name, twin in twins.items()
        }
        values = {
            Place("values", 0, n): v
            for n, twin in twins.items()
            if (v := _held(self._graph, other, n, twin))
        }
        attributes = {
            Place(key, number, f"{node.op_type} {node.name}"): pairs
            for number, (node, peer) in enumerate(zip(self._graph.nodes, other.nodes, strict=True))
            for key, pairs in _changed_attributes(node, peer).items()
        }
        found = find_links(self._graph, decoder, {**sizes, **values, **attributes}).solve()
        self._shapes = {name: found[place] for name, place in places.items()}
        self._values = {place.name: found[place] for place in values}
        self._attributes: list[dict[str, Rules]] = [{} for _ in self._graph.nodes]
        for place in attributes:
            self._attributes[place.number][place.kind] = found[place]
        self._units = find_units(self._graph)
        self.kernels: tuple[Kernel, ...] = tuple(
            self._describe(index, unit, layers) for index, unit in enumerate(self._units)
        )
        self._bypasses = find_bypasses(self._graph, touched_by(self._rules()))
        self.blocks: Mapping[str, frozenset[int]] = {
            group: frozenset(i for i, unit in enumerate(self._units) if unit.main in bypass.gone)
            for group, bypass in self._bypasses.items()
        }

    def _rules(self) -> Iterator[tuple[int, WidthRule]]:
        """What the tensors and attributes of each node follow."""
        for index, node in enumerate(self._graph.nodes):
            names = [n for n in [*node.input, *node.output] if n]
            followed = [*(self._shapes[n] for n in names), *self._attributes[index].values()]
            yield from ((index, rule) for rules in followed for rule in rules)

    def resized(self, widths: Mapping[str, int]) -> bytes:
        """The whole file at these widths (groups not named keep their full width); width 0 leaves the group's block out.

        Raises:
            FormatError: a width is larger than the dense one, gives no whole dimension, or is 0 without a block.
        """
        graph = self._graph.model.graph
        inputs, outputs = [v.name for v in graph.input], [v.name for v in graph.output]
        bypass: Bypass[str] = Bypass.of(self._bypasses, widths)
        nodes = [i for i in range(len(self._graph.nodes)) if i not in bypass.gone]
        return self._write(nodes, inputs, outputs, widths, bypass)

    def kernel(self, index: int, widths: Mapping[str, int]) -> bytes:
        """A file with only kernel ``index``: its activations, quantised or float, are the file's inputs and outputs.

        Raises:
            FormatError: as :meth:`resized`.
        """
        unit = self._units[index]
        return self._write(unit.nodes, unit.inputs, unit.outputs, widths)

    def _write(
        self,
        node_indices: Iterable[int],
        inputs: Sequence[str],
        outputs: Sequence[str],
        widths: Mapping[str, int],
        bypass: Bypass[str] | None = None,
    ) -> bytes:
        onnx = onnx_package()
        source = self._graph.model
        model = onnx.ModelProto(ir_version=source.ir_version, producer_name=source.producer_name)
        model.opset_import.extend(source.opset_import)
        graph = model.graph
        graph.name = source.graph.name
        used: dict[str, None] = {}
        for index in node_indices:
            node = graph.node.add()
            node.CopyFrom(self._graph.nodes[index])
            if bypass is not None:
                node.input[:] = [bypass.read(name) for name in node.input]
            for attribute in node.attribute:
                self._set_attribute(attribute, self._attributes[index], widths)
            used.update(dict.fromkeys(n for n in node.input if n in self._graph.constants))
        for name in used:
            graph.initializer.append(self._constant(name, widths))
        for names, field_ in ((inputs, graph.input), (outputs, graph.output)):
            for name in names:
                kind = self._graph.tensors[name][0]
                shape = [rule.at(widths, self._full) for rule in self._shapes[name]]
                field_.append(onnx.helper.make_tensor_value_info(name, kind, shape))
        return encode(model)

    def _set_attribute(
        self, attribute: Any, rules: Mapping[str, Rules], widths: Mapping[str, int]
    ) -> None:
        if attribute.name not in rules:
            return
        values = [rule.at(widths, self._full) for rule in rules[attribute.name]]
        if attribute.ints:
            attribute.ints[:] = values
        else:
            attribute.i = values[0]

    def _constant(self, name: str, widths: Mapping[str, int]) -> Any:
        value = self._graph.constants[name]
        shape = tuple(rule.at(widths, self._full) for rule in self._shapes[name])
        if any(new > was for new, was in zip(shape, value.shape, strict=True)):
            raise FormatError(f"{name} cannot grow from {value.shape} to {shape}")
        value = value[tuple(slice(0, n) for n in shape)]
        if name in self._values:
            fresh = [rule.at(widths, self._full) for rule in self._values[name]]
            value = np.asarray(fresh, np.int64).reshape(shape)
        tensor = onnx_package().TensorProto(name=name, data_type=self._graph.tensors[name][0])
        tensor.dims.extend(shape)
        tensor.raw_data = value.tobytes()
        return tensor

    def _describe(self, index: int, unit: Unit, layers: Collection[str]) -> Kernel:
        graph = self._graph
        main = graph.nodes[unit.main]
        constants = [n for i in unit.nodes for n in graph.nodes[i].input if n in graph.constants]
        names = [*unit.inputs, *unit.outputs, *constants]
        variables: list[str] = []
        parts = [graph.nodes[i].op_type for i in unit.nodes]
        for name in names:
            dims = slots(self._shapes[name], variables)
            held = slots(self._values.get(name, ()), variables)
            parts.append(f"{graph.tensors[name][0]}[{dims}]" + (f"=({held})" if held else ""))
        for i in unit.nodes:
            parts.append(_attribute_text(graph.nodes[i], self._attributes[i], variables))
        scope = str(main.name).rpartition("/")[0]
        layer = scope if scope in layers else ""
        weighted = main.op_type in WEIGHTED and len(main.input) > 1
        weights = self._shapes[main.input[1]] if weighted else ()
        kind, roles = kind_and_roles(
            str(main.op_type),
            variables,
            [self._shapes[n] for n in unit.inputs],
            [self._shapes[n] for n in unit.outputs],
            weights,
            weights[2:],
        )
        return Kernel(
            index=index,
            name=layer or str(main.name) or f"{main.op_type.lower()}_{index}",
            op=str(main.op_type),
            layer=layer,
            signature="|".join(parts),
            variables=tuple(variables),
            input_shape=graph.dimensions(unit.inputs[0]) if unit.inputs else (),
            output_shape=graph.dimensions(unit.outputs[0]),
            kind=kind,
            roles=roles,
        )


def _pair_tensors(dense: GraphView, variant: GraphView) -> dict[str, str]:
    """Tensor names of the dense file -> names of the same tensors in the variant, by their place in the graph."""
    if [(n.domain, n.op_type) for n in dense.nodes] != [
        (n.domain, n.op_type) for n in variant.nodes
    ]:
        raise FormatError(
            "the dense and the narrower export must be the same graph, "
            f"but have other operators ({len(dense.nodes)} and {len(variant.nodes)} nodes)"
        )
    twins: dict[str, str] = {}
    pairs = [*zip(dense.model.graph.input, variant.model.graph.input)]
    named = [(a.name, b.name) for a, b in pairs]
    for node, peer in zip(dense.nodes, variant.nodes, strict=True):
        mine, yours = [*node.input, *node.output], [*peer.input, *peer.output]
        if len(node.input) != len(peer.input) or len(mine) != len(yours):
            raise FormatError(f"{node.op_type} {node.name} has other inputs in the two exports")
        named += [*zip(mine, yours, strict=True)]
    for name, twin in named:
        same_kind = (name in dense.constants) == (twin in variant.constants)
        if twins.setdefault(name, twin) != twin or bool(name) != bool(twin) or not same_kind:
            raise FormatError(f"tensor {name or twin} is wired differently in the two exports")
    twins.pop("", None)
    return twins


def _sizes(dense: GraphView, variant: GraphView, name: str, twin: str) -> list[Pair]:
    mine, yours = dense.dimensions(name), variant.dimensions(twin)
    if len(mine) != len(yours):
        raise FormatError(f"tensor {name} has {len(mine)} or {len(yours)} dimensions")
    return [*zip(mine, yours, strict=True)]


def _held(dense: GraphView, variant: GraphView, name: str, twin: str) -> list[Pair]:
    """Both values of every entry of an integer constant that holds dimensions; empty where it follows its shape alone."""
    mine, yours = dense.constants.get(name), variant.constants.get(twin)
    if mine is None or yours is None or mine.dtype != np.int64:
        return []
    if np.array_equal(mine[tuple(slice(0, n) for n in yours.shape)], yours):
        return []
    if mine.shape != yours.shape or mine.size > SHAPE_VALUE_LIMIT:
        raise FormatError(f"constant {name}: its {mine.size} integers are too many for a shape")
    return [*zip(mine.ravel().tolist(), yours.ravel().tolist(), strict=True)]


def _changed_attributes(node: Any, peer: Any) -> dict[str, list[Pair]]:
    """Both values of the integer attributes that differ (``group`` of a depthwise convolution); any other difference is refused."""
    mine, yours = {a.name: a for a in node.attribute}, {a.name: a for a in peer.attribute}
    where = f"{node.op_type} {node.name}"
    if mine.keys() != yours.keys():
        raise FormatError(f"{where} has other attributes in the two exports")
    changed: dict[str, list[Pair]] = {}
    integers = (2, 7)  # AttributeProto.INT and .INTS
    for name, a in mine.items():
        b = yours[name]
        if a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True):
            continue
        if a.type != b.type or a.type not in integers or len(a.ints) != len(b.ints):
            raise FormatError(f"{where}: attribute {name} differs, and is no dimension")
        changed[name] = [*zip(a.ints, b.ints, strict=True)] if a.ints else [(a.i, b.i)]
    return changed


def _attribute_text(node: Any, rules: Mapping[str, Rules], variables: list[str]) -> str:
    shown = []
    for attribute in sorted(node.attribute, key=lambda a: str(a.name)):
        fixed = attribute.SerializeToString(deterministic=True).hex()
        follows = rules.get(attribute.name)
        shown.append(f"{attribute.name}={slots(follows, variables) if follows else fixed}")
    return ";".join(shown)

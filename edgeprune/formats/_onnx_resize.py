"""ONNX files at other channel widths, and the single kernels in them.

Works on the protobuf alone: the weights are cut to their leading channels, and shape constants and attributes are set, so a file at new
widths costs milliseconds instead of an export. A *unit* is what onnxruntime runs as one kernel: an operator with the activation behind it,
and in an INT8 file with the DequantizeLinear nodes in front of it and the QuantizeLinear behind it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from edgeprune.errors import FormatError, MissingTool
from edgeprune.formats import Kernel
from edgeprune.formats._resize import WidthDecoder, WidthRule

SHAPE_VALUE_LIMIT = 16  # int64 constants with at most this many entries may hold dimensions
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})  # move no data
ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu"})
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"

Rules = tuple[WidthRule, ...]


def onnx_package() -> Any:
    """The ``onnx`` package.

    Raises:
        MissingTool: it is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingTool("onnx", "onnx") from error
    return onnx


def parse_model(content: bytes) -> Any:
    """The protobuf of a model file.

    Raises:
        FormatError: the bytes are no ONNX model.
    """
    onnx = onnx_package()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:
        raise FormatError("not an ONNX model: the protobuf cannot be read") from error
    if not model.graph.node:
        raise FormatError("not an ONNX model: its graph has no nodes")
    return model


def encode(model: Any) -> bytes:
    """The bytes of a model, equal for equal models."""
    return bytes(model.SerializeToString(deterministic=True))


@dataclass(frozen=True)
class GraphView:
    """A parsed file: nodes, constants by name, and ``(element type, dimensions)`` of every tensor."""

    model: Any
    nodes: tuple[Any, ...]
    constants: dict[str, np.ndarray]
    tensors: dict[str, tuple[int, tuple[int, ...]]]

    @classmethod
    def read(cls, content: bytes) -> GraphView:
        """Parse a file and infer all shapes once.

        Raises:
            FormatError: no ONNX model, or one whose shapes are not static.
        """
        onnx = onnx_package()
        model = parse_model(content)
        tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
        constants: dict[str, np.ndarray] = {}
        for item in model.graph.initializer:
            constants[item.name] = onnx.numpy_helper.to_array(item)
            tensors[item.name] = (item.data_type, tuple(item.dims))
        try:
            graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
        except Exception as error:
            raise FormatError(f"onnx could not infer the shapes: {str(error)[:200]}") from error
        for value in [*graph.input, *graph.value_info, *graph.output]:
            kind = value.type.tensor_type
            if any(not d.HasField("dim_value") for d in kind.shape.dim):
                raise FormatError(f"tensor {value.name} must have a static shape")
            tensors[value.name] = (kind.elem_type, tuple(d.dim_value for d in kind.shape.dim))
        return cls(model, tuple(model.graph.node), constants, tensors)

    def dimensions(self, name: str) -> tuple[int, ...]:
        """Dimensions of a tensor.

        Raises:
            FormatError: shape inference gave none.
        """
        if name not in self.tensors:
            raise FormatError(f"the shape of tensor {name} is not known")
        return self.tensors[name][1]


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


class PairDecoder:
    """Finds the rule of a dimension that is ``dense`` in one file and ``variant`` in the other.

    A dimension follows one group, or one concatenation that stands in the graph, times or divided by a whole number (a flattened
    ``C * H * W``, a grouped convolution). Sums are learned from the Concat nodes instead of guessed from all sums of groups.

    Args:
        decoder: the group widths in both files, already checked to have distinct ratios.
    """

    def __init__(self, decoder: WidthDecoder) -> None:
        self._known: dict[tuple[int, int], list[WidthRule]] = {}
        for group, width in decoder.full.items():
            rule = WidthRule(width, ((group, Fraction(1)),))
            self._known[width, decoder.changed[group]] = [rule]

    def learn(self, dense: int, variant: int, parts: Sequence[WidthRule]) -> None:
        """Remember that a concatenation of ``parts`` has these sizes."""
        factors: dict[str, Fraction] = {}
        for group, factor in (term for part in parts for term in part.terms):
            factors[group] = factors.get(group, Fraction(0)) + factor
        rule = WidthRule(dense, tuple(factors.items()))
        self._known.setdefault((dense, variant), []).append(rule)

    def rule(self, dense: int, variant: int, *, where: str) -> WidthRule:
        """The only rule that fits.

        Raises:
            FormatError: none fits, or several do; names ``where``.
        """
        if dense == variant:
            return WidthRule(dense)
        found: dict[frozenset[tuple[str, Fraction]], WidthRule] = {}  # a + b and b + a are one
        for (a, b), rules in self._known.items():
            factor = Fraction(dense, a)
            if dense * b == variant * a and 1 in (factor.numerator, factor.denominator):
                for rule in rules:
                    terms = tuple((group, f * factor) for group, f in rule.terms)
                    found.setdefault(frozenset(terms), WidthRule(dense, terms))
        if len(found) != 1:
            fits = [" + ".join(rule.groups()) for rule in found.values()]
            problem = f"could follow {' or '.join(fits)}" if fits else "fits no channel group"
            raise FormatError(f"{where}: the dimension {dense} -> {variant} {problem}")
        return next(iter(found.values()))


def _learn_concatenations(
    dense: GraphView, variant: GraphView, twins: Mapping[str, str], decoder: PairDecoder
) -> None:
    for node in dense.nodes:
        if node.op_type != "Concat":
            continue
        axis = next(a.i for a in node.attribute if a.name == "axis")
        names = [*node.input, node.output[0]]
        sizes = [
            (dense.dimensions(name)[axis], variant.dimensions(twins[name])[axis]) for name in names
        ]
        where = f"Concat {node.name}"
        parts = [decoder.rule(a, b, where=where) for a, b in sizes[:-1]]
        if any(part.terms for part in parts):
            if not all(part.terms for part in parts):
                raise FormatError(
                    f"{where} joins channels that are pruned with channels that are not, "
                    "which a file of other widths cannot express yet"
                )
            decoder.learn(*sizes[-1], parts)


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
        pairs = PairDecoder(decoder)
        _learn_concatenations(self._graph, other, twins, pairs)
        self._shapes: dict[str, Rules] = {}
        self._values: dict[str, Rules] = {}
        for name, twin in twins.items():
            mine, yours = self._graph.dimensions(name), other.dimensions(twin)
            self._shapes[name] = _rules(mine, yours, pairs, f"tensor {name}")
            values = self._graph.constants.get(name)
            if values is not None and values.dtype == np.int64 and mine == yours:
                both = values.ravel(), other.constants[twin].ravel()
                self._values[name] = _value_rules(*both, pairs, f"constant {name}")
        self._attributes = [
            _attribute_rules(node, peer, pairs)
            for node, peer in zip(self._graph.nodes, other.nodes, strict=True)
        ]
        self._units = find_units(self._graph)
        self.kernels: tuple[Kernel, ...] = tuple(
            self._describe(index, unit, layers) for index, unit in enumerate(self._units)
        )

    def resized(self, widths: Mapping[str, int]) -> bytes:
        """The whole file at these widths (groups not named keep their full width).

        Raises:
            FormatError: a width is larger than the dense one, or gives no whole dimension.
        """
        graph = self._graph.model.graph
        inputs, outputs = [v.name for v in graph.input], [v.name for v in graph.output]
        return self._write(range(len(self._graph.nodes)), inputs, outputs, widths)

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
            dims = _slots(self._shapes[name], variables)
            held = _slots(self._values.get(name, ()), variables)
            parts.append(f"{graph.tensors[name][0]}[{dims}]" + (f"=({held})" if held else ""))
        for i in unit.nodes:
            parts.append(_attribute_text(graph.nodes[i], self._attributes[i], variables))
        scope = str(main.name).rpartition("/")[0]
        layer = scope if scope in layers else ""
        return Kernel(
            index=index,
            name=layer or str(main.name) or f"{main.op_type.lower()}_{index}",
            op=str(main.op_type),
            layer=layer,
            signature="|".join(parts),
            variables=tuple(variables),
            input_shape=graph.dimensions(unit.inputs[0]) if unit.inputs else (),
            output_shape=graph.dimensions(unit.outputs[0]),
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


def _rules(dense: Sequence[int], variant: Sequence[int], decoder: PairDecoder, where: str) -> Rules:
    if len(dense) != len(variant):
        raise FormatError(f"{where} has {len(dense)} or {len(variant)} dimensions")
    return tuple(
        decoder.rule(int(a), int(b), where=where) for a, b in zip(dense, variant, strict=True)
    )


def _value_rules(dense: np.ndarray, variant: np.ndarray, decoder: PairDecoder, where: str) -> Rules:
    if (dense != variant).any() and dense.size > SHAPE_VALUE_LIMIT:
        raise FormatError(f"{where}: {dense.size} integers are too many for a shape")
    return _rules(dense.tolist(), variant.tolist(), decoder, where)


def _attribute_rules(node: Any, peer: Any, decoder: PairDecoder) -> dict[str, Rules]:
    """Rules of the integer attributes that differ (``group`` of a depthwise convolution); any other difference is refused."""
    mine, yours = {a.name: a for a in node.attribute}, {a.name: a for a in peer.attribute}
    where = f"{node.op_type} {node.name}"
    if mine.keys() != yours.keys():
        raise FormatError(f"{where} has other attributes in the two exports")
    rules: dict[str, Rules] = {}
    integers = (2, 7)  # AttributeProto.INT and .INTS
    for name, a in mine.items():
        b = yours[name]
        if a.SerializeToString(deterministic=True) == b.SerializeToString(deterministic=True):
            continue
        if a.type != b.type or a.type not in integers:
            raise FormatError(f"{where}: attribute {name} differs, and is no dimension")
        values = (list(a.ints), list(b.ints)) if a.ints else ([a.i], [b.i])
        rules[name] = _rules(*values, decoder, f"{where} attribute {name}")
    return rules


def _slots(rules: Rules, variables: list[str]) -> str:
    """Dimensions as text with groups replaced by their position in ``variables``, which grows."""
    shown = []
    for rule in rules:
        for group in rule.groups():
            if group not in variables:
                variables.append(group)
        terms = "+".join(f"{f}*v{variables.index(g)}" for g, f in rule.terms)
        shown.append(terms or str(rule.constant))
    return ",".join(shown)


def _attribute_text(node: Any, rules: Mapping[str, Rules], variables: list[str]) -> str:
    shown = []
    for attribute in sorted(node.attribute, key=lambda a: str(a.name)):
        if attribute.name in rules:
            text = _slots(rules[attribute.name], variables)
        else:
            text = attribute.SerializeToString(deterministic=True).hex()
        shown.append(f"{attribute.name}={text}")
    return ";".join(shown)

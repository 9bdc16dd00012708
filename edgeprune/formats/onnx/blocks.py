"""Residual blocks in ONNX graphs: how a file is written without one, and additions of zero that stand for a removed one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from edgeprune.formats.onnx.links import DEQUANTIZE, QUANTIZE, GraphView, onnx_package
from edgeprune.formats.shared.branches import Branch, Bypass, Graph, Step, branch_of


def find_bypasses(
    view: GraphView, touched: Mapping[str, Collection[int]]
) -> dict[str, Bypass[str]]:
    """For each channel group whose operators all lie in one residual branch: how to leave the branch out; one bypass a branch.

    The quantised sum is read as the quantised skip: right for timing, while its scale is the sum's. A Relu behind the sum goes too where
    the skip comes out of a Relu, for then it changes nothing.

    Args:
        view: the dense file.
        touched: group -> nodes that change with its width.
    """
    fixed, constants = _constant_nodes(view)
    steps = [
        Step(tuple(n for n in node.input if n and n not in constants), tuple(node.output))
        for node in view.nodes
    ]
    graph = Graph(steps, {value.name for value in view.model.graph.output})
    adds = {i for i, node in enumerate(view.nodes) if node.op_type == "Add"}
    plain = {n.output[0]: n.input[0] for n in view.nodes if n.op_type == DEQUANTIZE}
    branches = graph.branches(adds, plain)
    found = {group: branch_of(branches, {*nodes} - fixed) for group, nodes in touched.items()}
    made = {b: _bypass(view, graph, b) for b in dict.fromkeys(found.values()) if b is not None}
    for bypass in made.values():
        read = {n for i in bypass.gone for n in view.nodes[i].input}
        bypass.gone |= {i for i in fixed if read.issuperset(view.nodes[i].output)}
    return {group: made[branch] for group, branch in found.items() if branch is not None}


def _constant_nodes(view: GraphView) -> tuple[set[int], set[str]]:
    """Nodes that read constants alone (a weight that is dequantised), and all constants with what these write."""
    nodes: set[int] = set()
    names = set(view.constants)
    for index, node in enumerate(view.nodes):
        if all(name in names for name in node.input if name):
            nodes.add(index)
            names.update(node.output)
    return nodes, names


def _bypass(view: GraphView, graph: Graph[str], branch: Branch[str]) -> Bypass[str]:
    def op(index: int | None) -> str:
        return "" if index is None else str(view.nodes[index].op_type)

    bypass = Bypass({*branch.steps, branch.add}, {branch.total: branch.skip})
    total = branch.total
    after = graph.sole_reader(total)
    if after is not None and op(after) == "Relu" and _is_relu(view, graph, branch.skip):
        total = str(view.nodes[after].output[0])
        if -1 in graph.readers.get(total, ()):
            return bypass
        bypass.gone.add(after)
        bypass.instead[total] = branch.skip
        after = graph.sole_reader(total)
    source = graph.maker.get(branch.skip)
    if (
        after is not None
        and op(after) == QUANTIZE
        and source is not None
        and op(source) == DEQUANTIZE
    ):
        bypass.gone.add(after)
        bypass.instead[str(view.nodes[after].output[0])] = str(view.nodes[source].input[0])
    return bypass


def _is_relu(view: GraphView, graph: Graph[str], name: str) -> bool:
    """Whether a tensor is what a Relu wrote, possibly quantised in between."""
    maker = graph.maker.get(name)
    while maker is not None and view.nodes[maker].op_type in (QUANTIZE, DEQUANTIZE):
        maker = graph.maker.get(view.nodes[maker].input[0])
    return maker is not None and view.nodes[maker].op_type == "Relu"


def drop_zero_additions(graph: Any) -> None:
    """Leave out, in place, what a removed block left: additions of constant zeros in the shape of the sum, and a Relu of a Relu.

    An addition whose sum is the model's output stays.
    """
    helper = onnx_package().numpy_helper
    zeros = {
        item.name: tuple(item.dims) for item in graph.initializer if not helper.to_array(item).any()
    }
    shapes = {
        value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in [*graph.value_info, *graph.input, *graph.output]
    }
    outputs = {value.name for value in graph.output}
    bypass: Bypass[str] = Bypass()
    relus: set[str] = set()
    for index, node in enumerate(graph.node):
        names = [bypass.read(name) for name in node.input]
        total = node.output[0]
        if node.op_type == "Add" and total not in outputs:
            rest = [n for n in names if not (n in zeros and zeros[n] == shapes.get(total))]
            if len(rest) == 1:
                bypass.gone.add(index)
                bypass.instead[total] = rest[0]
                continue
        if node.op_type == "Relu":
            if names[0] in relus and total not in outputs:
                bypass.gone.add(index)
                bypass.instead[total] = names[0]
                continue
            relus.add(total)
    if not bypass.gone:
        return
    kept = []
    for index, node in enumerate(graph.node):
        if index not in bypass.gone:
            copied = type(node).FromString(node.SerializeToString())
            copied.input[:] = [bypass.read(name) for name in node.input]
            kept.append(copied)
    del graph.node[:]
    graph.node.extend(kept)

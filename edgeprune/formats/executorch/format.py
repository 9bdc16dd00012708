"""ExecuTorch programs (``.pte``) for phones: exported by torch, quantised by torchao's PT2E, run by XNNPACK inside ExecuTorch.

A program cannot be cut to other widths; files of its twin, TFLite, are, which the same XNNPACK kernels run.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import FormatError, MissingTool
from edgeprune.formats import (
    DEFAULT_OPTIONS,
    Format,
    QuantizeOptions,
    Resizable,
    cut_in_place_of,
)
from edgeprune.formats.executorch.program import Program, read_program
from edgeprune.formats.shared.finite import explained, require_bounded
from edgeprune.formats.shared.inputs import check_calibration
from edgeprune.formats.shared.quiet import MAX_REASON, quiet
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.files import sha256_bytes, write_bytes
from edgeprune.records.formats import format_facts

if TYPE_CHECKING:
    from torch import nn

# Below these shares the file is slower than its twin, so its user is told.
FEW_DELEGATED = 0.99
FEW_INT8 = 0.9
_LEAST_INT8 = 0.5  # a file that computes less than this in 8 bits is not an INT8 file
_PRODUCTS = ("aten::convolution", "aten::linear", "aten::addmm", "aten::mm", "aten::bmm")
_WEIGHTED = ("aten.conv", "aten.linear", "aten.addmm", "aten.mm")


@dataclass(frozen=True)
class _Tools:
    """What the toolchain offers; imported late, because it takes seconds and may be missing.

    ``operators`` are those that the runtime of this machine, ``version``, has registered.
    """

    lower: Any
    config: Any
    partitioner: Any
    quantizer: Any
    scheme: Any
    prepare: Any
    convert: Any
    operators: frozenset[str]
    version: str


def _tools() -> _Tools:
    try:
        with quiet():
            import executorch.kernels.quantized  # noqa: F401  (registers its operators in the runtime)
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
                XNNPACKQuantizer,
                get_symmetric_quantization_config,
            )
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
            from executorch.runtime import Runtime

            operators = frozenset(Runtime.get().operator_registry.operator_names)
    except ImportError as error:
        raise MissingTool("executorch", "executorch") from error
    try:
        with quiet():
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    except ImportError as error:
        raise MissingTool("torchao", "executorch") from error
    return _Tools(
        to_edge_transform_and_lower,
        EdgeCompileConfig,
        XnnpackPartitioner,
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
        prepare_pt2e,
        convert_pt2e,
        operators,
        importlib.metadata.version("executorch"),
    )


class ExecutorchFormat:
    """See :class:`edgeprune.formats.Format`."""

    info = format_facts("executorch")

    def export(self, model: nn.Module, example: np.ndarray, path: Path) -> Artifact:
        """Lower the model to XNNPACK; what XNNPACK does not take runs in the portable operators, and the record says so.

        Raises:
            FormatError: the model cannot be traced or lowered, or needs an operator that the runtime lacks.
            MissingTool: ExecuTorch or torchao is not installed.
        """
        tools = _tools()
        return self._written(tools, _traced(model, example), example, path)

    def quantize(
        self,
        fp32: Path,
        calibration: np.ndarray,
        path: Path,
        *,
        model: nn.Module | None = None,
        options: QuantizeOptions = DEFAULT_OPTIONS,
    ) -> Artifact:
        """Static INT8 by PT2E: symmetric weights per output channel, asymmetric activations, ranges from the samples.

        Raises:
            FormatError: no model was given, the toolchain refused it, or most of it stayed in float.
            ModelError: a sample is not finite, or there is none.
        """
        import torch

        if model is None:
            raise FormatError(
                f"{fp32.name} cannot be quantised: ExecuTorch programs cannot be read back",
                hint="quantise the torch model that it was exported from",
            )
        if options != replace(DEFAULT_OPTIONS, io=options.io) or options.io == "int8":
            raise FormatError(
                "ExecuTorch programs take and return float, with the ranges of PT2E and no layers in float"
            )
        samples = np.ascontiguousarray(calibration, np.float32)
        check_calibration(samples, self.describe(fp32).inputs[0].shape)
        tools = _tools()
        traced = _traced(model, samples[:1])
        try:
            with quiet(), torch.no_grad():
                scheme = tools.scheme(is_per_channel=True, is_dynamic=False)
                prepared = tools.prepare(traced, tools.quantizer().set_global(scheme))
                for i in range(len(samples)):
                    prepared(torch.from_numpy(samples[i : i + 1]))
                require_bounded(prepared)
                converted = tools.convert(prepared)
        except Exception as error:
            refused = FormatError(f"torchao could not quantise the model: {_reason(error)}")
            raise explained(refused, model, samples) from error
        return self._written(tools, converted, samples[:1], path, floats=_float_layers(converted))

    def _written(
        self,
        tools: _Tools,
        traced: Any,
        example: np.ndarray,
        path: Path,
        *,
        floats: Collection[str] | None = None,
    ) -> Artifact:
        content, outside = _lowered(tools, traced, example)
        program = read_program(content)
        missing = missing_operators(program.operators, tools.operators)
        if missing:
            raise FormatError(
                f"the ExecuTorch runtime has no {_with_layers(missing, outside)}",
                hint="replace that operation, or try a target with another format",
            )
        if floats is not None and program.int8_macs < _LEAST_INT8 * program.macs:
            share = program.int8_macs / max(1, program.macs)
            # A layer that was quantised and that XNNPACK does not take computes in float too.
            named = dict.fromkeys((*floats, *(x for op in _PRODUCTS for x in outside.get(op, ()))))
            raise FormatError(
                f"only {share:.0%} of the multiply-accumulates became INT8;"
                f" in float: {', '.join(named) or 'unknown layers'}"
            )
        write_bytes(path, content)
        notes = _notes(program, outside, floats, tools.version)
        return self.describe(path).model_copy(update={"notes": notes})

    def describe(self, path: Path) -> Artifact:
        """The record of a file.

        What ``op_counts`` counts stands at :meth:`edgeprune.formats.executorch.program.Program.op_counts`.

        Raises:
            FormatError: it is no ExecuTorch program.
        """
        import struct

        content = path.read_bytes()
        try:
            program = read_program(content)
        except (ValueError, IndexError, KeyError, struct.error) as error:
            raise FormatError(f"{path.name} is not a sound ExecuTorch program: {error}") from error
        return Artifact(
            path=path.name,
            format=self.info.name,
            precision="int8" if program.int8_macs else "fp32",
            sha256=sha256_bytes(content),
            size_bytes=len(content),
            inputs=_specs("input", program.inputs),
            outputs=_specs("output", program.outputs),
            op_counts=program.op_counts(),
            operators=program.operators,
        )

    def resizable(
        self,
        dense: Path,
        variant: Path,
        full: Mapping[str, int],
        changed: Mapping[str, int],
        model: nn.Module,
    ) -> Resizable:
        """Raise: a program is not rewritten, its twin is.

        Raises:
            FormatError: always; names the twin.
        """
        raise cut_in_place_of(self.info)


def golden_file(file: Path, inputs: np.ndarray, outputs: np.ndarray) -> tuple[str, bytes]:
    """The program with its golden samples inside, which ExecuTorch's own runner compares on the phone: ``(".bpte", content)``.

    Args:
        file: the program.
        inputs: ``float32 [N, ...]``, one test case each.
        outputs: what it answers to them, ``float32 [N, K]``.

    Raises:
        MissingTool: ExecuTorch is not installed.
    """
    import torch

    try:
        with quiet():
            from executorch.devtools import BundledProgram
            from executorch.devtools.bundled_program.config import MethodTestCase, MethodTestSuite
            from executorch.devtools.bundled_program.serialize import (
                serialize_from_bundled_program_to_flatbuffer,
            )
    except ImportError as error:
        raise MissingTool("executorch", "executorch") from error
    rows = [
        (torch.from_numpy(inputs[i : i + 1].copy()), torch.from_numpy(outputs[i : i + 1].copy()))
        for i in range(len(inputs))
    ]
    cases = [MethodTestCase(inputs=[x], expected_outputs=[y]) for x, y in rows]
    with quiet():
        suite = MethodTestSuite(method_name="forward", test_cases=cases)
        bundled = BundledProgram(None, [suite], pte_file_path=str(file))
        return ".bpte", bytes(serialize_from_bundled_program_to_flatbuffer(bundled))


def missing_operators(needed: Iterable[str], available: Collection[str]) -> tuple[str, ...]:
    """Operators of a program that a runtime lacks.

    Args:
        needed: the ``operators`` of an :class:`~edgeprune.records.artifact.Artifact`.
        available: what the runtime registered: ``Runtime.get().operator_registry.operator_names`` in Python.
    """
    return tuple(sorted(set(needed) - set(available)))


def _traced(model: nn.Module, example: np.ndarray) -> Any:
    """The model as a graph of ATen operators, its global averages in the form that XNNPACK takes."""
    import torch

    from edgeprune.workload.modes import eval_copy

    sample = (torch.from_numpy(np.array(example, np.float32)),)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(eval_copy(model), sample, strict=False)
            module = program.module(check_guards=False)
            if _keep_dimensions(module):
                module = torch.export.export(module, sample, strict=False).module(
                    check_guards=False
                )
            return module
    except Exception as error:
        raise FormatError(
            f"torch could not export the model to ExecuTorch: {_reason(error)}",
            hint="replace that operation, or try a target with another format",
        ) from error


def _keep_dimensions(module: Any) -> bool:
    """Write means over height and width with kept dimensions and a reshape, in place: XNNPACK takes no other form.

    Returns:
        whether there were such means.

    Source: ``MeanDimConfig`` in ``backends/xnnpack/partition/config/generic_node_configs.py`` of ExecuTorch 1.5.1.
    """
    import torch

    aten, found = torch.ops.aten, False
    for node in [*module.graph.nodes]:
        if node.target is not aten.mean.dim or node.kwargs.get("dtype") is not None:
            continue
        shape = node.args[0].meta["val"].shape
        dims = sorted(int(d) % len(shape) for d in node.args[1])
        if len(shape) != 4 or dims != [2, 3] or (len(node.args) > 2 and node.args[2]):
            continue
        node.args = (node.args[0], [2, 3], True)
        with module.graph.inserting_after(node):
            flat = module.graph.call_function(aten.flatten.using_ints, (node, 1))
        flat.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        node.replace_all_uses_with(flat, delete_user_cb=lambda user, flat=flat: user is not flat)
        found = True
    if found:
        module.recompile()
    return found


def _lowered(tools: _Tools, traced: Any, example: np.ndarray) -> tuple[bytes, dict[str, list[str]]]:
    """The bytes of a program; and what XNNPACK did not take: operators, each with the layers it stands in."""
    import torch

    sample = (torch.from_numpy(np.array(example, np.float32)),)
    edge: Any = None
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(traced, sample, strict=False)
            edge = tools.lower(
                program,
                partitioner=[tools.partitioner()],
                compile_config=tools.config(_check_ir_validity=False),
            )
            outside = _outside(edge.exported_program().graph)
            return bytes(edge.to_executorch().buffer), outside
    except Exception as error:
        layers = {} if edge is None else _outside(edge.exported_program().graph)
        named = re.findall(r"aten::\w+", str(error))
        where = f", {_with_layers(sorted(set(named)), layers)}" if named else ""
        raise FormatError(
            f"ExecuTorch could not lower the model: {_reason(error)}{where}",
            hint="replace that operation, or try a target with another format",
        ) from error


def _outside(graph: Any) -> dict[str, list[str]]:
    """Operators that no delegate took, as ``aten::mean``, each with the layers it stands in."""
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        name = str(getattr(node.target, "_name", "") or getattr(node.target, "__name__", ""))
        if node.op != "call_function" or "::" not in name:
            continue
        operator = name.split(".")[0].replace("_copy", "")
        layers = found.setdefault(operator, [])
        layer = _layer(node)
        if layer not in layers:
            layers.append(layer)
    return found


def _layer(node: Any) -> str:
    """The module in which an operation stands; ``the model itself`` outside of any."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return (paths[-1] if paths else "") or "the model itself"


def _with_layers(operators: Iterable[str], layers: Mapping[str, list[str]]) -> str:
    parts = []
    for operator in operators:
        known = layers.get(operator.split(".")[0].replace("_copy", ""), [])
        parts.append(f"{operator} (layer {', '.join(known)})" if known else operator)
    return ", ".join(parts)


def _float_layers(converted: Any) -> list[str]:
    """Layers whose weights were left in float."""
    found = []
    for node in converted.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith(_WEIGHTED):
            weight = node.args[1]
            if "dequantize" not in str(getattr(weight, "target", "")):
                found.append(_layer(node))
    return list(dict.fromkeys(found))


def _notes(
    program: Program, outside: Mapping[str, list[str]], floats: Collection[str] | None, version: str
) -> tuple[str, ...]:
    """What the user of the file should know: which share XNNPACK runs, and what runs elsewhere; ``version`` is this machine's."""
    nodes, calls = len(program.nodes), len(program.calls)
    macs = program.delegated_macs / max(1, program.macs)
    notes = [
        f"XNNPACK runs {nodes} of {nodes + calls} operations and {macs:.0%} of the multiply-accumulates"
        " (counted; its share of the time needs ExecuTorch's profiler on the phone, and was not run)"
    ]
    if outside:
        left = "; ".join(f"{op} of {', '.join(layers)}" for op, layers in sorted(outside.items()))
        notes.append(f"outside of XNNPACK: {left}")
    if program.operators:
        notes.append(
            f"operators outside of XNNPACK were checked against those of executorch {version} on this machine,"
            " not against those of an app"
        )
    if macs < FEW_DELEGATED:
        notes.append(f"warning: {1 - macs:.0%} of the multiply-accumulates run in slow operators")
    if floats is not None:
        share = program.int8_macs / max(1, program.macs)
        if share < FEW_INT8 or floats:
            named = f", in float: {', '.join(floats)}" if floats else ""
            notes.append(f"warning: {share:.0%} of the multiply-accumulates are INT8{named}")
    return tuple(notes)


def _specs(name: str, tensors: Iterable[Any]) -> tuple[TensorSpec, ...]:
    """Tensors of the method; programs do not name them."""
    return tuple(
        TensorSpec(
            name=f"{name}_{i}",
            shape=tensor.shape,
            dtype=tensor.dtype,
            layout="NCHW" if len(tensor.shape) == 4 else "other",
        )
        for i, tensor in enumerate(tensors)
    )


def _reason(error: BaseException) -> str:
    """What went wrong, innermost cause first, with the operator that the toolchain names and the line of the model."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    said = "\n".join(str(item) for item in chain)
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    found = [(lines[0] if lines else type(chain[-1]).__name__)[:MAX_REASON]]
    if operator := re.search(r"target=torch\.ops\.([\w.]+)", said):
        found.append(f"operator {operator[1]}")
    elif code := re.search(r"in forward\n\s*(\S.*)", said):
        found.append(f"at: {code[1].strip()[:120]}")
    return ", ".join(found)


FORMAT: Format = ExecutorchFormat()

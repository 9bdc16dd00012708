"""INT8 in QDQ form by onnxruntime's own quantiser, with ranges that were found before.

Its calibrators are not used: they run all samples anew for every file, and keep what they saw of each until the last has passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from edgeprune.errors import MissingTool
from edgeprune.formats.onnx.links import onnx_package, runtime_package


@dataclass(frozen=True)
class OnnxTypes:
    """How a file is quantised: the integer type of activations, the scales of int8 weights, and options of onnxruntime's quantiser.

    ``operators`` names the operator types that are quantised; all that onnxruntime knows where it is empty.
    """

    activations: Literal["uint8", "int8"] = "uint8"
    per_channel: bool = True
    operators: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As ``U8S8 per channel``: activations first, then the weights, which are int8 always."""
        sign = "U8" if self.activations == "uint8" else "S8"
        return f"{sign}S8 {'per channel' if self.per_channel else 'per tensor'}"


def quantised(
    model: Any,
    ranges: Mapping[str, tuple[float, float]],
    types: OnnxTypes,
    float_nodes: Iterable[str],
) -> Any:
    """A parsed model in INT8.

    Args:
        model: a parsed float model; not changed.
        ranges: lowest and highest value of every float tensor that is no constant; each holds zero.
        types: the integer types, and what is quantised.
        float_nodes: names of the nodes that stay in float.

    Raises:
        MissingTool: onnxruntime is not installed.
        Exception: whatever onnxruntime raises.
    """
    runtime_package()
    try:
        import onnxruntime.quantization as tools
        from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
    except ImportError as error:
        raise MissingTool("onnxruntime", "onnx") from error

    data = {
        name: tools.TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.items()
    }
    kinds = {"uint8": tools.QuantType.QUInt8, "int8": tools.QuantType.QInt8}
    worker = tools.QDQQuantizer(
        onnx_package().shape_inference.infer_shapes(model),
        per_channel=types.per_channel,
        reduce_range=False,
        weight_qType=tools.QuantType.QInt8,
        activation_qType=kinds[types.activations],
        tensors_range=tools.TensorsData(tools.CalibrationMethod.MinMax, data),
        nodes_to_quantize=[],
        nodes_to_exclude=[*float_nodes],
        op_types_to_quantize=[*(types.operators or {**QLinearOpsRegistry, **QDQRegistry})],
        extra_options=dict(types.extra),
    )
    worker.quantize_model()
    worker.model.topological_sort()
    return worker.model.model

"""Write the sentinel models: ``python scripts/make_sentinels.py`` needs the extras ``tflite``, ``onnx`` and ``executorch``.

All files are one small convolutional net of our own, in FP32, with weights drawn from a fixed seed. It never changes: the digests are
pinned in the ``facts.yaml`` beside each, and drift is only seen against the same work. A run prints the digests that it wrote.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import numpy as np

FORMATS = Path(__file__).parents[1] / "edgeprune" / "formats"
SEED = 20261122
SIZE, CLASSES = 64, 8
# (channels in, channels out, stride) of 3x3 convolutions: 4.1 million multiply-adds, about 1 ms at the 4 GMAC/s that one
# 1.5 GHz Cortex-A72 core may reach in FP32.
CONVOLUTIONS = ((3, 16, 2), (16, 16, 1), (16, 32, 2))


def weights() -> list[np.ndarray]:
    """The kernels ``[out, in, 3, 3]`` and the classifier ``[classes, in]``, scaled so that signals keep their size."""
    rng = np.random.default_rng(SEED)
    drawn = [
        rng.standard_normal((out, into, 3, 3)) * np.sqrt(2 / (9 * into))
        for into, out, _ in CONVOLUTIONS
    ]
    last = CONVOLUTIONS[-1][1]
    drawn.append(rng.standard_normal((CLASSES, last)) * np.sqrt(1 / last))
    return [np.asarray(w, np.float32) for w in drawn]


def onnx_file() -> bytes:
    """The net as ONNX, written node by node."""
    import onnx
    from onnx import helper, numpy_helper

    *kernels, classifier = weights()
    nodes, tensors, x = [], [], "image"
    for i, (kernel, (_, _, stride)) in enumerate(zip(kernels, CONVOLUTIONS, strict=True)):
        tensors.append(numpy_helper.from_array(kernel, f"kernel{i}"))
        nodes.append(
            helper.make_node(
                "Conv", [x, f"kernel{i}"], [f"conv{i}"], name=f"conv{i}", kernel_shape=[3, 3],
                pads=[1, 1, 1, 1], strides=[stride, stride],
            )
        )  # fmt: skip
        nodes.append(helper.make_node("Relu", [f"conv{i}"], [f"relu{i}"], name=f"relu{i}"))
        x = f"relu{i}"
    nodes.append(helper.make_node("GlobalAveragePool", [x], ["pooled"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"))
    nodes.append(helper.make_node("MatMul", ["flat", "classifier"], ["classes"], name="classify"))
    tensors.append(numpy_helper.from_array(np.ascontiguousarray(classifier.T), "classifier"))
    graph = helper.make_graph(
        nodes,
        "edgeprune-sentinel",
        [helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("classes", onnx.TensorProto.FLOAT, [1, CLASSES])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def exported_file(format_name: str) -> bytes:
    """The net in a format of this project, through its own export."""
    import torch
    from torch import nn

    from edgeprune import formats

    *kernels, classifier = weights()
    layers: list[nn.Module] = []
    for into, out, stride in CONVOLUTIONS:
        layers += [nn.Conv2d(into, out, 3, stride=stride, padding=1, bias=False), nn.ReLU()]
    last = CONVOLUTIONS[-1][1]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, CLASSES, bias=False)]
    net = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for parameter, value in zip(net.parameters(), [*kernels, classifier], strict=True):
            parameter.copy_(torch.from_numpy(value))
    form = formats.load(format_name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"sentinel{form.info.suffix}"
        form.export(net, np.zeros((1, 3, SIZE, SIZE), np.float32), path)
        return path.read_bytes()


def main() -> None:
    """Write the files and print their digests."""
    files = {
        "onnx/sentinel.onnx": onnx_file(),
        "tflite/sentinel.tflite": exported_file("tflite"),
        "executorch/sentinel.pte": exported_file("executorch"),
    }
    for name, content in files.items():
        (FORMATS / name).write_bytes(content)
        print(f"{name}  {len(content)} bytes  {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()

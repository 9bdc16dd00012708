"""Tiny real classifiers and the bundles made of them: 4 x 4 colour images, 3 classes, one linear layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgeprune.bundle.manifest import Facts, Latency, Provenance, Quality, RuntimeNeed
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.files import sha256_bytes
from edgeprune.records.workload import Preprocess
from edgeprune.workload.dataset import model_input

PREPROCESS = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
LABELS = ("cat", "dog", "très loin")
SIDE, CHANNELS, CLASSES = 4, 3, 3


def images(n: int = 8, seed: int = 7) -> np.ndarray:
    """Raw images ``uint8 [n, 4, 4, 3]``."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, SIDE, SIDE, CHANNELS), dtype=np.uint8)


def weights() -> np.ndarray:
    """``float32 [3, 48]``, for features in the order C, H, W."""
    rng = np.random.default_rng(3)
    return rng.normal(size=(CLASSES, CHANNELS * SIDE * SIDE)).astype(np.float32)


def expected(raw: np.ndarray) -> np.ndarray:
    """What the fp32 classifier answers, computed here."""
    return model_input(raw, PREPROCESS).reshape(len(raw), -1) @ weights().T


def onnx_file(path: Path, *, eight_bit: bool = False) -> Artifact:
    """Write the classifier as ONNX; with ``eight_bit`` in QDQ form: int8 weights, and uint8 inputs and outputs of the layer."""
    from onnx import TensorProto, checker, helper, numpy_helper

    scale = np.float32(np.abs(weights()).max() / 127)
    nodes = [helper.make_node("Flatten", ["input"], ["flat"])]
    constants = [numpy_helper.from_array(weights(), "weight")]
    if eight_bit:
        steps = np.rint(weights() / scale).astype(np.int8)
        constants = [
            numpy_helper.from_array(steps, "steps"),
            numpy_helper.from_array(np.asarray(scale), "scale"),
            numpy_helper.from_array(np.zeros((), np.int8), "zero"),
            numpy_helper.from_array(np.asarray(0.025, np.float32), "flat_scale"),
            numpy_helper.from_array(np.asarray(0.25, np.float32), "output_scale"),
            numpy_helper.from_array(np.asarray(128, np.uint8), "middle"),
        ]
        nodes = [
            helper.make_node("QuantizeLinear", ["input", "flat_scale", "middle"], ["input_q"]),
            helper.make_node("DequantizeLinear", ["input_q", "flat_scale", "middle"], ["input_f"]),
            helper.make_node("Flatten", ["input_f"], ["flat_f"]),
            helper.make_node("QuantizeLinear", ["flat_f", "flat_scale", "middle"], ["flat_q"]),
            helper.make_node("DequantizeLinear", ["flat_q", "flat_scale", "middle"], ["flat"]),
            helper.make_node("DequantizeLinear", ["steps", "scale", "zero"], ["weight"]),
        ]
    answer = "output_f" if eight_bit else "output"
    nodes.append(helper.make_node("Gemm", ["flat", "weight"], [answer], transB=1))
    if eight_bit:
        steps_of = ["output_scale", "middle"]
        nodes.append(helper.make_node("QuantizeLinear", [answer, *steps_of], ["output_q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["output_q", *steps_of], ["output"]))
    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, CHANNELS, SIDE, SIDE])
    scores = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, CLASSES])
    graph = helper.make_graph(nodes, "linear", [image], [scores], constants)
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=9)
    checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    source = TensorSpec(name="input", shape=(1, 3, 4, 4), dtype="float32", layout="NCHW")
    result = TensorSpec(name="output", shape=(1, CLASSES), dtype="float32")
    return _artifact(path, "onnx", "int8" if eight_bit else "fp32", source, result)


def tflite_file(path: Path) -> Artifact:
    """Write the classifier as an INT8 TFLite file with INT8 input and output, layout NHWC."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    kernel = weights().reshape(CLASSES, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
    scales = {"input": 0.03, "weight": float(np.abs(kernel).max() / 127), "output": 0.25}
    steps = np.rint(kernel / scales["weight"]).astype(np.int8).reshape(CLASSES, -1)
    shapes = {"input": [1, SIDE, SIDE, CHANNELS], "weight": list(steps.shape), "output": [1, 3]}
    tensors = []
    for index, (name, shape) in enumerate(shapes.items()):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name.encode(), shape, index + 1
        tensor.type = schema.TensorType.INT8
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale, tensor.quantization.zeroPoint = [scales[name]], [0]
        tensors.append(tensor)
    operator, code = schema.OperatorT(), schema.OperatorCodeT()
    operator.inputs, operator.outputs = [0, 1, -1], [2]
    operator.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    operator.builtinOptions = schema.FullyConnectedOptionsT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    code.version = 4
    graph, model = schema.SubGraphT(), schema.ModelT()
    graph.tensors, graph.inputs, graph.outputs = tensors, [0], [2]
    graph.operators, graph.name = [operator], b"main"
    buffers = [schema.BufferT() for _ in range(4)]
    buffers[2].data = steps.reshape(-1).view(np.uint8)
    model.version, model.subgraphs, model.buffers = 3, [graph], buffers
    model.operatorCodes = [code]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    spec = {"dtype": "int8", "zero_point": 0}
    source = TensorSpec(
        name="input", shape=(1, 4, 4, 3), layout="NHWC", scale=scales["input"], **spec
    )
    result = TensorSpec(name="output", shape=(1, CLASSES), scale=scales["output"], **spec)
    return _artifact(path, "tflite", "int8", source, result)


def facts(runtime: str = "onnxruntime", **changes: object) -> Facts:
    """What the maker of the test bundles states."""
    given: dict[str, object] = {
        "name": "tiny-net",
        "edgeprune_version": "0.1.0",
        "target": "rpi4",
        "profile": "cortex-a72",
        "license": "Apache-2.0",
        "runtime": RuntimeNeed(name=runtime, min_version="1.0", threads=1),
        "preprocess": PREPROCESS,
        "labels": LABELS,
        "quality": Quality(metric="accuracy", split="test", n=1000, dense=0.91, shipped=0.905),
        "latency": Latency(
            device="this-machine",
            fingerprint_key="0123456789abcdef",
            stamp="stand-in",
            median_ms=1.5,
            p90_ms=1.75,
            limit_ms=2.0,
            budget="60%",
        ),
        "provenance": Provenance(
            seed=0,
            data_digest="d" * 16,
            model_digest="m" * 16,
            plan_digest="p" * 16,
            command="edgeprune deploy --target rpi4",
        ),
    }
    return Facts(**{**given, **changes})


def make_bundle(folder: Path, *, eight_bit: bool = False, **changes: object) -> Path:
    """A bundle of the ONNX classifier, written to ``folder``; its ``.zip`` lies beside it."""
    file = folder.with_name(folder.name + ".source.onnx")
    artifact = onnx_file(file, eight_bit=eight_bit)
    if changes.get("runtime") == "tensorrt":
        artifact = artifact.model_copy(update={"format": "tensorrt"})
    payload = Payload(
        model=artifact,
        model_file=file,
        golden_inputs=images(),
        golden_outputs=expected(images()),
        report_html=b"<!doctype html><title>report</title>",
        report_json=b"{}\n",
    )
    return write_bundle(folder, facts(**changes), payload)


def _artifact(
    path: Path, form: str, precision: str, source: TensorSpec, result: TensorSpec
) -> Artifact:
    content = path.read_bytes()
    return Artifact(
        path=path.name,
        format=form,
        precision=precision,
        sha256=sha256_bytes(content),
        size_bytes=len(content),
        inputs=(source,),
        outputs=(result,),
    )

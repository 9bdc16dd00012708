"""Model files in the runtimes that boards have: load, run, and the time of every node. Lives in a worker process."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import tempfile
import time
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

from . import coreml
from .engines import EngineModel
from .samples import realistic, sample
from .wire import Refused

RUNTIMES = {  # name on the wire: module to import, distribution that holds it
    "litert": ("ai_edge_litert.interpreter", "ai-edge-litert"),
    "tflite-runtime": ("tflite_runtime.interpreter", "tflite-runtime"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "executorch": ("executorch.runtime", "executorch"),
    "tensorrt": ("tensorrt", "tensorrt"),
}
# Numbers of element types in ExecuTorch. Source: schema/scalar_type.fbs of ExecuTorch 1.5.1.
EXECUTORCH_DTYPES = {
    0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 7: "float64", 11: "bool",
}  # fmt: skip
# How long loading one file takes at most, where that is more than reading it: TensorRT builds an engine, in two precisions.
LOAD_S = {"tensorrt": 120.0}


# Also those that edgeprune does not install.
MODULES = dict(RUNTIMES, **dict.fromkeys(coreml.UNITS, coreml.MODULE))


class TfliteModel:
    """A loaded .tflite file."""

    def __init__(self, content: bytes, runtime: str, threads: int, delegate: bool) -> None:
        module = importlib.import_module(RUNTIMES[runtime][0])
        built_in = module.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        options = {} if delegate else {"experimental_op_resolver_type": built_in}
        start = time.perf_counter_ns()
        interpreter = module.Interpreter(model_content=content, num_threads=threads, **options)
        self.load_ns = time.perf_counter_ns() - start
        interpreter.allocate_tensors()
        allocated_ns = time.perf_counter_ns() - start - self.load_ns
        details, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        self._interpreter, self._input, self._output = interpreter, details[0], outputs[0]
        self.inputs = [self._spec(detail) for detail in details]
        self.outputs = [self._spec(detail) for detail in outputs]
        for seed, (detail, spec) in enumerate(zip(details, self.inputs)):
            interpreter.set_tensor(detail["index"], realistic(spec, seed))
        self.run: Callable[[], Any] = interpreter.invoke
        self.first_ns = allocated_ns + sample(self.run, 1)
        self.placement = delegated(interpreter)

    @staticmethod
    def _spec(detail: Dict[str, Any]) -> Dict[str, Any]:
        import numpy as np

        scale, zero_point = detail["quantization"]
        return {
            "name": str(detail["name"]),
            "shape": [int(size) for size in detail["shape"]],
            "dtype": np.dtype(detail["dtype"]).name,
            "scale": float(scale) or None,
            "zero_point": int(zero_point) if scale else None,
        }

    def answer(self) -> bytes:
        """The first output for the input that is timed."""
        self.run()
        content: bytes = self._interpreter.get_tensor(self._output["index"]).tobytes()
        return content

    def call(self, x: Any) -> Any:
        """The first output for one input, in the file's own types."""
        kept = self._interpreter.get_tensor(self._input["index"])
        self._interpreter.set_tensor(self._input["index"], x)
        self.run()
        found = self._interpreter.get_tensor(self._output["index"])
        self._interpreter.set_tensor(self._input["index"], kept)
        return found


class OnnxModel:
    """A loaded .onnx file. Dimensions without a size are taken as 1."""

    def __init__(self, content: bytes, runtime: str, threads: int, delegate: bool) -> None:
        import onnxruntime  # here, so that its import is no part of the load time

        self._runtime, self._content, self._threads = onnxruntime, content, threads
        start = time.perf_counter_ns()
        self._session = self._open()
        self.load_ns = time.perf_counter_ns() - start
        self.inputs = [self._spec(tensor) for tensor in self._session.get_inputs()]
        self.outputs = [self._spec(tensor) for tensor in self._session.get_outputs()]
        self._names = [spec["name"] for spec in self.outputs]
        self._feeds = {spec["name"]: realistic(spec, i) for i, spec in enumerate(self.inputs)}
        self.run: Callable[[], Any] = partial(self._session.run, self._names, self._feeds)
        self.first_ns = sample(self.run, 1)
        self.placement = None  # its profile tells

    def _open(self, profile_prefix: str = "") -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._runtime.ExecutionMode.ORT_SEQUENTIAL
        # A waiting thread pool that spins would steal the core from the other models of the same round.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Else INT8 kernels for x86 without VNNI add in 16 bits, which saturate: outputs are then far from those of any board.
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 3
        options.enable_profiling = bool(profile_prefix)
        options.profile_file_prefix = profile_prefix
        providers = ["CPUExecutionProvider"]
        return self._runtime.InferenceSession(self._content, options, providers=providers)

    @staticmethod
    def _spec(tensor: Any) -> Dict[str, Any]:
        shape = [size if isinstance(size, int) and size > 0 else 1 for size in tensor.shape]
        dtype = tensor.type[len("tensor(") : -1]  # C names: tensor(float), tensor(int8) ...
        dtype = {"float": "float32", "double": "float64"}.get(dtype, dtype)
        return {"name": tensor.name, "shape": shape, "dtype": dtype}

    def answer(self) -> bytes:
        """The first output for the input that is timed."""
        content: bytes = self.run()[0].tobytes()
        return content

    def call(self, x: Any) -> Any:
        """The first output for one input, in the file's own types."""
        feeds = dict(self._feeds, **{self.inputs[0]["name"]: x})
        return self._session.run(self._names, feeds)[0]

    def profile(self, runs: int) -> List[Dict[str, Any]]:
        """Median time of every node over ``runs`` runs, in the order of execution; two first runs are dropped."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(os.path.join(folder, "profile"))
            for _ in range(runs + 2):
                session.run(self._names, self._feeds)
            with open(session.end_profiling(), encoding="utf-8") as stream:
                events = json.load(stream)
        taken: Dict[Tuple[str, str, str], List[int]] = {}
        for event in events:
            name, is_kernel, rest = event.get("name", "").partition("_kernel_time")
            if event.get("cat") == "Node" and is_kernel and not rest:
                facts = event.get("args", {})
                node = (name, facts.get("op_name", ""), facts.get("provider", ""))
                taken.setdefault(node, []).append(int(event["dur"]) * 1000)
        return [
            {"name": name, "op": op, "provider": provider, "ns": int(statistics.median(ns[2:]))}
            for (name, op, provider), ns in taken.items()
        ]


class ExecutorchModel:
    """A loaded .pte file, its method ``forward``. The runtime takes torch tensors, so torch is there too."""

    def __init__(self, content: bytes, runtime: str, threads: int, delegate: bool) -> None:
        if not delegate:
            raise ValueError("a program is bound to its kernels when it is exported")
        module = importlib.import_module(RUNTIMES[runtime][0])
        binding = importlib.import_module("executorch.extension.pybindings.portable_lib")
        self._torch = importlib.import_module("torch")
        # Registers operators that quantised programs may need.
        with contextlib.suppress(ImportError):
            importlib.import_module("executorch.kernels.quantized")
        if binding._threadpool_get_thread_count() != threads:
            binding._unsafe_reset_threadpool(threads)  # XNNPACK keeps the pool it finds on loading
        start = time.perf_counter_ns()
        self._program = module.Runtime.get().load_program(content)
        names = self._program.method_names
        if "forward" not in names:
            raise ValueError("the program has no method forward, but %s" % ", ".join(sorted(names)))
        method = self._program.load_method("forward")
        self.load_ns = time.perf_counter_ns() - start
        found = method.metadata
        self.inputs = [
            self._spec("input_%d" % i, found.input_tensor_meta(i))
            for i in range(found.num_inputs())
        ]
        self.outputs = [
            self._spec("output_%d" % i, found.output_tensor_meta(i))
            for i in range(found.num_outputs())
        ]
        self._execute = method.execute
        self._feeds = [self._tensor(realistic(spec, i)) for i, spec in enumerate(self.inputs)]
        self.run: Callable[[], Any] = partial(self._execute, self._feeds)
        self.first_ns = sample(self.run, 1)

    @staticmethod
    def _spec(name: str, tensor: Any) -> Dict[str, Any]:
        number = tensor.dtype()
        if number not in EXECUTORCH_DTYPES:
            raise ValueError("%s has the element type %d, which is not read here" % (name, number))
        shape = [int(size) for size in tensor.sizes()]
        return {"name": name, "shape": shape, "dtype": EXECUTORCH_DTYPES[number]}

    def _tensor(self, x: Any) -> Any:
        return self._torch.from_numpy(x)

    def answer(self) -> bytes:
        """The first output for the input that is timed."""
        content: bytes = self.run()[0].numpy().tobytes()
        return content

    def call(self, x: Any) -> Any:
        """The first output for one input, in the file's own types."""
        return self._execute([self._tensor(x), *self._feeds[1:]])[0].numpy()


MODELS = {"onnxruntime": OnnxModel, "executorch": ExecutorchModel}


def delegated(interpreter: Any) -> Any:
    """How many operators of a TFLite file a delegate took, and of how many; None where the runtime does not tell.

    A delegate's node stands for the operators between its inputs and its outputs, which stay in the list.
    """
    try:
        nodes = interpreter._get_ops_details()
    except AttributeError:
        return None
    own = [node for node in nodes if node["op_name"] != "DELEGATE"]
    maker = {int(name): at for at, node in enumerate(own) for name in node["outputs"]}
    taken = set()
    for node in nodes:
        if node["op_name"] != "DELEGATE":
            continue
        given, wanted = {int(name) for name in node["inputs"]}, [int(n) for n in node["outputs"]]
        while wanted:
            at = maker.get(wanted.pop())
            if at is not None and at not in taken:
                taken.add(at)
                wanted += [int(name) for name in own[at]["inputs"] if int(name) not in given]
    return {"operators": len(own), "delegated": len(taken)}


def open_model(
    content: bytes, runtime: str, threads: int, delegate: bool, many: bool = False
) -> Any:
    """A model that has run once; ``many`` says that it is one of many small ones, for which nothing long is tried."""
    if runtime not in MODULES:
        raise Refused("runtime", "this agent cannot run the runtime " + runtime)
    coreml.check_system(runtime)
    try:
        if runtime == "tensorrt":
            return EngineModel(content, runtime, threads, delegate, many)
        model: Any = (
            coreml.CoremlModel if runtime in coreml.UNITS else MODELS.get(runtime, TfliteModel)
        )
        return model(content, runtime, threads, delegate)
    except Refused:
        raise
    except ImportError as error:
        raise Refused("runtime", "cannot import %s: %s" % (runtime, error)) from error
    except Exception as error:  # a runtime may raise any type at a file that it dislikes
        raise Refused("load", "%s: %s" % (type(error).__name__, error)) from error


def infer(model: Any, x: Any) -> Any:
    """First output of every sample, ``float32 [N, ...]``; integer inputs and outputs are quantised and dequantised here."""
    import numpy as np

    if len(model.inputs) != 1:
        raise Refused("input", "the model must have 1 input, but has %d" % len(model.inputs))
    spec = model.inputs[0]
    if x.dtype != np.float32 or not len(x) or list(x.shape[1:]) != spec["shape"][1:]:
        given = "%s %s" % (x.dtype.name, list(x.shape))
        raise Refused(
            "input", "input must be float32 [N, *%s], got %s" % (spec["shape"][1:], given)
        )
    if not np.isfinite(x).all():
        raise Refused("input", "input must be finite")
    batch, parts = spec["shape"][0], []
    for start in range(0, len(x), batch):
        chunk = x[start : start + batch]
        missing = batch - len(chunk)
        full = np.concatenate([chunk, np.repeat(chunk[-1:], missing, axis=0)]) if missing else chunk
        y = dequantised(model.call(quantised(full, spec)), model.outputs[0])
        parts.append(y[: len(chunk)])
    return np.concatenate(parts)


def quantised(x: Any, spec: Dict[str, Any]) -> Any:
    """Float values in the type of an input tensor: nearest step, clipped."""
    import numpy as np

    dtype = np.dtype(spec["dtype"])
    if dtype.kind == "f":
        return np.ascontiguousarray(x.astype(dtype))
    if dtype.kind not in "iu" or not spec.get("scale"):
        raise Refused("input", "the input is %s without a scale" % dtype.name)
    limits = np.iinfo(dtype)
    steps = np.rint(x / np.float32(spec["scale"])) + spec["zero_point"]
    return np.clip(steps, limits.min, limits.max).astype(dtype)


def dequantised(y: Any, spec: Dict[str, Any]) -> Any:
    """Values of an output tensor as float32; integers without a scale keep their value."""
    import numpy as np

    values = np.array(y, dtype=np.float32)
    if np.asarray(y).dtype.kind not in "iu" or not spec.get("scale"):
        return values
    return (values - np.float32(spec["zero_point"])) * np.float32(spec["scale"])

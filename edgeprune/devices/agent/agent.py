"""The part of edgeprune that runs on the board: it loads model files, times them and answers over stdin and stdout.

One file, Python 3.8 or newer, standard library alone; numpy and the runtime are imported when a model needs them. The wire is the magic
line, then frames in both directions: 4 bytes header length, JSON header (at most 4 MiB), 8 bytes blob length, blob; integers big-endian.
Every request has an integer ``id`` that its reply repeats, with ``ok`` and, when that is false, ``kind`` and ``error``. The program ends
when stdin ends, even in the middle of a request, so a lost host never leaves the board busy.
"""

from __future__ import annotations

import gc
import glob
import hashlib
import io
import json
import math
import os
import platform
import queue
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any, BinaryIO, Callable, Dict, List, Tuple

MAGIC = b"\0edgeprune-agent/1\n"
MAX_HEADER_BYTES = 4 << 20
MAX_BLOB_BYTES = 1 << 30
MIN_SAMPLE_NS = (
    200_000  # a shorter call is timed several at once: the clock and the loop cost about 100 ns
)
MAX_CALLS = 100_000
RUNTIMES = {  # name on the wire: module to import, distribution that holds it
    "litert": ("ai_edge_litert.interpreter", "ai-edge-litert"),
    "tflite-runtime": ("tflite_runtime.interpreter", "tflite-runtime"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
}
ORT_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
PROBE = """
import importlib, importlib.metadata, sys
importlib.import_module(sys.argv[1])
package = sys.modules[sys.argv[1].split(".")[0]]
print(getattr(package, "__version__", None) or importlib.metadata.version(sys.argv[2]))
"""


class Refused(Exception):
    """A request that cannot be served; ``kind`` tells the host what sort of failure it is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


# The wire


def read_exactly(stream: BinaryIO, count: int) -> bytes:
    """``count`` bytes, or :class:`EOFError`."""
    parts = []
    while count:
        part = stream.read(min(count, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_frame(stream: BinaryIO) -> Tuple[Dict[str, Any], bytes]:
    """The next header and blob; a frame over the limits ends the program, since the stream cannot be trusted after it."""
    (size,) = struct.unpack(">I", read_exactly(stream, 4))
    if size > MAX_HEADER_BYTES:
        raise EOFError
    header = json.loads(read_exactly(stream, size).decode("utf-8"))
    (size,) = struct.unpack(">Q", read_exactly(stream, 8))
    if size > MAX_BLOB_BYTES:
        raise EOFError
    return header, read_exactly(stream, size)


def write_frame(stream: BinaryIO, header: Dict[str, Any], blob: bytes = b"") -> None:
    """Send one frame."""
    text = json.dumps(header, allow_nan=False).encode()
    stream.write(struct.pack(">I", len(text)) + text + struct.pack(">Q", len(blob)) + blob)
    stream.flush()


# The machine


def read_text(path: str) -> str | None:
    """A small file of /proc or /sys, or ``None`` where this board has no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(1 << 20).strip("\0\n ")
    except OSError:
        return None


def read_number(path: str) -> int | None:
    """A file of /proc or /sys that holds one integer."""
    text = read_text(path)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def cpu_fields() -> Dict[str, str]:
    """The first value of every field in /proc/cpuinfo, by lower-case name."""
    fields: Dict[str, str] = {}
    for line in (read_text("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    return fields


def memory_bytes(field: str) -> int | None:
    """One line of /proc/meminfo, in bytes."""
    for line in (read_text("/proc/meminfo") or "").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def machine_facts() -> Dict[str, Any]:
    """What identifies this machine, without naming it."""
    fields = cpu_fields()
    machine = platform.machine()
    board = read_text("/proc/device-tree/model") or fields.get("model name") or fields.get("model")
    # An emulated ARM program still sees the processor of the x86 computer under it.
    is_x86_below = "vendor_id" in fields or os.path.exists("/sys/devices/system/cpu/microcode")
    return {
        "machine": machine,
        "cpu_model": board or platform.processor() or machine,
        "cpu_flags": sorted(set((fields.get("flags") or fields.get("features") or "").split())),
        "cores": os.cpu_count() or 1,
        "memory_bytes": memory_bytes("MemTotal")
        or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "page_size_bytes": os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "hostname_digest": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
        "emulated": machine.startswith(("aarch64", "arm")) and is_x86_below,
    }


def telemetry() -> Dict[str, Any]:
    """The state of the board now; ``None`` for what it does not show."""
    zones = [read_number(path) for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    temperatures = [zone / 1000 for zone in zones if zone is not None and 0 < zone < 200_000]
    clock_khz = read_number("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")
    return {
        "load_1min": os.getloadavg()[0],
        "temperature_c": max(temperatures) if temperatures else None,
        "clock_hz": None if clock_khz is None else clock_khz * 1000,
        "throttled": None,
        "available_memory_bytes": memory_bytes("MemAvailable"),
    }


def runtime_version(name: str) -> str:
    """Version of an installed runtime, imported first in a child that may die of an illegal instruction in our place."""
    if name not in RUNTIMES:
        raise Refused("runtime", "this agent cannot run the runtime " + name)
    flags = ["-I", "-B"] if sys.flags.isolated else ["-B"]
    command = [sys.executable, *flags, "-c", PROBE, *RUNTIMES[name]]
    try:
        child = subprocess.run(command, capture_output=True, timeout=60, cwd="/", text=True)
    except subprocess.TimeoutExpired:
        raise Refused("runtime", "importing " + name + " took over 60 s") from None
    lines = (child.stdout if child.returncode == 0 else child.stderr).strip().splitlines()
    if child.returncode < 0:
        raise Refused("runtime", "importing %s died of signal %d" % (name, -child.returncode))
    if child.returncode > 0 or not lines:
        raise Refused("runtime", "cannot import " + name + ": " + (lines[-1] if lines else ""))
    return lines[-1]


# The runtimes


def realistic(shape: List[int], dtype: str, seed: int) -> Any:
    """Random input: zeros would let kernels skip work and hide denormals. Integers wider than 8 bits are 0 or 1: valid as an index."""
    import numpy as np

    rng = np.random.default_rng(seed)
    if dtype in ("int8", "uint8"):
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max + 1, size=shape, dtype=dtype)
    if dtype.startswith(("int", "uint", "bool")):
        return rng.integers(0, 2, size=shape).astype(dtype)
    return rng.standard_normal(size=shape).astype(dtype)


class TfliteModel:
    """A loaded .tflite file."""

    def __init__(self, content: bytes, runtime: str, threads: int, delegate: bool) -> None:
        import importlib

        module = importlib.import_module(RUNTIMES[runtime][0])
        options = {}
        if not delegate:
            kinds = module.OpResolverType
            options["experimental_op_resolver_type"] = kinds.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        start = time.perf_counter_ns()
        self._interpreter = module.Interpreter(
            model_content=content, num_threads=threads, **options
        )
        self.load_ns = time.perf_counter_ns() - start
        self.run: Callable[[], Any] = self._interpreter.invoke
        start = time.perf_counter_ns()
        self._interpreter.allocate_tensors()
        allocate_ns = time.perf_counter_ns() - start
        self._inputs = self._interpreter.get_input_details()
        self._outputs = self._interpreter.get_output_details()
        self.inputs = [self._spec(detail) for detail in self._inputs]
        self.outputs = [self._spec(detail) for detail in self._outputs]
        for seed, detail in enumerate(self._inputs):
            spec = self.inputs[seed]
            filled = realistic(spec["shape"], spec["dtype"], seed)
            self._interpreter.set_tensor(detail["index"], filled)
        start = time.perf_counter_ns()
        self.run()
        self.first_ns = allocate_ns + time.perf_counter_ns() - start

    @staticmethod
    def _spec(detail: Dict[str, Any]) -> Dict[str, Any]:
        import numpy as np

        scale, zero_point = detail["quantization"]
        quantised = bool(scale)
        return {
            "name": str(detail["name"]),
            "shape": [int(size) for size in detail["shape"]],
            "dtype": np.dtype(detail["dtype"]).name,
            "scale": float(scale) if quantised else None,
            "zero_point": int(zero_point) if quantised else None,
        }

    def call(self, x: Any) -> Any:
        """The first output for one input, in the file's own types."""
        self._interpreter.set_tensor(self._inputs[0]["index"], x)
        self.run()
        return self._interpreter.get_tensor(self._outputs[0]["index"])

    def profile(self, runs: int) -> List[Dict[str, Any]]:
        """The Python interface of TFLite has no profiler."""
        raise Refused("unsupported", "this runtime has no profiler that Python can reach")


class OnnxModel:
    """A loaded .onnx file. Dimensions without a size are taken as 1."""

    def __init__(self, content: bytes, threads: int) -> None:
        import onnxruntime  # noqa: F401  (its import is not part of the load time)

        self._content, self._threads = content, threads
        start = time.perf_counter_ns()
        self._session = self._open()
        self.load_ns = time.perf_counter_ns() - start
        self.inputs = [self._spec(tensor) for tensor in self._session.get_inputs()]
        self.outputs = [self._spec(tensor) for tensor in self._session.get_outputs()]
        self._names = [spec["name"] for spec in self.outputs]
        self._feeds = {
            spec["name"]: realistic(spec["shape"], spec["dtype"], seed)
            for seed, spec in enumerate(self.inputs)
        }
        session_run, names, feeds = self._session.run, self._names, self._feeds
        self.run: Callable[[], Any] = lambda: session_run(names, feeds)
        start = time.perf_counter_ns()
        self.run()
        self.first_ns = time.perf_counter_ns() - start

    def _open(self, profile_prefix: str = "") -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # A waiting thread pool that spins would steal the core from the other models of the same round.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        if profile_prefix:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        return onnxruntime.InferenceSession(
            self._content, options, providers=["CPUExecutionProvider"]
        )

    @staticmethod
    def _spec(tensor: Any) -> Dict[str, Any]:
        shape = [size if isinstance(size, int) and size > 0 else 1 for size in tensor.shape]
        if tensor.type not in ORT_DTYPES:
            raise Refused("load", "tensor %s has the type %s" % (tensor.name, tensor.type))
        dtype = ORT_DTYPES[tensor.type]
        return {"name": tensor.name, "shape": shape, "dtype": dtype}

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
        nodes: Dict[str, Dict[str, Any]] = {}
        for event in events:
            name = event.get("name", "")
            if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
                continue
            arguments = event.get("args", {})
            node = {
                "name": name[: -len("_kernel_time")],
                "op": arguments.get("op_name", ""),
                "provider": arguments.get("provider", ""),
                "samples": [],
            }
            nodes.setdefault(name, node)["samples"].append(int(event["dur"]) * 1000)
        for node in nodes.values():
            node["median_ns"] = int(statistics.median(node.pop("samples")[2:]))
        return list(nodes.values())


def open_model(content: bytes, runtime: str, threads: int, delegate: bool) -> Any:
    """A model that has run once."""
    try:
        if runtime == "onnxruntime":
            return OnnxModel(content, threads)
        if runtime in RUNTIMES:
            return TfliteModel(content, runtime, threads, delegate)
    except Refused:
        raise
    except ImportError as error:
        raise Refused("runtime", "cannot import %s: %s" % (runtime, error)) from error
    except Exception as error:  # a runtime may raise any type at a file that it dislikes
        raise Refused("load", "%s: %s" % (type(error).__name__, error)) from error
    raise Refused("runtime", "this agent cannot run the runtime " + runtime)


# Timing


def sample(run: Callable[[], Any], calls: int) -> int:
    """Mean time of ``calls`` calls in nanoseconds, at least 1."""
    clock = time.perf_counter_ns
    start = clock()
    for _ in range(calls):
        run()
    return max(1, (clock() - start) // calls)


def calls_of(call_ns: float) -> int:
    """How many calls make a sample."""
    return min(MAX_CALLS, max(1, math.ceil(MIN_SAMPLE_NS / call_ns)))


class Timer:
    """One model within a timing request: how many calls make a sample and how many samples make a block."""

    def __init__(self, run: Callable[[], Any], plan: Dict[str, Any]) -> None:
        self.run = run
        start, runs = time.perf_counter_ns(), 0
        while runs < plan["warmup_runs"] or time.perf_counter_ns() - start < plan["warmup_ns"]:
            run()
            runs += 1
        call_ns = statistics.median(sample(run, 1) for _ in range(5))
        self.calls = calls_of(call_ns)
        if self.calls > 1:  # a single short call is half clock: look again without it
            call_ns = sample(run, self.calls)
            self.calls = calls_of(call_ns)
        wanted = math.ceil(plan["block_ns"] / (call_ns * self.calls))
        self.n_samples = max(plan["min_runs"], min(plan["max_runs"], wanted))
        self.ended_ns = time.perf_counter_ns()
        self.blocks: List[Dict[str, Any]] = []

    def visit(self, number: int) -> None:
        """Time one block. The first sample meets the caches of another model and is dropped; after an idle second, two are."""
        idle_ns = time.perf_counter_ns() - self.ended_ns
        for _ in range(2 if idle_ns > 1_000_000_000 else 1):
            sample(self.run, self.calls)
        taken = [sample(self.run, self.calls) for _ in range(self.n_samples)]
        self.ended_ns = time.perf_counter_ns()
        self.blocks.append({"round": number, "calls_per_sample": self.calls, "samples_ns": taken})


def time_models(models: Dict[str, Any], plan: Dict[str, Any]) -> Dict[str, Any]:
    """Blocks of every model, all models in every round; each second round runs the order of the one before it backwards."""
    before = telemetry()
    rng = random.Random(plan["seed"])
    gc.collect()
    gc.disable()
    try:
        timers = {key: Timer(model.run, plan) for key, model in models.items()}
        order = list(timers)
        for number in range(plan["rounds"]):
            if number % 2 == 0:
                rng.shuffle(order)
            else:
                order.reverse()
            for key in order:
                timers[key].visit(number)
    finally:
        gc.enable()
    blocks = {key: timer.blocks for key, timer in timers.items()}
    return {"blocks": blocks, "before": before, "after": telemetry()}


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

    values = np.asarray(y, dtype=np.float32)
    if np.asarray(y).dtype.kind in "iu" and spec.get("scale"):
        return (values - np.float32(spec["zero_point"])) * np.float32(spec["scale"])
    return values.copy()


# The operations


class Agent:
    """Serves requests, one at a time. Each operation takes a header and a blob and gives a header and a blob."""

    def __init__(self) -> None:
        self.models: Dict[str, Any] = {}
        self.operations: Dict[str, Callable[[Dict[str, Any], bytes], Any]] = {
            "hello": lambda request, blob: (machine_facts(), b""),
            "runtime": lambda request, blob: ({"version": runtime_version(request["name"])}, b""),
            "load": self.load,
            "load_many": self.load_many,
            "unload": self.unload,
            "time": self.time,
            "infer": self.infer,
            "profile": self.profile,
        }

    def _load(self, key: str, content: bytes, request: Dict[str, Any]) -> Dict[str, Any]:
        delegate = request.get("delegate", True)
        model = open_model(content, request["runtime"], request["threads"], delegate)
        self.models[key] = model
        facts = ("load_ns", "first_ns", "inputs", "outputs")
        return {fact: getattr(model, fact) for fact in facts}

    def _model(self, key: str) -> Any:
        if key not in self.models:
            raise Refused("unknown-key", "no model is loaded as " + key)
        return self.models[key]

    def load(self, request: Dict[str, Any], blob: bytes) -> Tuple[Dict[str, Any], bytes]:
        """Load one model and run it once."""
        return self._load(request["key"], blob, request), b""

    def load_many(self, request: Dict[str, Any], blob: bytes) -> Tuple[Dict[str, Any], bytes]:
        """Load models that lie end to end in the blob; one that fails does not stop the others."""
        loaded: Dict[str, Any] = {}
        start = 0
        for key, size in zip(request["keys"], request["sizes"]):
            content, start = blob[start : start + size], start + size
            try:
                loaded[key] = self._load(key, content, request)
            except Refused as error:
                loaded[key] = {"error": str(error)[:2000]}
        return {"models": loaded}, b""

    def unload(self, request: Dict[str, Any], blob: bytes) -> Tuple[Dict[str, Any], bytes]:
        """Forget models; a key that is not loaded is no error."""
        for key in request["keys"]:
            self.models.pop(key, None)
        gc.collect()
        return {}, b""

    def time(self, request: Dict[str, Any], blob: bytes) -> Tuple[Dict[str, Any], bytes]:
        """Time loaded models in the same rounds."""
        return time_models({key: self._model(key) for key in request["keys"]}, request), b""

    def infer(self, request: Dict[str, Any], blob: bytes) -> Tuple[Dict[str, Any], bytes]:
        """Outputs of a loaded model for an array."""
        import numpy as np

        x = np.load(io.BytesIO(blob), allow_pickle=False)
        answer = io.BytesIO()
        np.save(answer, infer(self._model(request["key"]), x), allow_pickle=False)
        return {}, answer.getvalue()

    def profile(self, request: Dict[str, Any], blob: bytes) -> Tuple[Dict[str, Any], bytes]:
        """Time of every node of a loaded model, where the runtime can tell."""
        return {"nodes": self._model(request["key"]).profile(request["runs"])}, b""

    def serve(self, request: Dict[str, Any], blob: bytes) -> Tuple[Dict[str, Any], bytes]:
        """The reply to one request; any failure becomes a reply, so one bad model never ends the program."""
        number = request.get("id")
        try:
            operation = self.operations.get(request.get("op", ""))
            if operation is None:
                raise Refused("unsupported", "unknown operation %r" % request.get("op"))
            header, answer = operation(request, blob)
            return dict(header, id=number, ok=True), answer
        except Refused as error:
            return {"id": number, "ok": False, "kind": error.kind, "error": str(error)[:2000]}, b""
        except Exception as error:
            text = "%s: %s" % (type(error).__name__, error)
            return {"id": number, "ok": False, "kind": "fault", "error": text[:2000]}, b""


def read_requests(stream: BinaryIO, requests: queue.Queue[Tuple[Dict[str, Any], bytes]]) -> None:
    """Queue requests until the host is gone; then end the program at once, whatever it is doing."""
    try:
        while True:
            requests.put(read_frame(stream))
    except Exception:
        os._exit(0)


def main() -> None:
    """Serve until stdin ends."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    wire = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # runtimes print; what they print must not land between frames
    requests: queue.Queue[Tuple[Dict[str, Any], bytes]] = queue.Queue(2)
    reader = threading.Thread(target=read_requests, args=(sys.stdin.buffer, requests), daemon=True)
    reader.start()
    wire.write(MAGIC)
    wire.flush()
    agent = Agent()
    while True:
        write_frame(wire, *agent.serve(*requests.get()))


if __name__ == "__main__":
    main()

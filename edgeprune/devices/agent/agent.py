"""The part of edgeprune that runs on the board: it loads model files, times them and answers over stdin and stdout.

One file, Python 3.8 or newer, standard library alone; numpy and the runtime are imported when a model needs them. The wire is the magic
line, then frames in both directions: 4 bytes header length, JSON header (at most 4 MiB), 8 bytes blob length, blob; integers big-endian.
Every request has an integer ``id`` that its reply repeats, with ``ok`` and, when that is false, ``kind`` and ``error``. The program ends
when stdin ends, even in the middle of a request, so a lost host never leaves the board busy.
"""

from __future__ import annotations

import gc
import getpass
import glob
import hashlib
import importlib
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
from functools import partial
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Tuple

MAGIC = b"\0edgeprune-agent/1\n"
MAX_HEADER_BYTES = 4 << 20
MAX_BLOB_BYTES = 1 << 30
MIN_SAMPLE_NS = 200_000  # shorter calls are timed several at once: clock and loop cost about 100 ns
MAX_CALLS = 100_000
RUNTIMES = {  # name on the wire: module to import, distribution that holds it
    "litert": ("ai_edge_litert.interpreter", "ai-edge-litert"),
    "tflite-runtime": ("tflite_runtime.interpreter", "tflite-runtime"),
    "onnxruntime": ("onnxruntime", "onnxruntime"),
}
PROBE = """
import importlib, importlib.metadata, sys
importlib.import_module(sys.argv[1])
package = sys.modules[sys.argv[1].split(".")[0]]
print(getattr(package, "__version__", None) or importlib.metadata.version(sys.argv[2]))
"""
Message = Tuple[Dict[str, Any], bytes]  # header and blob


class Refused(Exception):
    """A request that cannot be served; ``kind`` tells the host what sort of failure it is."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def read_exactly(stream: BinaryIO, count: int, limit: int) -> bytes:
    """``count`` bytes, or :class:`EOFError`. After a part over its limit the stream cannot be trusted, so that ends it too."""
    content = stream.read(count) if count <= limit else b""
    if len(content) < count:
        raise EOFError
    return content


def read_frame(stream: BinaryIO) -> Message:
    """The next header and blob."""
    (size,) = struct.unpack(">I", read_exactly(stream, 4, 4))
    header = json.loads(read_exactly(stream, size, MAX_HEADER_BYTES).decode("utf-8"))
    (size,) = struct.unpack(">Q", read_exactly(stream, 8, 8))
    return header, read_exactly(stream, size, MAX_BLOB_BYTES)


def write_frame(stream: BinaryIO, header: Dict[str, Any], blob: bytes = b"") -> None:
    """Send one frame."""
    text = json.dumps(header, allow_nan=False).encode()
    stream.write(struct.pack(">I", len(text)) + text + struct.pack(">Q", len(blob)) + blob)
    stream.flush()


def read_text(path: str) -> Optional[str]:
    """A small file of /proc or /sys, or ``None`` where this board has no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(1 << 20).strip("\0\n ")
    except OSError:
        return None


def fields_of(path: str) -> Dict[str, str]:
    """The first value of every ``name: value`` line of a file in /proc, by lower-case name."""
    fields: Dict[str, str] = {}
    for line in (read_text(path) or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip().lower(), value.strip())
    return fields


def machine_facts() -> Dict[str, Any]:
    """What identifies this machine, without naming it."""
    fields, machine = fields_of("/proc/cpuinfo"), platform.machine()
    board = read_text("/proc/device-tree/model") or fields.get("model name") or fields.get("model")
    # An ARM program under qemu sees the x86 computer below it, and not itself as the program of its own thread.
    program, thread = (os.path.realpath("/proc/%s/exe" % name) for name in ("self", "thread-self"))
    is_qemu = "vendor_id" in fields or (os.path.exists("/proc/thread-self") and program != thread)
    return {
        "machine": machine,
        "cpu_model": board or platform.processor() or machine,
        "cpu_flags": sorted(set((fields.get("flags") or fields.get("features") or "").split())),
        "cores": os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "page_size_bytes": os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "governor": read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "hostname_digest": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
        "emulated": machine.startswith(("aarch64", "arm")) and is_qemu,
        "bits": struct.calcsize("P") * 8,
        "glibc": platform.libc_ver()[1] or None,
        "boot_id": read_text("/proc/sys/kernel/random/boot_id") or "0" * 8,
        "wall_clock_ns": time.time_ns(),
        "user": getpass.getuser(),
    }


def telemetry() -> Dict[str, Any]:
    """The state of the board now; ``None`` for what it does not show."""
    zones = [read_text(path) or "" for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    temperatures = [int(zone) / 1000 for zone in zones if zone.isdigit() and int(zone) < 200_000]
    free_kib = fields_of("/proc/meminfo").get("memavailable", "").split(" ")[0]
    clock_khz = read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq") or ""
    return {
        "load_1min": os.getloadavg()[0],
        "temperature_c": max(temperatures) if temperatures else None,
        "clock_hz": int(clock_khz) * 1000 if clock_khz.isdigit() else None,
        "available_memory_bytes": int(free_kib) * 1024 if free_kib else None,
    }


def runtime_version(name: str) -> str:
    """Version of an installed runtime, imported first in a child that may die of an illegal instruction in our place."""
    if name not in RUNTIMES:
        raise Refused("runtime", "this agent cannot run the runtime " + name)
    command = [sys.executable, "-IB" if sys.flags.isolated else "-B", "-c", PROBE, *RUNTIMES[name]]
    try:
        child = subprocess.run(command, capture_output=True, timeout=60, cwd="/", text=True)
    except subprocess.TimeoutExpired:
        raise Refused("runtime", "importing " + name + " took over 60 s") from None
    lines = (child.stderr if child.returncode else child.stdout).strip().splitlines() or [""]
    if child.returncode < 0:
        raise Refused("runtime", "importing %s died of signal %d" % (name, -child.returncode))
    if child.returncode > 0:
        raise Refused("runtime", "cannot import " + name + ": " + lines[-1])
    return lines[-1]


def realistic(spec: Dict[str, Any], seed: int) -> Any:
    """Random input: zeros would let kernels skip work and hide denormals. Integers wider than 8 bits are 0 or 1: valid as an index."""
    import numpy as np

    shape, dtype = spec["shape"], spec["dtype"]
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

    def call(self, x: Any) -> Any:
        """The first output for one input, in the file's own types."""
        self._interpreter.set_tensor(self._input["index"], x)
        self.run()
        return self._interpreter.get_tensor(self._output["index"])


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

    def _open(self, profile_prefix: str = "") -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = self._runtime.ExecutionMode.ORT_SEQUENTIAL
        # A waiting thread pool that spins would steal the core from the other models of the same round.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
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


def open_model(content: bytes, runtime: str, threads: int, delegate: bool) -> Any:
    """A model that has run once."""
    if runtime not in RUNTIMES:
        raise Refused("runtime", "this agent cannot run the runtime " + runtime)
    try:
        model = OnnxModel if runtime == "onnxruntime" else TfliteModel
        return model(content, runtime, threads, delegate)
    except ImportError as error:
        raise Refused("runtime", "cannot import %s: %s" % (runtime, error)) from error
    except Exception as error:  # a runtime may raise any type at a file that it dislikes
        raise Refused("load", "%s: %s" % (type(error).__name__, error)) from error


def sample(run: Callable[[], Any], calls: int) -> int:
    """Mean time of ``calls`` calls in nanoseconds, at least 1."""
    clock = time.perf_counter_ns
    start = clock()
    for _ in range(calls):
        run()
    return max(1, (clock() - start) // calls)


class Timer:
    """One model within a timing request: how many calls make a sample and how many samples make a block."""

    def __init__(self, run: Callable[[], Any], plan: Dict[str, Any]) -> None:
        self.run = run
        start, runs = time.perf_counter_ns(), 0
        while runs < plan["warmup_runs"] or time.perf_counter_ns() - start < plan["warmup_ns"]:
            run()
            runs += 1
        call_ns = statistics.median(sample(run, 1) for _ in range(5))
        for _ in range(2):  # a single short call is half clock: look again at many
            self.calls = min(MAX_CALLS, max(1, math.ceil(MIN_SAMPLE_NS / call_ns)))
            call_ns = sample(run, self.calls)
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

    values = np.array(y, dtype=np.float32)
    if np.asarray(y).dtype.kind not in "iu" or not spec.get("scale"):
        return values
    return (values - np.float32(spec["zero_point"])) * np.float32(spec["scale"])


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
        options = (request["runtime"], request["threads"], request.get("delegate", True))
        model = self.models[key] = open_model(content, *options)
        return {name: getattr(model, name) for name in ("load_ns", "first_ns", "inputs", "outputs")}

    def _model(self, key: str) -> Any:
        if key not in self.models:
            raise Refused("unknown-key", "no model is loaded as " + key)
        return self.models[key]

    def load(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Load one model and run it once."""
        return self._load(request["key"], blob, request), b""

    def load_many(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Load models that lie end to end in the blob; one that fails does not stop the others."""
        loaded, start = {}, 0
        for key, size in zip(request["keys"], request["sizes"]):
            content, start = blob[start : start + size], start + size
            try:
                loaded[key] = self._load(key, content, request)
            except Refused as error:
                loaded[key] = {"error": str(error)[:2000]}
        return {"models": loaded}, b""

    def unload(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Forget models; a key that is not loaded is no error."""
        for key in request["keys"]:
            self.models.pop(key, None)
        return {}, b""

    def time(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Time loaded models in the same rounds."""
        return time_models({key: self._model(key) for key in request["keys"]}, request), b""

    def infer(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Outputs of a loaded model for an array."""
        import numpy as np

        x = np.load(io.BytesIO(blob), allow_pickle=False)
        answer = io.BytesIO()
        np.save(answer, infer(self._model(request["key"]), x), allow_pickle=False)
        return {}, answer.getvalue()

    def profile(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Time of every node of a loaded model, where the runtime can tell."""
        model = self._model(request["key"])
        if not hasattr(model, "profile"):
            raise Refused("unsupported", "this runtime has no profiler that Python can reach")
        return {"nodes": model.profile(request["runs"])}, b""

    def serve(self, request: Dict[str, Any], blob: bytes) -> Message:
        """The reply to one request; any failure becomes a reply, so one bad model never ends the program."""
        number = request.get("id")
        try:
            operation = self.operations.get(request.get("op", ""))
            if operation is None:
                raise Refused("unsupported", "unknown operation %r" % request.get("op"))
            header, answer = operation(request, blob)
            return dict(header, id=number, ok=True), answer
        except Exception as error:
            kind, text = "fault", "%s: %s" % (type(error).__name__, error)
            if isinstance(error, Refused):
                kind, text = error.kind, str(error)
            return {"id": number, "ok": False, "kind": kind, "error": text[:2000]}, b""


def read_requests(stream: BinaryIO, requests: queue.Queue[Message]) -> None:
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
    requests: queue.Queue[Message] = queue.Queue(2)
    reader = threading.Thread(target=read_requests, args=(sys.stdin.buffer, requests), daemon=True)
    reader.start()
    agent = Agent()
    wire.write(MAGIC)
    wire.flush()
    while True:
        write_frame(wire, *agent.serve(*requests.get()))


if __name__ == "__main__":
    main()

"""A pretended JetPack: a ``tensorrt`` package, a ``trtexec`` and a CUDA runtime that answer as the real ones do, on any processor.

An engine here is the ONNX file behind a line of JSON, and onnxruntime runs it. What shall go wrong is told by environment variables:
``FAKE_TRT_VERSION``; ``FAKE_TRT_OFF``, precisions whose answers are far off; ``FAKE_TRT_MEMORY``, precisions whose build is out of memory;
``FAKE_TRT_UNSUPPORTED``, precisions whose build ends in the ONNX parser; ``FAKE_TRT_MS``, a JSON object of milliseconds by precision;
``FAKE_TRT_CV``, a percentage; ``FAKE_TRT_LOG``, a file that gets every argument list. No figure that comes from here was measured on
anything.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from edgeprune.bundle.manifest import JETSON_SAMPLE
from edgeprune.devices.agent import environments

CUDART = """
#include <stdlib.h>
#include <string.h>
int cudaStreamCreate(void **s) { *s = (void *)1; return 0; }
int cudaStreamSynchronize(void *s) { return 0; }
int cudaMalloc(void **p, size_t n) { *p = malloc(n); return *p ? 0 : 2; }
int cudaFree(void *p) { free(p); return 0; }
int cudaMemcpy(void *d, const void *s, size_t n, int kind) { memcpy(d, s, n); return 0; }
"""

PACKAGE = """
import ctypes, enum, json, os
import numpy as np

__version__ = os.environ.get("FAKE_TRT_VERSION", "8.6.1")


class Logger:
    ERROR = 1

    def __init__(self, level):
        pass


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = 1, 2


float32, float16, int8, int32, bool = "float32", "float16", "int8", "int32", "bool"
typed = int(__version__.split(".")[0]) >= 11
BuilderFlag = enum.Enum("BuilderFlag", ["SPARSE_WEIGHTS", *([] if typed else ["FP16", "INT8"])])


class MemoryPoolType(enum.Enum):
    WORKSPACE = 1


NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED" if typed else "EXPLICIT_BATCH"], start=0)


def engine_bytes(content, precision):
    return json.dumps({"precision": precision, "version": __version__}).encode() + b"\\n" + content


class Runtime:
    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, content):
        head, _, onnx = content.partition(b"\\n")
        known = json.loads(head)
        return Engine(known["precision"], onnx) if known["version"] == __version__ else None


class Engine:
    def __init__(self, precision, onnx):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self.precision = precision
        self.names = {t.name: t for t in [*self.session.get_inputs(), *self.session.get_outputs()]}
        self.inputs = [t.name for t in self.session.get_inputs()]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index):
        return [*self.names][index]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name):
        return tuple(self.names[name].shape)

    def get_tensor_dtype(self, name):
        kind = self.names[name].type[len("tensor("):-1]
        return {"float": "float32"}.get(kind, kind)

    def create_execution_context(self):
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.addresses = engine, {}

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        engine, feeds = self.engine, {}
        for name in engine.inputs:
            shape, dtype = engine.get_tensor_shape(name), np.dtype(engine.get_tensor_dtype(name))
            size = int(np.prod(shape)) * dtype.itemsize
            feeds[name] = np.frombuffer(ctypes.string_at(self.addresses[name], size), dtype).reshape(shape)
        outputs = [t.name for t in engine.session.get_outputs()]
        for name, value in zip(outputs, engine.session.run(outputs, feeds)):
            if engine.precision in os.environ.get("FAKE_TRT_OFF", "").split(","):
                value = (value[..., ::-1] * 3 + 1).astype(value.dtype)
            content = np.ascontiguousarray(value).tobytes()
            ctypes.memmove(self.addresses[name], content, len(content))
        return True


class Network:
    content = b""


class OnnxParser:
    num_errors = 1

    def __init__(self, network, logger):
        self.network = network

    def parse(self, content):
        self.network.content = content
        return b"QuantizeLinear" in content or b"Conv" in content or b"MatMul" in content

    def get_error(self, index):
        class Problem:
            def desc(self):
                return "no operator that this parser knows"
        return Problem()


class Cache:
    def serialize(self):
        return b"timings"


class Config:
    def __init__(self):
        self.flags, self.limit = set(), None

    def set_memory_pool_limit(self, pool, size):
        self.limit = size

    def set_flag(self, flag):
        self.flags.add(flag.name)

    def create_timing_cache(self, content):
        return Cache()

    def set_timing_cache(self, cache, ignore_mismatch):
        pass

    def get_timing_cache(self):
        return Cache()


class Builder:
    def __init__(self, logger):
        pass

    def create_network(self, flags=0):
        return Network()

    def create_builder_config(self):
        return Config()

    def build_serialized_network(self, network, config):
        names = {frozenset({"FP16"}): "fp16", frozenset({"INT8"}): "int8", frozenset(): "fp32"}
        precision = names.get(frozenset(config.flags) - {"SPARSE_WEIGHTS"}, "mixed")
        precision = "typed" if typed else precision
        if precision in os.environ.get("FAKE_TRT_MEMORY", "").split(","):
            return None
        return engine_bytes(network.content, precision)
"""

TRTEXEC = """#!{python}
import json, os, sys
sys.path.insert(0, {site!r})
import tensorrt
options = dict(a.lstrip("-").partition("=")[::2] for a in sys.argv[1:])
log = os.environ.get("FAKE_TRT_LOG")
if log:
    with open(log, "a") as stream:
        stream.write(json.dumps(sys.argv[1:]) + "\\n")
digits = [int(n) for n in tensorrt.__version__.split(".")]
code = "%d%d%02d" % tuple(digits) if digits[0] < 10 else "%d%02d%02d" % tuple(digits)
print("&&&& RUNNING TensorRT.trtexec [TensorRT v%s] # %s" % (code, " ".join(sys.argv)))
precision = ("mixed" if "int8" in options else "fp16") if "fp16" in options else ("int8" if "int8" in options else "fp32")
if tensorrt.typed:
    if {{"fp16", "int8"}} & set(options):
        print("[11/25/2026-10:00:00] [E] Unknown option: --" + sorted({{"fp16", "int8"}} & set(options))[0])
        sys.exit(1)
    precision = "typed"
if precision in os.environ.get("FAKE_TRT_MEMORY", "").split(","):
    print("[11/25/2026-10:00:00] [E] Error[2]: Error Code 2: OutOfMemory (no further information)")
    print("&&&& FAILED TensorRT.trtexec [TensorRT v%s]" % code)
    sys.exit(1)
if precision in os.environ.get("FAKE_TRT_UNSUPPORTED", "").split(","):
    print('[11/25/2026-10:00:01] [E] [TRT] ModelImporter.cpp:948: While parsing node number 4 [Odd -> "odd"]:')
    print("[11/25/2026-10:00:01] [E] [TRT] ModelImporter.cpp:953: ERROR: ModelImporter.cpp:195 In function parseNode:")
    print("[6] Invalid Node - /odd")
    print("&&&& FAILED TensorRT.trtexec [TensorRT v%s]" % code)
    sys.exit(1)
if "loadEngine" not in options:
    with open(options["onnx"], "rb") as stream:
        content = stream.read()
    with open(options["saveEngine"], "wb") as stream:
        stream.write(tensorrt.engine_bytes(content, precision))
    open(options["timingCacheFile"], "ab").close()
if "exportOutput" in options:
    assert ("includeDataTransfers" in options) == tensorrt.typed, "outputs are not copied unless it is told to"
    import numpy as np
    with open(options["loadEngine"], "rb") as stream:
        engine = tensorrt.Runtime(None).deserialize_cuda_engine(stream.read())
    name, _, path = options["loadInputs"].partition(":")
    x = np.fromfile(path, engine.get_tensor_dtype(name)).reshape(engine.get_tensor_shape(name))
    y = engine.session.run(None, {{name: x}})[0]
    if engine.precision in os.environ.get("FAKE_TRT_OFF", "").split(","):
        y = y[..., ::-1] * 3 + 1
    found = [{{"name": "output", "dimensions": "x".join(map(str, y.shape)), "values": y.ravel().tolist()}}]
    with open(options["exportOutput"], "w") as stream:
        json.dump(found, stream)
if not {{"buildOnly", "skipInference"}} & set(options):
    ms = json.loads(os.environ.get("FAKE_TRT_MS", "{{}}")).get(precision, 1.0)
    print("[11/25/2026-10:00:01] [I] === Performance summary ===")
    print("[11/25/2026-10:00:01] [I] Throughput: %g qps" % (1000 / ms))
    names = ("min", "max", "mean", "median", "percentile(90%)", "percentile(95%)", "percentile(99%)")
    print("[11/25/2026-10:00:01] [I] GPU Compute Time: " + ", ".join("%s = %g ms" % (n, ms) for n in names))
    cv = float(os.environ.get("FAKE_TRT_CV", "0"))
    if cv:
        print("[11/25/2026-10:00:01] [W] * GPU compute time is unstable, with coefficient of variance = %g%%." % cv)
print("&&&& PASSED TensorRT.trtexec [TensorRT v%s]" % code)
"""


def make(folder: Path) -> dict[str, str]:
    """Write it all below a folder, and give the environment variables with which a process finds it.

    ``PATH`` and ``PYTHONPATH`` are to be put in front of what is there.
    """
    site, programs, libraries = folder / "site", folder / "bin", folder / "cuda" / "lib64"
    for place in (site, programs, libraries):
        place.mkdir(parents=True)
    (site / "tensorrt.py").write_text(PACKAGE)
    program = programs / "trtexec"
    program.write_text(TRTEXEC.format(python=sys.executable, site=str(site)))
    program.chmod(0o755)
    source = folder / "cudart.c"
    source.write_text(CUDART)
    compiler = shutil.which("cc") or shutil.which("gcc")
    assert compiler is not None, "the pretended CUDA runtime needs a C compiler"
    library = str(libraries / "libcudart.so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, str(source)], check=True)
    return {
        "PATH": str(programs),
        "PYTHONPATH": str(site),
        "CUDA_HOME": str(folder / "cuda"),
        "FAKE_TRT_LOG": str(folder / "calls.log"),
    }


def build_engine(
    bundle: Path, jetpack: dict[str, str], *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """What a bundle's program for a Jetson does with a pretended JetPack.

    Args:
        bundle: the bundle's folder.
        jetpack: the variables of :func:`make`.
        arguments: of the program.
        variables: what shall go wrong, without ``FAKE_TRT_``.
    """
    told = {f"FAKE_TRT_{name}": value for name, value in variables.items()}
    path = os.pathsep.join([jetpack["PATH"], os.environ["PATH"]])
    return subprocess.run(
        [sys.executable, str(bundle / JETSON_SAMPLE), *arguments],
        env={**os.environ, **jetpack, **told, "PATH": path},
        capture_output=True,
        text=True,
    )


def as_environment(workdir: Path, variables: dict[str, str]) -> None:
    """Make the pretended JetPack the agent's environment for TensorRT: an interpreter that knows these variables."""
    wheels = [{"sha256": "0" * 64, "version": "8.6.1"}]
    place = workdir / "env" / environments.env_name("tensorrt", wheels)
    (place / "bin").mkdir(parents=True)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    python = place / "bin" / "python"
    # Isolated mode would not look where the pretended package lies.
    isolated = 'case "$1" in -I*) shift;; esac'
    text = ["#!/bin/sh", *lines, isolated, f'exec {shlex.quote(sys.executable)} "$@"', ""]
    python.write_text("\n".join(text))
    python.chmod(0o755)
    ready = {"runtime": "tensorrt", "version": "8.6.1", "python": "3", "wheels": ["0" * 64]}
    (place / "ready.json").write_text(json.dumps({**ready, "serial": 1, "after": []}))

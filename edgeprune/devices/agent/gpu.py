"""TensorRT's Python package, the driver and the CUDA runtime as this program uses them: through ctypes, without a further package."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import glob
import importlib
import os
from typing import Any, Dict, List, Optional, Tuple

from .machine import read_text
from .samples import realistic
from .wire import Refused

NO_PACKAGE = (
    "cannot import tensorrt: JetPack installs it for the system's Python only; make the environment with "
    "python3 -m venv --system-site-packages, or set python of this device to /usr/bin/python3"
)


def package() -> Any:
    """The ``tensorrt`` package.

    Raises:
        Refused: ``runtime``: it is not there.
    """
    try:
        return importlib.import_module("tensorrt")
    except ImportError as error:
        raise Refused("runtime", NO_PACKAGE) from error


def version() -> Tuple[int, ...]:
    """Of the package, as numbers."""
    return tuple(int(part) for part in str(package().__version__).split(".")[:3] if part.isdigit())


def gpu(root: str = "/") -> Dict[str, Optional[str]]:
    """Name and compute capability of the GPU, as the driver tells them; the board's name where it tells nothing."""
    facts: Dict[str, Optional[str]] = {"gpu": None, "sm": None}
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        name, device = ctypes.create_string_buffer(256), ctypes.c_int()
        numbers = [ctypes.c_int(), ctypes.c_int()]
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            if driver.cuDeviceGetName(name, len(name), device) == 0:
                facts["gpu"] = name.value.decode("utf-8", "replace")
            # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            for attribute, number in zip((75, 76), numbers):
                driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
            facts["sm"] = "%d.%d" % (numbers[0].value, numbers[1].value)
    except (OSError, AttributeError):
        pass
    facts["gpu"] = facts["gpu"] or read_text(os.path.join(root, "proc/device-tree/model"))
    return facts


def _type_name(trt: Any, dtype: Any) -> str:
    """The name that numpy has for a TensorRT type. Not ``trt.nptype``: that of 8.5 asks numpy for ``np.bool``, which 1.24 took away.

    Raises:
        Refused: ``load``: numpy has no such type.
    """
    for name in ("float32", "float16", "int8", "int32", "bool", "uint8", "int64"):
        if getattr(trt, name, None) == dtype:
            return name
    raise Refused("load", "an input or output is of type %s, which numpy does not have" % dtype)


class Cuda:
    """The few functions of the CUDA runtime that a model needs, through ctypes: no further package on the board."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        places = sorted(glob.glob(home + "/lib64/libcudart.so*")) or [
            ctypes.util.find_library("cudart") or "libcudart.so"
        ]
        try:
            self._library = ctypes.CDLL(places[0])
        except OSError as error:
            raise Refused(
                "runtime",
                "cannot load %s: %s; install the CUDA runtime of JetPack" % (places[0], error),
            ) from error
        stream = ctypes.c_void_p()
        self._check(self._library.cudaStreamCreate(ctypes.byref(stream)), "cudaStreamCreate")
        self.stream = int(stream.value or 0)

    def _check(self, code: int, what: str) -> None:
        if code:
            kind = "memory" if code == 2 else "load"  # cudaErrorMemoryAllocation
            raise Refused(kind, "%s failed with CUDA error %d" % (what, code))

    def allocate(self, size: int) -> int:
        """The address of memory on the GPU."""
        pointer = ctypes.c_void_p()
        code = self._library.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size))
        self._check(code, "cudaMalloc")
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._library.cudaFree(ctypes.c_void_p(address))

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy in either direction; the runtime sees which (cudaMemcpyDefault)."""
        arguments = (ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), 4)
        self._check(self._library.cudaMemcpy(*arguments), "cudaMemcpy")

    def wait(self) -> None:
        """Until everything in the stream is done."""
        code = self._library.cudaStreamSynchronize(ctypes.c_void_p(self.stream))
        self._check(code, "cudaStreamSynchronize")


class Engine:
    """A deserialised engine with its memory on the GPU. ``run`` excludes copies, as trtexec is told to."""

    def __init__(self, content: bytes) -> None:
        trt = package()
        self._cuda = Cuda()
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise Refused("load", "TensorRT cannot read the engine that was built here")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise Refused("memory", "TensorRT has no memory for the engine's activations")
        self._addresses: Dict[str, int] = {}
        self._arrays: Dict[str, Any] = {}
        self.inputs: List[Dict[str, Any]] = []
        self.outputs: List[Dict[str, Any]] = []
        self._allocate(trt)

    def _allocate(self, trt: Any) -> None:
        import numpy as np

        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            shape = [int(size) for size in self._engine.get_tensor_shape(name)]
            dtype = np.dtype(_type_name(trt, self._engine.get_tensor_dtype(name)))
            spec = {"name": str(name), "shape": shape, "dtype": dtype.name}
            is_input = self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            (self.inputs if is_input else self.outputs).append(spec)
            array = realistic(spec, len(self.inputs) - 1) if is_input else np.zeros(shape, dtype)
            self._arrays[name] = np.ascontiguousarray(array)
            self._addresses[name] = self._cuda.allocate(max(1, array.nbytes))
            self._context.set_tensor_address(name, self._addresses[name])
            if is_input:
                self.write(name, self._arrays[name])

    def write(self, name: str, array: Any) -> None:
        """Copy an array to an input."""
        self._cuda.copy(self._addresses[name], array.ctypes.data, array.nbytes)

    def run(self) -> None:
        """One inference, to its end."""
        if not self._context.execute_async_v3(self._cuda.stream):
            raise Refused("load", "TensorRT could not run the engine")
        self._cuda.wait()

    def output(self) -> Any:
        """A copy of the first output."""
        name = self.outputs[0]["name"]
        array = self._arrays[name].copy()
        self._cuda.copy(array.ctypes.data, self._addresses[name], array.nbytes)
        return array

    def restore(self) -> None:
        """The input that is timed, again."""
        name = self.inputs[0]["name"]
        self.write(name, self._arrays[name])

    def close(self) -> None:
        """Give the memory back."""
        for address in self._addresses.values():
            self._cuda.free(address)
        self._addresses.clear()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

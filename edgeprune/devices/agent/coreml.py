"""Core ML packages on a Mac, through coremltools: compiled, loaded for one choice of processors, and asked. Lives in a worker process.

A package arrives as a zip of its files, stored. It may take images: then a sample, which comes normalised as the net sees it, is turned
back into pixels by the constants that the package notes about itself (``edgeprune.scale`` and the like).
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
import zipfile
from functools import partial
from typing import Any, Callable, Dict, List

from .samples import realistic, sample
from .wire import Refused

# Name on the wire -> which processors Core ML may use: a member of coremltools.ComputeUnit.
UNITS = {
    "coreml": "ALL",
    "coreml-ne": "CPU_AND_NE",
    "coreml-gpu": "CPU_AND_GPU",
    "coreml-cpu": "CPU_ONLY",
}
# The part of coremltools that talks to Core ML: wheels for other systems have none.
MODULE = ("coremltools.libcoremlpython", "coremltools")
PACKAGE, COMPILED = "model.mlpackage", "model.mlmodelc"
KEY = "edgeprune."
MAX_FILES, MAX_BYTES = 1000, 2 << 30


def check_system(runtime: str) -> None:
    """Raise when this runtime needs a Mac and this is none.

    Raises:
        Refused: ``runtime``.
    """
    if runtime in UNITS and sys.platform != "darwin":
        text = "Core ML runs on a Mac only, and this board runs %s"
        raise Refused("runtime", text % sys.platform)


def unpack(content: bytes, folder: str) -> None:
    """Write the files of a packed folder.

    Raises:
        Refused: ``load`` when it is no such zip: compressed, too large, or with a path that leaves the folder.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_FILES or sum(e.file_size for e in entries) > MAX_BYTES:
                raise Refused("load", "the package is too large")
            for entry in entries:
                parts = entry.filename.split("/")
                is_safe = all(part not in ("", ".", "..") for part in parts)
                if not is_safe or "\\" in entry.filename or entry.compress_type:
                    raise Refused("load", "the package must not hold %r" % entry.filename)
                path = os.path.join(folder, *parts)
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                with open(path, "wb") as stream:
                    stream.write(archive.read(entry))
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise Refused("load", "the package is not sound: %s" % error) from error


class CoremlModel:
    """A loaded package. ``compile_ns`` is what Core ML took to compile it, which an app does once or Xcode does for it."""

    def __init__(self, content: bytes, runtime: str, threads: int, delegate: bool) -> None:
        check_system(runtime)
        import coremltools  # here, so that its import is no part of the load time

        self._folder = tempfile.TemporaryDirectory(prefix="edgeprune-coreml-")
        package = os.path.join(self._folder.name, PACKAGE)
        unpack(content, package)
        spec = coremltools.models.utils.load_spec(package)
        start = time.perf_counter_ns()
        compiled = coremltools.models.utils.compile_model(
            package, os.path.join(self._folder.name, COMPILED)
        )
        self.compile_ns = time.perf_counter_ns() - start
        units = getattr(coremltools.ComputeUnit, UNITS[runtime])
        start = time.perf_counter_ns()
        self._model = coremltools.models.CompiledMLModel(compiled, compute_units=units)
        self.load_ns = time.perf_counter_ns() - start
        self._pixels = Pixels(spec)
        self.inputs = [self._pixels.input]
        self.outputs = [
            _array(value)
            for value in spec.description.output
            if value.type.WhichOneof("Type") == "multiArrayType"
        ]
        if len(spec.description.input) != 1 or not self.outputs:
            raise Refused("load", "the package must have one input, and an output of numbers")
        self._name = self.outputs[0]["name"]
        self._feeds = self._pixels.feeds(realistic(self.inputs[0], 0))
        self.run: Callable[[], Any] = partial(self._model.predict, self._feeds)
        self.first_ns = sample(self.run, 1)

    def answer(self) -> bytes:
        """The first output for the input that is timed."""
        content: bytes = self._numbers(self.run()).tobytes()
        return content

    def call(self, x: Any) -> Any:
        """The first output for one sample, ``float32`` as the net sees it."""
        return self._numbers(self._model.predict(self._pixels.feeds(x)))

    def _numbers(self, found: Dict[str, Any]) -> Any:
        import numpy as np

        return np.asarray(found[self._name], dtype=np.float32).reshape(self.outputs[0]["shape"])


class Pixels:
    """How a sample as the net sees it enters a package."""

    def __init__(self, spec: Any) -> None:
        self._value = spec.description.input[0]
        known = dict(spec.description.metadata.userDefined)
        self.is_image = self._value.type.WhichOneof("Type") == "imageType"
        self._constants = {
            key: [float(v) for v in known.get(KEY + key, "").split()]
            for key in ("scale", "bias", "mean", "std")
        }
        if not self.is_image:
            self.input = _array(self._value)
            return
        if not self._constants["scale"] or not self._constants["bias"]:
            raise Refused("load", "the package takes images and does not say how it scales them")
        image, channels = self._value.type.imageType, len(self._constants["bias"])
        shape = [1, channels, int(image.height), int(image.width)]
        self.input = {"name": str(self._value.name), "shape": shape, "dtype": "float32"}

    def feeds(self, x: Any) -> Dict[str, Any]:
        """What ``predict`` takes for one sample ``float32 [1, ...]``."""
        name = str(self._value.name)
        return {name: self._image(x) if self.is_image else x}

    def _image(self, x: Any) -> Any:
        import numpy as np
        from PIL import Image

        def wide(key: str) -> Any:
            return np.asarray(self._constants[key], np.float64).reshape(1, -1, 1, 1)

        y = np.asarray(x, np.float64)
        if self._constants["std"]:
            y = y * wide("std") + wide("mean")
        raw = (y - wide("bias")) / self._constants["scale"][0]
        pixels = np.clip(np.rint(raw), 0, 255).astype(np.uint8)[0]
        if len(pixels) == 1:
            return Image.fromarray(pixels[0], "L")
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)), "RGB")


def _array(value: Any) -> Dict[str, Any]:
    shape: List[int] = [int(size) for size in value.type.multiArrayType.shape]
    return {"name": str(value.name), "shape": shape, "dtype": "float32"}

"""TensorRT engines on the board: built from ONNX there, kept for the next time, and run as one more kind of model.

An engine belongs to one TensorRT, one GPU and one JetPack, so what was built is kept beside the fingerprint that it was built under and
is built again when any of it changed. Of the precisions that a file allows, the fastest is taken whose answer holds.

Written for the Python package ``tensorrt`` 8.5 and newer, which JetPack installs for the system's Python, with ``trtexec`` as builder
where it is there. Not run on a Jetson by this project yet.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import tempfile
import time
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import trtexec
from .gpu import Engine, gpu, package, version
from .machine import fields_of, read_text
from .samples import sample
from .wire import Refused

FOLDER_VARIABLE = "EDGEPRUNE_ENGINES"
RECIPE = 1  # of this module: another number builds everything again
# Our own bounds, set by judgement: what CUDA and the builder take before they look at the model, and how often its weights are copied.
BASE_BYTES, COPIES = 768 << 20, 6
MAX_WORKSPACE_BYTES, MIN_WORKSPACE_BYTES = 1 << 30, 64 << 20
QUOTA_BYTES = 1 << 30
BUILD_TIMEOUT_S = 1800.0
# Of the largest value: how far an answer may be from that of the most exact build.
HOLDS_RATIO = 0.05
INT8_CANDIDATES, FLOAT_CANDIDATES = ("mixed", "int8"), ("fp16", "fp32")  # the most exact one last
# The flags FP16 and INT8 are gone from BuilderFlag, and the docstring of STRONGLY_TYPED says "always enabled": NVIDIA's package
# tensorrt-cu13-bindings 11.0.0.114 (read 2026-11-25).
TYPED_CANDIDATES, TYPED_MAJOR = ("typed",), 11
TYPED_NOTE = "this TensorRT takes all types from the file: what is not INT8 in it runs in FP32"


def candidates(content: bytes, major: int) -> Tuple[str, ...]:
    """Precisions in which a file can be built; one with QuantizeLinear nodes needs INT8.

    Args:
        content: the ONNX file.
        major: of TensorRT's version; from 11 on there is no choice, and the one build is called ``typed``.
    """
    if major >= TYPED_MAJOR:
        return TYPED_CANDIDATES
    return INT8_CANDIDATES if b"QuantizeLinear" in content else FLOAT_CANDIDATES


def has_sparse_cores(sm: Optional[str]) -> bool:
    """Whether a GPU multiplies 2:4 sparse weights faster: compute capability 8.0 (Ampere) and newer.

    The builder then looks whether the weights have that pattern, and uses it only where they do.
    """
    return sm is not None and int(sm.split(".")[0]) >= 8


def fingerprint(content: bytes, precisions: Tuple[str, ...], sparse: bool) -> Dict[str, Any]:
    """All that an engine depends on, as plain data."""
    release = (read_text("/etc/nv_tegra_release") or "").splitlines()
    return {
        **gpu(),
        "recipe": RECIPE,
        "tensorrt": str(package().__version__),
        "l4t": release[0][:200] if release else None,
        "onnx_sha256": hashlib.sha256(content).hexdigest(),
        "precisions": list(precisions),
        "flags": ["--sparsity=enable"] if sparse else [],
    }


def workspace(content_bytes: int, available_bytes: Optional[int]) -> int:
    """How much memory the builder may take for its trials.

    Raises:
        Refused: ``memory``: too little is free to begin; the message has both numbers.
    """
    if available_bytes is None:
        return MIN_WORKSPACE_BYTES
    needed = BASE_BYTES + COPIES * content_bytes
    if available_bytes < needed + MIN_WORKSPACE_BYTES:
        raise Refused(
            "memory",
            "building an engine needs %d MiB of free memory, but %d MiB are free; end other programs (the desktop, say) or add swap"
            % ((needed + MIN_WORKSPACE_BYTES) >> 20, available_bytes >> 20),
        )
    return min(MAX_WORKSPACE_BYTES, available_bytes - needed)


def available_bytes() -> Optional[int]:
    """MemAvailable, which CPU and GPU of a Jetson share."""
    text = fields_of("/proc/meminfo").get("memavailable", "").split(" ")[0]
    return int(text) * 1024 if text.isdigit() else None


class Store:
    """Engines in a folder: ``<key>.engine`` and ``<key>.json``, which holds the fingerprint and is written last."""

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        self.folder = folder
        self.timing_cache = os.path.join(folder, "timing.cache")

    def path(self, key: str, suffix: str = ".engine") -> str:
        """Where a file of an engine lies."""
        return os.path.join(self.folder, key + suffix)

    def get(self, key: str, wanted: Dict[str, Any]) -> Optional[Tuple[bytes, Dict[str, Any]]]:
        """A kept engine and what is known of it, when it was built under this fingerprint and is whole."""
        try:
            with open(self.path(key, ".json"), encoding="utf-8") as stream:
                known = json.loads(stream.read(1 << 20))
            with open(self.path(key), "rb") as stream:
                content = stream.read()
        except (OSError, ValueError):
            return None
        if not isinstance(known, dict) or known.get("fingerprint") != wanted:
            return None
        if known.get("engine_sha256") != hashlib.sha256(content).hexdigest():
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path(key, ".json"))  # the oldest are removed first
        return content, known

    def put(self, key: str, content: bytes, known: Dict[str, Any]) -> None:
        """Keep an engine; the folder stays within its quota."""
        facts = dict(known, engine_sha256=hashlib.sha256(content).hexdigest())
        for suffix, data in ((".engine", content), (".json", json.dumps(facts).encode())):
            temporary = self.path(key, suffix + ".%d.part" % os.getpid())
            with open(temporary, "wb") as stream:
                stream.write(data)
            os.replace(temporary, self.path(key, suffix))
        self._trim(key)

    def _trim(self, kept: str) -> None:
        records = sorted(glob.glob(os.path.join(self.folder, "*.json")), key=os.path.getmtime)
        sizes = {path: _size(path) + _size(path[:-5] + ".engine") for path in records}
        total = sum(sizes.values())
        for path in records:
            if total <= QUOTA_BYTES or os.path.basename(path) == kept + ".json":
                continue
            total -= sizes[path]
            for name in (path, path[:-5] + ".engine"):
                with contextlib.suppress(OSError):
                    os.unlink(name)


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


class Built:
    """One candidate: the engine's bytes, its first answer, its time in milliseconds, and what must be said of it."""

    def __init__(self, precision: str, content: bytes, ms: float, notes: List[str]) -> None:
        self.precision, self.content, self.ms, self.notes = precision, content, ms, notes
        engine = Engine(content)
        try:
            engine.run()
            self.answer = engine.output()
            self.ms = ms or _own_ms(engine.run)
        finally:
            engine.close()


def _own_ms(run: Callable[[], Any]) -> float:
    """Median time of a call over half a second, after as long a warm-up."""
    taken: List[int] = []
    for limit_s in (0.2, 0.5):
        taken = []
        until = time.perf_counter() + limit_s
        while time.perf_counter() < until or len(taken) < 5:
            start = time.perf_counter_ns()
            run()
            taken.append(time.perf_counter_ns() - start)
    return sorted(taken)[len(taken) // 2] / 1e6


def choose(built: List[Built]) -> Tuple[Built, List[str]]:
    """The fastest candidate whose answer holds against the most exact one, and what is to be said of the others.

    Args:
        built: in the order of :func:`candidates`, so the last is the most exact.
    """
    import numpy as np

    exact = built[-1]
    scale = max(float(np.abs(exact.answer).max()), 1e-6)
    notes, holding = [], []
    for one in built:
        apart = np.abs(np.asarray(one.answer, np.float32) - np.asarray(exact.answer, np.float32))
        error = float(apart.max()) / scale if np.isfinite(one.answer).all() else float("inf")
        fine = error <= HOLDS_RATIO
        notes.append(
            "%s: %.4g ms%s"
            % (
                one.precision,
                one.ms,
                "" if fine else ", not kept: its answer is %.0f %% off" % min(1e6, 100 * error),
            )
        )
        if fine:
            holding.append(one)
    best = min(holding or [exact], key=lambda one: one.ms)
    return best, [*notes, *best.notes]


def obtain(
    content: bytes, folder: str, *, quick: bool = False, sparse: bool = False
) -> Tuple[bytes, Dict[str, Any]]:
    """An engine for an ONNX file: a kept one where the fingerprint is still the same, else built, chosen and kept.

    Args:
        content: the ONNX file.
        folder: where engines are kept.
        quick: build the first candidate only and do not time it, for the many single kernels of a table.
        sparse: let the builder use 2:4 sparse kernels.

    Returns:
        The engine, and ``fingerprint``, ``precision``, ``ms``, ``notes`` and ``is_new``.

    Raises:
        Refused: ``memory``, ``timeout``, or ``load`` when no candidate could be built; says why.
    """
    precisions = candidates(content, version()[0])[: 1 if quick else None]
    wanted = fingerprint(content, precisions, sparse)
    store = Store(folder)
    name = json.dumps([wanted["onnx_sha256"], wanted["precisions"], wanted["flags"]])
    key = hashlib.sha256(name.encode()).hexdigest()[:32]
    kept = store.get(key, wanted)
    if kept is not None:
        return kept[0], dict(kept[1], is_new=False)
    room = workspace(len(content), available_bytes())
    built: List[Built] = []
    failures: List[Refused] = []
    for precision in precisions:
        try:
            made, ms, notes = _build(
                content, precision, store, room, sparse=sparse, timed=not quick
            )
            built.append(Built(precision, made, 1.0 if quick else ms, notes))
        except Refused as error:
            failures.append(Refused(error.kind, "%s: %s" % (precision, error)))
    if not built:
        raise failures[0]
    best, said = choose(built)
    known = {
        "fingerprint": wanted,
        "precision": best.precision,
        "ms": None if quick else best.ms,
        "notes": [
            *said,
            *([TYPED_NOTE] if precisions == TYPED_CANDIDATES else []),
            *("not built: %s" % failure for failure in failures),
        ],
    }
    store.put(key, best.content, known)
    return best.content, dict(known, is_new=True)


def _build(
    content: bytes, precision: str, store: Store, room: int, *, sparse: bool, timed: bool
) -> Tuple[bytes, float, List[str]]:
    """An engine's bytes, its time (0 where the builder did not take it), and notes."""
    program = trtexec.find()
    if program is None:
        return _build_here(content, precision, store, room, sparse=sparse), 0.0, []
    with tempfile.TemporaryDirectory(prefix="build-", dir=store.folder) as folder:
        onnx, engine = os.path.join(folder, "model.onnx"), os.path.join(folder, "model.engine")
        with open(onnx, "wb") as stream:
            stream.write(content)
        arguments = trtexec.build_arguments(
            program, onnx, engine, precision,
            version=version(), workspace_bytes=room, timing_cache=store.timing_cache,
            sparse=sparse, timed=timed,
        )  # fmt: skip
        found = trtexec.run(arguments, BUILD_TIMEOUT_S)
        try:
            with open(engine, "rb") as stream:
                made = stream.read()
        except OSError as error:
            raise Refused("load", "trtexec passed but wrote no engine") from error
    ms = found["times"].get("gpu_compute_time", {}).get("median", 0.0)
    return made, ms, trtexec.notes_of(found)


def _build_here(content: bytes, precision: str, store: Store, room: int, *, sparse: bool) -> bytes:
    """The same through the Python package, in this process, for boards without trtexec."""
    trt = package()
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    # Gone in TensorRT 10.
    explicit = getattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH", None)
    network = builder.create_network(0 if explicit is None else 1 << int(explicit))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if not parser.parse(content):
        errors = [str(parser.get_error(i).desc()) for i in range(parser.num_errors)]
        raise Refused(
            "load", "TensorRT cannot parse the model: %s" % (errors or ["no reason"])[0][:300]
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, room)
    flags = {"fp16": ("FP16",), "int8": ("INT8",), "mixed": ("INT8", "FP16")}.get(precision, ())
    for name in (*flags, *(("SPARSE_WEIGHTS",) if sparse else ())):
        if not hasattr(trt.BuilderFlag, name):
            raise Refused("load", "this TensorRT has no builder flag %s" % name)
        config.set_flag(getattr(trt.BuilderFlag, name))
    try:
        with open(store.timing_cache, "rb") as stream:
            earlier = stream.read()
    except OSError:
        earlier = b""
    cache = config.create_timing_cache(earlier)
    config.set_timing_cache(cache, ignore_mismatch=False)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise Refused("memory", "TensorRT built no engine, most often for lack of memory")
    with contextlib.suppress(OSError), open(store.timing_cache, "wb") as stream:
        stream.write(bytes(config.get_timing_cache().serialize()))
    return bytes(made)


class EngineModel:
    """A .onnx file as an engine that has run once. ``delegate`` and ``threads`` mean nothing on a GPU."""

    def __init__(
        self, content: bytes, runtime: str, threads: int, delegate: bool, many: bool = False
    ) -> None:

        package()
        folder = os.environ.get(FOLDER_VARIABLE) or os.path.join(
            tempfile.gettempdir(), "edgeprune-engines-%d" % os.getuid()
        )
        sparse = not many and has_sparse_cores(gpu()["sm"])
        engine, self.known = obtain(content, folder, quick=many, sparse=sparse)
        # What was decided when it was built belongs to every figure of it.
        self.notes = ["built in %s" % self.known["precision"], *self.known["notes"]]
        start = time.perf_counter_ns()
        self._engine = Engine(engine)
        self.load_ns = time.perf_counter_ns() - start
        self.inputs, self.outputs = self._engine.inputs, self._engine.outputs
        self.run: Callable[[], Any] = self._engine.run
        self.first_ns = sample(self.run, 1)

    def answer(self) -> bytes:
        """The first output for the input that is timed."""
        self.run()
        content: bytes = self._engine.output().tobytes()
        return content

    def call(self, x: Any) -> Any:
        """The first output for one input, in the file's own types."""
        import numpy as np

        self._engine.write(self.inputs[0]["name"], np.ascontiguousarray(x))
        try:
            self.run()
            return self._engine.output()
        finally:
            self._engine.restore()

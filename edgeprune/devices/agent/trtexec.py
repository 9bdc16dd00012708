"""NVIDIA's ``trtexec`` as a child process: what it is called with, and what its output says.

Two JetPacks are compared only by figures that were taken in the same way, and the defaults of trtexec changed: TensorRT 11 waits by
spinning, runs a CUDA graph and leaves the copies of inputs and outputs out; older ones do none of these unless they are told to. So every
older trtexec is told to do what the new one does.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
from typing import Any, Dict, List, Optional, Sequence, Tuple

from .wire import Refused

# Not on PATH on a Jetson.
PLACES = ("/usr/src/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
PRECISIONS: Dict[str, Tuple[str, ...]] = {
    "fp32": (),
    "fp16": ("--fp16",),
    "int8": ("--int8",),
    "mixed": ("--int8", "--fp16"),
    "typed": (),  # TensorRT 11 and newer
}
WARMUP_MS, DURATION_S, ITERATIONS = 200, 3, 10
MAX_CV_RATIO = 0.025  # our own bound; trtexec itself calls figures unstable that vary by 1.05 %
NEW_DEFAULTS = 11  # the major version whose defaults the older ones are told to follow
MAX_OUTPUT = 1 << 20

_BANNER = re.compile(r"TensorRT\.trtexec \[TensorRT v(\d{4,6})\]")
_PREFIX = re.compile(r"^\[[^\]]*\] \[([VIWEF])\] ?")
_LINE = re.compile(r"^(Latency|Enqueue Time|H2D Latency|GPU Compute Time|D2H Latency): (.*)$")
_VALUE = re.compile(r"(min|max|mean|median|percentile\((\d+)%?\)) = ([0-9.eE+-]+|nan|inf) ms")
_NUMBER = re.compile(
    r"^(Throughput|Total Host Walltime|Total GPU Compute Time): ([0-9.eE+-]+) (qps|s)"
)
_CV = re.compile(r"coefficient of variance = ([0-9.]+)%")
_MEMORY = re.compile(
    r"out of memory|outofmemory|insufficient memory|cuda error 2\b|bad_alloc", re.IGNORECASE
)


def find() -> Optional[str]:
    """Where trtexec is: on PATH, or where JetPack puts it; ``None`` where it is not."""
    found = shutil.which("trtexec")
    if found:
        return found
    return next((path for path in PLACES if os.access(path, os.X_OK)), None)


def version_of(digits: str) -> Tuple[int, int, int]:
    """Major, minor and patch of a banner's number: ``8502`` is 8.5.2, ``100300`` is 10.3.0."""
    number = int(digits)
    major = number // 1000 if number < 10_000 else number // 10_000
    return major, number // 100 % (10 if number < 10_000 else 100), number % 100


def build_arguments(
    program: str,
    onnx: str,
    engine: str,
    precision: str,
    *,
    version: Tuple[int, ...],
    workspace_bytes: int,
    timing_cache: str,
    sparse: bool,
    timed: bool,
) -> List[str]:
    """The argument list that builds an engine, and times it unless ``timed`` is false."""
    arguments = [
        program,
        "--onnx=" + onnx,
        "--saveEngine=" + engine,
        "--memPoolSize=workspace:%d" % max(1, workspace_bytes >> 20),  # MiB
        "--timingCacheFile=" + timing_cache,
        *PRECISIONS[precision],
        *(["--sparsity=enable"] if sparse else []),
    ]
    if not timed:
        return [*arguments, "--skipInference" if version >= (8, 6) else "--buildOnly"]
    return [*arguments, *timing_flags(version[0])]


def timing_flags(major: int) -> List[str]:
    """Flags with which every version times alike: spin wait, CUDA graph, no copies, the same warm-up and duration."""
    flags = [
        "--warmUp=%d" % WARMUP_MS,
        "--duration=%d" % DURATION_S,
        "--iterations=%d" % ITERATIONS,
    ]
    if major < NEW_DEFAULTS:
        flags += ["--useSpinWait", "--useCudaGraph", "--noDataTransfers"]
    return flags


def run(arguments: Sequence[str], timeout_s: float) -> Dict[str, Any]:
    """The parsed output of a child that ended well. Its memory is its own: when it runs out, this process lives on.

    Raises:
        Refused: ``memory`` when it ran out of memory or was killed, ``timeout``, ``load`` when it failed otherwise, with its last error.
    """
    try:
        done = subprocess.run(
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            cwd="/",
        )
    except subprocess.TimeoutExpired:
        raise Refused("timeout", "trtexec took over %d s" % timeout_s) from None
    except OSError as error:
        raise Refused("runtime", "cannot run %s: %s" % (arguments[0], error.strerror)) from error
    text = done.stdout[-MAX_OUTPUT:].decode("utf-8", "replace")
    found = parse(text)
    if done.returncode == 0 and found["passed"]:
        return found
    if done.returncode == -signal.SIGKILL or _MEMORY.search(text):
        raise Refused("memory", "building the engine ran out of memory" + _quoted(found["error"]))
    how = (
        "died of signal %d" % -done.returncode
        if done.returncode < 0
        else "ended with code %d" % done.returncode
    )
    raise Refused("load", "trtexec %s%s" % (how, _quoted(found["error"])))


def _quoted(error: str) -> str:
    return ": " + error[:300] if error else ""


def parse(text: str) -> Dict[str, Any]:
    """What trtexec printed, of any version from 8.0 on.

    Returns:
        ``version``: three numbers, or ``None``; ``passed``; ``error``: the first error line, or ``""``, with the reason behind it where it
        only names the node that the ONNX parser stopped at; ``throughput_qps``; ``cv_ratio`` where it warned of one; and ``times``: by
        ``latency``, ``enqueue_time``, ``h2d_latency``, ``gpu_compute_time`` and ``d2h_latency`` the milliseconds of ``min``, ``max``,
        ``mean``, ``median``, ``p90``, ``p95``, ``p99`` that were printed whole.
        Values that are not finite or negative are left out.
    """
    banner = _BANNER.search(text)
    found: Dict[str, Any] = {
        "version": version_of(banner[1]) if banner else None,
        "passed": "&&&& PASSED TensorRT.trtexec" in text,
        "error": "",
        "throughput_qps": None,
        "cv_ratio": None,
        "times": {},
    }
    lines = text.splitlines()
    for at, raw in enumerate(lines):
        prefix = _PREFIX.match(raw)
        line = raw[prefix.end() :].strip() if prefix else raw.strip()
        if prefix and prefix[1] in "EF":
            if not found["error"]:
                found["error"] = line
            elif "ERROR: " in line and found["error"].endswith(":"):
                found["error"] += " " + _reason(lines[at + 1 :])
        times = _LINE.match(line)
        if times:
            values = {
                "p" + percent if percent else name: float(value)
                for name, percent, value in _VALUE.findall(times[2])
                if 0 <= _number(value) < float("inf")
            }
            if values:
                found["times"][times[1].lower().replace(" ", "_")] = values
        number = _NUMBER.match(line)
        if number and number[1] == "Throughput":
            found["throughput_qps"] = _number(number[2])
        spread = _CV.search(line)
        if spread and "GPU compute time" in line:
            found["cv_ratio"] = _number(spread[1]) / 100
    return found


def _reason(lines: Sequence[str]) -> str:
    """The text up to the next line with a time stamp: the ONNX parser puts what is wrong with a node there."""
    own = itertools.takewhile(lambda raw: not _PREFIX.match(raw) and raw[:4] != "&&&&", lines)
    return " ".join(" ".join(own).split())


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return -1.0


def notes_of(found: Dict[str, Any]) -> List[str]:
    """What must be said about a timing: nothing, or that it is unstable."""
    ratio = found["cv_ratio"]
    if ratio is None or ratio <= MAX_CV_RATIO:
        return []
    return [
        "GPU time is unstable: it varies by %.1f %% (over %.1f %%); lock the clocks (sudo jetson_clocks)"
        % (100 * ratio, 100 * MAX_CV_RATIO)
    ]

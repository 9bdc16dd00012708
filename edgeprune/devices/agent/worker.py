"""The process that holds one model, or one chunk of small ones: it loads, runs and times what it is told to, and may die of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import io
import math
import os
import random
import resource
import signal
import statistics
import sys
import time
from typing import Any, Callable, Dict, List, Tuple

from .machine import fields_of
from .runtimes import infer, open_model
from .samples import sample
from .wire import Message, Refused, error_frame, read_frame, write_frame

MIN_SAMPLE_NS = 200_000  # shorter calls are timed several at once: clock and loop cost about 100 ns
MAX_CALLS = 100_000
SETTLED_RATIO = 0.02  # two windows of five samples that differ by less: warm
REWARM_CALLS = 3  # of a model that was loaded again
BALLAST_BYTES = 1 << 16
SETTLE_FACTOR = 10  # at most that much longer than asked for
PR_SET_PDEATHSIG = 1


class Timer:
    """One model within a timing request: how many calls make a sample and how many samples make a block."""

    def __init__(self, run: Callable[[], Any], plan: Dict[str, Any]) -> None:
        self.run = run
        self.notes: List[str] = []
        self.plan = plan
        start, runs = time.perf_counter_ns(), 0
        while runs < plan["warmup_runs"] or time.perf_counter_ns() - start < plan["warmup_ns"]:
            run()
            runs += 1
        call_ns = statistics.median(sample(run, 1) for _ in range(5))
        for _ in range(2):  # a single short call is half clock: look again at many
            self.calls = min(MAX_CALLS, max(1, math.ceil(MIN_SAMPLE_NS / call_ns)))
            call_ns = sample(run, self.calls)
        if plan["settle"]:
            call_ns = self._settle(SETTLE_FACTOR * plan["warmup_ns"])
        wanted = math.ceil(plan["block_ns"] / (call_ns * self.calls))
        self.n_samples = max(plan["min_runs"], min(plan["max_runs"], wanted))
        self.call_ns = call_ns
        self.ended_ns = time.perf_counter_ns()
        self.inside_ns = self.ended_ns - start

    def _settle(self, limit_ns: float) -> float:
        """Go on until two windows of five samples agree; gives the time of one call."""
        start = time.perf_counter_ns()
        before = self._window()
        while True:
            now = self._window()
            if abs(now - before) <= SETTLED_RATIO * before:
                return now
            if time.perf_counter_ns() - start > limit_ns:
                self.notes.append(
                    "the warm-up did not settle: two windows differ by %.1f %%"
                    % (100 * abs(now - before) / before)
                )
                return now
            before = now

    def _window(self) -> float:
        return statistics.median(sample(self.run, self.calls) for _ in range(5))

    def restart(self, reopen: Callable[[], Callable[[], Any]]) -> None:
        """Go on with the model as it is after a new load, which lies elsewhere in memory; its first calls are dropped."""
        start = time.perf_counter_ns()
        self.run = reopen()
        calls, until = 0, time.perf_counter_ns() + self.plan["block_ns"] // 4
        while calls < REWARM_CALLS or time.perf_counter_ns() < until:
            self.run()
            calls += 1
        self.ended_ns = time.perf_counter_ns()
        self.inside_ns += self.ended_ns - start

    def visit(self, number: int) -> Dict[str, Any]:
        """Time one block. The first sample meets the caches of another model and is dropped; after an idle second, two are."""
        start = time.perf_counter_ns()
        idle_ns = start - self.ended_ns
        for _ in range(2 if idle_ns > 1_000_000_000 else 1):
            sample(self.run, self.calls)
        taken = [sample(self.run, self.calls) for _ in range(self.n_samples)]
        self.ended_ns = time.perf_counter_ns()
        self.inside_ns += self.ended_ns - start
        return {"round": number, "calls_per_sample": self.calls, "samples_ns": taken}


class Worker:
    """Serves the agent, one request at a time. Each operation takes a header and a blob and gives a header and a blob."""

    def __init__(self) -> None:
        self.models: Dict[str, Any] = {}
        self.ballast: List[bytearray] = []
        self.files: Dict[str, Tuple[bytes, Tuple[Any, ...]]] = {}
        self.answers: Dict[str, bytes] = {}
        self.timers: Dict[str, Timer] = {}
        self.operations: Dict[str, Callable[[Dict[str, Any], bytes], Message]] = {
            "load": self.load,
            "warm": self.warm,
            "reload": self.reload,
            "blocks": self.blocks,
            "infer": self.infer,
            "profile": self.profile,
            "spent": self.spent,
        }

    def load(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Load models that lie end to end in the blob; one that fails does not stop the others."""
        loaded: Dict[str, Any] = {}
        start = 0
        for key, size in zip(request["keys"], request["sizes"]):
            content, start = blob[start : start + size], start + size
            try:
                many = len(request["keys"]) > 1
                options = (request["runtime"], request["threads"], request["delegate"], many)
                model = self.models[key] = open_model(content, *options)
                self.files[key] = content, options
            except Refused as error:
                loaded[key] = {"error": str(error)[:2000], "kind": error.kind}
                continue
            names = ("load_ns", "first_ns", "inputs", "outputs")
            loaded[key] = {name: getattr(model, name) for name in names}
            if getattr(model, "placement", None):  # not every runtime tells
                loaded[key]["placement"] = model.placement
            if hasattr(model, "compile_ns"):
                loaded[key]["compile_ns"] = model.compile_ns
        return {"models": loaded}, b""

    def warm(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Warm models up and decide how long their blocks are."""
        gc.collect()
        gc.disable()  # for good: nothing here makes cycles, and a collection inside a sample would show
        for key in request["keys"]:
            if key in self.timers and request["plan"]["reload"]:
                self._opened_again(key)  # each request begins with a load of its own
            self.answers.setdefault(key, digest(self.models[key].answer()))
            self.timers[key] = Timer(self.models[key].run, request["plan"])
        found = {key: self.timers[key] for key in request["keys"]}
        return {
            "block_ns": {k: int(t.call_ns * t.calls * (t.n_samples + 1)) for k, t in found.items()},
            "notes": [note for timer in found.values() for note in timer.notes]
            + [
                key + ": " + note
                for key in found
                for note in getattr(self.models[key], "notes", ())
            ],
        }, b""

    def reload(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Load models again. A model's speed depends on where it happens to lie in memory, by more than its samples show."""
        for key in request["keys"]:
            self.timers[key].restart(lambda key=key: self._opened_again(key))  # type: ignore[misc]
        return {}, b""

    def _opened_again(self, key: str) -> Callable[[], Any]:
        self.models.pop(key)  # first, so that no board has to hold it twice
        self.timers[key].run = _gone
        self.ballast = shuffle_memory()
        content, options = self.files[key]
        self.models[key] = open_model(content, *options)
        run: Callable[[], Any] = self.models[key].run
        return run

    def blocks(self, request: Dict[str, Any], blob: bytes) -> Message:
        """One block of each model, in the order given; then the same input must still give the same output.

        Raises:
            Refused: ``nondeterministic`` when it does not.
        """
        found = {key: self.timers[key].visit(request["round"]) for key in request["keys"]}
        for key in request["keys"] if request["check"] else ():
            if digest(self.models[key].answer()) != self.answers[key]:
                raise Refused("nondeterministic", "%s gives other outputs for the same input" % key)
        return {"blocks": found}, b""

    def spent(self, request: Dict[str, Any], blob: bytes) -> Message:
        """The most memory that this process had, and the time that a model ran since it was warmed up."""
        inside_ns = self.timers[request["key"]].inside_ns
        return {"peak_memory_bytes": peak_memory_bytes(), "inside_ns": inside_ns}, b""

    def infer(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Outputs of a loaded model for an array."""
        import numpy as np

        x = np.load(io.BytesIO(blob), allow_pickle=False)
        answer = io.BytesIO()
        np.save(answer, infer(self.models[request["key"]], x), allow_pickle=False)
        return {}, answer.getvalue()

    def profile(self, request: Dict[str, Any], blob: bytes) -> Message:
        """Time of every node of a loaded model, where the runtime can tell."""
        model = self.models[request["key"]]
        if not hasattr(model, "profile"):
            raise Refused("unsupported", "this runtime has no profiler that Python can reach")
        return {"nodes": model.profile(request["runs"])}, b""

    def serve(self, request: Dict[str, Any], blob: bytes) -> Message:
        """The reply to one request; any failure becomes a reply."""
        try:
            header, answer = self.operations[request["op"]](request, blob)
            return dict(header, ok=True), answer
        except Exception as error:
            return error_frame(None, error), b""


def shuffle_memory() -> List[bytearray]:
    """Give freed memory back to the kernel, and take some of odd sizes, so that what comes next does not lie where the last model lay.

    Without it a loader gets the pages of the model that it replaces, and a load is no new draw.
    """
    with contextlib.suppress(OSError, AttributeError):  # glibc has it, musl has not
        ctypes.CDLL(None).malloc_trim(0)
    return [bytearray(random.randrange(BALLAST_BYTES)) for _ in range(4)]


def _gone() -> None:
    """Stands for a model that is being loaded again."""


def digest(content: bytes) -> bytes:
    """Short enough to keep for every model."""
    return hashlib.sha256(content).digest()


def peak_memory_bytes() -> int:
    """The most that this process had in memory, its runtime and Python included."""
    high = fields_of("/proc/self/status").get("vmhwm", "").split(" ")[0]
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return int(usage)  # bytes there, kibibytes elsewhere
    return (int(high) if high.isdigit() else usage) * 1024


def prepare(parent: int, cpus: List[int]) -> None:
    """End with the agent, be the first to go when memory runs out, leave no core file, and stay on the fastest processors."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as stream:
        stream.write("800")
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError):
        if cpus:
            os.sched_setaffinity(0, cpus)


def main(parent: int, cpus: List[int]) -> None:
    """Serve until stdin ends."""
    prepare(parent, cpus)
    wire = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # runtimes print; what they print must not land between frames
    worker = Worker()
    while True:
        try:
            request, blob = read_frame(sys.stdin.buffer)
        except Exception:
            os._exit(0)
        write_frame(wire, *worker.serve(request, blob))

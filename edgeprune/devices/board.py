"""A board that answers: load model files on it, time them together, run them. Start with :func:`open_board`."""

from __future__ import annotations

import contextlib
import io
import shlex
import site
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgeprune.devices import replies
from edgeprune.devices.agent import AGENT_PATH
from edgeprune.devices.frames import Frames, Refusal, clean
from edgeprune.devices.transports import Transport, open_transport
from edgeprune.errors import DeviceError
from edgeprune.records import sha256_bytes
from edgeprune.results import Block, Fingerprint, Telemetry, TensorSpec
from edgeprune.specs import Device, Stamp

MAX_SAMPLES_PER_REQUEST = 300_000  # keeps a reply under the 4 MiB of a header
_WARMUP_RUNS = 3
_LINK_S = 60.0  # for anything that mostly waits for the link
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"
_PIP = {
    "litert": "ai-edge-litert",
    "tflite-runtime": "tflite-runtime",
    "onnxruntime": "onnxruntime",
}


@dataclass(frozen=True)
class TimingPlan:
    """How long to look. Every model is visited once in each round, for one block.

    ``block_ms`` is the aim for one block; it gets at least ``min_runs`` and at most ``max_runs`` samples, where a sample is one call, or
    the mean of as many calls as take 0.2 ms. ``seed`` fixes the order of the models.
    """

    rounds: int
    block_ms: float
    min_runs: int
    max_runs: int
    warmup_ms: float
    seed: int = 0


KERNEL = TimingPlan(rounds=8, block_ms=1, min_runs=3, max_runs=20, warmup_ms=2)
SEARCH = TimingPlan(rounds=12, block_ms=20, min_runs=3, max_runs=100, warmup_ms=100)
DECIDE = TimingPlan(rounds=8, block_ms=200, min_runs=5, max_runs=500, warmup_ms=200)
REPORT = TimingPlan(rounds=8, block_ms=200, min_runs=5, max_runs=500, warmup_ms=1000)


@dataclass(frozen=True)
class Loaded:
    """A model that is loaded and has run once. ``first_ns`` holds allocation and the first inference."""

    key: str
    load_ns: int
    first_ns: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Timing:
    """Blocks of every model, by key, and the state of the board around them.

    ``peak_memory_bytes`` is of the process that ran each model, where the board tells it; ``notes`` is what the board did or found
    meanwhile.
    """

    blocks: dict[str, tuple[Block, ...]]
    before: Telemetry
    after: Telemetry
    peak_memory_bytes: dict[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeTime:
    """One node as the runtime's own profiler saw it; resolution is 1 microsecond."""

    name: str
    op: str
    provider: str
    ns: int  # median over the runs


class Board:
    """A running agent on a device. Use as a context manager; see :func:`open_board`.

    Every method raises :class:`~edgeprune.errors.DeviceError` when the agent has ended, refuses, or sends something implausible, and
    :class:`~edgeprune.errors.DeadlineExceeded` when it takes far longer than the work should.

    Args:
        name: the device's name.
        device: how it was reached.
        transport: the open connection; owned from here on.
        frames: the agent, after its handshake.
    """

    def __init__(self, name: str, device: Device, transport: Transport, frames: Frames) -> None:
        self.name = name
        self.device = device
        self._transport = transport
        self._frames = frames
        self._hello: replies.Hello | None = None
        self._versions: dict[str, str] = {}
        self._first_s: dict[str, float] = {}

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the agent and the connection."""
        self._frames.close()
        self._transport.close()

    def hello(self) -> dict[str, Any]:
        """Facts about the machine, as :class:`~edgeprune.devices.replies.Hello`; asked once."""
        return self._facts().model_dump()

    def _facts(self) -> replies.Hello:
        if self._hello is None:
            reply, _ = self._frames.request("hello", {}, timeout_s=_LINK_S)
            self._hello = replies.checked(replies.Hello, reply, self.name)
        return self._hello

    def runtime_version(self, runtime: str) -> str:
        """Version of a runtime on the board; asked once.

        Raises:
            DeviceError: it is not installed there, or cannot be imported.
        """
        if runtime not in self._versions:
            try:
                reply, _ = self._frames.request("runtime", {"name": runtime}, timeout_s=120)
            except Refusal as error:
                package = _PIP.get(runtime, runtime)
                raise DeviceError(
                    error.message,
                    hint=f"install it for {self.device.python} on the board: pip install {package}",
                ) from error
            version = replies.checked(replies.RuntimeVersion, reply, self.name).version
            self._versions[runtime] = version
        return self._versions[runtime]

    def fingerprint(self, runtime: str, threads: int) -> Fingerprint:
        """What measurements with this runtime on this board are made on. The stamp says whether its times mean anything."""
        facts = self._facts().model_dump()
        stamp: Stamp = "stand-in" if self.device.stand_in else "measured"
        if facts.pop(
            "emulated"
        ):  # says more than "stand-in": these times are not even another machine's
            stamp = "emulated"
        return Fingerprint(
            device=self.name,
            transport=self.device.transport,
            runtime=runtime,
            runtime_version=self.runtime_version(runtime),
            threads=threads,
            stamp=stamp,
            **facts,
        )

    def load(
        self, key: str, content: bytes, *, runtime: str, threads: int, delegate: bool = True
    ) -> Loaded:
        """Load a model file and run it once.

        Args:
            key: the name that other methods use; an earlier model of that name is replaced.
            content: the file.
            runtime: one of ``litert``, ``tflite-runtime``, ``onnxruntime``.
            threads: threads of the runtime.
            delegate: ``False`` runs TFLite files on the built-in kernels, without XNNPACK.

        Raises:
            Refusal: ``kind`` is ``load`` when the runtime dislikes the file, ``runtime`` when it is not installed.
        """
        fields = {"key": key, "runtime": runtime, "threads": threads, "delegate": delegate}
        timeout_s = _LINK_S + 120 + _transfer_s(len(content))
        reply, _ = self._frames.request("load", fields, content, timeout_s=timeout_s)
        return self._remember(key, replies.checked(replies.LoadedModel, reply, self.name))

    def load_many(
        self, files: Mapping[str, bytes], *, runtime: str, threads: int
    ) -> dict[str, Loaded | str]:
        """Load small files in one request; a file that does not load gives its error text instead."""
        blob = b"".join(files.values())
        fields = {
            "keys": list(files),
            "sizes": [len(content) for content in files.values()],
            "runtime": runtime,
            "threads": threads,
        }
        timeout_s = _LINK_S + 120 + 5 * len(files) + _transfer_s(len(blob))
        reply, _ = self._frames.request("load_many", fields, blob, timeout_s=timeout_s)
        models = replies.checked(replies.ManyLoaded, reply, self.name).models
        self._expect(set(models) == set(files), "models that were not asked for")
        return {
            key: model.error
            if isinstance(model, replies.LoadFailure)
            else self._remember(key, model)
            for key, model in ((key, models[key]) for key in files)
        }

    def _remember(self, key: str, model: replies.LoadedModel) -> Loaded:
        self._first_s[key] = model.first_ns / 1e9
        inputs = tuple(tensor.spec() for tensor in model.inputs)
        outputs = tuple(tensor.spec() for tensor in model.outputs)
        return Loaded(key, model.load_ns, model.first_ns, inputs, outputs)

    def unload(self, keys: Iterable[str]) -> None:
        """Forget models; unknown keys are no error."""
        gone = list(keys)
        self._frames.request("unload", {"keys": gone}, timeout_s=_LINK_S)
        for key in gone:
            self._first_s.pop(key, None)

    def time(self, keys: Sequence[str], plan: TimingPlan) -> Timing:
        """Time loaded models in the same rounds, so that they meet the same noise.

        Args:
            keys: loaded models, each once.
            plan: how long to look.
        """
        most = len(keys) * plan.rounds * plan.max_runs
        if most > MAX_SAMPLES_PER_REQUEST:
            raise DeviceError(
                f"one timing request must take at most {MAX_SAMPLES_PER_REQUEST} samples, but may take {most}",
                hint="time fewer models at once, or lower max_runs",
            )
        fields = {
            "keys": list(keys),
            "rounds": plan.rounds,
            "block_ns": int(plan.block_ms * 1e6),
            "min_runs": plan.min_runs,
            "max_runs": plan.max_runs,
            "warmup_runs": _WARMUP_RUNS,
            "warmup_ns": int(plan.warmup_ms * 1e6),
            "seed": plan.seed,
        }
        start = time.monotonic()
        reply, _ = self._frames.request("time", fields, timeout_s=self._time_limit_s(keys, plan))
        elapsed_ns = (time.monotonic() - start) * 1e9
        timed = replies.checked(replies.Timed, reply, self.name)
        self._check_blocks(timed, keys, plan, elapsed_ns)
        blocks = {key: tuple(block.block() for block in timed.blocks[key]) for key in keys}
        return Timing(blocks, timed.before.telemetry(), timed.after.telemetry())

    def _time_limit_s(self, keys: Sequence[str], plan: TimingPlan) -> float:
        """Ten times the expected duration and half a minute. A first call bounds the later ones from above, nearly always."""
        expected = 0.0
        for key in keys:
            call = max(self._first_s.get(key, 1.0), 2e-4)
            block = max(plan.block_ms / 1e3, plan.min_runs * call) + 2 * call
            expected += plan.warmup_ms / 1e3 + (_WARMUP_RUNS + 5) * call + plan.rounds * block
        return 30 + 10 * expected

    def _check_blocks(
        self, timed: replies.Timed, keys: Sequence[str], plan: TimingPlan, elapsed_ns: float
    ) -> None:
        self._expect(set(timed.blocks) == set(keys), "times of other models than asked for")
        total_ns = 0
        for blocks in timed.blocks.values():
            rounds = [block.round for block in blocks]
            self._expect(rounds == list(range(plan.rounds)), "rounds that do not count up")
            for block in blocks:
                n = len(block.samples_ns)
                self._expect(plan.min_runs <= n <= plan.max_runs, f"a block of {n} samples")
                total_ns += sum(block.samples_ns) * block.calls_per_sample
        self._expect(total_ns <= elapsed_ns * 1.05, "times that are longer than the wait for them")

    def infer(self, key: str, inputs: np.ndarray) -> np.ndarray:
        """First output of a loaded model for every sample.

        Args:
            key: a loaded model with one input.
            inputs: ``float32 [N, ...]`` in the file's own layout, finite. Quantised inputs are rounded to the nearest step there.

        Returns:
            ``float32 [N, ...]``, dequantised where the file's output is an integer with a scale.
        """
        blob = io.BytesIO()
        np.save(blob, np.ascontiguousarray(inputs, np.float32), allow_pickle=False)
        work_s = 10 * len(inputs) * self._first_s.get(key, 1.0)
        timeout_s = _LINK_S + work_s + _transfer_s(2 * len(blob.getvalue()))
        _, answer = self._frames.request(
            "infer", {"key": key}, blob.getvalue(), timeout_s=timeout_s
        )
        try:
            outputs = np.load(io.BytesIO(answer), allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as error:
            raise DeviceError(f"device {self.name!r} sent outputs that are no array") from error
        is_array = isinstance(outputs, np.ndarray) and outputs.dtype == np.float32
        self._expect(is_array and outputs.ndim >= 1, "outputs that are not float32")
        self._expect(
            len(outputs) == len(inputs), f"{len(outputs)} outputs for {len(inputs)} inputs"
        )
        self._expect(bool(np.isfinite(outputs).all()), "outputs that are not finite")
        found: np.ndarray = outputs
        return found

    def profile(self, key: str, runs: int) -> tuple[NodeTime, ...] | None:
        """Median time of every node by the runtime's own profiler, in the order of execution; ``None`` where it has none."""
        timeout_s = _LINK_S + 20 * (runs + 3) * self._first_s.get(key, 1.0)
        fields = {"key": key, "runs": runs}
        try:
            reply, _ = self._frames.request("profile", fields, timeout_s=timeout_s)
        except Refusal as error:
            if error.kind == "unsupported":
                return None
            raise
        nodes = replies.checked(replies.Profiled, reply, self.name).nodes
        return tuple(NodeTime(**node.model_dump()) for node in nodes)

    def _expect(self, fine: bool, what: str) -> None:
        if not fine:
            raise DeviceError(f"device {self.name!r} sent {what}")


def _transfer_s(size_bytes: int) -> float:
    """Patience for a link of 100 kbit/s."""
    return size_bytes * 8 / 100_000


def open_board(name: str, device: Device) -> Board:
    """A board with a running agent.

    Args:
        name: the device's name, for messages and fingerprints.
        device: how to reach it.

    Raises:
        Unreachable, HostKeyMismatch: the device cannot be reached, or is not the pinned one.
        DeviceError: the login or the agent failed; the message has the end of what the board said.
    """
    with contextlib.ExitStack() as opened:
        transport = open_transport(device)
        opened.callback(transport.close)
        is_local = device.transport == "local"
        argv = _local_agent(device) if is_local else _pushed_agent(transport, device)
        frames = Frames(transport.start(argv), name)
        opened.callback(frames.close)
        frames.handshake(_LINK_S)
        opened.pop_all()
    return Board(name, device, transport, frames)


def _local_agent(device: Device) -> list[str]:
    if device.python != "python3":
        return [str(Path(device.python).expanduser()), "-B", str(AGENT_PATH)]
    # Isolated mode hides the user's own site-packages: drop it where numpy was installed there.
    has_user_site = Path(np.__file__).is_relative_to(site.getusersitepackages())
    flags = ["-B"] if has_user_site else ["-I", "-B"]
    return [sys.executable, *flags, str(AGENT_PATH)]


def _pushed_agent(transport: Transport, device: Device) -> list[str]:
    """Push the agent under the name of its content, unless it is there, and say how to start it in a clean environment."""
    home = _ask(transport, ["sh", "-c", 'cd && printf "\\n%s\\n" "$PWD"'])
    content = AGENT_PATH.read_bytes()
    digest = sha256_bytes(content)
    path = f"{_expanded(device.workdir, home)}/agent-{digest[:16]}.py"
    there = transport.run(["sha256sum", path], timeout_s=_LINK_S)
    if there.code != 0 or digest.encode() not in there.stdout:
        transport.put(content, path)
    python = _expanded(device.python, home)
    environment = [f"PATH={_PATH}", f"HOME={home}", "LANG=C.UTF-8", "ORT_DISABLE_TELEMETRY=1"]
    return ["env", "-i", *environment, python, "-B", path]


def _expanded(path: str, home: str) -> str:
    if path == "~" or path.startswith("~/"):
        return home + path[1:]
    return path if path.startswith("/") or "/" not in path else f"{home}/{path}"


def _ask(transport: Transport, argv: Sequence[str]) -> str:
    """The last line that a command prints; a login shell may print before it."""
    done = transport.run(argv, timeout_s=_LINK_S)
    lines = done.stdout.decode(errors="replace").strip().splitlines()
    if done.code != 0 or not lines or not lines[-1].startswith("/"):
        raise DeviceError(
            f"{shlex.join(argv)} failed on the board with code {done.code}:"
            f" {clean(done.stderr.decode(errors='replace'))}"
        )
    return lines[-1]

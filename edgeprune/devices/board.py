"""A board that answers: load model files on it, time them together, run them. Start with :func:`open_board`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from edgeprune.devices.agent.coreml import UNITS as COREML_UNITS
from edgeprune.devices.agent.runtimes import LOAD_S, RUNTIMES
from edgeprune.devices.link import replies
from edgeprune.devices.link.frames import Refusal
from edgeprune.devices.link.recording import Recorder, as_recorded, origin_of
from edgeprune.devices.link.session import BACKOFF_S, LINK_S, LeaseTerms, Session, not_ready, ready
from edgeprune.devices.plans import Loaded, NodeTime, Timing, TimingPlan
from edgeprune.devices.store import MeasurementStore, store_key
from edgeprune.errors import DeviceError, Unreliable
from edgeprune.records.arrays import npy_array
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_bytes
from edgeprune.records.formats import runtime_facts
from edgeprune.records.measurement import Fingerprint
from edgeprune.records.names import Stamp

MAX_SAMPLES_PER_REQUEST = 300_000  # keeps a reply under the 4 MiB of a header
_WARMUP_RUNS = 3
MAX_REJECTED_RATIO = 0.3  # of the blocks; above it the rest is not believed either
TRIES = 3
ALL_COUNT = "; too many to leave out, so all of them count"
SETTLE_FROM_MS = 50.0  # warm-ups shorter than this are for kernels, which are warm at once


def judged(timing: Timing) -> Timing:
    """Where too much was disturbed, a timing is marked, and all its blocks count again: the rest alone would be a choice."""
    all_blocks = [block for blocks in timing.blocks.values() for block in blocks]
    rejected = [block.rejected for block in all_blocks if block.rejected is not None]
    if len(rejected) <= MAX_REJECTED_RATIO * len(all_blocks):
        return timing
    # The first of equals, in every process.
    worst = max(dict.fromkeys(rejected), key=rejected.count)
    counts = f"{len(rejected)} of {len(all_blocks)} blocks that were timed together were disturbed"
    why = f"{counts}, most by: {worst}{ALL_COUNT}"
    kept = {
        key: tuple(block.model_copy(update={"rejected": None}) for block in blocks)
        for key, blocks in timing.blocks.items()
    }
    return dataclasses.replace(timing, blocks=kept, unreliable=why)


class Board:
    """A running agent on a device. Use as a context manager; see :func:`open_board`.

    Every method raises :class:`~edgeprune.errors.DeviceError` when the agent has ended, refuses, or sends something implausible, and
    :class:`~edgeprune.errors.DeadlineExceeded` when it takes far longer than the work should.

    Args:
        name: the device's name.
        device: how it is reached.
        lease: whether to hold it alone.
        say: told in one line when a broken link was survived.
        backoff_s: how long to wait before each try to come back after a broken link.
        record: a file to record the conversation in, for a ``replay`` device.
        store: where timings with a purpose are kept, and taken from when they are there. Owned by the caller.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        lease: LeaseTerms | None = None,
        *,
        say: Callable[[str], None] = lambda _: None,
        backoff_s: Sequence[float] = BACKOFF_S,
        record: Path | None = None,
        store: MeasurementStore | None = None,
    ) -> None:
        self.name = name
        self.device = device = as_recorded(device)
        self.origin = origin_of(device)
        self._store = store
        self.times_from_store = 0  # timings that were not made now; the store does not say when
        self._recorder = None if record is None else Recorder(record, name, device)
        tap = self._recorder.tap if self._recorder is not None else (lambda pipe: pipe)
        self.session = Session(
            name,
            device,
            lease or LeaseTerms(),
            restore=self._restore,
            say=say,
            backoff_s=backoff_s,
            tap=tap,
        )
        self._was_ready = False
        self._versions: dict[str, str] = {}
        self._first_s: dict[str, float] = {}
        self._load_s: dict[str, float] = {}
        self._loaded: dict[str, tuple[str, dict[str, Any], bytes]] = {}

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
        """End the agent and the connection; the board is free when this returns, and a recording of it is complete."""
        self.session.close()
        if self._recorder is not None:
            self._recorder.close()

    @contextlib.contextmanager
    def rested(self) -> Iterator[None]:
        """Let others have the board while the block runs; afterwards the next request takes it again."""
        self.session.release()
        self._was_ready = False
        yield

    @property
    def notes(self) -> tuple[str, ...]:
        """What went wrong on the way and was survived, and whether this is only a replay."""
        if self.origin is None:
            return tuple(self.session.notes)
        name = Path(self.device.recording or "").name
        replayed = f"replayed from {name}, recorded on {self.origin.at[:10]}; no board was measured"
        return (replayed, *self.session.notes)

    def request(
        self, op: str, fields: dict[str, Any], blob: bytes = b"", *, work_s: float = LINK_S
    ) -> tuple[dict[str, Any], bytes]:
        """One operation of the agent. See :meth:`Session.request <edgeprune.devices.link.session.Session.request>`."""
        return self.session.request(op, fields, blob, work_s=work_s)

    def push(self, content: bytes) -> int:
        """Put a file into the board's cache; gives the bytes that had to be sent. See :meth:`Session.push`."""
        return self.session.push(content)

    def _restore(self) -> None:
        """After a reconnect: the models under the same keys."""
        done: set[int] = set()
        for op, fields, content in list(self._loaded.values()):
            if id(fields) not in done:  # the models of a chunk share one request
                done.add(id(fields))
                self.session.push(content)
                self.session.request(
                    op, fields, work_s=_load_s(fields["runtime"], len(fields.get("keys", "1")))
                )

    def hello(self) -> dict[str, Any]:
        """Facts about the machine, as :class:`~edgeprune.devices.link.replies.Hello`; asked once."""
        return self._facts().model_dump()

    def _facts(self) -> replies.Hello:
        return self.session.hello or self.session.connect()

    @property
    def is_strict(self) -> bool:
        """Whether disturbed measurements are refused.

        They are only marked on this machine, which runs edgeprune itself and whatever its owner does, and on stand-ins and emulated
        boards, whose figures nobody takes for a board's.
        """
        transport = self.device.transport if self.origin is None else self.origin.transport
        is_local = transport == "local"
        return not (is_local or self.device.stand_in or self._facts().emulated)

    def wait_until_ready(self, expected_bytes: int = 0) -> tuple[str, ...]:
        """Wait for the board to be cool, idle and unthrottled, as long as its ``thermal.wait_s`` allows.

        A board that is not strict is looked at once: what speaks against it comes back as text, and nothing is refused.

        Raises:
            NotReady: a strict board stayed unfit.
        """
        wait_s = self.device.thermal.wait_s if self.is_strict else 0.0
        reasons = ready(self.session, expected_bytes, wait_s)
        if reasons and self.is_strict:
            raise not_ready(self.name, reasons, wait_s)
        return tuple(reasons)

    def runtime_version(self, runtime: str) -> str:
        """Version of a runtime on the board; asked once.

        Raises:
            DeviceError: it is not installed there, or cannot be imported.
        """
        if runtime not in self._versions:
            try:
                reply, _ = self.request("runtime", {"name": runtime}, work_s=120)
            except Refusal as error:
                package = RUNTIMES[runtime][1] if runtime in RUNTIMES else runtime
                how = f"run: edgeprune devices setup {self.name}; or there: pip install {package}"
                hint = None if runtime_facts(runtime).of_system else how  # the message says how
                raise DeviceError(error.message, hint=hint) from error
            version = replies.checked(replies.RuntimeVersion, reply, self.name).version
            self._versions[runtime] = version
        return self._versions[runtime]

    def fingerprint(self, runtime: str, threads: int) -> Fingerprint:
        """What measurements with this runtime on this board are made on. The stamp says whether its times mean anything."""
        facts = self._facts().model_dump(include=set(Fingerprint.model_fields))
        # What runs Core ML from Python is a Mac, never the phone that a target is for.
        is_stand_in = self.device.stand_in or runtime in COREML_UNITS
        stamp: Stamp = "stand-in" if is_stand_in else "measured"
        if self._facts().emulated:
            stamp = "emulated"  # says more than "stand-in": not even another machine's times
        return Fingerprint(
            device=self.name if self.origin is None else self.origin.device,
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
            runtime: one of ``litert``, ``tflite-runtime``, ``onnxruntime``, ``executorch``, ``tensorrt``.
            threads: threads of the runtime.
            delegate: ``False`` runs TFLite files on the built-in kernels, without XNNPACK.

        Raises:
            Refusal: ``kind`` is ``load`` when the runtime dislikes the file, ``runtime`` when it is not installed.
        """
        fields = {
            "key": key,
            "runtime": runtime,
            "threads": threads,
            "delegate": delegate,
            "sha256": sha256_bytes(content),
        }
        self.push(content)
        reply, _ = self.request("load", fields, work_s=_load_s(runtime, 1))
        self._loaded[key] = ("load", fields, content)
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
            "sha256": sha256_bytes(blob),
        }
        self.push(blob)
        reply, _ = self.request("load_many", fields, work_s=_load_s(runtime, len(files)))
        models = replies.checked(replies.ManyLoaded, reply, self.name).models
        self._expect(set(models) == set(files), "models that were not asked for")
        self._loaded.update(dict.fromkeys(files, ("load_many", fields, blob)))
        return {
            key: model.error
            if isinstance(model, replies.LoadFailure)
            else self._remember(key, model)
            for key, model in ((key, models[key]) for key in files)
        }

    def _remember(self, key: str, model: replies.LoadedModel) -> Loaded:
        self._first_s[key] = model.first_ns / 1e9
        self._load_s[key] = model.load_ns / 1e9
        inputs = tuple(tensor.spec() for tensor in model.inputs)
        outputs = tuple(tensor.spec() for tensor in model.outputs)
        told = model.placement
        delegated = None if told is None else (told.delegated, told.operators)
        return Loaded(
            key, model.load_ns, model.first_ns, inputs, outputs, delegated, model.compile_ns
        )

    def unload(self, keys: Iterable[str]) -> None:
        """Forget models; unknown keys are no error."""
        gone = list(keys)
        for key in gone:
            self._first_s.pop(key, None)
            self._load_s.pop(key, None)
            self._loaded.pop(key, None)
        self.request("unload", {"keys": gone})

    def time(self, keys: Sequence[str], plan: TimingPlan, *, purpose: str = "") -> Timing:
        """Time loaded models in the same rounds, so that they meet the same noise.

        Args:
            keys: loaded models, each once.
            plan: how long to look.
            purpose: what the times are for. With one, which must be used once only in a run, they are kept in the board's store.

        Raises:
            NotReady: a strict board is too hot or too busy to begin, and stayed so.
            Unreliable: a strict board was disturbed for too much of it, three times.
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
            "settle": plan.warmup_ms >= SETTLE_FROM_MS,
            "reload": plan.reload,
            "seed": plan.seed,
            "purpose": purpose,
        }
        strict = self.is_strict and not plan.tolerant
        if strict and not self._was_ready:
            self.wait_until_ready()
            self._was_ready = True
        for _ in range(TRIES):
            timing = self._timed(keys, plan, fields)
            if timing.unreliable is None or not strict:
                return timing
            self.wait_until_ready()
        why = str(timing.unreliable).removesuffix(ALL_COUNT)  # not here: none is used
        raise Unreliable(
            f"device {self.name!r}: {why}, in {TRIES} tries",
            hint="end what else runs there, or cool it",
        )

    def _timed(self, keys: Sequence[str], plan: TimingPlan, fields: dict[str, Any]) -> Timing:
        timed = self._timed_reply(keys, plan, fields)
        return judged(
            Timing(
                blocks={key: tuple(block.block() for block in timed.blocks[key]) for key in keys},
                before=timed.before.telemetry(),
                after=timed.after.telemetry(),
                peak_memory_bytes=dict(timed.peak_memory_bytes),
                inside_ns=dict(timed.inside_ns),
                stop_reason=timed.stop_reason,
                notes=timed.notes,
            )
        )

    def _timed_reply(
        self, keys: Sequence[str], plan: TimingPlan, fields: dict[str, Any]
    ) -> replies.Timed:
        """The checked reply to a timing request: from the store when it is there, else from the board."""
        loads = [(key, self._loaded[key][1]) for key in keys if key in self._loaded]
        key = ""
        if self._store is not None and fields["purpose"] and len(loads) == len(keys):
            stands = sorted({(load["runtime"], load["threads"]) for _, load in loads})
            asked = {**fields, "max_foreign_cpu_ratio": self.device.max_foreign_cpu_ratio}
            key = store_key([self.fingerprint(*s).key() for s in stands], loads, asked)
        reply = self._store.get(key) if self._store is not None and key else None
        if reply is not None:
            self.times_from_store += 1
            return self._checked(reply, keys, plan, math.inf)
        start = time.monotonic()
        reply, _ = self.session.request(
            "time", fields, work_s=self._time_limit_s(keys, plan), journalled=True
        )
        elapsed_ns = math.inf if self.origin is not None else (time.monotonic() - start) * 1e9
        timed = self._checked(reply, keys, plan, elapsed_ns)
        # What a board may have to measure again must not come back from the store for ever.
        is_fine = not self.is_strict or timed.rejected_ratio() <= MAX_REJECTED_RATIO
        if self._store is not None and key and is_fine:
            self._store.put(key, reply)
        return timed

    def _checked(
        self, reply: dict[str, Any], keys: Sequence[str], plan: TimingPlan, elapsed_ns: float
    ) -> replies.Timed:
        timed = replies.checked(replies.Timed, reply, self.name)
        runs = (plan.min_runs, plan.max_runs)
        problem = timed.problem(keys, rounds=plan.rounds, runs=runs, elapsed_ns=elapsed_ns)
        self._expect(not problem, problem)
        return timed

    def _time_limit_s(self, keys: Sequence[str], plan: TimingPlan) -> float:
        """Ten times the expected duration and half a minute. A first call bounds the later ones from above, nearly always."""
        expected = 0.0
        for key in keys:
            call = max(self._first_s.get(key, 1.0), 2e-4)
            block = max(plan.block_ms / 1e3, plan.min_runs * call) + 2 * call
            expected += plan.warmup_ms / 1e3 + (_WARMUP_RUNS + 5) * call + plan.rounds * block
            if plan.reload:  # as long again, and one load that began before that
                expected += plan.rounds * block + self._load_s.get(key, 1.0)
        return LINK_S + 15 * expected  # more than the board allows itself, so that it answers first

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
        expected_s = len(inputs) * self._first_s.get(key, 1.0)
        fields = {"key": key, "expected_s": expected_s}
        _, answer = self.request("infer", fields, blob.getvalue(), work_s=LINK_S + 15 * expected_s)
        try:
            outputs = npy_array(answer)
        except ValueError as error:
            raise DeviceError(
                f"device {self.name!r} sent outputs that are no array: {error}"
            ) from error
        is_float = outputs.dtype == np.float32 and outputs.ndim >= 1
        self._expect(is_float, "outputs that are not float32")
        self._expect(
            len(outputs) == len(inputs), f"{len(outputs)} outputs for {len(inputs)} inputs"
        )
        if not np.isfinite(outputs).all():
            raise Refusal("outputs", f"device {self.name!r} sent outputs that are not finite")
        return outputs

    def profile(self, key: str, runs: int) -> tuple[NodeTime, ...] | None:
        """Median time of every node by the runtime's own profiler, in the order of execution; ``None`` where it has none."""
        expected_s = 2 * (runs + 3) * self._first_s.get(key, 1.0)
        fields = {"key": key, "runs": runs, "expected_s": expected_s}
        try:
            reply, _ = self.request("profile", fields, work_s=LINK_S + 15 * expected_s)
        except Refusal as error:
            if error.kind == "unsupported":
                return None
            raise
        nodes = replies.checked(replies.Profiled, reply, self.name).nodes
        return tuple(NodeTime(**node.model_dump()) for node in nodes)

    def _expect(self, fine: bool, what: str) -> None:
        if not fine:
            raise DeviceError(f"device {self.name!r} sent {what}")


def open_board(
    name: str,
    device: Device,
    *,
    exclusive: bool = True,
    wait_s: float = 0.0,
    job: str = "edgeprune",
    say: Callable[[str], None] = lambda _: None,
    backoff_s: Sequence[float] = BACKOFF_S,
    record: Path | None = None,
    store: MeasurementStore | None = None,
) -> Board:
    """A board with a running agent.

    Args:
        name: the device's name, for messages and fingerprints.
        device: how to reach it.
        exclusive: hold it alone, which timing needs; ``False`` is for looking, setting up and running models.
        wait_s: how long to wait for another client to finish.
        job: what it is for; other clients are shown it.
        say: told in one line when a broken link was survived.
        backoff_s: how long to wait before each try to come back after one.
        record: a file to record the conversation in; it is complete when the board is closed.
        store: where timings are kept. See :class:`Board`.

    Raises:
        SpecError, IntegrityError: the recording cannot be written, or (of a ``replay`` device) read.
        Unreachable, HostKeyMismatch, AuthFailed: the device cannot be reached, is not the pinned one, or refuses the login.
        Busy: another client holds it.
        DeviceError: the agent failed; the message has the end of what the board said.
    """
    lease = LeaseTerms(exclusive, wait_s, job)
    board = Board(name, device, lease, say=say, backoff_s=backoff_s, record=record, store=store)
    try:
        board.hello()
    except BaseException:
        board.close()
        raise
    return board


def _load_s(runtime: str, files: int) -> float:
    """Patience for loading: a runtime is imported and every file runs once. More than the board allows itself."""
    return LINK_S + 15 * (10 + LOAD_S.get(runtime, 1.0) * files)

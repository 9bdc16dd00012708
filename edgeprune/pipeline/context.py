"""A resolved request, and what every stage needs to work on it: boards, format, data as the model sees it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from edgeprune.compress.evaluate import quality
from edgeprune.compress.groups.find import ChannelGroup, find_groups
from edgeprune.compress.groups.masked import remove_dead
from edgeprune.devices.board import Board
from edgeprune.devices.link.recording import recording_path
from edgeprune.devices.timing.measure import ModelFile
from edgeprune.formats import Format
from edgeprune.formats.shared.model_bytes import model_bytes
from edgeprune.progress import Progress
from edgeprune.records.artifact import Artifact
from edgeprune.records.budget import Budget
from edgeprune.records.device import Device
from edgeprune.records.files import sha256_file
from edgeprune.records.formats import stand_in
from edgeprune.records.measurement import Fingerprint, Measurement
from edgeprune.records.names import Precision
from edgeprune.records.plan import FrozenGroup, Scope
from edgeprune.records.report import FormatChoice, LedgerEntry
from edgeprune.records.target import Profile, Runtime, Target
from edgeprune.records.workload import Int8
from edgeprune.workload.answers import raw_logits
from edgeprune.workload.dataset import Split, model_input, to_layout
from edgeprune.workload.load import LoadedWorkload
from edgeprune.workload.trace import traced

# At most so many samples, and so many numbers, go to a board at once.
INFER_CHUNK, INFER_NUMBERS = 256, 1 << 22
NOT_RUN = "not run"
AUTO = Int8()


@dataclass(frozen=True)
class FormatCandidate:
    """A target in one of the formats that may ship, with the runtime that it is for and what must be said of it."""

    target: Target
    for_runtime: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """A fully resolved request. ``companions`` may help ``device`` to time kernels; what is judged is measured on ``device`` alone."""

    loaded: LoadedWorkload
    target: Target
    profile: Profile
    device_name: str
    device: Device
    budget: Budget
    max_drop: float
    importance: str
    seed: int
    command: str
    scope: Scope = "global"
    notes: tuple[str, ...] = ()
    sustained: float | None = None  # seconds
    record: Path | None = None
    companions: tuple[tuple[str, Device], ...] = ()
    widths: Mapping[str, int] | None = None  # of a plan that is given instead of searched
    tables: Path | None = None  # kernel times of the board, read and added to
    int8: Int8 = AUTO  # with the target's ``io`` filled in
    for_runtime: str = ""  # that the target names, where another one stands in for it
    candidates: tuple[FormatCandidate, ...] = ()  # where measuring them decides about the format
    wait_s: float = 0.0  # for a board that another client holds

    @property
    def shipped_runtime(self) -> str:
        """The runtime that the files are for, whatever stands in for it here."""
        return self.for_runtime or self.target.runtime.name

    def in_format(self, candidate: FormatCandidate) -> Job:
        """The same request with its format decided."""
        return replace(
            self,
            target=candidate.target,
            for_runtime=candidate.for_runtime,
            notes=candidate.notes,
            candidates=(),
        )

    def device_key(self) -> list[Any]:
        """What tells the device from others, as plain data; a replay is told by the content of its recording."""
        found: list[Any] = [self.device_name, self.device.model_dump(mode="json")]
        if self.device.transport == "replay":
            found.append(sha256_file(recording_path(self.device)))
        return found


@dataclass
class Context:
    """What every stage needs: the job, the boards, the data as the model sees it.

    ``ship`` is the format of the file that ships. ``form`` is the one that structures are searched with: the twin of ``ship`` where it has
    one, because files of ``ship`` cannot be cut then, else the same. ``runs_ship`` says whether every board here has the runtime of
    ``ship``; where one has not, whole nets are files of the twin too, and what ships is converted but never run.

    ``board`` is timed, the answers of ``proof`` are judged, and ``host`` runs what needs no device. The device of the job is both ``board``
    and ``proof``, unless it is emulated: its answers are real and its times mean nothing, so ``board`` is then this machine.
    """

    job: Job
    form: Format
    ship: Format
    board: Board
    proof: Board
    host: Board
    progress: Progress
    runs_ship: bool = True
    formats: FormatChoice | None = None  # how the format was chosen, where it was

    def share(self, other: object) -> None:
        """Take over what a context of the same model and data, or what came before it, has worked out and no format changes."""
        for name in ("prepared", "example", "development", "reference", "groups", "program"):
            if name in vars(other):
                vars(self)[name] = vars(other)[name]

    @property
    def whole(self) -> Format:
        """The format of the whole nets that are timed and asked: what ships, where it runs here."""
        return self.ship if self.runs_ship else self.form

    @property
    def has_twin(self) -> bool:
        """Whether kernels are cut from files of another format than the one that ships."""
        return self.form is not self.ship

    @property
    def is_host(self) -> bool:
        """Whether the device is this machine: then one run serves as host and as device."""
        return self.proof is self.host

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be said when times and numerics are of two machines, or of a file that is not the one that ships."""
        return (*self._twin_notes(), *self._proof_notes())

    def _twin_notes(self) -> tuple[str, ...]:
        if not self.has_twin:
            return ()
        ship, twin, runtime = self.ship.info.name, self.form.info.name, self.job.target.runtime.name
        if self.runs_ship:
            return (f"single kernels are those of {twin}, which has the kernels of {ship}",)
        return (
            f"the {ship} file was not run: not every machine here has {runtime};"
            f" times, quality and answers are of the {twin} file of the same net (stand-in)",
        )

    def _proof_notes(self) -> tuple[str, ...]:
        if self.board is self.proof:
            return ()
        runtime, proof = self.runtime_on(self.board).name, self.proof.name
        note = f"numerics were verified on the emulated device {proof}; times are of this machine (stand-in)"
        if runtime == self.job.target.runtime.name:
            return (note,)
        return (note, f"times are of {runtime}, which stands in for {self.job.target.runtime.name}")

    def board_key(self) -> list[Any]:
        """What tells the timed board from others, as plain data."""
        if self.board is self.proof:
            return self.job.device_key()
        return [self.board.name, self.board.device.model_dump(mode="json")]

    def runtime_on(self, board: Board) -> Runtime:
        """What runs whole nets on a board: on this machine, when it stands in, LiteRT for tflite-runtime."""
        if not self.runs_ship:
            return self.kernel_runtime_on(board)
        return stand_in_runtime(self.job.target.runtime, board.device)

    def kernel_runtime_on(self, board: Board) -> Runtime:
        """What runs the files that single kernels are cut from."""
        if self.has_twin:
            name, threads = next(iter(self.form.info.runtimes)), self.job.target.runtime.threads
            return Runtime.model_validate({"name": name, "threads": threads})
        return stand_in_runtime(self.job.target.runtime, board.device)

    def fingerprint(self, runtime: Runtime) -> Fingerprint:
        """What measurements on the timed board are made on; a stand-in where the file that ships does not run."""
        found = self.board.fingerprint(runtime.name, runtime.threads)
        if self.runs_ship or found.stamp != "measured":
            return found
        return found.model_copy(update={"stamp": "stand-in"})

    def stamped(self, found: Iterable[Measurement]) -> dict[str, Measurement]:
        """Measurements by name, as stand-ins where the file that ships does not run."""
        if self.runs_ship:
            return {m.name: m for m in found}
        stamp = self.fingerprint(self.runtime_on(self.board)).stamp
        return {m.name: m.model_copy(update={"stamp": stamp}) for m in found}

    def shipping_version(self) -> str:
        """Version of the runtime that the shipped file was tried with; says so where it was not run."""
        name = self.job.target.runtime.name
        return self.proof.runtime_version(name) if self.runs_ship else NOT_RUN

    def precisions(self, wanted: Sequence[Precision]) -> tuple[Precision, ...]:
        """Of some precisions, those between which times on the timed board may decide.

        All on the target's own hardware. On a stand-in INT8, where the target allows it: how much INT8 gains is the processor's affair (a
        desktop without 8-bit dot products gains next to nothing, a phone or a Raspberry Pi much), and onnxruntime even computes the INT8
        graph of TensorRT in float.
        """
        runtime = self.runtime_on(self.board)
        ranks = self.fingerprint(runtime).stamp == "measured"
        return tuple(wanted) if ranks or "int8" not in wanted else ("int8",)

    @cached_property
    def prepared(self) -> tuple[nn.Module, tuple[str, ...]]:
        """The user's model without the channels that were masked as a whole, and what was done to it."""
        loaded = self.job.loaded
        if not loaded.dead_channels:
            return loaded.model, ()
        example = torch.from_numpy(self.example)
        groups, _ = find_groups(loaded.model, example)
        x = torch.from_numpy(self.calibration)
        return remove_dead(loaded.model, groups, loaded.dead_channels, example, x)

    @property
    def model(self) -> nn.Module:
        """The dense model, in eval mode."""
        return self.prepared[0]

    def inputs(self, split: Split, n: int) -> np.ndarray:
        """``n`` drawn samples of a split (:meth:`~edgeprune.workload.dataset.Split.drawn`) as the model sees them: ``float32 [n, ...]``."""
        return model_input(split.drawn(n).x, self.job.loaded.preprocess)

    @cached_property
    def example(self) -> np.ndarray:
        """One real input ``[1, ...]``."""
        return self.inputs(self.job.loaded.dataset.train, 1)

    @cached_property
    def calibration(self) -> np.ndarray:
        """The real samples that set the INT8 ranges."""
        count = self.job.target.quantization.calibration_samples
        return self.inputs(self.job.loaded.dataset.train, count)

    @cached_property
    def development(self) -> torch.Tensor:
        """The development split as the model sees it."""
        split = self.job.loaded.dataset.development
        return torch.from_numpy(model_input(split.x, self.job.loaded.preprocess))

    @cached_property
    def reference(self) -> torch.Tensor:
        """Logits of the dense model on the development split, ``[N, K]``."""
        split, preprocess = self.job.loaded.dataset.development, self.job.loaded.preprocess
        return raw_logits(self.model, split.x, preprocess)

    @cached_property
    def groups(self) -> tuple[tuple[ChannelGroup, ...], tuple[FrozenGroup, ...]]:
        """Channel groups, and what stays frozen."""
        return find_groups(self.model, torch.from_numpy(self.example))

    @cached_property
    def program(self) -> ExportedProgram:
        """The dense model's forward pass as one graph. Raises as :func:`edgeprune.workload.trace.traced`."""
        return traced(self.model, self.example)

    @property
    def full(self) -> dict[str, int]:
        """Full width of every group."""
        return {g.name: g.channels for g in self.groups[0]}

    def entry(
        self,
        stage: str,
        found: torch.Tensor,
        *,
        precision: Precision = "fp32",
        where: str = "torch",
        note: str = "",
    ) -> LedgerEntry:
        """A ledger line from logits on (the first rows of) the development split."""
        y = self.job.loaded.dataset.development.y
        n = len(found)
        metric, value = quality(found, None if y is None else y[:n], self.reference[:n])
        return LedgerEntry.model_validate(
            {
                "stage": stage, "metric": metric, "value": value, "n": n,
                "precision": precision, "where": where, "note": note,
            }
        )  # fmt: skip

    def run_file(
        self, board: Board, file: Path, x: np.ndarray, *, delegate: bool = True
    ) -> torch.Tensor:
        """Logits ``[N, K]`` of a whole net on a board, in that board's child process."""
        runtime = self.runtime_on(board)
        key = f"{file.name}-{'fast' if delegate else 'built-in'}"
        board.load(
            key, model_bytes(file), runtime=runtime.name, threads=runtime.threads, delegate=delegate
        )
        try:
            size = max(1, min(INFER_CHUNK, INFER_NUMBERS // max(1, x[:1].size)))
            parts = [
                board.infer(key, to_layout(x[i : i + size], self.whole.info.layout))
                for i in range(0, len(x), size)
            ]
        finally:
            board.unload([key])
        return torch.from_numpy(np.concatenate(parts))

    def model_file(self, name: str, path: Path, artifact: Artifact) -> ModelFile:
        """A file ready to be measured."""
        return ModelFile(name, model_bytes(path), artifact.precision, artifact.sha256)


def stand_in_runtime(runtime: Runtime, device: Device) -> Runtime:
    """The runtime for a device: another one for the same files where this machine stands in and cannot have it."""
    name = stand_in(runtime.name)
    if name is None or device.transport not in ("local", "replay") or not device.stand_in:
        return runtime
    return runtime.model_copy(update={"name": name})

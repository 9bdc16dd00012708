"""A resolved request, and what every stage needs to work on it: boards, format, data as the model sees it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeprune.compress.dead import remove_dead
from edgeprune.compress.evaluate import logits, quality
from edgeprune.compress.groups import ChannelGroup, find_groups
from edgeprune.datasets import Split, model_input, to_layout
from edgeprune.devices.board import Board
from edgeprune.devices.measure import ModelFile
from edgeprune.formats import Format
from edgeprune.progress import Progress
from edgeprune.results import Artifact, FrozenGroup, LedgerEntry
from edgeprune.specs import Budget, Device, Precision, Profile, Target
from edgeprune.workload import LoadedWorkload

INFER_CHUNK = 256
PIXEL_SEED = 20261123


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
    notes: tuple[str, ...] = ()
    companions: tuple[tuple[str, Device], ...] = ()


@dataclass
class Context:
    """What every stage needs: the job, the boards, the data as the model sees it."""

    job: Job
    form: Format
    board: Board
    host: Board
    progress: Progress

    @property
    def is_host(self) -> bool:
        """Whether the device is this machine: then one run serves as host and as device."""
        return self.board is self.host

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

    def inputs(self, split: Split, n: int, *, seed: int = PIXEL_SEED) -> np.ndarray:
        """``n`` samples of a split, drawn by seed, as the torch model sees them: ``float32 [n, ...]``."""
        order = np.random.default_rng(seed).permutation(len(split))[:n]
        return model_input(split.x[np.sort(order)], self.job.loaded.preprocess)

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
        return logits(self.model, self.development)

    @cached_property
    def groups(self) -> tuple[tuple[ChannelGroup, ...], tuple[FrozenGroup, ...]]:
        """Channel groups, and what stays frozen."""
        return find_groups(self.model, torch.from_numpy(self.example))

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
        """Logits ``[N, K]`` of a file on a board, in that board's child process."""
        runtime = self.job.target.runtime
        key = f"{file.name}-{'fast' if delegate else 'built-in'}"
        board.load(
            key, file.read_bytes(), runtime=runtime.name, threads=runtime.threads, delegate=delegate
        )
        try:
            laid_out = to_layout(x, self.form.info.layout)
            parts = [
                board.infer(key, laid_out[i : i + INFER_CHUNK])
                for i in range(0, len(laid_out), INFER_CHUNK)
            ]
        finally:
            board.unload([key])
        return torch.from_numpy(np.concatenate(parts))

    def model_file(self, name: str, path: Path, artifact: Artifact) -> ModelFile:
        """A file ready to be measured."""
        return ModelFile(name, path.read_bytes(), artifact.precision, artifact.sha256)

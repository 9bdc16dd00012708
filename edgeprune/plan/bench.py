"""Where and how candidate files are timed: whole ones beside each other, single kernels, and one against the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.devices.board import Board
from edgeprune.devices.plans import SEARCH, TimingPlan
from edgeprune.devices.timing.decide import Decision, decide
from edgeprune.devices.timing.measure import ModelFile, measure
from edgeprune.devices.timing.pool import Pool
from edgeprune.progress import Progress
from edgeprune.records.files import sha256_bytes
from edgeprune.records.measurement import Measurement
from edgeprune.records.names import Precision
from edgeprune.records.target import Runtime

CONFIRM_LOOKS = (12, 24, 48)  # pairs; enough to be sure within a percent where blocks vary by two


@dataclass(frozen=True)
class Stand:
    """Where and how the candidate files run. Single kernels may be timed on other boards of the class too: those of ``pool``.

    ``phase`` goes before the purpose of whole files, so that a second search of one run has purposes of its own. ``kernel_runtime`` runs
    single kernels where they are cut from files of another format than whole nets.
    """

    board: Board
    runtime: Runtime
    precision: Precision
    pool: Pool | None = None
    phase: str = ""
    kernel_runtime: Runtime | None = None

    def measure(
        self, files: Mapping[str, bytes], purpose: str, plan: TimingPlan = SEARCH
    ) -> dict[str, Measurement]:
        """Interleaved measurements of whole files, by name. ``purpose`` is used once in a run; see :meth:`Board.time`."""
        models = [ModelFile(n, c, self.precision, sha256_bytes(c)) for n, c in files.items()]
        found = measure(
            self.board,
            models,
            runtime=self.runtime.name,
            threads=self.runtime.threads,
            plan=plan,
            purpose=self.phase + purpose,
        )
        return {m.name: m for m in found}

    def judge(self, candidate: bytes, dense: bytes, budget_ratio: float, purpose: str) -> Decision:
        """One file against a share of the dense one's latency, with more loads than :meth:`measure` takes. ``purpose`` as there."""
        files = [
            ModelFile(name, content, self.precision, sha256_bytes(content))
            for name, content in (("chosen", candidate), ("dense", dense))
        ]
        return decide(
            self.board,
            *files,
            runtime=self.runtime.name,
            threads=self.runtime.threads,
            budget_ratio=budget_ratio,
            looks=CONFIRM_LOOKS,
            purpose=self.phase + purpose,
        )

    def kernels(
        self, files: Mapping[str, bytes], progress: Progress, purpose: str
    ) -> dict[str, float]:
        """Nanoseconds of single kernels, by name. ``purpose`` is used once in a run; see :meth:`Board.time`."""
        runtime = self.kernel_runtime or self.runtime
        pool = self.pool or Pool(self.board, runtime=runtime.name, threads=runtime.threads)
        return pool.time_kernels(files, progress=progress, purpose=purpose)

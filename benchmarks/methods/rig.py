"""One device, one net and one training recipe that all compared pruners share."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgeprune.compress.evaluate import quality
from edgeprune.compress.heal.recover import recover
from edgeprune.compress.repair.compensate import compensate
from edgeprune.compress.repair.norm_statistics import recalibrate_batchnorm
from edgeprune.devices.plans import SEARCH
from edgeprune.devices.timing.measure import ModelFile, compare, measure
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files import export
from edgeprune.pipeline.stages.finish import Prepared
from edgeprune.progress import Silent
from edgeprune.records.files import digest_of, sha256_file, write_bytes
from edgeprune.records.measurement import Comparison
from edgeprune.records.workload import Recovery
from edgeprune.workload.answers import logits
from edgeprune.workload.dataset import Split, model_input
from methods.candidate import Candidate, Method

REPAIR_SAMPLES = 1024
COARSE = 9  # knob settings that are timed first
FINE, FINE_ROUNDS = 4, 3
CLOSE = 0.985  # of the budget: a structure that uses this much needs no further search
Key = tuple[tuple[str, int], ...]


@dataclass
class Rig:
    """Times structures, trains nets, reads accuracies. Everything is cached in ``folder`` or in memory."""

    context: Context
    ready: Prepared
    folder: Path
    recovery: Recovery
    ratios: dict[Key, float] = field(default_factory=dict)

    def measure(self, structures: Sequence[Mapping[str, int]]) -> None:
        """Time the structures that were not timed yet, interleaved with dense."""
        if not self.ratios and self._measured.exists():
            kept = json.loads(self._measured.read_text(encoding="utf-8"))
            self.ratios.update({tuple(sorted(w.items())): ratio for w, ratio in kept})
        missing = {tuple(sorted(w.items())): w for w in structures}
        missing = {key: w for key, w in missing.items() if key not in self.ratios}
        if not missing:
            return
        file, number = self.ready.file, len(self.ratios)
        files = {str(i): file.resized(w) for i, w in enumerate(missing.values())}
        found = self.ready.stand.measure({"dense": file.resized({}), **files}, f"compare-{number}")
        for i, key in enumerate(missing):
            self.ratios[key] = compare(found[str(i)], found["dense"]).ratio
        plain = [[dict(key), ratio] for key, ratio in self.ratios.items()]
        write_bytes(self._measured, json.dumps(plain).encode())

    @property
    def trained(self) -> Path:
        """The folder of the files that were trained with this recipe."""
        return self.folder / f"trained-{digest_of(self.recovery)}"

    @property
    def _knobs(self) -> Path:
        return self.folder / "knobs.json"

    @property
    def _measured(self) -> Path:
        return self.folder / "measured.json"

    def fit(
        self, method: Method, asked: Sequence[float]
    ) -> Iterator[tuple[float, Candidate | None]]:
        """For each asked share of the dense latency, the least pruned net of a method that was measured within it.

        The knob is first tried at :data:`COARSE` places, then between the last that was too slow and the first that was fast enough.
        What was found is kept in the folder, so that a run that goes on makes one structure and not dozens.
        """
        for ratio in asked:
            kept = self._kept_knob(method.name, ratio)
            if kept is None:
                break
            candidate = method.at(kept) if kept >= 0 else None
            if candidate is not None:
                self.measure([candidate.widths])
                if self.ratios[candidate.key] > ratio:
                    break  # the method or its model has changed since
            yield ratio, candidate
            asked = asked[1:]
        if not asked:
            return
        tried: dict[float, Candidate] = {}

        def look(knobs: Sequence[float]) -> None:
            new = {k: method.at(k) for k in knobs if k not in tried}
            self.measure([c.widths for c in new.values()])
            tried.update(new)

        look([i / COARSE for i in range(COARSE + 1)])
        for ratio in asked:
            for _ in range(FINE_ROUNDS):
                found = self._least(tried, ratio)
                if found is None or self.ratios[tried[found].key] >= CLOSE * ratio:
                    break
                below = max((k for k in tried if k < found), default=found)
                if found - below < 1e-3:
                    break
                look([below + (found - below) * (i + 1) / (FINE + 1) for i in range(FINE)])
            found = self._least(tried, ratio)
            self._keep_knob(method.name, ratio, found)
            yield ratio, None if found is None else tried[found]

    def _kept_knob(self, name: str, ratio: float) -> float | None:
        """The knob that was found earlier; -1 where none was within the budget, ``None`` where none was looked for."""
        if not self._knobs.exists():
            return None
        found = json.loads(self._knobs.read_text(encoding="utf-8")).get(f"{name} {ratio:.6f}")
        return None if found is None else float(found)

    def _keep_knob(self, name: str, ratio: float, knob: float | None) -> None:
        kept = json.loads(self._knobs.read_text(encoding="utf-8")) if self._knobs.exists() else {}
        kept[f"{name} {ratio:.6f}"] = -1 if knob is None else knob
        write_bytes(self._knobs, json.dumps(kept).encode())

    def _least(self, tried: Mapping[float, Candidate], ratio: float) -> float | None:
        """The knob of the largest measured structure within the budget."""
        fitting = [k for k, c in tried.items() if self.ratios[c.key] <= ratio]
        return min(fitting) if fitting else None

    def repaired(self, candidate: Candidate) -> nn.Module:
        """What training starts from."""
        pruned, x = candidate.build(), self._train_inputs()
        if candidate.kept_outputs is None:
            return recalibrate_batchnorm(pruned, x)
        layers = {name for name, _ in pruned.named_modules()}
        kept = {n: k for n, k in candidate.kept_outputs.items() if n in layers}
        return compensate(pruned, self.context.model, kept, x, progress=Silent())[0]

    def one_shot(self, candidate: Candidate) -> dict[str, float | None]:
        """Accuracy on the development split before any training."""
        pruned = candidate.build()
        fresh = recalibrate_batchnorm(pruned, self._train_inputs())
        repaired = None
        if candidate.kept_outputs is not None:
            repaired = self._torch_accuracy(self.repaired(candidate))
        return {
            "naive": self._torch_accuracy(pruned),
            "recalibrated": self._torch_accuracy(fresh),
            "compensated": repaired,
        }

    def _torch_accuracy(self, model: nn.Module) -> float:
        y = self.context.job.loaded.dataset.development.y
        found = logits(model, self.context.development)
        return quality(found, y, self.context.reference)[1]

    def _train_inputs(self) -> torch.Tensor:
        return torch.from_numpy(
            self.context.inputs(self.context.job.loaded.dataset.train, REPAIR_SAMPLES)
        )

    def train(self, start: nn.Module, seed: int) -> nn.Module:
        """The distillation that every method gets."""
        data = self.context.job.loaded.dataset
        preprocess = self.context.job.loaded.preprocess
        return recover(
            start,
            self.context.model,
            data.train,
            data.selection,
            self.recovery,
            preprocess=preprocess,
            seed=seed,
            progress=self.context.progress,
        ).model

    def shipped(self, name: str, seed: int, start: Callable[[], nn.Module]) -> Shipped:
        """Train, export and quantise with the one recipe, and read both splits once; kept in the folder by name and seed."""
        folder = self.trained / f"{name}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / "correct.json"
        if not note.exists():
            began = time.monotonic()
            model = self.train(start(), seed)
            int8 = (
                folder
                / export.pruned_files(self.context, model, folder, limit_ms=math.inf).int8.path
            )
            plain = {
                "file": int8.name,
                "seconds": time.monotonic() - began,
                "parameters": sum(p.numel() for p in model.parameters()),
                **{s: self.correct(int8, s).astype(int).tolist() for s in ("development", "test")},
            }
            write_bytes(note, json.dumps(plain).encode())
        return Shipped.of(json.loads(note.read_text(encoding="utf-8")), folder)

    def correct(self, path: Path, split: str) -> np.ndarray:
        """Which images of a split a file gets right: ``bool [N]``."""
        data: Split = getattr(self.context.job.loaded.dataset, split)
        assert data.y is not None
        x = model_input(data.x, self.context.job.loaded.preprocess)
        found = self.context.run_file(self.context.host, path, x)
        return np.asarray(found.argmax(1).numpy() == data.y)

    def final(self, files: Mapping[str, Path], dense: Mapping[str, Path]) -> dict[str, Comparison]:
        """The files against ``dense["int8"]``, and ``dense["int8"]`` against ``dense["fp32"]`` under its own name."""
        runtime = self.context.runtime_on(self.context.board)
        models = [
            ModelFile(n, p.read_bytes(), "fp32" if n == "dense-fp32" else "int8", sha256_file(p))
            for n, p in ({f"dense-{k}": v for k, v in dense.items()} | dict(files)).items()
        ]
        found = {
            m.name: m
            for m in measure(
                self.context.board,
                models,
                runtime=runtime.name,
                threads=runtime.threads,
                plan=SEARCH,
            )
        }
        ratios = {n: compare(found[n], found["dense-int8"]) for n in files}
        ratios["dense-int8"] = compare(found["dense-int8"], found["dense-fp32"])
        return ratios


@dataclass(frozen=True)
class Shipped:
    """One trained file and which images it gets right."""

    path: Path
    seconds: float
    parameters: int
    development: np.ndarray
    test: np.ndarray

    @classmethod
    def of(cls, plain: Mapping[str, Any], folder: Path) -> Shipped:
        """From what :meth:`Rig.shipped` wrote."""
        arrays = {s: np.array(plain[s], bool) for s in ("development", "test")}
        return cls(folder / plain["file"], plain["seconds"], plain["parameters"], **arrays)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of the hypothesis that both are right equally often, from the images that one alone got right.

    >>> round(mcnemar(10, 2), 4)
    0.0386
    >>> mcnemar(0, 0)
    1.0
    """
    n, k = only_a + only_b, min(only_a, only_b)
    if n == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)

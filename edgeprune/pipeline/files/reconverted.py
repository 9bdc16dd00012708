"""Whole nets of a format whose files cannot be cut: the model is cut, and converted anew for every structure."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgeprune.compress.groups.find import ChannelGroup, remove_channels
from edgeprune.formats import Format, Kernel, Resizable
from edgeprune.formats.shared.model_bytes import model_bytes
from edgeprune.progress import Progress

Widths = tuple[int, ...]


class Converted:
    """A :class:`edgeprune.formats.Resizable` whose kernels are those of the twin and whose whole files are conversions.

    A conversion takes seconds where a twin's file takes milliseconds; each structure is converted once. As in any other resizable file,
    the leading channels stay: right for timing, meaningless for accuracy.

    Args:
        twin: the dense file of the twin format; single kernels are cut from it.
        form: the format of the whole files.
        model: the dense model, in eval mode; not changed.
        groups: its channel groups.
        example: one real input ``[1, ...]``.
        calibration: real inputs for the ranges of INT8 files, ``float32 [N, ...]``; ``None`` for FP32 files.
        progress: told which structure is converted.
    """

    def __init__(
        self,
        twin: Resizable,
        *,
        form: Format,
        model: nn.Module,
        groups: Sequence[ChannelGroup],
        example: np.ndarray,
        calibration: np.ndarray | None,
        progress: Progress,
    ) -> None:
        self.kernels: tuple[Kernel, ...] = twin.kernels
        self.blocks: Mapping[str, frozenset[int]] = twin.blocks
        self._twin, self._form, self._model = twin, form, model
        self._groups = {group.name: group for group in groups}
        self._example, self._calibration, self._progress = example, calibration, progress
        self._files: dict[Widths, bytes] = {}

    def kernel(self, index: int, widths: Mapping[str, int]) -> bytes:
        """The twin's file that holds only kernel ``index``, at these widths."""
        return self._twin.kernel(index, widths)

    def resized(self, widths: Mapping[str, int]) -> bytes:
        """The whole net at these widths (groups not named keep their full width); width 0 removes the group's block.

        Raises:
            FormatError: the toolchain refuses the net at these widths.
        """
        key = tuple(widths.get(name, group.channels) for name, group in self._groups.items())
        if key not in self._files:
            title = f"converting structure {len(self._files) + 1} to {self._form.info.name}"
            with self._progress.bar(title, 1) as bar:
                self._files[key] = self._converted(key)
                bar.advance(1)
        return self._files[key]

    def _converted(self, key: Widths) -> bytes:
        removed = {
            name: range(width, self._groups[name].channels)
            for name, width in zip(self._groups, key, strict=True)
        }
        model = remove_channels(self._model, self._groups, removed, torch.from_numpy(self._example))
        with tempfile.TemporaryDirectory(prefix="edgeprune-converted-") as folder:
            fp32, int8 = (Path(folder, f"{p}{self._form.info.suffix}") for p in ("fp32", "int8"))
            self._form.export(model, self._example, fp32)
            if self._calibration is None:
                return model_bytes(fp32)
            self._form.quantize(fp32, self._calibration, int8, model=model)
            return model_bytes(int8)

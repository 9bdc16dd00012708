"""The format seam: one module a format, found by its file name. See :class:`Format`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from edgeprune.errors import FormatError, UnknownName
from edgeprune.results import Artifact
from edgeprune.specs import Preprocess

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class FormatInfo:
    """Facts about a format: its file suffix, the runtimes that can run it, and the extra that installs its toolchain.

    A file of some formats cannot be cut to other widths in place. ``twin`` names the format with the same kernels whose files are cut and
    timed in its place; the model itself is converted anew for every structure (:class:`edgeprune.converted.Converted`). Without a twin it
    is ``""``. ``system`` is the only kind of computer that runs its
    files, in words (``Mac``). ``built_in_kernels`` says whether a file can also be run without the fast kernels, to compare the two.
    """

    name: str
    suffix: str
    runtimes: tuple[str, ...]
    extra: str
    layout: str  # layout of image inputs inside the file: NHWC or NCHW
    twin: str = ""
    system: str = ""
    built_in_kernels: bool = True


@dataclass(frozen=True)
class AppFacts:
    """What a file can say to the app that ships it, for formats that have a place for it.

    ``labels`` name the outputs in order. ``int8_scheme`` is the one of the profile that ships, ``compute_units`` which processors the app
    should ask for. ``notes`` are further facts by name; they must not change with the day, so that equal nets give equal files.
    """

    preprocess: Preprocess
    labels: tuple[str, ...] | None = None
    description: str = ""
    author: str = ""
    license: str = ""
    version: str = ""
    int8_scheme: str = ""
    compute_units: str = "ALL"
    notes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kernel:
    """One kernel of an exported file: the unit that the runtime runs and that is timed alone.

    ``variables`` names the channel groups whose width changes this kernel's shape, in the order the file's tensors show them;
    ``signature`` is equal for two kernels that are the same computation at equal widths. ``layer`` is the torch layer it came from,
    or ``""``.

    ``kind`` is what runs, whatever its shape: the operator and its window, such as ``CONV_2D 3x3``. ``roles`` says for each variable
    where its channels are: ``in``, ``out``, ``both`` (a depthwise convolution), or ``square`` (both, with weights from each to each).
    """

    index: int
    name: str
    op: str
    layer: str
    signature: str
    variables: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kind: str = ""
    roles: tuple[str, ...] = ()


class Resizable(Protocol):
    """An exported file whose channel widths can be changed without converting again.

    Made from two exports of one model: dense, and a variant in which each group has another width. The dimensions that differ tell
    which group each belongs to, so any structure can be written in milliseconds. Weights are the leading channels of the dense
    file: right for timing, meaningless for accuracy.
    """

    kernels: tuple[Kernel, ...]
    # Group -> kernels that are not there at width 0 of it, for each group that is alone in a residual block with an identity skip.
    blocks: Mapping[str, frozenset[int]]

    def resized(self, widths: Mapping[str, int]) -> bytes:
        """The whole file at these widths (groups not named keep their full width); width 0 leaves the group's block out."""
        ...

    def kernel(self, index: int, widths: Mapping[str, int]) -> bytes:
        """A file that holds only kernel ``index``, at these widths."""
        ...


class Format(Protocol):
    """What a format module offers; ends with ``FORMAT: Format = ...``."""

    info: FormatInfo

    def export(self, model: nn.Module, example: np.ndarray, path: Path) -> Artifact:
        """Write the FP32 file of ``model``.

        Args:
            model: in eval mode; not changed.
            example: one real input, ``float32 [1, C, H, W]`` (or the model's own shape).
            path: where the file goes; written atomically.

        Raises:
            FormatError: the toolchain refused the model; names the op and layer where it can.
            MissingTool: the extra is not installed.
        """
        ...

    def quantize(
        self,
        fp32: Path,
        calibration: np.ndarray,
        path: Path,
        *,
        model: nn.Module | None = None,
    ) -> Artifact:
        """Write the static INT8 file (per-channel weights) of an FP32 file.

        Args:
            fp32: a file that :meth:`export` wrote.
            calibration: real inputs as the torch model sees them, ``float32 [N, C, H, W]``.
            path: where the file goes; written atomically.
            model: what ``fp32`` was exported from, in eval mode; not changed. Callers always give it: formats with a twin quantise the
                model, because their files cannot be read back. The others need ``fp32`` alone.

        Raises:
            FormatError: the toolchain refused the file or the model, or a model is needed and was not given.
            ModelError: a sample is not finite, or there is none.
        """
        ...

    def describe(self, path: Path) -> Artifact:
        """The record of a file: digest, tensors, op counts."""
        ...

    def resizable(
        self,
        dense: Path,
        variant: Path,
        full: Mapping[str, int],
        changed: Mapping[str, int],
        model: nn.Module,
    ) -> Resizable:
        """Pair two exports of the same precision. ``full`` and ``changed`` are the group widths of each.

        Raises:
            FormatError: the two files are not the same graph, or a dimension fits no group; or the format has a twin, whose files are
                cut in place of its own.
        """
        ...


@runtime_checkable
class ForApps(Protocol):
    """A format whose files carry what an app wants to know."""

    def for_app(self, facts: AppFacts) -> Format:
        """The same format, for one app."""
        ...


@runtime_checkable
class Evaluated(Protocol):
    """A format whose files can be worked out here without their runtime: evidence of what is in the file, never a run."""

    def evaluate(self, path: Path, x: np.ndarray) -> np.ndarray:
        """Logits ``[N, K]`` for samples as the torch model sees them.

        Raises:
            FormatError: the file has an operation that is not worked out.
        """
        ...


def cut_in_place_of(info: FormatInfo) -> FormatError:
    """The error of :meth:`Format.resizable` of a format with a twin."""
    return FormatError(
        f"files of {info.name} cannot be cut to other widths",
        hint=f"use those of its twin, {info.twin}",
    )


def names() -> list[str]:
    """Names of the formats that have a module here."""
    import edgeprune.formats as package

    return sorted(
        m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")
    )


def load(name: str) -> Format:
    """The format with this name.

    Raises:
        UnknownName: no module of that name.
    """
    if name not in names():
        raise UnknownName("format", name, names())
    module = importlib.import_module(f"edgeprune.formats.{name}")
    found: Format = module.FORMAT
    return found


__all__ = [
    "AppFacts",
    "Evaluated",
    "ForApps",
    "Format",
    "FormatInfo",
    "Kernel",
    "Resizable",
    "Sequence",
    "cut_in_place_of",
    "load",
    "names",
]

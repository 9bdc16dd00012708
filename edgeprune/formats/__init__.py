"""The format seam: one folder a format, found by its name. See :class:`Format`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

from edgeprune.errors import FormatError, MissingTool, UnknownName
from edgeprune.records.artifact import Artifact
from edgeprune.records.formats import FormatFacts, folders, format_facts
from edgeprune.records.names import ComputeUnits
from edgeprune.records.workload import Preprocess

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class AppFacts:
    """What a file can say to the app that ships it, for formats that have a place for it.

    ``labels`` name the outputs in order. ``int8_scheme`` is the one of the profile that ships, ``compute_units`` which processors the app
    should ask for. ``outputs`` says what the model answers with. ``notes`` are further facts by name; they must not change with the day,
    so that equal nets give equal files.
    """

    preprocess: Preprocess
    labels: tuple[str, ...] | None = None
    description: str = ""
    author: str = ""
    license: str = ""
    version: str = ""
    int8_scheme: str = ""
    compute_units: ComputeUnits = "ALL"
    notes: Mapping[str, str] = field(default_factory=dict)
    outputs: str = "logits"


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
    # Group -> kernels that are not there at width 0 of it, for each group that lies in a residual block with an identity skip. Groups of
    # one block have the same kernels, and width 0 together or not at all.
    blocks: Mapping[str, frozenset[int]]

    def resized(self, widths: Mapping[str, int]) -> bytes:
        """The whole file at these widths (groups not named keep their full width); width 0 leaves the group's block out."""
        ...

    def kernel(self, index: int, widths: Mapping[str, int]) -> bytes:
        """A file that holds only kernel ``index``, at these widths."""
        ...


@dataclass(frozen=True)
class QuantizeOptions:
    """How an INT8 file is made where there is a choice; the defaults are what every format does by itself.

    ``ranges`` is where the range of an activation ends: at the extremes of the calibration samples (``minmax``; Core ML and ExecuTorch keep
    what their own tools do), with ``tail_ratio`` of the values left outside at each end (``percentile``), or where the squared error of
    rounding and clipping is least (``mse``). The layers in ``float_layers`` (torch paths, as :attr:`Kernel.layer`) stay in float.
    ``io`` is the type of the file's inputs and outputs; ``None`` is the format's own.
    """

    ranges: Literal["minmax", "percentile", "mse"] = "minmax"
    tail_ratio: float = 1e-4
    float_layers: tuple[str, ...] = ()
    io: Literal["float", "int8"] | None = None


DEFAULT_OPTIONS = QuantizeOptions()


@runtime_checkable
class Inspectable(Protocol):
    """A format that can show what happens inside its files."""

    def activations(self, fp32: Path, x: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """All float tensors that are no constants, by name, for one sample after the other.

        Args:
            fp32: a file that :meth:`Format.export` wrote.
            x: ``float32 [N, C, H, W]`` as the torch model sees it.
        """
        ...

    def ranges(self, int8: Path) -> dict[str, tuple[float, float]]:
        """Smallest and largest value that each quantised activation can hold, by its name in the FP32 file."""
        ...

    def readers(self, fp32: Path) -> dict[str, tuple[str, str, tuple[str, ...]]]:
        """For each tensor that an operator writes: the operator's type, its torch layer or ``""``, and the tensors that it reads."""
        ...


@runtime_checkable
class ShowsSparsity(Protocol):
    """A format that can say which weights of its files are 2:4 sparse."""

    def sparse_layers(self, path: Path) -> dict[str, bool]:
        """For each layer with weights in a file whether they have the pattern, by its name in torch, where the file has kept that."""
        ...


class Format(Protocol):
    """What a format module offers; ends with ``FORMAT: Format = ...``."""

    info: FormatFacts

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
        options: QuantizeOptions = DEFAULT_OPTIONS,
    ) -> Artifact:
        """Write the static INT8 file (per-channel weights) of an FP32 file.

        Args:
            fp32: a file that :meth:`export` wrote.
            calibration: real inputs as the torch model sees them, ``float32 [N, C, H, W]``.
            path: where the file goes; written atomically.
            model: what ``fp32`` was exported from, in eval mode; not changed. Callers always give it: formats with a twin quantise the
                model, because their files cannot be read back. The others need ``fp32`` alone.
            options: ranges, layers that stay in float, type of inputs and outputs.

        Raises:
            FormatError: the toolchain refused the file or the model, a model is needed and was not given, or an option that this format
                does not have.
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


class Variant(Format, Protocol):
    """A format whose INT8 files are of certain integer types; ``variant`` names them."""

    @property
    def variant(self) -> str:
        """As ``U8S8 per channel``."""
        ...


@runtime_checkable
class HasVariants(Protocol):
    """A format whose INT8 files can be of several integer types, of which the fastest differs by processor."""

    def variants(self) -> tuple[Variant, ...]:
        """The same format with each of the types, its default first; empty where there is no choice."""
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


def cut_in_place_of(info: FormatFacts) -> FormatError:
    """The error of :meth:`Format.resizable` of a format with a twin."""
    return FormatError(
        f"files of {info.name} cannot be cut to other widths",
        hint=f"use those of its twin, {info.twin}",
    )


@runtime_checkable
class Versioned(Protocol):
    """A format whose files may be too new for a runtime."""

    def check_versions(self, path: Path, runtime: str) -> tuple[str, ...]:
        """What a user must know about a file, one line each.

        Raises:
            FormatError: the oldest supported version of the runtime cannot load it; names what is too new.
        """
        ...


def check_runtime(form: Format, path: Path, runtime: str) -> tuple[str, ...]:
    """What must be known about a file before a runtime gets it; nothing where the format has no such check.

    Raises:
        FormatError: as :meth:`Versioned.check_versions`.
    """
    return form.check_versions(path, runtime) if isinstance(form, Versioned) else ()


def names() -> list[str]:
    """Names of the formats that have a folder here, sorted."""
    return sorted(folders())


def load(name: str) -> Format:
    """The format with this name.

    Raises:
        UnknownName: no module of that name.
    """
    if name not in names():
        raise UnknownName("format", name, names())
    module = importlib.import_module(f"edgeprune.formats.{name}.format")
    found: Format = module.FORMAT
    return found


def reader(name: str) -> object | None:
    """The module that reads files of a format without its toolchain; ``None`` where there is none, or no such format."""
    folder = folders().get(name)
    if folder is None or not (folder / "reader.py").is_file():
        return None
    return importlib.import_module(f"edgeprune.formats.{name}.reader")


def require_tools(name: str) -> None:
    """Raise unless the packages of a format are installed; none is imported.

    Raises:
        MissingTool: one is not.
    """
    for tool in format_facts(name).tools:
        if importlib.util.find_spec(tool.replace("-", "_")) is None:
            raise MissingTool(tool, name)


def golden_file(
    form: Format, file: Path, inputs: np.ndarray, outputs: np.ndarray
) -> tuple[str, bytes] | None:
    """A model file that carries the golden samples, as ``(suffix, content)``, where the format has such files.

    The module of a format that has them offers a function of this name that takes the last three arguments.

    Args:
        form: the format.
        file: a file of it.
        inputs: samples as the file takes them, ``float32 [N, ...]``.
        outputs: its answers, ``float32 [N, K]``.
    """
    module = importlib.import_module(f"edgeprune.formats.{form.info.name}.format")
    make = getattr(module, "golden_file", None)
    if make is None:
        return None
    suffix, content = make(file, inputs, outputs)
    return str(suffix), bytes(content)


__all__ = [
    "DEFAULT_OPTIONS",
    "AppFacts",
    "Evaluated",
    "ForApps",
    "Format",
    "FormatFacts",
    "HasVariants",
    "Inspectable",
    "Kernel",
    "QuantizeOptions",
    "Resizable",
    "Sequence",
    "Variant",
    "Versioned",
    "check_runtime",
    "cut_in_place_of",
    "golden_file",
    "load",
    "names",
    "reader",
]

"""A bundle's model on a board: always in the agent's process, never in this one, because a model file is untrusted input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgeprune.bundle.golden import file_input
from edgeprune.bundle.manifest import Manifest
from edgeprune.devices.board import Board
from edgeprune.devices.link.frames import Refusal
from edgeprune.devices.plans import Loaded
from edgeprune.errors import FormatError, IntegrityError
from edgeprune.records.artifact import TensorSpec
from edgeprune.records.device import Device

LOCAL_NAME = "this-machine"
LOCAL = Device(transport="local", targets=(), stand_in=True)
_CHUNK_BYTES = 32 * 1024**2


class RuntimeMissing(FormatError):
    """The runtime of the bundle is not installed where the model should run."""


def load_model(
    board: Board,
    manifest: Manifest,
    content: bytes,
    *,
    key: str = "model",
    delegate: bool = True,
    runtime_name: str | None = None,
) -> Loaded:
    """Load the shipped file on a board and compare its tensors with the manifest.

    Args:
        board: an open board.
        manifest: what the file should be.
        content: the file, already checked against its digest.
        key: the name it gets on the board.
        delegate: ``False`` runs a TFLite file on the built-in kernels instead of XNNPACK.
        runtime_name: of a runtime for the same files on other processors; that of the manifest when ``None``.

    Returns:
        What the board says of the loaded file.

    Raises:
        IntegrityError: the runtime refuses the file, or its tensors are not the manifest's.
        RuntimeMissing: the board has no such runtime.
        DeviceError: the board failed.
    """
    runtime = manifest.runtime
    try:
        loaded = board.load(
            key,
            content,
            runtime=runtime_name or runtime.name,
            threads=runtime.threads,
            delegate=delegate,
        )
    except Refusal as error:
        if error.kind == "runtime":
            raise RuntimeMissing(
                f"{runtime.name} does not run on {board.name}: {error.message}",
                hint=f"install {runtime.name} {runtime.min_version} there",
            ) from error
        if error.kind == "load":
            kernels = "" if delegate else " on its built-in kernels"
            raise IntegrityError(
                f"{runtime.name} on {board.name} refuses {manifest.model.path}{kernels}: {error.message}"
            ) from error
        raise
    _check_tensors("input", loaded.inputs, manifest.model.inputs)
    _check_tensors("output", loaded.outputs, manifest.model.outputs)
    return loaded


def run_model(
    board: Board, manifest: Manifest, raw: np.ndarray, *, key: str = "model"
) -> np.ndarray:
    """Outputs ``float32 [N, K]`` of a loaded file for raw samples, as the data had them.

    Raises:
        ModelError: the samples do not fit the model.
        DeviceError: the board failed.
    """
    x = file_input(raw, manifest.preprocess, manifest.model.inputs[0])
    classes = len(manifest.labels)
    if len(x) == 0:
        return np.zeros((0, classes), np.float32)
    rows = max(1, _CHUNK_BYTES // max(1, x[0].nbytes))
    pieces = [board.infer(key, x[at : at + rows]) for at in range(0, len(x), rows)]
    return np.concatenate(pieces).reshape(len(x), -1)


def _check_tensors(what: str, found: Sequence[TensorSpec], wanted: Sequence[TensorSpec]) -> None:
    if len(found) != len(wanted):
        raise IntegrityError(f"the model has {len(found)} {what}s, the manifest {len(wanted)}")
    for mine, theirs in zip(found, wanted, strict=True):
        if not _same_tensor(mine, theirs):
            raise IntegrityError(
                f"{what} {theirs.name!r} must be {_tensor_text(theirs)}, but the model has {_tensor_text(mine)}"
            )


def _same_tensor(mine: TensorSpec, theirs: TensorSpec) -> bool:
    """Equal but for the layout, which only the exporter knows, and for how a free batch size is written."""
    free_batch = {mine.shape[:1], theirs.shape[:1]} <= {(1,), (-1,), (0,)}
    same_shape = mine.shape[1:] == theirs.shape[1:] and (
        mine.shape[:1] == theirs.shape[:1] or free_batch
    )
    same_scale = math.isclose(mine.scale or 0.0, theirs.scale or 0.0, rel_tol=1e-5)
    same_zero = (mine.zero_point or 0) == (theirs.zero_point or 0)
    return same_shape and same_scale and same_zero and mine.dtype == theirs.dtype


def _tensor_text(spec: TensorSpec) -> str:
    scale = f" scale {spec.scale:.6g} zero {spec.zero_point}" if spec.scale else ""
    return f"{spec.dtype} {list(spec.shape)}{scale}"

"""Training state in one safetensors file that is written atomically, names the configuration it belongs to, and proves itself whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from edgeprune.errors import IntegrityError
from edgeprune.records.files import write_bytes
from edgeprune.workload.dataset import Split

DIGEST_SAMPLES = 1024


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # Any type as bytes: numpy has no bfloat16, and a scalar cannot be viewed.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def split_sha256(split: Split) -> str:
    """SHA-256 of a split's size and of up to 1024 samples spread over it; reading a large one whole would take minutes."""
    chosen = np.linspace(0, len(split) - 1, min(len(split), DIGEST_SAMPLES)).astype(np.int64)
    parts = {"n": torch.tensor(len(split)), "x": torch.from_numpy(split.x[chosen])}
    if split.y is not None:
        parts["y"] = torch.from_numpy(split.y[chosen])
    return tensors_sha256(parts)


def save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], digest: str) -> None:
    """Write a checkpoint so that a reader sees the old one or the new one, never a part. The one before it stays as :func:`previous`.

    Args:
        path: where it goes.
        tensors: weights and buffers by name.
        state: plain data for JSON.
        digest: of the configuration; :func:`load` wants the same.

    Raises:
        NoSpace, SpecError: the file cannot be written; the old one stays.
    """
    # Clones, because safetensors refuses tensors that share memory, as tied weights do.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(state, sort_keys=True)
    metadata = {"digest": digest, "state": text, "sha256": _seal(copies, text)}
    # As bytes: the library's own writer has an error of its own for a full disk.
    content = tensor_bytes(copies, metadata=metadata)
    with contextlib.suppress(OSError):
        path.replace(previous(path))  # a kill between here and the next line leaves that one
    write_bytes(path, content)


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one lies."""
    return path.with_name(f"{path.name}.previous")


def load(path: Path, digest: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the plain state that :func:`save` wrote.

    Raises:
        IntegrityError: the file is unreadable, damaged, or belongs to another configuration.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except Exception as error:  # the library leaves unknown types and sizes to Python and torch
        raise IntegrityError(f"{path} is not a readable checkpoint: {error}") from error
    if metadata.get("digest") != digest:
        raise IntegrityError(f"{path} belongs to another model, data or settings")
    text = metadata.get("state", "")
    if metadata.get("sha256") != _seal(tensors, text):
        raise IntegrityError(f"{path} is damaged: its content does not match its digest")
    state: dict[str, Any] = json.loads(text)
    return tensors, state


def _seal(tensors: Mapping[str, Tensor], text: str) -> str:
    return hashlib.sha256(f"{tensors_sha256(tensors)}|{text}".encode()).hexdigest()

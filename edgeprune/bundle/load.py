"""Run a bundle from Python: ``load("my-bundle").predict(images)``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

import numpy as np

from edgeprune.bundle.integrity import (
    check_hashes,
    check_small_files,
    check_structure,
    open_folder,
    read_model,
)
from edgeprune.bundle.manifest import Manifest
from edgeprune.bundle.on_board import LOCAL, LOCAL_NAME, load_model, run_model
from edgeprune.bundle.sign import check_signature, read_public_key
from edgeprune.devices.board import Board, open_board


class LoadedBundle:
    """A verified bundle whose model is loaded in a child process of this machine. A context manager; or call :meth:`close`."""

    def __init__(self, manifest: Manifest, board: Board, stack: contextlib.ExitStack) -> None:
        self.manifest = manifest
        self._board, self._stack = board, stack

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the outputs."""
        return self.manifest.labels

    def predict(self, x: np.ndarray) -> np.ndarray:
        """What the shipped file answers.

        Args:
            x: raw samples as the data had them: ``uint8 [N, H, W]`` or ``[N, H, W, C]`` images, or ``float32 [N, ...]`` as the torch
                model wanted them. Preprocessing, layout and quantisation happen here.

        Returns:
            ``float32 [N, K]``, one column a label.

        Raises:
            ModelError: the samples do not fit the model.
            DeviceError: the child process died.
        """
        return run_model(self._board, self.manifest, x)

    def close(self) -> None:
        """End the child process."""
        self._stack.close()

    def __enter__(self) -> LoadedBundle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def load(path: Path | str, *, key: Path | str | None = None) -> LoadedBundle:
    """A bundle that is ready to predict, from its folder or its ``.zip``; every digest is checked before the model is parsed.

    Args:
        path: the bundle.
        key: the public key of its maker; with one, a bundle that it did not sign is refused.

    Raises:
        SpecError: the key cannot be used.
        IntegrityError: the bundle is not whole or not signed by the key, or its model is not what the manifest says.
        RuntimeMissing: the runtime of the bundle is not installed here.
        DeviceError: the child process could not start.
    """
    public = None if key is None else read_public_key(Path(key))
    with open_folder(Path(path)) as folder:
        manifest = check_structure(folder)
        check_hashes(folder, manifest)
        if public is not None:
            check_signature(folder, public)
        check_small_files(folder, manifest)
        content = read_model(folder, manifest)
    with contextlib.ExitStack() as stack:
        board = stack.enter_context(open_board(LOCAL_NAME, LOCAL, exclusive=False))
        load_model(board, manifest, content)
        return LoadedBundle(manifest, board, stack.pop_all())

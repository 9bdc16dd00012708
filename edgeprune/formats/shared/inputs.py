"""What every format checks about the samples it is given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.errors import FormatError, ModelError


def check_calibration(calibration: np.ndarray, shape: Sequence[int]) -> None:
    """Raise unless the samples can calibrate a file.

    Args:
        calibration: ``float32 [N, ...]`` in the file's layout.
        shape: the file's input shape, ``[1, ...]``.

    Raises:
        ModelError: there are no samples, or one is not finite: its range would become the scale of the file.
        FormatError: their shape is not the file's.
    """
    if len(calibration) == 0:
        raise ModelError("calibration needs at least 1 sample, but got none")
    if tuple(calibration.shape[1:]) != tuple(shape[1:]):
        raise FormatError(
            f"calibration samples must have the shape {list(shape[1:])} of the file's input, "
            f"but have {list(calibration.shape[1:])}"
        )
    finite = np.isfinite(calibration).reshape(len(calibration), -1).all(1)
    if not finite.all():
        raise ModelError(
            f"calibration samples must be finite, but {int((~finite).sum())} of {len(finite)} are not, "
            f"the first is number {int(finite.argmin())}",
            hint="check the data and the preprocessing constants",
        )

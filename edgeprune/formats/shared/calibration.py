"""What calibration samples do inside a float file: seen once for each file and set of samples, whatever INT8 files are made of it.

Samples pass one by one and leave only extremes and counts behind, so that memory does not grow with their number. Ranges do not depend
on integer types, on layers in float or on how a range is cut, so none of these is a reason to look again.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from edgeprune.formats.shared.ranges import Passes, Spread, extremes, filled
from edgeprune.records.files import sha256_bytes

KEPT = 4  # files: a search for the best INT8 file goes back and forth between a net and what it made of it


@dataclass(frozen=True)
class _Seen:
    spreads: dict[str, Spread]
    is_counted: bool


_seen: dict[tuple[str, str], _Seen] = {}


def calibrated(
    content: bytes, samples: np.ndarray, passes: Passes, *, counted: bool
) -> dict[str, Spread]:
    """The spread of every tensor of a file over samples; what was seen before is taken from memory.

    Args:
        content: the float file.
        samples: what ``passes`` shows, ``float32 [N, ...]``.
        passes: as for :func:`edgeprune.formats.shared.ranges.spreads`.
        counted: whether values are counted, which takes a second pass.
    """
    key = sha256_bytes(content), _digest(samples)
    known = _seen.pop(key, None)
    if known is None:
        known = _Seen(extremes(passes), is_counted=False)
    if counted and not known.is_counted:
        known = _Seen(filled(known.spreads, passes), is_counted=True)
    _seen[key] = known  # the last is the one that was used last
    while len(_seen) > KEPT:
        del _seen[next(iter(_seen))]
    return known.spreads


def _digest(samples: np.ndarray) -> str:
    """SHA-256 of shape and numbers, without a copy of them all."""
    found = hashlib.sha256(repr(samples.shape).encode())
    for sample in samples:
        found.update(np.ascontiguousarray(sample, np.float32).data)
    return found.hexdigest()

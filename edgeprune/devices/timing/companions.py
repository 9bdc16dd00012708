"""When another board may help one: the same class of board, and times that one factor maps to the other's."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from edgeprune.errors import Unreliable
from edgeprune.records.measurement import Fingerprint

REFERENCE_FILES = 16  # timed on every board: their median is a quarter as noisy as one kernel
MIN_SHARED = 8  # fewer in common say nothing about a spread


@dataclass(frozen=True)
class Limits:
    """How far a companion may be from the primary on the reference kernels.

    One kernel repeats to 0.6-1.7 % (measured by this project), so the ratio of two boards spreads by about 1 % (half the inter-quartile
    range) where both are well. A board of the same class that is a quarter off is not well: throttled, or clocked otherwise.

    Attributes:
        spread_ratio: half the inter-quartile range of the kernels' ratios, over their median.
        off_ratio: the median ratio, against 1.
        drift_ratio: the median change of the companion's own times between the start and the end of its work.
    """

    spread_ratio: float = 0.03
    off_ratio: float = 0.25
    drift_ratio: float = 0.03


LIMITS = Limits()


def differences(primary: Fingerprint, other: Fingerprint) -> tuple[str, ...]:
    """What makes two boards different classes, one phrase each; empty when times of one may stand for times of the other.

    Compared is what changes the time of a kernel. Memory size, Python, transport, name and host do not; of the kernel only the series
    (``6.6`` of ``6.6.31-v8``) does.
    """
    ours, theirs = _class_of(primary), _class_of(other)
    return tuple(
        # Two long lists say less than the fact that they differ.
        f"other {name}" if name == "cpu flags" else f"{name} {theirs[name]}, not {wanted}"
        for name, wanted in ours.items()
        if theirs[name] != wanted
    )


def _class_of(fingerprint: Fingerprint) -> dict[str, object]:
    return {
        "machine": fingerprint.machine,
        "cpu": fingerprint.cpu_model,
        "cpu flags": frozenset(fingerprint.cpu_flags),
        "cores": fingerprint.cores,
        "page size": fingerprint.page_size_bytes,
        "kernel": series(fingerprint.kernel),
        "governor": fingerprint.governor,
        "runtime": f"{fingerprint.runtime} {fingerprint.runtime_version}",
        "threads": fingerprint.threads,
        "stamp": fingerprint.stamp,
    }


def series(kernel: str) -> str:
    """Major and minor version of a Linux kernel; the whole text where it has none."""
    match = re.match(r"\d+\.\d+(?!\d)", kernel)
    return match[0] if match else kernel


def reference_names(files: Mapping[str, bytes], count: int = REFERENCE_FILES) -> tuple[str, ...]:
    """Names of ``count`` files spread evenly over the sizes, smallest and largest included; all when there are not more."""
    ordered = sorted(files, key=lambda name: (len(files[name]), name))
    if len(ordered) <= count:
        return tuple(ordered)
    last = len(ordered) - 1
    return tuple(ordered[round(i * last / (count - 1))] for i in range(count))


def scale_of(
    primary_ns: Mapping[str, float], companion_ns: Mapping[str, float], limits: Limits
) -> float:
    """What to multiply a companion's times by, so that they stand for the primary's: the median ratio over the shared kernels.

    Raises:
        Unreliable: fewer than 8 kernels in common, a ratio that is too far from 1, or ratios that disagree too much.
    """
    ratios = _ratios(companion_ns, primary_ns)
    median = statistics.median(ratios)
    if abs(median - 1) > limits.off_ratio:
        raise Unreliable(
            f"its times are {median:.2f} of those of a board of the same class;"
            f" within {limits.off_ratio:.0%} is allowed"
        )
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    spread = (high - low) / 2 / median
    if spread > limits.spread_ratio:
        raise Unreliable(
            f"the ratios of its times to those of a board of the same class spread by {spread:.1%};"
            f" at most {limits.spread_ratio:.0%} is allowed"
        )
    return 1 / median


def check_drift(
    before_ns: Mapping[str, float], after_ns: Mapping[str, float], limits: Limits
) -> None:
    """Raise unless a board's times of the same kernels are what they were before its work.

    Raises:
        Unreliable: the median change is too large, or fewer than 8 kernels are in common.
    """
    change = statistics.median(_ratios(after_ns, before_ns)) - 1
    if abs(change) > limits.drift_ratio:
        raise Unreliable(
            f"its times changed by {change:+.1%} while it worked;"
            f" at most {limits.drift_ratio:.0%} is allowed"
        )


def _ratios(over: Mapping[str, float], under: Mapping[str, float]) -> list[float]:
    shared = [name for name in under if name in over]
    if len(shared) < MIN_SHARED:
        raise Unreliable(
            f"only {len(shared)} reference kernels could be timed on it, {MIN_SHARED} are needed"
        )
    return [over[name] / under[name] for name in shared]

"""How measurements were taken, in words that page, terminal and profile share."""

from __future__ import annotations

from edgeprune.records.measurement import Measurement, SustainedRun
from edgeprune.report.figures import (
    NONE,
    bytes_text,
    seconds_text,
    share_text,
    signed,
    significant,
    time_text,
)


def rejected_text(measurement: Measurement) -> str:
    """How many blocks were left out, and the most frequent reason. Where too many were disturbed, none is: ``unreliable`` says that."""
    found = measurement.rejections()
    if not found:
        return "none"
    ((reason, times),) = found.most_common(1)
    often = f" ({times} times)" if len(found) > 1 else ""
    return f"{found.total()} of {len(measurement.blocks)}: {reason}{often}"


def sessions_text(measurement: Measurement) -> str:
    """How many fresh processes, and how far their medians lie apart."""
    count = len(measurement.session_medians_ms())
    if count < 2:
        return "1"
    low, high = measurement.session_range_ms
    return f"{count}: {time_text(low)} to {time_text(high)}"


def drift_text(measurement: Measurement) -> str:
    """How far the sentinel moved."""
    drift = measurement.sentinel_drift_ratio
    return NONE if drift is None else f"{signed(drift * 100, 1)} %"


def memory_text(measurement: Measurement) -> str:
    """Peak memory of the process that ran the model."""
    peak = measurement.peak_memory_bytes
    return NONE if peak is None else bytes_text(peak)


def p99_text(measurement: Measurement) -> str:
    """The 99th percentile, where there are samples enough."""
    p99 = measurement.p99_ms
    return NONE if p99 is None else time_text(p99)


def sustained_rows(run: SustainedRun) -> list[tuple[str, str]]:
    """What a sustained run found."""
    heat = [p.temperature_c for p in run.points if p.temperature_c is not None]
    if run.throttled_from_s is not None:
        throttled = f"from {seconds_text(run.throttled_from_s)} on"
    elif any(p.throttled is not None for p in run.points):
        throttled = "never"
    else:
        throttled = "the board does not tell"
    return [
        ("file", run.name),
        ("without a pause for", seconds_text(run.seconds)),
        ("at the start", f"{time_text(run.start_ms)} (median of the first tenth)"),
        ("steady", f"{time_text(run.steady_ms)} (median of the last third)"),
        ("slowdown", f"{significant(run.slowdown_ratio)} ({share_text(run.slowdown_ratio - 1)})"),
        ("throttled", throttled),
        ("temperature", f"{heat[0]:.0f} to {max(heat):.0f} °C" if heat else "not readable"),
    ]

"""A profile as terminal text."""

from __future__ import annotations

from edgeprune.records.measurement import Measurement
from edgeprune.records.report import ProfileReport
from edgeprune.report import timing_text

BAR_WIDTH = 24


def render_profile(found: ProfileReport) -> str:
    """Dense latency in both precisions, then every kernel with its share; ends with a newline.

    A name is made printable: it may come from a model file.
    """
    stamp = "" if found.fingerprint.stamp == "measured" else f"  [{found.fingerprint.stamp}]"
    lines = [
        f"{found.model} for {found.target} on {found.device} ({found.fingerprint.machine},"
        f" {found.fingerprint.runtime} {found.fingerprint.runtime_version},"
        f" {found.fingerprint.threads} thread){stamp}",
        "",
    ]
    for precision, m in found.measurements.items():
        lines += _measured(precision, m, found.sizes[precision])
    if found.sustained is not None:
        lines += ["", "sustained", ""]
        lines += [f"{k:20} {_plain(v)}" for k, v in timing_text.sustained_rows(found.sustained)]
    method = found.layers[0].method if found.layers else "isolated kernel"
    covered = ", ".join(f"{p} {r:.0%}" for p, r in found.covered_ratio.items())
    lines += ["", f"kernels ({method}; their sum is {covered} of the whole file)", ""]
    total = sum(layer.int8_ms or 0.0 for layer in found.layers) or 1.0
    lines.append(f"{'kernel':34} {'op':20} {'output':18} {'fp32 us':>9} {'int8 us':>9}")
    for layer in found.layers:
        share = (layer.int8_ms or 0.0) / total
        lines.append(
            f"{_plain(layer.name):34.34} {layer.op:20.20} {_shape(layer.output_shape):18}"
            f" {_us(layer.fp32_ms)} {_us(layer.int8_ms)}  {share:5.1%} {'#' * round(share * BAR_WIDTH)}"
        )
    return "\n".join(lines) + "\n"


def _measured(precision: str, m: Measurement, size_bytes: int) -> list[str]:
    """Three lines for one file, and a loud one where its times should not be believed."""
    p90 = "p90" if m.p90_method == "early stopping" else "p90 (few samples)"
    lines = [
        f"dense {precision:5} p50 {m.median_ms:9.4f} ms  {p90} {m.p90_ms:9.4f} ms  spread {m.spread_ratio:5.1%}"
        f"  {size_bytes / 1024:8.1f} KiB",
        f"{'':11} load {m.load_ns / 1e6:8.2f} ms  first run {m.first_ns / 1e6:7.2f} ms  peak memory {timing_text.memory_text(m)}",
        f"{'':11} sessions {timing_text.sessions_text(m)}, {len(m.samples_ns())} samples,"
        f" blocks left out: {_plain(timing_text.rejected_text(m))}",
    ]
    if m.unreliable is not None:
        lines.append(f"{'':11} *** UNRELIABLE: {_plain(m.unreliable)} ***")
    return lines


def _plain(name: str) -> str:
    return "".join(c if c.isprintable() else " " for c in name)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _us(ms: float | None) -> str:
    return f"{'-':>9}" if ms is None else f"{ms * 1000:9.2f}"

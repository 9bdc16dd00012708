"""A realistic report for tests: a small MobileNet-like model on a stand-in machine, with every part filled."""

from __future__ import annotations

import random
import statistics
from typing import Any

from edgeprune.records.measurement import Block, Comparison, Fingerprint, Measurement, Telemetry
from edgeprune.records.plan import (
    FrozenGroup,
    GroupPlan,
    LatencyModelQuality,
    PlanCheck,
    PruningPlan,
)
from edgeprune.records.report import Gate, LayerWidth, LedgerEntry, Report, StageCost, VariantRow

LATENCY_MS = {
    ("dense", "fp32"): 24.6,
    ("dense", "int8"): 13.2,
    ("pruned", "fp32"): 12.9,
    ("pruned", "int8"): 6.31,
}
QUALITY = {
    ("dense", "fp32"): 0.9284,
    ("dense", "int8"): 0.9262,
    ("pruned", "fp32"): 0.9246,
    ("pruned", "int8"): 0.9218,
}
WIDTHS = (
    (32, 24), (32, 24), (64, 40), (64, 40), (96, 56), (96, 56), (128, 128), (160, 96), (192, 112), (256, 104), (320, 136), (512, 512),
)  # fmt: skip


def make_fingerprint(stamp: str = "stand-in") -> Fingerprint:
    return Fingerprint(
        device="this-machine",
        transport="local",
        hostname_digest="5f0c9a1b2c3d4e5f",
        machine="x86_64",
        cpu_model="Example Xeon 2.1 GHz",
        cpu_flags=("avx2", "avx512f", "avx512_vnni"),
        cores=2,
        memory_bytes=8_254_742_528,
        page_size_bytes=4096,
        kernel="6.1.0-18-amd64",
        python="3.11.2",
        governor=None,
        runtime="litert",
        runtime_version="2.3.0",
        threads=1,
        stamp=stamp,  # type: ignore[arg-type]
    )


def make_measurement(name: str, ms: float, precision: str, seed: int, stamp: str) -> Measurement:
    rng = random.Random(seed)
    blocks = []
    for round_index in range(14):
        drift = 1 + 0.018 * (round_index > 8) + rng.gauss(0, 0.006)
        samples = [int(ms * 1e6 * drift * (1 + abs(rng.gauss(0, 0.012)))) for _ in range(24)]
        samples[rng.randrange(24)] = int(ms * 1e6 * drift * 1.25)
        rejected = None
        if (round_index, name) == (5, "pruned-int8"):
            samples = [int(s * 1.3) for s in samples]
            rejected = "another process used the core"
        blocks.append(
            Block(
                round=round_index,
                calls_per_sample=4,
                samples_ns=tuple(samples),
                rejected=rejected,
            )
        )
    return Measurement(
        name=name,
        artifact_sha256=f"{seed:064x}",
        precision=precision,  # type: ignore[arg-type]
        threads=1,
        load_ns=int(ms * 3.1e6),
        first_ns=int(ms * 1.7e6),
        blocks=tuple(blocks),
        before=Telemetry(
            load_1min=0.42, temperature_c=51.0, clock_hz=2_100_000_000, throttled=False
        ),
        after=Telemetry(
            load_1min=0.97, temperature_c=55.5, clock_hz=2_100_000_000, throttled=False
        ),
        fingerprint_key=make_fingerprint(stamp).key(),
        stamp=stamp,  # type: ignore[arg-type]
        at="2025-03-01T12:00:00Z",
        peak_memory_bytes=31_400_000,
    )


def make_plan(limit_ms: float = 6.6) -> PruningPlan:
    rng = random.Random(3)
    groups = []
    for index, (before, after) in enumerate(WIDTHS):
        if before == after:
            continue
        groups.append(
            GroupPlan(
                name=f"g{index:02d}",
                channels=before,
                kept=tuple(sorted(rng.sample(range(before), after))),
                layers=(f"blocks.{index}.conv", f"blocks.{index}.norm"),
                saved_ms_predicted=round((before - after) * rng.uniform(0.004, 0.011), 4),
                cost_nats=round((before - after) / before * rng.uniform(0.01, 0.09), 5),
                note="step of 8" if index == 2 else "",
            )
        )
    return PruningPlan(
        groups=tuple(groups),
        frozen=(
            FrozenGroup(layers=("blocks.6.conv",), reason="residual sum with the stem"),
            FrozenGroup(layers=("classifier",), reason="the outputs are the classes"),
        ),
        precision="int8",
        importance="gradient Taylor, first order",
        limit_ms=limit_ms,
        dense_ms=13.2,
        predicted_ms=6.24,
        predicted_cost_nats=0.3456,
    )


def make_ledger() -> tuple[LedgerEntry, ...]:
    lines: tuple[tuple[Any, ...], ...] = (
        ("dense", 0.9284, "fp32", "torch", ""),
        ("dense", 0.9262, "int8", "tflite on host", "the dense model, quantised"),
        ("pruned", 0.4132, "fp32", "torch", ""),
        ("compensated", 0.6318, "fp32", "torch", "batch norm statistics"),
        ("recovered", 0.9246, "fp32", "torch", "5 epochs"),
        ("quantised", 0.9220, "int8", "tflite on host", ""),
        ("exported", 0.9218, "int8", "tflite on host", ""),
        ("on-device", 0.9218, "int8", "this-machine", "every output equal to the host"),
    )
    return tuple(
        LedgerEntry(
            stage=stage,
            metric="accuracy",
            value=value,
            n=5000,
            precision=precision,
            where=where,
            note=note,
        )
        for stage, value, precision, where, note in lines
    )


def make_checks() -> tuple[PlanCheck, ...]:
    figures = ((7.41, 7.86, 0.21), (6.90, 7.02, 0.30), (6.52, 6.71, 0.36), (6.24, 6.31, 0.3456))
    return tuple(
        PlanCheck(
            widths={"g00": 24 - index},
            predicted_ms=predicted,
            measured_ms=measured,
            ratio_to_dense=measured / 13.2,
            ratio_high=measured / 13.2 * 1.012,
            within_budget=measured <= 6.6,
            cost_nats=cost,
            loss_nats=cost + 0.0321 if measured <= 6.6 else None,
        )
        for index, (predicted, measured, cost) in enumerate(figures)
    )


def make_report(*, stamp: str = "stand-in", **changes: Any) -> Report:
    """The report, with top-level fields replaced by ``changes``."""
    measurements, rows = {}, []
    for seed, ((name, precision), ms) in enumerate(LATENCY_MS.items()):
        key = f"{name}-{precision}"
        measurements[key] = make_measurement(key, ms, precision, seed, stamp)
        dense = measurements[f"dense-{precision}"]
        rows.append(
            VariantRow(
                variant=name,  # type: ignore[arg-type]
                precision=precision,  # type: ignore[arg-type]
                median_ms=measurements[key].median_ms,
                p90_ms=measurements[key].p90_ms,
                spread_ratio=measurements[key].spread_ratio,
                ratio_to_dense=measurements[key].median_ms / dense.median_ms,
                quality=QUALITY[name, precision],
                size_bytes=int(
                    {"fp32": 4.0, "int8": 1.08}[precision]
                    * (412_000 if name == "pruned" else 1_021_000)
                ),
                parameters=412_310 if name == "pruned" else 1_021_770,
                macs=21_480_000 if name == "pruned" else 52_310_000,
                measurement=key,
            )
        )
    parts: dict[str, Any] = {
        "edgeprune_version": "0.1.0",
        "created": "2025-03-01T12:34:56Z",
        "command": "edgeprune deploy net.py:build --target rpi4 --latency 50% --max-drop 1%",
        "model": "net.py:build",
        "target": "rpi4",
        "profile": "cortex-a72",
        "device": "this-machine",
        "stamp": stamp,
        "fingerprint": make_fingerprint(stamp),
        "budget": "50%",
        "limit_ms": 6.6,
        "shipped": "int8",
        "shipped_reason": "both precisions meet the gates and int8 is faster: 6.43 ms against 13.1 ms in fp32",
        "gates": (
            Gate(name="latency", limit=0.5, value=0.4791, unit="of dense int8", met=True, note="6.43 ms"),
            Gate(name="accuracy", limit=0.01, value=0.0066, unit="drop", met=True, note="92.18% against 92.84% dense"),
            Gate(name="numerics", limit=0.99, value=1.0, unit="agreement", met=True),
        ),
        "passed": True,
        "headline": "2.08x faster than dense int8, accuracy -0.66 points; all gates met",
        "variants": tuple(rows),
        "comparisons": tuple(
            Comparison(
                candidate=f"pruned-{p}",
                reference=f"dense-{p}",
                ratio=rows[2 + i].ratio_to_dense,
                low=rows[2 + i].ratio_to_dense * 0.99,
                high=rows[2 + i].ratio_to_dense * 1.012,
                confidence=0.987,
                rounds=14,
            )
            for i, p in enumerate(("fp32", "int8"))
        ),
        "measurements": measurements,
        "ledger": make_ledger(),
        "plan": make_plan(),
        "layer_widths": tuple(
            LayerWidth(
                layer=f"blocks.{i}.conv",
                kind="conv 3x3" if i % 2 else "depthwise 3x3",
                in_before=WIDTHS[max(0, i - 1)][0],
                in_after=WIDTHS[max(0, i - 1)][1],
                out_before=before,
                out_after=after,
            )
            for i, (before, after) in enumerate(WIDTHS)
        ),
        "checks": make_checks(),
        "latency_model": LatencyModelQuality(
            kernels_measured=184, nets_fitted=12, nets_held_out=6, mean_error_ratio=0.021, worst_error_ratio=0.058
        ),
        "pareto": tuple((13.2 - 0.29 * i, 0.0006 * i**2) for i in range(36)),
        "test_quality": {"dense": 0.9251, "shipped": 0.9199},
        "test_n": 10_000,
        "stages": (
            StageCost(name="dense export", seconds=14.2, kind="conversion"),
            StageCost(name="profile", seconds=96.4, kind="measuring", cached=True),
            StageCost(name="importance", seconds=21.7, kind="other"),
            StageCost(name="check plans", seconds=41.0, kind="measuring"),
            StageCost(name="recover", seconds=415.8, kind="training"),
            StageCost(name="quantise and export", seconds=18.9, kind="conversion"),
            StageCost(name="verify", seconds=72.3, kind="measuring"),
            StageCost(name="bundle", seconds=0.212, kind="other"),
        ),
        "peak_memory_bytes": 1_612_000_000,
        "versions": {"torch": "2.13.0", "ai-edge-litert": "2.3.0", "numpy": "2.4.6"},
        "settings": {"seed": 7, "epochs": 5.0, "max_drop": "1%", "mirror": False, "max_minutes": None},
        "notes": ("INT8 checked with the built-in kernels", "2 groups are frozen"),
        "bundle": "runs/rpi4/bundle",
    }  # fmt: skip
    return Report(**(parts | changes))


def make_empty_report() -> Report:
    """A report in which everything that may be empty is empty."""
    plan = make_plan().model_copy(update={"groups": (), "frozen": ()})
    return make_report(
        gates=(),
        variants=(),
        comparisons=(),
        measurements={},
        ledger=(),
        plan=plan,
        layer_widths=(),
        checks=(),
        latency_model=LatencyModelQuality(
            kernels_measured=0,
            nets_fitted=0,
            nets_held_out=0,
            mean_error_ratio=0.0,
            worst_error_ratio=0.0,
        ),
        pareto=(),
        test_quality={},
        test_n=0,
        stages=(),
        peak_memory_bytes=0,
        versions={},
        settings={},
        notes=(),
        passed=False,
        headline="Nothing was timed",
    )


def median_of(report: Report, name: str) -> float:
    """Median in ms, worked out here from the raw samples."""
    blocks = [b.samples_ns for b in report.measurements[name].blocks if b.rejected is None]
    return statistics.median(statistics.median(b) for b in blocks) / 1e6

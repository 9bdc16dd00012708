"""Latency tables as records: round trip, and the time at a width."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_points import probe_points

from edgeprune.errors import IntegrityError, SpecError, UnknownName
from edgeprune.plan.latency.table import LatencyTable, tabulate
from edgeprune.records.base import read_json
from edgeprune.records.files import write_json

WIDE = tuple(range(8, 65, 4))


def conv(n_in: int, n_out: int) -> float:
    return 2000.0 + 30 * n_in + 20 * n_out + 3 * n_in * n_out


def table(fingerprint: str = "pi", **changes: str) -> LatencyTable:
    grids = (WIDE, WIDE)
    kernels = (
        tabulate("conv", "CONV_2D", grids, {p: conv(*p) for p in probe_points(grids, seed=0)}),
        tabulate("dw", "DEPTHWISE", (WIDE,), {(w,): 100.0 * w for w in WIDE}),
        tabulate("softmax", "SOFTMAX", (), {(): 900.0}),
    )
    plain = {"precision": "int8", "format": "tflite", **changes}
    return LatencyTable(fingerprint_key=fingerprint, kernels=kernels, **plain)  # type: ignore[arg-type]


def lookup(measured: LatencyTable, signature: str, widths: tuple[int, ...]) -> float:
    """The time of a kernel in ns, one width a slot."""
    return sum(ns.item() for _, ns in measured.kernel(signature).arrays([(w,) for w in widths]))


def test_tables_survive_the_round_trip_through_a_file(tmp_path: Path) -> None:
    written = table()
    write_json(written, tmp_path / "table.json")
    assert read_json(LatencyTable, tmp_path / "table.json") == written


def test_a_table_of_a_later_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    write_json(table(), path)
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(IntegrityError, match="schema_version"):
        read_json(LatencyTable, path)


def test_lookup_reproduces_every_measured_point() -> None:
    measured = table()
    for kernel in measured.kernels:
        for probe in kernel.points:
            assert lookup(measured, kernel.signature, probe.widths) == probe.ns


def test_lookup_between_measured_points_follows_the_fit() -> None:
    assert lookup(table(), "conv", (20, 36)) == pytest.approx(conv(20, 36), rel=0.01)
    assert table().kernel("conv").error_ratio < 1e-6


def test_what_was_not_measured_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="width 62 is not in the latency table of dw"):
        lookup(table(), "dw", (62,))
    with pytest.raises(UnknownName, match=r"unknown kernel 'dv'.*did you mean 'dw'"):
        lookup(table(), "dv", (8,))
    with pytest.raises(ValueError, match="1 slots"):
        lookup(table(), "dw", (8, 8))

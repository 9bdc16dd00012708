"""Latency tables as records: round trip, lookup, and what never mixes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from edgeprune.errors import IntegrityError, SpecError, UnknownName
from edgeprune.plan.latency.table import LatencyTable, probe_points, slot_grids, tabulate
from edgeprune.records.base import read_json
from edgeprune.records.files import write_json

WIDE = tuple(range(8, 65, 4))


@dataclass(frozen=True)
class Shape:
    signature: str
    op: str
    variables: tuple[str, ...]


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
            assert measured.lookup(kernel.signature, probe.widths) == probe.ns


def test_lookup_between_measured_points_follows_the_fit() -> None:
    assert table().lookup("conv", (20, 36)) == pytest.approx(conv(20, 36), rel=0.01)
    assert table().kernel("conv").error_ratio < 1e-6


def test_what_was_not_measured_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="width 62 is not in the latency table of dw"):
        table().lookup("dw", (62,))
    with pytest.raises(UnknownName, match=r"unknown kernel 'dv'.*did you mean 'dw'"):
        table().lookup("dv", (8,))
    with pytest.raises(ValueError, match="1 slots"):
        table().lookup("dw", (8, 8))


@pytest.mark.parametrize(
    "other",
    [table("another-pi"), table(precision="fp32"), table(format="onnx")],
    ids=["fingerprint", "precision", "format"],
)
def test_tables_of_different_devices_precisions_or_formats_never_mix(other: LatencyTable) -> None:
    with pytest.raises(SpecError, match="do not mix"):
        table().merged(other)


def test_merging_adds_kernels_and_points_and_the_newer_time_stands() -> None:
    newer = LatencyTable(
        fingerprint_key="pi",
        precision="int8",
        format="tflite",
        kernels=(
            tabulate("dw", "DEPTHWISE", ((6, 64),), {(6,): 700.0, (64,): 6500.0}),
            tabulate("add", "ADD", ((64,),), {(64,): 50.0}),
        ),
    )
    both = table().merged(newer)
    assert both.lookup("dw", (6,)) == 700.0
    assert both.lookup("dw", (8,)) == 800.0
    assert both.lookup("dw", (64,)) == 6500.0
    assert both.lookup("add", (64,)) == 50.0
    assert both.lookup("conv", (8, 8)) == table().lookup("conv", (8, 8))


def test_kernels_of_one_signature_share_the_widths_of_all_their_groups() -> None:
    kernels = [
        Shape("conv", "CONV_2D", ("a", "b")),
        Shape("conv", "CONV_2D", ("b", "c")),
        Shape("dw", "DEPTHWISE", ("a",)),
    ]
    found = slot_grids(kernels, {"a": (8, 16), "b": (4, 16), "c": (12, 16)})
    assert found == {"conv": ((4, 8, 16), (4, 12, 16)), "dw": ((8, 16),)}
    with pytest.raises(ValueError, match="number of slots"):
        slot_grids([*kernels, Shape("dw", "DEPTHWISE", ("a", "b"))], dict.fromkeys("abc", (8,)))

"""Which file ships and which promises it keeps: decisions over records, checked case by case."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from measured_fixture import NAMES, measured_files, measurement

from edgeprune.errors import FormatError
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.stages import gates as verdict
from edgeprune.pipeline.stages.gates import Measured
from edgeprune.records.budget import parse_budget
from edgeprune.records.measurement import Comparison
from edgeprune.records.names import Precision

BOTH: tuple[Precision, ...] = ("fp32", "int8")
SIZES = {"dense": (1000, 9000), "pruned": (600, 5000)}


def test_a_relative_budget_is_judged_against_dense_in_the_same_precision():
    gate = verdict.latency_gate(measured_files(), parse_budget("55%"), "int8")
    assert (gate.value, gate.limit, gate.met, gate.unit) == (0.5, 0.55, True, "of dense int8")
    assert not verdict.latency_gate(measured_files(), parse_budget("55%"), "fp32").met  # 6 of 10 ms


def test_the_ratio_within_rounds_counts_where_it_was_measured():
    seen = measured_files(ratios={("pruned-int8", "dense-int8"): 0.58})
    gate = verdict.latency_gate(seen, parse_budget("55%"), "int8")
    assert gate.value == 0.58
    assert not gate.met


def test_what_is_judged_is_the_upper_end_of_the_interval():
    pair = {"candidate": "pruned-int8", "reference": "dense-int8", "confidence": 0.99, "rounds": 24}
    near = Comparison(ratio=0.545, low=0.535, high=0.555, **pair)
    seen = replace(measured_files(), comparisons=[near])
    gate = verdict.latency_gate(seen, parse_budget("55%"), "int8")
    assert (gate.value, gate.low, gate.high, gate.met) == (0.545, 0.535, 0.555, False)
    assert verdict.judged_text(gate) == ("0.545 of dense int8 (judged on its upper bound, 0.555)")
    assert verdict.latency_gate(seen, parse_budget("55.5%"), "int8").met
    with pytest.raises(FormatError, match=r"judged on its upper bound"):
        verdict.in_place_of_int8(_scattered(), parse_budget("6.05ms"), "it stores 0%")


def _scattered() -> Measured:
    """As :func:`measured_files`, but the pruned FP32 file takes 5.9 to 6.1 ms, at random."""
    seen = measured_files()
    calm = seen.measurements["pruned-fp32"]
    ms = (5.9, 6.1, 5.95, 6.05, 6.0, 6.02, 5.98, 6.08, 5.93)
    blocks = tuple(
        b.model_copy(update={"samples_ns": (round(t * 1e6),)})
        for b, t in zip(calm.blocks, ms, strict=True)
    )
    noisy = calm.model_copy(update={"blocks": blocks})
    return replace(seen, measurements={**seen.measurements, "pruned-fp32": noisy})


def test_an_absolute_budget_is_judged_on_the_upper_end_too():
    gate = verdict.latency_gate(_scattered(), parse_budget("6.05ms"), "fp32")
    assert gate.value == 6.0
    assert gate.low < 6.0 < 6.05 < gate.high <= 6.1
    assert not gate.met
    assert verdict.latency_gate(_scattered(), parse_budget("6.1ms"), "fp32").met


def test_without_common_rounds_the_interval_is_that_of_both_medians():
    gate = verdict.latency_gate(_scattered(), parse_budget("60%"), "fp32")
    assert gate.value == 0.6
    assert 0.59 < gate.low < 0.6 < gate.high < 0.62
    assert not gate.met


def test_a_speed_up_is_the_inverse_of_a_share():
    assert verdict.latency_gate(measured_files(), parse_budget("2x"), "int8").met
    assert not verdict.latency_gate(measured_files(), parse_budget("2.01x"), "int8").met


def test_an_absolute_budget_is_judged_in_milliseconds():
    gate = verdict.latency_gate(measured_files(), parse_budget("4.5ms"), "int8")
    assert (gate.value, gate.limit, gate.unit, gate.met) == (4.0, 4.5, "ms", True)
    assert not verdict.latency_gate(measured_files(), parse_budget("3.9ms"), "int8").met


def test_a_limit_that_is_met_exactly_is_met():
    assert verdict.latency_gate(measured_files(), parse_budget("4ms"), "int8").met
    assert verdict.quality_gate(
        measured_files(), 0.01, "int8"
    ).met  # 0.90 - 0.89 is a little over 0.01


@pytest.mark.parametrize(("allowed", "met"), [(0.02, True), (0.005, False), (0.0, False)])
def test_accuracy_is_judged_against_the_dense_fp32_model(allowed, met):
    gate = verdict.quality_gate(measured_files(), allowed, "int8")
    assert gate.met is met
    assert gate.name == "accuracy"
    assert gate.value == pytest.approx(0.01)
    assert "89.00%" in gate.note
    assert "90.00%" in gate.note


def test_a_gain_is_a_negative_drop_and_passes_any_gate():
    gate = verdict.quality_gate(measured_files(quality=(0.9, 0.9, 0.9, 0.93)), 0.0, "int8")
    assert gate.met
    assert gate.value == pytest.approx(-0.03)


def test_without_labels_the_gate_is_called_agreement():
    seen = measured_files(quality=(1.0, 0.99, 0.97, 0.95), metric="agreement")
    assert verdict.quality_gate(seen, 0.01, "int8").name == "agreement"


def test_the_faster_of_two_that_pass_ships():
    choice = verdict.choose(measured_files(), parse_budget("60%"), 0.02, BOTH)
    assert choice.precision == "int8"
    assert choice.reason == (
        "both precisions meet the gates and int8 is faster: 4 ms against 6 ms in fp32"
    )


def test_fp32_ships_where_it_is_the_faster_one():
    choice = verdict.choose(measured_files(ms=(10, 20, 5, 9)), parse_budget("60%"), 0.02, BOTH)
    assert choice.precision == "fp32"
    assert "fp32 is faster" in choice.reason


def test_a_slower_precision_ships_when_the_faster_one_loses_too_much():
    seen = measured_files(quality=(0.90, 0.89, 0.90, 0.70))
    choice = verdict.choose(seen, parse_budget("60%"), 0.01, BOTH)
    assert choice.precision == "fp32"
    refused = "INT8 was refused: accuracy dropped 20.00 points, 1.00 are allowed; FP32 ships"
    assert (choice.refused, choice.reason) == (refused, f"{refused}: 6 ms against 4 ms in int8")


def test_a_precision_over_the_budget_does_not_ship_even_if_it_is_faster():
    seen = measured_files(ms=(10, 5, 5.9, 4))  # int8 is at 80 % of dense int8
    choice = verdict.choose(seen, parse_budget("60%"), 0.02, BOTH)
    assert choice.precision == "fp32"
    assert "only fp32 meets the gates (int8 misses latency)" in choice.reason
    assert choice.refused == ""  # nothing is wrong with the file


def test_when_none_passes_the_one_that_meets_more_ships_and_it_is_said():
    seen = measured_files(ms=(10, 5, 9, 4), quality=(0.90, 0.89, 0.90, 0.50))
    choice = verdict.choose(seen, parse_budget("60%"), 0.01, BOTH)
    assert choice.precision == "fp32"  # misses latency alone; int8 misses both
    assert choice.reason == (
        "no precision meets every gate; fp32 comes closest: 9 ms against 4 ms in int8"
        " (fp32 misses latency, int8 misses latency and accuracy)"
    )


def test_among_equal_misses_the_faster_one_ships():
    seen = measured_files(quality=(0.90, 0.89, 0.80, 0.79))
    assert verdict.choose(seen, parse_budget("60%"), 0.01, BOTH).precision == "int8"


def test_a_target_of_one_precision_ships_that():
    choice = verdict.choose(measured_files(), parse_budget("10%"), 0.0, ("fp32",))
    assert (choice.precision, choice.reason) == ("fp32", "the target allows only fp32")


def test_fp32_ships_in_place_of_an_int8_file_that_was_refused_where_it_keeps_to_the_budget():
    choice = verdict.in_place_of_int8(measured_files(), parse_budget("60%"), "it stores 0%")
    line = "INT8 was refused: it stores 0%; FP32 ships"
    assert choice == verdict.Choice("fp32", line, line)
    with pytest.raises(FormatError) as error:
        verdict.in_place_of_int8(measured_files(), parse_budget("59%"), "it stores 0%")
    assert error.value.message == (
        "INT8 was refused: it stores 0%; FP32 misses the budget: 0.6 of dense fp32, the budget 0.59"
    )
    with pytest.raises(FormatError, match=r"FP32 misses the budget: 6 ms, the budget 5\.9"):
        verdict.in_place_of_int8(measured_files(), parse_budget("5.9ms"), "it stores 0%")


@pytest.mark.parametrize(
    ("device", "built_in", "met", "value"),
    [
        (1.0, 1.0, True, 1.0),
        (0.99, 0.95, True, 0.99),
        (0.98, 1.0, False, 0.98),
        (1.0, 0.94, False, 0.94),
    ],
)
def test_numerics_asks_the_device_and_the_built_in_kernels(device, built_in, met, value):
    gate = verdict.numerics_gate(device, built_in)
    assert (gate.met, gate.value) == (met, value)
    assert f"{built_in:.2%}" in gate.note


def test_the_four_rows_say_what_was_measured():
    rows = verdict.rows(measured_files(ratios={("pruned-int8", "dense-int8"): 0.51}), SIZES)
    assert [(r.variant, r.precision) for r in rows] == [
        ("dense", "fp32"), ("dense", "int8"), ("pruned", "fp32"), ("pruned", "int8"),
    ]  # fmt: skip
    assert [r.median_ms for r in rows] == [10, 8, 6, 4]
    assert [r.ratio_to_dense for r in rows] == [1, 1, 0.6, 0.51]
    assert [r.parameters for r in rows] == [1000, 1000, 600, 600]
    assert [r.macs for r in rows] == [9000, 9000, 5000, 5000]
    assert [r.size_bytes for r in rows] == [1000, 1001, 1002, 1003]
    assert [r.measurement for r in rows] == list(NAMES)


def test_without_an_int8_file_there_are_three_rows():
    three = {n: measurement(n, t) for n, t in zip(NAMES[:3], (10, 8, 6), strict=True)}
    rows = verdict.rows(replace(measured_files(), measurements=three), SIZES)
    assert [r.measurement for r in rows] == list(NAMES[:3])


def test_the_headline_names_the_gain_the_cost_and_the_verdict():
    gates = [
        verdict.latency_gate(measured_files(), parse_budget("60%"), "int8"),
        verdict.quality_gate(measured_files(), 0.02, "int8"),
    ]
    said = verdict.headline(measured_files(), "int8", gates)
    assert said == "2.00x faster than dense int8, accuracy -1.00 points; all gates met"


def test_the_headline_names_every_gate_that_was_missed():
    gates = [
        verdict.latency_gate(measured_files(), parse_budget("40%"), "int8"),
        verdict.quality_gate(measured_files(), 0.0, "int8"),
        verdict.numerics_gate(1.0, 1.0),
    ]
    assert verdict.headline(measured_files(), "int8", gates).endswith("missed: latency, accuracy")


@pytest.mark.parametrize(
    ("stamp", "wanted", "found"),
    [
        ("measured", ("fp32", "int8"), ("fp32", "int8")),
        ("stand-in", ("fp32", "int8"), ("int8",)),
        ("stand-in", ("fp32",), ("fp32",)),
    ],
)
def test_times_of_a_stand_in_do_not_say_which_precision_is_faster(stamp, wanted, found):
    context = SimpleNamespace(
        board=None, runtime_on=lambda _: None, fingerprint=lambda _: SimpleNamespace(stamp=stamp)
    )
    assert Context.precisions(context, wanted) == found

"""Which file ships where a check refuses the INT8 file: FP32 where it may and keeps to the budget; otherwise the run ends and says both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import int8_fixture
import pytest
import torch
from measured_fixture import artifact, measured_files
from report_fixture import make_report

from edgeprune.devices.board import open_board
from edgeprune.devices.link.frames import Refusal
from edgeprune.errors import EdgepruneError, FormatError, IntegrityError, MissingTool
from edgeprune.pipeline.files import export
from edgeprune.pipeline.files.records import FinalQuality, PrunedFiles
from edgeprune.pipeline.run_folder import Stage
from edgeprune.pipeline.stages import measure
from edgeprune.pipeline.stages import precision as shipping
from edgeprune.records.budget import parse_budget

BOTH, INT8 = ("fp32", "int8"), ("int8",)
COARSE = "it computes 40% of its layers in 8 bits"


@pytest.fixture
def refused(monkeypatch):
    """No INT8 file passes what a reader of its bundle asks."""

    def check(*arguments, **options):
        raise IntegrityError(COARSE)

    monkeypatch.setattr(export, "require_eight_bits", check)


@pytest.fixture
def sound(monkeypatch):
    """Every INT8 file passes."""
    monkeypatch.setattr(export, "require_eight_bits", lambda *arguments, **options: None)


def chosen(
    tmp_path: Path,
    *,
    precisions=BOTH,
    budget="60%",
    quality=(0.90, 0.89, 0.90, 0.89),
    built_in=1.0,
    agreement=1.0,
    comparable=None,
    **changes,
):
    """What ships of the files of test_verdict, whose FP32 file takes 60 % of dense FP32, and what was said."""
    said: list[str] = []
    target = SimpleNamespace(precisions=precisions)
    context = SimpleNamespace(
        job=SimpleNamespace(target=target, budget=parse_budget(budget), max_drop=0.02),
        progress=SimpleNamespace(say=said.append),
        precisions=lambda wanted: tuple(comparable or wanted),
        runtime_on=lambda board: SimpleNamespace(name="litert"),
        board=None,
        runs_ship=True,
    )
    files = PrunedFiles(
        **{
            "fp32": artifact("pruned-fp32"),
            "int8": artifact("pruned-int8"),
            "built_in_agreement": built_in,
            **changes,
        }
    )
    (tmp_path / "pruned-int8.onnx").touch()
    asked = FinalQuality(
        by_variant={},
        metric="accuracy",
        entries=(),
        device_agreement={"fp32": 1.0, "int8": agreement},
    )
    measured = measured_files(quality=quality)
    return shipping.choose(context, Stage(tmp_path, "d", files), measured, asked), said


def test_a_sound_int8_file_ships_as_before(tmp_path, sound):
    choice, said = chosen(tmp_path)
    assert (choice.precision, choice.refused, said) == ("int8", "", [])


def test_fp32_ships_where_a_check_refuses_the_int8_file(tmp_path, refused):
    choice, said = chosen(tmp_path)
    assert choice.precision == "fp32"
    assert choice.reason == choice.refused
    assert choice.refused == (
        f"INT8 was refused: pruned-int8.onnx cannot ship as INT8: {COARSE}; FP32 ships"
    )
    assert said == [
        f"      warning: INT8 was refused: pruned-int8.onnx cannot ship as INT8: {COARSE}"
    ]


def test_the_run_ends_with_both_reasons_where_fp32_is_over_the_budget(tmp_path, refused):
    with pytest.raises(FormatError) as error:
        chosen(tmp_path, budget="55%")
    assert COARSE in error.value.message
    assert "FP32 misses the budget: 0.6 of dense fp32, the budget 0.55" in error.value.message
    assert "\n" not in str(error.value)


def test_a_target_of_int8_alone_ends_as_before(tmp_path, refused):
    with pytest.raises(FormatError) as error:
        chosen(tmp_path, precisions=INT8)
    assert error.value.message == f"pruned-int8.onnx cannot ship as INT8: {COARSE}"


def test_fp32_ships_best_effort_where_it_misses_only_the_accuracy(tmp_path, refused):
    """Something within the budget is better than nothing; the gate says what it is worth."""
    choice, _ = chosen(tmp_path, quality=(0.9, 0.89, 0.8, 0.89))
    assert choice.precision == "fp32"


@pytest.mark.parametrize(
    ("budget", "precision"), [("60%", "fp32"), ("59%", None)], ids=["within", "over"]
)
def test_a_conversion_that_was_refused_is_told_as_the_reason(tmp_path, budget, precision):
    why = {"int8": None, "int8_refused": "the converter gave up", "built_in_agreement": None}
    if precision is None:
        with pytest.raises(FormatError, match="the converter gave up; FP32 misses the budget"):
            chosen(tmp_path, budget=budget, **why)
        return
    choice, _ = chosen(tmp_path, budget=budget, **why)
    assert choice.precision == precision
    assert choice.refused == "INT8 was refused: the converter gave up; FP32 ships"


def test_a_target_of_fp32_alone_needs_no_int8_file(tmp_path):
    why = {"int8": None, "int8_refused": "the converter gave up", "built_in_agreement": None}
    choice, _ = chosen(tmp_path, precisions=("fp32",), **why)
    assert (choice.precision, choice.refused) == ("fp32", "")
    assert choice.reason == "the target allows only fp32"


@pytest.mark.parametrize("changes", [{"agreement": 0.98}, {"built_in": 0.9}])
def test_fp32_ships_where_the_int8_kernels_disagree_and_it_keeps_every_promise(
    tmp_path, sound, changes
):
    choice, _ = chosen(tmp_path, **changes)
    assert choice.precision == "fp32"
    assert choice.refused.startswith("INT8 was refused: its kernels disagree, device and host")
    for other in ({"budget": "55%"}, {"quality": (0.9, 0.9, 0.8, 0.9)}, {"precisions": INT8}):
        choice, _ = chosen(tmp_path, **changes, **other)
        assert choice.precision == "int8"  # as before: a marked best effort


STANDS_IN = (
    "litert on this machine stands in for the target, so its times do not rank the precisions"
)


@pytest.mark.parametrize(
    ("quality", "precision", "reason", "refused"),
    [
        ((0.9, 0.9, 0.9, 0.89), "int8", STANDS_IN, ""),
        # INT8 alone loses too much: FP32, and every page says why.
        (
            (0.9, 0.9, 0.9, 0.8),
            "fp32",
            "INT8 was refused: accuracy dropped 10.00 points, 2.00 are allowed",
            "same",
        ),
        # Both lose too much: the file that the plan is for, however fast the other one is here.
        (
            (0.9, 0.9, 0.8, 0.7),
            "int8",
            f"{STANDS_IN}; int8, which the plan is for, misses accuracy",
            "",
        ),
    ],
    ids=["both hold", "int8 loses", "both lose"],
)
def test_times_of_a_stand_in_never_rank_the_precisions(
    tmp_path, sound, quality, precision, reason, refused
):
    choice, _ = chosen(tmp_path, quality=quality, comparable=INT8)
    assert choice.precision == precision
    assert choice.reason.startswith(reason)
    assert choice.refused.startswith(reason if refused else "")
    assert bool(choice.refused) is bool(refused)


def test_fp32_over_the_budget_is_no_way_out_of_a_stand_in(tmp_path, sound):
    choice, _ = chosen(tmp_path, quality=(0.9, 0.9, 0.9, 0.8), comparable=INT8, budget="59%")
    assert choice.precision == "int8"


# The conversion itself


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with open_board("here", int8_fixture.local(tmp_path_factory.mktemp("board"))) as board:
        yield board


def refusing(monkeypatch, error: Exception) -> None:
    def quantise(*arguments, **options):
        raise error

    monkeypatch.setattr(export, "best_int8", quantise)


def pruned(here, folder: Path, precisions=BOTH):
    context = int8_fixture.context_of(here, int8_fixture.uneven())
    context.job.target = context.job.target.model_copy(update={"precisions": precisions})
    return context, export.pruned_files(context, context.model, folder, limit_ms=1.0)


@pytest.mark.parametrize(
    "error",
    [FormatError("too coarse:\n40 %"), Refusal("load", "too coarse: 40 %")],
    ids=["converter", "runtime"],
)
def test_a_refused_conversion_leaves_the_fp32_file_and_says_why(here, tmp_path, monkeypatch, error):
    refusing(monkeypatch, error)
    context, files = pruned(here, tmp_path)
    assert (files.int8, files.int8_refused) == (None, "too coarse: 40 %")
    assert context.progress.lines[-1].strip() == "warning: INT8 was refused: too coarse: 40 %"
    assert files.shipped("fp32") == files.fp32
    x = int8_fixture.samples(8, seed=5)
    with torch.no_grad():
        wanted = context.model(torch.from_numpy(x))
    answers = context.run_file(here, tmp_path / files.fp32.path, x)
    assert torch.allclose(answers, wanted, atol=1e-3 * float(wanted.abs().max()))
    with pytest.raises(ValueError, match="there is none"):
        files.whole("int8")


@pytest.mark.parametrize(
    ("error", "precisions"),
    [
        (FormatError("too coarse"), INT8),
        (MissingTool("executorch", "executorch"), BOTH),
        (Refusal("memory", "no memory"), BOTH),
    ],
    ids=["int8-only", "missing-tool", "board"],
)
def test_what_fp32_does_not_mend_still_ends_the_run(here, tmp_path, monkeypatch, error, precisions):
    refusing(monkeypatch, error)
    with pytest.raises(EdgepruneError) as raised:
        pruned(here, tmp_path, precisions)
    assert raised.value is error


def test_operators_that_only_the_int8_file_needs_refuse_it_alone(here, tmp_path, monkeypatch):
    """A runner that lacks an operator of the FP32 file can ship neither."""
    context = int8_fixture.context_of(here, int8_fixture.uneven(), effort="plain")

    def needs(names):
        def check(_, artifact):
            if artifact.precision in names:
                raise FormatError(f"{artifact.path} needs operators that the runner lacks")

        monkeypatch.setattr(export, "_check_operators", check)

    needs(("int8",))
    files = export.pruned_files(context, context.model, tmp_path, limit_ms=1.0)
    assert files.int8 is None
    assert "pruned.int8.onnx needs operators" in files.int8_refused
    needs(("fp32", "int8"))
    with pytest.raises(FormatError, match=r"pruned\.fp32\.onnx needs operators"):
        export.pruned_files(context, context.model, tmp_path, limit_ms=1.0)


def test_a_dense_net_that_cannot_ship_as_int8_is_planned_in_fp32(monkeypatch):
    measured = measured_files(ms=(10, 4, 6, 3)).measurements
    monkeypatch.setattr(
        measure, "measure", lambda *a, **k: [replace_name(measured, p) for p in BOTH]
    )
    fingerprint = make_report().fingerprint
    context = SimpleNamespace(
        job=SimpleNamespace(target=SimpleNamespace(precisions=BOTH)),
        board=None,
        runtime_on=lambda _: SimpleNamespace(name="onnxruntime", threads=1),
        model_file=lambda *_: None,
        stamped=lambda found: {m.name: m for m in found},
        precisions=lambda wanted: ("int8",) if "int8" in wanted else tuple(wanted),
        fingerprint=lambda _: fingerprint,
    )
    for refused, precision in (("", "int8"), ("it stores 0%", "fp32")):
        files = SimpleNamespace(
            fp32=artifact("dense-fp32"), int8=artifact("dense-int8"), int8_refused=refused
        )
        assert measure.dense_latency(context, files, Path()).precision == precision


def replace_name(measured, precision):
    return measured[f"dense-{precision}"].model_copy(update={"name": precision})

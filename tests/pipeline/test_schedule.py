"""Pruning in steps, and the weights that training starts from: nested cuts, the same training in all, exact weights."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tinynet
import torch
from pattern import without_pattern
from safetensors.torch import load_file, save_file
from torch import nn
from zoo import ZOO, make

from edgeprune import formats
from edgeprune.cli.options import schedule_settings
from edgeprune.compress.groups.find import find_groups, remove_channels
from edgeprune.compress.groups.surgery import narrowed_groups
from edgeprune.compress.heal.fresh_weights import reinitialised
from edgeprune.compress.scores.importance import fisher
from edgeprune.compress.structure_loss import trial_settings
from edgeprune.errors import ModelError, SpecError
from edgeprune.pipeline import api
from edgeprune.pipeline import run as pipeline
from edgeprune.pipeline.context import Context
from edgeprune.pipeline.files.records import StepResult
from edgeprune.pipeline.options import Options
from edgeprune.pipeline.stages import measure
from edgeprune.pipeline.stages import steps as schedule
from edgeprune.plan.basis import Basis
from edgeprune.plan.latency.model import Factor, LatencyModel
from edgeprune.plan.measured import MeasuredNets, ScoresResult
from edgeprune.plan.solver.solve import solve
from edgeprune.progress import Silent
from edgeprune.records.base import R, parse, read_json, read_yaml
from edgeprune.records.files import digest_of, to_json_text
from edgeprune.records.plan import LatencyModelQuality, PlanResult
from edgeprune.records.report import Report
from edgeprune.records.workload import MOST_STEPS, Preprocess, Recovery, Workload
from edgeprune.workload.load import from_objects

GROUPS = ("0", "3", "6")  # of the tiny net


# Settings


def test_a_recovery_without_a_schedule_says_what_it_does_all_the_same() -> None:
    plain = Recovery().model_dump(mode="json")
    assert (plain["steps"], plain["start"], plain["sparsity"]) == (1, "kept", "none")
    assert plain["rewind_weights"] is None
    assert parse(Recovery, plain, where="there") == Recovery()


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 3}, {"steps": "auto"}, {"start": "fresh"}, {"start": "rewound", "rewind_weights": "x.pt"},
        {"sparsity": "2:4"},
    ],
)  # fmt: skip
def test_a_schedule_is_written_and_read_again(given: dict[str, object]) -> None:
    found = parse(Recovery, given, where="here")
    plain = found.model_dump(mode="json")
    assert given.items() <= plain.items()
    assert parse(Recovery, plain, where="there") == found
    assert digest_of(found) != digest_of(Recovery())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steps": 0}, "steps in here: it must be 1 to 5, or auto, but got 0"),
        ({"steps": MOST_STEPS + 1}, "it must be 1 to 5, or auto, but got 6"),
        ({"steps": True}, "it must be 1 to 5, or auto"),
        ({"steps": "atuo"}, "it must be 1 to 5, or auto, but got 'atuo'"),
        ({"start": "rewind"}, "'kept', 'rewound' or 'fresh'"),
        ({"start": "rewound"}, "must name a file of earlier weights"),
        ({"rewind_weights": "x.pt"}, "with start rewound only"),
        ({"sparsity": "1:2"}, "'none' or '2:4', but got '1:2'"),
        ({"sparsity": True}, "'none' or '2:4', but got True"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(Recovery, given, where="here")
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_sparsity_needs_no_quotes_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 reads 2:4 as a number to the base 60."""
    (tmp_path / "plain.yaml").write_text("sparsity: 2:4\n")
    assert read_yaml(Recovery, tmp_path / "plain.yaml").sparsity == "2:4"


def test_a_misspelt_key_is_told_the_nearest_one() -> None:
    with pytest.raises(SpecError) as caught:
        parse(Workload, {"model": "n.py:b", "data": "d", "recovery": {"step": 2}}, where="x")
    assert "did you mean 'recovery.steps'" in (caught.value.hint or "")


def test_flags_say_the_same_as_keys() -> None:
    assert schedule_settings({"steps": "3", "start": None}) == {"steps": 3}
    assert schedule_settings({"steps": "auto"}) == {"steps": "auto"}
    assert schedule_settings({"epochs": "0.5"}) == {"epochs": 0.5}
    assert schedule_settings({"epochs": "few"}) == {"epochs": "few"}  # the record refuses it
    assert schedule_settings({}) == {}
    assert schedule_settings({"sparsity": "2:4"}) == {"sparsity": "2:4"}
    rewound = {"start": "rewound", "rewind_weights": "early.pt"}
    assert schedule_settings(rewound) == rewound
    # A flag wins over the file: a file of earlier weights that is named there is left aside.
    over = {**rewound, **schedule_settings({"start": "fresh"})}
    assert parse(Recovery, over, where="here").start == "fresh"


# Budgets and epochs


@pytest.mark.parametrize("steps", range(1, MOST_STEPS + 1))
def test_every_step_asks_for_the_same_speedup(steps: int) -> None:
    found = (80.0, *schedule.budgets(80.0, 20.0, steps))
    assert len(found) == steps + 1
    assert found[-1] == 20.0
    assert [a / b for a, b in itertools.pairwise(found)] == pytest.approx(
        [4 ** (1 / steps)] * steps
    )


def test_the_report_says_which_step_its_costs_are_of() -> None:
    settings = Recovery(epochs=2)
    last = schedule.LastStep(None, None, settings, steps=3, earlier_epochs=0.6)  # type: ignore[arg-type]
    told = schedule.note(last, settings)
    assert told.startswith("pruned in 3 steps")
    assert "costs in nats are those of step 3" in told
    assert schedule.note(replace(last, steps=1), settings) == ""


def test_a_budget_over_the_dense_latency_asks_for_nothing() -> None:
    assert schedule.budgets(10.0, 15.0, 3) == (10.0, 10.0, 15.0)


@pytest.mark.parametrize(
    ("end_ms", "steps"), [(100, 1), (70, 1), (60, 2), (40, 2), (33, 3), (10, 3)]
)
def test_auto_takes_more_steps_for_more_speed(end_ms: float, steps: int) -> None:
    assert schedule.step_count("auto", 100.0, end_ms) == steps
    assert schedule.step_count(4, 100.0, end_ms) == 4


@pytest.mark.parametrize("epochs", [0.0, 0.3, 1.0, 5.0, 7.77])
@pytest.mark.parametrize("samples", [2, 100, 512, 60_000])
@pytest.mark.parametrize("steps", range(1, MOST_STEPS + 1))
def test_steps_share_the_epochs_of_one(epochs: float, samples: int, steps: int) -> None:
    recovery = Recovery(epochs=epochs, batch_size=96)
    per_epoch = samples // min(96, samples)
    found = schedule.shared_epochs(recovery, samples, steps)
    updates = [math.ceil(share * per_epoch) for share in found]
    assert len(updates) == steps
    assert sum(updates) == math.ceil(epochs * per_epoch)
    assert all(u <= 0.2 * sum(updates) for u in updates[:-1])
    assert updates[-1] >= 0.4 * sum(updates)


# Nets that were cut before


@pytest.mark.parametrize("name", sorted(ZOO))
def test_two_cuts_after_another_equal_one(name: str) -> None:
    model, x = make(ZOO[name])
    groups, _ = find_groups(model, x[:1])
    draw = np.random.default_rng(5)
    order = {g.name: draw.permutation(g.channels) for g in groups}
    first = {
        g.name: tuple(sorted(order[g.name][: max(1, -(-3 * g.channels // 4))])) for g in groups
    }
    second = {g.name: tuple(sorted(order[g.name][: max(1, g.channels // 2)])) for g in groups}
    by_name = {g.name: g for g in groups}
    removed = {g.name: sorted(set(range(g.channels)) - set(first[g.name])) for g in groups}
    narrow = remove_channels(model, by_name, removed, x[:1])
    later = {g.name: g for g in narrowed_groups(groups, first)}
    again = {n: [i for i, c in enumerate(first[n]) if c not in second[n]] for n in by_name}
    twice = remove_channels(narrow, later, again, x[:1])
    removed = {g.name: sorted(set(range(g.channels)) - set(second[g.name])) for g in groups}
    once = remove_channels(model, by_name, removed, x[:1])
    mine, wanted = twice.state_dict(), once.state_dict()
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in wanted.items()}
    assert all(torch.equal(mine[key], wanted[key]) for key in wanted)
    with torch.no_grad():
        assert torch.equal(twice(x), once(x))


def test_a_grouped_convolution_with_few_inputs_left_is_cut_as_before() -> None:
    """Four groups of eight inputs give up the same positions; of four inputs they would look as if they went as a whole."""
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    groups, _ = find_groups(net, x[:1])
    assert {g.name: g.channels for g in groups} == {"0": 8, "2": 8}
    by_name = {g.name: g for g in groups}
    first = {"0": (1, 3, 5, 7), "2": (0, 1, 2, 3, 4, 5)}
    narrow = remove_channels(net, by_name, {"0": (0, 2, 4, 6), "2": (6, 7)}, x[:1])
    later = {g.name: g for g in narrowed_groups(groups, first)}
    twice = remove_channels(narrow, later, {"0": (0, 3), "2": (1,)}, x[:1])
    once = remove_channels(net, by_name, {"0": (0, 1, 2, 4, 6, 7), "2": (1, 6, 7)}, x[:1])
    assert twice[2].weight.shape == (20, 2, 3, 3)
    with torch.no_grad():
        assert torch.equal(twice(x), once(x))


def test_groups_of_a_net_that_was_cut_can_be_scored() -> None:
    model, x = make(ZOO["residual"])
    groups, _ = find_groups(model, x[:1])
    kept = {g.name: tuple(range(1, g.channels, 2)) for g in groups}
    removed = {g.name: range(0, g.channels, 2) for g in groups}
    narrow = remove_channels(model, {g.name: g for g in groups}, removed, x[:1])
    scores = fisher(narrow, narrowed_groups(groups, kept), x, 0)
    assert {name: len(s) for name, s in scores.items()} == {n: len(k) for n, k in kept.items()}
    assert all((s >= 0).all() and s.any() for s in scores.values())


def basis() -> Basis:
    """Two groups, each with a cost of a hundredth of a millisecond a channel, and one nat for all channels of a group."""
    grids = {"a": (4, 8, 12, 16), "b": (8, 16, 32)}
    factors = tuple(Factor((n,), np.array(g) / 100.0) for n, g in grids.items())
    both = Factor(("a", "b"), np.outer(grids["a"], grids["b"]) / 1000.0)
    _, found = make(ZOO["plain"])
    groups, _ = find_groups(make(ZOO["plain"])[0], found[:1])
    named = tuple(
        replace(groups[0], name=n, channels=g[-1], couplings=()) for n, g in grids.items()
    )
    return Basis(
        groups=named, frozen=(), model=LatencyModel(grids, (*factors, both), 0.1),
        nets=MeasuredNets(dense_ms=1.0, widths=(), ms=()),
        quality=LatencyModelQuality(
            kernels_measured=0, nets_fitted=0, nets_held_out=0, mean_error_ratio=0,
            worst_error_ratio=0,
        ),
        curves={n: 1 - np.array(g) / g[-1] for n, g in grids.items()},
        orders={n: np.arange(g[-1]) for n, g in grids.items()}, importance="fisher",
    )  # fmt: skip


def test_a_latency_model_between_widths_predicts_the_same() -> None:
    model = basis().model
    narrow = model.between({"b": 16}, {"a": 8})
    assert narrow.grids == {"a": (4, 8), "b": (16, 32)}
    assert narrow.predict({"a": 4, "b": 16}) == model.predict({"a": 4, "b": 16})
    assert narrow.predict({}) == model.predict({"a": 8})
    with pytest.raises(SpecError):
        narrow.predict({"a": 16})


def test_what_is_gone_costs_nothing_goes_first_and_does_not_come_back() -> None:
    kept = {"a": (1, 4, 5, 6, 7, 9, 12, 15), "b": tuple(range(32))}
    scores = ScoresResult(
        scores={"a": (5.0, 1.0, 2.0, 9.0, 8.0, 7.0, 6.0, 4.0), "b": tuple(map(float, range(32)))},
        curves={"a": (0.3, 0.0), "b": (0.9, 0.2, 0.0)},
    )
    found = schedule.narrowed_basis(basis(), kept, scores)
    assert found.curves["a"].tolist() == [0.3, 0, 0, 0]
    assert found.curves["b"].tolist() == [0.9, 0.2, 0]
    order = found.orders["a"].tolist()
    assert sorted(order) == list(range(16))
    assert set(order[:8]) == set(range(16)) - set(kept["a"])
    assert order[8:] == [4, 5, 15, 1, 12, 9, 7, 6]
    problem = found.problem()
    assert problem.grids == {"a": (4, 8), "b": (8, 16, 32)}
    assert solve(problem, 10.0).widths == {"a": 8, "b": 32}
    assert set(solve(problem, 0.5).widths) == {"a", "b"}


def test_a_given_plan_is_not_undercut_on_the_way() -> None:
    found = replace(basis(), at_least={"a": 12, "b": 32}).problem()
    assert found.grids == {"a": (12, 16), "b": (32,)}
    assert [c.shape for c in found.cost_nats.values()] == [(2,), (1,)]


# Fresh weights


def test_fresh_weights_are_others_and_the_same_again_for_the_same_seed() -> None:
    model = tinynet.trained()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    first, again, other = (reinitialised(model, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    for key in ("0.weight", "3.weight", "11.weight", "11.bias"):
        assert not torch.equal(first[key], other[key])
        assert not torch.equal(first[key], before[key])
    assert torch.equal(first["1.running_mean"], torch.zeros(32))
    assert torch.equal(first["1.weight"], torch.ones(32))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Scaled(nn.Module):
    """A layer with a parameter that nothing sets anew, or that it sets itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((4,), 7.0))


class SelfScaled(Scaled):
    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 3.0)
        nn.init.zeros_(self.inner.weight)


def test_a_parameter_that_nothing_sets_anew_is_named() -> None:
    with pytest.raises(ModelError, match=r"'1\.scale'") as caught:
        reinitialised(nn.Sequential(nn.Linear(4, 4), Scaled()), 0)
    assert "reset_parameters" in (caught.value.hint or "")
    # What a module sets itself counts over what its parts set.
    found = reinitialised(SelfScaled(), 0).state_dict()
    assert found["scale"].tolist() == [3.0] * 4
    assert not found["inner.weight"].any()


# The last cut of a run


def early_state() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(9)
    return {
        k: torch.rand(v.shape, generator=draw) + 0.1 if v.is_floating_point() else v
        for k, v in tinynet.trained_state().items()
    }


def context_of(
    folder: Path, *, seed: int = 0, target: str = "this-machine", **recovery: object
) -> Context:
    """The tiny net's job without a board: cuts need none."""
    save_file(early_state(), folder / "early.safetensors")
    settings = Workload.model_validate_json(
        to_json_text({"model": "net.py:build", "data": "-", "recovery": recovery, "seed": seed})
    )
    loaded = from_objects(
        tinynet.trained(), tinynet.arrays(), preprocess=Preprocess(color="grey"),
        settings=settings, base=folder,
    )  # fmt: skip
    job = api.resolve(loaded, Options(target=target))
    board = None
    form = formats.load("onnx")
    return Context(job, form, form, board, board, board, Silent())  # type: ignore[arg-type]


KEPT = {"0": tuple(range(0, 32, 2)), "3": tuple(range(3, 43)), "6": tuple(range(64))}


def last_step(context: Context) -> schedule.LastStep:
    """A last step whose plan keeps :data:`KEPT`."""

    class Fixed(schedule.LastStep):
        @property
        def kept(self) -> schedule.Kept:
            return KEPT

    full = {name: tuple(range(n)) for name, n in context.full.items()}
    recovery = context.job.loaded.workload.recovery
    return Fixed(None, schedule.Current(context.model, full), recovery)  # type: ignore[arg-type]


def start_of(context: Context, folder: Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    folder.mkdir()
    found = schedule.prune(context, last_step(context), folder)
    state = load_file(folder / "compensated.safetensors")
    measure.pruned_model(context, KEPT).load_state_dict(state)  # the shapes of the plan
    return state, tuple(entry.stage for entry in found.entries)


def test_rewound_channels_have_exactly_their_earlier_weights(tmp_path: Path) -> None:
    context = context_of(tmp_path, start="rewound", rewind_weights="early.safetensors")
    assert context.job.loaded.earlier_digest
    state, entries = start_of(context, tmp_path / "stage")
    assert entries == ("pruned", "compensated")
    early = early_state()
    rows, columns = torch.tensor(KEPT["3"]), torch.tensor(KEPT["0"])
    assert torch.equal(state["0.weight"], early["0.weight"][columns])
    assert torch.equal(state["3.weight"], early["3.weight"][rows][:, columns])
    assert torch.equal(state["6.weight"], early["6.weight"][:, rows])
    assert torch.equal(state["4.bias"], early["4.bias"][rows])
    assert torch.equal(state["11.weight"], early["11.weight"])
    # Statistics are those of the data in the narrower net.
    assert not torch.equal(state["4.running_mean"], early["4.running_mean"][rows])


def test_fresh_starts_depend_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    first, entries = start_of(context_of(tmp_path, start="fresh", seed=3), tmp_path / "a")
    again, _ = start_of(context_of(tmp_path, start="fresh", seed=3), tmp_path / "b")
    other, _ = start_of(context_of(tmp_path, start="fresh", seed=4), tmp_path / "c")
    assert entries == ("pruned",)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["3.weight"], other["3.weight"])


def test_kept_weights_are_compensated_from_the_net_as_it_stands(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    state, entries = start_of(context, tmp_path / "stage")
    assert entries == ("pruned", "compensated")
    columns = torch.tensor(KEPT["0"])
    assert torch.equal(state["0.weight"], tinynet.trained_state()["0.weight"][columns])
    # A second cut of that net keeps its weights, not the dense ones.
    model = measure.pruned_model(context, KEPT)
    model.load_state_dict({k: v + 1 if k == "0.weight" else v for k, v in state.items()})
    fewer = {**KEPT, "0": KEPT["0"][::2], "6": KEPT["6"][8:]}
    current = schedule.Current(model.eval(), KEPT, "healed")
    second = schedule.cut_and_compensate(context, current, fewer)[0].state_dict()
    assert torch.equal(second["0.weight"], state["0.weight"][::2] + 1)
    assert second["6.weight"].shape == (56, 40, 3, 3)


@pytest.mark.parametrize("start", ["kept", "fresh", "rewound"])
def test_sparse_weights_are_so_before_the_last_training_begins(tmp_path: Path, start: str) -> None:
    given = {
        "start": start,
        **({"rewind_weights": "early.safetensors"} if start == "rewound" else {}),
    }
    context = context_of(tmp_path, target="jetson-orin-nano", sparsity="2:4", **given)
    state, entries = start_of(context, tmp_path / "stage")
    assert entries[-1] == "sparsified"
    assert without_pattern(state, ["3", "6", "11"]) == ()
    assert without_pattern(state, ["0"]) == ("0",)  # it reads one channel
    dense, names = start_of(context_of(tmp_path, **given), tmp_path / "dense")
    assert names == entries[:-1]
    assert without_pattern(dense, ["3", "6", "11"]) == ("3", "6", "11")
    assert torch.equal(dense["0.weight"], state["0.weight"])


def test_only_a_run_that_asks_for_sparsity_has_it_in_its_digests(tmp_path: Path) -> None:
    class Plan:
        digest = "plan"

    class Planned:
        plan = Plan

    def inputs(**recovery: object) -> tuple[dict[str, object], str]:
        context = context_of(tmp_path, target="jetson-orin-nano", **recovery)
        step = replace(last_step(context), planned=Planned)  # type: ignore[arg-type]
        return schedule.prune_inputs(context, step), pipeline.run_digest(context.job)

    dense, dense_run = inputs()
    assert dense == {"plan": "plan"}
    assert inputs(sparsity="none") == (dense, dense_run)
    sparse, sparse_run = inputs(sparsity="2:4")
    assert sparse == {"plan": "plan", "sparsity": "2:4"}
    assert sparse_run != dense_run


@pytest.mark.parametrize("target", ["this-machine", "rpi4", "iphone", "android-arm64"])
def test_a_target_without_sparse_kernels_refuses_them(tmp_path: Path, target: str) -> None:
    with pytest.raises(SpecError, match="sparsity 2:4 needs an accelerator") as caught:
        context_of(tmp_path, target=target, sparsity="2:4")
    assert caught.value.hint == "leave sparsity out; targets that have them: jetson-orin-nano"


def test_steps_before_the_last_heal_dense_weights() -> None:
    recovery = Recovery(steps=3, sparsity="2:4")
    trainings = schedule.step_trainings(recovery, 512, 3)
    assert [t.sparsity for t in trainings] == ["none", "none", "2:4"]
    settings = trial_settings(recovery, 4096, 10**6)
    assert settings is not None
    assert settings.sparsity == "none"


def test_weights_of_masked_channels_cannot_be_rewound(tmp_path: Path) -> None:
    save_file(early_state(), tmp_path / "early.safetensors")
    model = tinynet.trained()
    with torch.no_grad():
        model[3].weight[:4] = 0
    recovery = Recovery(start="rewound", rewind_weights="early.safetensors")
    settings = Workload(model="net.py:build", data="-", recovery=recovery)
    with pytest.raises(ModelError, match="masked"):
        from_objects(
            model, tinynet.arrays(), preprocess=Preprocess(color="grey"), settings=settings,
            base=tmp_path,
        )  # fmt: skip


# Whole runs


STEP_STAGES = ("step-1-prune", "step-1-recover", "step-2-importance", "step-2-plan")


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory) -> tinynet.Run:
    """The tiny net at 60 % in two steps, on what another run has measured."""
    deployed = tinynet.deployed(tmp_path_factory)
    recovery = {"epochs": 2, "batch_size": 64, "augment": {"shift_pixels": 0}, "steps": 2}
    home = tinynet.project(tmp_path_factory.mktemp("steps") / "project", recovery=recovery)
    for name, folder in tinynet.stage_folders(deployed.folder).items():
        if name in tinynet.STAGES[: tinynet.STAGES.index("plan")]:
            shutil.copytree(folder, home / "run" / "stages" / folder.name)
    done = deploy(home)
    assert (home / "run" / "report.json").exists(), done.stderr
    return tinynet.Run(home, home / "run", done)


def deploy(home: Path, *args: str) -> subprocess.CompletedProcess[str]:
    latency = ("--latency", "60%", "--run", "run")
    return tinynet.edgeprune(home, "deploy", "--target", "this-machine", *latency, *args)


def result(run: Path, stage: str, cls: type[R]) -> R:
    plain = json.loads((tinynet.stage_folders(run)[stage] / "stage.json").read_text())["result"]
    return parse(cls, plain, where=stage)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_in_two_steps_keeps_fewer_and_fewer_channels_within_its_epochs(
    stepped: tinynet.Run,
) -> None:
    report = read_json(Report, stepped.folder / "report.json")
    assert set(STEP_STAGES) < set(tinynet.stage_folders(stepped.folder))
    step = result(stepped.folder, "step-1-prune", StepResult)
    assert step.predicted_ms <= step.limit_ms
    assert step.limit_ms == pytest.approx(report.plan.dense_ms * 0.6**0.5)
    last = {g.name: g.kept for g in report.plan.groups}
    assert tuple(last) == GROUPS
    assert all(set(last[name]) <= set(step.kept[name]) for name in GROUPS)
    assert sum(map(len, last.values())) < sum(map(len, step.kept.values())) < 160
    final = result(stepped.folder, "step-2-plan", PlanResult)
    assert report.checks == final.checks
    assert final.chosen().within_budget
    assert report.settings["recovery epochs run"] == 2
    assert report.settings["pruning steps"] == 2
    assert any("2 steps" in note for note in report.notes)
    assert "step 1 of 2: 77.5% of dense, predicted" in stepped.done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_in_steps_goes_on_from_its_stages(stepped: tinynet.Run, tmp_path: Path) -> None:
    home = tmp_path / "project"
    shutil.copytree(stepped.project, home)
    folders = tinynet.stage_folders(home / "run")
    for name in ("step-2-plan", "prune", "recover"):
        shutil.rmtree(folders[name])
    before = {n: (folders[n] / "stage.json").read_bytes() for n in STEP_STAGES[:3]}
    done = deploy(home)
    for name in STEP_STAGES[:3]:
        assert f"{name}: done earlier, kept" in done.stderr, done.stderr
    assert "step-2-plan: done earlier" not in done.stderr
    folders = tinynet.stage_folders(home / "run")
    assert before == {n: (folders[n] / "stage.json").read_bytes() for n in STEP_STAGES[:3]}
    report = read_json(Report, home / "run" / "report.json")
    step = result(home / "run", "step-1-prune", StepResult)
    assert all(set(g.kept) <= set(step.kept[g.name]) for g in report.plan.groups)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_of_steps_trains_nothing_and_a_control_shares_all_before_the_cut(
    stepped: tinynet.Run, tmp_path: Path
) -> None:
    home = tmp_path / "project"
    shutil.copytree(stepped.project, home)
    for name, folder in tinynet.stage_folders(home / "run").items():
        if name not in tinynet.STAGES[: tinynet.STAGES.index("prune")]:
            shutil.rmtree(folder)
    dry = deploy(home, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert not list((home / "run" / "stages").glob("step-*"))
    done = deploy(home, "--steps", "1", "--start", "fresh")
    report = read_json(Report, home / "run" / "report.json")
    assert "plan: done earlier, kept" in done.stderr
    assert [e.stage for e in report.ledger][:3] == ["dense", "pruned", "recovered"]
    assert any("from-scratch control" in note for note in report.notes)
    assert report.settings["training starts from"] == "fresh"
    assert report.settings["recovery epochs run"] == 2

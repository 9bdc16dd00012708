"""What happens when something that the user gave is wrong: one line, the exit code of its family, and nothing half-written."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import tinynet
import torch
import yaml
from safetensors.torch import save_file
from sshd import free_port

DUMP = "EDGEPRUNE_DUMP_WRONG_INPUTS"
DEPLOY = ("deploy", "--target", "this-machine")
REWOUND = (*DEPLOY, "--start", "rewound", "--rewind-weights")


def nothing(_: Path, __: Path) -> None:
    """Leave the project as it is."""


@dataclass(frozen=True)
class Case:
    """One wrong input: what is done to a sound project, the command, and what has to come of it."""

    name: str
    args: tuple[str, ...]
    code: int
    says: tuple[str, ...]
    spoil: Callable[[Path, Path], None] = nothing


def misspell_a_key(project: Path, _: Path) -> None:
    tinynet.write_settings(project, latencey="60%")


def take_weights_of_another_model(project: Path, _: Path) -> None:
    state = dict(tinynet.trained_state())
    state["9.weight"] = torch.zeros(64, 128, 3, 3)
    save_file(state, project / "weights.safetensors")


def bring_weights_of_another_shape(project: Path, _: Path) -> None:
    state = {**tinynet.trained_state(), "0.weight": torch.zeros(16, 1, 3, 3)}
    save_file(state, project / "other.safetensors")


def branch_on_the_data(project: Path, _: Path) -> None:
    source = tinynet.MODEL_SOURCE.replace("def build():", "def plain():")
    source += (
        "\n\nclass Undecided(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.body = plain()\n"
        "    def forward(self, x):\n"
        "        y = self.body(x)\n        return y if y.sum() > 0 else -y\n"
        "\n\ndef build():\n    return Undecided()\n"
    )
    (project / "net.py").write_text(source)
    tinynet.write_settings(project, weights=None)


def give_images_of_three_colours(project: Path, _: Path) -> None:
    x, y = tinynet.arrays()["train"]
    np.savez(project / "data.npz", x=np.repeat(x[..., None], 3, axis=-1), y=y)


def give_floats_of_another_width(project: Path, _: Path) -> None:
    draw = np.random.default_rng(0)
    np.savez(project / "data.npz", x=draw.random((64, 3, 24, 24), np.float32))


def leave_the_labels_out(project: Path, _: Path) -> None:
    tinynet.write_settings(project, labels=None)
    np.savez(project / "data.npz", x=tinynet.arrays()["train"][0])


def give_measured_values(project: Path, _: Path) -> None:
    x, y = tinynet.arrays()["train"]
    np.savez(project / "data.npz", x=x, y=y * 0.5)


def give_several_labels(project: Path, _: Path) -> None:
    x, y = tinynet.arrays()["train"]
    np.savez(project / "data.npz", x=x, y=np.eye(4, dtype=int)[y] | np.eye(4, dtype=int)[0])


def give_no_samples(project: Path, _: Path) -> None:
    np.savez(project / "data.npz", x=np.zeros((0, 24, 24), np.uint8), y=np.zeros(0, np.int64))


def cut_the_data_short(project: Path, _: Path) -> None:
    content = (project / "data.npz").read_bytes()
    (project / "data.npz").write_bytes(content[: len(content) // 2])


def put_nan_in_the_weights(project: Path, _: Path) -> None:
    state = {k: v.clone() for k, v in tinynet.trained_state().items()}
    state["3.weight"][0, 0, 0, 0] = float("nan")
    save_file(state, project / "weights.safetensors")


class Payload:
    """Leaves a marker where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.marker), "w")


def offer_a_pickle_as_weights(project: Path, _: Path) -> None:
    (project / "weights.pt").write_bytes(pickle.dumps(Payload(project / "unpickled")))
    tinynet.write_settings(project, weights="weights.pt")


def offer_a_torch_file_with_code(project: Path, _: Path) -> None:
    torch.save({"0.weight": Payload(project / "unpickled")}, project / "weights.pt")
    tinynet.write_settings(project, weights="weights.pt")


def remove_the_settings(project: Path, _: Path) -> None:
    (project / "edgeprune.yaml").unlink()


def add_a_silent_board(project: Path, _: Path, **changes: object) -> None:
    board: dict[str, object] = {
        "transport": "ssh",
        "targets": ["this-machine"],
        "host": "127.0.0.1",
        "port": free_port(),
        "user": "pi",
        "auth": {"method": "key", "key_file": str(project / "key")},
        "host_key": {"sha256": "SHA256:" + "A" * 43},
        **changes,
    }
    record = {"schema_version": 1, "devices": {"shed": board}}
    (project / "devices.yaml").write_text(yaml.safe_dump(record))


def misspell_a_key_of_a_device(project: Path, finished: Path) -> None:
    add_a_silent_board(project, finished, hots="127.0.0.1")


def make_the_model_raise(project: Path, _: Path) -> None:
    (project / "net.py").write_text("def build():\n    raise ValueError('no such layer')\n")


def use_the_measured_stages(project: Path, finished: Path) -> None:
    tinynet.copied_run(finished, project / "run")


def take_the_bundle(project: Path, finished: Path) -> None:
    shutil.copytree(finished / "bundle", project / "given")


def tamper_with_the_bundle(project: Path, finished: Path) -> None:
    take_the_bundle(project, finished)
    (model,) = (project / "given" / "models").iterdir()
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)


def take_the_bundle_and_a_silent_board(project: Path, finished: Path) -> None:
    take_the_bundle(project, finished)
    add_a_silent_board(project, finished)


CASES = (
    Case("unknown target", ("deploy", "--target", "rpi-4"), 2, ("did you mean 'rpi4'",)),
    Case("misspelt key", DEPLOY, 2, ("latencey", "did you mean 'latency'"), misspell_a_key),
    Case("malformed latency", (*DEPLOY, "--latency", "15"), 2, ("15ms, 60% or 2.5x", "'15'")),
    Case("latency over 100 %", (*DEPLOY, "--latency", "150%"), 2, ("'150%'", "hint: 60% is")),
    Case("malformed max-drop", (*DEPLOY, "--max-drop", "little"), 2, ("max_drop", "'little'")),
    Case("a budget of two words", (*DEPLOY, "--latency", "50", "%"), 2, ("'%'", "without spaces")),
    Case(
        "max-drop over 100 %", (*DEPLOY, "--max-drop", "200%"), 2, ("between 0% and 100%", "'200%'")
    ),
    Case("plan of another kind", (*DEPLOY, "--plan", "net.py"), 2, ("net.py", "edgeprune search")),
    Case(
        "tables of another kind", (*DEPLOY, "--tables", "net.py"), 7, ("net.py", "--tables wrote")
    ),
    Case("standard deviation of nothing", (*DEPLOY, "--std", "0"), 2, ("std must be > 0",)),
    Case("run in a folder of other files", (*DEPLOY, "--run", "."), 2, ("is no run", "data.npz")),
    Case(
        "recording of a run that is measured",
        (*DEPLOY, "--latency", "80%", "--run", "run", "--record", "board.epr"),
        2,
        ("measured without a recording", "--run"),
        use_the_measured_stages,
    ),
    Case("unknown device", (*DEPLOY, "--device", "attic"), 2, ("unknown device 'attic'",)),
    Case("unknown importance", (*DEPLOY, "--importance", "fischer"), 2, ("'fisher'",)),
    Case("unknown flag", (*DEPLOY, "--latancy", "60%"), 2, ("--latancy", "--latency")),
    Case(
        "flag before its command",
        ("--target", "this-machine", "deploy"),
        2,
        (
            "'--target' before the command",
            "hint: options go after the command: edgeprune deploy --target this-machine",
        ),
    ),
    Case("run to resume is not there", (*DEPLOY, "--resume", "gone"), 2, ("gone",)),
    Case("no edgeprune.yaml", DEPLOY, 2, ("no model was named",), remove_the_settings),
    Case("model without data", (*DEPLOY, "net.py:build"), 2, ("--data",), remove_the_settings),
    Case(
        "model file is not there", (*DEPLOY, "nett.py:build", "--data", "data.npz"), 2, ("nett.py",)
    ),
    Case("factory is not there", (*DEPLOY, "net.py:biuld", "--data", "data.npz"), 2, ("'build'",)),
    Case(
        "factory raises", DEPLOY, 3, ("ValueError: no such layer", "line 2"), make_the_model_raise
    ),
    Case("weights of another model", DEPLOY, 3, ("9.weight",), take_weights_of_another_model),
    Case("NaN weights", DEPLOY, 3, ("3.weight", "finite"), put_nan_in_the_weights),
    Case("pickle as weights", DEPLOY, 3, ("weights.pt",), offer_a_pickle_as_weights),
    Case("torch file with code", DEPLOY, 3, ("weights.pt",), offer_a_torch_file_with_code),
    Case("data is not there", (*DEPLOY, "net.py:build", "--data", "gone.npz"), 2, ("gone.npz",)),
    Case("colour images for a grey model", DEPLOY, 3, ("[N, H, W]",), give_images_of_three_colours),
    Case(
        "data of the wrong shape",
        DEPLOY,
        3,
        ("does not accept the data",),
        give_floats_of_another_width,
    ),
    Case("no labels and no task", DEPLOY, 2, ("--task classify",), leave_the_labels_out),
    Case("unknown task", (*DEPLOY, "--task", "detect"), 2, ("'detect'", "classify")),
    Case("measured values as labels", DEPLOY, 3, ("regression",), give_measured_values),
    Case("several labels a sample", DEPLOY, 3, ("several labels",), give_several_labels),
    Case("empty data", DEPLOY, 3, ("at least one sample",), give_no_samples),
    Case("damaged data", DEPLOY, 3, ("data.npz",), cut_the_data_short),
    Case(
        "control flow that depends on the data",
        DEPLOY,
        3,
        ("the model cannot be traced", "data-dependent", "must not branch"),
        branch_on_the_data,
    ),
    Case(
        "budget below the fastest admissible",
        (*DEPLOY, "--latency", "1%", "--run", "run"),
        6,
        ("below the fastest admissible latency", "of dense"),
        use_the_measured_stages,
    ),
    Case("epochs in words", (*DEPLOY, "--epochs", "few"), 2, ("error: --epochs: ", "got 'few'")),
    Case(
        "a run folder as the model",
        ("search", "run", "--target", "rpi4"),
        2,
        ("MODEL is the folder of a run: run",),
        use_the_measured_stages,
    ),
    Case(
        "a file without its factory",
        ("deploy", "net.py", "--data", "digits.npz", "--target", "rpi4"),
        2,
        ("MODEL: it must be FILE.py:FACTORY", "got 'net.py'"),
    ),
    Case("no steps", (*DEPLOY, "--steps", "0"), 2, ("steps", "1 to 5, or auto", "got 0")),
    Case("misspelt start", (*DEPLOY, "--start", "keept"), 2, ("'kept', 'rewound' or 'fresh'",)),
    Case("nothing to rewind to", (*DEPLOY, "--start", "rewound"), 2, ("--rewind-weights",)),
    Case(
        "sparse weights for an accelerator without kernels for them",
        ("deploy", "--target", "rpi4", "--sparsity", "2:4"),
        2,
        ("sparsity 2:4 needs an accelerator", "cortex-a72 of rpi4 has none"),
    ),
    Case("misspelt sparsity", (*DEPLOY, "--sparsity", "4:2"), 2, ("'none' or '2:4'", "'4:2'")),
    Case("weights to rewind to are not there", (*REWOUND, "gone.pt"), 2, ("gone.pt", "no such")),
    Case(
        "weights to rewind to are of another model",
        (*REWOUND, "other.safetensors"),
        3,
        ("0.weight", "other.safetensors"),
        bring_weights_of_another_shape,
    ),
    Case("unreachable board", (*DEPLOY, "--device", "shed"), 4, ("127.0.0.1",), add_a_silent_board),
    Case(
        "misspelt key of a device",
        (*DEPLOY, "--device", "shed"),
        2,
        ("hots", "did you mean"),
        misspell_a_key_of_a_device,
    ),
    Case("bundle is not there", ("verify", "gone"), 2, ("no bundle at gone", "hint: give its")),
    Case("no bundle but a file", ("verify", "net.py"), 7, ("level 0", "hint: give a bundle's")),
    Case("tampered bundle", ("verify", "given"), 7, ("level 1", "copy it"), tamper_with_the_bundle),
    Case(
        "bundle on an unreachable board",
        ("verify", "given", "--device", "shed"),
        4,
        ("shed",),
        take_the_bundle_and_a_silent_board,
    ),
    Case(
        "INT8 inputs of an ONNX file",
        ("deploy", "--target", "this-machine", "--io", "int8"),
        5,
        ("ONNX files take and return float", "io: float"),
    ),
    Case(
        "report of a run that is not there",
        ("report", "gone"),
        2,
        ("no report at", "give a run folder"),
    ),
)

# At least one of every exit code is met in a Python of its own, as a user starts it; the others in that of the tests, which has torch
# loaded.
AS_PROCESS = {
    "misspelt key", "unknown flag", "torch file with code", "unreachable board", "INT8 inputs of an ONNX file",
    "budget below the fastest admissible", "tampered bundle",
}  # fmt: skip


def run(project: Path, *args: str, as_process: bool = False) -> subprocess.CompletedProcess[str]:
    """The command; always in a process of its own when the table for the documentation is wanted."""
    if as_process or DUMP in os.environ:
        return tinynet.edgeprune(project, *args)
    return tinynet.edgeprune_here(project, *args)


def test_every_exit_code_is_met_in_a_process_of_its_own():
    assert {case.name for case in CASES} >= AS_PROCESS
    codes = {case.code for case in CASES}
    assert codes == {2, 3, 4, 5, 6, 7}
    assert {case.code for case in CASES if case.name in AS_PROCESS} == codes


@dataclass(frozen=True)
class Outcome:
    """A row of the table for the documentation."""

    case: str
    command: str
    exit_code: int
    printed: str


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project and a finished run, both to be copied."""
    base = tmp_path_factory.mktemp("wrong-inputs")
    tinynet.project(base / "project")
    finished = tinynet.deployed(tmp_path_factory).folder
    shutil.copytree(finished, base / "deployed")
    return base


@pytest.fixture(scope="session")
def table() -> Iterator[list[Outcome]]:
    """What every case printed; written as JSON to the path in ``EDGEPRUNE_DUMP_WRONG_INPUTS``, if that is set."""
    rows: list[Outcome] = []
    yield rows
    if DUMP in os.environ:
        Path(os.environ[DUMP]).write_text(json.dumps([asdict(row) for row in rows], indent=1))


def check_one_line(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The error and its hint, once it is sure that they are all that was said of it."""
    lines = done.stderr.splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error:")]
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == code, done.stderr
    assert len(errors) == 1, done.stderr
    said = lines[errors[0] :]
    assert len(said) == 1 or (len(said) == 2 and said[1].startswith("hint:")), said
    return "\n".join(said)


def check_nothing_half_written(folder: Path) -> None:
    written = {path.name for path in folder.rglob("*")}
    assert not written & {"bundle", "bundle.zip", "report.json", "report.html", "unpickled"}
    assert not [name for name in written if name.endswith(".part")]


def plain(text: str, project: Path) -> str:
    """What was printed, without the folder of this test run."""
    return text.replace(str(project.resolve()), "/home/you/project")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_a_wrong_input_is_one_line_with_the_exit_code_of_its_family(case, sound, table, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(sound / "project", project)
    case.spoil(project, sound / "deployed")
    done = run(project, *case.args, as_process=case.name in AS_PROCESS)
    said = check_one_line(done, case.code)
    for part in case.says:
        assert part in said
    shutil.rmtree(project / "given", ignore_errors=True)  # what the case itself brought
    check_nothing_half_written(project)
    command = f"edgeprune {' '.join(case.args)}"
    table.append(Outcome(case.name, command, done.returncode, plain(said, project)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = []

    def mount(size_kib: int) -> Path:
        options = ["-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", str(folder)]
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"a small disk needs the right to mount a tmpfs: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for mounted_folder in mounted:
        subprocess.run(["umount", str(mounted_folder)], check=True)


def kept_kib(folder: Path) -> int:
    """Room that a file, or the files of a folder, take on a tmpfs."""
    files = folder.rglob("*") if folder.is_dir() else (folder,)
    return sum((path.stat().st_size + 4095) // 4096 * 4 for path in files)


def closing_kib(run: Path, stage: str) -> int:
    """Room that is too little for the zip, or for the report, of a finished run: half of it is missing."""
    bundle, packed, reports = (
        kept_kib(run / "bundle"),
        (run / "bundle.zip").stat().st_size // 1024,
        sum((run / name).stat().st_size for name in ("report.json", "report.html")) // 1024,
    )
    pruned = kept_kib(run / "pruned.safetensors")
    return bundle + (packed // 2 if stage == "zip" else packed + pruned + reports // 2)


# The stage that runs out of room, and the KiB that it gets: less than it needs. What the last two need depends on what shipped.
@pytest.mark.parametrize(
    ("stage", "room_kib"),
    [
        ("dense", 64),
        pytest.param("variant", 80, marks=pytest.mark.slow),
        ("prune", 80),
        ("recover", 80),
        pytest.param("export", 80, marks=pytest.mark.slow),
        pytest.param("final-latency", 120, marks=pytest.mark.slow),
        ("bundle", 200),
        pytest.param("zip", None, marks=pytest.mark.slow),
        pytest.param("report", None, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_no_part(
    stage, room_kib, sound, small_disk, table, tmp_path
):
    project = tmp_path / "project"
    shutil.copytree(sound / "project", project)
    earlier = list(itertools.takewhile(lambda name: name != stage, tinynet.STAGES))
    folders = tinynet.stage_folders(sound / "deployed")
    if room_kib is None:
        room_kib = closing_kib(sound / "deployed", stage)
    disk = small_disk(room_kib + 16 + sum(kept_kib(folders[name]) for name in earlier))
    for name in earlier:
        shutil.copytree(folders[name], disk / "run" / "stages" / folders[name].name)
    flags = ("--latency", "80%", "--run", str(disk / "run"))
    done = run(project, *DEPLOY, *flags, as_process=stage == "bundle")
    said = check_one_line(done, 2)
    assert "no space left" in said
    written = {path.name for path in disk.rglob("*")}
    assert not [name for name in written if name.endswith(".part")]
    if stage != "report":  # the bundle is whole before the report is written
        assert not written & {"bundle.zip", "report.json"}
    command = f"edgeprune {' '.join(DEPLOY)} --latency 80% --run full-disk/run"
    table.append(
        Outcome(
            f"full disk at {stage}", command, done.returncode, said.replace(str(disk), "full-disk")
        )
    )

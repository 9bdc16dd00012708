"""A small net that trains in seconds, its data, and a project folder around both: what the tests of whole runs deploy."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from sshd import QUICK_REPORT
from torch import nn

from edgeprune.cli.last_net import SOFTWARE
from edgeprune.cli.main import main

REPO = Path(__file__).parents[1]
SIZE, CLASSES = 24, 4
COUNTS = {"train": 512, "selection": 192, "development": 256, "test": 128}
COMMAND_TIMEOUT_S = 900  # a hang, not a slow machine
STAGES = (
    "dense", "dense-latency", "variant", "kernels", "nets", "importance", "plan",
    "prune", "recover", "export", "final-latency", "quality", "test",
)  # fmt: skip
MODEL_SOURCE = '''
from torch import nn


def build():
    """Three convolutions, wide enough that channels cost time on a desktop processor."""
    def block(c_in, c_out, stride):
        return [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(
        *block(1, 32, 1), *block(32, 64, 1), *block(64, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )
'''  # fmt: skip


def build() -> nn.Module:
    """The net of :data:`MODEL_SOURCE`, with fresh weights."""
    names: dict[str, object] = {}
    exec(MODEL_SOURCE, names)
    made = names["build"]()  # type: ignore[operator]
    assert isinstance(made, nn.Module)
    return made


def images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``uint8 [n, 24, 24]`` noisy gratings, and which of four directions each has, ``int64 [n]``."""
    draw = np.random.default_rng(seed)
    y = draw.integers(0, CLASSES, n)
    angle = y * np.pi / CLASSES + draw.normal(0, 0.2, n)
    phase = draw.uniform(0, 2 * np.pi, n)[:, None, None]
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    across = np.cos(angle)[:, None, None] * columns + np.sin(angle)[:, None, None] * rows
    clean = 128 + 60 * np.sin(2 * np.pi * across / 7 + phase)
    x = np.clip(clean + draw.normal(0, 80, clean.shape), 0, 255).astype(np.uint8)
    return x, y.astype(np.int64)


@functools.cache
def trained_state() -> dict[str, torch.Tensor]:
    """Weights after a few seconds of training; the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().train()
        x, y = images(COUNTS["train"], seed=0)
        pixels, classes = torch.from_numpy(x)[:, None].float() / 255, torch.from_numpy(y)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        fading = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, total_iters=7)
        for _ in range(8):
            for rows in torch.randperm(len(x)).split(64):
                optimiser.zero_grad()
                nn.functional.cross_entropy(model(pixels[rows]), classes[rows]).backward()
                optimiser.step()
            fading.step()
    return {k: v.contiguous() for k, v in model.eval().state_dict().items()}


def trained() -> nn.Module:
    """The trained net, in eval mode."""
    model = build()
    model.load_state_dict(trained_state())
    return model.eval()


@functools.cache
def arrays() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """All four splits as ``(x, y)``.

    The classes of the development split are those that the trained net names: it is right on all of them, and whatever a run changes
    in its answers is a drop.
    """
    found = {name: images(n, seed) for seed, (name, n) in enumerate(COUNTS.items())}
    x, _ = found["development"]
    net = trained()
    with torch.no_grad():
        answers = net(torch.from_numpy(x)[:, None].float() / 255)
    return {**found, "development": (x, answers.argmax(1).numpy())}


def settings(**changes: object) -> dict[str, object]:
    """``edgeprune.yaml`` of the project as plain data; ``changes`` replace or add keys, ``None`` removes one."""
    record: dict[str, object] = {
        "schema_version": 1,
        "model": "net.py:build",
        "weights": "weights.safetensors",
        "data": "data.npz",
        "preprocess": {"color": "grey"},
        "labels": ["flat", "rising", "upright", "falling"],
        "max_drop": "20%",
        # Several epochs, so that there is a checkpoint to be killed after, with something random to be taken up again.
        "recovery": {"epochs": 3, "batch_size": 64, "augment": {"shift_pixels": 1}},
    }
    merged = {**record, **changes}
    return {key: value for key, value in merged.items() if value is not None}


DEVICES = {
    "this-machine": {
        "transport": "local",
        "stand_in": True,
        "targets": ["this-machine", "rpi4", "rpi5", "rpi3-32bit"],
        "report": QUICK_REPORT,
    }
}


def project(folder: Path, **changes: object) -> Path:
    """A folder with model, weights, data and ``edgeprune.yaml``; ``changes`` as for :func:`settings`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(MODEL_SOURCE)
    save_file(trained_state(), folder / "weights.safetensors")
    parts = {f"{s}_{k}": v for s, xy in arrays().items() for k, v in zip("xy", xy, strict=True)}
    np.savez(folder / "data.npz", **parts)
    write_settings(folder, **changes)
    (folder / "devices.yaml").write_text(yaml.safe_dump({"schema_version": 1, "devices": DEVICES}))
    return folder


def write_settings(folder: Path, **changes: object) -> None:
    """Write ``edgeprune.yaml`` anew."""
    (folder / "edgeprune.yaml").write_text(yaml.safe_dump(settings(**changes), sort_keys=False))


def environment(cwd: Path, **changes: str) -> dict[str, str]:
    """One thread, this checkout's package, and no file of the person who runs the tests."""
    return {
        **os.environ,
        "PYTHONPATH": str(REPO),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "XDG_CONFIG_HOME": str(cwd / "no-config"),
        "COLUMNS": "400",  # messages are not wrapped
        **changes,
    }


def edgeprune(
    cwd: Path, *args: str, timeout_s: float = COMMAND_TIMEOUT_S, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m edgeprune`` in a folder; ``changes`` are environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "edgeprune", *args],
        cwd=cwd,
        env=environment(cwd, **changes),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )


def edgeprune_here(cwd: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, without the start of another Python: for tests whose claim is what a command says and leaves behind.

    A fault of edgeprune itself fails the test, with what was said of it. What is written past Python, to the file descriptors, is
    not seen, and neither is what only a fresh process shows: those tests take :func:`edgeprune`.
    """
    out, err = io.StringIO(), io.StringIO()
    code = 0
    before = dict(os.environ)
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    os.environ.update(environment(cwd))
    torch.set_num_threads(1)  # as the variable does where torch is imported later
    try:
        with (
            _inside(cwd),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main(args)
    except SystemExit as stop:
        code = int(stop.code or 0)
        assert code != SOFTWARE, err.getvalue()
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.set_rng_state(random_state)
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """``contextlib.chdir``, which Python 3.10 lacks."""
    earlier = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(earlier)


def stage_folders(run: Path) -> dict[str, Path]:
    """The finished stages of a run folder, by name."""
    done = (path.parent for path in run.glob("stages/*/stage.json"))
    return {folder.name.rpartition("-")[0]: folder for folder in done}


@dataclass(frozen=True)
class Run:
    """A command that ran to its end, the project it ran in, and the run folder that it wrote."""

    project: Path
    folder: Path
    done: subprocess.CompletedProcess[str]


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run that all its processes see."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def finished_once(home: Path, make: Callable[[], subprocess.CompletedProcess[str]]) -> Run:
    """A run folder ``run`` that ``make`` fills, in whichever process asks first; the others wait for it.

    Args:
        home: the project, which need not exist.
        make: creates the project and runs the command; it may fail, and is then called again by the next who asks.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    kept = home.with_name(f"{home.name}.json")
    with home.with_name(f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            shutil.rmtree(home, ignore_errors=True)
            done = make()
            assert (home / "run" / "report.json").exists(), done.stderr
            kept.write_text(json.dumps([done.args, done.returncode, done.stdout, done.stderr]))
    done = subprocess.CompletedProcess(*json.loads(kept.read_text()))
    return Run(home, home / "run", done)


def deployed(factory: pytest.TempPathFactory) -> Run:
    """The tiny net deployed for this machine at 80 % of its latency; made once for all test modules of one run of tests."""
    home = shared_folder(factory) / "tiny-project"
    args = ("deploy", "--target", "this-machine", "--latency", "80%", "--run", "run")
    return finished_once(home, lambda: edgeprune(project(home), *args))


def copied_run(source: Path, target: Path) -> Path:
    """A run folder with the stages of another, and none of its results."""
    shutil.copytree(source / "stages", target / "stages")
    return target

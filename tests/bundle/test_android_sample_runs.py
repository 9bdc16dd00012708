"""The Android sample of a bundle on a desktop JVM: it feeds the model as the host does, and judges its answers rightly.

The sample is compiled with the stand-ins for Android and ExecuTorch in ``tests/toolchains/android_run`` and with Android's own
``org.json``; what that takes is fetched by ``tests/toolchains/kotlin_tools.py``: no phone, no ExecuTorch.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import kotlin_tools
import numpy as np
import pytest
from bundle_fixture import make_bundle
from repo import REPO

from edgeprune.bundle.golden import file_input
from edgeprune.bundle.manifest import MANIFEST, GoldenFile, Manifest
from edgeprune.records.base import read_json

FOLDER = REPO / "edgeprune/bundle/samples/android"
SAMPLE = FOLDER / "EdgepruneModel.kt"


def keys_in(plain: object) -> set[str]:
    """All keys of nested plain data."""
    if not isinstance(plain, dict):
        return set()
    return set(plain).union(*map(keys_in, plain.values()))


def test_every_file_and_key_that_the_sample_reads_is_in_a_bundle(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    manifest = read_json(Manifest, folder / MANIFEST)
    known = keys_in(manifest.recipe().model_dump(mode="json"))
    known |= keys_in(manifest.golden_file().model_dump(mode="json"))
    text = SAMPLE.read_text("utf-8")
    read = set(re.findall(r'(?:get(?:JSONObject|JSONArray|String|Double)|floats)\("(\w+)"\)', text))
    assert {"preprocess", "mean", "std", "shape", "model", "max_abs_error"} <= read
    assert read <= known
    files = re.findall(r'(?:bytes|npy)\("([^"]+)"\)', text)
    assert len(files) == 5
    assert all((folder / name).is_file() for name in files)


@pytest.fixture(scope="module")
def classpath(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compiled sample with all that it needs to run on a desktop JVM."""
    if reason := kotlin_tools.missing():
        pytest.skip(reason)
    out = tmp_path_factory.mktemp("kotlin")
    needed = [kotlin_tools.org_json()]
    sources = [SAMPLE, REPO / "tests/toolchains/android_run"]
    done = kotlin_tools.compile_kotlin(sources, needed, out, "-jvm-target", "1.8")
    assert done.returncode == 0, done.stdout + done.stderr
    return ":".join(map(str, [out, kotlin_tools.library(), *needed]))


class App:
    """An app with a bundle in its assets, on a desktop JVM; its model answers what it is told."""

    def __init__(self, folder: Path, classpath: str) -> None:
        self.assets, self.files, self.classpath = folder / "assets", folder / "files", classpath
        self.assets.mkdir()
        self.bundle = make_bundle(self.assets / "edgeprune")
        self.manifest = read_json(Manifest, self.bundle / MANIFEST)

    def say(self, answers: np.ndarray, *arguments: str) -> str:
        """What the app prints when its model answers these rows, one for each run."""
        shutil.rmtree(self.files, ignore_errors=True)
        self.files.mkdir()
        rows = struct.pack("<i", answers.shape[1]) + answers.astype("<f4").tobytes()
        (self.files / "answers").write_bytes(rows)
        command = ["java", "-cp", self.classpath, "edgeprune.MainKt"]
        command += [str(self.assets), str(self.files), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def fed(self) -> np.ndarray:
        """The inputs that the model was given, ``float32 [N, C, H, W]``."""
        shape = self.manifest.model.inputs[0].shape[1:]
        return np.frombuffer((self.files / "seen").read_bytes(), "<f4").reshape(-1, *shape)


@pytest.fixture
def app(tmp_path: Path, classpath: str) -> App:
    return App(tmp_path, classpath)


Arrays = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def golden(app: App) -> Arrays:
    raw, outputs = (np.load(app.bundle / f"golden/{name}.npy") for name in ("inputs", "outputs"))
    return raw, outputs


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_sample_feeds_the_model_as_the_host_does(app, golden):
    raw, outputs = golden
    assert app.say(outputs) == "true 0.0 1.0"
    expected = file_input(raw, app.manifest.preprocess, app.manifest.model.inputs[0])
    assert np.abs(app.fed() - expected).max() < 1e-6


def off_by(limits: float) -> Callable[[np.ndarray, float], np.ndarray]:
    """Outputs of which one is that many times the allowed error away."""

    def changed(outputs: np.ndarray, limit: float) -> np.ndarray:
        found = outputs.copy()
        found[3, found[3].argmax()] += limits * limit
        return found

    return changed


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("change", "passed"),
    [
        (off_by(0.5), "true"),
        (off_by(2.0), "false"),
        (off_by(np.nan), "false"),
        (lambda outputs, _: outputs[:, ::-1], "false"),
    ],
    ids=["within", "beyond", "not a number", "other classes"],
)
def test_the_sample_judges_by_the_tolerance_of_the_bundle(app, golden, change, passed):
    limit = read_json(GoldenFile, app.bundle / "golden/tolerance.json").max_abs_error
    assert app.say(change(golden[1], limit)).split()[0] == passed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bitmap_becomes_the_same_input_as_its_raw_pixels(app, golden, tmp_path):
    raw, outputs = golden
    (tmp_path / "image").write_bytes(raw[0].tobytes())
    height, width, _ = raw[0].shape
    said = app.say(outputs, str(width), str(height), str(tmp_path / "image"))
    assert app.manifest.labels[int(outputs[0].argmax())] in said
    expected = file_input(raw[:1], app.manifest.preprocess, app.manifest.model.inputs[0])
    assert np.abs(app.fed() - expected).max() < 1e-6

"""The iOS sample of a bundle on Linux: it compiles, feeds the model the raw samples, and judges its answers rightly.

The sample is compiled with the stand-ins for Core ML and Core Video in ``tests/toolchains/ios_run``; what that takes is fetched by
``tests/toolchains/swift_tools.py``. Core ML is on Apple devices alone: nothing of it runs here.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import bundle_fixture
import coreml_fixture
import numpy as np
import pytest
import swift_tools
from repo import REPO

from edgeprune.bundle.manifest import MANIFEST, GoldenFile, Manifest
from edgeprune.bundle.write import Payload, write_bundle
from edgeprune.formats.shared.model_bytes import model_bytes
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.base import read_json
from edgeprune.records.files import sha256_bytes
from edgeprune.records.workload import Preprocess

MODULES = ("CoreVideo", "CoreML", "Vision")
N, HEIGHT, WIDTH = 8, 5, 7
KINDS = {  # channels, how raw samples enter, the shape of one
    "grey images": (1, Preprocess(color="grey", mean=(0.25,), std=(0.5,)), (HEIGHT, WIDTH)),
    "colour images": (3, Preprocess(), (HEIGHT, WIDTH, 3)),
    "tensors": (2, Preprocess(kind="none"), (2, HEIGHT, WIDTH)),
}


def make_bundle(folder: Path, kind: str = "grey images") -> Path:
    """A bundle whose golden answers have two classes nearly as good as each other; a fake answers for its model."""
    channels, preprocess, shape = KINDS[kind]
    rng = np.random.default_rng(7)
    raw = rng.integers(0, 256, (N, *shape), dtype=np.uint8)
    if preprocess.kind == "none":
        raw = rng.normal(size=(N, *shape)).astype(np.float32)
    outputs = rng.normal(size=(N, 3)).astype(np.float32)
    outputs[:, :2] = 4.0, 3.99
    package = coreml_fixture.package("fp16")
    spec = TensorSpec(name="image", shape=(1, channels, HEIGHT, WIDTH), dtype="float32", layout="NCHW")  # fmt: skip
    model = Artifact(
        path=package.name,
        format="coreml",
        precision="fp16",
        sha256=sha256_bytes(model_bytes(package)),
        size_bytes=sum(map(len, coreml_fixture.files("fp16").values())),
        inputs=(spec,),
        outputs=(TensorSpec(name="output", shape=(1, 3), dtype="float32"),),
    )
    facts = bundle_fixture.facts(runtime="coreml", target="iphone", preprocess=preprocess)
    return write_bundle(folder, facts, Payload(model, package, raw, outputs, compute_units="CPU_AND_NE"))  # fmt: skip


def compiled(folder: Path, *arguments: str, mode: str = "5") -> None:
    """Compile in a language mode, or fail; a warning is a failure too."""
    flags = ("-swift-version", mode, "-warnings-as-errors", "-I", swift_tools.WORK)
    done = swift_tools.run(folder, "swiftc", *flags, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def inside(*names: str) -> list[str]:
    """Files of the caller's folder as the compiler sees them."""
    return [f"{swift_tools.WORK}/{name}" for name in names]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the stand-ins and the program ``app``: the sample as it lies in a bundle, and what starts it."""
    if reason := swift_tools.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("swift")
    bundle = make_bundle(folder / "bundle")
    for source in (
        bundle / "samples/ios/GoldenCheck.swift",
        *(REPO / "tests/toolchains/ios_run").iterdir(),
    ):
        shutil.copy(source, folder)
    for name in MODULES:
        kind = ("-emit-module", "-emit-object", "-parse-as-library", "-module-name", name)
        compiled(folder, *kind, *inside(f"{name}.swift"), "-o", *inside(f"{name}.o"))
    parts = inside("CoreVideo.o", "CoreML.o", "GoldenCheck.swift", "main.swift")
    compiled(folder, "-module-name", "App", *parts, "-o", *inside("app"))
    return folder


class App:
    """An app with the files of a bundle; its model answers what it is told."""

    def __init__(self, folder: Path, built: Path, kind: str, golden: str) -> None:
        self.folder, self.bundle = folder, make_bundle(folder / "bundle", kind)
        self.manifest = read_json(Manifest, self.bundle / MANIFEST)
        self.files, self.model = folder / "files", folder / "files/Classifier.mlmodelc"
        self.model.mkdir(parents=True)
        (self.files / golden).mkdir(exist_ok=True)
        for name in ("labels.txt", "preprocess.json"):
            shutil.copy(self.bundle / name, self.files)
        for file in (self.bundle / "golden").iterdir():
            shutil.copy(file, self.files / golden)
        shutil.copy(built / "app", folder)

    def golden(self) -> tuple[np.ndarray, np.ndarray]:
        """The raw samples of the bundle and its answers."""
        raw, outputs = (np.load(self.bundle / f"golden/{n}.npy") for n in ("inputs", "outputs"))
        return raw, outputs

    def say(self, answers: np.ndarray) -> str:
        """What the app prints when its model answers these rows, one for each sample."""
        spec = self.manifest.model
        told = {
            "input": spec.inputs[0].name,
            "isImage": self.manifest.preprocess.kind == "image",
            "output": spec.outputs[0].name,
        }
        (self.model / "model.json").write_text(json.dumps(told))
        rows = (" ".join(str(float(value)) for value in row) for row in answers)
        (self.model / "answers").write_text("\n".join(rows))
        done = swift_tools.run(self.folder, *inside("app", "files"))
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("golden", ["", "golden"], ids=["flat", "in folders"])
def test_the_sample_feeds_the_model_the_raw_samples(tmp_path, built, kind, golden):
    app = App(tmp_path, built, kind, golden)
    raw, outputs = app.golden()
    assert app.say(outputs) == f"PASS: largest error 0.0, same class {N} of {N}"
    assert (app.model / "fed").read_bytes() == raw.tobytes()
    assert (app.model / "units").read_text() == "cpuAndNeuralEngine"


def off_by(limits: float) -> Callable[[np.ndarray, float], np.ndarray]:
    """Outputs of which one is that many times the allowed error away."""

    def changed(outputs: np.ndarray, limit: float) -> np.ndarray:
        found = outputs.copy()
        found[3, 2] += limits * limit
        return found

    return changed


def other_class(n: int) -> Callable[[np.ndarray, float], np.ndarray]:
    """Outputs of which the first n name the class that was second best, all well within the allowed error."""

    def changed(outputs: np.ndarray, limit: float) -> np.ndarray:
        found = outputs.copy()
        found[:n, 1] += 0.02
        assert limit > 0.1
        return found

    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (off_by(0.9), "PASS"),
        (off_by(-0.9), "PASS"),
        (off_by(1.1), "FAIL"),
        (off_by(-1.1), "FAIL"),
        (off_by(np.nan), f"FAIL: largest error inf, same class {N} of {N}"),
        (off_by(-np.inf), f"FAIL: largest error inf, same class {N} of {N}"),
        (other_class(1), "PASS: largest error 0.0"),
        (other_class(2), "FAIL: largest error 0.0"),
    ],
    ids=[
        *("within", "within, below", "beyond", "beyond, below", "not a number", "infinite"),
        *("one near-tie flips", "two other classes"),
    ],
)
def test_the_sample_judges_by_the_tolerance_of_the_bundle(tmp_path, built, change, said):
    app = App(tmp_path, built, "grey images", "golden")
    limit = read_json(GoldenFile, app.bundle / "golden/tolerance.json").max_abs_error
    assert app.say(change(app.golden()[1], limit)).startswith(said)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("golden/tolerance.json", "tolerance.json is missing"),
        ("Classifier.mlmodelc", "Classifier.mlmodelc is not in the app"),
    ],
)
def test_a_file_that_is_not_in_the_app_is_named(tmp_path, built, missing, said):
    app = App(tmp_path, built, "grey images", "golden")
    app.say(app.golden()[1])
    (app.files / missing).rename(tmp_path / "elsewhere")
    done = swift_tools.run(tmp_path, *inside("app", "files"))
    assert done.stdout.startswith("error: ")
    assert said in done.stdout


@pytest.mark.parametrize("mode", ["5", "6"])
def test_the_sample_and_what_the_documentation_shows_compile_in_both_language_modes(built, mode):
    compiled(built, "-typecheck", *inside("GoldenCheck.swift"), mode=mode)
    text = (REPO / "docs/iphone.md").read_text("utf-8")
    (shown,) = re.findall(r"```swift\n(.*?)```", text, re.DOTALL)
    (built / "shown.swift").write_text(f"import CoreML\nimport Vision\n{shown}")
    compiled(built, "-typecheck", *inside("shown.swift"), mode=mode)

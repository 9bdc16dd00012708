"""The Android sample of a bundle: short, labelled as what it is, and compiled against the classes of Android's API level 23."""

from __future__ import annotations

from pathlib import Path

import kotlin_tools
import pytest
from repo import REPO

import edgeprune
from edgeprune.bundle.manifest import LABELS, RECIPE
from edgeprune.bundle.write import sample_files

PACKAGE = Path(edgeprune.__file__).parent / "bundle"
KOTLIN = PACKAGE / "samples/android/EdgepruneModel.kt"
GRADLE = PACKAGE / "samples/android/build.gradle.kts"
EXECUTORCH = REPO / "tests/toolchains/android_run/ExecuTorch.kt"


def test_an_android_bundle_brings_the_files_that_exist():
    found = sample_files("android")
    assert {PACKAGE / path for path in found if path.startswith("samples/android/")} == {
        KOTLIN,
        GRADLE,
    }
    assert "samples/python/predict.py" in found


def test_the_sample_is_short_and_says_how_far_it_was_tried():
    lines = KOTLIN.read_text().splitlines()
    assert len(lines) <= 100
    head = " ".join(line.removeprefix("// ") for line in lines[:2])
    assert "tests compile it against Android's API level 23" in head
    assert "Never built into an app" in head
    assert "Not compiled here" in GRADLE.read_text().splitlines()[0]


def test_the_sample_reads_the_files_that_a_bundle_has():
    text = KOTLIN.read_text()
    for name in (
        RECIPE,
        LABELS,
        "golden/inputs.npy",
        "golden/outputs.npy",
        "golden/tolerance.json",
    ):
        assert f'"{name}"' in text


@pytest.mark.slow
def test_the_sample_compiles_against_android_23(tmp_path):
    """Of ExecuTorch there are only our declarations; its own library is not to be had here."""
    if reason := kotlin_tools.missing():
        pytest.skip(reason)
    broken = tmp_path / "Broken.kt"
    text = KOTLIN.read_text()
    broken.write_text(text.replace(".getPixel(", ".pixelAt(").replace(".getLong(", ".longAt("))
    found = {}
    for name, source in (("good", KOTLIN), ("broken", broken)):
        found[name] = kotlin_tools.compile_kotlin(
            [source, EXECUTORCH], [kotlin_tools.android()], tmp_path / name, "-no-jdk"
        )
    assert found["good"].returncode == 0, found["good"].stderr
    assert (tmp_path / "good/edgeprune/EdgepruneModel.class").exists()
    assert found["broken"].returncode != 0
    assert all(name in found["broken"].stderr for name in ("pixelAt", "longAt"))

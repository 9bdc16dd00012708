"""The Android sample of a bundle: short, labelled as what it is, and compiled where a Kotlin compiler is at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import edgeprune
from edgeprune.bundle.manifest import LABELS, RECIPE, SAMPLE
from edgeprune.bundle.write import sample_files

PACKAGE = Path(edgeprune.__file__).parent / "bundle"
KOTLIN = PACKAGE / "samples/android/EdgepruneModel.kt"
GRADLE = PACKAGE / "samples/android/build.gradle.kts"
STUBS = Path(__file__).parent / "android_stubs"


def compiler() -> list[str] | None:
    """A Kotlin compiler: ``kotlinc``, or the npm package ``kotlin-compiler`` in the folder that ``EDGEPRUNE_KOTLIN`` names."""
    if found := shutil.which("kotlinc"):
        return [found]
    lib = Path(os.environ.get("EDGEPRUNE_KOTLIN", "/nowhere"), "lib")
    if not (lib / "kotlin-compiler.jar").exists() or not shutil.which("java"):
        return None
    names = ("kotlin-compiler", "kotlin-stdlib", "kotlin-script-runtime", "kotlin-reflect",
             "kotlinx-coroutines-core-jvm", "annotations-13.0", "trove4j")  # fmt: skip
    jars = ":".join(str(lib / f"{name}.jar") for name in names)
    java = ["java", "-cp", jars, "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler"]
    return [*java, "-kotlin-home", str(lib.parent), "-no-reflect"]


def test_an_android_bundle_brings_the_files_that_exist():
    found = sample_files("android")
    assert {PACKAGE / path for path in found if path.startswith("samples/android/")} == {
        KOTLIN,
        GRADLE,
    }
    assert SAMPLE in found


def test_the_sample_is_short_and_says_that_it_was_not_compiled_for_android():
    lines = KOTLIN.read_text().splitlines()
    assert len(lines) <= 100
    assert "Not compiled here" in lines[0]
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
def test_the_sample_compiles_against_declarations_of_the_api(tmp_path):
    kotlin = compiler()
    if kotlin is None:
        pytest.skip("no Kotlin compiler: put kotlinc on PATH, or set EDGEPRUNE_KOTLIN")
    command = [*kotlin, "-d", str(tmp_path / "out"), str(STUBS), str(KOTLIN)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/edgeprune/EdgepruneModel.class").exists()
    broken = tmp_path / "Broken.kt"
    broken.write_text(KOTLIN.read_text().replace("dataAsFloatArray", "dataAsFloats"))
    command[-1] = str(broken)
    assert subprocess.run(command, capture_output=True, timeout=500).returncode != 0

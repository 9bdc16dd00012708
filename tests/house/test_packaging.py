"""The wheel and the editable install: what they hold, and that they find their data from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from repo import REPO

PROBE = """
import edgeprune
from edgeprune.records import catalog
print(edgeprune.__file__)
assert catalog.target("rpi4").name == "rpi4"
assert catalog.profile("cortex-a72").name == "cortex-a72"
assert set(catalog.devices()) == {"this-machine"}
assert (catalog.example_dir("fashion-mnist") / "net.py").is_file()
"""

pytestmark = pytest.mark.slow


def run(*command: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPO), folder=out)
    (built,) = out.glob("edgeprune-*.whl")
    return built


def test_the_wheel_brings_one_package_with_its_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"edgeprune"}
    assert len(top) == 2
    for kind in ("targets", "profiles"):
        for path in (REPO / kind).glob("*.yaml"):
            assert f"edgeprune/_data/{kind}/{path.name}" in names
    assert "edgeprune/py.typed" in names
    assert "edgeprune/formats/tflite/ops/litert.json" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    # An __init__.py under _data would make the data importable code.
    assert not [n for n in names if n.startswith("edgeprune/_data/") and n.endswith("__init__.py")]
    assert not [n for n in names if n.endswith(".pyc") or "__pycache__" in n]


def test_an_installed_wheel_finds_its_data_from_an_empty_folder(wheel, tmp_path):
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    run(*pip, str(wheel), folder=empty)
    origin = run("-c", PROBE, folder=empty, PYTHONPATH=str(site))
    assert Path(origin.strip()).is_relative_to(site)


def test_an_editable_install_reads_the_checkout(tmp_path):
    pytest.importorskip("editables", reason="hatchling needs it for editable wheels")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    build = f"import hatchling.build as b; b.build_editable({str(tmp_path)!r})"
    run("-c", build, folder=REPO)
    (built,) = tmp_path.glob("edgeprune-*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    probe = f"import site; site.addsitedir({str(site)!r})\n{PROBE}"
    origin = run("-c", probe, folder=empty)
    assert Path(origin.strip()) == REPO / "edgeprune" / "__init__.py"

"""Shared basics: one thread, seeded property tests, and no file of the person who runs the tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

settings.register_profile("edgeprune", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("edgeprune")


@pytest.fixture(autouse=True)
def user_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty config folder of the user; ``edgeprune/`` inside it is what edgeprune reads."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    return folder / "edgeprune"

"""Shared basics: one thread, seeded property tests, and no file of the person who runs the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# What tests share asserts, too, and is to say as much as they do where it fails.
pytest.register_assert_rewrite(*(p.stem for p in Path(__file__).with_name("fixtures").glob("*.py")))

# What edgeprune keeps on this machine, and the lock that it shares with everybody here, are not the tests' to touch. Fixtures of a module
# start before those of a test, so this is done at once.
_HOME = tempfile.mkdtemp(prefix="edgeprune-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["XDG_DATA_HOME"] = f"{_HOME}/data"
os.environ["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", f"{_HOME}/cache")
os.environ["XDG_STATE_HOME"] = f"{_HOME}/state"
os.environ["EDGEPRUNE_LEASE_FILE"] = f"{_HOME}/edgeprune.lock"
# A test that counts kernels must not depend on which test ran before it; those of the cache itself take this away.
os.environ["EDGEPRUNE_NO_CACHED_TIMES"] = "1"

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes share the tests, those of one file stay together: they share deployments. So do those of the one board."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "board" if "/emulated_board/" in file else file

    return ByFile(config, log)


settings.register_profile("edgeprune", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("edgeprune")


@pytest.fixture(autouse=True)
def user_config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty config folder of the user; ``edgeprune/`` inside it is what edgeprune reads."""
    folder = tmp_path_factory.mktemp("config")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder))
    return folder / "edgeprune"

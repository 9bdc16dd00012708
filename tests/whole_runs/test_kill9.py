"""A host that is killed twenty times at random moments of a deployment ends where an undisturbed one does."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import replayed
import tinynet
from replayed import check_same

from edgeprune.records.base import read_json
from edgeprune.records.report import Report

KILLS = 20
COMMAND = (*replayed.COMMAND, "--device", "replayed")


def stage_seconds(run: Path) -> dict[str, float]:
    return {s.name: s.seconds for s in read_json(Report, run / "report.json").stages}


def moments(seconds: dict[str, float], seed: int) -> list[tuple[str, float]]:
    """Stages and how far into each, uniformly over the time that all of them took, in their order."""
    names = [name for name in tinynet.STAGES if name in seconds]
    ends = np.cumsum([seconds[name] for name in names])
    drawn = np.sort(np.random.default_rng(seed).uniform(0, ends[-1], KILLS))
    found = []
    for at in drawn:
        number = int(np.searchsorted(ends, at))
        found.append((names[number], float(at - (ends[number - 1] if number else 0.0))))
    return found


def finished(run: Path) -> dict[str, int]:
    """When the record of each finished stage was written."""
    return {
        name: (folder / "stage.json").stat().st_mtime_ns
        for name, folder in tinynet.stage_folders(run).items()
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_moments_change_nothing_in_the_result(tmp_path_factory):
    recorded = replayed.recorded(tmp_path_factory)
    folder = tmp_path_factory.mktemp("kill9")
    with replayed.zygote(folder) as zygote:
        whole = replayed.replaying(recorded, folder / "whole")
        assert zygote.run(whole, *COMMAND) in (0, 6), (whole / "log").read_text()
        killed = replayed.replaying(recorded, folder / "killed")
        run = killed / "run"
        known: dict[str, int] = {}
        n_killed = 0
        for stage, after_s in moments(stage_seconds(whole / "run"), seed=9):
            pid = zygote.start(killed, *COMMAND)
            replayed.wait_until(lambda name=stage: any(run.glob(f"stages/{name}-[0-9a-f]*")), pid)
            deadline = time.monotonic() + after_s
            # A resumed stage may be quicker than it was: then the kill comes as soon as it is over.
            replayed.wait_until(
                lambda until=deadline, name=stage: (
                    time.monotonic() > until or name in finished(run)
                ),
                pid,
            )
            assert replayed.is_running(pid), (killed / "log").read_text()
            replayed.kill(pid)
            n_killed += zygote.code() == -9
            now = finished(run)
            assert {
                name: now[name] for name in known
            } == known  # nothing that was done is done again
            known = now
        assert n_killed == KILLS
        assert zygote.run(killed, *COMMAND) in (0, 6), (killed / "log").read_text()
    assert {name: finished(run)[name] for name in known} == known
    check_same(whole / "run", run)

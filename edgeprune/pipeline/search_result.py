"""What a search found, as one record, and the plan file that a user may edit."""

from __future__ import annotations

from datetime import datetime, timezone

from edgeprune.pipeline.context import Context
from edgeprune.pipeline.stages.finish import Planned
from edgeprune.records.plan import PlanFile, SearchResult
from edgeprune.records.version import VERSION


def search_result(context: Context, planned: Planned) -> SearchResult:
    """The result of the stages before training, with what it was made from."""
    job, found = context.job, planned.plan.result
    return SearchResult(
        edgeprune_version=VERSION,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        command=job.command,
        model=job.loaded.workload.model,
        target=job.target.name,
        device=context.board.name,
        stamp=planned.latency.result.fingerprint.stamp,
        budget=job.budget.text,
        limit_ms=found.plan.limit_ms,
        plan=found.plan,
        checks=found.checks,
        latency_model=found.quality,
        pareto=found.pareto,
        points=found.points,
        curves=found.curves,
    )


def plan_file(found: SearchResult) -> PlanFile:
    """The widths of a search, with those that each group may have."""
    return PlanFile(
        target=found.target,
        budget=found.budget,
        precision=found.plan.precision,
        dense_ms=found.plan.dense_ms,
        predicted_ms=found.plan.predicted_ms,
        measured_ms=found.chosen().measured_ms,
        widths=found.plan.widths(),
        admissible_widths={
            c.group: tuple(choice.width for choice in c.choices) for c in found.curves
        },
    )

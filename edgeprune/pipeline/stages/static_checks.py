"""What can be told of a request without its board: it fails here, before the board is asked for, and what was worked out is kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch.export import ExportedProgram

from edgeprune import formats
from edgeprune.compress.groups.find import ChannelGroup, find_groups
from edgeprune.errors import EdgepruneError
from edgeprune.pipeline.context import FormatCandidate, Job
from edgeprune.pipeline.files import operators
from edgeprune.pipeline.options import check_format
from edgeprune.plan import guarantee
from edgeprune.records.plan import FrozenGroup
from edgeprune.workload.dataset import model_input
from edgeprune.workload.trace import traced


@dataclass
class HostSide:
    """What this computer alone works out of the model of a job; :meth:`.Context.share` takes it over."""

    job: Job

    @property
    def _sample(self) -> torch.Tensor:
        loaded = self.job.loaded
        return torch.from_numpy(model_input(loaded.dataset.train.x[:1], loaded.preprocess))

    @cached_property
    def program(self) -> ExportedProgram:
        """The model's forward pass as one graph."""
        return traced(self.job.loaded.model, self._sample.numpy())

    @cached_property
    def groups(self) -> tuple[tuple[ChannelGroup, ...], tuple[FrozenGroup, ...]]:
        """Channel groups, and what stays frozen."""
        return find_groups(self.job.loaded.model, self._sample)


def check(job: Job, *, for_planning: bool) -> HostSide | None:
    """What was worked out of a job that nothing speaks against, as far as this computer can tell.

    Args:
        job: the resolved request.
        for_planning: channels are to be removed.

    Returns:
        ``None`` where it is not of the model that the stages work on: channels of that are removed first.

    Raises:
        FormatError: no format of the job can be written: a package is missing, or there is no module for it.
        ModelError: the model cannot be traced, has an operator that the target cannot run, or no channel that can be removed.
        SpecError: a plan was given that the model cannot have.
    """
    found = HostSide(job)
    candidates = job.candidates or (FormatCandidate(job.target, job.for_runtime),)
    errors = [_problem(found, candidate) for candidate in candidates]
    if all(errors):
        assert errors[0] is not None
        raise errors[0]
    if job.loaded.dead_channels:
        return None
    if for_planning:
        groups, _ = found.groups
        if job.widths is not None:
            guarantee.check_given(job.widths, groups)
    return found


def _problem(found: HostSide, candidate: FormatCandidate) -> EdgepruneError | None:
    """Why the model cannot be written or run in one format; other formats of a choice may still be."""
    target = candidate.target
    try:
        check_format(target)
        form = formats.load(target.format)
        for name in filter(None, (target.format, form.info.twin)):
            formats.require_tools(name)
        operators.check(found.program, found.job.profile, target.format)
    except EdgepruneError as error:
        return error
    return None

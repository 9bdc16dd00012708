"""The plan that is promised: solved, measured beside the dense net, corrected and confirmed, before any training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from edgeprune.compress.groups.find import ChannelGroup
from edgeprune.devices.timing.measure import compare
from edgeprune.errors import BudgetError
from edgeprune.formats import Resizable
from edgeprune.plan.basis import Basis
from edgeprune.plan.bench import Stand
from edgeprune.plan.candidates import (
    CLOSE_ENOUGH,
    Structure,
    promising,
    solutions,
    structure_of,
    untried,
    widened,
)
from edgeprune.plan.certainty import PLAN_SHARE, Confirmation, Limit
from edgeprune.plan.latency.correct import correct
from edgeprune.plan.latency.model import LatencyModel
from edgeprune.plan.result import plan_result, pruning_plan
from edgeprune.plan.solver import solve as search
from edgeprune.plan.solver.solve import Solution
from edgeprune.progress import Progress
from edgeprune.records.budget import Budget
from edgeprune.records.plan import (
    PlanCheck,
    PlanResult,
    check_widths,
)

CHECK_ROUNDS = 6
TWO_SIDED = 0.90  # so that the upper end of an interval is an upper bound of 95 %
# Another kind of structure is waited for while it loses at most this many times what the best loses; more budget saves it less than that.
RIVAL = 1.25
FINALISTS = 3  # healed for a while, to choose between structures with and without removed blocks


def make_plan(
    stand: Stand, file: Resizable, basis: Basis, *, budget: Budget, progress: Progress
) -> PlanResult:
    """Solve, measure what was solved beside the dense net, correct the model, and repeat until the *measured* latency fits.

    Of the structures that fit, the one that really loses least after its repair is chosen: costs of groups do not add up where many are cut
    deep, least of all where whole blocks go. So structures that cut more evenly, or in which removals are charged more or not allowed, are
    repaired and compared too, and the best of them measured; and since gradients bring back other things than least squares do, the best
    with each number of removed blocks are healed for a while to choose.

    Source: the guarantee loop of this project's design; each failing round lowers the effective budget, and the smallest net bounds it.

    Raises:
        BudgetError: no structure on the grid is fast enough; names the fastest, as measured.
    """
    nets, limit_ms = basis.nets, budget.limit_ms(basis.nets.dense_ms)
    samples = [(w, ms, 1.0) for w, ms in zip(nets.widths, nets.ms, strict=True)]
    aim_ms = PLAN_SHARE * limit_ms / (1 + min(basis.quality.mean_error_ratio, 0.05))
    checks: list[PlanCheck] = []
    known: dict[Structure, float] = {}
    failures = 0  # rounds in a row in which nothing fitted
    limit = Limit(budget, nets.dense_ms)
    confirm, chosen = Confirmation(stand, file, limit, progress), None
    with progress.bar("checking structures on the device", CHECK_ROUNDS) as bar:
        for number in range(CHECK_ROUNDS):
            tried = {structure_of(c.widths) for c in checks}
            wider = untried(widened(basis, _best(checks), limit_ms, aim_ms), tried)
            others = untried(
                solutions(basis, aim_ms), tried | {structure_of(s.widths) for s in wider}
            )
            options, losses = promising(basis, [*wider, *others], known, always=len(wider))
            found = _check(stand, file, options, limit, f"check-{number}")
            found = [
                c.model_copy(update={"loss_nats": n}) for c, n in zip(found, losses, strict=True)
            ]
            checks.extend(found)
            samples += [(c.widths, c.measured_ms, 3.0) for c in found]
            basis = replace(basis, model=correct(basis.model, samples))
            best = _best(checks)
            bar.advance(1, f"best {best.measured_ms / limit_ms:.1%} of budget" if best else "")
            if best is not None and (not found or _settled(checks, limit_ms)):
                checks = _with_trials(basis, checks, progress)
                chosen = confirm.sure(_best(checks), checks)
                if chosen is not None:
                    break
                failures += 1  # what was too near to the budget is looked for further away
            else:
                failures = 0 if any(c.within_budget for c in found) else failures + 1
            aim_ms = _next_aim(limit_ms, checks, basis.model) * 0.99**failures
    while chosen is None and _best(checks) is not None:  # no round is left to look for more
        checks = _with_trials(basis, checks, progress)
        chosen = confirm.sure(_best(checks), checks)
    if chosen is None:
        chosen = confirm.nearest(checks) or _smallest_if_it_fits(stand, file, basis, checks, limit)
    return plan_result(pruning_plan(chosen, basis, stand, limit_ms), checks, basis)


def given_plan(
    stand: Stand,
    file: Resizable,
    basis: Basis,
    widths: Mapping[str, int],
    *,
    budget: Budget,
    progress: Progress,
) -> PlanResult:
    """The plan that somebody gives, measured like any other; whether it fits the budget is judged at the end, and said now.

    Raises:
        SpecError: a group or a width that does not exist, or width 0 of some groups of a block only.
    """
    model, nets = basis.model, basis.nets
    full = {g.name: g.channels for g in basis.groups}
    chosen = {**full, **widths}
    check_widths(chosen, model.grids, basis.together)
    cost = sum(basis.cost_nats(name, width) for name, width in chosen.items())
    solution = Solution(chosen, model.predict(chosen), cost)
    limit = Limit(budget, nets.dense_ms)
    limit_ms = limit.ms
    checks = _check(stand, file, [solution], limit, "check-given")
    if not checks[0].within_budget:
        progress.say(
            f"      note: the given plan was measured at {checks[0].measured_ms:.4g} ms, and the budget is {limit_ms:.4g} ms"
        )
    return plan_result(pruning_plan(checks[0], basis, stand, limit_ms), checks, basis)


def check_given(widths: Mapping[str, int], groups: Sequence[ChannelGroup]) -> None:
    """Raise unless the model could have these widths, whatever the board says of them: found before anything is measured.

    Raises:
        SpecError: a group that does not exist, a width that it cannot have, or width 0 of some groups of a block only.
    """
    possible = {g.name: range(0 if g.block else 1, g.channels + 1) for g in groups}
    together = dict.fromkeys(g.removed_with() for g in groups if g.block is not None)
    full = {g.name: g.channels for g in groups}
    check_widths({**full, **widths}, possible, tuple(together))


def _with_trials(basis: Basis, checks: list[PlanCheck], progress: Progress) -> list[PlanCheck]:
    """The checks, the best with each number of removed blocks with what it loses after a short healing, where there are several."""
    fitting = sorted((c for c in checks if c.within_budget), key=_loss)
    best: dict[int, PlanCheck] = {}
    for check in fitting:
        best.setdefault(basis.blocks_removed(check.widths), check)
    finalists = list(best.values())[:FINALISTS]
    if basis.trial is None or len(finalists) < 2:
        return checks
    found = list(checks)
    unhealed = [c for c in finalists if c.trial_nats is None]
    with progress.bar("healing the best structures for a while", len(unhealed)) as bar:
        for check in unhealed:
            nats = basis.trial(basis.kept(check.widths))
            found[found.index(check)] = check.model_copy(update={"trial_nats": nats})
            bar.advance(1)
    return found


def _check(
    stand: Stand,
    file: Resizable,
    options: Sequence[Solution],
    limit: Limit,
    purpose: str,
) -> list[PlanCheck]:
    if not options:
        return []
    files = {str(i): file.resized(s.widths) for i, s in enumerate(options)}
    found = stand.measure({"dense": file.resized({}), **files}, purpose)
    checks = []
    for i, solution in enumerate(options):
        comparison = compare(found[str(i)], found["dense"], confidence=TWO_SIDED)
        checks.append(
            PlanCheck(
                widths=dict(solution.widths),
                predicted_ms=solution.predicted_ms,
                measured_ms=comparison.ratio * limit.dense_ms,
                ratio_to_dense=comparison.ratio,
                ratio_high=comparison.high,
                within_budget=limit.holds(comparison, found[str(i)].blocks),
                cost_nats=solution.cost_nats,
                unreliable=found[str(i)].unreliable or found["dense"].unreliable,
            )
        )
    return checks


def _best(checks: Sequence[PlanCheck]) -> PlanCheck | None:
    """Of what fits, that which loses least. One that contains it goes before it: it has all its channels and more to heal with."""
    fitting = sorted((c for c in checks if c.within_budget), key=_merit)
    best = fitting[0] if fitting else None
    while best is not None and (wider := [c for c in fitting if _contains(c, best)]):
        best = wider[0]
    return best


def _contains(check: PlanCheck, other: PlanCheck) -> bool:
    """Whether one has all channels of the other and more, of the same blocks: what a block is worth, trials tell."""
    wide, narrow = check.widths, other.widths
    return wide != narrow and all(
        wide[n] >= w and (not wide[n]) == (not w) for n, w in narrow.items()
    )


def _merit(check: PlanCheck) -> tuple[bool, float]:
    """What a structure loses, as well as it is known: a trial counts before a repair, that before a sum of costs."""
    if check.trial_nats is not None:
        return False, check.trial_nats
    return True, _loss(check)


def _loss(check: PlanCheck) -> float:
    return check.cost_nats if check.loss_nats is None else check.loss_nats


def _settled(checks: Sequence[PlanCheck], limit_ms: float) -> bool:
    """Whether the best structure uses enough of the budget, and so does the best with removed blocks, or without, if it is a rival."""
    leader = _best(checks)
    if leader is None:
        return False
    for kind in {all(c.widths.values()) for c in checks}:
        mine = [c for c in checks if all(c.widths.values()) == kind]
        best = _best(mine)
        is_rival = leader in mine or min(map(_loss, mine)) <= RIVAL * _loss(leader)
        if is_rival and (best is None or best.measured_ms < CLOSE_ENOUGH * limit_ms):
            return False
    return True


def _next_aim(limit_ms: float, checks: Sequence[PlanCheck], model: LatencyModel) -> float:
    """The prediction to solve for, so that the upper bound of its measurement ends at the budget, with half an interval to spare.

    Two things lie between a prediction and that bound: what the corrected model still gets wrong, and the width of the interval.
    """
    bias = statistics.median(c.measured_ms / model.predict(c.widths) for c in checks)
    interval = statistics.median(c.ratio_high / c.ratio_to_dense for c in checks)
    return PLAN_SHARE * limit_ms / (bias * interval**2)


def _smallest_if_it_fits(
    stand: Stand, file: Resizable, basis: Basis, checks: list[PlanCheck], limit: Limit
) -> PlanCheck:
    """The smallest structure, checked last; nothing else fitted."""
    dense_ms = limit.dense_ms
    smallest = [search.fastest(basis.problem())]
    found = _check(stand, file, smallest, limit, "check-smallest")
    checks.extend(found)
    if not found[0].within_budget:
        fastest = min(c.measured_ms for c in checks)
        raise BudgetError(
            f"no structure was measured within {limit.budget.text} ({limit.ms:.4g} ms);"
            f" the fastest took {fastest:.4g} ms ({fastest / dense_ms:.1%} of dense)",
            hint=f"ask for at least {math.ceil(fastest / dense_ms * 100) + 1}%"
            + (", or take --scope global" if basis.scope == "local" else ""),
        )
    return found[0]

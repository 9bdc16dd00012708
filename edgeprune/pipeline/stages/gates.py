"""Which file ships, whether it keeps its promises, and how that is said. Pure decisions over records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgeprune.errors import FormatError
from edgeprune.records.artifact import Artifact
from edgeprune.records.budget import Budget
from edgeprune.records.intervals import interval_ms, steady_ms
from edgeprune.records.measurement import Comparison, Measurement, SustainedRun
from edgeprune.records.names import Precision
from edgeprune.records.report import Gate, VariantRow
from edgeprune.records.statistics import Centre

# Of top classes between host and device; INT8 kernels may differ by one step.
MIN_DEVICE_AGREEMENT = 0.99
MIN_BUILT_IN_AGREEMENT = 0.95  # between built-in and fast kernels on the same file


@dataclass(frozen=True)
class Measured:
    """What was found out about the four files, keyed ``dense-fp32`` ... ``pruned-int8``."""

    measurements: Mapping[str, Measurement]
    comparisons: Sequence[Comparison]
    quality: Mapping[str, float]
    metric: str
    artifacts: Mapping[str, Artifact]
    sustained: SustainedRun | None = None

    def ratio(self, candidate: str, reference: str) -> float:
        """Median latency ratio of two files measured in the same rounds."""
        for c in self.comparisons:
            if (c.candidate, c.reference) == (candidate, reference):
                return c.ratio
        return self.measurements[candidate].median_ms / self.measurements[reference].median_ms

    def interval(self, candidate: str, reference: str) -> Centre:
        """The ratio of two files with its interval; that of their medians where they share no round."""
        for c in self.comparisons:
            if (c.candidate, c.reference) == (candidate, reference):
                return Centre(c.ratio, c.low, c.high, c.confidence)
        above, below = (interval_ms(self.measurements[n]) for n in (candidate, reference))
        ratio = self.ratio(candidate, reference)
        return Centre(ratio, above.low / below.high, above.high / below.low, 0.0)

    def drop(self, name: str) -> float:
        """Quality lost against the dense FP32 model."""
        return self.quality["dense-fp32"] - self.quality[name]


@dataclass(frozen=True)
class Choice:
    """The precision that ships and the sentence that says why; ``refused`` says why INT8 does not, where FP32 ships in its place."""

    precision: Precision
    reason: str
    refused: str = ""


def latency_gate(measured: Measured, budget: Budget, precision: Precision) -> Gate:
    """The latency promise for one precision: a relative budget is judged on the paired ratio to dense in the same precision.

    Judged is the upper end of the interval, so that what is met is met by more than luck.

    Where the file has a sustained run, its steady latency is judged instead: as it is, or as a share of the median of dense, which was
    timed on a board that had not warmed up.
    """
    name, dense = f"pruned-{precision}", f"dense-{precision}"
    is_ratio = budget.kind == "ratio"
    run, note = measured.sustained, ""
    if run is not None and run.name == name:
        found, note = steady_ms(run), _sustained_note(run)
        if is_ratio:
            found = _divided(found, measured.measurements[dense].median_ms)
    elif is_ratio:
        found = measured.interval(name, dense)
        note = f"{measured.measurements[name].median_ms:.4g} ms on the device"
    else:
        found = interval_ms(measured.measurements[name])
    return Gate(
        name="latency",
        limit=budget.value,
        value=found.estimate,
        unit=f"of dense {precision}" if is_ratio else "ms",
        met=found.high <= budget.value,
        note=note,
        low=found.low,
        high=found.high,
    )


def _divided(found: Centre, by: float) -> Centre:
    changes = {name: getattr(found, name) / by for name in ("estimate", "low", "high")}
    return replace(found, **changes)


def _sustained_note(run: SustainedRun) -> str:
    throttled = ""
    if run.throttled_from_s is not None:
        throttled = f", throttled from {run.throttled_from_s:.0f} s on"
    return (
        f"steady {run.steady_ms:.4g} ms after {run.seconds:g} s without a pause,"
        f" {run.start_ms:.4g} ms at the start{throttled}"
    )


def judged_text(gate: Gate) -> str:
    """What a gate found, with what was judged where that is the end of an interval."""
    if gate.high is None or gate.high == gate.value:
        return f"{gate.value:.4g} {gate.unit}"
    return f"{gate.value:.4g} {gate.unit} (judged on its upper bound, {gate.high:.4g})"


def quality_gate(measured: Measured, max_drop: float, precision: Precision) -> Gate:
    """The accuracy (or agreement) promise: at most ``max_drop`` below the dense FP32 model."""
    drop = measured.drop(f"pruned-{precision}")
    return Gate(
        name="accuracy" if measured.metric == "accuracy" else "agreement",
        limit=max_drop,
        value=drop,
        unit="drop",
        met=drop <= max_drop + 1e-12,
        note=f"{measured.quality[f'pruned-{precision}']:.2%} against {measured.quality['dense-fp32']:.2%} dense",
    )


def choose(
    measured: Measured, budget: Budget, max_drop: float, precisions: Sequence[Precision]
) -> Choice:
    """The fastest pruned file that meets both gates; if none does, the one that meets more, then the faster one."""
    ms = {p: measured.measurements[f"pruned-{p}"].median_ms for p in precisions}
    met = {
        p: [latency_gate(measured, budget, p).met, quality_gate(measured, max_drop, p).met]
        for p in precisions
    }
    passing = [p for p in precisions if all(met[p])]
    chosen = min(passing or precisions, key=lambda p: (-sum(met[p]), ms[p]))
    others = [p for p in precisions if p != chosen]
    if not others:
        return Choice(chosen, f"the target allows only {chosen}")
    other = others[0]
    pace = f"{ms[chosen]:.4g} ms against {ms[other]:.4g} ms in {other}"
    if len(passing) == 2:
        return Choice(chosen, f"both precisions meet the gates and {chosen} is faster: {pace}")
    if passing == ["fp32"] and not met["int8"][1]:
        lost = 100 * measured.drop("pruned-int8")
        why = f"{measured.metric} dropped {lost:.2f} points, {100 * max_drop:.2f} are allowed"
        return Choice(chosen, f"{refused_line(why)}: {pace}", refused_line(why))
    names = ("latency", measured.metric)
    missed = {
        p: " and ".join(n for n, is_met in zip(names, met[p], strict=True) if not is_met)
        for p in precisions
    }
    if passing:
        reason = f"only {chosen} meets the gates ({other} misses {missed[other]}): {pace}"
        return Choice(chosen, reason)
    both = ", ".join(f"{p} misses {missed[p]}" for p in (chosen, other))
    reason = f"no precision meets every gate; {chosen} comes closest: {pace} ({both})"
    return Choice(chosen, reason)


def refused_line(why: str) -> str:
    """What the report, the terminal and the manifest say where FP32 ships because INT8 may not."""
    return f"INT8 was refused: {why}; FP32 ships"


def in_place_of_int8(measured: Measured, budget: Budget, why: str) -> Choice:
    """FP32, where INT8 was refused and the FP32 file was measured within the budget.

    Args:
        measured: the files, with or without ``pruned-int8``.
        budget: the latency promise.
        why: what refused INT8, in one line.

    Raises:
        FormatError: the FP32 file is over the budget.
    """
    gate = latency_gate(measured, budget, "fp32")
    if not gate.met:
        raise FormatError(
            f"INT8 was refused: {why}; FP32 misses the budget: {judged_text(gate)}, the budget {gate.limit:.4g}",
            hint="give a larger budget, or set precisions: [fp32] in the target, which plans for FP32",
        )
    return Choice("fp32", refused_line(why), refused_line(why))


def numerics_gate(
    device_agreement: float, built_in_agreement: float | None, *, not_run: str = ""
) -> Gate:
    """The device must answer as the host does, and the fast kernels as the built-in ones, where there are any.

    ``not_run`` says why the file that ships was not run at all: then nothing was judged.
    """
    if not_run:
        return Gate(
            name="numerics",
            limit=MIN_DEVICE_AGREEMENT,
            value=0.0,
            unit="agreement",
            met=False,
            note=not_run,
            not_run=True,
        )
    parts = [f"device and host {device_agreement:.2%}"]
    met = device_agreement >= MIN_DEVICE_AGREEMENT
    worst = device_agreement
    if built_in_agreement is not None:
        parts.append(f"built-in and fast kernels {built_in_agreement:.2%}")
        met = met and built_in_agreement >= MIN_BUILT_IN_AGREEMENT
        worst = min(worst, built_in_agreement)
    return Gate(
        name="numerics",
        limit=MIN_DEVICE_AGREEMENT,
        value=worst if not met else device_agreement,
        unit="agreement",
        met=met,
        note=", ".join(parts),
    )


def rows(measured: Measured, sizes: Mapping[str, tuple[int, int]]) -> tuple[VariantRow, ...]:
    """The four rows that are always shown together; three where the pruned INT8 file was refused.

    Args:
        measured: all four files.
        sizes: ``dense`` and ``pruned`` -> (parameters, MACs).
    """
    found = []
    for variant in ("dense", "pruned"):
        for precision in ("fp32", "int8"):
            name = f"{variant}-{precision}"
            if name not in measured.measurements:
                continue  # an INT8 file that was refused
            m = measured.measurements[name]
            found.append(
                VariantRow.model_validate(
                    {
                        "variant": variant,
                        "precision": precision,
                        "median_ms": m.median_ms,
                        "p90_ms": m.p90_ms,
                        "spread_ratio": m.spread_ratio,
                        "ratio_to_dense": 1.0
                        if variant == "dense"
                        else measured.ratio(name, f"dense-{precision}"),
                        "quality": measured.quality[name],
                        "size_bytes": measured.artifacts[name].size_bytes,
                        "parameters": sizes[variant][0],
                        "macs": sizes[variant][1],
                        "measurement": name,
                    }
                )
            )
    return tuple(found)


def of_twin(gate: Gate, twin: str) -> Gate:
    """A gate that was judged on a file of the twin format, which is not the one that ships; says so."""
    if gate.not_run:
        return gate
    said = f"judged on the {twin} file of the same net, a stand-in for the file that ships"
    return gate.model_copy(update={"note": "; ".join(filter(None, (gate.note, said)))})


def headline(measured: Measured, precision: Precision, gates: Sequence[Gate]) -> str:
    """One sentence: what was gained by pruning alone, what it cost, and whether the promises hold."""
    name = f"pruned-{precision}"
    ratio = measured.ratio(name, f"dense-{precision}")
    missed = [g.name for g in gates if g.missed]
    not_run = [g.name for g in gates if g.not_run]
    verdict = f"missed: {', '.join(missed)}" if missed else "all gates met"
    if not_run:
        others = "" if missed else "the other gates met; "
        verdict = f"{others or verdict + '; '}not run: {', '.join(not_run)}"
    drop = measured.drop(name) * 100
    return f"{1 / ratio:.2f}x faster than dense {precision}, {measured.metric} {-drop:+.2f} points; {verdict}"

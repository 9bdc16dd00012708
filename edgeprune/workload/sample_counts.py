"""How many samples each split must have before any work begins, and what a small one cannot tell."""

from __future__ import annotations

from edgeprune.errors import ModelError
from edgeprune.workload.dataset import Dataset

# The repair is judged on a fifth of train; one half of selection repairs, with statistics of batch norms, and the other judges; a bundle
# has golden answers of development.
FEWEST = {"train": 10, "selection": 8, "development": 8}


def share_to_draw(samples: int, splits: int) -> int:
    """How many samples to draw from ``train`` for each of some splits: a tenth, and no fewer than a plan needs where that leaves enough."""
    tenth, fewest = max(1, samples // 10), FEWEST["selection"]
    return max(tenth, fewest) if samples - splits * fewest >= FEWEST["train"] else tenth


def require_enough(dataset: Dataset) -> None:
    """Raise unless every split has the samples that a plan needs.

    Raises:
        ModelError: one has too few; has all counts.
    """
    counts = {name: len(getattr(dataset, name)) for name in FEWEST}
    if all(counts[name] >= fewest for name, fewest in FEWEST.items()):
        return
    *others, last = (f"{fewest} for {name}" for name, fewest in FEWEST.items())
    *found, most = (f"{count} for {name}" for name, count in counts.items())
    raise ModelError(
        f"samples must be at least {', '.join(others)} and {last}, but are {', '.join(found)} and {most}",
        hint=f"{sum(FEWEST.values())} in train alone are enough: selection and development are drawn from it",
    )


def coarse_note(samples: int, max_drop: float) -> str:
    """A warning when one sample of ``development`` is more than the drop that is allowed; empty when it is not, or none is."""
    if not 0 < max_drop < 1 / samples:
        return ""
    return (
        f"one of {samples} development samples is {100 / samples:.3g} points, more than the {max_drop:.2%} that may be lost:"
        f" the gate decides on single samples; {round(1 / max_drop)} and more can tell"
    )

"""A traced model's operators against those that its accelerator runs badly, or not at all."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.fx import Node

from edgeprune.errors import ModelError
from edgeprune.records.formats import FormatName
from edgeprune.records.operators import word_of
from edgeprune.records.target import Profile

MOST_PLACES = 3
THE_MODEL = "the model itself"


def places(program: ExportedProgram) -> dict[str, tuple[str, ...]]:
    """The modules in which each operator stands, by its word in profiles, in the order of the forward pass.

    An operator that is called in the model's own ``forward`` stands in ``the model itself``.
    """
    found: dict[str, dict[str, None]] = {}
    for node in program.graph.nodes:
        word = word_of(str(node.target)) if node.op == "call_function" else None
        if word is not None:
            found.setdefault(word, {})[place_of(node) or THE_MODEL] = None
    return {word: tuple(where) for word, where in found.items()}


def place_of(node: Node) -> str:
    """The module that a node of a traced program was called in; ``""`` for the model's own ``forward``, and for its inputs."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def check(program: ExportedProgram, profile: Profile, form: FormatName) -> tuple[str, ...]:
    """One line for each operator that the accelerator runs badly: where it is, what it costs, who says so.

    Args:
        program: of the dense model.
        profile: of the accelerator.
        form: the format that ships: its converter may replace an operator that the accelerator lacks.

    Raises:
        ModelError: an operator cannot run there.
    """
    found = places(program)
    banned = [f for f in profile.forbidden_ops if f.op in found and form not in f.decomposed_by]
    if banned:
        told = "; ".join(
            f"{f.op} in {_shown(found[f.op])}: {f.cost} ({f.source}, {f.read_on})" for f in banned
        )
        raise ModelError(
            f"the model must have no operator that {profile.name} cannot run, but has {told}",
            hint="replace it in the model and train that, or choose a target with another profile",
        )
    return tuple(
        f"{fact.op} in {_shown(found[fact.op])}: on {profile.name} {fact.cost}"
        f" ({fact.source}, read {fact.read_on})"
        for fact in profile.avoid_ops
        if fact.op in found
    )


def _shown(where: tuple[str, ...]) -> str:
    more = len(where) - MOST_PLACES
    return ", ".join(where[:MOST_PLACES]) + (f" and {more} more" if more > 0 else "")

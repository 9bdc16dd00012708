"""Whether a file that is named INT8 is one: the share of its layers that compute in 8 bits, and of its weights that are stored so.

Layers that the maker left in float on purpose count in neither share. They are named, so that a file can be asked whether it has them.
"""

from __future__ import annotations

from collections.abc import Collection

from edgeprune.errors import IntegrityError
from edgeprune.formats.inside.anatomy import Anatomy, Layer, anatomy
from edgeprune.formats.inside.weights import eight_bit_ratio, weight_elements
from edgeprune.records.artifact import Artifact
from edgeprune.records.formats import format_facts

MIN_EIGHT_BIT_OPS = MIN_EIGHT_BIT_RATIO = 0.9


def file_kind(model: Artifact) -> str:
    """The format as which a model file is read: a runtime may take files of another one."""
    return format_facts(model.format).kind


def weights_line(model: Artifact, content: bytes, float_layers: Collection[str] = ()) -> str:
    """How the weights of a file are stored, in words.

    Args:
        model: the record of the file; one in INT8 must store INT8.
        content: the file.
        float_layers: names of the layers that were left in float on purpose.

    Raises:
        IntegrityError: an INT8 file stores too many weights of its other layers in float, or :func:`layers_line` would not find a layer
            of ``float_layers`` in float.
    """
    kind = file_kind(model)
    counts = weight_elements(kind, content)
    if counts is None:
        return f"weights of {model.format} files are not read here"
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())) or "none"
    if model.precision == "int8":
        left = _left_in_float(model, anatomy(kind, content) if float_layers else None, float_layers)
        for _, stored, elements in {weight for layer in left for weight in layer.weights}:
            counts[stored] = counts.get(stored, 0) - elements
        ratio = eight_bit_ratio(counts)
        if ratio < MIN_EIGHT_BIT_RATIO:
            raise IntegrityError(
                f"an int8 model must store at least {MIN_EIGHT_BIT_RATIO:.0%} of its weights in 8 bits, "
                f"but {model.path} stores {ratio:.0%} ({shown}){_but_for(float_layers)}"
            )
    return f"weights: {shown}"


def layers_line(model: Artifact, found: Anatomy, float_layers: Collection[str] = ()) -> str:
    """How many operators there are, and how many of those with weights compute in 8 bits, in words.

    Args:
        model: the record of the file; one in INT8 must compute in INT8.
        found: what the file computes.
        float_layers: names of the layers that were left in float on purpose.

    Raises:
        IntegrityError: too many of the other layers of an INT8 file compute in float, or a layer of ``float_layers`` is not in the file or
            not in float.
    """
    detail = f"{found.operators.total()} operators, {found.eight_bit} of {found.weighted} with weights compute in 8 bits"
    if model.precision != "int8":
        return detail
    left = _left_in_float(model, found, float_layers)
    others = found.weighted - len(left)
    if found.eight_bit < MIN_EIGHT_BIT_OPS * others or not found.eight_bit:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(found.tensors.items()))
        raise IntegrityError(
            f"an int8 model must compute at least {MIN_EIGHT_BIT_OPS:.0%} of its layers in 8 bits, "
            f"but {found.eight_bit} of {others} do{_but_for(float_layers)} (tensors: {kinds})"
        )
    return (
        f"{detail}, left in float on purpose: {', '.join(float_layers)}" if float_layers else detail
    )


def require_eight_bits(model: Artifact, content: bytes, float_layers: Collection[str] = ()) -> None:
    """Raise unless a file that is named INT8 is one, as far as its format is read here; what its record says does not count.

    Args:
        model: the record of the file.
        content: the file.
        float_layers: names of the layers that were left in float on purpose.

    Raises:
        IntegrityError: as :func:`weights_line` and :func:`layers_line`.
    """
    named = model.model_copy(update={"precision": "int8"})
    weights_line(named, content, float_layers)
    found = anatomy(file_kind(named), content)
    if found is not None:
        layers_line(named, found, float_layers)


def _but_for(float_layers: Collection[str]) -> str:
    return (
        f" beside the {len(float_layers)} that were left in float on purpose"
        if float_layers
        else ""
    )


def _left_in_float(
    model: Artifact, found: Anatomy | None, float_layers: Collection[str]
) -> list[Layer]:
    """The operators with weights of the layers that were left in float; whoever names one must be right."""
    if float_layers and found is None:
        raise IntegrityError(
            f"{model.path} cannot have float_layers: layers of {model.format} files are not read here"
        )
    left: list[Layer] = []
    for name in dict.fromkeys(float_layers):
        operators = [layer for layer in found.layers if layer.name == name] if found else []
        if not operators:
            raise IntegrityError(f"float_layers name {name!r}, which {model.path} does not have")
        if any(layer.eight_bit for layer in operators):
            raise IntegrityError(f"float_layers name {name!r}, which computes in 8 bits")
        left += operators
    return left

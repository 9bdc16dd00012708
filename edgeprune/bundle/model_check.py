"""Level 3: what the model file says and is, against what the manifest says, read without any runtime."""

from __future__ import annotations

from pathlib import PurePosixPath

from edgeprune.bundle.device_check import Check
from edgeprune.bundle.integrity import labels_text
from edgeprune.bundle.manifest import Manifest, identity
from edgeprune.bundle.write import model_texts
from edgeprune.errors import FormatError, IntegrityError
from edgeprune.formats import reader
from edgeprune.formats.inside.anatomy import (
    Anatomy,
    CountsOperators,
    KnowsVersions,
    anatomy,
    check_counts,
)
from edgeprune.formats.inside.eight_bits import file_kind, layers_line
from edgeprune.formats.shared.metadata import carrier
from edgeprune.records.files import sha256_bytes
from edgeprune.records.formats import format_facts


def metadata_check(manifest: Manifest, content: bytes) -> Check:
    """Whether the texts inside the model are those of the manifest, and the model without them the one that was measured.

    Raises:
        IntegrityError: they are not; names the first that differs.
    """
    if manifest.manifest_id != identity(manifest.facts(), manifest.source_sha256):
        raise IntegrityError("manifest_id is not that of the manifest")
    return _texts_check(manifest, content)


def _texts_check(manifest: Manifest, content: bytes) -> Check:
    found = carrier(PurePosixPath(manifest.model.path).suffix)
    inside = None if found is None else found.read(content)
    if inside is None and not manifest.embedded:
        if manifest.source_sha256 != manifest.model.sha256:
            raise IntegrityError(
                "source_sha256 must be the model's own digest where it carries no texts"
            )
        detail = format_facts(manifest.model.format).own_texts
        return Check(name="metadata", status="not-run", detail=detail)
    if inside is None:
        raise IntegrityError(
            "the model must carry the texts that the manifest lists, but carries none"
        )
    wanted = model_texts(manifest.facts(), manifest.source_sha256, manifest.manifest_id)
    for key in sorted({*wanted, *inside.texts}):
        if inside.texts.get(key) != wanted.get(key):
            raise IntegrityError(f"{key} inside the model does not say what the manifest says")
    if manifest.embedded != tuple(sorted(inside.texts)):
        raise IntegrityError(
            f"embedded must list the {len(inside.texts)} texts inside the model, but lists {', '.join(manifest.embedded) or 'none'}"
        )
    if inside.labels != labels_text(manifest.labels):
        raise IntegrityError("the labels inside the model are not those of the manifest")
    if sha256_bytes(inside.model) != manifest.source_sha256:
        raise IntegrityError("the model without its texts is not the one that was measured")
    return Check(
        name="metadata",
        status="passed",
        detail=f"{len(wanted)} texts and the labels are the manifest's",
    )


def operators_check(manifest: Manifest, content: bytes) -> Check:
    """Whether the operators are those of the manifest, and those of an INT8 file compute in 8 bits, but for its ``float_layers``.

    Of a ``.pte``, what XNNPACK was given and its share of the multiply-accumulates are compared too.

    Raises:
        IntegrityError: they are not.
    """
    form = reader(file_kind(manifest.model))
    if isinstance(form, CountsOperators):
        detail = form.operators_line(manifest.model, content)
        return Check(name="operators", status="passed", detail=detail)
    found = anatomy(file_kind(manifest.model), content)
    if found is None:
        return Check(
            name="operators",
            status="not-run",
            detail=f"{manifest.model.format} files are not read here",
        )
    wanted = {op: n for op, n in manifest.model.op_counts.items() if ":" not in op}
    if wanted and found.names:
        check_counts(wanted, found.operators)
    detail = layers_line(manifest.model, found, manifest.float_layers)
    return Check(name="operators", status="passed", detail=detail)


def float_check(manifest: Manifest, content: bytes, beside: bytes) -> Check:
    """Whether the float model is one, with the texts and operators of its record, and of the same layers as the INT8 file.

    Args:
        manifest: as :meth:`Manifest.of_float <edgeprune.bundle.manifest.Manifest.of_float>` gives it.
        content: the float model.
        beside: the INT8 file.

    Raises:
        IntegrityError: it is not.
    """
    path = manifest.model.path
    found = _anatomy(manifest, content)
    kinds = sorted({kind for layer in found.layers for _, kind, _ in layer.weights} - {"float32"})
    if kinds or found.operators["QuantizeLinear"] or found.operators["DequantizeLinear"]:
        what = f"stores weights in {kinds[0]}" if kinds else "quantises values"
        raise IntegrityError(f"a float model must be in FP32 throughout, but {path} {what}")
    mine, theirs = layer_sizes(found), layer_sizes(_anatomy(manifest, beside))
    if mine != theirs:
        raise IntegrityError(
            f"a float model must have the layers of the INT8 file, but {path} has {len(mine)} with {sum(mine)} weights "
            f"and the other {len(theirs)} with {sum(theirs)}"
        )
    operators = operators_check(manifest, content)
    _texts_check(manifest, content)
    detail = f"FP32, of the same layers; {operators.detail}"
    return Check(name="float model", status="passed", detail=detail)


def _anatomy(manifest: Manifest, content: bytes) -> Anatomy:
    found = anatomy(file_kind(manifest.model), content)
    assert found is not None, "a float model is an ONNX file"
    return found


def layer_sizes(found: Anatomy) -> list[int]:
    """Elements of the weights of each operator that has some, sorted."""
    return sorted(sum(elements for _, _, elements in layer.weights) for layer in found.layers)


def versions_check(manifest: Manifest, content: bytes) -> Check | None:
    """Whether the oldest version of the manifest's runtime that edgeprune knows loads every operator; ``None`` where it keeps no table.

    Raises:
        IntegrityError: it does not; names the operator, its version and the runtime's.
    """
    form, found = (
        reader(file_kind(manifest.model)),
        anatomy(file_kind(manifest.model), content),
    )
    table = form.oldest(manifest.runtime.name) if isinstance(form, KnowsVersions) else None
    if table is None or found is None:
        return None
    if not found.names:
        return Check(
            name="versions",
            status="not-run",
            detail="without ai-edge-litert operators are known by number alone",
        )
    try:
        table.check(found.schema_version, found.versions)
    except FormatError as error:
        raise IntegrityError(str(error)) from error
    detail = f"{table.name} loads every operator in its version"
    return Check(name="versions", status="passed", detail=detail)

"""Level 3: what the model file says and is, against what the manifest says, read without any runtime."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import PurePosixPath

from edgeprune.bundle.anatomy import anatomy
from edgeprune.bundle.behaviour import Check
from edgeprune.bundle.eight_bits import file_kind, layers_line
from edgeprune.bundle.integrity import labels_text
from edgeprune.bundle.manifest import Manifest, identity
from edgeprune.bundle.write import model_texts
from edgeprune.errors import IntegrityError
from edgeprune.formats._metadata import carrier
from edgeprune.formats._pte import read_program
from edgeprune.records import sha256_bytes
from edgeprune.results import Artifact

_OWN_TEXTS = {
    "coreml": "the package carries texts of its own (description, author, license, keys), which are not compared here",
    "executorch": "a .pte carries no texts",
}


def metadata_check(manifest: Manifest, content: bytes) -> Check:
    """Whether the texts inside the model are those of the manifest, and the model without them the one that was measured.

    Raises:
        IntegrityError: they are not; names the first that differs.
    """
    facts = manifest.facts()
    if manifest.manifest_id != identity(facts, manifest.source_sha256):
        raise IntegrityError("manifest_id is not that of the manifest")
    found = carrier(PurePosixPath(manifest.model.path).suffix)
    if found is None or not manifest.embedded:
        if manifest.source_sha256 != manifest.model.sha256:
            raise IntegrityError(
                "source_sha256 must be the model's own digest where it carries no texts"
            )
        detail = _OWN_TEXTS.get(manifest.model.format, "the model file carries no texts")
        return Check(name="metadata", status="not-run", detail=detail)
    inside = found.read(content)
    if inside is None:
        raise IntegrityError(
            "the model must carry the texts that the manifest lists, but carries none"
        )
    wanted = model_texts(facts, manifest.source_sha256)
    for key in sorted({*wanted, *inside.texts}):
        if inside.texts.get(key) != wanted.get(key):
            raise IntegrityError(f"{key} inside the model does not say what the manifest says")
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
    if file_kind(manifest.model) == "executorch":
        return _program_check(manifest.model, content)
    found = anatomy(file_kind(manifest.model), content)
    if found is None:
        return Check(
            name="operators",
            status="not-run",
            detail=f"{manifest.model.format} files are not read here",
        )
    wanted = {op: n for op, n in manifest.model.op_counts.items() if ":" not in op}
    if wanted and found.names:
        _check_counts(wanted, found.operators)
    detail = layers_line(manifest.model, found, manifest.float_layers)
    return Check(name="operators", status="passed", detail=detail)


def _check_counts(wanted: Mapping[str, int], found: Mapping[str, int]) -> None:
    """Nothing, when a file has as many of everything as its manifest says.

    Raises:
        IntegrityError: it has not; names the first that differs.
    """
    differ = sorted(op for op in {*wanted, *found} if wanted.get(op, 0) != found.get(op, 0))
    if differ:
        raise IntegrityError(
            f"the model must have {wanted.get(differ[0], 0)} {differ[0]}, but has {found.get(differ[0], 0)}"
        )


def _program_check(model: Artifact, content: bytes) -> Check:
    """Whether an ExecuTorch program has all that its record counts; the conversion fixed who computes what, so that it is in the file."""
    try:
        program = read_program(content)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise IntegrityError(f"the model is not a sound executorch file: {error}") from error
    _check_counts(model.op_counts, program.op_counts())
    if program.operators != model.operators:
        needed, named = (", ".join(ops) or "none" for ops in (program.operators, model.operators))
        raise IntegrityError(
            f"the model needs the runtime's operators {needed}, but the manifest names {named}"
        )
    nodes, every = len(program.nodes), len(program.nodes) + len(program.calls)
    macs = max(1, program.macs)
    detail = (
        f"XNNPACK has {nodes} of {every} operations and {program.delegated_macs / macs:.0%} of the multiply-accumulates,"
        f" {program.int8_macs / macs:.0%} are in 8 bits"
    )
    return Check(name="operators", status="passed", detail=detail)

"""Write a bundle: a folder that appears whole or not at all, and the same files as a reproducible ``.zip`` beside it."""

from __future__ import annotations

import contextlib
import importlib.resources
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from edgeprune.bundle.archive import write_zip
from edgeprune.bundle.card import card_text, license_text, notice_text
from edgeprune.bundle.golden import check_golden, default_tolerance, file_input, npy_bytes
from edgeprune.bundle.integrity import labels_text, sums_text
from edgeprune.bundle.manifest import (
    BOM,
    CARD,
    FLOAT_OUTPUTS,
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    LABELS,
    LICENSE,
    MANIFEST,
    NOT_STATED,
    NOTICE,
    README,
    RECIPE,
    SUMS,
    TOLERANCE,
    BundleFile,
    Facts,
    FloatModel,
    Golden,
    Manifest,
    Quality,
    Role,
    Tolerance,
    created_text,
    identity,
    status_of,
)
from edgeprune.bundle.readme import readme_text
from edgeprune.bundle.sbom import bom_text
from edgeprune.errors import IntegrityError, NoSpace, SpecError
from edgeprune.formats.shared.metadata import PREFIX, carrier
from edgeprune.formats.shared.model_bytes import model_bytes, unpacked
from edgeprune.records.artifact import Artifact
from edgeprune.records.files import is_full, sha256_bytes, to_json
from edgeprune.records.formats import format_facts
from edgeprune.records.names import ComputeUnits

if TYPE_CHECKING:
    from importlib.abc import Traversable

PACKAGE_STEM = "Classifier"
REPORT_HTML = "report/report.html"
REPORT_JSON = "report/report.json"
ALWAYS = ("python", "cpp")  # samples of every platform


@dataclass(frozen=True)
class FloatTwin:
    """The net of an INT8 file in FP32, for a board that builds FP16 from it.

    Attributes:
        model: the record of the file; its digest is checked against ``model_file``.
        model_file: where it lies now.
        golden_outputs: what it answered on the host to the payload's golden inputs, ``float32 [n, K]``.
        quality: how good it is.
    """

    model: Artifact
    model_file: Path
    golden_outputs: np.ndarray
    quality: Quality


@dataclass(frozen=True)
class Payload:
    """The content of a bundle.

    Attributes:
        model: the record of the shipped file; its digest is checked against ``model_file``.
        model_file: where the shipped file lies now.
        golden_inputs: at least 8 real raw samples, as the data had them: ``uint8`` images or ``float32 [n, ...]``.
        golden_outputs: what the shipped file answered on the host, ``float32 [n, K]``.
        tolerance: how far a board may be from the golden outputs; :func:`~edgeprune.bundle.golden.default_tolerance` when ``None``.
        report_html: the report's page, if there is one.
        report_json: the report's record, if there is one.
        repro: files of ``repro/`` by path; see :func:`~edgeprune.bundle.repro.repro_files`.
        golden_model: a model file with the golden samples inside, and its suffix, if the format has such files.
        compute_units: what the sample of a Core ML bundle asks for by default.
        float_twin: of an INT8 file whose board builds half precision from it, if there is one.
    """

    model: Artifact
    model_file: Path
    golden_inputs: np.ndarray
    golden_outputs: np.ndarray
    tolerance: Tolerance | None = None
    report_html: bytes | None = None
    report_json: bytes | None = None
    repro: Mapping[str, bytes] = field(default_factory=dict)
    golden_model: tuple[str, bytes] | None = None
    compute_units: ComputeUnits = "ALL"
    float_twin: FloatTwin | None = None


@dataclass(frozen=True)
class _Shipped:
    """The models as they lie in the bundle: the record of the one that ships, its files, the keys of the texts in it, and the float one."""

    model: Artifact
    files: Mapping[str, bytes]
    embedded: tuple[str, ...]
    float_model: FloatModel | None
    float_file: bytes


def write_bundle(folder: Path, facts: Facts, payload: Payload) -> Path:
    """The folder of the bundle, written whole; ``<folder>.zip`` lies beside it.

    A bundle that lies there already is replaced; any other folder is left alone.

    Args:
        folder: where the bundle goes.
        facts: what the maker states. ``failed_gates`` that are not empty mark the bundle as best effort.
        payload: the model, the golden samples and the report.

    Raises:
        SpecError: ``folder`` is something else already, a fact breaks a rule of the manifest, or the folder cannot be written.
        NoSpace: the disk is full; nothing is left behind.
        IntegrityError: the model file is not what its record says.
        ModelError: the golden samples do not fit the model.
    """
    check_golden(payload.golden_inputs, payload.golden_outputs, len(facts.labels))
    if payload.float_twin is not None:
        outputs = payload.float_twin.golden_outputs
        check_golden(payload.golden_inputs, outputs, len(facts.labels))
    manifest, files = _assemble(facts, payload)
    with _writing(folder):
        if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
            raise SpecError(f"{folder} is not a bundle", hint="give another folder, or empty it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
            fresh = Path(scratch, "new")
            _write_files(fresh, files)
            write_zip(fresh, zip_path(folder), top=manifest.name)
            if folder.exists():
                folder.rename(Path(scratch, "old"))
            fresh.rename(folder)
    return folder


def zip_path(folder: Path) -> Path:
    """Where the ``.zip`` of a bundle folder lies."""
    return folder.with_name(folder.name + ".zip")


def _assemble(facts: Facts, payload: Payload) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest and the content of every file, none of it on disk yet."""
    shipped = _shipped(facts, payload)
    model = shipped.model
    # The samples go through the same preprocessing as on the board, so that a mismatch shows here and not there.
    file_input(payload.golden_inputs, facts.preprocess, model.inputs[0])
    files: dict[str, tuple[Role, bytes]] = {
        **{path: ("model", content) for path, content in shipped.files.items()},
        LABELS: ("labels", labels_text(facts.labels)),
        GOLDEN_INPUTS: ("golden", npy_bytes(payload.golden_inputs)),
        GOLDEN_OUTPUTS: ("golden", npy_bytes(payload.golden_outputs)),
        **{path: ("sample", content) for path, content in _samples(facts, payload, model).items()},
        **{path: ("repro", content) for path, content in payload.repro.items()},
    }
    if payload.float_twin is not None and shipped.float_model is not None:
        files[shipped.float_model.model.path] = ("float_model", shipped.float_file)
        files[FLOAT_OUTPUTS] = ("golden", npy_bytes(payload.float_twin.golden_outputs))
    if payload.golden_model is not None:
        golden_suffix, golden_bytes = payload.golden_model
        files[f"golden/model.{model.precision}{golden_suffix}"] = ("golden", golden_bytes)
    for path, content in ((REPORT_HTML, payload.report_html), (REPORT_JSON, payload.report_json)):
        if content is not None:
            files[path] = ("report", content)
    # These are written from the manifest, which lists them: first with no content, then with the real one.
    for path, (role, _) in _DERIVED.items():
        files[path] = (role, b"")
    draft = _manifest(facts, payload, shipped, files)
    for path, (role, text) in _DERIVED.items():
        files[path] = (role, text(draft))
    manifest = _manifest(facts, payload, shipped, files, created=draft.created)
    contents = {path: content for path, (_, content) in files.items()}
    return manifest, {**contents, MANIFEST: to_json(manifest)}


# A member of MLComputeUnits for each name of coremltools.
_SWIFT_UNITS: Mapping[ComputeUnits, str] = {
    "ALL": "all",
    "CPU_AND_NE": "cpuAndNeuralEngine",
    "CPU_AND_GPU": "cpuAndGPU",
    "CPU_ONLY": "cpuOnly",
}
_DERIVED: dict[str, tuple[Role, Callable[[Manifest], bytes]]] = {
    RECIPE: ("recipe", lambda manifest: to_json(manifest.recipe())),
    TOLERANCE: ("golden", lambda manifest: to_json(manifest.golden_file())),
    README: ("readme", readme_text),
    CARD: ("card", card_text),
    LICENSE: ("license", license_text),
    NOTICE: ("license", notice_text),
    BOM: ("sbom", bom_text),
}


def _shipped(facts: Facts, payload: Payload) -> _Shipped:
    """The models as they lie in the bundle.

    A package keeps its content as it is; Xcode makes a Swift class of its name.
    """
    content, suffix = _model_bytes(payload.model, payload.model_file), payload.model_file.suffix
    if payload.model_file.is_dir():
        path = f"models/{PACKAGE_STEM}{suffix}"
        parts = {f"{path}/{name}": part for name, part in unpacked(content).items()}
        return _Shipped(payload.model.model_copy(update={"path": path}), parts, (), None, b"")
    named = identity(facts, payload.model.sha256)
    model, file, keys = _labelled(facts, payload.model, content, suffix, named)
    twin = payload.float_twin
    if twin is None:
        return _Shipped(model, {model.path: file}, keys, None, b"")
    source = _model_bytes(twin.model, twin.model_file)
    record, float_file, _ = _labelled(facts, twin.model, source, twin.model_file.suffix, named)
    tolerance = default_tolerance(
        record, twin.golden_outputs, facts.runtime.name, answers=facts.outputs
    )
    float_model = FloatModel(
        model=record,
        source_sha256=twin.model.sha256,
        golden=Golden(outputs=FLOAT_OUTPUTS, n=len(payload.golden_inputs), tolerance=tolerance),
        quality=twin.quality,
    )
    return _Shipped(model, {model.path: file}, keys, float_model, float_file)


def _labelled(
    facts: Facts, source: Artifact, content: bytes, suffix: str, manifest_id: str
) -> tuple[Artifact, bytes, tuple[str, ...]]:
    """A model file with the bundle's texts in it, where files of its kind have a place for them, and the keys of the texts."""
    keys: tuple[str, ...] = ()
    found = carrier(suffix)
    if found is not None:
        texts = model_texts(facts, source.sha256, manifest_id)
        content = found.attach(content, texts, labels_text(facts.labels))
        keys = tuple(sorted(texts))
    changes = {
        "path": f"models/model.{source.precision}{suffix}",
        "sha256": sha256_bytes(content),
        "size_bytes": len(content),
    }
    return source.model_copy(update=changes), content, keys


def model_texts(facts: Facts, source_sha256: str, manifest_id: str | None = None) -> dict[str, str]:
    """What goes into a model file, by key.

    Args:
        facts: what the maker states.
        source_sha256: digest of the file without these texts: the one that was measured.
        manifest_id: of the bundle; worked out from the other two for the file that ships.
    """
    preprocess = json.dumps(facts.preprocess.model_dump(mode="json"), sort_keys=True)
    return {
        PREFIX + "name": facts.name,
        PREFIX + "version": facts.version or NOT_STATED,
        PREFIX + "source_sha256": source_sha256,
        PREFIX + "manifest_id": manifest_id or identity(facts, source_sha256),
        PREFIX + "preprocess": preprocess,
        PREFIX + "license": facts.license or NOT_STATED,
    }


def _manifest(
    facts: Facts,
    payload: Payload,
    shipped: _Shipped,
    files: dict[str, tuple[Role, bytes]],
    *,
    created: str | None = None,
) -> Manifest:
    tolerance = payload.tolerance or default_tolerance(
        shipped.model, payload.golden_outputs, facts.runtime.name, answers=facts.outputs
    )
    listed = tuple(
        BundleFile(path=path, size_bytes=len(content), sha256=sha256_bytes(content), role=role)
        for path, (role, content) in sorted(files.items())
    )
    try:
        return Manifest(
            **{name: getattr(facts, name) for name in Facts.model_fields},
            created=created or created_text(),
            status=status_of(facts),
            model=shipped.model,
            source_sha256=payload.model.sha256,
            manifest_id=identity(facts, payload.model.sha256),
            embedded=shipped.embedded,
            golden=Golden(n=len(payload.golden_inputs), tolerance=tolerance),
            float_model=shipped.float_model,
            files=listed,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "manifest"
        message = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{place} of the bundle: {message}") from error


def _samples(facts: Facts, payload: Payload, model: Artifact) -> dict[str, bytes]:
    """The sample programs that can run the model, those of Apple devices with the processors that the app asks for."""
    known = format_facts(model.format)
    kinds = dict.fromkeys(facts.kind if kind == "target" else kind for kind in known.samples)
    chosen = f"MLComputeUnits = .{_SWIFT_UNITS[payload.compute_units]}".encode()
    return {
        path: content.replace(b"MLComputeUnits = .all", chosen) if known.compute_units else content
        for kind in kinds
        for path, content in sample_files(kind).items()
        if path.startswith(f"samples/{kind}/")
    }


def _model_bytes(model: Artifact, file: Path) -> bytes:
    try:
        content = model_bytes(file)
    except OSError as error:
        raise IntegrityError(f"cannot read {file}: {error.strerror}") from error
    if sha256_bytes(content) != model.sha256:
        raise IntegrityError(f"{file} is not the file that was verified", hint="export it again")
    return content


def sample_files(kind: str) -> dict[str, bytes]:
    """The sample programs of a bundle by path: those of ``python`` and ``cpp``, and those of the app platform where there are some.

    Args:
        kind: the target's ``bundle``, the name of a folder of :mod:`edgeprune.bundle` ``samples``.
    """
    root = importlib.resources.files("edgeprune.bundle").joinpath("samples")
    found: dict[str, bytes] = {}
    for name in dict.fromkeys((*ALWAYS, kind)):
        if root.joinpath(name).is_dir():
            found.update(_under(root.joinpath(name), f"samples/{name}"))
    return dict(sorted(found.items()))


def _under(folder: Traversable, path: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for item in folder.iterdir():
        if item.name.startswith(".") or item.name in ("__pycache__", "build"):
            continue
        place = f"{path}/{item.name}"
        if item.is_dir():
            found.update(_under(item, place))
        else:
            found[place] = item.read_bytes()
    return found


def _write_files(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    (folder / SUMS).write_bytes(sums_text(folder))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_full(error):
            raise NoSpace(f"no space left for the bundle {folder}") from error
        raise SpecError(f"cannot write {folder}: {error.strerror or error}") from error

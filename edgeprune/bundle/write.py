"""Write a bundle: a folder that appears whole or not at all, and the same files as a reproducible ``.zip`` beside it."""

from __future__ import annotations

import contextlib
import importlib.resources
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from edgeprune.bundle.archive import write_zip
from edgeprune.bundle.golden import check_golden, default_tolerance, file_input, npy_bytes
from edgeprune.bundle.integrity import labels_text, sums_text
from edgeprune.bundle.manifest import (
    GOLDEN_INPUTS,
    GOLDEN_OUTPUTS,
    IOS_SAMPLE,
    LABELS,
    MANIFEST,
    README,
    RECIPE,
    SAMPLE,
    SUMS,
    TOLERANCE,
    BundleFile,
    Facts,
    Golden,
    Manifest,
    Role,
    Tolerance,
    created_text,
)
from edgeprune.bundle.readme import readme_text
from edgeprune.errors import IntegrityError, NoSpace, SpecError
from edgeprune.folders import model_bytes, unpacked
from edgeprune.records import is_full, sha256_bytes, to_json
from edgeprune.results import Artifact

PACKAGE_STEM = "Classifier"
REPORT_HTML = "report/report.html"
REPORT_JSON = "report/report.json"


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
    """

    model: Artifact
    model_file: Path
    golden_inputs: np.ndarray
    golden_outputs: np.ndarray
    tolerance: Tolerance | None = None
    report_html: bytes | None = None
    report_json: bytes | None = None


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
    model, model_files = _model(payload)
    # The samples go through the same preprocessing as on the board, so that a mismatch shows here and not there.
    file_input(payload.golden_inputs, facts.preprocess, model.inputs[0])
    files: dict[str, tuple[Role, bytes]] = {
        **{path: ("model", content) for path, content in model_files.items()},
        LABELS: ("labels", labels_text(facts.labels)),
        GOLDEN_INPUTS: ("golden", npy_bytes(payload.golden_inputs)),
        GOLDEN_OUTPUTS: ("golden", npy_bytes(payload.golden_outputs)),
        **{path: ("sample", _sample_bytes(path)) for path in samples_for(facts.runtime.name)},
    }
    for path, content in ((REPORT_HTML, payload.report_html), (REPORT_JSON, payload.report_json)):
        if content is not None:
            files[path] = ("report", content)
    # These three are written from the manifest, which lists them: first with no content, then with the real one.
    for path, role in _DERIVED.items():
        files[path] = (role, b"")
    draft = _manifest(facts, payload, model, files)
    files[RECIPE] = ("recipe", to_json(draft.recipe()))
    files[TOLERANCE] = ("golden", to_json(draft.golden_file()))
    files[README] = ("readme", readme_text(draft))
    manifest = _manifest(facts, payload, model, files, created=draft.created)
    contents = {path: content for path, (_, content) in files.items()}
    return manifest, {**contents, MANIFEST: to_json(manifest)}


_DERIVED: dict[str, Role] = {RECIPE: "recipe", TOLERANCE: "golden", README: "readme"}


def _manifest(
    facts: Facts,
    payload: Payload,
    model: Artifact,
    files: dict[str, tuple[Role, bytes]],
    *,
    created: str | None = None,
) -> Manifest:
    tolerance = payload.tolerance or default_tolerance(model, payload.golden_outputs)
    listed = tuple(
        BundleFile(path=path, size_bytes=len(content), sha256=sha256_bytes(content), role=role)
        for path, (role, content) in sorted(files.items())
    )
    try:
        return Manifest(
            **{name: getattr(facts, name) for name in Facts.model_fields},
            created=created or created_text(),
            status="best-effort" if facts.failed_gates else "passed",
            model=model,
            golden=Golden(n=len(payload.golden_inputs), tolerance=tolerance),
            files=listed,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "manifest"
        message = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{place} of the bundle: {message}") from error


def samples_for(runtime: str) -> tuple[str, ...]:
    """Paths of the sample programs for a runtime."""
    return (IOS_SAMPLE,) if runtime == "coreml" else (SAMPLE,)


def _model(payload: Payload) -> tuple[Artifact, dict[str, bytes]]:
    """The record of the model as it lies in the bundle, and its files there. Xcode makes a Swift class of a package's name."""
    content = _model_bytes(payload)
    suffix = payload.model_file.suffix
    if not payload.model_file.is_dir():
        path = f"models/model.{payload.model.precision}{suffix}"
        return payload.model.model_copy(update={"path": path}), {path: content}
    path = f"models/{PACKAGE_STEM}{suffix}"
    files = {f"{path}/{name}": part for name, part in unpacked(content).items()}
    return payload.model.model_copy(update={"path": path}), files


def _model_bytes(payload: Payload) -> bytes:
    try:
        content = model_bytes(payload.model_file)
    except OSError as error:
        raise IntegrityError(f"cannot read {payload.model_file}: {error.strerror}") from error
    if sha256_bytes(content) != payload.model.sha256:
        raise IntegrityError(
            f"{payload.model_file} is not the file that was verified", hint="export it again"
        )
    return content


def _sample_bytes(path: str) -> bytes:
    return importlib.resources.files("edgeprune.bundle").joinpath(path).read_bytes()


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

"""What a bundle says about itself: ``manifest.json`` and the two small files that sample programs read.

Paths inside a bundle are POSIX, relative and safe on every file system that a bundle may be unpacked on; :func:`check_path` is the rule.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from edgeprune.errors import SpecError
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.base import Record
from edgeprune.records.files import sha256_bytes, to_json_text
from edgeprune.records.formats import RuntimeName, all_facts, format_facts
from edgeprune.records.names import SPDX, Name, Sha256, Stamp
from edgeprune.records.sparsity import SparseWeights
from edgeprune.records.workload import Preprocess

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
RECIPE = "preprocess.json"
LABELS = "labels.txt"
README = "README.md"
GOLDEN_INPUTS = "golden/inputs.npy"
GOLDEN_OUTPUTS = "golden/outputs.npy"
FLOAT_OUTPUTS = "golden/float-outputs.npy"  # of the float model
TOLERANCE = "golden/tolerance.json"
JETSON_SAMPLE = "samples/jetson/build_engine.py"
SIGNATURE = "manifest.sig"
CARD = "MODEL_CARD.md"
LICENSE = "LICENSE"
NOTICE = "NOTICE"
BOM = "sbom/bom.cdx.json"
REQUIRED = (
    *(RECIPE, LABELS, README, GOLDEN_INPUTS, GOLDEN_OUTPUTS, TOLERANCE),
    *(CARD, LICENSE, NOTICE, BOM),
)
NOT_STATED = "not stated"

MIN_GOLDEN = 8
MAX_PATH = 240
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
_RESERVED = re.compile(r"^(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?$", re.IGNORECASE)


def check_path(path: str) -> str:
    """The path itself, when it is safe inside a bundle on Linux, macOS and Windows.

    Raises:
        ValueError: the path is absolute, climbs, or has a name that some file system refuses or changes.
    """
    if not path or len(path) > MAX_PATH:
        raise ValueError(f"a path must have 1 to {MAX_PATH} characters, but has {len(path)}")
    if _FORBIDDEN.search(path) or unicodedata.normalize("NFC", path) != path:
        raise ValueError(
            f"path {path!r} must be plain NFC text without backslash, colon or control"
        )
    for part in path.split("/"):
        if part in ("", ".", ".."):
            raise ValueError(f"path {path!r} must be relative, without empty, '.' or '..' parts")
        if part.endswith((".", " ")) or _RESERVED.match(part):
            raise ValueError(f"path {path!r} has a part that Windows cannot hold")
    return path


def path_key(path: str) -> str:
    """What two paths share when a case-folding file system takes them for the same file."""
    return unicodedata.normalize("NFC", path).casefold()


def check_distinct(paths: Iterable[str]) -> None:
    """Raise when two paths are the same file on any file system.

    Raises:
        ValueError: two paths are equal, or differ only in case.
    """
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(path_key(path), path)
        if other is not path:
            raise ValueError(
                f"paths {other!r} and {path!r} are the same file where case is ignored"
            )


def _check_line(text: str) -> str:
    if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in text):
        raise ValueError(f"{text!r} must be one line without control characters")
    return text


SafePath = Annotated[str, AfterValidator(check_path)]
Line = Annotated[str, Field(max_length=1000), AfterValidator(_check_line)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Milliseconds = Annotated[float, Field(gt=0)]
Role = Literal[
    "model", "float_model", "recipe", "labels", "golden", "sample", "readme", "report", "card",
    "license", "repro", "sbom",
]  # fmt: skip


class BundleFile(Record):
    """One file of the bundle, by content."""

    path: SafePath
    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    role: Role


class RuntimeNeed(Record):
    """What must be installed on the board to run the model. ``min_version`` is the oldest one that was tried."""

    name: RuntimeName
    min_version: Line
    threads: Annotated[int, Field(ge=1, le=64)] = 1


class Tolerance(Record):
    """How far a runtime may be from the golden outputs: exactly one of steps (of the quantised output) and ``atol`` (output units)."""

    max_abs_error_steps: Annotated[int, Field(ge=0, le=255)] | None = None
    atol: Annotated[float, Field(gt=0)] | None = None
    min_argmax_agreement: Ratio

    @model_validator(mode="after")
    def _check_one(self) -> Tolerance:
        if (self.max_abs_error_steps is None) == (self.atol is None):
            raise ValueError("a tolerance must have either max_abs_error_steps or atol")
        return self

    def limit(self, output: TensorSpec) -> float:
        """The largest allowed absolute error, in units of the output."""
        if self.atol is not None:
            return self.atol
        assert self.max_abs_error_steps is not None
        return self.max_abs_error_steps * (output.scale or 0.0)


class Golden(Record):
    """Real samples (as the data had them) and what the shipped file answered on the host."""

    inputs: SafePath = GOLDEN_INPUTS
    outputs: SafePath = GOLDEN_OUTPUTS
    n: Annotated[int, Field(ge=MIN_GOLDEN)]
    tolerance: Tolerance


class Quality(Record):
    """Quality of the shipped file against the dense model it came from, on one named split."""

    metric: Literal["accuracy", "agreement"]
    split: Line
    n: Annotated[int, Field(ge=1)]
    dense: Ratio
    shipped: Ratio


class FloatModel(Record):
    """The same pruned net as the INT8 file for TensorRT, in FP32: what a Jetson builds its FP16 engine from.

    ``source_sha256`` is the digest of the file as it was measured, without the texts at its end. ``golden`` holds its own answers to the
    bundle's samples, with the tolerance of half precision; ``quality`` is that of this file. No latency is stated for it.
    """

    model: Artifact
    source_sha256: Sha256
    golden: Golden
    quality: Quality


class Judged(Record):
    """What the latency gate found, in ``unit``: a value and the interval around it, whose upper end ``high`` was held against ``limit``."""

    value: Annotated[float, Field(gt=0)]
    low: Annotated[float, Field(gt=0)]
    high: Annotated[float, Field(gt=0)]
    limit: Annotated[float, Field(gt=0)]
    unit: Line


class Latency(Record):
    """Latency of the shipped file, with the stamp that says what kind of machine it was measured on.

    ``judged`` is what the gate found; earlier bundles lack it. ``unreliable`` says why these times should not be relied on.
    """

    device: Line
    fingerprint_key: Line
    stamp: Stamp
    median_ms: Milliseconds
    p90_ms: Milliseconds
    limit_ms: Milliseconds
    budget: Line
    judged: Judged | None = None
    unreliable: tuple[Line, ...] = ()


class Provenance(Record):
    """What the bundle was made from, and how to make it again."""

    seed: Annotated[int, Field(ge=0)]
    data_digest: Line
    model_digest: Line
    plan_digest: Line
    command: Annotated[str, Field(max_length=100_000)]


class Facts(Record):
    """What the maker of a bundle states about it; the files say the rest.

    ``outputs`` is what the file answers with. ``kind`` is the app platform whose samples lie in ``samples/<kind>``. ``quality`` is of the
    split that choices were made on, ``test`` of the one that was read once, where there was one.
    ``failed_gates`` were judged and missed. ``not_run`` could not be judged, because nothing that the maker had runs the file.
    The golden answers are then ``worked-out`` from the operations in the file, or those of a ``twin`` of another format.
    ``sparsity`` says which pattern of zeros its weights have, where they have one. ``float_layers`` names the layers of an INT8 file that
    were left in float on purpose. ``why_fp32`` says what refused INT8, where FP32 ships in its place.
    """

    name: Name
    edgeprune_version: Line
    target: Name
    profile: Name
    task: Literal["classification"] = "classification"
    outputs: Literal["logits", "probabilities"] = "logits"
    version: Line | None = None
    kind: Name = "python"
    license: Annotated[str, Field(pattern=SPDX)] | None = None
    failed_gates: tuple[Line, ...] = ()
    not_run: tuple[Line, ...] = ()
    golden_source: Literal["run", "worked-out", "twin"] = "run"
    runtime: RuntimeNeed
    preprocess: Preprocess
    labels: Annotated[tuple[Line, ...], Field(min_length=1, max_length=100_000)]
    quality: Quality
    test: Quality | None = None
    latency: Latency
    provenance: Provenance
    sparsity: SparseWeights | None = None
    float_layers: tuple[Line, ...] = ()
    why_fp32: Line | None = None


class Recipe(Record):
    """``preprocess.json``: all that a program needs to feed the model, so that no sample repeats a constant.

    Raw ``uint8`` images ``[H, W, C]`` (or ``[H, W]``) become ``(raw / 255 - mean) / std`` in the ``layout`` of ``input``; when ``kind`` is
    ``none`` float samples go in unchanged.
    """

    schema_version: Literal[1] = 1
    preprocess: Preprocess
    model: SafePath
    runtime: RuntimeNeed
    input: TensorSpec
    output: TensorSpec


class GoldenFile(Record):
    """``golden/tolerance.json``: the tolerance, also as an absolute error so that a program needs no arithmetic."""

    tolerance: Tolerance
    max_abs_error: Annotated[float, Field(ge=0)]


class Manifest(Facts):
    """``manifest.json``. ``files`` lists every file but the manifest itself, ``SHA256SUMS`` and ``manifest.sig``.

    ``source_sha256`` is the digest of the model file as it was measured. The file that ships is the same with texts at its end, whose keys
    stand in ``embedded``; where that is empty none were added: a Core ML package has its own, a ``.pte`` none. ``manifest_id`` is
    :func:`identity` of the rest. ``float_model`` is the file of that role, beside an INT8 file for TensorRT.
    """

    schema_version: Literal[1] = 1
    created: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    status: Literal["passed", "passed-on-unreliable-times", "best-effort"]
    model: Artifact
    source_sha256: Sha256
    manifest_id: Sha256
    embedded: tuple[Line, ...] = ()
    golden: Golden
    float_model: FloatModel | None = None
    files: tuple[BundleFile, ...]

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: Artifact) -> Artifact:
        check_path(model.path)
        # What is called by another name would pass by checks of what it is.
        known = format_facts(model.format)
        suffix = known.suffix
        if not model.path.endswith(suffix):
            raise ValueError(
                f"a model of the format {model.format} must be a {suffix}, not {model.path!r}"
            )
        if model.precision == "fp16" and known.float_precision != "fp16":
            halves = " or ".join(f.name for f in all_facts() if f.float_precision == "fp16")
            raise ValueError(f"a model in fp16 must be of the format {halves}, not {model.format}")
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise ValueError("a classification model must have one input and one output")
        return model

    @field_validator("files")
    @classmethod
    def _check_files(cls, files: tuple[BundleFile, ...]) -> tuple[BundleFile, ...]:
        paths = [file.path for file in files]
        check_distinct([*paths, MANIFEST, SUMS, SIGNATURE])
        missing = [path for path in REQUIRED if path not in paths]
        if missing:
            raise ValueError(f"files must list {', '.join(missing)}")
        if all(file.role != "sample" for file in files):
            raise ValueError("files must list a sample program")
        return files

    @model_validator(mode="after")
    def _check_whole(self) -> Manifest:
        if (self.status == "best-effort") != bool(self.failed_gates):
            raise ValueError("status must be best-effort exactly when failed_gates is not empty")
        if self.status != status_of(self):
            raise ValueError(f"status must be {status_of(self)} by latency.unreliable")
        runtimes = format_facts(self.model.format).runs_in()
        if self.runtime.name not in runtimes:
            raise ValueError(
                f"a model of the format {self.model.format} must run in {' or '.join(runtimes)}, not {self.runtime.name}"
            )
        listed = {file.path: file for file in self.files}
        model = listed.get(self.model.path)
        # The digest of a folder is that of its files packed, which integrity.read_model compares.
        if not self.model_parts() and (model is None or model.sha256 != self.model.sha256):
            raise ValueError(f"files must list {self.model.path} with the digest of the model")
        if not {self.golden.inputs, self.golden.outputs} <= set(listed):
            raise ValueError("files must list the golden inputs and outputs")
        if self.golden.tolerance.atol is None and self.model.outputs[0].scale is None:
            raise ValueError("max_abs_error_steps needs a quantised output; give atol instead")
        return self

    @model_validator(mode="after")
    def _check_float(self) -> Manifest:
        found, paths = self.float_model, [f.path for f in self.files if f.role == "float_model"]
        if found is None:
            if paths:
                raise ValueError(f"float_model must describe {paths[0]}")
            return self
        twins = [facts.name for facts in all_facts() if facts.half_engines]
        if self.model.format not in twins or self.model.precision != "int8":
            raise ValueError(
                f"float_model needs a model in INT8 for {' or '.join(twins)} beside it"
            )
        wanted = self.model.format, "fp32"
        if (found.model.format, found.model.precision) != wanted:
            raise ValueError(f"float_model must be a file in FP32 for {self.model.format}")
        if (found.model.inputs, found.model.outputs) != (self.model.inputs, self.model.outputs):
            raise ValueError("float_model must have the inputs and outputs of the model")
        listed = {file.path: file.sha256 for file in self.files}
        if paths != [found.model.path] or listed[paths[0]] != found.model.sha256:
            raise ValueError(f"files must list {found.model.path} as float_model, with its digest")
        golden = found.golden
        if (golden.inputs, golden.n) != (self.golden.inputs, self.golden.n):
            raise ValueError("float_model must have answers to the golden samples of the model")
        if golden.outputs not in listed or golden.tolerance.atol is None:
            raise ValueError("float_model needs golden outputs that are listed, and atol")
        return self

    def facts(self) -> Facts:
        """What the maker stated."""
        return Facts(**{name: getattr(self, name) for name in Facts.model_fields})

    def model_parts(self) -> tuple[str, ...]:
        """Paths of the files of a model that is a folder, sorted; empty for a model that is one file."""
        return tuple(sorted(f.path for f in self.files if f.path.startswith(f"{self.model.path}/")))

    def of_float(self) -> Manifest | None:
        """The manifest as if the float model were what ships, so that it can be checked like any model; ``None`` without one."""
        found = self.float_model
        if found is None:
            return None
        changes = {name: getattr(found, name) for name in FloatModel.model_fields}
        return self.model_copy(update={**changes, "float_model": None, "float_layers": ()})

    def recipe(self) -> Recipe:
        """What ``preprocess.json`` must say."""
        return Recipe(
            preprocess=self.preprocess,
            model=self.model.path,
            runtime=self.runtime,
            input=self.model.inputs[0],
            output=self.model.outputs[0],
        )

    def golden_file(self) -> GoldenFile:
        """What ``golden/tolerance.json`` must say."""
        tolerance = self.golden.tolerance
        return GoldenFile(tolerance=tolerance, max_abs_error=tolerance.limit(self.model.outputs[0]))


def status_of(facts: Facts) -> Literal["passed", "passed-on-unreliable-times", "best-effort"]:
    """What a bundle is to be called first."""
    if facts.failed_gates:
        return "best-effort"
    return "passed-on-unreliable-times" if facts.latency.unreliable else "passed"


def identity(facts: Facts, source_sha256: str) -> str:
    """The ``manifest_id``: a digest of what the maker states and of the file that was measured.

    No digest of a file that carries it goes in, so the texts inside the model can name it.
    """
    stated = facts.model_dump(mode="json", include=set(Facts.model_fields))
    if stated["sparsity"] is None:
        del stated["sparsity"]  # so that bundles from before it was stated keep their identity
    if stated["outputs"] == "logits":
        del stated["outputs"]  # and here
    if not stated["float_layers"]:
        del stated["float_layers"]  # and here
    if stated["why_fp32"] is None:
        del stated["why_fp32"]  # and here
    for key in ("judged", "unreliable"):
        if not stated["latency"][key]:
            del stated["latency"][key]  # and here
    return sha256_bytes(to_json_text([stated, source_sha256]))


def created_text(environ: Mapping[str, str] | None = None) -> str:
    """Now, as UTC text; or the moment in ``SOURCE_DATE_EPOCH`` (seconds), so that a bundle can be made again byte for byte.

    Raises:
        SpecError: ``SOURCE_DATE_EPOCH`` is not a count of seconds.

    Source: the reproducible-builds specification of SOURCE_DATE_EPOCH.
    """
    given = (os.environ if environ is None else environ).get("SOURCE_DATE_EPOCH")
    try:
        moment = (
            datetime.now(timezone.utc)
            if given is None
            else datetime.fromtimestamp(int(given), timezone.utc)
        )
    except (ValueError, OverflowError, OSError) as error:
        raise SpecError(
            f"SOURCE_DATE_EPOCH must be a count of seconds, but got {given!r}",
            hint="unset it or give for example 1735689600",
        ) from error
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")

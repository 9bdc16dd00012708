"""Core ML packages for iPhone and Mac: converted by coremltools, run by Core ML on Apple devices only.

The ``fp32`` file of a target is stored and computed in half precision (``fp16``), as coremltools makes ML programs by default. The ``int8``
file has INT8 weights and INT8 activations (``static-int8-per-channel``), or INT8 weights alone (``weight-only-int8-per-channel``),
whichever the profile names first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import FormatError
from edgeprune.formats import (
    DEFAULT_OPTIONS,
    AppFacts,
    Format,
    QuantizeOptions,
    Resizable,
    cut_in_place_of,
)
from edgeprune.formats.coreml.package import (
    KEY,
    make_classifier,
    notes,
    package_files,
    read_package,
    toolchain,
)
from edgeprune.formats.shared.inputs import check_calibration
from edgeprune.formats.shared.model_bytes import model_bytes, write_folder
from edgeprune.records.artifact import Artifact, TensorSpec
from edgeprune.records.files import sha256_bytes
from edgeprune.records.formats import FormatFacts, format_facts

if TYPE_CHECKING:
    from torch import nn

    from edgeprune.formats.coreml.check import PackageCheck
    from edgeprune.formats.coreml.convert import Entry

WEIGHT_ONLY = "weight-only-int8-per-channel"
SCHEMES = ("static-int8-per-channel", "static-int8-per-tensor", WEIGHT_ONLY)
CHECKED_SAMPLES = 4
INFO = format_facts("coreml")


@dataclass
class CoremlFormat:
    """See :class:`edgeprune.formats.Format`. With ``facts`` files are made for an app: image input, labels, and what Xcode shows."""

    facts: AppFacts | None = None
    info: FormatFacts = INFO

    def for_app(self, facts: AppFacts) -> CoremlFormat:
        """The same format, for one app."""
        return replace(self, facts=facts)

    def export(self, model: nn.Module, example: np.ndarray, path: Path) -> Artifact:
        """Write the package in half precision; its weights and answers must be torch's.

        Raises:
            ModelError: the labels do not fit the model.
            FormatError: coremltools refuses the model, or what it wrote is another net.
            MissingTool: coremltools is not installed.
        """
        toolchain()
        from edgeprune.formats.coreml import convert

        entry = convert.entry_for(self.facts, example.shape)
        labels = self._labels(model, example)
        found = convert.float_model(model, example, entry, labels is not None)
        return self._finish(found, path, model, model, example, entry, precision="fp16")

    def quantize(
        self,
        fp32: Path,
        calibration: np.ndarray,
        path: Path,
        *,
        model: nn.Module | None = None,
        options: QuantizeOptions = DEFAULT_OPTIONS,
    ) -> Artifact:
        """Write the INT8 package of the model that ``fp32`` was exported from, calibrated in torch.

        Raises:
            ModelError: a sample is not finite, or there is none; or the labels do not fit the model.
            FormatError: there is no model, coremltools refuses it, or what it wrote is another net.
            MissingTool: coremltools is not installed.
        """
        spec, _ = read_package(fp32)
        check_calibration(calibration, _shape(spec.description.input[0]))
        if options != replace(DEFAULT_OPTIONS, io=options.io) or options.io == "int8":
            raise FormatError("Core ML packages take and return float, and keep their own ranges")
        if model is None:
            raise FormatError("a Core ML file is quantised from the model, which was not given")
        from edgeprune.formats.coreml import convert

        scheme = self._scheme()
        x = np.asarray(calibration, np.float32)
        entry = convert.entry_for(self.facts, x[:1].shape)
        labels = self._labels(model, x[:1])
        asked = model
        if scheme == WEIGHT_ONLY:
            plain = convert.float_model(model, x[:1], entry, labels is not None)
            found = convert.weight_only_model(plain)
        else:
            per_channel = scheme != "static-int8-per-tensor"
            asked = convert.calibrated_model(model, x, per_channel=per_channel)
            found = convert.quantized_model(asked, x[:1].shape, entry, labels is not None)
        checked = x[:CHECKED_SAMPLES]
        return self._finish(found, path, model, asked, checked, entry, precision="int8")

    def describe(self, path: Path) -> Artifact:
        """The record of a package: what its specification says.

        ``inputs`` are in the model's own units and layout, also where an image is taken in; ``outputs`` are the logits alone, the class and
        the table of probabilities stand in the file beside them. ``op_counts`` counts operations by type, ``weights:int8`` the weights by
        stored type, ``int8:conv`` the operations whose input and weight are 8 bits wide.
        """
        from edgeprune.formats.coreml.program import program_of

        spec, files = read_package(path)
        program = program_of(spec, files.get(_weights_name(), b""))
        counts = program.counts()
        content = model_bytes(path)
        stored = notes(spec).get("precision")
        int8 = counts.get("weights:int8", 0) > 0
        return Artifact.model_validate(
            {
                "path": path.name,
                "format": self.info.name,
                "precision": stored or ("int8" if int8 else "fp16"),
                "sha256": sha256_bytes(content),
                "size_bytes": sum(map(len, files.values())),
                "inputs": tuple(_spec(value) for value in spec.description.input),
                "outputs": tuple(
                    _spec(value)
                    for value in spec.description.output
                    if value.type.WhichOneof("Type") == "multiArrayType"
                ),
                "op_counts": counts,
            }
        )

    def evaluate(self, path: Path, x: np.ndarray) -> np.ndarray:
        """Logits of the file for samples as the torch model sees them, worked out operation by operation; Core ML is not asked.

        Raises:
            FormatError: the program has an operation that is not worked out here.
        """
        from edgeprune.formats.coreml.check import raw_input
        from edgeprune.formats.coreml.convert import LOGITS
        from edgeprune.formats.coreml.evaluate import evaluate
        from edgeprune.formats.coreml.program import program_of

        spec, files = read_package(path)
        program = program_of(spec, files.get(_weights_name(), b""))
        return evaluate(program, raw_input(x, entry_of(spec)), LOGITS)

    def resizable(
        self,
        dense: Path,
        variant: Path,
        full: Mapping[str, int],
        changed: Mapping[str, int],
        model: nn.Module,
    ) -> Resizable:
        """Core ML packages cannot be cut; see :attr:`FormatFacts.twin`."""
        raise cut_in_place_of(self.info)

    def _labels(self, model: nn.Module, example: np.ndarray) -> tuple[str, ...] | None:
        from edgeprune.formats.coreml.convert import check_labels

        labels = self.facts.labels if self.facts else None
        check_labels(labels, model, np.asarray(example, np.float32))
        return labels

    def _scheme(self) -> str:
        scheme = self.facts.int8_scheme if self.facts else ""
        if scheme and scheme not in SCHEMES:
            raise FormatError(
                f"Core ML files cannot have the INT8 scheme {scheme}",
                hint=f"name one of {', '.join(SCHEMES)} first in int8_schemes of the profile",
            )
        return scheme or SCHEMES[0]

    def _finish(
        self,
        found: Any,
        path: Path,
        model: nn.Module,
        asked: nn.Module,
        x: np.ndarray,
        entry: Entry,
        *,
        precision: str,
    ) -> Artifact:
        """Label, describe, check and write what the converter gave; nothing is written when a check fails."""
        from edgeprune.formats.coreml.check import check_file
        from edgeprune.formats.coreml.convert import PROBABILITIES, weight_bytes
        from edgeprune.formats.coreml.program import program_of

        spec, weights = found.get_spec(), weight_bytes(found)
        if self.facts is not None and self.facts.labels is not None:
            make_classifier(spec, PROBABILITIES, self.facts.labels)
        program = program_of(spec, weights)
        sample = np.asarray(x, np.float32)
        check = check_file(program, model, asked, sample, entry, int8=precision == "int8")
        scheme = self._scheme() if precision == "int8" else ""
        _describe(spec, self.facts, entry, check, precision, scheme)
        write_folder(path, package_files(spec, weights))
        return self.describe(path)


def entry_of(spec: Any) -> Entry:
    """How samples enter a package, from what it notes about itself."""
    from edgeprune.formats.coreml.convert import Entry

    known = notes(spec)
    numbers = {
        key: tuple(float(v) for v in known[key].split()) if known.get(key) else ()
        for key in ("scale", "bias", "mean", "std")
    }
    first = spec.description.input[0]
    if first.type.WhichOneof("Type") != "imageType":
        return Entry(name=first.name)
    return Entry(
        name=first.name,
        is_image=True,
        is_grey=len(numbers["bias"]) == 1,
        scale=numbers["scale"][0],
        bias=numbers["bias"],
        mean=numbers["mean"],
        std=numbers["std"],
    )


def _weights_name() -> str:
    from edgeprune.formats.coreml.package import WEIGHTS

    return WEIGHTS


def _describe(
    spec: Any,
    facts: AppFacts | None,
    entry: Entry,
    check: PackageCheck,
    precision: str,
    scheme: str,
) -> None:
    """Fill in what Xcode shows, and the notes that a program on a Mac reads."""
    shape = [int(s) for s in _program_shape(spec)]
    own = {
        "precision": precision,
        "int8_scheme": scheme,
        "compute_units": facts.compute_units if facts else "ALL",
        "input": "image" if entry.is_image else "tensor",
        "input_shape": " ".join(map(str, shape)),
        "input_note": entry.note,
        "scale": repr(entry.scale) if entry.is_image else "",
        **{key: " ".join(map(repr, getattr(entry, key))) for key in ("bias", "mean", "std")},
        "checked": _checked_text(check),
        "executed": "not run: Core ML runs on Apple devices only",
        **(dict(facts.notes) if facts else {}),
    }
    metadata = spec.description.metadata
    for key, value in sorted(own.items()):
        if value:
            metadata.userDefined[KEY + key] = value
    if facts is None:
        return
    metadata.shortDescription = facts.description
    metadata.author = facts.author
    metadata.license = facts.license
    metadata.versionString = facts.version
    entry_text = "raw samples, preprocessed as preprocess.json says"
    if entry.is_image:
        color = "grey" if entry.is_grey else "RGB"
        entry_text = f"{color} image of {shape[3]} x {shape[2]} pixels; the model normalises it"
    spec.description.input[0].shortDescription = entry_text
    texts = {
        "classLabel": "the most probable class",
        "classLabel_probs": "the probability of each class",
        "output": f"{facts.outputs}, one for each class in the order of labels.txt",
    }
    for output in spec.description.output:
        output.shortDescription = texts.get(output.name, "")


def _checked_text(check: PackageCheck) -> str:
    parts = [f"{check.weights} weights"]
    if check.weights_compared:
        parts.append("equal to torch within their rounding")
    if check.answers is None:
        parts.append(f"answers not worked out ({check.note})")
    else:
        parts.append(f"answers worked out on the host within {check.answers:.2g} of torch")
    return ", ".join(parts)


def _program_shape(spec: Any) -> tuple[int, ...]:
    tensor = spec.mlProgram.functions["main"].inputs[0].type.tensorType
    return tuple(int(d.constant.size) for d in tensor.dimensions)


def _shape(value: Any) -> tuple[int, ...]:
    kind = value.type.WhichOneof("Type")
    if kind == "imageType":
        image = value.type.imageType
        channels = 1 if image.colorSpace == image.ColorSpace.Value("GRAYSCALE") else 3
        return (1, channels, int(image.height), int(image.width))
    return tuple(int(s) for s in value.type.multiArrayType.shape)


def _spec(value: Any) -> TensorSpec:
    shape = _shape(value)
    return TensorSpec(
        name=str(value.name),
        shape=shape,
        dtype="float32",
        layout="NCHW" if len(shape) == 4 else "other",
    )


FORMAT: Format = CoremlFormat()

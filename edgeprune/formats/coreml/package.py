"""The ``.mlpackage`` folder of a Core ML program: its files, with equal bytes for equal programs, and what Xcode shows of it.

Source of the layout: ``Manifest.json`` and ``Data/com.apple.CoreML`` as coremltools 9.0 writes them; of the messages: ``Model.proto``,
``FeatureTypes.proto`` and ``MIL.proto`` of the same release.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import FormatError, MissingTool
from edgeprune.formats.shared.model_bytes import files_of
from edgeprune.formats.shared.quiet import silent

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
MANIFEST = "Manifest.json"
MAIN = "main"
CLASS_LABEL, CLASS_PROBABILITIES = "classLabel", "classLabel_probs"
KEY = "edgeprune."
# The converter's own notes that change with the day; the versions that it notes are kept.
_DATE = "com.github.apple.coremltools.conversion_date"
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "edgeprune/mlpackage")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, logs and warnings of the converter off the terminal.

    Its import warns of every library version that it was not tested with, and on Linux of the Apple libraries that it lacks.
    """
    bars = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    try:
        with silent():
            yield
    finally:
        if bars is None:
            os.environ.pop("TQDM_DISABLE", None)
        else:
            os.environ["TQDM_DISABLE"] = bars


def toolchain() -> Any:
    """The package coremltools.

    Raises:
        MissingTool: it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module("coremltools")
    except ImportError as error:
        raise MissingTool("coremltools", "coreml") from error


def read_package(path: Path) -> tuple[Any, dict[str, bytes]]:
    """The message ``Model`` of a package, and all its files.

    Raises:
        FormatError: it is no package, or holds no ML program.
    """
    return read_files(files_of(path) if path.is_dir() else {}, path.name)


def read_files(files: Mapping[str, bytes], name: str) -> tuple[Any, dict[str, bytes]]:
    """As :func:`read_package`, from the files of a package.

    Raises:
        FormatError: as there.
    """
    toolchain()
    from coremltools.proto import Model_pb2

    decode_error: Any = importlib.import_module("google.protobuf.message").DecodeError
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(files[MODEL])
    except (KeyError, decode_error) as error:
        raise FormatError(f"{name} is no Core ML package: {MODEL} is missing or damaged") from error
    if spec.WhichOneof("Type") != "mlProgram" or MAIN not in spec.mlProgram.functions:
        raise FormatError(f"{name} must hold one ML program with a function {MAIN}")
    return spec, dict(files)


def main_block(spec: Any) -> Any:
    """The block of operations that a program runs."""
    function = spec.mlProgram.functions[MAIN]
    return function.block_specializations[function.opset]


def package_files(spec: Any, weights: bytes) -> dict[str, bytes]:
    """The files of a package; the identifiers in its manifest come from the names of the items, not from chance."""
    del_note(spec, _DATE)
    items = (
        (MODEL, "model.mlmodel", "CoreML Model Specification"),
        (WEIGHTS.rpartition("/")[0], "weights", "CoreML Model Weights"),
    )
    entries = {
        str(uuid.uuid5(_SPACE, name)): {
            "author": "com.apple.CoreML",
            "description": description,
            "name": name,
            "path": path.removeprefix("Data/"),
        }
        for path, name, description in items
    }
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": dict(sorted(entries.items())),
        "rootModelIdentifier": str(uuid.uuid5(_SPACE, "model.mlmodel")),
    }
    return {
        MANIFEST: (json.dumps(manifest, indent=4) + "\n").encode(),
        MODEL: spec.SerializeToString(deterministic=True),
        WEIGHTS: weights,
    }


def del_note(spec: Any, key: str) -> None:
    """Remove a user-defined entry of the metadata, if it is there."""
    if key in spec.description.metadata.userDefined:
        del spec.description.metadata.userDefined[key]


def notes(spec: Any) -> dict[str, str]:
    """The entries of the metadata that edgeprune wrote, without their prefix."""
    found = dict(spec.description.metadata.userDefined)
    return {k.removeprefix(KEY): v for k, v in sorted(found.items()) if k.startswith(KEY)}


def make_classifier(spec: Any, probabilities: str, labels: Sequence[str]) -> None:
    """Turn an output of probabilities into the class and a table of class probabilities, in place; other outputs stay.

    coremltools makes classifiers of programs with one output only. The operation and the descriptions are those that it writes itself.
    """
    block, description = main_block(spec), spec.description
    operation = block.operations.add(type="classify")
    classes = operation.inputs["classes"].arguments.add().value
    classes.type.listType.type.tensorType.dataType = _data_type("STRING")
    classes.type.listType.length.constant.size = len(labels)
    for label in labels:
        _set_text(classes.immediateValue.list.values.add(), label)
    operation.inputs["probabilities"].arguments.add(name=probabilities)
    operation.outputs.add(name=CLASS_LABEL).type.tensorType.dataType = _data_type("STRING")
    table = operation.outputs.add(name=CLASS_PROBABILITIES).type.dictionaryType
    table.keyType.tensorType.dataType = _data_type("STRING")
    table.valueType.tensorType.dataType = _data_type("FLOAT64")
    _set_text(operation.attributes["name"], "classify")
    block.outputs[:] = [CLASS_LABEL, CLASS_PROBABILITIES] + [
        name for name in block.outputs if name != probabilities
    ]
    others = [type(o).FromString(o.SerializeToString()) for o in description.output]
    del description.output[:]
    description.output.add(name=CLASS_LABEL).type.stringType.SetInParent()
    table_type = description.output.add(name=CLASS_PROBABILITIES).type.dictionaryType
    table_type.stringKeyType.SetInParent()
    description.output.extend(o for o in others if o.name != probabilities)
    description.predictedFeatureName = CLASS_LABEL
    description.predictedProbabilitiesName = CLASS_PROBABILITIES


def _set_text(value: Any, text: str) -> None:
    value.type.tensorType.dataType = _data_type("STRING")
    value.immediateValue.tensor.strings.values.append(text)


def _data_type(name: str) -> int:
    from coremltools.proto import MIL_pb2

    return int(MIL_pb2.DataType.Value(name))

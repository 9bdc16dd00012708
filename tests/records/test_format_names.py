"""Names of formats come from manifests and targets of strangers: only a folder of the package is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from edgeprune import formats
from edgeprune.records.formats import FACTS, FormatName, format_facts, format_names

OWN = Path(formats.__file__).parent


def test_a_folder_of_the_package_is_a_format():
    assert [TypeAdapter(FormatName).validate_python(n) for n in format_names()] == format_names()


@pytest.mark.parametrize(
    "name",
    ["../formats/onnx", "./onnx", "onnx/", "ONNX", "", ".", "/", "shared", "x" * 300, "o\0x"],
)
def test_a_path_is_no_name_of_a_format(name: str):
    with pytest.raises(ValidationError, match="Input should be 'tflite'"):
        TypeAdapter(FormatName).validate_python(name)
    with pytest.raises(KeyError):
        format_facts(name)


def test_facts_outside_the_package_are_never_read(tmp_path: Path):
    facts = (OWN / "onnx" / FACTS).read_text()
    (tmp_path / FACTS).write_text(facts)
    with pytest.raises(ValidationError):
        TypeAdapter(FormatName).validate_python(str(tmp_path))
    with pytest.raises(KeyError):
        format_facts(str(tmp_path))

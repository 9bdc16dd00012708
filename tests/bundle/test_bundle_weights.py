from __future__ import annotations

from pathlib import Path

import pytest
from bundle_fixture import onnx_file, tflite_file

from edgeprune.errors import IntegrityError
from edgeprune.formats.inside.weights import eight_bit_ratio, weight_elements


def test_storage_types_are_counted_as_the_writers_stored_them(tmp_path: Path) -> None:
    path = tmp_path / "m"
    onnx_file(path)
    assert weight_elements("onnx", path.read_bytes()) == {"float32": 144}
    onnx_file(path, eight_bit=True)
    assert weight_elements("onnx", path.read_bytes()) == {"int8": 144}
    tflite_file(path)
    assert weight_elements("tflite", path.read_bytes()) == {"int8": 144}
    assert weight_elements("another", b"anything") is None


def test_the_eight_bit_ratio_is_a_share_of_all_weights() -> None:
    assert eight_bit_ratio({"int8": 75, "uint8": 15, "float32": 10}) == 0.9
    assert eight_bit_ratio({}) == 0.0


@pytest.mark.parametrize("form", ["onnx", "tflite"])
def test_damaged_files_are_integrity_errors_and_never_crash(tmp_path: Path, form: str) -> None:
    path = tmp_path / "m"
    (onnx_file if form == "onnx" else tflite_file)(path)
    whole = path.read_bytes()
    outcomes = set()
    for at in range(len(whole)):
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            try:
                counts = weight_elements(form, damaged)
                outcomes.add("read" if counts is not None else "skipped")
            except IntegrityError:
                outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    onnx_file(tmp_path / "m")
    with pytest.raises(IntegrityError, match="TFL3"):
        weight_elements("tflite", (tmp_path / "m").read_bytes())
    with pytest.raises(IntegrityError, match="one graph"):
        weight_elements("onnx", b"")

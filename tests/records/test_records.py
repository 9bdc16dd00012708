"""Records: strict parsing, errors that name the place, atomic writing."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgeprune.errors import IntegrityError, NoSpace, SpecError, UnknownName
from edgeprune.records.base import MAX_YAML_BYTES, Record, load_yaml, parse, read_json, read_yaml
from edgeprune.records.files import (
    atomic_path,
    digest_of,
    sha256_bytes,
    sha256_file,
    to_json,
    write_bytes,
    write_json,
)


class Inner(Record):
    count: int = 1
    label: str = ""


class Outer(Record):
    name: str
    ratio: float = 0.5
    inner: Inner = Inner()
    boxes: dict[str, Inner] = {}
    widths: tuple[int, ...] = ()


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_record_cannot_be_changed():
    with pytest.raises(ValidationError):
        Outer(name="a").name = "b"  # type: ignore[misc]


def test_a_yaml_file_becomes_a_record_with_tuples(tmp_path):
    path = yaml_file(tmp_path, "name: a\nwidths: [8, 16]\ninner: {count: 3}\n")
    assert read_yaml(Outer, path) == Outer(name="a", widths=(8, 16), inner=Inner(count=3))


@pytest.mark.parametrize(
    "wrong",
    [
        "name: no",  # YAML's boolean
        "name: 12",
        "name: a\nratio: '0.5'",
        "name: a\nratio: 1e-3",  # PyYAML reads this as text
        "name: a\nratio: .nan",
        "name: a\nratio: .inf",
        "name: a\ninner: {count: 1.5}",
        "name: a\ninner: {count: true}",
        "name: a\nwidths: 8",
    ],
)
def test_a_value_of_another_type_is_refused_and_the_place_is_named(tmp_path, wrong):
    path = yaml_file(tmp_path, wrong)
    with pytest.raises(SpecError, match=r"(name|ratio|count|widths).* in .*some\.yaml"):
        read_yaml(Outer, path)


def test_a_date_in_yaml_stays_text(tmp_path):
    assert load_yaml(yaml_file(tmp_path, "read_on: 2026-11-23")) == {"read_on": "2026-11-23"}


def test_a_missing_key_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"some\.yaml must have the key 'name'"):
        read_yaml(Outer, yaml_file(tmp_path, "ratio: 0.5"))


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        ("nmae: a", "name"),
        ("name: a\ninner: {cuont: 1}", "inner.count"),
        ("name: a\nboxes: {left: {lable: x}}", "boxes.left.label"),
    ],
)
def test_an_unknown_key_suggests_the_nearest_one(tmp_path, text, guess):
    with pytest.raises(UnknownName, match=f"did you mean '{guess}'"):
        read_yaml(Outer, yaml_file(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: a\nname: b", "line 2.*duplicate key 'name'"),
        ("inner: {count: 1, count: 2}", "duplicate key 'count'"),
        ("a: &x 1\nb: *x", "must not use YAML aliases"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: [1, 2", "line"),
        ("- 1\n- 2", "mapping of keys"),
        ("", "mapping of keys"),
        ("just text", "mapping of keys"),
    ],
)
def test_yaml_that_is_not_plain_data_is_refused(tmp_path, text, problem):
    with pytest.raises(SpecError, match=problem):
        read_yaml(Outer, yaml_file(tmp_path, text))


@pytest.mark.parametrize("text", ["[" * 200_000, "[" * 40 + "]" * 40, "a: " * 3 + "{b: " * 40])
def test_yaml_that_is_nested_deeply_is_refused(tmp_path, text):
    with pytest.raises(SpecError, match=r"at most 32 levels|not valid"):
        load_yaml(yaml_file(tmp_path, text))


def test_yaml_control_characters_are_refused(tmp_path):
    with pytest.raises(SpecError, match="is not valid: "):
        load_yaml(yaml_file(tmp_path, "a: \x00"))


def test_yaml_files_that_are_too_large_binary_or_missing_are_refused(tmp_path):
    with pytest.raises(SpecError, match="at most"):
        load_yaml(yaml_file(tmp_path, "#" * (MAX_YAML_BYTES + 1)))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="not UTF-8"):
        load_yaml(tmp_path / "binary.yaml")
    with pytest.raises(SpecError, match="cannot read"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="cannot read"):
        load_yaml(tmp_path)


def test_data_that_json_cannot_hold_is_refused():
    with pytest.raises(SpecError, match="here must be plain data"):
        parse(Outer, {"name": object()}, where="here")


inners = st.builds(Inner, count=st.integers(-(2**53), 2**53), label=st.text(max_size=8))
outers = st.builds(
    Outer,
    name=st.text(max_size=8),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    inner=inners,
    boxes=st.dictionaries(st.text(max_size=4), inners, max_size=3),
    widths=st.lists(st.integers(0, 4096), max_size=4).map(tuple),
)


@given(outers)
def test_records_survive_a_json_round_trip(record):
    assert Outer.model_validate_json(to_json(record)) == record


def test_json_is_canonical_and_ends_with_one_newline():
    text = to_json(Outer(name="é"))
    assert text == to_json(Outer.model_validate(json.loads(text), strict=False))
    assert text.endswith(b"}\n")
    assert "é".encode() in text
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_a_written_record_reads_back(tmp_path):
    path = tmp_path / "deep" / "er" / "record.json"
    write_json(Outer(name="a"), path)
    assert read_json(Outer, path) == Outer(name="a")
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("cut", [0, 1, 10, -3])
def test_a_truncated_record_is_an_integrity_error(tmp_path, cut):
    path = tmp_path / "record.json"
    path.write_bytes(to_json(Outer(name="a"))[:cut])
    with pytest.raises(IntegrityError, match=r"record\.json is not a valid Outer"):
        read_json(Outer, path)


def test_a_missing_record_is_an_integrity_error(tmp_path):
    with pytest.raises(IntegrityError, match="cannot read"):
        read_json(Outer, tmp_path / "none.json")


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def interrupted() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_its_own_error_and_leaves_nothing_behind(tmp_path, code):
    def full() -> None:
        with atomic_path(tmp_path / "file"):
            raise OSError(code, "full")

    with pytest.raises(NoSpace, match="no space left"):
        full()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_a_spec_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SpecError, match="cannot write"):
        write_bytes(tmp_path / "file" / "below", b"x")


def test_digests_of_bytes_and_files_agree(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_file(tmp_path / "file") == sha256_bytes(content)
    # The well-known digest of nothing.
    assert sha256_bytes(b"").startswith("e3b0c44298fc1c149afbf4c8996fb924")


def test_a_digest_ignores_key_order_and_sees_every_value():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of([Outer(name="a")]) != digest_of([Outer(name="b")])
    assert digest_of(Path("a")) == digest_of("a")
    assert len(digest_of(math.pi)) == 16
    with pytest.raises(TypeError, match="digest of object"):
        digest_of(object())

from __future__ import annotations

import pytest
from bundle_fixture import facts, make_bundle
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from edgeprune.bundle.manifest import (
    MANIFEST,
    Manifest,
    Tolerance,
    check_distinct,
    check_path,
    created_text,
    identity,
)
from edgeprune.errors import SpecError
from edgeprune.records.artifact import TensorSpec
from edgeprune.records.base import read_json
from edgeprune.records.files import sha256_bytes, to_json, to_json_text
from edgeprune.records.sparsity import SparseWeights


@pytest.mark.parametrize(
    "path",
    [
        *(
            "",
            "/etc/passwd",
            "../up",
            "a/../b",
            "a//b",
            "./a",
            "a/.",
            "a\\b",
            "C:x",
            "a\0b",
            "a\nb",
        ),
        *(
            "nul",
            "a/CON.txt",
            "lpt1",
            "dot.",
            "space ",
            "x" * 241,
            "e\u0301",
            "q?",
            "a*",
            "\x1b[31m",
        ),
    ],
)
def test_a_path_that_some_system_would_misread_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        check_path(path)


@given(st.text(max_size=30))
def test_an_accepted_path_never_leaves_its_folder(path: str) -> None:
    try:
        check_path(path)
    except ValueError:
        return
    parts = path.split("/")
    assert ".." not in parts
    assert "" not in parts
    assert "\\" not in path


def test_paths_that_differ_only_in_case_are_one_file() -> None:
    with pytest.raises(ValueError, match="where case is ignored"):
        check_distinct(["models/a", "Models/A"])
    check_distinct(["models/a", "models/b"])


def test_the_creation_time_follows_source_date_epoch() -> None:
    assert created_text({"SOURCE_DATE_EPOCH": "86400"}) == "1970-01-02T00:00:00Z"
    assert created_text({}) > "2024-01-01T00:00:00Z"


@pytest.mark.parametrize("text", ["", "soon", "1e5", "9" * 30])
def test_a_source_date_epoch_that_is_no_count_of_seconds_is_the_users_error(text: str) -> None:
    with pytest.raises(SpecError, match="SOURCE_DATE_EPOCH must be"):
        created_text({"SOURCE_DATE_EPOCH": text})


def test_a_tolerance_has_exactly_one_unit() -> None:
    for wrong in ({}, {"atol": 0.1, "max_abs_error_steps": 2}):
        with pytest.raises(ValidationError, match="either max_abs_error_steps or atol"):
            Tolerance(min_argmax_agreement=1.0, **wrong)


def test_steps_become_units_of_the_output() -> None:
    output = TensorSpec(name="y", shape=(1, 3), dtype="int8", scale=0.5, zero_point=0)
    steps = Tolerance(max_abs_error_steps=3, min_argmax_agreement=1.0)
    assert steps.limit(output) == 1.5


def test_a_label_is_one_line() -> None:
    for label in ("two\nlines", "bell\x07", "line\u2028separator"):
        with pytest.raises(ValidationError, match="one line"):
            facts(labels=("fine", label))


def test_a_manifest_survives_its_file(tmp_path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    manifest = read_json(Manifest, folder / MANIFEST)
    assert to_json(manifest) == (folder / MANIFEST).read_bytes()
    assert manifest.labels == ("cat", "dog", "très loin")
    assert manifest.status == "passed"


def _broken(folder, **changes: object) -> dict[str, object]:
    value = read_json(Manifest, folder / MANIFEST).model_dump()
    return {**value, **changes}


def test_a_bundle_without_sparse_weights_and_float_layers_has_the_identity_that_it_always_had() -> (
    None
):
    stated = facts().model_dump(mode="json")
    assert stated.pop("sparsity") is None
    assert stated.pop("float_layers") == []
    assert stated.pop("why_fp32") is None
    assert stated.pop("outputs") == "logits"
    assert stated["latency"].pop("judged") is None
    assert stated["latency"].pop("unreliable") == []
    assert identity(facts(), "0" * 64) == sha256_bytes(to_json_text([stated, "0" * 64]))
    sparse = SparseWeights(pattern="2:4", layers=2, of_layers=3, speed="not run")
    other = facts().model_copy(update={"sparsity": sparse})
    mixed = facts(float_layers=("stem",))
    float_one = facts(why_fp32="INT8 was refused: too coarse; FP32 ships")
    doubted = facts(latency=facts().latency.model_copy(update={"unreliable": ("busy",)}))
    for changed in (other, mixed, float_one, doubted):
        assert identity(changed, "0" * 64) != identity(facts(), "0" * 64)


def test_a_manifest_that_contradicts_itself_is_refused(tmp_path) -> None:
    folder = make_bundle(tmp_path / "bundle")
    whole = read_json(Manifest, folder / MANIFEST)
    files = whole.model_dump()["files"]
    model = whole.model.model_dump()
    steps = {"n": 8, "tolerance": {"max_abs_error_steps": 2, "min_argmax_agreement": 1.0}}
    cases = {
        "best-effort exactly when": {"failed_gates": ("latency",)},
        "the digest of the model": {"model": {**model, "sha256": "0" * 64}},
        "must be relative": {"model": {**model, "path": "../model"}},
        "one input and one output": {"model": {**model, "outputs": ()}},
        "files must list": {"files": files[1:]},
        "where case is ignored": {"files": (*files, {**files[0], "path": "readme.MD"})},
        "needs a quantised output": {"golden": steps},
        "created": {"created": "yesterday"},
        "license": {"license": "<script>"},
    }
    for message, change in cases.items():
        with pytest.raises(ValidationError, match=message):
            Manifest(**_broken(folder, **change))

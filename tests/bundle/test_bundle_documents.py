"""What a bundle says about itself to people and to programs: schemas, card, licence, bill of materials, reproducibility record."""

from __future__ import annotations

import json
import re
import subprocess

import jsonschema
import pytest
import yaml
from bundle_fixture import facts, make_bundle, tflite_bundle
from click.testing import CliRunner
from pydantic import ValidationError
from repo import REPO
from report_fixture import make_report

from edgeprune.bundle.integrity import sums_text
from edgeprune.bundle.manifest import Judged, Manifest, Quality, identity
from edgeprune.bundle.repro import Repro, git_state, repro_files, scrub
from edgeprune.bundle.schemas import SCHEMAS, schema_files
from edgeprune.bundle.verify import verify
from edgeprune.cli import main as cli
from edgeprune.pipeline.stages.finish import for_bundle
from edgeprune.records.base import read_json
from edgeprune.records.files import to_json
from edgeprune.records.workload import Workload
from edgeprune.report import render_html

SCHEMA_FOLDER = REPO / "docs" / "schemas"
TEST = Quality(metric="accuracy", split="test", n=500, dense=0.9, shipped=0.89)


def _schema(name: str) -> dict[str, object]:
    found = json.loads((SCHEMA_FOLDER / name).read_bytes())
    jsonschema.Draft202012Validator.check_schema(found)
    assert isinstance(found, dict)
    return found


def test_the_published_schemas_are_those_of_the_records():
    """When this fails: edgeprune bundle schema docs/schemas."""
    assert {p.name: p.read_bytes() for p in SCHEMA_FOLDER.iterdir()} == schema_files()


@pytest.mark.parametrize(
    "changes",
    [{}, {"eight_bit": True}, {"failed_gates": ("latency",)}, {"test": TEST, "license": None}],
)
def test_every_written_file_follows_its_schema(tmp_path, changes):
    folder = make_bundle(tmp_path / "bundle", **changes)
    names = ("manifest.json", "preprocess.json", "golden/tolerance.json")
    for path, schema in zip(names, SCHEMAS, strict=False):
        jsonschema.validate(json.loads((folder / path).read_bytes()), _schema(schema))
    report = json.loads(to_json(verify(folder)))
    jsonschema.validate(report, _schema("verify-report.schema.json"))


def test_the_schema_refuses_what_the_program_refuses(tmp_path):
    folder = make_bundle(tmp_path / "bundle")
    schema = _schema("bundle-manifest.schema.json")
    whole = json.loads((folder / "manifest.json").read_bytes())
    for change in (
        {"surprise": 1}, {"status": "fine"}, {"license": "<script>"}, {"schema_version": 2},
        {"manifest_id": "x"}, {"labels": []}, {"quality": {}},
    ):  # fmt: skip
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**whole, **change}, schema)
    for key in ("model", "files", "manifest_id"):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({k: v for k, v in whole.items() if k != key}, schema)


def test_the_card_gives_accuracy_with_split_and_n_and_latency_with_its_stamp(tmp_path):
    text = (make_bundle(tmp_path / "bundle", test=TEST) / "MODEL_CARD.md").read_text()
    assert "accuracy on the development" not in text
    assert (
        "accuracy on the test split (n = 1000): 90.50% shipped, 91.00% dense, -0.50 points" in text
    )
    assert (
        "accuracy on the test split (n = 500): 89.00% shipped, 90.00% dense, -1.00 points" in text
    )
    assert "Median 1.5 ms, p90 1.75 ms with 1 thread(s) on this-machine;\nstand-in" in text
    assert "The latency was not measured on the board." in text
    assert "how they were labelled: not stated" in text


def test_unreliable_times_are_the_first_thing_in_every_document(tmp_path):
    why = "9 of 20 blocks that were timed together were disturbed"
    judged = Judged(value=0.52, low=0.51, high=0.53, limit=0.55, unit="of dense int8")
    latency = facts().latency.model_copy(update={"unreliable": (why,), "judged": judged})
    folder = make_bundle(tmp_path / "b", latency=latency)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["status"] == "passed-on-unreliable-times"
    assert manifest["latency"]["unreliable"] == [why]
    readme, card = ((folder / n).read_text() for n in ("README.md", "MODEL_CARD.md"))
    assert readme.startswith("# tiny-net - UNRELIABLE TIMES, measure again")
    assert f"| unreliable times | {why} |" in readme
    assert card.startswith(f"# Model card: tiny-net\n\n**Unreliable times.** {why}. Measure again")
    for text in (readme, card):
        found = (
            "0.52 of dense int8, between 0.51 and 0.53; judged on the upper end, the limit is 0.55"
        )
        assert found in text
    assert "stand-in, unreliable, 1 thread(s)" in (folder / "sbom/bom.cdx.json").read_text()
    report = verify(folder)
    assert report.ok
    assert report.levels[0].detail == (
        f"tiny-net for rpi4, passed-on-unreliable-times, unreliable times: {why}"
    )
    missed = make_bundle(tmp_path / "c", latency=latency, failed_gates=("latency",))
    assert read_json(Manifest, missed / "manifest.json").status == "best-effort"
    title = (missed / "README.md").read_text().splitlines()[0]
    assert "BEST EFFORT, gates missed: latency - UNRELIABLE TIMES" in title


def test_a_status_that_hides_unreliable_times_is_refused_and_earlier_manifests_still_read(tmp_path):
    latency = facts().latency.model_copy(update={"unreliable": ("busy",)})
    folder = make_bundle(tmp_path / "b", latency=latency)
    value = json.loads((folder / "manifest.json").read_bytes())
    with pytest.raises(ValidationError, match="must be passed-on-unreliable-times"):
        Manifest.model_validate_json(json.dumps({**value, "status": "passed"}))
    earlier = make_bundle(tmp_path / "earlier")
    value = json.loads((earlier / "manifest.json").read_bytes())
    del value["latency"]["judged"], value["latency"]["unreliable"]
    (earlier / "manifest.json").write_text(json.dumps(value))
    (earlier / "SHA256SUMS").write_bytes(sums_text(earlier))
    assert verify(earlier).ok


def test_the_card_says_what_is_missing(tmp_path):
    poor = Quality(metric="agreement", split="development", n=10, dense=1.0, shipped=0.9)
    folder = make_bundle(tmp_path / "b", quality=poor, license=None, failed_gates=("latency",))
    text = (folder / "MODEL_CARD.md").read_text()
    for said in ("There was no test split", "agreement with the dense model is not accuracy"):
        assert said in text
    assert "Gates missed: latency." in text
    assert text.rstrip().endswith("## License\n\nnot stated")


def test_a_bundle_says_that_its_outputs_are_probabilities(tmp_path) -> None:
    plain, said = (
        make_bundle(tmp_path / kind, outputs=kind) for kind in ("logits", "probabilities")
    )
    for name in ("MODEL_CARD.md", "README.md"):
        assert "probabilities" in (said / name).read_text()
        assert "probabilities" not in (plain / name).read_text()
    manifests = [read_json(Manifest, folder / "manifest.json") for folder in (plain, said)]
    assert [m.outputs for m in manifests] == ["logits", "probabilities"]
    assert len({identity(m.facts(), m.source_sha256) for m in manifests}) == 2
    assert verify(said).ok


def test_the_licence_is_the_stated_one_or_honestly_none(tmp_path):
    stated = make_bundle(tmp_path / "stated")
    assert (stated / "LICENSE").read_text().startswith("SPDX-License-Identifier: Apache-2.0\n")
    assert "samples/ are part of edgeprune and licensed under Apache-2.0" in (
        stated / "NOTICE"
    ).read_text().replace("\n", " ")
    silent = make_bundle(tmp_path / "silent", license=None)
    assert (silent / "LICENSE").read_text().startswith("License of the model: not stated.")
    assert (
        "licenses"
        not in json.loads((silent / "sbom/bom.cdx.json").read_bytes())["metadata"]["component"]
    )


def test_a_licence_in_edgeprune_yaml_is_an_spdx_identifier():
    assert Workload(model="a.py:b", data="d", license="MIT OR Apache-2.0").license
    with pytest.raises(ValidationError, match="license"):
        Workload(model="a.py:b", data="d", license="see <http://example.org>")


def test_the_bill_of_materials_describes_the_model_and_what_it_needs(tmp_path):
    folder = make_bundle(tmp_path / "bundle", test=TEST, version="1.2")
    manifest = read_json(Manifest, folder / "manifest.json")
    bom = json.loads((folder / "sbom/bom.cdx.json").read_bytes())
    assert (bom["bomFormat"], bom["specVersion"], bom["version"]) == ("CycloneDX", "1.6", 1)
    model = bom["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == (
        "machine-learning-model", "tiny-net", "1.2",
    )  # fmt: skip
    assert model["hashes"] == [{"alg": "SHA-256", "content": manifest.model.sha256}]
    assert model["licenses"] == [{"expression": "Apache-2.0"}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert {m["slice"] for m in metrics} >= {"test split, n = 1000", "test split, n = 500"}
    assert {
        "type": "latency, median",
        "value": "1.5 ms",
        "slice": "this-machine, stand-in, 1 thread(s)",
    } in metrics
    (runtime,) = bom["components"]
    assert runtime["purl"] == "pkg:pypi/onnxruntime@1.0"
    assert bom["dependencies"][0] == {"ref": "model", "dependsOn": ["runtime"]}
    assert {d["ref"] for d in bom["dependencies"]} == {model["bom-ref"], runtime["bom-ref"]}
    assert len({d["ref"] for d in bom["dependencies"]}) == len(bom["dependencies"])


def test_the_bill_of_materials_follows_the_official_schema(tmp_path):
    validation = pytest.importorskip(
        "cyclonedx.validation.json", reason="cyclonedx-python-lib brings the schema"
    )
    from cyclonedx.schema import SchemaVersion

    for name, changes in (("full", {"test": TEST, "version": "1"}), ("bare", {"license": None})):
        text = (make_bundle(tmp_path / name, **changes) / "sbom/bom.cdx.json").read_text()
        assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("edgeprune deploy --weights /home/ann/nets/best.safetensors", "edgeprune deploy --weights best.safetensors"),
        ("--run=/tmp/x/run --data 'C:\\Users\\ann\\data'", "--run=run --data 'data'"),
        ("~/nets/net.py:build ./net.py:build nets/net.py:build", "net.py:build ./net.py:build nets/net.py:build"),
        ("--latency 60% --target rpi4", "--latency 60% --target rpi4"),
        ("a / b", "a . b"),
    ],
)  # fmt: skip
def test_absolute_paths_keep_their_last_part_alone(text: str, clean: str):
    assert scrub(text) == clean


def test_the_reproducibility_record_has_no_machine_in_it(tmp_path):
    workload = Workload(
        model="/home/ann/net.py:build", data="/data/secret-customer/faces", weights="w.safetensors"
    )
    record = Repro(
        command="edgeprune deploy --data /data/secret-customer/faces",
        seed=3,
        data_digest="d",
        model_digest="m",
        plan_digest="p",
        versions={"python": "3.11.2"},
        target={"name": "rpi4"},
    )
    files = repro_files(workload, record)
    assert not [
        path for path, content in files.items() if b"ann" in content or b"secret" in content
    ]
    config = yaml.safe_load(files["repro/edgeprune.yaml"])
    assert (config["model"], config["data"]) == ("net.py:build", "faces")
    value = json.loads(files["repro/repro.json"])
    jsonschema.validate(value, _schema("bundle-repro.schema.json"))
    assert (value["seed"], value["git_commit"]) == (3, None)


def test_the_commit_is_that_of_the_users_folder_if_there_is_one(tmp_path):
    assert git_state(tmp_path) == (None, None)
    author = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    (tmp_path / "net.py").write_text("x = 1\n")
    try:
        for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
            subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    commit, changed = git_state(tmp_path)
    assert commit is not None
    assert len(commit) == 40
    assert changed is False
    (tmp_path / "net.py").write_text("x = 2\n")
    assert git_state(tmp_path) == (commit, True)


def test_facts_with_repro_files_keep_them_under_digest(tmp_path):
    from bundle_fixture import expected, images, onnx_file

    from edgeprune.bundle.write import Payload, write_bundle

    artifact = onnx_file(tmp_path / "m.onnx")
    payload = Payload(
        artifact,
        tmp_path / "m.onnx",
        images(),
        expected(images()),
        repro={"repro/repro.json": b"{}\n"},
    )
    folder = write_bundle(tmp_path / "bundle", facts(), payload)
    listed = {f.path: f.role for f in read_json(Manifest, folder / "manifest.json").files}
    assert listed["repro/repro.json"] == "repro"


def test_the_page_shows_what_verify_prints(tmp_path):
    """Levels and words are those of a run now; figures may differ on another processor."""
    page = (SCHEMA_FOLDER.parent / "bundle.md").read_text()
    quoted = re.search(r"\$ edgeprune verify bundle\n(.*?)```", page, re.S)
    assert quoted is not None
    done = CliRunner().invoke(cli.cli, ["verify", str(tflite_bundle(tmp_path))])

    def words(text: str) -> str:
        return re.sub(r"[0-9.]+", "N", text)

    assert words(done.stdout) == words(quoted[1])


def test_the_report_in_a_bundle_has_nothing_that_another_run_of_the_command_would_change():
    found = make_report().model_copy(update={"command": "edgeprune deploy --run /home/ann/run"})
    again = found.model_copy(
        update={
            "peak_memory_bytes": 7,
            "stages": tuple(s.model_copy(update={"cached": not s.cached}) for s in found.stages),
        }
    )
    assert for_bundle(found) == for_bundle(again)
    assert for_bundle(found).command == "edgeprune deploy --run run"
    assert "in all, peak memory" not in render_html(for_bundle(found)).decode()


def test_an_int8_file_for_onnxruntime_says_which_session_option_its_sums_need(tmp_path):
    said = {
        eight_bit: "x64quantprecision"
        in (make_bundle(tmp_path / f"{eight_bit}", eight_bit=eight_bit) / "README.md").read_text()
        for eight_bit in (True, False)
    }
    assert said == {True: True, False: False}

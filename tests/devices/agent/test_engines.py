"""TensorRT on the board, with a pretended JetPack: built once, built again when anything changed, and the fastest that holds is kept."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from fakejetson import as_environment, calls, make
from tinynet import trained

from edgeprune import formats
from edgeprune.devices.agent import engines, gpu, runtimes
from edgeprune.devices.agent.wire import Refused
from edgeprune.devices.board import open_board
from edgeprune.devices.plans import TimingPlan
from edgeprune.devices.timing.measure import ModelFile, measure
from edgeprune.errors import DeviceError
from edgeprune.records.device import Device

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
FORMAT = formats.load("tensorrt")
QUICK = TimingPlan(rounds=4, block_ms=2, min_runs=3, max_runs=20, warmup_ms=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The tiny net as the two files that ship for a Jetson, and inputs."""
    folder = tmp_path_factory.mktemp("net")
    x = np.random.default_rng(0).random((16, 1, 24, 24), np.float32)
    FORMAT.export(trained(), x[:1], folder / "fp32.onnx")
    FORMAT.quantize(folder / "fp32.onnx", x, folder / "int8.onnx")
    return {name: (folder / f"{name}.onnx").read_bytes() for name in ("fp32", "int8")}, x


@pytest.fixture
def jetson(tmp_path, monkeypatch):
    """A function that changes what the pretended JetPack does; its engines lie in ``engines``."""
    import sys

    for name, value in make(tmp_path / "jetpack").items():
        joined = [value, os.environ.get(name, "")] if name in ("PATH", "PYTHONPATH") else [value]
        monkeypatch.setenv(name, os.pathsep.join(part for part in joined if part))
    monkeypatch.syspath_prepend(str(tmp_path / "jetpack" / "site"))
    monkeypatch.setenv(engines.FOLDER_VARIABLE, str(tmp_path / "engines"))

    def change(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"FAKE_TRT_{name}", value)
        sys.modules.pop("tensorrt", None)  # its version is read on import
        return tmp_path

    yield change
    sys.modules.pop("tensorrt", None)


def test_an_engine_is_built_once_and_built_again_when_tensorrt_changed(files, jetson):
    content = files[0]["int8"]
    folder = jetson(VERSION="8.6.1")
    place = str(folder / "engines")
    first = engines.obtain(content, place)[1]
    again = engines.obtain(content, place)[1]
    assert (first["is_new"], again["is_new"]) == (True, False)
    assert len(calls(folder)) == 2  # mixed and int8, each built once
    assert all("--useSpinWait" in call and "--noDataTransfers" in call for call in calls(folder))
    jetson(VERSION="10.3.0")
    newer = engines.obtain(content, place)[1]
    assert newer["is_new"]
    assert newer["fingerprint"]["tensorrt"] == "10.3.0"
    assert len(calls(folder)) == 4
    assert len(list((folder / "engines").glob("*.engine"))) == 1  # in the place of the old one


def test_a_kept_engine_that_was_damaged_or_is_of_other_flags_is_built_again(files, jetson):
    content, folder = files[0]["fp32"], jetson()
    place = str(folder / "engines")
    engines.obtain(content, place, quick=True)
    (kept,) = (folder / "engines").glob("*.engine")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert engines.obtain(content, place, quick=True)[1]["is_new"]
    sparse = engines.obtain(content, place, quick=True, sparse=True)[1]
    assert sparse["is_new"]
    assert "--sparsity=enable" in calls(folder)[-1]
    record = next((folder / "engines").glob("*.json"))
    record.write_text("{")
    engines.obtain(content, place, quick=True)  # an unreadable record is no record


@pytest.mark.parametrize(
    ("kind", "variables", "kept", "words"),
    [
        ("int8", {"MS": '{"mixed": 1.0, "int8": 2.0}'}, "mixed", "mixed: 1 ms"),
        ("int8", {"MS": '{"mixed": 2.0, "int8": 1.0}'}, "int8", "int8: 1 ms"),
        ("int8", {"MS": '{"mixed": 1.0, "int8": 2.0}', "OFF": "mixed"}, "int8", "mixed: 1 ms, not kept"),
        ("fp32", {"MS": '{"fp16": 1.0, "fp32": 2.0}'}, "fp16", "fp16: 1 ms"),
        ("fp32", {"MS": '{"fp16": 1.0, "fp32": 2.0}', "OFF": "fp16"}, "fp32", "fp16: 1 ms, not kept"),
        ("int8", {"MEMORY": "mixed"}, "int8", "not built: mixed: building the engine ran out of memory"),
        ("int8", {"CV": "3.1"}, "mixed", "varies by 3.1 % (over 2.5 %)"),
    ],
)  # fmt: skip
def test_the_fastest_precision_whose_answer_holds_is_kept(
    files, jetson, kind, variables, kept, words
):
    folder = jetson(**variables)
    known = engines.obtain(files[0][kind], str(folder / "engines"))[1]
    assert known["precision"] == kept
    assert any(words in note for note in known["notes"]), known["notes"]


@pytest.mark.parametrize("kind", ["int8", "fp32"])
@pytest.mark.parametrize("has_trtexec", [True, False])
def test_tensorrt_11_knows_no_precision_flags_and_builds_what_the_file_says(
    files, jetson, monkeypatch, kind, has_trtexec
):
    folder = jetson(VERSION="11.0.0")
    if not has_trtexec:
        monkeypatch.setattr(engines.trtexec, "find", lambda: None)
    _, known = engines.obtain(files[0][kind], str(folder / "engines"))
    assert known["precision"] == "typed"
    assert "runs in FP32" in known["notes"][-1]
    assert len(calls(folder)) == has_trtexec
    assert not {"--int8", "--fp16"} & {flag for call in calls(folder) for flag in call}


def test_a_type_that_numpy_lacks_is_named():
    from types import SimpleNamespace

    known = SimpleNamespace(float32="a", int64="b")
    assert [gpu._type_name(known, dtype) for dtype in "ab"] == ["float32", "int64"]
    with pytest.raises(Refused, match="of type fp8, which numpy does not have"):
        gpu._type_name(known, "fp8")


def test_a_board_without_memory_for_any_build_is_told_so_in_one_line(files, jetson):
    folder = jetson(MEMORY="mixed,int8")
    with pytest.raises(Refused, match="mixed: building the engine ran out of memory") as caught:
        engines.obtain(files[0]["int8"], str(folder / "engines"))
    assert caught.value.kind == "memory"
    assert "\n" not in str(caught.value)
    assert not list((folder / "engines").glob("*.engine"))


def test_too_little_free_memory_is_refused_before_anything_is_started(files, jetson, monkeypatch):
    folder = jetson()
    monkeypatch.setattr(engines, "available_bytes", lambda: 700 << 20)
    with pytest.raises(Refused, match=r"needs \d+ MiB of free memory, but 700 MiB are free"):
        engines.obtain(files[0]["int8"], str(folder / "engines"))
    assert calls(folder) == []


def test_the_workspace_is_what_is_free_within_its_cap():
    base = engines.BASE_BYTES + engines.COPIES * 1000
    assert engines.workspace(1000, base + (200 << 20)) == 200 << 20
    assert engines.workspace(1000, base + (5 << 30)) == engines.MAX_WORKSPACE_BYTES
    assert engines.workspace(1000, None) == engines.MIN_WORKSPACE_BYTES
    with pytest.raises(Refused, match="end other programs"):
        engines.workspace(1000, base + engines.MIN_WORKSPACE_BYTES - 1)


def test_without_trtexec_the_package_builds(files, jetson, monkeypatch):
    folder = jetson()
    monkeypatch.setattr(engines.trtexec, "find", lambda: None)
    _, known = engines.obtain(files[0]["int8"], str(folder / "engines"), sparse=True)
    assert known["precision"] in ("mixed", "int8")
    assert known["ms"] > 0
    assert (folder / "engines" / "timing.cache").read_bytes() == b"timings"
    with pytest.raises(Refused, match="cannot parse the model: no operator that this parser knows"):
        engines.obtain(b"nothing that it knows", str(folder / "engines"), quick=True)


def test_a_model_on_the_gpu_answers_as_the_file_does(files, jetson):
    import onnxruntime

    jetson()
    content, x = files[0]["int8"], files[1]
    model = runtimes.open_model(content, "tensorrt", 1, True)
    before = model.answer()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    expected = np.concatenate([session.run(None, {"input": x[i : i + 1]})[0] for i in range(16)])
    np.testing.assert_allclose(runtimes.infer(model, x), expected, atol=1e-5)
    assert model.answer() == before  # the input that is timed is there again


def test_a_python_without_the_package_says_where_jetpack_has_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Refused, match="--system-site-packages") as caught:
        gpu.package()
    assert caught.value.kind == "runtime"
    with pytest.raises(Refused, match="system-site-packages"):
        runtimes.open_model(b"x", "tensorrt", 1, True)


def test_sparse_kernels_are_tried_where_the_gpu_has_them():
    assert [engines.has_sparse_cores(sm) for sm in ("8.7", "10.1", "7.2", None)] == [
        True,
        True,
        False,
        False,
    ]


def test_the_oldest_engines_go_when_there_are_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "QUOTA_BYTES", 3500)
    store = engines.Store(str(tmp_path))
    for number in range(5):
        store.put(f"k{number}", bytes(1000), {"fingerprint": number})
        os.utime(store.path(f"k{number}", ".json"), (number, number))
    assert store.get("k4", 4) is not None
    assert store.get("k0", 0) is None
    assert len(list(tmp_path.glob("*.engine"))) <= 3


def test_a_whole_board_times_engines_and_says_in_what_they_were_built(files, jetson, tmp_path):
    folder = jetson(MS='{"mixed": 1.0, "int8": 2.0, "fp16": 1.5, "fp32": 3.0}')
    device = Device(
        transport="local",
        targets=("jetson-orin-nano",),
        stand_in=True,
        workdir=str(tmp_path / "w"),
        lease_file=str(tmp_path / "lock"),
    )
    models = [
        ModelFile(n, c, n, engines.hashlib.sha256(c).hexdigest()) for n, c in files[0].items()
    ]
    wanted = {
        n: v
        for n, v in os.environ.items()
        if n.startswith(("FAKE_TRT", "CUDA_HOME", "PATH", "PYTHONPATH"))
    }
    as_environment(tmp_path / "w", wanted)
    with open_board("jetson", device) as board:
        assert board.runtime_version("tensorrt") == "8.6.1"
        found = measure(board, models, runtime="tensorrt", threads=1, plan=QUICK)
        many = board.load_many(dict(files[0]), runtime="tensorrt", threads=1)
        y = None
        board.load("int8", files[0]["int8"], runtime="tensorrt", threads=1)
        y = board.infer("int8", files[1])
    assert [m.median_ms > 0 for m in found] == [True, True]
    assert any("int8: built in mixed" in note for note in found[0].notes)
    assert y.shape == (16, 4)
    assert all(not isinstance(model, str) for model in many.values())
    built = [call for call in calls(folder) if "--skipInference" in call]
    assert len(built) == 2  # single kernels are built once and not timed by trtexec
    assert len(calls(folder)) == 6  # and nothing was built twice


def test_a_board_without_the_package_is_told_how_to_have_it(tmp_path):
    device = Device(
        transport="local",
        targets=("jetson-orin-nano",),
        stand_in=True,
        workdir=str(tmp_path / "w"),
        lease_file=str(tmp_path / "lock"),
    )
    with (
        open_board("jetson", device) as board,
        pytest.raises(DeviceError, match="--system-site-packages") as caught,
    ):
        board.runtime_version("tensorrt")
    assert caught.value.hint is None  # pip would not help

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_fixture import LABELS, PREPROCESS, expected, facts, images, make_bundle, tflite_file

from edgeprune.bundle.load import load
from edgeprune.bundle.on_board import RuntimeMissing
from edgeprune.bundle.write import Payload, write_bundle, zip_path
from edgeprune.errors import IntegrityError, ModelError
from edgeprune.workload.dataset import model_input


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def test_a_loaded_bundle_answers_raw_images(folder: Path) -> None:
    raw = images(20, seed=1)
    with load(folder) as bundle:
        assert bundle.labels == LABELS
        assert bundle.manifest.name == "tiny-net"
        scores = bundle.predict(raw)
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected(raw), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(bundle.predict(raw[:1]), scores[:1])


def test_float_samples_go_in_as_the_torch_model_wanted_them(folder: Path) -> None:
    raw = images(4, seed=2)
    with load(str(zip_path(folder))) as bundle:
        scores = bundle.predict(model_input(raw, PREPROCESS))
        np.testing.assert_allclose(scores, expected(raw), rtol=1e-4, atol=1e-4)


def test_no_samples_give_no_answers(folder: Path) -> None:
    with load(folder) as bundle:
        assert bundle.predict(images(8)[:0]).shape == (0, 3)


def test_an_int8_tflite_bundle_quantises_and_turns_the_layout_for_its_caller(
    tmp_path: Path,
) -> None:
    raw = images()
    golden = np.clip(np.rint(expected(raw) / 0.25), -128, 127).astype(np.float32) * np.float32(0.25)
    artifact = tflite_file(tmp_path / "m.tflite")
    payload = Payload(artifact, tmp_path / "m.tflite", raw, golden)
    with load(write_bundle(tmp_path / "bundle", facts("litert"), payload)) as bundle:
        assert np.abs(bundle.predict(raw) - golden).max() <= 0.75
        assert np.abs(bundle.predict(raw) - expected(raw)).max() < 1.0


@pytest.mark.parametrize(
    "wrong",
    [
        images()[:, :3],
        images()[0],
        images()[..., 0],
        images().astype(np.int32),
        np.full((1, 3, 4, 4), np.nan, np.float32),
        np.zeros((2, 4, 4, 3), np.float32),
    ],
)
def test_samples_that_do_not_fit_are_refused_and_the_bundle_lives_on(
    folder: Path, wrong: np.ndarray
) -> None:
    with load(folder) as bundle:
        with pytest.raises(ModelError):
            bundle.predict(wrong)
        assert bundle.predict(images()).shape == (8, 3)


@pytest.mark.parametrize("name", ["models/model.fp32.onnx", "labels.txt", "manifest.json"])
def test_a_tampered_bundle_is_not_loaded(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    with pytest.raises(IntegrityError):
        load(folder)


def test_a_missing_runtime_names_what_to_install(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", runtime="tensorrt")
    with pytest.raises(RuntimeMissing, match=r"install tensorrt 1\.0 there"):
        load(folder)


def test_what_is_no_batch_of_samples_is_one_line_with_the_shape_that_was_given(
    folder: Path,
) -> None:
    raw = images()
    side = list(raw.shape[1:3])
    with load(folder) as bundle:
        for wrong in (torch.from_numpy(raw), [list(image) for image in raw], "images"):
            with pytest.raises(ModelError, match="numpy array with a batch dimension, but are"):
                bundle.predict(wrong)
        floats = model_input(raw, PREPROCESS)
        with pytest.raises(ModelError) as error:
            bundle.predict(floats.transpose(0, 2, 3, 1))
        channels = floats.shape[1]
        assert f"must be [N, {channels}, {side[0]}, {side[1]}]" in error.value.message
        assert f"but are [{len(raw)}, {side[0]}, {side[1]}, {channels}]" in error.value.message
        with pytest.raises(ModelError) as error:
            bundle.predict(raw[0])
        assert error.value.hint == "one image has a batch dimension as well: image[None]"

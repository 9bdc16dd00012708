"""Pixels of image files of every depth and mode, and what is said of what they lose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgeprune.errors import ModelError
from edgeprune.records.workload import Preprocess
from edgeprune.workload.data import Data, from_value, load_data
from edgeprune.workload.image_files import Losses, read_image
from edgeprune.workload.init import look_at

GREY, RGB = Preprocess(color="grey"), Preprocess()
SIZE = (2, 3)


def read(folder: Path, preprocess: Preprocess = RGB) -> Data:
    return load_data(".", folder, preprocess=preprocess, labels=None)


def fill(folder: Path, suffix: str = "png", mode: str = "RGB", count: int = 4) -> list[Path]:
    paths = [folder / f"{i}.{suffix}" for i in range(count)]
    for path in paths:
        Image.new(mode, (3, 2)).save(path)
    return paths


def line(data: Data, words: str) -> str:
    (found,) = [note for note in data.notes if words in note]
    return found


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("color", ["grey", "rgb"])
def test_sixteen_bits_keep_the_high_eight(tmp_path: Path, suffix: str, color: str) -> None:
    values = np.array([[0, 255, 256], [30_000, 65_280, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    losses = Losses()
    pixels = read_image(tmp_path / f"a.{suffix}", SIZE, color, losses)
    high = (values // 256).astype(np.uint8)
    expected = high if color == "grey" else np.repeat(high[..., None], 3, axis=2)
    assert (pixels == expected).all()
    assert (losses.deep, losses.highest) == (1, 65_535)


def test_big_endian_and_colour_files_of_sixteen_bits_are_read_alike(tmp_path: Path) -> None:
    # A TIFF written by hand: big-endian, 16-bit grey, one strip of 3 x 1 values.
    entries = [
        (256, 3),
        (257, 1),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, 6),
    ]
    raw = (
        b"MM\0*"
        + (14).to_bytes(4, "big")
        + b"\x01\x00\x80\x00\xff\xff"
        + len(entries).to_bytes(2, "big")
    )
    for tag, value in entries:
        raw += (
            tag.to_bytes(2, "big")
            + b"\0\x03"
            + (1).to_bytes(4, "big")
            + value.to_bytes(2, "big")
            + b"\0\0"
        )
    (tmp_path / "a.tif").write_bytes(raw + bytes(4))
    assert read_image(tmp_path / "a.tif", (1, 3), "grey").tolist() == [[1, 128, 255]]


def test_the_note_on_sixteen_bits_has_the_count_and_the_highest_value(tmp_path: Path) -> None:
    for i, top in enumerate([300, 40_000, 2_000]):
        Image.fromarray(np.array([[0, top]], np.uint16)).save(tmp_path / f"{i}.png")
    data = read(tmp_path, GREY)
    assert "value >> 8: 3; their highest value is 40000, which became 156" in line(data, "16 bits")


def test_sixteen_bits_that_hold_eight_are_refused_instead_of_going_black(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.array([[0, 255]], np.uint16)).save(tmp_path / f"{i}.png")
    with pytest.raises(ModelError, match=r"more than 8 of them, but the highest value .* is 255"):
        read(tmp_path, GREY)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.array([[0.5, 1]], np.float32), "floating-point pixels, whose range is not known"),
        (np.array([[-1, 9]], np.int32), "has -1 to 9"),
        (np.array([[0, 70_000]], np.int32), "has 0 to 70000"),
    ],
)
def test_pixels_of_an_unknown_range_are_refused_by_name(
    tmp_path: Path, pixels: np.ndarray, words: str
) -> None:
    fill(tmp_path)
    Image.fromarray(pixels).resize((3, 2), Image.Resampling.NEAREST).save(tmp_path / "odd.tif")
    with pytest.raises(ModelError, match=rf"odd\.tif.*{words}"):
        read(tmp_path, GREY)


def test_each_loss_is_one_line_with_its_count(tmp_path: Path) -> None:
    fill(tmp_path, count=5)
    Image.new("RGBA", (3, 2), (9, 9, 9, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (3, 2), (9, 9)).save(tmp_path / "half.png")
    Image.new("RGBA", (3, 2), (9, 9, 9, 255)).save(tmp_path / "solid.png")
    Image.new("P", (3, 2)).save(tmp_path / "palette.png", transparency=0)
    Image.new("CMYK", (3, 2)).save(tmp_path / "print.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    for suffix in ("jpg", "webp", "png"):
        Image.new("RGB", (3, 2)).save(tmp_path / f"turned.{suffix}", exif=turned)
    upright = Image.Exif()
    upright[0x0112] = 1
    Image.new("RGB", (3, 2)).save(tmp_path / "upright.jpg", exif=upright)
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    for suffix in ("webp", "tif", "png"):
        frames[0].save(tmp_path / f"film.{suffix}", save_all=True, append_images=frames[1:])
    data = read(tmp_path)
    assert line(data, "alpha channel").endswith(": 3")
    assert line(data, "CMYK").endswith(": 1")
    assert line(data, "rotation tag").endswith(": 3")
    assert line(data, "several frames").endswith(": 3")


def test_plain_images_lose_nothing_that_is_said(tmp_path: Path) -> None:
    fill(tmp_path, "png")
    fill(tmp_path, "jpg", "L")
    assert not any(": 4" in note for note in read(tmp_path).notes)


def test_a_truncated_file_of_any_type_is_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "ppm", "bmp", "tif", "webp"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ModelError, match=rf"cut\.{suffix} cannot be read as an image"):
            read_image(path, (40, 40), "rgb")


def test_init_takes_sixteen_bits_for_grey_and_measures_the_high_eight(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((2, 3), 0x8000, np.uint16)).save(tmp_path / f"{i}.png")
    seen = look_at(".", tmp_path)
    assert (seen.color, seen.mean) == ("grey", (round(128 / 255, 4),))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.full((5, 4, 4), 200, np.int64), "astype('uint8') for pixels of 0-255"),
        (np.full((5, 4, 4), 4095, np.uint16), "highest value is 4095: use (x >> 8)"),
        (np.full((5, 4, 4), -3, np.int16), "values are -3 to -3: scale them"),
        (np.ones((5, 4, 4), bool), "255 * x.astype('uint8')"),
    ],
)
def test_arrays_of_other_whole_numbers_say_how_to_keep_them(x: np.ndarray, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        from_value(x, preprocess=GREY, labels=None, where="data")
    assert words in (caught.value.hint or "")

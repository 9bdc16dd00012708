"""Pixels of image files in 8 bits, and what is lost on the way there, counted. No torch here.

Notation: ``H`` and ``W`` height and width.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import ModelError
from edgeprune.workload.factories import one_line

ORIENTATION = 0x0112  # the EXIF tag of a camera's rotation; 1 is upright
_ALPHA, _COLOUR, _TURNED, _FRAMES = "alpha", "colour", "turned", "frames"
_SAID = {
    _ALPHA: "images whose alpha channel was dropped, so that what it hides is seen",
    _COLOUR: "images in CMYK that were converted without their colour profile",
    _TURNED: "images with a camera's rotation tag, which was not applied",
    _FRAMES: "images with several frames or pages, of which the first was read",
}


@dataclass
class Losses:
    """What the files that were read had and the pixels do not: counts by kind, and 16-bit values.

    ``deep`` counts files of 16 bits, ``highest`` is their highest value.
    """

    counts: Counter[str] = field(default_factory=Counter)
    deep: int = 0
    highest: int = 0

    def notes(self) -> list[str]:
        """One line for each kind of loss, with its count."""
        lines = [
            f"{text}: {self.counts[kind]}" for kind, text in _SAID.items() if self.counts[kind]
        ]
        if self.deep:
            lines.append(
                f"images of 16 bits that were read as value >> 8: {self.deep}; their highest value is {self.highest}, which became"
                f" {self.highest >> 8}"
            )
        return lines

    def require_used_bits(self, where: str) -> None:
        """Raise when the files of 16 bits use 8 of them, so that nothing would be left.

        Raises:
            ModelError: they do.
        """
        if self.deep and self.highest < 256:
            raise ModelError(
                f"images of 16 bits must use more than 8 of them, but the highest value in {where} is {self.highest}",
                hint="save them with 8 bits",
            )


def image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, from its header.

    Raises:
        ModelError: the file is not an image.
    """
    from PIL import Image  # not needed where data comes as arrays

    try:
        with Image.open(path) as image:
            return int(image.height), int(image.width)
    except Exception as error:  # PIL raises many kinds for damaged files
        raise ModelError(f"{path} cannot be read as an image: {one_line(error)}") from error


def read_image(
    path: Path, size: tuple[int, int], color: str, losses: Losses | None = None
) -> np.ndarray:
    """Pixels of an image file, ``uint8 [H, W]`` for grey and ``[H, W, 3]`` for rgb, resized bilinearly to ``size`` (height, width).

    Values of 16 bits become ``value >> 8``. Pixels are taken as stored: alpha, colour profiles and a camera's rotation tag are dropped
    (Pillow itself turns TIFF files). What is lost is added to ``losses``.

    Raises:
        ModelError: the file is not a whole image, or has pixels whose range is not known.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # about what is counted here
            plain = _eight_bits(image, path, losses or Losses())
            converted = plain.convert("L" if color == "grey" else "RGB")
            if losses is not None:
                losses.counts.update(_lost(image))
    except ModelError:
        raise
    except Exception as error:  # PIL raises many kinds for damaged files
        raise ModelError(f"{path} cannot be read as an image: {one_line(error)}") from error
    if (converted.height, converted.width) != size:
        converted = converted.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(converted, np.uint8)


def _eight_bits(image: Any, path: Path, losses: Losses) -> Any:
    """The image itself, or one of 8 bits: Pillow would clip what is larger."""
    from PIL import Image

    if image.mode == "F":
        raise ModelError(
            f"{path} has floating-point pixels, whose range is not known",
            hint="save it with 8 or 16 bits, or give arrays as the model wants them",
        )
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 0xFFFF:
        raise ModelError(
            f"pixels must be 0 to 255, or 0 to 65535 in 16 bits, but {path} has {low} to {high}",
            hint="save it with 8 or 16 bits",
        )
    losses.deep += 1
    losses.highest = max(losses.highest, high)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _lost(image: Any) -> list[str]:
    """What a loaded image has that its plain pixels do not."""
    found = [_COLOUR] if image.mode == "CMYK" else []
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        lowest, _ = image.getchannel(image.getbands()[-1]).getextrema()
        found += [_ALPHA] if lowest < 255 else []
    elif "transparency" in image.info:
        found.append(_ALPHA)
    # Tags and further frames may be damaged where the pixels are not. A second picture in a phone's JPEG (MPO) is a preview.
    with contextlib.suppress(Exception):
        found += [_TURNED] if image.getexif().get(ORIENTATION, 1) in range(2, 9) else []
        is_animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
        found += [_FRAMES] if is_animated else []
    return found

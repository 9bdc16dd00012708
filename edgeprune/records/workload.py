"""What people write about a model and its data: ``edgeprune.yaml``; unknown keys are errors.

Precedence of every setting: flag, then ``edgeprune.yaml``, then the target file, then the default here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from edgeprune.records.base import Record
from edgeprune.records.budget import BudgetText, DropText
from edgeprune.records.names import SPDX, Line
from edgeprune.records.sparsity import Sparsity


class Int8(Record):
    """How much is done for the quality of the INT8 file, and the type of its inputs and outputs.

    ``plain`` takes the format's own ranges; ``auto`` tries more where that costs over 0.3 points; ``thorough`` tries all. ``io`` is the
    target's or the format's own where it is ``None``.
    """

    effort: Literal["plain", "auto", "thorough"] = "auto"
    io: Literal["float", "int8"] | None = None


class Preprocess(Record):
    """How raw data becomes the model's input; recorded once, used by every stage and by the bundle.

    Raw images are ``uint8 [N, H, W, C]`` (or ``[N, H, W]`` for grey); the model sees
    ``float32 [N, C, H, W] = (raw / 255 - mean) / std``. ``kind: none`` passes float arrays through unchanged.
    """

    kind: Literal["image", "none"] = "image"
    size: tuple[int, int] | None = None  # (height, width) that image files are resized to
    color: Literal["rgb", "grey"] = "rgb"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    @model_validator(mode="after")
    def _check_std(self) -> Preprocess:
        channels = 1 if self.color == "grey" else 3
        for key in ("mean", "std"):
            if len(getattr(self, key)) not in (1, channels):
                raise ValueError(f"{key} must have 1 or {channels} values for color {self.color}")
        if any(value <= 0 for value in self.std):
            raise ValueError("std must be > 0")
        return self


class Augment(Record):
    """What the recovery training may do to an image without changing its class."""

    shift_pixels: Annotated[int, Field(ge=0, le=64)] = 2
    mirror: bool = False


MOST_STEPS = 5  # each step before the last takes its share of the epochs


class Recovery(Record):
    """The distillation that heals the pruned model, in how many steps channels go, and which weights it starts from.

    ``steps`` prune to budgets that are geometric in latency, with a short healing after each; the ``epochs`` are those of all steps
    together. ``auto`` takes 1, 2 or 3 by the budget. ``start`` is where the last training begins: ``kept`` weights of the channels that
    stay, ``rewound`` to those of an earlier checkpoint of the dense model, the file ``rewind_weights``, or ``fresh`` random ones. It
    keeps ``sparsity``, a pattern of zeros in the weights.
    """

    epochs: Annotated[float, Field(ge=0, le=1000)] = 5.0
    max_minutes: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(ge=2, le=4096)] = 128
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 0.02
    augment: Augment = Augment()
    steps: int | Literal["auto"] = 1
    start: Literal["kept", "rewound", "fresh"] = "kept"
    rewind_weights: Annotated[str | None, Field(validate_default=True)] = None
    sparsity: Sparsity = "none"

    @field_validator("steps", mode="before")
    @classmethod
    def _check_steps(cls, steps: Any) -> Any:
        is_number = isinstance(steps, int) and not isinstance(steps, bool)
        if steps != "auto" and not (is_number and 1 <= steps <= MOST_STEPS):
            raise ValueError(f"it must be 1 to {MOST_STEPS}, or auto")
        return steps

    @field_validator("rewind_weights")
    @classmethod
    def _check_rewind_weights(cls, file: str | None, info: ValidationInfo) -> str | None:
        start = info.data.get("start")
        if start == "rewound" and file is None:
            raise ValueError("with start rewound it must name a file of earlier weights")
        if start in ("kept", "fresh") and file is not None:
            raise ValueError(f"it goes with start rewound only, not with start {start}")
        return file


_FACTORY = "FILE.py:FACTORY or MODULE:FACTORY, such as net.py:make"


class Workload(Record):
    """``edgeprune.yaml``: the user's model, weights, data and defaults. Paths are relative to the file.

    ``task`` is needed where no labels show it. ``author``, ``license`` (SPDX) and ``version`` are of the model; bundles show them.
    """

    schema_version: Literal[1] = 1
    model: Annotated[str, Field(pattern=r"^.+:[A-Za-z_][A-Za-z0-9_]*$", description=_FACTORY)]
    weights: str | None = None
    data: str
    preprocess: Preprocess = Preprocess()
    labels: tuple[str, ...] | None = None
    task: Literal["classify"] | None = None
    author: Line | None = None
    target: str | None = None
    formats: str | None = None
    latency: BudgetText | None = None
    max_drop: DropText | None = None
    device: str | None = None
    recovery: Recovery = Recovery()
    int8: Int8 = Int8()
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    license: Annotated[str, Field(pattern=SPDX)] | None = None
    version: Annotated[str, Field(pattern=r"^[0-9A-Za-z][0-9A-Za-z.+-]{0,39}$")] | None = None

"""What people write: profiles, targets, devices and workloads. One YAML each; unknown keys are errors.

Precedence of every setting: flag, then ``edgeprune.yaml``, then the target file, then the default here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from edgeprune.records.base import Record
from edgeprune.records.budget import BudgetText, DropText
from edgeprune.records.operators import WORDS
from edgeprune.records.sparsity import Sparsity

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
SPDX = r"^[A-Za-z0-9][A-Za-z0-9.+() -]{0,99}$"  # of a licence, such as Apache-2.0
FormatName = Literal["tflite", "onnx", "tensorrt", "executorch", "coreml"]
Precision = Literal["fp32", "int8"]
# What a file stores: in the "fp32" place of a target for Apple devices stands a file in half precision.
FilePrecision = Literal["fp32", "fp16", "int8"]
Line = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Stamp = Literal["measured", "stand-in", "emulated"]
BundleKind = Literal["python", "android", "ios"]
# The processors that Core ML may use, as coremltools names them.
ComputeUnits = Literal["ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY"]


class Fact(Record):
    """One hardware fact: a value with the place it comes from."""

    value: int | float | str | bool | tuple[int | float | str, ...]
    source: Annotated[str, Field(min_length=8)]
    read_on: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    note: str = ""


class ChannelSteps(Record):
    """The output-channel tile of each kernel class, as a prior for the width grid until the device is measured."""

    conv: Annotated[int, Field(ge=1, le=256)]
    depthwise: Annotated[int, Field(ge=1, le=256)]
    linear: Annotated[int, Field(ge=1, le=256)]
    source: Annotated[str, Field(min_length=8)]
    read_on: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class AvoidedOp(Record):
    """An operator that runs badly on an accelerator, such as one that is slow or falls back: what it costs, and who says so."""

    op: str  # a word of edgeprune.records.operators
    cost: Annotated[str, Field(min_length=4, max_length=200)]
    source: Annotated[str, Field(min_length=8)]
    read_on: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]

    @field_validator("op")
    @classmethod
    def _check_op(cls, word: str) -> str:
        if word not in WORDS:
            raise ValueError(f"unknown operator {word!r}; known: {', '.join(sorted(WORDS))}")
        return word


class ForbiddenOp(AvoidedOp):
    """An operator that cannot run on an accelerator, unless one of these formats has it, or its converter replaces it."""

    decomposed_by: tuple[FormatName, ...] = ()


class Profile(Record):
    """What a piece of silicon and its kernel library like. Facts only, each with its source."""

    schema_version: Literal[1] = 1
    name: Name
    summary: str
    isa: str
    kernel_library: str
    facts: dict[str, Fact]
    channel_steps: dict[Precision, ChannelSteps]
    int8_schemes: tuple[str, ...]
    avoid_ops: tuple[AvoidedOp, ...] = ()  # a warning
    forbidden_ops: tuple[ForbiddenOp, ...] = ()  # an error

    @model_validator(mode="after")
    def _check_ops(self) -> Profile:
        words = [fact.op for fact in (*self.avoid_ops, *self.forbidden_ops)]
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise ValueError(
                f"an operator must stand once in avoid_ops and forbidden_ops together, but {', '.join(twice)} does not"
            )
        return self


class Runtime(Record):
    """How the shipped file is run and timed."""

    name: Literal["litert", "tflite-runtime", "onnxruntime", "tensorrt", "executorch", "coreml"]
    threads: Annotated[int, Field(ge=1, le=64)] = 1


# What runs the files of each format.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "tflite": ("litert", "tflite-runtime"),
    "onnx": ("onnxruntime",),
    "tensorrt": ("tensorrt",),
    "executorch": ("executorch",),
    "coreml": ("coreml",),
}


class Alternative(Record):
    """Another format that the boards of a target run, and what runs it there."""

    format: FormatName
    runtime: Runtime

    @model_validator(mode="after")
    def _check_runtime(self) -> Alternative:
        known = RUNTIMES[self.format]
        if self.runtime.name not in known:
            raise ValueError(
                f"files of {self.format} are run by {' or '.join(known)}, not by {self.runtime.name}"
            )
        return self


class Int8(Record):
    """How much is done for the quality of the INT8 file, and the type of its inputs and outputs.

    ``plain`` takes the format's own ranges; ``auto`` tries more where that costs over 0.3 points; ``thorough`` tries all. ``io`` is the
    target's or the format's own where it is ``None``.
    """

    effort: Literal["plain", "auto", "thorough"] = "auto"
    io: Literal["float", "int8"] | None = None


class Quantization(Record):
    """Post-training INT8 settings; ``io`` is the type of the file's inputs and outputs, the format's own where it is ``None``."""

    scheme: Literal["static-int8"] = "static-int8"
    per_channel: bool = True
    calibration_samples: Annotated[int, Field(ge=8, le=10_000)] = 256
    io: Literal["float", "int8"] | None = None

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data; ``io`` only where it is set, so that digests of targets without it stay."""
        plain: dict[str, Any] = handler(self)
        if plain.get("io", "") is None:
            del plain["io"]
        return plain


class Target(Record):
    """What we ship: one profile, a runtime, a format, precisions, and defaults for the gates.

    ``formats`` are alternatives to ``format``, each with its runtime; ``--formats auto`` measures all and ships the fastest that holds.
    ``compute_units`` are what an app should ask Core ML for, ``ALL`` where it is ``None``.
    """

    schema_version: Literal[1] = 1
    name: Name
    summary: str
    profile: Name
    format: FormatName
    precisions: tuple[Precision, ...] = ("fp32", "int8")
    runtime: Runtime
    formats: tuple[Alternative, ...] = ()
    quantization: Quantization = Quantization()
    latency: BudgetText = "60%"
    max_drop: DropText = "1%"
    bundle: BundleKind = "python"
    # What the runner of the app registers, where that is less than the runtime on this machine has; for formats with delegates.
    operators: tuple[str, ...] | None = None
    compute_units: ComputeUnits | None = None

    @model_validator(mode="after")
    def _check_formats(self) -> Target:
        names = [self.format, *(other.format for other in self.formats)]
        if self.compute_units is not None and "coreml" not in names:
            raise ValueError(f"compute_units is for coreml files, not for {' or '.join(names)}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"formats must hold each format once, and not the target's own, but {', '.join(twice)} is there twice"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data; ``formats`` and ``compute_units`` only where they are set, so that digests of targets without them stay."""
        plain: dict[str, Any] = handler(self)
        for key in ("formats", "compute_units"):
            if not plain.get(key, True):
                del plain[key]
        return plain


class HostKey(Record):
    """The pinned key of an SSH server."""

    sha256: Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]
    key_type: Annotated[str, Field(pattern=r"^[a-z0-9@.-]+$")] = "ssh-ed25519"


class KeyAuth(Record):
    """Log in with one private key file; a passphrase only by reference (``env:NAME`` or ``file:/path``)."""

    method: Literal["key"] = "key"
    key_file: str
    passphrase_ref: Annotated[str, Field(pattern=r"^(env|file):.+$")] | None = None


class PasswordAuth(Record):
    """Log in with a password given only by reference (``env:NAME`` or ``file:/path``)."""

    method: Literal["password"]
    password_ref: Annotated[str, Field(pattern=r"^(env|file):.+$")]


class AgentAuth(Record):
    """Log in with one key of the running ssh-agent, chosen by its fingerprint."""

    method: Literal["agent"]
    key_fingerprint: Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]


class Thermal(Record):
    """When a board is cool enough to be measured."""

    soft_limit_c: Annotated[float, Field(gt=0, le=120)] = 80.0  # where it starts to slow down
    start_below_c: Annotated[float, Field(gt=0, le=120)] = 60.0
    wait_s: Annotated[float, Field(ge=0, le=3600)] = 300.0  # then: not ready


class Tuning(Record):
    """Whether edgeprune may change settings of the board while it measures. It puts them back; see ``edgeprune devices restore``."""

    allow: bool = False
    governor: Literal["performance", "powersave", "schedutil", "ondemand"] = "performance"


class ReportTier(Record):
    """How long the figures of a report are looked at: fresh processes, blocks of each file in each, and runs of each file in all.

    Fewer are for trying things out; what the interval of a comparison covers is printed with it.
    """

    sessions: Annotated[int, Field(ge=1, le=50)] = 3
    rounds: Annotated[int, Field(ge=4, le=1000)] = 8
    block_ms: Annotated[float, Field(gt=0, le=2000)] = 200.0
    warmup_ms: Annotated[float, Field(ge=0, le=60_000)] = 1000.0
    min_runs: Annotated[int, Field(ge=1, le=100_000)] = 1024
    max_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    sentinel: bool = True


class Device(Record):
    """The box on this desk: how to reach it, and which targets it can time. Never holds a secret.

    ``lease_file`` is the lock on the board that keeps two clients apart; without one it is ``/run/lock/edgeprune.lock``, or a file in
    ``workdir`` where that folder does not exist. ``recording`` is the file that a ``replay`` device answers from.
    """

    transport: Literal["local", "ssh", "replay"]
    targets: tuple[Name, ...]
    host: Annotated[str, Field(pattern=r"^[A-Za-z0-9:._%][A-Za-z0-9:._%-]{0,252}$")] | None = None
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    user: Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_.-]{0,31}\$?$")] | None = None
    auth: Annotated[KeyAuth | PasswordAuth | AgentAuth, Field(discriminator="method")] | None = None
    host_key: HostKey | None = None
    workdir: Annotated[str, Field(pattern=r"^[A-Za-z0-9/._~][A-Za-z0-9/._~-]{0,254}$")] = (
        "~/.local/share/edgeprune"
    )
    python: Annotated[str, Field(pattern=r"^[A-Za-z0-9/._~][A-Za-z0-9/._~-]{0,254}$")] = "python3"
    connect_timeout_s: Annotated[float, Field(gt=0, le=120)] = 8.0
    lease_file: (
        Annotated[str, Field(pattern=r"^[A-Za-z0-9/._~][A-Za-z0-9/._~-]{0,254}$")] | None
    ) = None
    lease_ttl_s: Annotated[float, Field(ge=2, le=600)] = 30.0
    min_free_bytes: Annotated[int, Field(ge=0)] = 256 * 1024**2
    cache_quota_bytes: Annotated[int, Field(ge=0)] = 2 * 1024**3
    thermal: Thermal = Thermal()
    max_foreign_cpu_ratio: Annotated[float, Field(gt=0, le=1)] = 0.05  # of all cores, by others
    tuning: Tuning = Tuning()
    report: ReportTier = ReportTier()
    recording: str | None = None
    stand_in: bool = False

    @model_validator(mode="after")
    def _check_ssh(self) -> Device:
        if self.transport == "ssh":
            missing = [k for k in ("host", "user", "auth", "host_key") if getattr(self, k) is None]
            if missing:
                raise ValueError(f"an ssh device must have {', '.join(missing)}")
        if self.transport == "replay" and self.recording is None:
            raise ValueError("a replay device must have recording")
        return self


class DeviceFile(Record):
    """``devices.yaml``: the inventory of this desk."""

    schema_version: Literal[1] = 1
    devices: dict[Name, Device]


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

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plain data; the schedule only where it is not the default, so that digests of runs without one stay."""
        plain: dict[str, Any] = handler(self)
        for key in ("steps", "start", "rewind_weights", "sparsity"):
            if key in plain and plain[key] == type(self).model_fields[key].default:
                del plain[key]
        return plain


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

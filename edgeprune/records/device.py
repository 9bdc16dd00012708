"""What people write about a board: how to reach it, and how it is to be timed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    model_validator,
)

from edgeprune.records.base import Record
from edgeprune.records.names import Name


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

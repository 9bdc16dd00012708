"""What a new entry of ``devices.yaml`` is made of: an address, one way to log in, and the targets that a board looks like."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from edgeprune.devices.link.replies import Hello
from edgeprune.errors import SpecError
from edgeprune.records.paths import located

DEFAULT_KEY = "~/.ssh/id_ed25519"
# What /proc/device-tree/model says, and the target for it. The 64-bit ones need runtimes that are not made for 32 bits.
_MODELS = (
    (r"Raspberry Pi (4|Compute Module 4)", 64, "rpi4"),
    (r"Raspberry Pi (5|Compute Module 5)", 64, "rpi5"),
    (r"Raspberry Pi (3|Compute Module 3)", 32, "rpi3-32bit"),
    (r"Jetson Orin", 64, "jetson-orin-nano"),
)


class Address(NamedTuple):
    """Where an SSH server is, and whom it shall let in."""

    user: str | None
    host: str
    port: int


def parse_address(text: str, port: int | None = None) -> Address:
    """Read ``[USER@]HOST[:PORT]``; an IPv6 address with a port stands in brackets.

    Args:
        text: what was typed.
        port: from another flag; must not contradict the text.

    Raises:
        SpecError: another form; two different ports.
    """
    user, _, place = text.rpartition("@")
    found = re.fullmatch(r"\[(.+)\](?::(\d{1,5}))?", place)
    if found is None and place.count(":") > 1:  # a bare IPv6 address
        found = re.fullmatch(r"(.+)()", place)
    if found is None:
        found = re.fullmatch(r"([A-Za-z0-9._-]+)(?::(\d{1,5}))?", place)
    elif not _is_ipv6(found[1]):
        found = None
    if found is None or ("@" in text and not user):
        raise SpecError(
            f"an address must look like pi@pi.local, 192.0.2.7:2222 or [2001:db8::7]:22, but got {text!r}"
        )
    written = int(found[2]) if found[2] else None
    if written is not None and port is not None and written != port:
        raise SpecError(f"the address has the port {written}, but --port is {port}")
    return Address(user or None, found[1], written or port or 22)


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def login_method(
    key: str | None, agent_key: str | None, password_ref: str | None, passphrase_ref: str | None
) -> dict[str, Any]:
    """The one way to log in that the flags name, as the ``auth`` of a device; without any, the usual key where there is one.

    Raises:
        SpecError: more than one way, a passphrase for something else than a key file, or none at all.
    """
    given = [
        flag
        for flag, value in (("--key", key), ("--agent-key", agent_key), ("--password-ref", password_ref))
        if value is not None
    ]  # fmt: skip
    if len(given) > 1:
        raise SpecError(
            f"one way to log in must be given, but got {' and '.join(given)}",
            hint="exactly one is ever tried on the board",
        )
    if passphrase_ref is not None and (agent_key is not None or password_ref is not None):
        raise SpecError(f"--passphrase-ref opens a key file, but {given[0]} was given")
    if agent_key is not None:
        return {"method": "agent", "key_fingerprint": agent_key}
    if password_ref is not None:
        return {"method": "password", "password_ref": password_ref}
    if key is None and not located(DEFAULT_KEY, what="--key").is_file():
        raise SpecError(
            f"a way to log in must be given, as there is no {DEFAULT_KEY}",
            hint="add --key FILE, --agent-key SHA256:..., or --password-ref env:NAME",
        )
    auth: dict[str, Any] = {"method": "key", "key_file": _from_anywhere(key or DEFAULT_KEY)}
    if passphrase_ref is not None:
        auth["passphrase_ref"] = passphrase_ref
    return auth


def _from_anywhere(path: str) -> str:
    """A path that means the same from every folder: from the home folder where it lies in it, else from the root."""
    absolute = Path(os.path.abspath(located(path, what="--key")))  # noqa: PTH100 - a link stays a link
    home = Path.home()
    if absolute.is_relative_to(home):
        return f"~/{absolute.relative_to(home).as_posix()}"
    return str(absolute)


def targets_for(hello: Hello) -> tuple[str, ...]:
    """Targets that a board looks like by the name of its model; none for an unknown one."""
    return tuple(
        target
        for pattern, bits, target in _MODELS
        if hello.bits == bits and re.search(pattern, hello.cpu_model)
    )

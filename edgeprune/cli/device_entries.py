"""The commands that edit devices.yaml: a board comes in, gets a new host key, or goes."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeprune.cli.console import plain
from edgeprune.cli.options import GivenPath
from edgeprune.errors import HostKeyMismatch, SpecError, UnknownName

if TYPE_CHECKING:
    from edgeprune.devices.link.replies import Hello
    from edgeprune.records.device import Device, HostKey

CONSOLE_COMMANDS = {
    "ssh-ed25519": "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
    "ssh-rsa": "ssh-keygen -lf /etc/ssh/ssh_host_rsa_key.pub",
}
_ECDSA_COMMAND = "ssh-keygen -lf /etc/ssh/ssh_host_ecdsa_key.pub"
CONNECT_S = 8.0

_name = click.argument("name")
_file = click.option(
    "--file",
    "file",
    type=GivenPath(dir_okay=False),
    help="The devices file; default: ./devices.yaml, else the one in the user's config folder.",
)


@click.command(short_help="Add a board, with its host key pinned.")
@_name
@click.argument("address")
@click.option("--port", type=click.IntRange(1, 65535), help="Of the SSH server; default 22.")
@click.option("--key", help="Private key file; default ~/.ssh/id_ed25519, where there is one.")
@click.option("--passphrase-ref", help="What opens the key file: env:NAME or file:/path.")
@click.option("--agent-key", help="SHA256:... of a key of the running ssh-agent.")
@click.option("--password-ref", help="env:NAME or file:/path; never the password itself.")
@click.option("--fingerprint", help="SHA256:... of the board's host key, read on its console.")
@click.option(
    "--target", "-t", "targets", multiple=True, help="Target it can time; may be repeated."
)
@click.option("--python", help="Interpreter on the board; default python3.")
@click.option("--workdir", help="Folder on the board; default ~/.local/share/edgeprune.")
@click.option("--stand-in", is_flag=True, help="Its times are stamped stand-in, never measured.")
@click.option("--yes", "-y", is_flag=True, help="Take the proposed targets; the key is asked for.")
@_file
def add(name: str, address: str, targets: Sequence[str], file: Path | None, **flags: Any) -> None:
    """Pin a board's host key, log in, see what it is, and write it to devices.yaml.

    ADDRESS is [USER@]HOST[:PORT]. Nothing is written unless the login and the first answers of the board are fine.
    """
    from edgeprune.devices.inventory import entries
    from edgeprune.records import catalog

    path = file or catalog.devices_file() or Path("devices.yaml")
    for target in targets:
        if target not in catalog.targets():
            raise UnknownName("target", target, catalog.targets())
    _check_name(name)
    entries.check_addable(path, name)
    if flags["fingerprint"] is None and not sys.stdin.isatty():
        raise SpecError(
            "without a terminal to ask on, --fingerprint must be given",
            hint=f"read it on the board's console: {CONSOLE_COMMANDS['ssh-ed25519']}",
        )
    device = _pinned(_unpinned(name, address, targets, flags), flags["fingerprint"])
    hello = _first_answers(name, device)
    chosen = tuple(targets) or _choose_targets(hello, ask=not flags["yes"] and sys.stdin.isatty())
    entries.add_device(path, name, device.model_copy(update={"targets": chosen}))
    _say_added(name, path, hello, chosen)


def _check_name(name: str) -> None:
    from edgeprune.records import catalog
    from edgeprune.records.names import NAME_PATTERN

    if not re.match(NAME_PATTERN, name) or "\n" in name:
        raise SpecError(
            f"a device's name must be 1-63 of a-z 0-9 . _ - and start with a letter or digit, but is {name!r}"
        )
    if name == catalog.THIS_MACHINE:
        raise SpecError(f"the name {name!r} is taken: it is the computer that edgeprune runs on")


def _unpinned(
    name: str, address: str, targets: Sequence[str], flags: dict[str, Any]
) -> dict[str, Any]:
    """The keys of the new entry, but for the host key; everything that was typed is checked before the board hears of it."""
    import getpass

    from edgeprune.devices.inventory.proposals import login_method, parse_address
    from edgeprune.records.base import parse
    from edgeprune.records.device import Device, HostKey

    ways = (flags["key"], flags["agent_key"], flags["password_ref"], flags["passphrase_ref"])
    place = parse_address(address, flags["port"])
    entry = {
        "transport": "ssh",
        "targets": list(targets),
        "host": place.host,
        "port": place.port,
        "user": place.user or getpass.getuser(),
        "auth": login_method(*ways),
        "stand_in": flags["stand_in"],
        **{key: flags[key] for key in ("python", "workdir") if flags[key] is not None},
    }
    given = {"sha256": flags["fingerprint"] or f"SHA256:{'A' * 43}"}
    where = f"the entry {name!r}"
    parse(HostKey, given, where="--fingerprint")
    parse(Device, {**entry, "host_key": given}, where=where)
    return entry


def _pinned(entry: dict[str, Any], expected: str | None) -> Device:
    """The device with the host key that the server shows, once a person or ``--fingerprint`` has said that it is the right one."""
    from edgeprune.devices.link.login import seen_host_key
    from edgeprune.records.base import parse
    from edgeprune.records.device import Device

    place = f"{entry['host']}:{entry['port']}"
    seen = seen_host_key(entry["host"], entry["port"], CONNECT_S)
    if expected is not None:
        _expect_key(place, seen, expected, "--fingerprint")
    else:
        _confirm_key(place, seen)
    whole = {**entry, "host_key": seen.model_dump(mode="json")}
    return parse(Device, whole, where=place)


def _expect_key(place: str, seen: HostKey, expected: str, flag: str) -> None:
    if seen.sha256 != expected:
        raise HostKeyMismatch(
            f"{place} shows the host key {seen.key_type} {seen.sha256}, but {flag} is {expected}",
            hint=f"no login was tried and nothing was written; on the board's console: {_console_command(seen)}",
        )


def _confirm_key(place: str, seen: HostKey) -> None:
    click.echo(
        f"{place} shows this {seen.key_type} host key:\n\n    {seen.sha256}\n\n"
        "Compare it with what this prints on the board's own console, not over the network:\n\n"
        f"    {_console_command(seen)}\n",
        err=True,
    )
    if not click.confirm("Are they the same?", default=False, err=True):
        raise HostKeyMismatch(
            f"the host key of {place} was not confirmed; no login was tried and nothing was written"
        )


def _console_command(key: HostKey) -> str:
    return CONSOLE_COMMANDS.get(key.key_type, _ECDSA_COMMAND)


def _first_answers(name: str, device: Device) -> Hello:
    from edgeprune.devices.board import open_board
    from edgeprune.devices.link.replies import Hello
    from edgeprune.devices.setup.checkup import asked

    with open_board(name, device, exclusive=False) as board:
        return asked(board, Hello, "hello", {})


def _choose_targets(hello: Hello, *, ask: bool) -> tuple[str, ...]:
    from edgeprune.devices.inventory.proposals import targets_for
    from edgeprune.records import catalog

    proposed = targets_for(hello)
    if not ask:
        return proposed
    known = catalog.targets()
    question = f"{plain(hello.cpu_model)}: targets it can time ({', '.join(known)})"
    answer = str(click.prompt(question, default=" ".join(proposed) or "none", err=True))
    chosen = tuple(dict.fromkeys(re.findall(r"[^\s,]+", answer)))
    if chosen == ("none",):
        return ()
    for target in chosen:
        if target not in known:
            raise UnknownName("target", target, known)
    return chosen


def _say_added(name: str, path: Path, hello: Hello, targets: Sequence[str]) -> None:
    from edgeprune.devices.setup.checkup import extensions, size_text
    from edgeprune.records import catalog

    flags = ", ".join(e for e, there in extensions(hello).items() if there) or "none for INT8"
    emulated = ", EMULATED" if hello.emulated else ""
    lines = [
        f"board    {hello.cpu_model}, {hello.machine}, {hello.cores} cores,"
        f" {size_text(hello.memory_bytes)}, {hello.bits}-bit{emulated}",
        f"isa      {flags}",
        f"system   Linux {hello.kernel}, glibc {hello.glibc or 'none'}, Python {hello.python},"
        f" pages of {size_text(hello.page_size_bytes)}",
        f"targets  {', '.join(targets) or 'none that this version knows by the name of its processor; add them to its entry'}",
        f"wrote    {name} to {path}",
        f"next     edgeprune devices setup {name}",
    ]
    found = catalog.devices_file()
    if found is None or found.resolve() != path.resolve():
        lines.insert(
            -1, "note     edgeprune reads ./devices.yaml, or ~/.config/edgeprune/devices.yaml"
        )
    for line in lines:
        click.echo(plain(line))


@click.command(short_help="Pin the new host key of a board.")
@_name
@click.option("--old", required=True, help="SHA256:... that is pinned now.")
@click.option("--new", required=True, help="SHA256:... read on the board's console.")
@_file
def rekey(name: str, old: str, new: str, file: Path | None) -> None:
    """Pin a new host key, when a board got one: only the key that it shows now, and only for the pinned one."""
    from edgeprune.devices.inventory import entries
    from edgeprune.devices.link.login import seen_host_key

    path, device = _entry(name, file)
    if device.transport != "ssh" or device.host is None or device.host_key is None:
        raise SpecError(f"the device {name!r} is not reached over SSH, and has no host key")
    if old != device.host_key.sha256:
        raise SpecError(
            f"the host key that is pinned for {name!r} is {device.host_key.sha256}, but --old is {old}",
            hint="--old says which key is given up",
        )
    place = f"{device.host}:{device.port}"
    kind = device.host_key.key_type
    seen = seen_host_key(device.host, device.port, device.connect_timeout_s, prefer=kind)
    _expect_key(place, seen, new, "--new")
    entries.repin(path, name, old, seen)
    click.echo(f"{name}: {old} was replaced by {seen.key_type} {seen.sha256} in {path}")


@click.command(short_help="Take a board out of devices.yaml.")
@_name
@_file
def remove(name: str, file: Path | None) -> None:
    """Take a board out of devices.yaml; nothing on the board is changed."""
    from edgeprune.devices.inventory import entries

    path, _ = _entry(name, file)
    entries.remove_device(path, name)
    click.echo(f"removed {name} from {path}")


def _entry(name: str, file: Path | None) -> tuple[Path, Device]:
    """The file that holds an entry, and the entry; ``this-machine`` counts only where a file names it."""
    from edgeprune.records import catalog
    from edgeprune.records.base import read_yaml
    from edgeprune.records.device import DeviceFile

    path = file or catalog.devices_file()
    known = {} if path is None else read_yaml(DeviceFile, path).devices
    if path is None or name not in known:
        raise UnknownName("device", name, known, where=str(path or ""))
    return path, known[name]

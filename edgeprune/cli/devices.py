"""The commands for boards: add one, look it over, set it up, see who holds it, and put it back as it was."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeprune.cli.console import plain, print_list, say
from edgeprune.cli.device_entries import add, rekey, remove
from edgeprune.cli.options import GivenPath, wait_option
from edgeprune.errors import Busy, DeviceError, SpecError

if TYPE_CHECKING:
    from edgeprune.devices.board import Board
    from edgeprune.devices.link.replies import Owner
    from edgeprune.records.device import Device

RUNTIMES = ("litert", "tflite-runtime", "onnxruntime")
_CLEAN_S = 600.0
_POLL_S = 2.0

_name = click.argument("name")
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_yes = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


@click.group()
def devices() -> None:
    """Add, check, set up and free the boards that are measured."""


for _command in (add, rekey, remove):
    devices.add_command(_command)


@devices.command("list")
@_json
def list_devices(as_json: bool) -> None:
    """All devices of devices.yaml, and this machine."""
    from edgeprune.devices.inventory import quarantine
    from edgeprune.records import catalog

    out = quarantine.entries()
    rows = {
        name: {
            "transport": d.transport,
            "address": f"{d.user}@{d.host}:{d.port}" if d.transport == "ssh" else d.transport,
            "stamp": _stamp(d),
            "pinned": "yes" if d.host_key else "no",
            "trusted": plain(f"quarantine: {out[name].reason}") if name in out else "yes",
            "targets": " ".join(d.targets),
        }
        for name, d in catalog.devices().items()
    }
    print_list(as_json, rows)


@devices.command(short_help="What a board is, and what would disturb it.")
@_name
@_json
def check(name: str, as_json: bool) -> None:
    """Look a board over: what it is, what it can run, and what would disturb a measurement.

    A board that passes leaves the quarantine that a disturbed measurement put it in.
    """
    from edgeprune.devices.inventory import quarantine
    from edgeprune.devices.setup.checkup import check_up
    from edgeprune.records import catalog
    from edgeprune.records.files import to_json

    device = catalog.device(name)
    with _open(name, exclusive=False) as board:
        found = check_up(board, _runtimes_of(device))
    if as_json:
        click.echo(to_json(found).decode(), nl=False)
    else:
        width = max(len(f.name) for f in found.findings)
        for f in found.findings:
            click.echo(plain(f"{f.level:4}  {f.name:{width}}  {f.text}"))
            if f.next_step is not None:
                click.echo(plain(f"{'':6}{'':{width}}  -> {f.next_step}"))
    failed = [f for f in found.findings if f.level == "fail"]
    if failed:
        raise DeviceError(
            f"device {name!r} cannot be measured as it is: {', '.join(f.name for f in failed)}",
            hint=failed[0].next_step,
        )
    why = quarantine.reason(name)
    if why is not None and quarantine.lift(name):
        click.echo(plain(f"{name} is out of quarantine, where it was because: {why}"), err=as_json)


def _stamp(device: Device) -> str:
    """What the times of a device are called; those of a recording are called what the recording says, which is not opened here."""
    if device.transport == "replay":
        return "as recorded"
    return "stand-in" if device.stand_in else "measured"


def _runtimes_of(device: Device) -> list[str]:
    """Runtimes that the targets of a device need, and that this version can run on a board."""
    from edgeprune.records import catalog
    from edgeprune.records.formats import runtime_facts, stand_in

    wanted = [catalog.target(name).runtime.name for name in device.targets]
    # Where LiteRT and onnxruntime run the files of runtimes for boards.
    if device.transport == "local":
        wanted = [stand_in(name) or name for name in wanted]
    return [n for n in dict.fromkeys(wanted) if n in RUNTIMES or runtime_facts(n).of_system]


def _open(name: str, *, exclusive: bool, wait: float | None = None) -> Board:
    """A board that answers; one that is to be held alone is waited for, for so many minutes."""
    from edgeprune.devices.board import open_board
    from edgeprune.devices.link.wait import wait_seconds
    from edgeprune.records import catalog

    device = catalog.device(name)
    if device.transport == "replay":
        raise SpecError(
            f"{name!r} is a recording and no board: there is nothing to look over, set up or free",
            hint="use it with profile or deploy, or name the board that was recorded",
        )
    return open_board(name, device, exclusive=exclusive, wait_s=wait_seconds(wait), say=say)


@devices.command(short_help="Install the runtimes on a board.")
@_name
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    type=click.Choice(RUNTIMES),
    help="What to install; default: what the device's targets need.",
)
@click.option(
    "--wheels",
    type=GivenPath(file_okay=False, exists=True),
    help="Folder with wheels, for a computer without a network.",
)
@wait_option
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
def setup(
    name: str, runtimes: Sequence[str], wheels: Path | None, wait: float | None, quiet: bool
) -> None:
    """Install the runtimes in a folder of their own on the board, and try them there."""
    from edgeprune.cli.progress import Terminal
    from edgeprune.progress import Silent
    from edgeprune.records import catalog

    of_wheels = [n for n in _runtimes_of(catalog.device(name)) if n in RUNTIMES]
    wanted = list(dict.fromkeys(runtimes)) or of_wheels
    if not wanted:
        raise SpecError(
            f"no target of the device {name!r} says which runtime to set up",
            hint=f"add --runtime: {', '.join(RUNTIMES)}",
        )
    from edgeprune.devices.setup.provision import setup as set_up

    progress = Silent() if quiet else Terminal()
    with _open(name, exclusive=True, wait=wait) as board:
        found = set_up(board, wanted, progress=progress, wheels=wheels)
    from edgeprune.devices.setup.checkup import size_text

    for line in found.runtimes:
        text = f"{line.runtime:14} {line.version or '-':10} {line.status:13} {line.reason or ''}"
        click.echo(plain(text).rstrip())
    seconds = sum(found.seconds.values())
    click.echo(
        f"sent {size_text(found.bytes_sent)} in {seconds:.1f} s; next: edgeprune devices check {name}"
    )
    refused = [line for line in found.runtimes if line.status == "refused"]
    if refused:
        raise DeviceError(
            f"device {name!r} cannot run {', '.join(r.runtime for r in refused)}: {refused[0].reason}"
        )


@devices.command()
@_name
@_json
def who(name: str, as_json: bool) -> None:
    """Who holds the board now."""
    from edgeprune.devices.link.replies import Who
    from edgeprune.devices.setup.checkup import asked
    from edgeprune.records.files import to_json

    with _open(name, exclusive=False) as board:
        found = asked(board, Who, "who", {})
    if as_json:
        click.echo(to_json(found).decode(), nl=False)
    else:
        click.echo(plain(f"{name} is {_holder(found.owner)}"))


def _holder(owner: Owner | None) -> str:
    return "free" if owner is None else f"held by {owner.text()}"


@devices.command(short_help="Return once nobody holds the board.")
@_name
@click.option(
    "--timeout", default="10min", show_default=True, help="How long at most: 90s, 10min, 2h."
)
def wait(name: str, timeout: str) -> None:
    """Return once nobody holds the board; exit code 75 after the timeout."""
    from edgeprune.devices.link.replies import Who
    from edgeprune.devices.setup.checkup import asked

    limit_s = _seconds(timeout)
    deadline, owner = time.monotonic() + limit_s, None
    with _open(name, exclusive=False) as board:
        while (owner := asked(board, Who, "who", {}).owner) is not None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise Busy(
                    f"waited {timeout}, and {name} is still {_holder(owner)}",
                    hint=f"wait longer with --timeout, or ask them; edgeprune devices break {name} ends their work",
                )
            time.sleep(min(_POLL_S, left_s))
    click.echo(f"{name} is free")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)(s|min|h)", text.strip())
    if found is None:
        raise SpecError(f"a timeout must look like 90s, 10min or 2h, but got {text!r}")
    return float(found[1]) * {"s": 1, "min": 60, "h": 3600}[found[2]]


@devices.command("break")
@_name
@_yes
def break_lease(name: str, yes: bool) -> None:
    """End the work that holds the board. Only for one's own user on the board."""
    from edgeprune.devices.link.replies import Broken, Who
    from edgeprune.devices.setup.checkup import asked

    with _open(name, exclusive=False) as board:
        owner = asked(board, Who, "who", {}).owner
        if owner is None:
            click.echo(f"{name} is free; there is nothing to end")
            return
        click.echo(plain(f"{name} is {_holder(owner)}"), err=True)
        _agree("End that work?", yes)
        done = asked(board, Broken, "break", {})
    if not done.ended:
        raise DeviceError(
            f"{name} is still {_holder(done.owner or owner)}",
            hint="only the same user on the board can end it; ask them",
        )
    click.echo(f"ended; {name} is free")


def _agree(question: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise SpecError("without a terminal to ask on, --yes must be given")
    click.confirm(question, default=False, abort=True, err=True)


@devices.command()
@_name
@click.option(
    "--all", "everything", is_flag=True, help="Also remove the runtimes that `setup` installed."
)
@wait_option
def clean(name: str, everything: bool, wait: float | None) -> None:
    """Free the board's disk of cached model files and old agents."""
    from edgeprune.devices.link.replies import Cleaned
    from edgeprune.devices.setup.checkup import asked, size_text

    with _open(name, exclusive=True, wait=wait) as board:
        done = asked(board, Cleaned, "clean", {"all": everything}, work_s=_CLEAN_S)
    click.echo(f"freed {size_text(done.freed_bytes)}, kept {size_text(done.kept_bytes)} on {name}")


@devices.command(short_help="Put back the settings of a board.")
@_name
@wait_option
def restore(name: str, wait: float | None) -> None:
    """Put back the settings of the board that were changed for a measurement."""
    from edgeprune.devices.link.replies import Restored
    from edgeprune.devices.setup.checkup import asked

    with _open(name, exclusive=True, wait=wait) as board:
        done = asked(board, Restored, "restore", {})
    if not done.restored:
        click.echo(f"nothing to put back on {name}")
    for setting in done.restored:
        click.echo(plain(f"put back {setting}"))

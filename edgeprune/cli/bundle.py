"""``edgeprune verify`` and ``edgeprune bundle``: whether a bundle is what it says, and who says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from edgeprune.cli.console import plain, say
from edgeprune.cli.options import GivenPath, wait_option
from edgeprune.errors import SpecError


@click.command(short_help="Check a bundle, here and on devices.")
@click.argument("bundle", type=GivenPath())
@click.option(
    "--device",
    "-d",
    "names",
    multiple=True,
    help="Also run it on this device, and time it; may be repeated.",
)
@click.option(
    "--key",
    type=GivenPath(dir_okay=False),
    help="Public key of its maker (PEM or OpenSSH, Ed25519): the bundle must carry its signature.",
)
@click.option(
    "--require-signature",
    is_flag=True,
    help="Fail where no --key is given to check a signature with.",
)
@wait_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(
    bundle: Path,
    names: Sequence[str],
    key: Path | None,
    require_signature: bool,
    wait: float | None,
    as_json: bool,
) -> None:
    """Check a bundle: structure, hashes, signature, model, golden samples here and on devices.

    Exit code 0: every level that ran passed. 7: not what it says. 6: too slow on a device, all else fine. 4: a device could not be
    used. 75: another client holds it.
    """
    from edgeprune.bundle.verify import Level, require_ok
    from edgeprune.bundle.verify import verify as verify_bundle
    from edgeprune.devices.link.wait import WAIT_MINUTES
    from edgeprune.records import catalog
    from edgeprune.records.files import to_json

    if not bundle.exists():
        raise SpecError(
            f"there is no bundle at {bundle}",
            hint="give its folder or its zip, such as runs/rpi4-0123/bundle",
        )
    devices = [(name, catalog.device(name)) for name in names]
    found = verify_bundle(
        bundle,
        devices=devices,
        key=key,
        require_signature=require_signature,
        wait=WAIT_MINUTES if wait is None else wait,
        say=say,
    )
    shown = found
    if not names:
        missing = Level(
            level=5,
            name="on a device",
            status="not-run",
            detail="no device was named: see --device",
        )
        shown = found.model_copy(update={"levels": (*found.levels, missing)})
    if as_json:
        click.echo(to_json(shown).decode(), nl=False)
    else:
        for level in shown.levels:
            click.echo(f"L{level.level} {level.name:28} {level.status:8} {plain(level.detail)}")
            for check in level.checks:
                if check.detail not in level.detail:
                    click.echo(f"   - {check.name:26} {check.status:8} {plain(check.detail)}")
    require_ok(found)


@click.group()
def bundle() -> None:
    """Sign bundles, and describe their files."""


@bundle.command(short_help="Sign a bundle; prints the public key.")
@click.argument("folder", type=GivenPath())
@click.option(
    "--key", required=True, help="Private Ed25519 key: a file of mode 0600, env:NAME or file:/path."
)
def sign(folder: Path, key: str) -> None:
    """Sign the manifest of a bundle; prints the public key that verifiers need."""
    from edgeprune.bundle.sign import sign_bundle

    click.echo(sign_bundle(folder, key), nl=False)
    click.echo(f"signed {folder / 'manifest.json'}; verify with --key and the key above", err=True)


@bundle.command()
@click.argument("folder", type=GivenPath(file_okay=False))
def schema(folder: Path) -> None:
    """Write the JSON Schemas of the files in a bundle into FOLDER."""
    from edgeprune.bundle.schemas import schema_files
    from edgeprune.records.files import write_bytes

    for name, content in schema_files().items():
        write_bytes(folder / name, content)
        click.echo(f"wrote {folder / name}")

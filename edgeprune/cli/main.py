"""The command line: parse, call, print. Results go to stdout, progress and errors to stderr; the exit code says who must act."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

import click

from edgeprune.cli import last_net
from edgeprune.cli.bundle import bundle, verify
from edgeprune.cli.catalog import profiles, targets
from edgeprune.cli.console import plain
from edgeprune.cli.devices import devices
from edgeprune.cli.doctor import doctor
from edgeprune.cli.init import init
from edgeprune.cli.reports import compare, report
from edgeprune.cli.run import deploy, profile, search
from edgeprune.cli.usage import say_wrong_usage
from edgeprune.errors import EdgepruneError
from edgeprune.records.version import VERSION

INTERRUPTED, TERMINATED = 130, 143
_INTERRUPTED_TEXT = "interrupted; run the same command again to go on"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; intended errors become one line on stderr and the exit code of their family, all others one line and 70."""
    last_net.ready_streams()
    try:
        earlier = signal.signal(signal.SIGTERM, _terminated)
    except ValueError:  # only a main thread handles signals
        return last_net.caught(lambda: _main(argv))
    try:
        last_net.caught(lambda: _main(argv))
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _main(argv: Sequence[str] | None) -> None:
    try:
        cli.main(
            args=None if argv is None else list(argv), prog_name="edgeprune", standalone_mode=False
        )
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort as stop:
        if isinstance(stop.__cause__, KeyboardInterrupt):
            click.echo(_INTERRUPTED_TEXT, err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        say_wrong_usage(error, sys.argv[1:] if argv is None else argv)
        sys.exit(error.exit_code)
    except EdgepruneError as error:
        click.echo(f"error: {plain(error.message)}", err=True)
        if error.hint:
            click.echo(f"hint: {plain(error.hint)}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        click.echo(_INTERRUPTED_TEXT, err=True)
        sys.exit(INTERRUPTED)


def _terminated(number: int, frame: object) -> None:
    """Leave as after Ctrl-C: files whole, boards free and as they were."""
    click.echo("ended by a signal; run the same command again to go on", err=True)
    sys.exit(TERMINATED)


@click.group(
    cls=last_net.Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(VERSION, prog_name="edgeprune")
def cli() -> None:
    """Prune, heal, quantise and prove a PyTorch model on the board it has to run on.

    Start in your project's folder with `edgeprune init`, then `edgeprune deploy`; without one: `edgeprune deploy --example fashion-mnist
    --target rpi4`.
    """


for command in (
    init,
    deploy,
    search,
    profile,
    report,
    compare,
    verify,
    bundle,
    targets,
    profiles,
    devices,
    doctor,
):
    cli.add_command(command)

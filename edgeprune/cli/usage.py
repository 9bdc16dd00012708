"""What is said of a command line that cannot be understood."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

import click

from edgeprune.cli.console import plain


def say_wrong_usage(error: click.ClickException, words: Sequence[str]) -> None:
    """A flag or argument that does not exist or does not fit, in the words of all other errors, on stderr.

    Args:
        error: what click found.
        words: the command line, without the program.
    """
    text = error.format_message().rstrip(".")
    if "\n" in text:  # a group without a command: the message is its help
        error.show()
        return
    hint = None
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"{error.ctx.command_path} --help lists what there is"
        if isinstance(error, click.NoSuchOption) and (meant := _meant(error, error.ctx, words)):
            # Not with the names that click finds alike: the option exists.
            text, hint = f"no such option '{error.option_name}' before the command", meant
    click.echo(f"error: {plain(text[:1].lower() + text[1:])}", err=True)
    if hint is not None:
        click.echo(f"hint: {plain(hint)}", err=True)


def _meant(error: click.NoSuchOption, context: click.Context, words: Sequence[str]) -> str | None:
    """What to type where an option of a command stands before that command; ``None`` where no command takes it."""
    group, start = context.command, context.command_path
    if not isinstance(group, click.Group):
        return None
    rest = list(words[len(start.split()) - len(context.find_root().command_path.split()) :])
    for first in range(len(rest)):
        command, n = _command_at(group, rest[first:])
        if n and _takes(command, error.option_name):
            meant = (*rest[first : first + n], *rest[:first], *rest[first + n :])
            return f"options go after the command: {start} {shlex.join(meant)}"
    for names, command in _commands(group):
        if _takes(command, error.option_name):
            example = " ".join((start, *names, error.option_name))
            return f"options go after the command, such as: {example}"
    return None


def _command_at(group: click.Command, words: Sequence[str]) -> tuple[click.Command, int]:
    """The command that the first words name, and how many these are."""
    for n, word in enumerate(words):
        if not isinstance(group, click.Group) or word not in group.commands:
            return group, n
        group = group.commands[word]
    return group, len(words)


def _commands(group: click.Group) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group, with the words that lead to it."""
    for name, command in group.commands.items():
        yield (name,), command
        if isinstance(command, click.Group):
            yield from (((name, *names), below) for names, below in _commands(command))


def _takes(command: click.Command, option: str) -> bool:
    return any(option in parameter.opts for parameter in command.params)

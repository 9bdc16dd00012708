"""Entries of ``devices.yaml``, added, removed and re-pinned in its text, so that comments and layout stay as their author wrote them.

An edit is text around the places that the YAML parser names. The edited file is read again by the usual loader, and its records are
compared with what they should be, before it takes the old one's place; a file that cannot be edited so is left as it is. No secret goes
into the file: a :class:`~edgeprune.records.device.Device` holds references alone.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from edgeprune.errors import SpecError, UnknownName
from edgeprune.records.base import load_yaml, parse, read_yaml
from edgeprune.records.device import Device, DeviceFile, HostKey
from edgeprune.records.files import atomic_path

_NEW_FILE = """\
# The boards on this desk. A device lists the targets it can time; no secret ever stands in this file.
schema_version: 1
devices: {}
"""
# Written although they may equal their defaults: whoever reads an entry looks for them.
_ALWAYS = ("transport", "targets")
_INDENT = 2
Pair = tuple[yaml.Node, yaml.Node]


def check_addable(path: Path, name: str) -> None:
    """Whether :func:`add_device` would find room for ``name``, before any work is put into it.

    Raises:
        SpecError: as :func:`add_device`.
    """
    text, known = _read(path)
    _inserted(text, path, name, _entry(name, Device(transport="local", targets=())), known)


def add_device(path: Path, name: str, device: Device) -> None:
    """Add one entry after the last one; the file is made where it is missing.

    Args:
        path: a devices file. A link is followed; the mode is kept.
        name: the new name.
        device: what stands under it; keys at their defaults are left out.

    Raises:
        SpecError: the name is taken, the file is wrong, or it has a form that no entry can be added to.
        NoSpace: the disk is full; the old file stays.
    """
    text, known = _read(path)
    edited = _inserted(text, path, name, _entry(name, device), known)
    _replace(path, edited, {**known, name: device})


def remove_device(path: Path, name: str) -> None:
    """Remove one entry with the comments inside it; comments above it stay.

    Raises:
        UnknownName: no entry has the name.
        SpecError, NoSpace: as :func:`add_device`.
    """
    text, known = _read(path)
    if name not in known:
        raise UnknownName("device", name, known, where=str(path))
    devices_key, devices = _devices(text, path)
    if not _is_block(devices):
        raise _cannot_edit(path, f"remove the entry {name!r} by hand")
    key, value = _pair(devices, name)
    start = text.rfind("\n", 0, key.start_mark.index) + 1
    end = _after(text, value, key.start_mark.column)
    before, after = text[:start], text[end:]
    if len(known) == 1:  # the key alone would hold nothing, where a mapping has to be
        colon = text.index(":", devices_key.end_mark.index) + 1
        before = f"{text[:colon]} {{}}{text[colon:start]}"
    _replace(path, before + after, {k: d for k, d in known.items() if k != name})


def repin(path: Path, name: str, old: str, new: HostKey) -> None:
    """Pin another host key.

    Args:
        path: a devices file.
        name: the entry.
        old: the fingerprint that has to be the pinned one.
        new: what is pinned instead.

    Raises:
        UnknownName: no entry has the name.
        SpecError: ``old`` is not what is pinned; otherwise as :func:`add_device`.
    """
    text, known = _read(path)
    if name not in known:
        raise UnknownName("device", name, known, where=str(path))
    pinned = known[name].host_key
    if pinned is None:
        raise SpecError(f"the device {name!r} in {path} has no host key to replace")
    if pinned.sha256 != old:
        raise SpecError(
            f"the host key that is pinned for {name!r} is {pinned.sha256}, but --old is {old}",
            hint="give the pinned one as --old, so that it is clear which key is given up",
        )
    _, value = _pair(_pair(_devices(text, path)[1], name)[1], "host_key")
    _, fingerprint = _pair(value, "sha256")
    edits = [(fingerprint, _like(fingerprint, new.sha256))]
    if new.key_type != pinned.key_type:
        types = [node for key, node in _pairs(value) if key.value == "key_type"]
        if types:
            edits.append((types[0], _like(types[0], new.key_type)))
        else:
            column = _pairs(value)[0][0].start_mark.column
            between = f"{_newline(text)}{' ' * column}" if _is_block(value) else ", "
            edits = [(fingerprint, f"{edits[0][1]}{between}key_type: {new.key_type}")]
    for node, replacement in sorted(edits, key=lambda e: e[0].start_mark.index, reverse=True):
        text = text[: node.start_mark.index] + replacement + text[node.end_mark.index :]
    _replace(path, text, {**known, name: known[name].model_copy(update={"host_key": new})})


def _read(path: Path) -> tuple[str, dict[str, Device]]:
    """The text of a devices file and its records; a file that is missing, and one whose ``devices:`` is empty, have none."""
    if not path.exists():
        return _NEW_FILE, {}
    value = load_yaml(path)
    if isinstance(value, dict) and "devices" in value and value["devices"] is None:
        found = parse(DeviceFile, {**value, "devices": {}}, where=str(path))
    else:
        found = read_yaml(DeviceFile, path)
    return path.read_bytes().decode("utf-8"), dict(found.devices)


def _inserted(text: str, path: Path, name: str, entry: str, known: Mapping[str, Device]) -> str:
    if name in known:
        raise SpecError(
            f"the device {name!r} exists already in {path}",
            hint=f"take another name, or run: edgeprune devices remove {name}",
        )
    key, devices = _devices(text, path)
    newline = _newline(text)
    if _is_block(devices):
        last_key, last_value = _pairs(devices)[-1]
        column = last_key.start_mark.column
        at = _after(text, last_value, column)
    elif not known:
        # ``{}``, ``null`` or nothing: the entry goes on the lines below.
        head = text[: devices.start_mark.index].rstrip(" ")
        text = head + text[devices.end_mark.index :]
        column = key.start_mark.column + _INDENT
        at = _line_end(text, len(head))
    else:
        raise _cannot_edit(path, "write each device on lines of its own, as `edgeprune` does")
    lines = [" " * column + line + newline for line in entry.splitlines()]
    missing = "" if text[:at].endswith("\n") else newline
    return text[:at] + missing + "".join(lines) + text[at:]


def _entry(name: str, device: Device) -> str:
    """One entry as YAML: keys in the order of the record, without those at their defaults, small mappings on one line."""
    facts: dict[str, Any] = device.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    written = {k: device.model_dump(mode="json")[k] for k in _ALWAYS} | facts
    if device.auth is not None:
        written["auth"] = device.auth.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(
        {name: written}, sort_keys=False, default_flow_style=None, width=4096, allow_unicode=True
    )


def _replace(path: Path, text: str, expected: Mapping[str, Device]) -> None:
    """Put the edited text in the file's place, once the usual loader reads exactly the expected records from it."""
    target = path.resolve()
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else 0o644
    with atomic_path(target, mode=mode) as temporary:
        temporary.write_bytes(text.encode("utf-8"))
        try:
            found = list(read_yaml(DeviceFile, temporary).devices.items())
        except SpecError as error:
            raise _cannot_edit(path, "edit it by hand") from error
        if found != list(expected.items()):
            raise _cannot_edit(path, "edit it by hand")


def _cannot_edit(path: Path, advice: str) -> SpecError:
    return SpecError(
        f"{path} has a form that cannot be edited without changing the rest of it; nothing was written",
        hint=advice,
    )


def _devices(text: str, path: Path) -> Pair:
    """The key ``devices`` and what it holds, with their places in the text."""
    root = yaml.compose(text, yaml.SafeLoader)
    if not _is_block(root):
        raise _cannot_edit(path, "write the file with one key on each line")
    return next((key, value) for key, value in _pairs(root) if key.value == "devices")


def _pairs(node: yaml.Node | None) -> list[Pair]:
    return list(node.value) if isinstance(node, yaml.MappingNode) else []


def _pair(node: yaml.Node, name: str) -> Pair:
    return next((key, value) for key, value in _pairs(node) if key.value == name)


def _is_block(node: yaml.Node | None) -> bool:
    return isinstance(node, yaml.CollectionNode) and bool(node.value) and not node.flow_style


def _after(text: str, value: yaml.Node, column: int) -> int:
    """Where the next entry can start: after the value's last line, and after comments that are indented deeper than its key."""
    last: Any = value
    while _is_block(last):  # the parser ends a block only where the next token starts
        last = last.value[-1]
        last = last[1] if isinstance(last, tuple) else last
    at = _line_end(text, last.end_mark.index)
    while at < len(text):
        line = text[at : _line_end(text, at + 1)]
        indent = len(line) - len(line.lstrip(" "))
        if not line.lstrip(" ").startswith("#") or indent <= column:
            break
        at += len(line)
    return at


def _line_end(text: str, index: int) -> int:
    """Start of the line after the one that ends at or holds ``index``; a block scalar ends at a line's start already."""
    if text[index - 1 : index] == "\n":
        return index
    found = text.find("\n", index)
    return len(text) if found < 0 else found + 1


def _like(node: yaml.Node, text: str) -> str:
    """A scalar in the quotes of the one that it replaces."""
    style = node.style if isinstance(node, yaml.ScalarNode) else None
    quote = style if style in ("'", '"') else ""
    return f"{quote}{text}{quote}"


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"

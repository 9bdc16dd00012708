"""The base of everything that crosses a file: strict, frozen records, read and written atomically.

A record refuses unknown keys, wrong types and (for YAML) duplicate keys, and says which key of which file is wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from edgeprune.errors import (
    MAX_SHOWN,
    EdgepruneError,
    IntegrityError,
    SpecError,
    UnknownName,
    reason_of,
    shown,
)

MAX_TEXT_BYTES = 256 * 1024 * 1024
MAX_YAML_BYTES = 1024 * 1024
MAX_YAML_DEPTH = 32
MAX_NUMBER_CHARS = 64  # no key takes more, and one of many digits costs minutes to work out


class Record(BaseModel):
    """Plain, immutable data with checked types; what edgeprune reads from and writes to files."""

    model_config = ConfigDict(
        hide_input_in_errors=True, frozen=True, strict=True, extra="forbid", allow_inf_nan=False
    )


class Located(Record):
    """A record that knows where it lies; the place is no part of its content, and is not written."""

    _folder: Path | None = PrivateAttr(default=None)

    def lies_in(self, folder: Path) -> None:
        """Remember the folder of the record's file."""
        self._folder = folder.absolute()

    @property
    def folder(self) -> Path:
        """The folder of the record's file, absolute.

        Raises:
            SpecError: the record was neither read from a file nor written to one.
        """
        if self._folder is None:
            raise SpecError(f"this {type(self).__name__} lies in no folder: it has no file")
        return self._folder


R = TypeVar("R", bound=Record)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, but a repeated key is an error instead of the last one winning, and whatever cannot be read has its line."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """What a node stands for; of ``!!int x`` and its like, PyYAML's own constructors raise errors of many types."""
        is_number = node.tag.endswith((":int", ":float"))
        if is_number and len(node.value) > MAX_NUMBER_CHARS:
            text = f"a number must have at most {MAX_NUMBER_CHARS} characters, but this has {len(node.value)}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:
            text = f"{node.value!r:.{MAX_SHOWN}} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# A date stays the text it was written as; records check its form.
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load_yaml(path: Path) -> Any:
    """The plain data in a YAML file.

    Raises:
        SpecError: the file is missing, too large (1 MiB), too deep (32 levels), not YAML, uses aliases or tags, or repeats a key.
    """
    try:
        raw = _read(path, MAX_YAML_BYTES)
    except (OSError, ValueError) as error:  # a ValueError is a path that none can have
        raise SpecError(f"cannot read {shown(path)}: {reason_of(error)}") from error
    if len(raw) > MAX_YAML_BYTES:
        raise SpecError(f"{path} must be at most {MAX_YAML_BYTES} bytes, but has more")
    try:
        text = raw.decode("utf-8")
        _check_events(text, path)
        # The loader derives from SafeLoader, so no tag can build a Python object.
        return yaml.load(text, _UniqueKeyLoader)  # noqa: S506
    except UnicodeDecodeError as error:
        raise SpecError(f"{path} is not UTF-8 text") from error
    except EdgepruneError:
        raise
    except Exception as error:  # PyYAML has errors of its own, and lets those of Python through
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise SpecError(f"{path}{line} is not valid: {_problem(error)}") from error


def _read(path: Path, limit: int) -> bytes:
    """Content of a file, and no more of it than shows that it is over the limit: some never end, such as ``/dev/zero``."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        return stream.read((size if 0 < size < limit else limit) + 1)


def _problem(error: Exception) -> str:
    """The first line of what is wrong with a text."""
    lines = str(getattr(error, "problem", None) or error).splitlines()
    return lines[0] if lines else type(error).__name__


def _check_events(text: str, path: Path) -> None:
    """Refuse what can make a small file expensive before anything is built from it: aliases and deep nesting."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise SpecError(f"{path} must not use YAML aliases")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            raise SpecError(f"{path} must nest at most {MAX_YAML_DEPTH} levels deep")


def parse(cls: type[R], value: Any, *, where: str, said: Mapping[str, str] | None = None) -> R:
    """A record from plain data, checked in strict JSON mode, so that YAML's ``no`` or ``1e-3`` never changes type.

    Args:
        cls: the kind of record.
        value: plain data.
        where: what messages call the source.
        said: what messages call a key, by its dotted name, where ``where`` is not what the user wrote.

    Raises:
        UnknownName: a key that the record does not have; names the nearest one.
        SpecError: any other broken rule; names the field, the value and the file.
    """
    try:
        return cls.model_validate_json(json.dumps(value))
    except ValidationError as error:
        raise _spec_error(cls, error, where, said or {}) from error
    except Exception as error:  # what is not JSON, however deep, and a record's own rules
        raise SpecError(f"{where} must be plain data with text keys: {_problem(error)}") from error


def _spec_error(
    cls: type[Record], error: ValidationError, where: str, said: Mapping[str, str]
) -> EdgepruneError:
    # A misspelt required key is both missing and unknown; the unknown key is what has to be told.
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    location = [str(part) for part in first["loc"]]
    name = shown(".".join(location) or "the document")
    if first["type"] == "extra_forbidden":
        return UnknownName("key", name, _known_keys(cls, location[:-1]), where=where)
    if first["type"] == "missing":
        return SpecError(f"{where} must have the key {name!r}")
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if isinstance(first["input"], dict):  # the rule is about the whole record, which says nothing
        return SpecError(f"{name} in {where}: {message}")
    # Whoever writes a secret where a reference belongs must not find it in a log.
    value = "a hidden value" if name.endswith("_ref") else f"{first['input']!r:.200}"
    if first["type"] == "string_pattern_mismatch" and (form := _form(cls, location)):
        message = f"it must be {form}"
    found = "" if "but got" in message else f", but got {value}"
    return SpecError(f"{said.get(name, f'{name} in {where}')}: {message}{found}")


def _known_keys(cls: type[Record], path: list[str]) -> list[str]:
    """Keys of the record at a dotted path, prefixed so that suggestions read like the wrong key."""
    prefix = "".join(f"{part}." for part in path)
    return [prefix + key for key in _fields_at(cls, path)]


def _form(cls: type[Record], location: list[str]) -> str | None:
    """What a value has to look like, in words: the description of its field."""
    field = _fields_at(cls, location[:-1]).get(location[-1])
    return None if field is None else field.description


def _fields_at(cls: type[Record], path: list[str]) -> dict[str, Any]:
    """The fields of the record at a dotted path."""
    current: Any = cls
    for part in path:
        field = getattr(current, "model_fields", {}).get(part)
        found = [field.annotation] if field is not None else []
        nested = [a for f in found for a in (f, *getattr(f, "__args__", ()))]
        current = next((a for a in nested if hasattr(a, "model_fields")), current)
    return dict(getattr(current, "model_fields", {}))


def read_yaml(cls: type[R], path: Path) -> R:
    """Read one record from a YAML file. Raises as :func:`load_yaml` and :func:`parse`."""
    value = load_yaml(path)
    if not isinstance(value, dict):
        raise SpecError(f"{path} must hold a mapping of keys to values")
    return parse(cls, value, where=str(path))


def read_json(cls: type[R], path: Path) -> R:
    """Read one record that the program wrote; a :class:`Located` one knows where.

    Raises:
        IntegrityError: the file is missing, truncated, or not such a record.
    """
    try:
        content = _read(path, MAX_TEXT_BYTES)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"cannot read {shown(path)}: {reason_of(error)}") from error
    if len(content) > MAX_TEXT_BYTES:
        raise IntegrityError(f"{path} is larger than {MAX_TEXT_BYTES} bytes")
    try:
        record = cls.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(
            f"{path} is not a valid {cls.__name__}: {shown(place)} {first['msg']}"
        ) from error
    except Exception as error:  # a record's own rules, on figures that fit no other
        raise IntegrityError(f"{path} is not a valid {cls.__name__}: {_problem(error)}") from error
    if isinstance(record, Located):
        record.lies_in(path.parent)
    return record

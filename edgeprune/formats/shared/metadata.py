"""What a model file says about itself once it has left its bundle: a few texts at its end, which every runtime passes over.

One :class:`Carrier` for each file suffix; a suffix without one ships as it is, and its manifest says so. Each carrier only appends, so
that the file that was measured is a prefix of the file that ships and can be cut out again. Reading is safe on hostile files: no parser
of a runtime takes part, nothing is unpacked, and sizes are capped before anything is read.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from edgeprune.errors import IntegrityError
from edgeprune.formats.shared import protobuf

PREFIX = "edgeprune."
JSON_FILE, LABELS_FILE = "edgeprune.json", "labels.txt"
MAX_TEXT_BYTES = 256 * 1024
MAX_LABELS_BYTES = 8 * 1024**2
_MAX_DIRECTORY_BYTES = 1024  # two entries with short names
_END = struct.Struct("<4s4H2IH")  # end record of a zip
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Found:
    """What a file carries: its texts by key, its labels file where it has one, and the model without them."""

    texts: Mapping[str, str]
    labels: bytes | None
    model: bytes


class Carrier(Protocol):
    """How files of one kind carry texts."""

    def attach(self, content: bytes, texts: Mapping[str, str], labels: bytes) -> bytes:
        """The file with the texts; keys are full ones such as ``edgeprune.name``. Equal arguments give equal bytes."""
        ...

    def read(self, content: bytes) -> Found | None:
        """What the file carries; ``None`` when it carries nothing.

        Raises:
            IntegrityError: what it carries is damaged, too large or of another form.
        """
        ...


class ZipTail:
    """A zip behind the model: how TensorFlow Lite packs associated files. Anything that opens a zip reads it.

    Source: https://ai.google.dev/edge/litert/models/metadata (read 2026-11-25), "Pack metadata and associated files into the model".
    """

    def attach(self, content: bytes, texts: Mapping[str, str], labels: bytes) -> bytes:
        """See :class:`Carrier`."""
        stream = io.BytesIO(content)
        record = json.dumps(dict(texts), sort_keys=True, indent=1, ensure_ascii=False)
        with zipfile.ZipFile(stream, "a", zipfile.ZIP_STORED) as out:
            for name, data in ((JSON_FILE, record.encode()), (LABELS_FILE, labels)):
                entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
                entry.create_system = 3
                entry.external_attr = 0o100644 << 16
                out.writestr(entry, data)
        return stream.getvalue()

    def read(self, content: bytes) -> Found | None:
        """See :class:`Carrier`."""
        if len(content) < _END.size or content[-_END.size : -_END.size + 4] != b"PK\x05\x06":
            return None
        _check_directory(content)
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as tail:
                entries = {entry.filename: entry for entry in tail.infolist()}
                _check_entries(tail.infolist())
                record = tail.read(entries[JSON_FILE])
                labels = tail.read(entries[LABELS_FILE])
        except (
            zipfile.BadZipFile,
            EOFError,
            ValueError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise IntegrityError(f"the zip behind the model is not sound: {error}") from error
        start = min(entry.header_offset for entry in entries.values())
        return Found(_texts(record), labels, content[:start])


class OnnxProps:
    """``metadata_props`` of an ONNX model, which onnxruntime shows as ``custom_metadata_map``.

    They are appended as bytes: a repeated field may stand anywhere in a protobuf message.

    Source: ``onnx.proto``, field 14 of ``ModelProto`` (StringStringEntryProto: key 1, value 2).
    """

    def attach(self, content: bytes, texts: Mapping[str, str], labels: bytes) -> bytes:
        """See :class:`Carrier`; the labels become the text ``edgeprune.labels``."""
        given = {**texts, PREFIX + "labels": labels.decode()}
        parts = [content]
        for key, value in sorted(given.items()):
            pair = protobuf.field_bytes(1, key.encode()) + protobuf.field_bytes(2, value.encode())
            parts.append(protobuf.field_bytes(14, pair))
        return b"".join(parts)

    def read(self, content: bytes) -> Found | None:
        """See :class:`Carrier`."""
        pairs: list[tuple[int, str, str]] = []
        try:
            for number, value, start in protobuf.fields(memoryview(content)):
                if number != 14 or isinstance(value, int):
                    pairs.clear()  # only texts behind everything else were appended here
                    continue
                if len(value) > MAX_LABELS_BYTES + 1024:
                    raise IntegrityError("a text inside the model is too large")
                pair = {k: bytes(v) for k, v, _ in protobuf.fields(value) if not isinstance(v, int)}
                key, text = pair.get(1, b"").decode(), pair.get(2, b"").decode()
                if key.startswith(PREFIX):
                    pairs.append((start, key, text))
        except (ValueError, IndexError) as error:
            raise IntegrityError(f"the model is not a sound onnx file: {error}") from error
        if not pairs:
            return None
        texts = {key: text for _, key, text in pairs}
        if len(texts) != len(pairs):
            raise IntegrityError("a text inside the model is there twice")
        labels = texts.pop(PREFIX + "labels", None)
        if sum(map(len, texts.values())) > MAX_TEXT_BYTES:
            raise IntegrityError(
                f"the texts inside the model must be at most {MAX_TEXT_BYTES} bytes"
            )
        return Found(texts, None if labels is None else labels.encode(), content[: pairs[0][0]])


_CARRIERS: dict[str, Carrier] = {".tflite": ZipTail(), ".onnx": OnnxProps()}


def carrier(suffix: str) -> Carrier | None:
    """How files with this suffix carry texts; ``None`` when they do not."""
    return _CARRIERS.get(suffix)


def _check_directory(content: bytes) -> None:
    _, disk, start_disk, here, entries, size, offset, comment = _END.unpack(content[-_END.size :])
    if (disk, start_disk, here, entries, comment) != (0, 0, 2, 2, 0) or size > _MAX_DIRECTORY_BYTES:
        raise IntegrityError(
            f"the zip behind the model must hold {JSON_FILE} and {LABELS_FILE} alone"
        )
    if offset + size + _END.size != len(content):
        raise IntegrityError("the zip behind the model does not end where it says")


def _check_entries(entries: list[zipfile.ZipInfo]) -> None:
    caps = {JSON_FILE: MAX_TEXT_BYTES, LABELS_FILE: MAX_LABELS_BYTES}
    if sorted(entry.filename for entry in entries) != sorted(caps):
        raise IntegrityError(
            f"the zip behind the model must hold {JSON_FILE} and {LABELS_FILE} alone"
        )
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1:
            raise IntegrityError(f"{entry.filename} behind the model must be stored plainly")
        if entry.file_size > caps[entry.filename] or entry.file_size != entry.compress_size:
            raise IntegrityError(
                f"{entry.filename} behind the model must be at most {caps[entry.filename]} bytes"
            )


def _texts(record: bytes) -> dict[str, str]:
    try:
        found = json.loads(record)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{JSON_FILE} inside the model is not JSON") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise IntegrityError(f"{JSON_FILE} inside the model must map keys to texts")
    return found

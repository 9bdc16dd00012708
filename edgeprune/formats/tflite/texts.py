"""How a ``.tflite`` file carries texts: in a zip behind the model."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping

from edgeprune.errors import IntegrityError
from edgeprune.formats.shared.metadata import MAX_LABELS_BYTES, MAX_TEXT_BYTES, Found

JSON_FILE, LABELS_FILE = "edgeprune.json", "labels.txt"
_MAX_DIRECTORY_BYTES = 1024  # two entries with short names
_END = struct.Struct("<4s4H2IH")  # end record of a zip
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


class ZipTail:
    """A zip behind the model: how TensorFlow Lite packs associated files. Anything that opens a zip reads it.

    Source: https://ai.google.dev/edge/litert/models/metadata (read 2026-11-25), "Pack metadata and associated files into the model".
    """

    def attach(self, content: bytes, texts: Mapping[str, str], labels: bytes) -> bytes:
        """See :class:`edgeprune.formats.shared.metadata.Carrier`."""
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
        """See :class:`edgeprune.formats.shared.metadata.Carrier`."""
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

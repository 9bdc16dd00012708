"""How an ONNX file carries texts: in the properties of the model."""

from __future__ import annotations

from collections.abc import Mapping

from edgeprune.errors import IntegrityError
from edgeprune.formats.shared.metadata import MAX_LABELS_BYTES, MAX_TEXT_BYTES, PREFIX, Found
from edgeprune.formats.shared.protobuf import field_bytes, fields


class OnnxProps:
    """``metadata_props`` of an ONNX model, which onnxruntime shows as ``custom_metadata_map``.

    They are appended as bytes: a repeated field may stand anywhere in a protobuf message.

    Source: ``onnx.proto``, field 14 of ``ModelProto`` (StringStringEntryProto: key 1, value 2).
    """

    def attach(self, content: bytes, texts: Mapping[str, str], labels: bytes) -> bytes:
        """See :class:`edgeprune.formats.shared.metadata.Carrier`; the labels become the text ``edgeprune.labels``."""
        given = {**texts, PREFIX + "labels": labels.decode()}
        parts = [content]
        for key, value in sorted(given.items()):
            pair = field_bytes(1, key.encode()) + field_bytes(2, value.encode())
            parts.append(field_bytes(14, pair))
        return b"".join(parts)

    def read(self, content: bytes) -> Found | None:
        """See :class:`edgeprune.formats.shared.metadata.Carrier`."""
        pairs: list[tuple[int, str, str]] = []
        try:
            for number, value, start in fields(memoryview(content)):
                if number != 14 or isinstance(value, int):
                    pairs.clear()  # only texts behind everything else were appended here
                    continue
                if len(value) > MAX_LABELS_BYTES + 1024:
                    raise IntegrityError("a text inside the model is too large")
                pair = {k: bytes(v) for k, v, _ in fields(value) if not isinstance(v, int)}
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

"""What is made of a model in the throw-away format."""

from __future__ import annotations

from edgeprune.formats import Format
from edgeprune.formats.onnx.format import OnnxFormat
from edgeprune.records.formats import format_facts


class BentFormat(OnnxFormat):
    """See :class:`edgeprune.formats.Format`."""

    info = format_facts("bent")


FORMAT: Format = BentFormat()

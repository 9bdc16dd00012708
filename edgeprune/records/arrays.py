"""Arrays from files and boards that nobody vouches for: no pickle, and no more memory than the content itself has."""

from __future__ import annotations

import ast
import math
import zipfile
from typing import BinaryIO

import numpy as np

_MAGIC = b"\x93NUMPY"
_LENGTH_BYTES = {1: 2, 2: 4}  # of the header's length, by the version of the form
_MAX_HEADER_BYTES = 10_000
_MAX_RANK = 32
_KINDS = "biufcSU"  # booleans, numbers and texts
_KEYS = {"descr", "fortran_order", "shape"}
_SUFFIX = ".npy"
_MAX_DEFLATE_RATIO = 1032  # what DEFLATE can reach at most
_PIECE = 1 << 20
_PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def npy_array(content: bytes | bytearray) -> np.ndarray:
    """The array in the content of a ``.npy`` file, in the byte order of this machine; it may be changed.

    Type and shape must account for every byte behind the header, which is looked at before any memory is taken.

    Source: the NPY format, versions 1.0 and 2.0, of numpy's ``lib.format``.

    Raises:
        ValueError: it is no such file, holds objects or records, or its shape does not fit; says which in one line.
    """
    dtype, in_columns, shape, start = _header(content)
    wanted, there = dtype.itemsize * math.prod(shape), len(content) - start
    if wanted != there:
        raise ValueError(
            f"its header needs {wanted} bytes for {dtype} {list(shape)}, but {there} follow"
        )
    if not wanted:
        return np.zeros(shape, dtype)
    flat = np.frombuffer(content, dtype, offset=start)
    found = flat.reshape(shape, order="F" if in_columns else "C")
    native = found.astype(dtype.newbyteorder("="), copy=False)
    return native if native.flags.writeable else native.copy(order="K")


def npz_arrays(source: BinaryIO, most_bytes: int) -> dict[str, np.ndarray]:
    """The arrays in an ``.npz`` file by name. What an entry claims to unpack to is believed as far as its packed size allows.

    Args:
        source: the file, open to be read.
        most_bytes: that all entries may unpack to.

    Raises:
        ValueError: an entry is no plain array, or they unpack to more than ``most_bytes``.
        OSError, EOFError, zipfile.BadZipFile, zlib.error: the zip is damaged.
    """
    found: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > most_bytes:
            raise ValueError(f"it unpacks to {total} bytes, more than {most_bytes}")
        for entry in entries:
            name = entry.filename.removesuffix(_SUFFIX)
            if name == entry.filename or name in found:
                raise ValueError(f"its entry {entry.filename!r:.80} is not one array")
            try:
                found[name] = npy_array(_unpacked(archive, entry))
            except ValueError as error:
                raise ValueError(f"its array {name!r:.80} cannot be read: {error}") from error
    return found


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytearray:
    if entry.compress_type not in _PLAIN or entry.flag_bits & 0x1:
        raise ValueError("it must be stored or deflated, and not encrypted")
    if entry.file_size > _MAX_DEFLATE_RATIO * (entry.compress_size + 1):
        raise ValueError(f"{entry.compress_size} bytes cannot unpack to {entry.file_size}")
    content, at = bytearray(entry.file_size), 0
    with archive.open(entry) as stream:
        while piece := stream.read(_PIECE):
            content[at : at + len(piece)] = piece
            at += len(piece)
    if at != entry.file_size:
        raise ValueError(f"it must unpack to {entry.file_size} bytes")
    return content


def _header(content: bytes | bytearray) -> tuple[np.dtype, bool, tuple[int, ...], int]:
    """Type, whether columns come first, shape, and where the elements start."""
    if not content.startswith(_MAGIC):
        raise ValueError("it does not begin as a .npy file")
    size = _LENGTH_BYTES.get(content[6] if len(content) > 6 else 0)
    if size is None:
        raise ValueError("its version is not 1 or 2")
    begin = 8 + size
    length = int.from_bytes(content[8:begin], "little")
    if length > _MAX_HEADER_BYTES or begin + length > len(content):
        raise ValueError(f"its header of {length} bytes is cut, or over {_MAX_HEADER_BYTES} bytes")
    try:
        fields = ast.literal_eval(bytes(content[begin : begin + length]).decode("latin-1").strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("its header is not Python text") from error
    if not isinstance(fields, dict) or set(fields) != _KEYS:
        raise ValueError("its header must have descr, fortran_order and shape")
    shape, in_columns = fields["shape"], fields["fortran_order"]
    is_shape = isinstance(shape, tuple) and len(shape) <= _MAX_RANK
    if not is_shape or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise ValueError("its shape is not a tuple of sizes")
    return _dtype(fields["descr"]), in_columns is True, shape, begin + length


def _dtype(descr: object) -> np.dtype:
    try:
        found = np.dtype(descr) if isinstance(descr, str) else None
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"its type {descr!r:.80} is not one of numpy's") from error
    if found is not None and found.hasobject:
        raise ValueError("it holds Python objects, which need pickle and are not read")
    if found is None or found.kind not in _KINDS or not found.itemsize:
        raise ValueError(f"its type {descr!r:.80} is neither number nor text")
    return found

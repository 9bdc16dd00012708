"""Arrays that nobody vouches for: whatever a file claims, it is read as it is or refused in one line."""

from __future__ import annotations

import io
import random
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from edgeprune.records.arrays import npy_array, npz_arrays


def npy(array: np.ndarray, *, pickled: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=pickled)
    return stream.getvalue()


def claimed(header: str, data: bytes = b"", version: int = 1) -> bytes:
    """A file with any header; ``data`` is what follows."""
    text = header.encode("latin-1") + b"\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def of(shape: str, descr: str = "'<f4'", data: bytes = b"") -> bytes:
    return claimed(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}", data)


ARRAYS = [
    np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    np.arange(6, dtype=np.uint8),
    np.asfortranarray(np.arange(12, dtype=np.int64).reshape(3, 4)),
    np.arange(5, dtype=">f8"),
    np.array(["cat", "dog"]),
    np.array(2.5, np.float16),
    np.zeros((0, 3, 32, 32), np.float32),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_what_numpy_wrote_is_read_as_it_was(array: np.ndarray) -> None:
    found = npy_array(npy(array))
    assert np.array_equal(found, array)
    assert found.dtype == array.dtype.newbyteorder("=")
    assert found.flags.writeable
    assert found.flags.c_contiguous == np.ascontiguousarray(array).flags.c_contiguous or (
        array.flags.f_contiguous and found.flags.f_contiguous
    )


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "does not begin as a .npy file"),
        (b"PK\x03\x04" + bytes(60), "does not begin as a .npy file"),
        (b"\x93NUMPY", "version is not 1 or 2"),
        (b"\x93NUMPY\x09\x00" + bytes(60), "version is not 1 or 2"),
        (claimed("{'descr'", version=1)[:9], "is cut"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "header of 4294967295 bytes"),
        (claimed("(" * 5000), "is not Python text"),
        (claimed("__import__('os').system('true')"), "is not Python text"),
        (claimed("[1]"), "must have descr"),
        (of("(3,)", "'|O'", bytes(24)), "Python objects"),
        (of("(3,)", "[('a', '<f4')]", bytes(12)), "neither number nor text"),
        (of("(3,)", "'(10,)<f4'", bytes(120)), "neither number nor text"),
        (of("(3,)", "'(1000000000,)<f4'", bytes(12)), "not one of numpy's"),
        (of("(3,)", "'<q9'", bytes(12)), "not one of numpy's"),
        (of("(1000000, 1000000, 1000000)"), "but 0 follow"),
        (of("(4611686018427387904, 4)"), "but 0 follow"),
        (of("(-3,)", data=bytes(12)), "not a tuple of sizes"),
        (of("(True,)", data=bytes(4)), "not a tuple of sizes"),
        (of("3", data=bytes(12)), "not a tuple of sizes"),
        (of("(" + "1," * 100 + ")", data=bytes(4)), "not a tuple of sizes"),
        (npy(np.ones(9, np.float32))[:-1], "needs 36 bytes for float32 [9], but 35 follow"),
        (npy(np.ones(9, np.float32)) + b"x", "but 37 follow"),
        (npy(np.array([{}], dtype=object), pickled=True), "Python objects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_hostile_file_is_refused_in_one_line(content: bytes, why: str) -> None:
    with pytest.raises(ValueError, match="it") as error:
        npy_array(content)
    assert why in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_read_or_refused_and_nothing_else() -> None:
    rng, whole, outcomes = random.Random(5), npy(ARRAYS[0]), set()
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            outcomes.add(npy_array(bytes(damaged)).size <= len(whole))
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {True, "refused"}


def test_an_npz_gives_its_arrays(tmp_path: Path) -> None:
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", x=ARRAYS[0], y=ARRAYS[1])
        with (tmp_path / "a.npz").open("rb") as stream:
            found = npz_arrays(stream, 10_000)
        assert list(found) == ["x", "y"]
        assert np.array_equal(found["x"], ARRAYS[0])
        assert found["x"].flags.writeable


def _zip(name: str, content: bytes, **changes: int) -> io.BytesIO:
    """A zip of one entry, whose directory claims what ``changes`` say."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr(name, content)
        for key, value in changes.items():
            setattr(out.filelist[0], key, value)
    return stream


def test_an_entry_that_claims_gigabytes_takes_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, content, changes, why in (
        ("x.npy", npy(ARRAYS[0]), {"file_size": 2**31}, "cannot unpack to"),
        ("x.npy", npy(ARRAYS[0]), {"file_size": 2**33}, "more than 4294967296"),
        ("x.npy", of("(500000000,)"), {}, "needs 2000000000 bytes"),
        ("readme.txt", b"hello", {}, "is not one array"),
        ("x.npy", npy(ARRAYS[0]), {"file_size": 300}, "must unpack to 300 bytes"),
    ):
        with pytest.raises(ValueError, match=why):
            npz_arrays(_zip(name, content, **changes), 2**32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024

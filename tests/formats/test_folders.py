"""Models that are folders: packed to equal bytes, written whole or not at all, and nothing unpacked that leaves the folder."""

from __future__ import annotations

import errno
import io
import zipfile
from pathlib import Path

import pytest

from edgeprune.errors import IntegrityError, NoSpace
from edgeprune.formats.shared import model_bytes as folders
from edgeprune.formats.shared.model_bytes import (
    files_of,
    model_bytes,
    packed,
    unpacked,
    write_folder,
)

FILES = {"Manifest.json": b"{}", "Data/weights/weight.bin": bytes(range(256)), "Data/model": b"m"}


def zipped(name: str, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(name, b"x" * 100)
    return stream.getvalue()


def test_equal_files_give_equal_bytes_in_whatever_order_they_come() -> None:
    backwards = dict(reversed(FILES.items()))
    assert packed(FILES) == packed(backwards)
    assert packed(FILES) != packed({**FILES, "Data/model": b"n"})
    assert unpacked(packed(FILES)) == FILES


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "net.mlpackage"
    write_folder(place, {"old": b"1", "Data/model": b"old"})
    write_folder(place, FILES)
    assert files_of(place) == FILES
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    assert model_bytes(place) == packed(FILES)


def test_a_file_in_its_place_is_replaced_too(tmp_path: Path) -> None:
    (tmp_path / "net").write_bytes(b"file")
    assert model_bytes(tmp_path / "net") == b"file"
    write_folder(tmp_path / "net", FILES)
    assert files_of(tmp_path / "net") == FILES


def test_a_full_disk_leaves_the_old_folder_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "net.mlpackage"
    write_folder(place, {"old": b"1"})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders.os, "fsync", full)
    with pytest.raises(NoSpace):
        write_folder(place, FILES)
    assert files_of(place) == {"old": b"1"}
    assert [p.name for p in tmp_path.iterdir()] == [place.name]


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a\\evil"])
def test_a_path_that_leaves_the_folder_is_refused(name: str) -> None:
    with pytest.raises(IntegrityError, match="must not hold"):
        unpacked(zipped(name))


def test_what_is_no_stored_zip_is_refused() -> None:
    with pytest.raises(IntegrityError, match="must be stored"):
        unpacked(zipped("a", zipfile.ZIP_DEFLATED))
    with pytest.raises(IntegrityError, match="not a sound packed folder"):
        unpacked(b"no zip")


def test_a_link_is_no_file_of_a_model(tmp_path: Path) -> None:
    write_folder(tmp_path / "net", FILES)
    (tmp_path / "net" / "link").symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match="regular file"):
        files_of(tmp_path / "net")

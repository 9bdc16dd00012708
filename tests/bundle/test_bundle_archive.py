from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path

import pytest

from edgeprune.bundle import archive
from edgeprune.bundle.archive import extract, files_under, write_zip
from edgeprune.errors import IntegrityError


def _entry(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system = 3
    entry.external_attr = mode << 16
    return entry


def _zip(path: Path, entries: list[tuple[zipfile.ZipInfo, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for entry, content in entries:
            out.writestr(entry, content)
    return path


def _refused(path: Path, into: Path) -> str:
    with pytest.raises(IntegrityError) as caught:
        extract(path, into)
    return str(caught.value)


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "deep" / "into"
    folder.mkdir(parents=True)
    return folder


def test_a_zip_comes_back_as_the_files_it_was_made_of(tmp_path: Path, into: Path) -> None:
    source = tmp_path / "source"
    (source / "b").mkdir(parents=True)
    (source / "b" / "x.bin").write_bytes(os.urandom(5000))
    (source / "a.txt").write_text("text")
    write_zip(source, tmp_path / "s.zip", top="top")
    extract(tmp_path / "s.zip", into)
    assert files_under(into) == ["a.txt", "b/x.bin"]
    assert (into / "b/x.bin").read_bytes() == (source / "b/x.bin").read_bytes()


def test_a_zip_has_the_same_bytes_whatever_the_file_times_and_modes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("b", "a"):
        (source / name).write_text(name)
    write_zip(source, tmp_path / "one.zip", top="t")
    os.utime(source / "a", (1, 1))
    (source / "b").chmod(0o600)
    write_zip(source, tmp_path / "two.zip", top="t")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


@pytest.mark.parametrize(
    "name", ["../escape", "top/../../escape", "/escape", "top\\..\\escape", "C:/escape", "top/nul"]
)
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, into: Path, name: str) -> None:
    bad = _zip(tmp_path / "bad.zip", [(_entry("top/a"), b"a"), (_entry(name), b"x")])
    assert "path" in _refused(bad, into)
    assert not list(tmp_path.rglob("escape"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_a_link_or_device_in_a_zip_is_refused(tmp_path: Path, into: Path, kind: int) -> None:
    bad = _zip(tmp_path / "bad.zip", [(_entry("top/passwd", kind | 0o777), b"/etc/passwd")])
    assert "'top/passwd' must be a regular file" in _refused(bad, into)
    assert not list(into.iterdir())


def test_a_folder_entry_that_is_a_link_is_refused(tmp_path: Path, into: Path) -> None:
    folder = _entry("top/", stat.S_IFDIR | 0o755)
    extract(_zip(tmp_path / "fine.zip", [(folder, b""), (_entry("top/a"), b"a")]), into)
    assert files_under(into) == ["a"]
    link = [(_entry("top/d/", stat.S_IFLNK | 0o777), b""), (_entry("top/d/a"), b"a")]
    assert "must be a plain folder" in _refused(_zip(tmp_path / "link.zip", link), into)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("other", ["top/a.txt", "top/A.TXT"])
def test_two_entries_for_one_file_are_refused(tmp_path: Path, into: Path, other: str) -> None:
    bad = _zip(tmp_path / "bad.zip", [(_entry("top/a.txt"), b"1"), (_entry(other), b"2")])
    assert "same file" in _refused(bad, into)


def test_a_file_that_is_also_a_folder_is_refused(tmp_path: Path, into: Path) -> None:
    bad = _zip(tmp_path / "bad.zip", [(_entry("top/a"), b"1"), (_entry("top/a/b"), b"2")])
    assert "cannot unpack" in _refused(bad, into)


def test_a_bomb_is_refused_before_anything_is_written(tmp_path: Path, into: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("top/zeros", bytes(10_000_000))
    assert "'top/zeros' unpacks to over 200 times" in _refused(path, into)
    assert not list(into.iterdir())


def test_too_many_files_or_bytes_are_refused(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [(_entry(f"top/{number}"), b"1234") for number in range(5)]
    path = _zip(tmp_path / "many.zip", entries)
    monkeypatch.setattr(archive, "MAX_FILES", 4)
    assert "at most 4 files" in _refused(path, into)
    monkeypatch.setattr(archive, "MAX_FILES", 5)
    monkeypatch.setattr(archive, "MAX_TOTAL_BYTES", 19)
    assert "2 GiB" in _refused(path, into)


def test_a_huge_central_directory_is_refused_unread(tmp_path: Path, into: Path) -> None:
    path = _zip(tmp_path / "x.zip", [(_entry("top/a"), b"a")])
    content = bytearray(path.read_bytes())
    at = content.rfind(b"PK\x05\x06")
    content[at + 12 : at + 16] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    assert "lists more than" in _refused(path, into)


def test_an_entry_whose_size_lies_is_refused(tmp_path: Path, into: Path) -> None:
    path = _zip(tmp_path / "x.zip", [(_entry("top/a"), b"abcd")])
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02")
    # Sizes in the central directory: packed at 20, unpacked at 24.
    lie = content[: at + 24] + (9).to_bytes(4, "little") + content[at + 28 :]
    path.write_bytes(lie)
    assert "x.zip" in (text := _refused(path, into)) or "top/a" in text


def test_a_zip_cut_at_any_point_is_an_integrity_error(tmp_path: Path, into: Path) -> None:
    whole = _zip(tmp_path / "x.zip", [(_entry("top/a"), b"a" * 100)]).read_bytes()
    for length in range(0, len(whole), 7):
        cut = tmp_path / "cut.zip"
        cut.write_bytes(whole[:length])
        _refused(cut, into)


def test_flipped_bytes_never_raise_anything_but_integrity_errors(tmp_path: Path) -> None:
    whole = _zip(tmp_path / "x.zip", [(_entry("top/a"), b"a" * 20), (_entry("top/b"), b"b")])
    content = whole.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 0xFF
        whole.write_bytes(flipped)
        into = tmp_path / f"into{at}"
        into.mkdir()
        try:
            extract(whole, into)
        except IntegrityError:
            continue
        # A damaged directory may lose a file, which the hashes notice; it never brings in other content.
        contents = [(into / path).read_bytes() for path in files_under(into)]
        assert contents in ([b"a" * 20, b"b"], [b"a" * 20], [b"b"])


def test_a_name_that_a_null_byte_cuts_is_refused(tmp_path: Path, into: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as out:
        out.writestr(_entry("top/a.txtX.exe"), b"a")
    path = tmp_path / "nul.zip"
    path.write_bytes(stream.getvalue().replace(b"a.txtX.exe", b"a.txt\0.exe"))
    assert "reads in two ways" in _refused(path, into)


def test_a_bundle_zip_has_one_top_folder(tmp_path: Path, into: Path) -> None:
    two = _zip(tmp_path / "two.zip", [(_entry("top/a"), b"a"), (_entry("other/b"), b"b")])
    assert "one top folder" in _refused(two, into)
    none = _zip(tmp_path / "none.zip", [(_entry("a"), b"a")])
    assert "one top folder" in _refused(none, into)


def test_a_link_inside_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "labels.txt").symlink_to("/etc/passwd")
    with pytest.raises(IntegrityError, match=r"labels\.txt must be a regular file"):
        files_under(folder)
    (folder / "labels.txt").unlink()
    (folder / "models").symlink_to(tmp_path)
    with pytest.raises(IntegrityError, match="models must be a regular file"):
        files_under(folder)

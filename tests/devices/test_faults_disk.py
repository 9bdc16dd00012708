"""Failures of the board's disk while files are pushed: full, read-only, or not ours. Small file systems are mounted by root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from small_disk import mounted
from sshd import serve

from edgeprune.devices.link.pipe import Transport
from edgeprune.devices.link.transports import open_transport
from edgeprune.errors import DeviceError
from edgeprune.records.device import Device


@pytest.fixture(params=["ssh", "local"])
def transport(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Transport]:
    if request.param == "local":
        yield open_transport(Device(transport="local", targets=()))
        return
    with serve(tmp_path) as server:
        opened = open_transport(server.device())
        yield opened
        opened.close()


def test_a_full_disk_is_named_with_its_room_and_nothing_is_left(transport, tmp_path):
    with mounted(tmp_path / "disk", "size=2m") as disk:
        with pytest.raises(DeviceError, match="full") as caught:
            transport.put(b"x" * 5_000_000, str(disk / "work" / "file"))
        assert "5000000 bytes needed" in str(caught.value)
        assert "bytes available" in str(caught.value)
        assert [path for path in disk.rglob("*") if path.is_file()] == []
        transport.put(b"fits", str(disk / "work" / "file"))
        assert (disk / "work" / "file").read_bytes() == b"fits"


def test_a_full_disk_keeps_the_older_file(transport, tmp_path):
    with mounted(tmp_path / "disk", "size=2m") as disk:
        (disk / "file").write_bytes(b"older")
        with pytest.raises(DeviceError, match="full"):
            transport.put(b"x" * 3_000_000, str(disk / "file"))
        assert (disk / "file").read_bytes() == b"older"


def test_a_read_only_disk_is_named_and_another_workdir_suggested(transport, tmp_path):
    with mounted(tmp_path / "disk", "ro") as disk:
        for path in (disk / "file", disk / "work" / "file"):
            with pytest.raises(DeviceError, match=r"[Rr]ead-only file system") as caught:
                transport.put(b"content", str(path))
            assert "workdir" in (caught.value.hint or "")


def test_a_folder_in_the_way_of_a_file_is_an_error_and_stays(transport, tmp_path):
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(DeviceError, match="file"):
        transport.put(b"content", str(tmp_path / "file"))
    assert [path.name for path in (tmp_path / "file").iterdir()] == ["inside"]

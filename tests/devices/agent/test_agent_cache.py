"""Files on the board by content: pieces, resumption, space, damage."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from edgeprune.devices.agent.cache import Cache
from edgeprune.devices.agent.wire import Refused

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(str(tmp_path), min_free_bytes=0, quota_bytes=1 << 20)


def test_a_file_appears_when_its_last_piece_is_there(cache):
    assert cache.write(SHA256, len(CONTENT), 0, CONTENT[:1000]) == {"done": False}
    assert not Path(cache.path(SHA256)).exists()
    assert cache.write(SHA256, len(CONTENT), 1000, CONTENT[1000:]) == {"done": True}
    assert cache.read(SHA256) == CONTENT
    assert cache.state(SHA256)["have"] is True


def test_a_part_is_described_by_its_own_digest_so_that_it_can_be_trusted(cache):
    cache.write(SHA256, len(CONTENT), 0, CONTENT[:1000])
    state = cache.state(SHA256)
    assert state == {
        "have": False,
        "offset": 1000,
        "prefix_sha256": hashlib.sha256(CONTENT[:1000]).hexdigest(),
    }


def test_a_piece_at_an_earlier_offset_replaces_what_was_there(cache):
    cache.write(SHA256, len(CONTENT), 0, b"x" * 2000)
    cache.write(SHA256, len(CONTENT), 0, CONTENT[:1000])
    cache.write(SHA256, len(CONTENT), 1000, CONTENT[1000:])
    assert cache.read(SHA256) == CONTENT


def test_other_content_than_announced_is_refused_and_leaves_nothing(cache):
    with pytest.raises(Refused) as caught:
        cache.write(SHA256, len(CONTENT), 0, b"y" * len(CONTENT))
    assert caught.value.kind == "content"
    assert cache.files() == []


def test_a_damaged_file_is_missing_and_removed(cache):
    cache.write(SHA256, len(CONTENT), 0, CONTENT)
    with Path(cache.path(SHA256)).open("r+b") as stream:
        stream.write(b"!")
    with pytest.raises(Refused) as caught:
        cache.read(SHA256)
    assert caught.value.kind == "missing"
    assert cache.state(SHA256)["have"] is False


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 63, "A" * 64, "", "a" * 64 + "\n"])
def test_what_is_no_digest_is_no_path(cache, name):
    with pytest.raises(Refused, match="hexadecimal"):
        cache.path(name)


def test_too_little_space_is_refused_with_what_is_needed_and_there(tmp_path):
    cache = Cache(str(tmp_path), min_free_bytes=1 << 60, quota_bytes=1 << 20)
    with pytest.raises(Refused, match=str((1 << 60) + int(1.2 * len(CONTENT)))) as caught:
        cache.write(SHA256, len(CONTENT), 0, CONTENT)
    assert caught.value.kind == "space"
    assert cache.files() == []


def test_the_files_used_longest_ago_go_first(tmp_path):
    cache = Cache(str(tmp_path), min_free_bytes=0, quota_bytes=25_000)
    digests = []
    for i in range(4):
        content = bytes([i]) * 10_000
        digests.append(hashlib.sha256(content).hexdigest())
        cache.write(digests[-1], len(content), 0, content)
        os.utime(cache.path(digests[-1]), (1000 + i, 1000 + i))
    assert [cache.state(d)["have"] for d in digests] == [False, False, True, True]


def test_a_link_planted_at_the_place_of_a_file_is_not_followed(cache, tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    Path(cache.path(SHA256)).parent.mkdir(parents=True)
    for suffix in (".part", ""):
        Path(cache.path(SHA256) + suffix).symlink_to(victim)
        with pytest.raises(Refused):
            cache.read(SHA256)
        if suffix:
            with pytest.raises(Refused):
                cache.write(SHA256, len(CONTENT), 0, CONTENT)
        else:
            cache.write(SHA256, len(CONTENT), 0, CONTENT)
    assert victim.read_bytes() == b"precious"

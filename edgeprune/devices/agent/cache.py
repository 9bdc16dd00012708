"""Files on the board by their content: written in pieces, resumed after a broken link, visible only when their digest is right."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
from typing import Any, Dict, Iterator, List, Tuple

from .wire import Refused

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
SPARE = 1.2  # free space asked for, against the size of the file


class Cache:
    """Content-addressed files below ``<workdir>/cache``.

    Args:
        workdir: of the device; made when missing, for its owner alone.
        min_free_bytes: what must stay free on its disk.
        quota_bytes: the files used longest ago go when all of them together pass this.
    """

    def __init__(self, workdir: str, min_free_bytes: int, quota_bytes: int) -> None:
        self._folder = os.path.join(workdir, "cache", "sha256")
        self._min_free_bytes, self._quota_bytes = min_free_bytes, quota_bytes

    def path(self, sha256: str) -> str:
        """Where a file of this digest lies or will lie."""
        if not _DIGEST.match(sha256):
            raise Refused("request", "a digest must be 64 hexadecimal digits")
        return os.path.join(self._folder, sha256[:2], sha256)

    def state(self, sha256: str) -> Dict[str, Any]:
        """Whether the file is here; if not, how much of it is, and the digest of that part."""
        path = self.path(sha256)
        if os.path.isfile(path) and not os.path.islink(path):
            with contextlib.suppress(OSError):
                os.utime(path)
            return {"have": True, "offset": 0, "prefix_sha256": ""}
        try:
            size, digest = _digest_of(path + ".part")
        except OSError:
            size, digest = 0, ""
        return {"have": False, "offset": size, "prefix_sha256": digest}

    def write(self, sha256: str, size: int, offset: int, piece: bytes) -> Dict[str, Any]:
        """Add a piece at ``offset``; the last one makes the file visible.

        Raises:
            Refused: ``space`` when the disk cannot hold it, ``content`` when the digest is another, ``workdir`` when it cannot be written.
        """
        path = self.path(sha256)
        part = path + ".part"
        if offset + len(piece) > size:
            raise Refused("request", "a piece must end within its file")
        try:
            self._make_room(path, size if offset == 0 else 0)
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(
                os.open(part, flags | (os.O_TRUNC if offset == 0 else 0), 0o600), "wb"
            ) as out:
                out.truncate(offset)
                out.seek(offset)
                out.write(piece)
                out.flush()
                if offset + len(piece) == size:
                    os.fsync(out.fileno())
            if offset + len(piece) < size:
                return {"done": False}
            self._publish(part, path, sha256)
        except OSError as error:
            raise self._unwritable(part, size, error) from error
        return {"done": True}

    def _publish(self, part: str, path: str, sha256: str) -> None:
        _, digest = _digest_of(part)
        if digest != sha256:
            os.unlink(part)
            raise Refused("content", "what arrived has the digest %s" % digest)
        os.replace(part, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.trim(self._quota_bytes, keep=path)

    def _make_room(self, path: str, size: int) -> None:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        if size and self.free_bytes() < SPARE * size + self._min_free_bytes:
            self.trim(0, keep=path)
        needed = int(SPARE * size) + self._min_free_bytes
        if size and self.free_bytes() < needed:
            raise Refused(
                "space",
                "%d bytes must be free in %s, but %d are"
                % (needed, self._folder, self.free_bytes()),
            )

    def _unwritable(self, part: str, size: int, error: OSError) -> Refused:
        with contextlib.suppress(OSError):
            os.unlink(part)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            found = (size, self._folder, self.free_bytes())
            return Refused("space", "%d bytes do not fit in %s, where %d are free" % found)
        return Refused("workdir", "cannot write %s: %s" % (self._folder, error.strerror))

    def free_bytes(self) -> int:
        """Bytes that this user may still write."""
        found = os.statvfs(self._folder if os.path.isdir(self._folder) else "/")
        return found.f_bavail * found.f_frsize

    def read(self, sha256: str) -> bytes:
        """The content, compared with its digest first.

        Raises:
            Refused: ``missing`` when it is not here or damaged; a damaged one is removed.
        """
        path = self.path(sha256)
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as stream:
                content = stream.read()
        except OSError as error:
            raise Refused("missing", "no file of the digest %s is here" % sha256) from error
        if hashlib.sha256(content).hexdigest() != sha256:
            os.unlink(path)
            raise Refused("missing", "the file of the digest %s was damaged" % sha256)
        return content

    def files(self) -> List[Tuple[float, int, str]]:
        """Time of last use, size and path of every file, parts included."""
        return sorted(self._walk())

    def _walk(self) -> Iterator[Tuple[float, int, str]]:
        for folder, _, names in os.walk(self._folder):
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError):
                    found = os.lstat(path)
                    yield found.st_mtime, found.st_size, path

    def size_bytes(self) -> int:
        """All files together."""
        return sum(size for _, size, _ in self.files())

    def trim(self, quota_bytes: int, keep: str = "") -> int:
        """Remove the files used longest ago until the rest fits; gives the bytes freed."""
        found, freed = self.files(), 0
        total = sum(size for _, size, _ in found)
        for _, size, path in found:
            if total - freed <= quota_bytes:
                break
            if path not in (keep, keep + ".part"):
                with contextlib.suppress(OSError):
                    os.unlink(path)
                    freed += size
        return freed


def _digest_of(path: str) -> Tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as stream:
        while True:
            piece = stream.read(1 << 20)
            if not piece:
                return size, digest.hexdigest()
            digest.update(piece)
            size += len(piece)

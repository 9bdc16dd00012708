"""Measurements that survive the program: every timing lies on disk before it is used, so that a killed run repeats only the one it was in.

One SQLite file in the run folder. Each row has a digest of its own, because SQLite notices damage to its structure but not to content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import NoSpace, SpecError
from edgeprune.records.files import digest_of

STORE_VERSION = 1
_SCHEMA = "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, sha256 TEXT NOT NULL, reply BLOB NOT NULL) WITHOUT ROWID"


class MeasurementStore:
    """Replies of a board by what was asked; use as a context manager.

    Args:
        path: the file. A damaged one is moved aside as ``<name>.bad`` and made anew; ``notes`` says so.

    Raises:
        SpecError, NoSpace: the file cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        try:
            self._database = self._opened()
        except sqlite3.DatabaseError as error:
            if _is_outside(error):
                raise self._unwritable(error) from error
            self._set_aside(str(error))

    def _opened(self) -> sqlite3.Connection:
        """The database, checked.

        Raises:
            sqlite3.DatabaseError: it is damaged, or not ours.
        """
        database = sqlite3.connect(self.path, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            problems = [str(row[0]) for row in database.execute("PRAGMA quick_check(1)")]
            if problems != ["ok"]:
                raise sqlite3.DatabaseError(problems[0] if problems else "the check said nothing")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version not in (0, STORE_VERSION):
                raise sqlite3.DatabaseError(f"it is of version {version}")
            database.execute(_SCHEMA)
            database.execute(f"PRAGMA user_version = {STORE_VERSION}")
            database.execute("SELECT key, sha256, reply FROM replies LIMIT 1").fetchone()
        except BaseException:
            database.close()
            raise
        return database

    def _set_aside(self, why: str) -> None:
        """Move the file away and begin a new one: what it held is measured again."""
        bad = self.path.with_name(f"{self.path.name}.bad")
        try:
            # Of a database that is gone; they would damage the new one.
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)
            if self.path.exists():
                self.path.replace(bad)
            self._database = self._opened()
        except (OSError, sqlite3.DatabaseError) as error:
            raise self._unwritable(error) from error
        self.notes.append(
            f"the stored measurements were damaged ({why}) and set aside as {bad.name}; what they held is measured again"
        )

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply under a key; ``None`` when there is none, or not a whole one."""
        try:
            row = self._database.execute(
                "SELECT sha256, reply FROM replies WHERE key = ?", (key,)
            ).fetchone()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            self._damaged(error)
            return None
        if row is None:
            return None
        with contextlib.suppress(ValueError, TypeError):
            if row[0] == _seal(key, row[1]):
                found = json.loads(row[1])
                if isinstance(found, dict):
                    return found
        self.notes.append("a stored measurement was damaged; it is measured again")
        return None

    def put(self, key: str, reply: dict[str, Any]) -> None:
        """Keep a reply; it is on disk when this returns.

        Raises:
            NoSpace: the disk is full.
            SpecError: the file cannot be written.
        """
        content = json.dumps(reply, allow_nan=False).encode()
        for _ in range(2):
            try:
                self._database.execute(
                    "INSERT OR REPLACE INTO replies VALUES (?, ?, ?)",
                    (key, _seal(key, content), content),
                )
                return
            except sqlite3.DatabaseError as error:
                self._damaged(error)

    def _damaged(self, error: Exception) -> None:
        if isinstance(error, sqlite3.DatabaseError) and _is_outside(error):
            raise self._unwritable(error) from error
        self._database.close()
        self._set_aside(str(error))

    def _unwritable(self, error: Exception) -> SpecError:
        if "full" in str(error):
            return NoSpace(
                f"no space left on the disk of {self.path.parent}", hint="free some and run again"
            )
        return SpecError(
            f"cannot write {self.path}: {error}", hint="choose another run folder with --run"
        )

    def close(self) -> None:
        """Close the file; harmless when it is closed."""
        self._database.close()

    def __enter__(self) -> MeasurementStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_outside(error: sqlite3.DatabaseError) -> bool:
    """Whether the disk or its rights are to blame, and not the content of the file."""
    text = str(error)
    return isinstance(error, sqlite3.OperationalError) and any(
        word in text for word in ("full", "readonly", "unable to open", "disk I/O", "locked")
    )


def _seal(key: str, content: bytes) -> str:
    return hashlib.sha256(key.encode() + b"\0" + content).hexdigest()


def store_key(
    fingerprints: Sequence[str], loads: Sequence[tuple[str, Mapping[str, Any]]], fields: Any
) -> str:
    """What one timing is kept under.

    Args:
        fingerprints: keys of what it is made on.
        loads: the name of each model, and the request that loaded it, which has the digest of its file.
        fields: the timing request: plan and purpose.
    """
    models = [[name, {k: v for k, v in load.items() if k != "key"}] for name, load in loads]
    return digest_of({"fingerprints": list(fingerprints), "models": models, "fields": fields})

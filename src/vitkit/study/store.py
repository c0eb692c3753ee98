"""Where a study keeps what it has done: one folder per finished stage, and an SQLite index over them.

A stage's folder appears in one rename after everything in it was synced, so a stage is either finished or absent,
whatever was killed when. The index can always be rebuilt from the folders.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitkit.errors import VitkitError
from vitkit.files import write_text

_TABLES = """
CREATE TABLE IF NOT EXISTS stages (
  key TEXT PRIMARY KEY, kind TEXT NOT NULL, title TEXT NOT NULL, settings TEXT NOT NULL,
  seconds REAL NOT NULL, finished REAL NOT NULL);
CREATE TABLE IF NOT EXISTS failures (
  key TEXT NOT NULL, kind TEXT NOT NULL, title TEXT NOT NULL, error TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS results (
  recipe TEXT NOT NULL, measure TEXT NOT NULL, value REAL, low REAL, high REAL, PRIMARY KEY (recipe, measure));
"""


class Store:
    """The ``--out`` folder of a study.

    Args:
        root: created when absent.

    Raises:
        VitkitError: another study is running in the folder, or the folder cannot be written.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        try:
            (self.root / "stages").mkdir(parents=True, exist_ok=True)
            self._lock = open(self.root / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 - held while the store lives
        except OSError as error:
            raise VitkitError(f"Cannot write in {self.root}: {error.strerror}. Choose another --out.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            other = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise VitkitError(
                f"Another study is running in {self.root} (process {other}). Wait for it, or choose another --out."
            ) from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        for leftover in (self.root / "stages").glob("tmp-*"):
            # the process that wrote it is gone, since we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        self._db = self._open_index()

    def _open_index(self) -> sqlite3.Connection:
        path = self.root / "study.db"
        try:
            db = self._connect(path)
            if db.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise sqlite3.DatabaseError("quick_check failed")
        except sqlite3.DatabaseError:
            # the folders are the truth; keep the broken file for inspection and rebuild
            path.replace(path.with_suffix(".broken"))
            for extra in ("study.db-wal", "study.db-shm"):
                (self.root / extra).unlink(missing_ok=True)
            db = self._connect(path)
        known = {row[0] for row in db.execute("SELECT key FROM stages")}
        for folder in (self.root / "stages").iterdir():
            note = folder / "stage.json"
            if note.exists() and folder.name not in known:
                self._insert(db, json.loads(note.read_text(encoding="utf-8")))
        db.commit()
        return db

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        db = sqlite3.connect(path, timeout=30, check_same_thread=False)
        db.executescript(_TABLES)
        return db

    @staticmethod
    def _insert(db: sqlite3.Connection, note: dict[str, Any]) -> None:
        db.execute(
            "INSERT OR REPLACE INTO stages VALUES (?, ?, ?, ?, ?, ?)",
            (note["key"], note["kind"], note["title"], json.dumps(note["settings"]), note["seconds"], note["finished"]),
        )

    def folder(self, key: str) -> Path:
        """Where the outputs of a finished stage lie."""
        return self.root / "stages" / key

    def work_folder(self, key: str) -> Path:
        """Where a running stage keeps what lets it resume (trainer checkpoints); removed when it finishes."""
        return self.root / "work" / key

    def has(self, key: str) -> bool:
        """Whether the stage is finished."""
        return (self.folder(key) / "stage.json").exists()

    def note(self, key: str) -> dict[str, Any]:
        """The record a finished stage left: kind, title, settings, seconds."""
        return json.loads((self.folder(key) / "stage.json").read_text(encoding="utf-8"))

    def finished(self, key: str) -> None:
        """Index a stage whose folder a worker has put in place."""
        self._insert(self._db, self.note(key))
        self._db.commit()
        shutil.rmtree(self.work_folder(key), ignore_errors=True)

    def failed(self, key: str, kind: str, title: str, error: str) -> None:
        """Remember a failure; the stage is tried again on the next start."""
        self._db.execute("INSERT INTO failures VALUES (?, ?, ?, ?, ?)", (key, kind, title, error, time.time()))
        self._db.commit()

    def save_results(self, rows: list[tuple[str, str, float | None, float | None, float | None]]) -> None:
        """Replace the table of final results, in one transaction."""
        with self._db:
            self._db.execute("DELETE FROM results")
            self._db.executemany("INSERT INTO results VALUES (?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._db.close()
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._lock.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def disk_errors(root: str | Path) -> Iterator[None]:
    """What the system says of a full or read-only disk below ``root``, as a sentence with the way out.

    Raises: VitkitError instead of OSError and sqlite3.OperationalError of that kind; others pass.
    """
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        number = getattr(error, "errno", None)
        if number not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and "full" not in str(error):
            raise
        raise VitkitError(
            f"Cannot write in {root}: {getattr(error, 'strerror', None) or error}. What was finished is kept; free "
            "some space (or choose another --out), then run the same command again: it goes on from there."
        ) from error


class StageFolder:
    """Collects a stage's outputs in a temporary folder and puts it in place on success. Needs no store, so workers
    on other machines that share the folder can use it."""

    def __init__(self, root: str | Path, key: str) -> None:
        self.target = Path(root) / "stages" / key
        self.temporary = self.target.parent / f"tmp-{key}-{uuid.uuid4().hex[:8]}"

    def __enter__(self) -> StageFolder:
        self.temporary.mkdir(parents=True)
        return self

    def publish(self, note: dict[str, Any]) -> None:
        write_text(self.temporary / "stage.json", json.dumps(note, indent=1))
        for file in self.temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if self.target.exists():
            # an equal stage was finished meanwhile (two recipes, one prefix); its content is the same
            shutil.rmtree(self.temporary)
            return
        try:
            self.temporary.rename(self.target)
        except OSError as error:
            raise VitkitError(f"Could not finish {self.target}: {error.strerror}.") from error

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)

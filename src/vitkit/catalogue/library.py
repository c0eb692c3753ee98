"""The user's own library of papers: one SQLite file that digests are merged into and searched in.

The catalogue that vitkit ships is never changed by it. Every listing of a paper is kept with its version, so a section
can be written again as it was read; a paper itself has the fields of its newest version, and of older ones what that
lacks.
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vitkit.catalogue.digests.row import Digest, Row, Unreadable, tidy
from vitkit.errors import BadInput, VitkitError, unknown

#: raised by one with every change of the tables
SCHEMA = 1
#: tells a library from other SQLite files ("vitp")
APPLICATION = 0x76697470
#: how long one process waits for another that is writing
WAIT_SECONDS = 60

_TABLES = """
CREATE TABLE papers (
    id INTEGER PRIMARY KEY, arxiv_id TEXT NOT NULL UNIQUE, version INTEGER NOT NULL,
    title TEXT NOT NULL, date TEXT NOT NULL, abstract TEXT NOT NULL, summary TEXT NOT NULL,
    comment TEXT NOT NULL, code TEXT NOT NULL, authors TEXT NOT NULL,
    added TEXT NOT NULL, changed TEXT NOT NULL  -- UTC, of the imports that brought and last changed it
);
CREATE TABLE versions (  -- version 0: listed without one
    arxiv_id TEXT NOT NULL, version INTEGER NOT NULL,
    title TEXT NOT NULL, date TEXT NOT NULL, abstract TEXT NOT NULL, summary TEXT NOT NULL,
    comment TEXT NOT NULL, code TEXT NOT NULL, authors TEXT NOT NULL,
    PRIMARY KEY (arxiv_id, version)
) WITHOUT ROWID;
CREATE TABLE sources (id INTEGER PRIMARY KEY, name TEXT NOT NULL, imported TEXT NOT NULL);
CREATE TABLE sections (id INTEGER PRIMARY KEY, name TEXT NOT NULL, form TEXT NOT NULL, UNIQUE (name, form));
CREATE TABLE listings (
    section_id INTEGER NOT NULL REFERENCES sections (id), arxiv_id TEXT NOT NULL, version INTEGER NOT NULL,
    source_id INTEGER NOT NULL REFERENCES sources (id), position INTEGER NOT NULL, line INTEGER NOT NULL,
    PRIMARY KEY (section_id, arxiv_id, version)
) WITHOUT ROWID;
CREATE INDEX listings_of_paper ON listings (arxiv_id);
CREATE VIRTUAL TABLE fts USING fts5 (
    title, abstract, summary, content = 'papers', content_rowid = 'id', tokenize = 'porter unicode61'
);
CREATE TRIGGER papers_added AFTER INSERT ON papers BEGIN
    INSERT INTO fts (rowid, title, abstract, summary) VALUES (new.id, new.title, new.abstract, new.summary);
END;
CREATE TRIGGER papers_removed AFTER DELETE ON papers BEGIN
    INSERT INTO fts (fts, rowid, title, abstract, summary)
    VALUES ('delete', old.id, old.title, old.abstract, old.summary);
END;
CREATE TRIGGER papers_changed AFTER UPDATE ON papers BEGIN
    INSERT INTO fts (fts, rowid, title, abstract, summary)
    VALUES ('delete', old.id, old.title, old.abstract, old.summary);
    INSERT INTO fts (rowid, title, abstract, summary) VALUES (new.id, new.title, new.abstract, new.summary);
END;
"""
_TEXTS = ("title", "date", "abstract", "summary", "comment", "code", "authors")
_FIELDS = ("arxiv_id", "version", *_TEXTS)
#: what rows of a form say nothing about; the other form's rows do
_SILENT = {"table": ("summary", "authors"), "daily": ("date", "abstract", "comment", "code")}
#: between two authors; no digest has it in a name
_BETWEEN = "\n"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What an import did. A paper counts once, however often the digests list it.

    Attributes:
        rows: rows read.
        new: arXiv ids that the library did not have.
        updated: ids it had and learned something about: a newer version, a code link, a summary …
        known: ids it had and learned nothing about.
        repeated: rows that list a version a second time under the same heading of a file; the last one counts.
        unreadable: what could not be read, as in the digests.
    """

    rows: int
    new: tuple[str, ...]
    updated: tuple[str, ...]
    known: tuple[str, ...]
    repeated: tuple[Row, ...]
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with its rows.

    Attributes:
        name: the heading; empty for rows without one.
        form: "table" or "daily".
        rows: how many it has.
    """

    name: str
    form: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A paper that a search found.

    Attributes:
        row: the paper, as :meth:`Library.find` gives it.
        score: BM25, larger is better; comparable within one search only.
    """

    row: Row
    score: float


def library_path() -> Path:
    """Where the library is: ``papers.db`` in ``$VITKIT_HOME``, else in the platform's folder for users' data."""
    if home := os.environ.get("VITKIT_HOME"):
        return Path(home).expanduser() / "papers.db"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME", ""))
        # the specification says that a relative path is to be ignored
        base = base if base.is_absolute() else Path.home() / ".local" / "share"
    return base / "vitkit" / "papers.db"


class Library:
    """A library, made where there is none. Use it in a ``with`` statement, one in each thread.

    Args:
        path: the file; :func:`library_path` if not given.

    Raises: BadInput if the file is damaged, is something else, or was written by a newer vitkit; VitkitError if it
        cannot be opened. The message names the file and the way out.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else library_path()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise VitkitError(
                f"Cannot make {self.path.parent} for the library of papers: {error.strerror}. "
                "Set VITKIT_HOME to a folder that can be written."
            ) from error
        with self._explained():
            # transactions are begun by hand: one is a whole import
            self._db = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            # KiB: a whole import fits, and is written once
            self._db.execute("PRAGMA cache_size = -65536")
        try:
            with self._explained():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the library cannot be used any more."""
        self._db.close()

    def merge(self, *digests: Digest, progress: Callable[[int, int], None] | None = None) -> Merged:
        """Take the rows of digests in, all or, whatever happens, none of them.

        A version's fields are the last ones read that are not empty.

        Args:
            digests: from :func:`vitkit.catalogue.digests.read`, or with rows from elsewhere.
            progress: called with the number of rows done and of all.

        Raises: VitkitError if the library cannot be written.
        """
        total = sum(len(digest.rows) for digest in digests)
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        papers: dict[str, None] = {}
        listed: set[tuple[int, str, str, str, int]] = set()
        repeated: list[Row] = []
        done = 0
        with self._explained(), self._transaction():
            for digest in digests:
                source = self._insert("INSERT INTO sources (name, imported) VALUES (?, ?)", digest.source, moment)
                for position, row in enumerate(digest.rows):
                    place = (source, row.section, row.form, row.arxiv_id, row.version)
                    if row.form and place in listed:
                        repeated.append(row)
                    listed.add(place)
                    papers[row.arxiv_id] = None
                    self._take(row, source, position)
                    done += 1
                    if progress:
                        progress(done, total)
            fates: dict[str, list[str]] = {"new": [], "updated": [], "known": []}
            for arxiv_id in papers:
                fates[self._settle(arxiv_id, moment)].append(arxiv_id)
        return Merged(
            rows=total,
            new=tuple(fates["new"]),
            updated=tuple(fates["updated"]),
            known=tuple(fates["known"]),
            repeated=tuple(repeated),
            unreadable=tuple(u for digest in digests for u in digest.unreadable),
        )

    def set_summary(self, arxiv_id: str, summary: str) -> None:
        """Give a paper a summary, in place of the one it has; nothing else of it changes.

        It becomes the summary of the newest version, so an older version's is remembered.

        Args:
            arxiv_id: without version.
            summary: not empty.

        Raises: UnknownName if the paper is not here; VitkitError if the library cannot be written.
        """
        moment = datetime.now(UTC).isoformat(timespec="seconds")
        with self._explained(), self._transaction():
            changed = self._db.execute(
                "UPDATE versions SET summary = ? WHERE arxiv_id = ? "
                "AND version = (SELECT version FROM papers WHERE arxiv_id = versions.arxiv_id)",
                (tidy(summary), arxiv_id),
            )
            if not changed.rowcount:
                known = [row.arxiv_id for row in self._papers("")]
                raise unknown("paper of the library", arxiv_id, known, "vitkit papers export --form csv")
            self._settle(arxiv_id, moment)

    def sections(self) -> list[Section]:
        """All headings, in the order in which they were first imported."""
        found = self._all(
            "SELECT name, form, count(*) FROM sections JOIN listings ON section_id = id GROUP BY id ORDER BY id"
        )
        return [Section(name=name, form=form, rows=rows) for name, form, rows in found]

    def rows(self, section: str | None = None, since: str = "") -> list[Row]:
        """Rows as the digests list them, older versions too.

        Under a heading those of the last import come first, in its order. Papers under no heading come last. What a
        row's own form has no column for is filled in from the paper.

        Args:
            section: only under this heading; letter case does not matter.
            since: only with a date (``"YYYY-MM-DD"``) from this one on.

        Raises: UnknownName if there is no such heading.
        """
        wanted = None if section is None else section.casefold()
        ids = [(i, name) for i, name in self._all("SELECT id, name FROM sections") if wanted in (None, name.casefold())]
        if section is not None and not ids:
            names = [s.name for s in self.sections()]
            raise unknown("section", section, names, "vitkit papers export --help")
        columns = ", ".join(f"v.{name}" for name in _FIELDS) + "".join(f", p.{name}" for name in _TEXTS)
        found = []
        for i, _ in ids:
            found += self._all(
                f"SELECT {columns}, s.name, s.form, o.name, l.line FROM listings l "
                "JOIN versions v USING (arxiv_id, version) JOIN papers p USING (arxiv_id) "
                "JOIN sections s ON s.id = l.section_id JOIN sources o ON o.id = l.source_id "
                "WHERE s.id = ? ORDER BY l.source_id DESC, l.position",
                i,
            )
        rows = [_listed(values) for values in found]
        if section is None:
            rows += self._papers("WHERE arxiv_id NOT IN (SELECT arxiv_id FROM listings)")
        return [row for row in rows if row.date >= since]

    def papers(self, section: str | None = None, since: str = "") -> list[Row]:
        """Each paper once, with all that is known of its newest version; the newest first.

        Args: as for :meth:`rows`.
        """
        chosen = self._papers("ORDER BY date DESC, arxiv_id DESC")
        if section is not None:
            under = {row.arxiv_id: row for row in self.rows(section)}
            chosen = [
                replace(row, section=under[row.arxiv_id].section, form=under[row.arxiv_id].form)
                for row in chosen
                if row.arxiv_id in under
            ]
        return [row for row in chosen if row.date >= since]

    def find(self, arxiv_id: str) -> Row | None:
        """A paper by its id without version, with all that is known of its newest version; None if it is not here."""
        return next(iter(self._papers("WHERE arxiv_id = ?", arxiv_id)), None)

    def versions(self, arxiv_id: str) -> list[Row]:
        """All versions of a paper that were listed, the newest first; one without a number comes last."""
        return [
            _row(values)
            for values in self._all(
                f"SELECT {', '.join(_FIELDS)} FROM versions WHERE arxiv_id = ? ORDER BY version DESC", arxiv_id
            )
        ]

    def search(self, query: str, limit: int = 20) -> list[Hit]:
        """Papers by BM25 over title, abstract and summary, the best first; a word in the title counts four times.

        All words must occur, or any of them where no paper has all; "words in quotes" must stand side by side.
        Endings do not matter (*attention*, *attentions*). Every text is a valid query.

        Args:
            limit: of how many to return.
        """
        phrases = [
            '"' + (quoted or word).replace('"', '""') + '"'
            for quoted, word in re.findall(r'"([^"]+)"|(\S+)', query.replace("\0", " "))
            if re.search(r"[^\W_]", quoted or word)
        ]
        columns = ", ".join(f"p.{name}" for name in _FIELDS)
        for joint in (" AND ", " OR ") if phrases else ():
            found = self._all(
                f"SELECT -bm25(fts, 4.0, 1.0, 1.0) AS score, {columns} FROM fts JOIN papers p ON p.id = fts.rowid "
                "WHERE fts MATCH ? ORDER BY score DESC LIMIT ?",
                joint.join(phrases).encode("utf-8", "ignore").decode(),
                limit,
            )
            if found:
                return [Hit(score=score, row=_row(values)) for score, *values in found]
        return []

    def _prepare(self) -> None:
        if self._pragma("application_id") == APPLICATION:
            self._check_schema()
            return
        self._wal()
        with self._transaction():
            # another process may have made the tables in the meantime
            if self._pragma("application_id") == APPLICATION:
                self._check_schema()
                return
            if self._all("SELECT 1 FROM sqlite_master LIMIT 1"):
                raise BadInput(
                    f"{self.path} is a database of another program. Move it away, or set VITKIT_HOME to another folder."
                )
            for statement in _statements(_TABLES):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")
            self._db.execute(f"PRAGMA application_id = {APPLICATION}")

    def _check_schema(self) -> None:
        found = self._pragma("user_version")
        if found > SCHEMA:
            raise BadInput(
                f"{self.path} was written by a newer vitkit (its format is {found}, this one knows {SCHEMA}). Update "
                "with `pip install -U vitkit`, or set VITKIT_HOME to another folder."
            )

    def _wal(self) -> None:
        # sqlite does not wait for other processes here, so this does; where the disk cannot do it, the journal serves
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _pragma(self, name: str) -> int:
        return self._all(f"PRAGMA {name}")[0][0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # also on Ctrl-C; a process that is killed has its transaction undone by the next one
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of SQLite in words that name the file and the way out."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                way = f"Another process has been writing for {WAIT_SECONDS} s; try again when it is done."
            elif "fts5" in str(error):
                way = "The SQLite of this Python has no full-text search (FTS5); use a Python that has."
            else:
                way = "Is there space on the disk, and may you write there? VITKIT_HOME names another folder."
            raise VitkitError(f"The library of papers {self.path} cannot be used: {error}. {way}") from error
        except sqlite3.DatabaseError as error:
            raise BadInput(
                f"The library of papers {self.path} is damaged: {error}. Move it away and import your digests again; "
                "`sqlite3 OLD .recover | sqlite3 NEW` saves what can still be read."
            ) from error

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._explained():
            return self._db.execute(query, values).fetchall()

    def _insert(self, query: str, *values: Any) -> int:
        return int(self._db.execute(query, values).lastrowid or 0)

    def _take(self, row: Row, source: int, position: int) -> None:
        newer = ", ".join(f"{name} = coalesce(nullif(excluded.{name}, ''), {name})" for name in _TEXTS)
        self._db.execute(
            f"INSERT INTO versions ({', '.join(_FIELDS)}) VALUES ({', '.join('?' * len(_FIELDS))}) "
            f"ON CONFLICT (arxiv_id, version) DO UPDATE SET {newer}",
            _values(row),
        )
        if not row.form:
            return
        self._db.execute("INSERT OR IGNORE INTO sections (name, form) VALUES (?, ?)", (row.section, row.form))
        self._db.execute(
            "INSERT INTO listings (section_id, arxiv_id, version, source_id, position, line) "
            "SELECT id, ?, ?, ?, ?, ? FROM sections WHERE name = ? AND form = ? "
            "ON CONFLICT (section_id, arxiv_id, version) DO UPDATE SET "
            "source_id = excluded.source_id, position = excluded.position, line = excluded.line",
            (row.arxiv_id, row.version, source, position, row.line, row.section, row.form),
        )

    def _settle(self, arxiv_id: str, moment: str) -> str:
        """Make the paper out of its versions; what became of it."""
        paper: dict[str, Any] = {}
        for version in reversed(self.versions(arxiv_id)):
            values = dict(zip(_FIELDS, _values(version)))
            paper = {name: value or paper.get(name, value) for name, value in values.items()}
        before = self._all(f"SELECT {', '.join(_FIELDS)} FROM papers WHERE arxiv_id = ?", arxiv_id)
        if not before:
            names = (*_FIELDS, "added", "changed")
            self._db.execute(
                f"INSERT INTO papers ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})",
                (*paper.values(), moment, moment),
            )
            return "new"
        if before[0] == tuple(paper.values()):
            return "known"
        changes = ", ".join(f"{name} = ?" for name in (*_FIELDS, "changed"))
        self._db.execute(f"UPDATE papers SET {changes} WHERE arxiv_id = ?", (*paper.values(), moment, arxiv_id))
        return "updated"

    def _papers(self, which: str, *values: Any) -> list[Row]:
        return [_row(found) for found in self._all(f"SELECT {', '.join(_FIELDS)} FROM papers {which}", *values)]


def _statements(script: str) -> Iterator[str]:
    """One by one: ``executescript`` would end the transaction."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _values(row: Row) -> tuple[Any, ...]:
    return tuple(_BETWEEN.join(row.authors) if name == "authors" else getattr(row, name) for name in _FIELDS)


def _row(values: Any) -> Row:
    named = dict(zip(_FIELDS, values))
    return Row(**{**named, "authors": tuple(filter(None, named["authors"].split(_BETWEEN)))})


def _listed(values: Any) -> Row:
    own, paper = dict(zip(_FIELDS, values)), dict(zip(_TEXTS, values[len(_FIELDS) :]))
    section, form, source, line = values[-4:]
    for name in _SILENT[form]:
        own[name] = own[name] or paper[name]
    return replace(_row(own.values()), section=section, form=form, source=source, line=line)

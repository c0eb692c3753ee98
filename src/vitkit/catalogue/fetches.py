"""Fetching into the library: nothing is asked for twice, and a run that was cut short goes on where it stopped.

The notes are a file ``fetches.json`` beside the library. For every query and section they tell which times of
submission have arrived, and how far those have that were interrupted. ArXiv shows a paper days after it was submitted;
so what was asked for counts in full for the rest of the day only, and later up to a week before it was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from vitkit.catalogue.arxiv_feed import Feed, Range
from vitkit.catalogue.digests.row import Digest
from vitkit.catalogue.library import Library, Merged, library_path
from vitkit.errors import BadInput
from vitkit.files import write_text

#: arXiv's lists change once a day
FRESH = timedelta(hours=12)
#: from its submission to the day it is listed: a weekend, holidays, a look by a moderator
LAG = timedelta(days=7)
#: how far a first fetch goes back unless it is told
FIRST = timedelta(days=7)

_FORMAT = 1
_MINUTE = timedelta(minutes=1)
#: the source of rows that come from here
_SOURCE = "arXiv"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One page that went into the library.

    Attributes:
        merged: what became of its papers.
        left: papers still to come, as far as arXiv has told.
    """

    merged: Merged
    left: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A range that was asked for, and when; all of it has arrived unless ``open``."""

    range: Range
    at: datetime
    open: bool = False


@dataclass(kw_only=True)
class _Notes:
    """What is known of one query under one section.

    ``since`` is the earliest time it was asked for; ``witness`` a paper that it brought into the library.
    """

    since: datetime
    witness: str = ""
    asked: list[Asked] = field(default_factory=list)


class Fetch:
    """One query's way into the library.

    Args:
        query: from :func:`vitkit.catalogue.arxiv_feed.build_query`.
        section: heading that the papers are listed under.
        now: UTC.
        since: papers submitted from here on; if not given, from where the query's first fetch began, else a week back.
        again: ask for all of it, whether it has arrived or not.
        path: of the library; :func:`vitkit.catalogue.library.library_path` if not given.

    Attributes:
        since: as above.
        todo: what is to be asked for, the newest first; empty if all has arrived.

    Raises: BadInput if the notes or the library cannot be read.
    """

    def __init__(
        self,
        query: str,
        section: str,
        now: datetime,
        since: datetime | None = None,
        again: bool = False,
        path: Path | None = None,
    ) -> None:
        self.query, self.section = query, section
        self.path = path or library_path()
        self._now = now.replace(second=0, microsecond=0)
        self._file = self.path.with_name("fetches.json")
        notes = _read(self._file).get((section, query))
        if notes and notes.witness and not self._has(notes.witness):
            # of another library, or one that was begun anew
            notes = None
        self.since = since or (notes.since if notes else self._now - FIRST)
        self._notes = notes or _Notes(since=self.since)
        self._notes.since = min(self._notes.since, self.since)
        self._notes.asked = [] if again else settled(self._notes.asked, self._now)
        self.todo = todo(self._notes.asked, Range(first=self.since, last=self._now))

    def run(self, feed: Feed, limit: int | None = None) -> Iterator[Step]:
        """Ask, and take every page into the library as it arrives. What was interrupted or limited is noted.

        Args:
            limit: of how many papers to ask for.

        Raises: as :meth:`Feed.pages` and :class:`Library`; what has arrived until then stays.
        """
        for wanted in self.todo:
            current = wanted
            for page in feed.pages(self.query, wanted, limit):
                rows = tuple(replace(row, section=self.section) for row in page.rows)
                with Library(self.path) as library:
                    merged = library.merge(Digest(rows=rows, unreadable=page.unreadable, source=_SOURCE))
                    if page.rest is None:
                        self._in_order(library)
                if rows:
                    self._notes.witness = rows[0].arxiv_id
                self._note(current, page.rest)
                current = page.rest or current
                if limit is not None:
                    limit -= len(rows)
                yield Step(merged=merged, left=page.left)
                if limit is not None and limit <= 0:
                    return

    def _has(self, arxiv_id: str) -> bool:
        if not self.path.exists():
            return False
        with Library(self.path) as library:
            return library.find(arxiv_id) is not None

    def _note(self, wanted: Range, rest: Range | None) -> None:
        at, first = self._now, wanted.first
        asked = []
        for one in self._notes.asked:
            if one.open and one.range.last == wanted.last:
                # taken up again: as old as its beginning, and it may reach further back than it is wanted now
                at, first = one.at, one.range.first
            else:
                asked.append(one)
        if rest is None:
            asked.append(Asked(range=Range(first=wanted.first, last=wanted.last), at=at))
        else:
            if rest.last < wanted.last:
                asked.append(Asked(range=Range(first=rest.last + _MINUTE, last=wanted.last), at=at))
            asked.append(Asked(range=replace(rest, first=first), at=at, open=True))
        self._notes.asked = settled(asked, self._now)
        everything = _read(self._file)
        everything[self.section, self.query] = self._notes
        _write(self._file, everything)

    def _in_order(self, library: Library) -> None:
        """Each page went in as a list of its own; make one of them, the newest papers first."""
        named = [section.name for section in library.sections() if section.form == "table"]
        listed = library.rows(self.section) if self.section in named else []
        rows = [row for row in listed if row.source == _SOURCE and row.section == self.section and row.form == "table"]
        ordered = sorted(rows, key=lambda row: (row.date, row.arxiv_id), reverse=True)
        if ordered != rows:
            # what the list has no column for was filled in from the paper, and is not this version's
            own = tuple(replace(row, summary="", authors=()) for row in ordered)
            library.merge(Digest(rows=own, source=_SOURCE))


def todo(asked: Iterable[Asked], wanted: Range) -> list[Range]:
    """What of a range is still to be asked for: what never was, and the rest of what was interrupted; newest first."""
    asked = list(asked)
    found = [
        replace(a.range, first=max(a.range.first, wanted.first))
        for a in asked
        if a.open and wanted.first <= a.range.last <= wanted.last
    ]
    at = wanted.first
    for taken in sorted((a.range for a in asked), key=lambda r: r.first):
        last = min(taken.first - _MINUTE, wanted.last)
        if at <= last:
            found.append(Range(first=at, last=last))
        at = max(at, taken.last + _MINUTE)
    if at <= wanted.last:
        found.append(Range(first=at, last=wanted.last))
    return sorted(found, key=lambda r: r.last, reverse=True)


def settled(asked: Iterable[Asked], now: datetime) -> list[Asked]:
    """What still counts, with neighbours made one: of ranges asked for before today only what was a week old then."""
    found: list[Asked] = []
    for one in sorted(asked, key=lambda a: a.range.first):
        if not one.open and now - one.at >= FRESH:
            one = replace(one, range=replace(one.range, last=min(one.range.last, one.at - LAG)))
        if one.range.last < one.range.first:
            continue
        before = found[-1] if found else None
        if (
            before
            and not before.open
            and not one.open
            and before.range.last + _MINUTE >= one.range.first
            # of two that may still shrink each shrinks by itself
            and (before.at == one.at or all(a.range.last <= a.at - LAG for a in (before, one)))
        ):
            last = max(before.range.last, one.range.last)
            found[-1] = Asked(range=replace(before.range, last=last), at=max(before.at, one.at))
        else:
            found.append(one)
    return found


def combine(parts: Iterable[Merged]) -> Merged:
    """One account of several imports; of a paper that is in more than one, the first counts."""
    parts = list(parts)
    fates: dict[str, str] = {}
    for part in parts:
        for fate in ("new", "updated", "known"):
            for arxiv_id in getattr(part, fate):
                fates.setdefault(arxiv_id, fate)
    of = {fate: tuple(i for i, found in fates.items() if found == fate) for fate in ("new", "updated", "known")}
    return Merged(
        rows=sum(part.rows for part in parts),
        new=of["new"],
        updated=of["updated"],
        known=of["known"],
        repeated=tuple(row for part in parts for row in part.repeated),
        unreadable=tuple(u for part in parts for u in part.unreadable),
    )


def _read(file: Path) -> dict[tuple[str, str], _Notes]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise ValueError(f"its format is {found['format']}, this vitkit knows {_FORMAT}")
        return {
            (one["section"], one["query"]): _Notes(
                since=_moment(one["since"]), witness=one["witness"], asked=[_asked(a) for a in one["asked"]]
            )
            for one in found["fetches"]
        }
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BadInput(
            f"The notes of earlier fetches, {file}, cannot be read ({error}). Remove the file: no paper is lost by it, "
            "but all of them are asked for again."
        ) from error


def _write(file: Path, everything: dict[tuple[str, str], _Notes]) -> None:
    fetches = []
    for (section, query), notes in everything.items():
        asked = []
        for one in notes.asked:
            told: dict[str, Any] = {
                "first": _text(one.range.first),
                "last": _text(one.range.last),
                "asked": _text(one.at),
            }
            if one.open:
                told["arrived"] = one.range.start
                told["reached"] = _text(one.range.reached) if one.range.reached else None
            asked.append(told)
        fetches.append(
            {
                "section": section,
                "query": query,
                "since": _text(notes.since),
                "witness": notes.witness,
                "asked": asked,
            }
        )
    write_text(file, json.dumps({"format": _FORMAT, "fetches": fetches}, indent=1, ensure_ascii=False) + "\n")


def _asked(told: dict[str, Any]) -> Asked:
    reached = told.get("reached")
    return Asked(
        range=Range(
            first=_moment(told["first"]),
            last=_moment(told["last"]),
            start=int(told.get("arrived", 0)),
            reached=_moment(reached) if reached else None,
        ),
        at=_moment(told["asked"]),
        open="arrived" in told,
    )


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def _text(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%MZ}"

"""What the page shows: all papers in memory, with what vitkit has of them, read again when the library has changed."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitkit.catalogue.describe import study_command
from vitkit.catalogue.joined import Paper, catalogue_index, papers, search
from vitkit.catalogue.library import Library
from vitkit.catalogue.reader import load, methods
from vitkit.errors import BadInput, VitkitError, unknown
from vitkit.evidence import text
from vitkit.evidence.runner import read_evidence

#: yes: code comes with vitkit; no: in the catalogue, without code; unlisted: in the user's library only
IMPLEMENTED = ("yes", "no", "unlisted")
#: what the evidence file says of the paper's claim; compared: it is measured in another paper's experiment
EVIDENCE = ("shown", "undecided", "not shown", "compared", "none")
SORTS = ("best", "newest", "oldest", "title")
FACETS = ("family", "implemented", "evidence", "section")

#: queries whose papers are kept: filters and the next page ask for the same ones again
_QUERIES = 16
#: characters of an abstract in the list
_GIST = 240


class Unreadable(VitkitError):
    """The library cannot be read; the message says why, and the way out."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A paper with its values of each of :data:`FACETS`."""

    paper: Paper
    facets: Mapping[str, tuple[str, ...]]


class Shelf:
    """All papers of a library and the catalogue. To be used from one thread.

    Args:
        path: the library's file; where there is none, the catalogue is all.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = catalogue_index()
        self._stamp: tuple[tuple[int, int], ...] = ()
        self._items: dict[str, Item] = {}
        self._values: dict[str, tuple[str, ...]] = {}
        self._found: OrderedDict[str, list[Item]] = OrderedDict()

    def close(self) -> None:
        """Free what is held in memory."""
        self._index.close()

    def list_papers(
        self, query: str = "", wanted: Mapping[str, str] | None = None, sort: str = "", offset: int = 0, limit: int = 50
    ) -> dict[str, Any]:
        """One page of the papers that fit.

        Args:
            query: see :func:`vitkit.catalogue.joined.search`; empty means all.
            wanted: values of :data:`FACETS`; an empty one does not matter.
            sort: one of :data:`SORTS`; the best first if there is a query, else the newest.
            offset: of how many to leave out.
            limit: of how many to give.

        Returns: ``total``, ``offset``, ``papers``, and in ``facets`` how many there would be with each value of a
            facet, the others staying as they are.

        Raises: BadInput if a family or section is unknown; Unreadable.
        """
        with self._library() as library:
            self._refresh(library)
            found = self._search(query, library)
        wanted = {name: value for name, value in (wanted or {}).items() if value}
        for name, value in wanted.items():
            if value not in self._values[name]:
                raise BadInput(str(unknown(name, value[:80], self._values[name], "GET /api/papers")))
        matched, facets = [], {name: Counter(dict.fromkeys(self._values[name], 0)) for name in FACETS}
        for item in found:
            missed = [name for name, value in wanted.items() if value not in item.facets[name]]
            if not missed:
                matched.append(item)
            # a facet's own choice does not count for it: its other values are what one would change to
            for name in FACETS if not missed else missed if len(missed) == 1 else ():
                facets[name].update(item.facets[name])
        matched = _sorted(matched, sort or ("best" if query.strip() else "newest"))
        return {
            "total": len(matched),
            "offset": offset,
            "papers": [_brief(item) for item in matched[offset : offset + limit]],
            "facets": {name: dict(counter) for name, counter in facets.items()},
        }

    def paper(self, key: str) -> dict[str, Any]:
        """All that is known of a paper.

        Raises: UnknownName if there is no such paper; Unreadable.
        """
        with self._library() as library:
            self._refresh(library)
            versions = library.versions(key) if library else []
        if key not in self._items:
            raise unknown("paper", key[:80], self._items, "GET /api/papers")
        item = self._items[key]
        row, entry = item.paper.row, item.paper.entry
        meant = [m for m in methods().values() if entry is not None and m.entry.name == entry.name]
        return {
            **_brief(item),
            "abstract": row.abstract,
            "summary": row.summary if item.paper.kept else "",
            "authors": list(row.authors),
            "comment": row.comment,
            "version": row.version,
            "versions": [{"version": v.version, "date": v.date} for v in versions],
            "methods": [{"name": m.name, "kind": m.kind, "slot": m.slot, "study": study_command(m)} for m in meant],
            "record": _record(item.paper),
        }

    @contextmanager
    def _library(self) -> Iterator[Library | None]:
        """The library, opened for this moment: it may be made, moved away or mended meanwhile."""
        try:
            if self.path.exists():
                with Library(self.path) as library:
                    yield library
            else:
                # opening would make one, and nothing is changed here
                yield None
        except VitkitError as error:
            raise Unreadable(str(error)) from error

    def _refresh(self, library: Library | None) -> None:
        stamp = _stamp(self.path)
        if self._items and stamp == self._stamp:
            return
        sections: dict[str, dict[str, None]] = {}
        if library:
            for row in library.rows():
                if row.section:
                    sections.setdefault(row.arxiv_id, {})[row.section] = None
        known = papers(library)
        self._items = {key: _item(paper, tuple(sections.get(key, ()))) for key, paper in known.items()}
        self._values = {
            "family": tuple(sorted({e.family for e in load().values() if e.family})),
            "implemented": IMPLEMENTED,
            "evidence": EVIDENCE,
            "section": tuple(dict.fromkeys(s.name for s in library.sections() if s.name)) if library else (),
        }
        self._found.clear()
        self._stamp = stamp

    def _search(self, query: str, library: Library | None) -> list[Item]:
        query = query.strip()
        if not query:
            return list(self._items.values())
        if query not in self._found:
            known = {key: item.paper for key, item in self._items.items()}
            indexes = [self._index] if library is None else [library, self._index]
            hits = search(query, known, *indexes, limit=len(known))
            self._found[query] = [self._items[paper.key] for paper in hits]
            if len(self._found) > _QUERIES:
                self._found.popitem(last=False)
        return self._found[query]


def _stamp(path: Path) -> tuple[tuple[int, int], ...]:
    """Changes with every import: what was written last is in the log beside the file until that is taken in."""
    found = []
    for file in (path, Path(f"{path}-wal")):
        try:
            about = file.stat()
        except OSError:
            continue
        # an empty log is only a sign that somebody reads
        if about.st_size:
            found.append((about.st_mtime_ns, about.st_size))
    return tuple(found)


def _item(paper: Paper, sections: tuple[str, ...]) -> Item:
    entry = paper.entry
    family = (entry.family,) if entry and entry.family else ()
    implemented = "unlisted" if entry is None else "yes" if entry.provides else "no"
    return Item(
        paper=paper,
        facets={
            "family": family,
            "implemented": (implemented,),
            "evidence": (_verdict(paper),),
            "section": sections,
        },
    )


def _verdict(paper: Paper) -> str:
    record = read_evidence(paper.entry) if paper.entry and paper.entry.evidence else None
    if record is None or paper.entry is None:
        return "none"
    return text.verdict(record) if record.get("name", paper.entry.name) == paper.entry.name else "compared"


def _sorted(items: list[Item], sort: str) -> list[Item]:
    if sort == "newest":
        return sorted(items, key=lambda i: (i.paper.row.date, i.paper.key), reverse=True)
    if sort == "oldest":
        return sorted(items, key=lambda i: (not i.paper.row.date, i.paper.row.date, i.paper.key))
    if sort == "title":
        return sorted(items, key=lambda i: (i.paper.row.title.casefold(), i.paper.key))
    return items


def _brief(item: Item) -> dict[str, Any]:
    paper, entry = item.paper, item.paper.entry
    row = paper.row
    gist = entry.summary if entry else row.summary or row.abstract
    return {
        "id": paper.key,
        "arxiv_id": row.arxiv_id,
        "url": paper.url,
        "title": row.title,
        "date": row.date,
        "gist": gist if len(gist) <= _GIST else gist[:_GIST].rpartition(" ")[0] + " …",
        "code": row.code,
        "name": entry.name if entry else "",
        "kind": entry.kind if entry else "",
        "family": entry.family if entry else "",
        "implemented": item.facets["implemented"][0],
        "evidence": item.facets["evidence"][0],
        "sections": list(item.facets["section"]),
        "in_library": paper.kept,
        "run": paper.run,
    }


def _record(paper: Paper) -> dict[str, Any] | None:
    record = read_evidence(paper.entry) if paper.entry and paper.entry.evidence else None
    if record is None:
        return None
    columns, cells = text.table(record)
    return {
        "name": record.get("name", ""),
        "claim": record["claim"],
        "verdict": text.verdict(record),
        "columns": columns,
        "cells": cells,
        "numeric": text.numeric(record),
        "notes": record.get("notes", ""),
        "conditions": text.conditions(record),
    }

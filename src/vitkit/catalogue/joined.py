"""The user's library and the shipped catalogue as one list of papers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vitkit.catalogue.digests.row import Digest, Row
from vitkit.catalogue.library import Library
from vitkit.catalogue.meaning import Vectors, fuse
from vitkit.catalogue.reader import Entry, load, methods

#: papers of each order that are joined with another one
_DEEP = 100


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper of the library, of the catalogue or of both.

    Attributes:
        row: as the library has it, with date and code from the catalogue where it lacks them; for what only the
            catalogue has, its entry's.
        entry: what the catalogue says; None if the paper is not in it.
        kept: whether the library has it.
    """

    row: Row
    entry: Entry | None
    kept: bool

    @property
    def key(self) -> str:
        """Its arXiv id; where there is no paper, the name of the entry."""
        return self.row.arxiv_id or (self.entry.name if self.entry else "")

    @property
    def url(self) -> str:
        """Address of the abstract page, or the empty string."""
        return self.row.url if self.row.arxiv_id else ""

    @property
    def run(self) -> str:
        """The command that tells how to run it; empty if no code comes with vitkit."""
        return f"vitkit show {self.entry.name}" if self.entry and self.entry.provides else ""


def papers(library: Library | None = None) -> dict[str, Paper]:
    """All papers by key, the newest first, those without a date last; without a library the catalogue's."""
    entries = _entries()
    found = []
    for row in library.papers() if library else ():
        entry = entries.pop(row.arxiv_id, None)
        if entry:
            row = replace(row, date=row.date or entry.date, code=row.code or entry.code)
        found.append(Paper(row=row, entry=entry, kept=True))
    for e in entries.values():
        row = Row(arxiv_id=e.id, title=e.title, date=e.date, summary=e.summary, code=e.code)
        found.append(Paper(row=row, entry=e, kept=False))
    found.sort(key=lambda paper: (paper.row.date, paper.key), reverse=True)
    return {paper.key: paper for paper in found}


def catalogue_index() -> Library:
    """The catalogue in memory, to search in; its methods are found by name, too. Close it, or use it with ``with``."""
    named: dict[str, list[str]] = {}
    for method in methods().values():
        named.setdefault(method.entry.name, []).append(method.name)
    index = Library(":memory:")
    index.merge(
        Digest(
            rows=tuple(
                Row(arxiv_id=key, title=e.title, summary=e.summary, abstract=" ".join([e.name, *named.get(e.name, ())]))
                for key, e in _entries().items()
            )
        )
    )
    return index


def meaning_of(paper: Paper) -> str:
    """The text whose vector stands for a paper: its title, and its abstract or else its summary."""
    return f"{paper.row.title}\n{paper.row.abstract or paper.row.summary}"


def search(
    query: str, known: Mapping[str, Paper], *indexes: Library, limit: int, vectors: Vectors | None = None
) -> list[Paper]:
    """The papers that fit a query, the best first.

    What is called so comes first: an arXiv id, with or without version, or a name of the catalogue. Then come the
    papers that the indexes find, one index after the other, joined by their ranks with those that mean the same if
    there are vectors. Where none is found, a part of a title will do.

    Args:
        query: any text; see :meth:`Library.search`.
        known: of :func:`papers`; nothing else is found.
        indexes: the library and :func:`catalogue_index`.
        limit: of how many to take from each index.
        vectors: of the papers by :func:`meaning_of`; missing ones are made.
    """
    wanted = query.strip().casefold()
    if not wanted:
        return []
    bare = re.sub(r"^arxiv:\s*|(?<=\d)v\d+$", "", wanted)
    called = [k for k, p in known.items() if bare == k.casefold() or (p.entry and wanted == p.entry.name)]
    # places far down still count where two orders are joined
    limit = limit if vectors is None else max(limit, _DEEP)
    orders = [list(dict.fromkeys(hit.row.arxiv_id for index in indexes for hit in index.search(query, limit)))]
    if vectors is not None:
        texts = {key: meaning_of(paper) for key, paper in known.items()}
        orders.append([key for key, _ in vectors.rank(query, texts, limit)])
    found = [known[key] for key in dict.fromkeys([*called, *fuse(*orders)]) if key in known]
    return found or [paper for paper in known.values() if wanted in paper.row.title.casefold()]


def _entries() -> dict[str, Entry]:
    """The catalogue's entries by the key of their papers; of several about one paper the first."""
    found: dict[str, Entry] = {}
    for entry in load().values():
        found.setdefault(entry.id or entry.name, entry)
    return found

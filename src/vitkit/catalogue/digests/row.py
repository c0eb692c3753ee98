"""What a digest is made of: rows, and an account of what could not be read."""

from __future__ import annotations

import re
from dataclasses import dataclass

# C0 and C1 control characters, but not the white space among them: a terminal would obey some of these
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")
_SPACE = re.compile(r"[ \t\n\r\f\v\x85\u2028\u2029]+")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One paper as one digest lists it. All texts are plain: no markup, on one line.

    Attributes:
        arxiv_id: without version, e.g. ``"2505.08517"`` or ``"hep-th/9901001"``.
        title: of the paper.
        version: of the paper; 0 where the digest does not tell.
        date: ``"YYYY-MM-DD"``; in a daily digest the day of its section; empty if unknown.
        abstract: the authors'.
        summary: the digest's own.
        comment: the authors' remark, e.g. where it was accepted.
        code: address of the code, several separated by spaces; a digest may have put words here instead.
        authors: in the digest's order.
        section: heading it stands under; empty if there is none.
        form: "table" (date, abstract, comment, code) or "daily" (authors, summary); empty if it comes from no digest.
        source: the file it was read from.
        line: number of its first line there, from 1; 0 if it comes from no file.
    """

    arxiv_id: str
    title: str
    version: int = 0
    date: str = ""
    abstract: str = ""
    summary: str = ""
    comment: str = ""
    code: str = ""
    authors: tuple[str, ...] = ()
    section: str = ""
    form: str = ""
    source: str = ""
    line: int = 0

    @property
    def versioned_id(self) -> str:
        """The id with its version, where that is known.

        >>> Row(arxiv_id="2505.08517", version=2, title="T").versioned_id
        '2505.08517v2'
        """
        return f"{self.arxiv_id}v{self.version}" if self.version else self.arxiv_id

    @property
    def url(self) -> str:
        """Address of the abstract page."""
        return f"https://arxiv.org/abs/{self.versioned_id}"


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Something in a file that looks like part of a digest but could not be read.

    Attributes:
        source: the file.
        line: number of its first line, from 1; 0 means the whole file.
        reason: what is wrong, for a person.
        text: the lines as they stand in the file.
    """

    source: str
    line: int
    reason: str
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Part of a row or table that was read but has no place in a :class:`Row`; fields as in :class:`Unreadable`."""

    source: str
    line: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Digest:
    """All that a file holds.

    Attributes:
        rows: in the file's order.
        unreadable: rows, tables or files that could not be read, in the file's order.
        notes: what was left aside of rows that are in ``rows``.
        source: the file's name.
    """

    rows: tuple[Row, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    notes: tuple[Note, ...] = ()
    source: str = ""

    @property
    def sections(self) -> tuple[str, ...]:
        """Headings that have rows, in the file's order."""
        return tuple(dict.fromkeys(row.section for row in self.rows))


def tidy(text: str) -> str:
    """One line without control characters; runs of white space become one space.

    >>> tidy(" Sparse\\n  attention\\x1b ")
    'Sparse attention'
    """
    if not text.isprintable():
        text = _SPACE.sub(" ", _CONTROL.sub("", text))
    elif "  " in text:
        text = _SPACE.sub(" ", text)
    return text.strip(" ")

"""Papers from the arXiv API, asked for politely: one request at a time, seconds apart, and patient with a busy server.

The ``arxiv`` package builds the requests, keeps the distance between them and reads the entries. What it leaves out is
added here: time limits, a user agent with vitkit's name, waits that grow and heed Retry-After, and a look at every
answer, for to the package one that is no feed is a feed without papers.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from itertools import islice
from typing import Any
from urllib.parse import urlsplit
from xml.etree import ElementTree

from vitkit import __version__
from vitkit.catalogue import code_links
from vitkit.catalogue.digests.row import Row, Unreadable, tidy
from vitkit.errors import BadInput, MissingExtra, VitkitError

#: what arXiv asks for between two requests
DELAY_SECONDS = 3.0
#: entries in one answer
PAGE_SIZE = 100
#: of a request that fails, the first included
ATTEMPTS = 5
#: to connect, and to be answered
TIMEOUT_SECONDS = (10.0, 60.0)
#: a server that wants to be left alone for longer gets its wish
LONGEST_WAIT_SECONDS = 120.0
#: arXiv answers nothing beyond 30,000, and is unreliable long before
DEEPEST = 10_000

_ATOM = "{http://www.w3.org/2005/Atom}"
_OPENSEARCH = "http://a9.com/-/spec/opensearch/1.1/"
_TOTAL = f"{{{_OPENSEARCH}}}totalResults"
# older releases of the package know these by their prefixes
ElementTree.register_namespace("opensearch", _OPENSEARCH)
ElementTree.register_namespace("arxiv", "http://arxiv.org/schemas/atom")
_ID = re.compile(r"/abs/(\d{4}\.\d{4,5}|[a-z-]+(?:\.[a-z]{2})?/\d{7})(?:v(\d+))?$", re.IGNORECASE)
_OWN_SYNTAX = re.compile(
    r"\b(?:ti|au|abs|co|jr|cat|rn|id|all|submittedDate|lastUpdatedDate):(?=\S)|\b(?:AND|OR|ANDNOT)\b"
)
_CATEGORY = re.compile(r"[a-z]+(?:-[a-z]+)*(?:\.(?:[A-Z]{2}|[a-z]+(?:-[a-z]+)*|\*))?")
#: of arXiv
_BEGINNING = datetime(1991, 1, 1, tzinfo=UTC)
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


class Unreachable(VitkitError):
    """ArXiv cannot be reached, or went on failing; later it may work."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """What to ask for: papers by the day their first version was submitted, the newest first.

    Attributes:
        first, last: UTC, whole minutes, both included.
        start: how many of them are here already.
        reached: when the oldest of those was submitted.
    """

    first: datetime
    last: datetime
    start: int = 0
    reached: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """One answer.

    Attributes:
        rows: papers, as a table lists them: dated by their newest version, without section.
        unreadable: entries that are no paper.
        left: how many papers are still to come.
        rest: what is still to be asked for; None after the last page.
    """

    rows: tuple[Row, ...]
    unreadable: tuple[Unreadable, ...]
    left: int
    rest: Range | None


def build_query(text: str, categories: Sequence[str] = ()) -> str:
    """A query in arXiv's own words.

    Words are looked for side by side, in all fields. With quotes in them, each phrase in quotes and every other word
    must occur. What has field prefixes or the operators AND, OR, ANDNOT is taken as it is.

    Args:
        categories: such as ``"cs.CV"``; the paper must be in one of them.

    >>> build_query("vision transformer", ["cs.CV", "cs.LG"])
    'all:"vision transformer" AND (cat:cs.CV OR cat:cs.LG)'
    >>> build_query('"token pruning" segmentation')
    'all:"token pruning" AND all:segmentation'
    >>> build_query("ti:pruning OR ti:merging", ["cs.CV"])
    '(ti:pruning OR ti:merging) AND cat:cs.CV'

    Raises: BadInput if it asks for nothing, or a category is none.
    """
    text = tidy(text)
    for category in categories:
        if not _CATEGORY.fullmatch(category):
            raise BadInput(f"The category {category!r} must be one of arXiv's, like cs.CV or math.OC.")
    parts = []
    if _OWN_SYNTAX.search(text):
        parts.append(f"({text})" if categories or re.search(r"\b(?:OR|ANDNOT)\b", text) else text)
    else:
        pieces = re.findall(r'"([^"]*)"|([^\s"]+)', text) if text.count('"') > 1 else [(text, "")]
        for piece in (tidy(re.sub(r'["\\]', " ", phrase or word)) for phrase, word in pieces):
            if re.search(r"\w", piece):
                parts.append(f"all:{piece}" if re.fullmatch(r"\w+", piece) else f'all:"{piece}"')
    if categories:
        either = " OR ".join(f"cat:{category}" for category in categories)
        parts.append(f"({either})" if len(categories) > 1 else either)
    if not parts:
        raise BadInput('There is nothing to ask arXiv for: give words, as in --query "vision transformer".')
    return " AND ".join(parts)


def parse_since(text: str, now: datetime) -> datetime:
    """The moment that ``"2025-05-01"``, ``"36h"``, ``"7d"`` or ``"2w"`` before ``now`` names.

    Raises: BadInput for anything else, and for the future.
    """
    try:
        if match := re.fullmatch(r"(\d{1,4})([hdw])", text):
            found = now - int(match[1]) * _UNITS[match[2]]
        else:
            found = datetime.fromisoformat(text).replace(tzinfo=UTC)
    except ValueError:
        raise BadInput(f"since {text!r} must be a day like 2025-05-01, or a time back from now like 7d.") from None
    if found > now:
        raise BadInput(f"since {text!r} is in the future.")
    return max(found.replace(second=0, microsecond=0), _BEGINNING)


class Feed:
    """A connection to the arXiv API, or to what ``VITKIT_ARXIV_URL`` names instead.

    Args:
        delay_seconds: between two requests.
        page_size: papers in one answer.
        wait: called with the seconds to wait before a request that failed is repeated.

    Raises: MissingExtra without the ``arxiv`` package; BadInput if ``VITKIT_ARXIV_URL`` is no address.
    """

    def __init__(
        self,
        delay_seconds: float = DELAY_SECONDS,
        page_size: int = PAGE_SIZE,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        try:
            import arxiv
        except ImportError as error:
            raise MissingExtra("Fetching from arXiv", "arxiv", "papers") from error
        self._arxiv = arxiv
        self._client = arxiv.Client(page_size=page_size, delay_seconds=delay_seconds, num_retries=0)
        if url := os.environ.get("VITKIT_ARXIV_URL"):
            self._client.query_url_format = _url_format(url)
        host = urlsplit(self._client.query_url_format).hostname or ""
        self._name = "arXiv" if host.endswith("arxiv.org") else host
        self._door = _Door(f"vitkit/{__version__} arxiv.py/{getattr(arxiv, '__version__', '?')}", self._name)
        # the package has no other place for a time limit or a user agent
        self._client._session = self._door  # type: ignore[assignment]
        self._delay, self._page_size, self._wait = delay_seconds, page_size, wait

    def pages(self, query: str, wanted: Range, limit: int | None = None) -> Iterator[Page]:
        """Ask page by page, the newest papers first; each page is asked for when it is wanted.

        Args:
            query: from :func:`build_query`.
            limit: of how many papers to ask for.

        Raises: Unreachable; BadInput if arXiv refuses the query; VitkitError if the answers are no feed.
        """
        rest: Range | None = wanted
        here: set[str] = set()
        expected = 0
        while rest is not None and limit != 0:
            size = self._page_size if limit is None else min(limit, self._page_size)
            try:
                results, expected = self._ask(query, rest, size, expected)
            except _Failed as failure:
                if failure.empty and (narrow := _narrowed(rest)):
                    rest, expected = narrow, 0
                    continue
                raise failure.explained(self._name) from failure.__cause__
            rows, unreadable = [], list(self._door.unreadable)
            for result in results:
                row = _row(result)
                if isinstance(row, Unreadable):
                    unreadable.append(row)
                elif row.versioned_id not in here:
                    here.add(row.versioned_id)
                    rows.append(row)
            arrived = rest.start + self._door.entries
            reached = min((result.published for result in results), default=rest.reached)
            rest = replace(rest, start=arrived, reached=reached) if arrived < expected else None
            if rest is not None and arrived >= DEEPEST and (narrow := _narrowed(rest)):
                rest, expected = narrow, 0
            if limit is not None:
                limit = max(0, limit - self._door.entries)
            yield Page(
                rows=tuple(rows), unreadable=tuple(unreadable), left=max(0, expected - arrived), rest=rest
            )  # fmt: skip

    def _ask(self, query: str, wanted: Range, size: int, expected: int) -> tuple[list[Any], int]:
        """One page, with patience; its papers, and how many the whole range has."""
        dates = f"submittedDate:[{wanted.first:%Y%m%d%H%M} TO {wanted.last:%Y%m%d%H%M}]"
        search = self._arxiv.Search(
            query=f"{query} AND {dates}",
            max_results=None,
            sort_by=self._arxiv.SortCriterion.SubmittedDate,
            sort_order=self._arxiv.SortOrder.Descending,
        )
        self._client.page_size = size
        attempt = 0
        while True:
            attempt += 1
            try:
                results = self._once(search, wanted.start)
                expected = max(expected, self._door.total)
                # now and then arXiv has nothing where it has something, on a first page too
                if self._door.entries or (attempt > 1 and wanted.start >= expected):
                    return results, expected
                raise _Failed("an empty page where there are papers", empty=True)
            except _Failed as failure:
                if attempt == ATTEMPTS or failure.final:
                    failure.attempts = attempt
                    raise
                self._wait(max(failure.wait, self._delay * 2 ** (attempt - 1)))

    def _once(self, search: Any, start: int) -> list[Any]:
        results = self._client.results(search, offset=start)
        try:
            first = next(results, None)
            # no further: the package would ask for the next page
            others = self._door.entries - len(self._door.unreadable) - 1
            return [] if first is None else [first, *islice(results, others)]
        except VitkitError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise VitkitError(f"{self._name} answered with a feed that cannot be read: {tidy(str(error))}.") from error


class _Failed(Exception):
    """A request that may do better when it is repeated, unless it is final."""

    attempts = 1

    def __init__(
        self,
        reason: str,
        *,
        wait: float = 0.0,
        final: bool = False,
        empty: bool = False,
        garbled: bool = False,
        answered: bool = True,
    ) -> None:
        super().__init__(reason)
        self.reason, self.wait, self.empty, self.garbled, self.answered = reason, wait, empty, garbled, answered
        self.final = final or wait > LONGEST_WAIT_SECONDS

    def explained(self, name: str) -> VitkitError:
        if self.garbled:
            return VitkitError(f"{name} answered with {self.reason}; does VITKIT_ARXIV_URL name the arXiv API?")
        times = f", {self.attempts} times in a row" if self.attempts > 1 else ""
        advice = "try again later." if self.answered else "is this machine online?"
        return Unreachable(f"{name} cannot be reached ({self.reason}{times}): {advice}")


class _Door:
    """Stands where the package has its session, of which it calls ``get`` alone: one request, and a look at the answer.

    After it, ``total`` is what the server has in all, ``entries`` how many came, and ``unreadable`` those of them that
    are kept from the package.
    """

    def __init__(self, user_agent: str, name: str) -> None:
        import requests

        self._requests, self._session, self._name = requests, requests.Session(), name
        self._headers = {"User-Agent": user_agent}
        self._answered = False
        self.total = self.entries = 0
        self.unreadable: tuple[Unreadable, ...] = ()

    def get(self, url: str, **_: object) -> _Answer:
        self.total = self.entries = 0
        self.unreadable = ()
        try:
            answer = self._session.get(url, headers=self._headers, timeout=TIMEOUT_SECONDS)
        except self._requests.exceptions.RequestException as error:
            raise self._broken(error) from error
        self._answered = True
        if answer.status_code == 429 or answer.status_code >= 500:
            wait = _seconds(answer.headers.get("Retry-After", ""))
            asks = f", which asks to wait {wait:.0f} s" if wait > LONGEST_WAIT_SECONDS else ""
            raise _Failed(f"HTTP {answer.status_code}{asks}", wait=wait)
        if answer.status_code == 400:
            # the reason stands in a feed, if it does
            with suppress(_Failed):
                self._look(answer.content)
        if answer.status_code != 200:
            raise VitkitError(
                f"{self._name} answered HTTP {answer.status_code} ({tidy(answer.reason or '')}); does VITKIT_ARXIV_URL "
                "name the arXiv API?"
            )
        return _Answer(answer.status_code, self._look(answer.content))

    def _broken(self, error: Exception) -> _Failed:
        timeout = isinstance(error, self._requests.exceptions.Timeout)
        said = re.search(r"\[Errno -?\d+\] ([\w ,]+)", str(error))
        if timeout:
            reason = "no answer in time"
        else:
            reason = said[1] if said else "the connection broke off"
        # who has no network wants to know at once
        absent = not self._answered and (said is not None or "ConnectTimeout" in type(error).__name__)
        return _Failed(reason, final=absent, answered=False)

    def _look(self, content: bytes) -> bytes:
        """The answer without its flawed entries."""
        try:
            root = ElementTree.fromstring(content)
            total = int(root.findtext(_TOTAL, ""))
        except (ElementTree.ParseError, ValueError) as error:
            begins = tidy(content[:60].decode("utf-8", "replace"))
            raise _Failed(f"something that is no feed of papers, beginning with {begins!r}", garbled=True) from error
        flawed = []
        entries = root.findall(f"{_ATOM}entry")
        for entry in entries:
            name = tidy(entry.findtext(f"{_ATOM}id", ""))
            if "/api/errors" in name:
                said = tidy(entry.findtext(f"{_ATOM}summary", ""))[:300]
                raise BadInput(f"{self._name} refuses the query: {said}")
            # the package passes over some of these without a word, and gives up the page for others
            if flaw := _flaw(entry):
                flawed.append(Unreadable(source=name or self._name, line=0, reason=flaw))
                root.remove(entry)
        self.total, self.entries, self.unreadable = total, len(entries), tuple(flawed)
        return ElementTree.tostring(root) if flawed else content


@dataclass(frozen=True)
class _Answer:
    """What the package looks at of an answer."""

    status_code: int
    content: bytes


def _flaw(entry: ElementTree.Element) -> str:
    for tag in ("id", "published", "updated"):
        text = (entry.findtext(f"{_ATOM}{tag}") or "").strip()
        if not text:
            return f"the entry has no {tag}"
        if tag != "id":
            try:
                datetime.fromisoformat(text)
            except ValueError:
                return f"the entry's {tag}, {text[:40]!r}, is no date"
    return ""


def _row(result: Any) -> Row | Unreadable:
    match = _ID.search(result.entry_id.strip())
    title = tidy(result.title)
    if not match or not title:
        reason = "the entry has no title" if match else "the entry's id is no arXiv address"
        return Unreadable(source=tidy(result.entry_id), line=0, reason=reason)
    abstract, comment = tidy(result.summary), tidy(result.comment or "")
    # digests have commas between authors
    authors = (tidy(author.name.replace(",", " ")) for author in result.authors)
    return Row(
        arxiv_id=match[1],
        version=int(match[2] or 0),
        title=title,
        date=f"{result.updated:%Y-%m-%d}",
        abstract=abstract,
        comment=comment,
        code=code_links.find(abstract, comment),
        authors=tuple(filter(None, authors)),
        form="table",
        source="arXiv",
    )


def _narrowed(wanted: Range) -> Range | None:
    """The rest of a range asked for by date in place of a number far down the list; None where that gains nothing."""
    if wanted.reached is None:
        return None
    # a day more, for nobody says in which time zone the index counts
    last = max(wanted.first, wanted.reached.replace(second=0, microsecond=0) + timedelta(days=1))
    return Range(first=wanted.first, last=last) if wanted.start and last < wanted.last else None


def _seconds(retry_after: str) -> float:
    if re.fullmatch(r"\s*\d{1,9}\s*", retry_after):
        return float(retry_after)
    try:
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _url_format(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput(f"VITKIT_ARXIV_URL={url!r} must be an address like https://export.arxiv.org/api/query.")
    return url.replace("{", "{{").replace("}", "}}") + ("&{}" if parts.query else "?{}")

"""A small arXiv on loopback: made-up papers, the query parameters that vitkit sends, and faults on demand."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

_HEAD = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<feed xmlns="http://www.w3.org/2005/Atom" '
    'xmlns:opensearch="http://a9.com/-/spec/opensearch/1.1/" xmlns:arxiv="http://arxiv.org/schemas/atom">\n'
    "  <title>made up</title>\n"
)


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A made-up paper; texts may have line breaks, as arXiv's have."""

    arxiv_id: str
    published: datetime
    version: int = 1
    title: str = "A paper"
    abstract: str = "Says something."
    comment: str = ""
    authors: tuple[str, ...] = ("A. Author",)
    updated: datetime | None = None

    def entry(self) -> str:
        """The paper as an entry of a feed."""
        comment = f"    <arxiv:comment>{escape(self.comment)}</arxiv:comment>\n" if self.comment else ""
        address = f"http://arxiv.org/abs/{self.arxiv_id}v{self.version}"
        return (
            f"  <entry>\n    <id>{address}</id>\n"
            f"    <updated>{(self.updated or self.published):%Y-%m-%dT%H:%M:%SZ}</updated>\n"
            f"    <published>{self.published:%Y-%m-%dT%H:%M:%SZ}</published>\n"
            f"    <title>{escape(self.title)}</title>\n    <summary>  {escape(self.abstract)}\n</summary>\n"
            + "".join(f"    <author>\n      <name>{escape(name)}</name>\n    </author>\n" for name in self.authors)
            + comment
            + f'    <link href="{address}" rel="alternate" type="text/html"/>\n'
            f'    <link title="pdf" href="{address.replace("abs", "pdf")}" rel="related" type="application/pdf"/>\n'
            '    <arxiv:primary_category term="cs.CV" scheme="http://arxiv.org/schemas/atom"/>\n'
            '    <category term="cs.CV" scheme="http://arxiv.org/schemas/atom"/>\n  </entry>\n'
        )


def feed(entries: str, total: int, start: int = 0) -> bytes:
    """An answer of the API."""
    numbers = {"totalResults": total, "startIndex": start, "itemsPerPage": entries.count("<entry>")}
    tags = "".join(f"  <opensearch:{name}>{number}</opensearch:{name}>\n" for name, number in numbers.items())
    return f"{_HEAD}{tags}{entries}</feed>\n".encode()


@dataclass
class Server:
    """What the server has, does and has seen.

    Attributes:
        url: for ``VITKIT_ARXIV_URL``.
        papers: found by the phrases and words after ``all:`` and by their time of submission.
        faults: one for each of the next requests: None for none, bytes to answer with, a status and headers,
            ``"empty"`` for a page without entries, ``"hang up"``.
        requests: the parameters of each request, and its user agent.
    """

    url: str = ""
    papers: list[Paper] = field(default_factory=list)
    faults: list[bytes | str | tuple[int, dict[str, str]] | None] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def answer(self, asked: dict[str, Any]) -> bytes:
        """The page that was asked for."""
        query = asked["search_query"]
        first, last = re.findall(r"submittedDate:\[(\d{12}) TO (\d{12})\]", query)[0]
        words = [(phrase or word).lower() for phrase, word in re.findall(r'all:(?:"([^"]+)"|(\w+))', query)]
        found = [
            paper
            for paper in sorted(self.papers, key=lambda p: (p.published, p.arxiv_id), reverse=True)
            if first <= f"{paper.published:%Y%m%d%H%M}" <= last
            and all(word in " ".join(f"{paper.title} {paper.abstract}".lower().split()) for word in words)
        ]
        start, size = int(asked["start"]), int(asked["max_results"])
        return feed("".join(paper.entry() for paper in found[start : start + size]), len(found), start)


@contextmanager
def serving(papers: list[Paper] | None = None) -> Iterator[Server]:
    """Run the server; one thread, gone at the end."""
    state = Server(papers=papers or [])

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked: dict[str, Any] = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
            asked["user_agent"] = self.headers["User-Agent"]
            state.requests.append(asked)
            fault = state.faults.pop(0) if state.faults else None
            if fault == "hang up":
                self.close_connection = True
                return
            status, body = 200, b""
            headers: dict[str, str] = {}
            if isinstance(fault, tuple):
                status, headers = fault
            elif isinstance(fault, bytes):
                body = fault
            elif fault == "empty":
                body = feed("", 0, int(asked["start"]))
            else:
                body = state.answer(asked)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/api/query"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def moment(text: str) -> datetime:
    """A time in UTC: ``moment("2025-05-10T12:00")``."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)

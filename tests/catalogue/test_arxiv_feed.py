"""Asking the arXiv API: queries, pages, patience, and what is made of bad answers. The server is made up."""

from __future__ import annotations

import builtins
import re
import socket
from datetime import UTC, datetime, timedelta

import pytest
import requests

from vitkit import __version__
from vitkit.catalogue import arxiv_feed
from vitkit.catalogue.arxiv_feed import Feed, Range, Unreachable, build_query, parse_since
from vitkit.errors import BadInput, MissingExtra, VitkitError
from vitkit.testing.arxiv_server import Paper, feed, moment, serving

ALL = Range(first=moment("2025-05-01"), last=moment("2025-05-31"))


def papers(number, first="2025-05-20T12:00", step=timedelta(hours=-1)):
    return [Paper(arxiv_id=f"2505.{i:05}", published=moment(first) + i * step) for i in range(number)]


@pytest.fixture
def arxiv(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        monkeypatch.setenv("VITKIT_ARXIV_URL", server.url)
        yield server


@pytest.fixture
def waits():
    return []


@pytest.fixture
def client(arxiv, waits):
    return Feed(delay_seconds=0, page_size=10, wait=waits.append)


def ids(pages):
    return [row.arxiv_id for page in pages for row in page.rows]


@pytest.mark.parametrize(
    ("text", "categories", "query"),
    [
        ("vision transformer", [], 'all:"vision transformer"'),
        ("ViT", ["cs.CV"], "all:ViT AND cat:cs.CV"),
        ("", ["cs.CV", "math"], "(cat:cs.CV OR cat:math)"),
        ('"token pruning" ViT "self-supervised"', [], 'all:"token pruning" AND all:ViT AND all:"self-supervised"'),
        ('  a "quote\n', [], 'all:"a quote"'),
        ("coarse-to-fine: a way", [], 'all:"coarse-to-fine: a way"'),
        ("ti:a OR ti:b", [], "(ti:a OR ti:b)"),
        ("ti:a AND abs:b", [], "ti:a AND abs:b"),
        ("ti:a AND abs:b", ["cs.*"], "(ti:a AND abs:b) AND cat:cs.*"),
    ],
)
def test_a_query_in_arxivs_words(text, categories, query):
    assert build_query(text, categories) == query


@pytest.mark.parametrize(
    ("text", "categories", "message"),
    [
        ("", [], "nothing to ask arXiv for"),
        ('"" -', [], "nothing to ask arXiv for"),
        ("x", ["cs.CV OR au:me"], "category 'cs.CV OR au:me' must be one of arXiv's, like cs.CV"),
        ("x", ["cs_CV"], "category 'cs_CV'"),
    ],
)
def test_no_query(text, categories, message):
    with pytest.raises(BadInput, match=message):
        build_query(text, categories)


def test_since():
    now = datetime(2025, 5, 15, 12, 30, 40, tzinfo=UTC)
    assert parse_since("2025-05-01", now) == moment("2025-05-01")
    assert parse_since("7d", now) == moment("2025-05-08T12:30")
    assert parse_since("9999w", now) == parse_since("0001-01-01", now) == moment("1991-01-01")
    assert parse_since("36h", now) == moment("2025-05-14T00:30")
    for text, message in [
        ("spring", "must be a day like"),
        ("99999w", "must be a day like"),
        ("2026-01-01", "the future"),
    ]:
        with pytest.raises(BadInput, match=message):
            parse_since(text, now)


def test_an_entry_becomes_a_row(arxiv, client):
    arxiv.papers = [
        Paper(
            arxiv_id="2505.08517",
            version=2,
            published=moment("2025-05-13T17:59"),
            updated=moment("2025-05-15T01:02"),
            title="A title broken\n  over lines with $|x| < 1$ & more",
            abstract="First line\nsecond. Code: https://github.com/o/long-\nname.",
            comment="12 pages,\n see o.github.io/x",
            authors=("Ann  Ä. One", "Bob Two, Jr."),
        ),
        Paper(arxiv_id="math.GT/0309136", published=moment("2025-05-12")),
    ]
    (page,) = client.pages("cat:cs.CV", ALL)
    row, old = page.rows
    assert (row.versioned_id, row.date, row.form, row.source) == ("2505.08517v2", "2025-05-15", "table", "arXiv")
    assert row.title == "A title broken over lines with $|x| < 1$ & more"
    assert row.abstract == "First line second. Code: https://github.com/o/long- name."
    assert row.comment == "12 pages, see o.github.io/x"
    assert row.code == "https://github.com/o/long-name https://o.github.io/x"
    assert row.authors == ("Ann Ä. One", "Bob Two Jr.")
    assert old.versioned_id == "math.GT/0309136v1"
    assert page.rest is None and page.left == 0 and page.unreadable == ()


def test_pages_the_newest_first_and_what_was_sent(arxiv, client):
    arxiv.papers = papers(25)
    pages = list(client.pages("cat:cs.CV", ALL))
    assert ids(pages) == [f"2505.{i:05}" for i in range(25)]
    assert [page.left for page in pages] == [15, 5, 0] and [page.rest is None for page in pages] == [False, False, True]
    assert pages[0].rest == Range(first=ALL.first, last=ALL.last, start=10, reached=moment("2025-05-20T03:00"))
    sent = arxiv.requests[0]
    assert sent["search_query"] == "cat:cs.CV AND submittedDate:[202505010000 TO 202505310000]"
    assert (sent["sortBy"], sent["sortOrder"], sent["max_results"]) == ("submittedDate", "descending", "10")
    assert sent["user_agent"].startswith(f"vitkit/{__version__} arxiv.py/")
    assert [request["start"] for request in arxiv.requests] == ["0", "10", "20"]


def test_a_page_is_asked_for_when_it_is_wanted_and_a_rest_goes_on(arxiv, client):
    arxiv.papers = papers(25)
    page = next(client.pages("cat:cs.CV", ALL))
    assert len(arxiv.requests) == 1
    assert ids(client.pages("cat:cs.CV", page.rest)) == [f"2505.{i:05}" for i in range(10, 25)]


def test_a_limit(arxiv, client):
    arxiv.papers = papers(25)
    pages = list(client.pages("cat:cs.CV", ALL, limit=13))
    assert len(ids(pages)) == 13 and pages[-1].rest.start == 13 and pages[-1].left == 12
    assert [request["max_results"] for request in arxiv.requests] == ["10", "3"]


def test_the_package_keeps_the_distance(arxiv, monkeypatch):
    slept = []
    monkeypatch.setattr("arxiv.time.sleep", slept.append)
    arxiv.papers = papers(25)
    list(Feed(delay_seconds=100, page_size=10).pages("cat:cs.CV", ALL))
    assert len(slept) == 2 and all(90 < seconds <= 100 for seconds in slept)


@pytest.mark.parametrize(
    ("faults", "waited"),
    [
        (["empty"], [1]),
        ([feed("", 15)] * 3, [1, 2, 4]),
        ([b"<html>gateway</html>", b"not XML", feed("", 0)[:-9]], [1, 2, 4]),
        ([(503, {"Retry-After": "7"}), (500, {}), (429, {"Retry-After": "1"})], [7, 2, 4]),
        ([(503, {"Retry-After": "nonsense"}), (502, {"Retry-After": "Sat, 01 Jan 2000 00:00:00 GMT"})], [1, 2]),
        ([None, "empty", "hang up"], [1, 2]),
    ],
)
def test_it_is_patient(arxiv, waits, faults, waited, monkeypatch):
    monkeypatch.setattr("arxiv.time.sleep", lambda seconds: None)
    arxiv.papers, arxiv.faults = papers(15), list(faults)
    client = Feed(delay_seconds=1, page_size=10, wait=waits.append)
    assert len(ids(client.pages("cat:cs.CV", ALL))) == 15
    assert waits == waited


def test_patience_ends(arxiv, client, waits):
    arxiv.faults = [(503, {})] * 9
    with pytest.raises(Unreachable, match=r"127.0.0.1 cannot be reached \(HTTP 503, 5 times in a row\): try again"):
        list(client.pages("cat:cs.CV", ALL))
    assert len(arxiv.requests) == 5
    arxiv.faults = [(503, {"Retry-After": "3600"})]
    with pytest.raises(Unreachable, match=r"HTTP 503, which asks to wait 3600 s\)"):
        list(client.pages("cat:cs.CV", ALL))
    assert max(waits) == 0


def test_nothing_is_believed_the_second_time_only(arxiv, client):
    assert ids(client.pages("cat:cs.CV", ALL)) == [] and len(arxiv.requests) == 2


def test_a_page_that_stays_empty_far_down_is_asked_for_by_date(arxiv, client):
    arxiv.papers = papers(60)
    arxiv.faults = [None] * 4 + ["empty"] * 5
    pages = list(client.pages("cat:cs.CV", ALL))
    assert ids(pages) == [f"2505.{i:05}" for i in range(60)]
    # a day more than was reached: nobody says in which time zone the index counts
    narrowed = arxiv.requests[9]
    assert narrowed["start"] == "0" and "TO 202505192100]" in narrowed["search_query"]


def test_very_long_lists_are_asked_for_by_date(arxiv, client, monkeypatch):
    monkeypatch.setattr(arxiv_feed, "DEEPEST", 30)
    arxiv.papers = papers(60, step=timedelta(hours=-3))
    assert ids(client.pages("cat:cs.CV", ALL)) == [f"2505.{i:05}" for i in range(60)]
    assert max(int(request["start"]) for request in arxiv.requests) <= 30


def test_garbage_that_stays_is_named(arxiv, client):
    arxiv.faults = [b"<html><body>Hello</body></html>"] * 5
    with pytest.raises(VitkitError, match=r"no feed of papers, beginning with '<html><body>Hello.*VITKIT_ARXIV_URL"):
        list(client.pages("cat:cs.CV", ALL))


def test_refused_queries_and_wrong_addresses(arxiv, client):
    error = (
        "<entry><id>http://arxiv.org/api/errors#bad</id><title>Error</title>"
        "<summary>incorrect id\nformat for x</summary></entry>"
    )
    arxiv.faults = [feed(error, 1)]
    with pytest.raises(BadInput, match="refuses the query: incorrect id format for x"):
        list(client.pages("x", ALL))
    for status in (400, 404):
        arxiv.faults = [(status, {})]
        with pytest.raises(VitkitError, match=f"127.0.0.1 answered HTTP {status}.*VITKIT_ARXIV_URL"):
            list(client.pages("x", ALL))
    assert len(arxiv.requests) == 3


def test_entries_that_are_no_paper_are_told(arxiv, client):
    good = papers(2)
    lacking = "<entry><id>http://arxiv.org/abs/2505.77777v1</id><title>T</title></entry>"
    strange = good[0].entry().replace("arxiv.org/abs/", "example.org/")
    untitled = good[0].entry().replace("A paper", " ")
    undated = re.sub("<updated>.*</updated>", "<updated>soon</updated>", good[0].entry())
    entries = lacking + good[0].entry() + strange + undated + untitled + good[1].entry()
    arxiv.faults = [feed(entries, 6)]
    (page,) = client.pages("x", ALL)
    assert ids([page]) == ["2505.00000", "2505.00001"] and page.rest is None and len(arxiv.requests) == 1
    assert [(u.source.rpartition("/")[2], u.reason) for u in page.unreadable] == [
        ("2505.77777v1", "the entry has no published"),
        ("2505.00000v1", "the entry's updated, 'soon', is no date"),
        ("2505.00000v1", "the entry's id is no arXiv address"),
        ("2505.00000v1", "the entry has no title"),
    ]


def test_what_the_package_cannot_read_is_told(arxiv, client, monkeypatch):
    arxiv.faults = [feed(papers(1)[0].entry(), 1)]
    monkeypatch.setattr("arxiv.Result.__init__", lambda *a, **k: _raise(TypeError("of another kind")))
    with pytest.raises(VitkitError, match="127.0.0.1 answered with a feed that cannot be read: of another kind"):
        list(client.pages("x", ALL))


def test_offline_is_said_at_once(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        # bound and not listening: refused
        monkeypatch.setenv("VITKIT_ARXIV_URL", f"http://127.0.0.1:{taken.getsockname()[1]}/api/query")
        with pytest.raises(
            Unreachable, match=r"^127.0.0.1 cannot be reached \(Connection refused\): is this machine online\?"
        ):
            list(Feed(wait=pytest.fail).pages("x", ALL))


@pytest.mark.parametrize(
    ("error", "message", "times"),
    [
        (requests.ConnectionError("… ([Errno -2] Name or service not known)'))"), "Name or service not known", 1),
        (requests.ConnectTimeout("…"), "no answer in time", 1),
        (requests.ReadTimeout("…"), "no answer in time, 5 times in a row", 5),
        (requests.exceptions.ChunkedEncodingError("…"), "the connection broke off, 5 times in a row", 5),
    ],
)
def test_a_bad_network(monkeypatch, error, message, times):
    asked = []

    def get(*_, **options):
        asked.append(options["timeout"])
        raise error

    monkeypatch.delenv("VITKIT_ARXIV_URL", raising=False)
    monkeypatch.setattr(requests.Session, "get", get)
    with pytest.raises(
        Unreachable, match=rf"^arXiv cannot be reached \({re.escape(message)}\): is this machine online"
    ):
        list(Feed(delay_seconds=0, wait=lambda seconds: None).pages("x", ALL))
    assert len(asked) == times and asked[0] == arxiv_feed.TIMEOUT_SECONDS


def test_a_connection_that_was_there_is_waited_for(arxiv, client, waits, monkeypatch):
    arxiv.papers = papers(15)
    pages = client.pages("x", ALL)
    next(pages)
    get, errors = requests.Session.get, [requests.ConnectionError("[Errno 111] Connection refused")] * 2
    monkeypatch.setattr(requests.Session, "get", lambda *a, **k: get(*a, **k) if not errors else _raise(errors.pop()))
    assert len(ids(pages)) == 5 and len(waits) == 2


def _raise(error):
    raise error


def test_what_must_be_there(monkeypatch):
    monkeypatch.setenv("VITKIT_ARXIV_URL", "localhost:80")
    with pytest.raises(BadInput, match=r"VITKIT_ARXIV_URL='localhost:80' must be an address like https://"):
        Feed()
    found = builtins.__import__

    def without(name, *rest, **options):
        if name == "arxiv":
            raise ImportError(name)
        return found(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r'Fetching from arXiv needs arxiv: pip install "vitkit\[papers\]"'):
        Feed()

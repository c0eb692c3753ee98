"""What a fetch asks for when some of it has arrived before."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitkit.catalogue.arxiv_feed import Feed, Range, Unreachable
from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.fetches import FRESH, LAG, Asked, Fetch, combine, settled, todo
from vitkit.catalogue.library import Library
from vitkit.errors import BadInput
from vitkit.testing.arxiv_server import Paper, moment, serving

NOW = moment("2025-05-20T12:00")
SINCE = moment("2025-05-01")
MINUTE = timedelta(minutes=1)
# the newest first
IDS = [f"2505.{36 - i:05}" for i in range(36)]


@pytest.fixture
def arxiv(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        monkeypatch.setenv("VITKIT_ARXIV_URL", server.url)
        # one every twelve hours; the newest was submitted an hour ago
        server.papers = [
            Paper(arxiv_id=IDS[i], published=NOW - timedelta(hours=1 + 12 * i), title=f"Paper {i}") for i in range(36)
        ]
        yield server


@pytest.fixture
def path(tmp_path):
    return tmp_path / "papers.db"


def fetch(path, now=NOW, limit=None, section="K", **options):
    options.setdefault("since", SINCE)
    job = Fetch("cat:cs.CV", section, now, path=path, **options)
    feed = Feed(delay_seconds=0, page_size=10, wait=lambda seconds: None)
    return combine(step.merged for step in job.run(feed, limit))


def asked_for(arxiv):
    """Range and offset of each request since the last call."""
    found = [(r["search_query"].partition("[")[2].rstrip("]"), int(r["start"])) for r in arxiv.requests]
    arxiv.requests.clear()
    return found


def listed(path, section="K"):
    with Library(path) as library:
        return [row.arxiv_id for row in library.rows(section)]


def test_everything_arrives_once_in_order_with_its_section(arxiv, path):
    found = fetch(path)
    assert len(found.new) == found.rows == 36 and not found.updated and not found.known
    assert asked_for(arxiv) == [("202505010000 TO 202505201200", start) for start in (0, 10, 20, 30)]
    assert listed(path) == IDS
    with Library(path) as library:
        row = library.find(IDS[3])
        assert row.title == "Paper 3" and row.authors == ("A. Author",)
        assert library.sections()[0].form == "table" and library.rows("K")[0].source == "arXiv"


def test_the_same_day_only_what_is_newer_is_asked_for(arxiv, path):
    fetch(path)
    asked_for(arxiv)
    assert fetch(path).rows == 0 and asked_for(arxiv) == []
    later = NOW + timedelta(hours=2)
    arxiv.papers.append(Paper(arxiv_id="2505.90000", published=later - MINUTE))
    assert fetch(path, later).new == ("2505.90000",)
    assert asked_for(arxiv) == [("202505201201 TO 202505201400", 0)]


def test_another_day_the_week_before_is_asked_for_again(arxiv, path):
    fetch(path)
    asked_for(arxiv)
    # submitted days ago, and listed only now
    arxiv.papers.append(Paper(arxiv_id="2505.90000", published=NOW - timedelta(days=3)))
    found = fetch(path, NOW + timedelta(days=1))
    assert found.new == ("2505.90000",) and len(found.known) == 14
    assert asked_for(arxiv) == [("202505131201 TO 202505211200", start) for start in (0, 10)]


def test_an_interrupted_run_loses_nothing_and_goes_on_where_it_stopped(arxiv, path):
    arxiv.faults = [None, None, *[(503, {})] * 5]
    with pytest.raises(Unreachable):
        fetch(path)
    assert len(listed(path)) == 20
    asked_for(arxiv)
    # two hours later, first what came in between, then the rest of the range that was begun
    found = fetch(path, NOW + timedelta(hours=2))
    assert len(found.new) == 16 and not found.known
    assert asked_for(arxiv) == [
        ("202505201201 TO 202505201400", 0),
        ("202505201201 TO 202505201400", 0),
        ("202505010000 TO 202505201200", 20),
        ("202505010000 TO 202505201200", 30),
    ]
    assert listed(path) == IDS
    assert fetch(path, NOW + timedelta(hours=2)).rows == 0 and asked_for(arxiv) == []


def test_a_process_that_is_killed_between_two_pages(arxiv, path):
    steps = Fetch("cat:cs.CV", "K", NOW, SINCE, path=path).run(Feed(delay_seconds=0, page_size=10))
    next(steps)
    steps.close()
    assert len(listed(path)) == 10
    assert len(fetch(path).new) == 26


def test_a_limit_goes_on_with_the_older_ones(arxiv, path):
    assert len(fetch(path, limit=13).new) == 13
    assert len(fetch(path, limit=13).new) == 13
    assert len(fetch(path, limit=13).new) == 10
    assert listed(path) == IDS


def test_without_since_it_goes_back_to_where_it_began(arxiv, path):
    assert len(fetch(path, since=None).new) == 14
    fetch(path, since=moment("2025-05-10"))
    asked_for(arxiv)
    assert fetch(path, since=None).rows == 0 and asked_for(arxiv) == []
    assert len(fetch(path).new) == 36 - len(listed_before(NOW, "2025-05-10"))
    assert asked_for(arxiv)[0] == ("202505010000 TO 202505092359", 0)


def listed_before(now, day):
    return [i for i in range(36) if now - timedelta(hours=1 + 12 * i) >= moment(day)]


def test_a_later_since_takes_only_part_of_what_was_begun(arxiv, path):
    fetch(path, limit=10)
    asked_for(arxiv)
    fetch(path, since=moment("2025-05-13"))
    assert asked_for(arxiv) == [("202505130000 TO 202505201200", 10)]
    fetch(path)
    assert asked_for(arxiv)[0] == ("202505010000 TO 202505122359", 0)
    assert len(listed(path)) == 36


def test_again_asks_for_all_and_brings_newer_versions(arxiv, path):
    fetch(path)
    asked_for(arxiv)
    arxiv.papers[30] = Paper(arxiv_id=IDS[30], version=2, published=arxiv.papers[30].published, title="Better")
    found = fetch(path, again=True)
    assert found.updated == (IDS[30],) and len(found.known) == 35 and len(asked_for(arxiv)) == 4


def test_other_sections_and_a_library_begun_anew_get_everything(arxiv, path):
    fetch(path)
    assert len(fetch(path, section="L").known) == 36 and len(listed(path, "L")) == 36
    path.unlink()
    assert len(fetch(path).new) == 36


def test_rows_of_imported_digests_stay_in_their_place(arxiv, path):
    with Library(path) as library:
        library.merge(Digest(rows=(Row(arxiv_id="2401.00001", title="T", section="K", form="table"),), source="a.md"))
    fetch(path)
    with Library(path) as library:
        rows = library.rows("K")
    assert [row.source for row in rows] == ["arXiv"] * 36 + ["a.md"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9, "fetches": []}', '{"format": 1, "fetches": [{}]}'])
def test_notes_that_cannot_be_read(path, text):
    path.with_name("fetches.json").write_text(text)
    with pytest.raises(BadInput, match=r"fetches.json, cannot be read .*Remove the file: no paper is lost by it"):
        Fetch("cat:cs.CV", "K", NOW, path=path)


def test_the_notes_of_other_queries_stay(arxiv, path):
    fetch(path, limit=10)
    fetch(path, section="L", limit=5)
    notes = json.loads(path.with_name("fetches.json").read_text())
    assert [one["section"] for one in notes["fetches"]] == ["K", "L"]
    assert notes["fetches"][0]["asked"] == [
        {
            "first": "2025-05-01T00:00Z",
            "last": "2025-05-20T12:00Z",
            "asked": "2025-05-20T12:00Z",
            "arrived": 10,
            "reached": "2025-05-15T23:00Z",
        }
    ]


def at(minute):
    return SINCE + minute * MINUTE


spans_of_minutes = st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda t: (t[0], t[0] + t[1]))


@given(st.lists(spans_of_minutes, max_size=6), spans_of_minutes)
def test_what_is_left_to_ask_is_the_range_without_what_has_arrived(taken, wanted):
    asked = [Asked(range=Range(first=at(a), last=at(b)), at=NOW) for a, b in taken]
    left = todo(asked, Range(first=at(wanted[0]), last=at(wanted[1])))

    def minutes(first, last):
        return set(range(first, last + 1))

    have = set().union(*(minutes(a, b) for a, b in taken))
    found = [minutes(int((r.first - SINCE) / MINUTE), int((r.last - SINCE) / MINUTE)) for r in left]
    assert set().union(*found) == minutes(*wanted) - have
    assert sum(map(len, found)) == len(set().union(*found)) and all(found)
    assert left == sorted(left, key=lambda r: r.last, reverse=True)
    # what has arrived is the same when neighbours are made one
    assert todo(settled(asked, NOW), Range(first=at(wanted[0]), last=at(wanted[1]))) == left


def test_what_was_asked_for_counts_in_full_for_a_day_and_then_but_for_its_last_week():
    one = Asked(range=Range(first=SINCE, last=NOW), at=NOW)
    young = Asked(range=Range(first=NOW - LAG, last=NOW), at=NOW)
    begun = Asked(range=Range(first=SINCE, last=NOW, start=3), at=NOW, open=True)
    assert settled([one], NOW + FRESH - MINUTE) == [one]
    assert settled([one], NOW + FRESH)[0].range.last == NOW - LAG
    assert settled([begun], NOW + FRESH) == [begun]
    assert settled([Asked(range=Range(first=NOW - LAG + MINUTE, last=NOW), at=NOW)], NOW + FRESH) == []
    assert settled([young], NOW + FRESH)[0].range == Range(first=NOW - LAG, last=NOW - LAG)


def test_an_account_of_several_imports_counts_a_paper_once(path):
    with Library(path) as library:
        rows = [Row(arxiv_id=f"2505.0000{i}", title="T") for i in (1, 2)]
        parts = [library.merge(Digest(rows=tuple(rows))), library.merge(Digest(rows=tuple(rows[1:])))]
    found = combine(parts)
    assert (found.rows, found.new, found.updated, found.known) == (3, ("2505.00001", "2505.00002"), (), ())
    assert combine([]).rows == 0

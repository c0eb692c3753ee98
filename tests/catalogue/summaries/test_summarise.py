"""Which papers are summarised, what is kept, and what a failing one costs the others."""

from __future__ import annotations

import pytest

from vitkit.catalogue.digests import Row
from vitkit.catalogue.summaries import NoSummary, summarise
from vitkit.catalogue.summaries.summarise import GIVE_UP_AFTER
from vitkit.errors import VitkitError


def rows(number, **fields):
    return [Row(arxiv_id=f"2505.{i:05}", title="T", abstract=f"Abstract {i}.", **fields) for i in range(number)]


def echo(row):
    return f"It is {row.abstract}"


def test_only_those_with_an_abstract_and_without_summary():
    first, second, third = rows(3)
    given = [first, Row(arxiv_id="1", title="T"), Row(arxiv_id="2", title="T", abstract="A", summary="own"), second]
    seen = []
    done = summarise([*given, third], echo, lambda *step: seen.append(step))
    assert [row.summary for row in done] == ["It is Abstract 0.", "", "own", "It is Abstract 1.", "It is Abstract 2."]
    assert [row.arxiv_id for row in done] == [row.arxiv_id for row in [*given, third]]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert summarise([], echo) == []


def test_again():
    assert [row.summary for row in summarise(rows(1, summary="own"), echo, again=True)] == ["It is Abstract 0."]


def test_each_is_kept_before_the_next_is_asked_for():
    log = []

    def writer(row):
        log.append(f"ask {row.arxiv_id}")
        if row.arxiv_id.endswith("2"):
            raise KeyboardInterrupt
        return " two\nlines\x1b of 7 "

    with pytest.raises(KeyboardInterrupt):
        summarise(rows(4), writer, keep=lambda row: log.append(row.summary))
    made = "two lines of 7 [not in the abstract: two, 7]"
    assert log == ["ask 2505.00000", made, "ask 2505.00001", made, "ask 2505.00002"]


def failing_for(*ids):
    def writer(row):
        if row.arxiv_id in ids:
            raise NoSummary("no luck")
        return "" if row.arxiv_id == "2505.00003" else "fine"

    return writer


def test_a_failing_paper_does_not_lose_the_others():
    failed, kept = [], []
    done = summarise(
        rows(5), failing_for("2505.00001"), keep=kept.append, failed=lambda row, why: failed.append((row.arxiv_id, why))
    )
    assert [row.summary for row in done] == ["fine", "", "fine", "", "fine"] and len(kept) == 3
    assert failed == [("2505.00001", "no luck"), ("2505.00003", "The summary is empty.")]
    with pytest.raises(NoSummary, match="no luck"):
        summarise(rows(5), failing_for("2505.00001"))


def test_it_gives_up_when_nothing_works():
    failed = []
    ids = [row.arxiv_id for row in rows(20)]
    with pytest.raises(VitkitError, match=rf"{GIVE_UP_AFTER} papers one after the other .* reason: no luck"):
        summarise(rows(20), failing_for(*ids[1:]), failed=lambda *what: failed.append(what))
    assert len(failed) == GIVE_UP_AFTER
    # every second one is a different matter
    assert len(summarise(rows(20), failing_for(*ids[::2]), failed=lambda *what: None)) == 20


def test_a_writer_that_cannot_go_on():
    def writer(row):
        raise VitkitError("the key is wrong")

    with pytest.raises(VitkitError, match="the key is wrong"):
        summarise(rows(2), writer, failed=lambda *what: pytest.fail("not for one paper"))

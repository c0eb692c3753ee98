"""The library and the catalogue as one list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitkit.catalogue import load
from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.joined import catalogue_index, papers, search
from vitkit.catalogue.library import Library

ROWS = (
    Row(arxiv_id="2504.02692", title="GPTAQ", version=9, abstract="Asymmetric calibration."),
    Row(arxiv_id="9901.00001", title="Sparse zebras", date="1999-01-02", abstract="Tokens for zebras."),
    Row(arxiv_id="hep-th/9901001", title="Of zebras and strings", date="1999-01-01"),
)


@pytest.fixture(scope="module")
def shelf():
    with Library(":memory:") as library, catalogue_index() as index:
        library.merge(Digest(rows=ROWS))
        known = papers(library)
        yield known, lambda query, limit=1000: [p.key for p in search(query, known, library, index, limit=limit)]


def test_each_paper_is_there_once_with_what_both_know(shelf):
    known, _ = shelf
    entries = load().values()
    assert set(known) == {e.id or e.name for e in entries} | {row.arxiv_id for row in ROWS}
    both = known["2504.02692"]
    assert both.kept and both.row.version == 9 and both.run == "vitkit show gptaq"
    # the library has neither date nor code of it
    assert both.row.date == both.entry.date and both.row.code == both.entry.code
    only = known["9901.00001"]
    assert only.entry is None and only.kept and only.run == "" and only.url.endswith("9901.00001")
    rtn = known["rtn"]
    assert rtn.url == "" and not rtn.kept and rtn.run == "vitkit show rtn"


def test_without_a_library_the_catalogue_is_all():
    known = papers()
    assert len(known) == len({e.id or e.name for e in load().values()}) and not any(p.kept for p in known.values())


def test_the_newest_come_first_and_those_without_a_date_last(shelf):
    dates = [paper.row.date for paper in shelf[0].values()]
    assert dates == sorted(dates, reverse=True) and dates[-1] == ""


@pytest.mark.parametrize(
    "query", ["2504.02692", "2504.02692v3", "arXiv:2504.02692v1", "gptaq", " GPTAQ ", "asymmetric calibration"]
)
def test_a_paper_is_found_by_id_name_and_words(shelf, query):
    assert shelf[1](query)[0] == "2504.02692"


def test_words_of_a_name_find_methods_of_papers_that_are_called_otherwise(shelf):
    assert shelf[1]("sinkhorn")[0] == "2504.16275" and shelf[1]("rtn")[0] == "rtn"


def test_an_old_id_with_a_slash_is_found(shelf):
    assert shelf[1]("hep-th/9901001v2")[0] == "hep-th/9901001"


def test_part_of_a_title_will_do_where_no_word_fits(shelf):
    assert shelf[1]("zebr") == ["9901.00001", "hep-th/9901001"]
    assert shelf[1]("zebras", limit=1) == ["9901.00001"]
    assert shelf[1]("qqqq") == shelf[1]("  ") == []


@given(st.text(max_size=30))
def test_any_text_is_a_query_and_finds_nothing_twice(shelf, query):
    found = shelf[1](query, limit=10)
    assert len(found) == len(set(found))

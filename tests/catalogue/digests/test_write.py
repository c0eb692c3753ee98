"""Both forms are read back as they were, look as they always do, and carry no stranger's markup."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from vitkit.catalogue.digests import FORMS, Row, read, read_file, write
from vitkit.catalogue.digests.row import tidy
from vitkit.errors import UnknownName

LETTERS = [*"|[]()*_`\\$<>&;#!~\"'\n\t aAbBx12/:-=.,{}^%@?é漢\u2028\u3000\x1b"]
PIECES = [
    "](",
    "![",
    "<details>",
    "</details>",
    "<summary>",
    "</p>",
    "&lt;",
    "&amp;",
    "&#124;",
    r"\|",
    r"\[",
    "**",
    "$|x|$",
]
PIECES += [
    "(Read more on ",
    "[arXiv](https://arxiv.org/abs/2401.00001)",
    "http://arxiv.org/abs/1111.11111",
    "Show",
    "None",
]
PIECES += ["<!--", "-->", "| --- |", "javascript:", " # ", "Title", "| Title | Date |"]
HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<img/src=x onerror=alert(1)>",
    "<a href='javascript:alert(1)'>",
    "<svg onload=alert(1)",
]
HOSTILE += [
    "<javascript:alert(1)>",
    "[x](javascript:alert(1))",
    "![x](https://evil.org/x.png)",
    "[x](\tdata:text/html,x)",
]
HOSTILE += ["<!--", "<?php", "<![CDATA[", "</p></details>", "<b and c>", "[x]: javascript:a"]


def texts(size=60):
    letters = st.one_of(st.sampled_from(LETTERS + PIECES), st.characters(exclude_categories=["Cs"]))
    return st.lists(letters, max_size=size).map("".join).map(tidy)


def known(**fields):
    ids = st.sampled_from(["0704.0001", "2505.08517", "hep-th/9901001", "cs.CV/0112017"])
    return st.builds(
        Row, arxiv_id=ids, version=st.integers(0, 12), title=texts().filter(bool), section=texts(8), **fields
    )


ADDRESSES = st.text("abcXYZ09/.-_~%?=&;#+", max_size=20).map(lambda end: f"https://example.org/{end}")
TABLE_ROWS = known(
    date=st.dates().map(str),
    abstract=texts(),
    comment=texts(),
    code=st.one_of(st.just(""), ADDRESSES),
    form=st.just("table"),
)
NAMES = texts(12).map(lambda name: tidy(name.replace(",", ""))).filter(bool)
DAILY_ROWS = known(summary=texts(), authors=st.lists(NAMES, max_size=4).map(tuple), form=st.just("daily"))


def without_place(rows):
    return sorted((replace(row, line=0, source="") for row in rows), key=repr)


@settings(max_examples=60)
@given(st.lists(TABLE_ROWS, max_size=3))
def test_a_table_is_read_back_as_it_was(rows):
    text = write(rows, "table")
    digest = read(text)
    assert not digest.unreadable
    assert without_place(digest.rows) == without_place(rows)
    assert write(digest.rows, "table") == text


@settings(max_examples=60)
@given(st.lists(DAILY_ROWS, max_size=3))
def test_a_day_is_read_back_as_it_was(rows):
    text = write(rows, "daily")
    digest = read(text)
    assert not digest.unreadable
    assert without_place(replace(row, date="") for row in digest.rows) == without_place(rows)
    assert write(digest.rows, "daily") == text


@pytest.mark.parametrize("form", ["table", "daily"])
@pytest.mark.parametrize(
    "title",
    ["**bold**", "__a__", "x " * 36 + "# y", "Link", "#", "|", "[", "a (Read more on b)", "\\", "&#91;", "<b>", "**"],
)
def test_titles_that_look_like_markup(title, form):
    (back,) = read(write([Row(arxiv_id="2503.20240", title=title, section="C # ##", form=form)], form)).rows
    assert (back.title, back.section) == (title, "C # ##")


@settings(max_examples=60)
@given(TABLE_ROWS, st.sampled_from(HOSTILE), st.sampled_from(["table", "daily"]))
def test_no_markup_of_strangers_is_rendered(row, hostile, form):
    row = replace(
        row,
        title=row.title + hostile + row.title,
        abstract=hostile + row.abstract + hostile,
        comment=row.comment + hostile,
        code=row.code or hostile,
        summary=hostile,
        authors=(hostile.replace(",", ""),),
        section=hostile,
    )
    markdown = MarkdownIt("commonmark").enable("table")
    # a renderer that trusts every address
    markdown.validateLink = lambda url: True
    tokens = markdown.parse(write([row], form))
    assert not [token for token in tokens if token.type == "html_block"]
    for token in (child for parent in tokens for child in parent.children or ()):
        assert token.type != "image"
        if token.type == "html_inline":
            assert re.fullmatch(r"</?(details|summary|p)>", token.content)
        if token.type == "link_open":
            assert token.attrs["href"].startswith(("http://", "https://"))
    if form == "table":
        # other readers of Markdown find the same cells
        assert sum(token.type == "td_open" for token in tokens) == 5


@pytest.mark.parametrize(("name", "form"), [("vision-transformers.md", "table"), ("daily-2025-03-27.md", "daily")])
def test_the_real_files_come_out_byte_for_byte(shared_data, name, form):
    path = shared_data.parent / "digests" / name
    if not path.is_file():
        pytest.skip("the two digest files are not here")
    written = write(read_file(path).rows, form)
    assert written.strip("\n") == path.read_bytes().decode().strip("\n")


def test_the_other_form_keeps_summaries_and_abstracts_apart():
    day = Row(
        arxiv_id="2503.19757", title="T", summary="s", authors=("a",), section="Papers for 2025-03-27", form="daily"
    )
    day = replace(day, date="2025-03-27")
    text = write([day], "table")
    assert "| <details><summary>Summary</summary><p>s</p></details> |  | None |" in text
    back = read(text).rows[0]
    assert (back.summary, back.abstract, back.date) == ("s", "", "2025-03-27")

    paper = Row(arxiv_id="2505.08517", version=2, title="T", abstract="a", date="2025-05-15", section="K", form="table")
    undated = replace(paper, date="")
    text = write([paper, undated], "daily")
    assert re.findall("## .*", text) == ["## Papers for 2025-05-15", "## Papers"]
    back = read(text).rows[0]
    assert (back.summary, back.abstract, back.date, back.version) == ("", "a", "2025-05-15", 2)


def test_titles_of_a_day_are_wrapped_and_long_comments_folded():
    title = "Unconditional Priors Matter! Improving Conditional Generation of Fine-Tuned Diffusion Models"
    row = Row(arxiv_id="2503.20240", title=title, comment="12 pages and 4 figures", form="daily")
    assert "| Unconditional Priors Matter! Improving Conditional Generation of\n  Fine-Tuned " in write([row], "daily")
    assert "<details><summary>12 pa...</summary><p>12 pages and 4 figures</p></details>" in write([row], "table")
    assert "| Accepted by AAAI2025 |" in write([replace(row, comment="Accepted by AAAI2025")], "table")


def test_strange_addresses_stay_links():
    text = write([Row(arxiv_id="2503.20240", title="T", code="https://x.org/a)b|c https://y.org/(d)")], "table")
    assert "[Code Link](https://x.org/a%29b%7Cc) [Code Link](https://y.org/(d))" in text
    assert read(text).rows[0].code == "https://x.org/a%29b%7Cc https://y.org/(d)"


def test_json_has_every_field():
    row = Row(arxiv_id="2503.20240", version=2, title="Ü", authors=("a", "b"), line=3)
    (found,) = json.loads(write([row], "json"))
    assert found["url"] == "https://arxiv.org/abs/2503.20240v2" and "Ü" in write([row], "json")
    assert Row(**{**{k: v for k, v in found.items() if k != "url"}, "authors": tuple(found["authors"])}) == row


def test_csv_runs_nothing_in_a_spreadsheet():
    row = Row(
        arxiv_id="2503.20240", version=2, title="=cmd|' /C calc'!A0", summary="-1", comment='a, "b"', authors=("@x",)
    )
    header, cells = csv.reader(io.StringIO(write([row], "csv")))
    named = dict(zip(header, cells))
    assert named["title"] == "'=cmd|' /C calc'!A0" and named["summary"] == "'-1" and named["authors"] == "'@x"
    assert named["comment"] == 'a, "b"' and named["url"].endswith("2503.20240v2")
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


def test_bibtex_escapes_what_tex_would_obey_and_has_each_paper_once():
    old = Row(arxiv_id="2503.20240", version=1, title="old")
    row = Row(
        arxiv_id="2503.20240",
        version=2,
        title=r"50% of A&B: \input{x $x_1^2$ ~#",
        authors=("Ada Byron", "Lovelace, A.", "Rock and Roll"),
        comment="CVPR",
    )
    text = write([old, row, replace(row, arxiv_id="hep-th/9901001", title="T")], "bibtex")
    assert text.count("@misc{") == 2 and "old" not in text
    assert (
        r"{50\% of A\&B: \textbackslash{}input\textbraceleft{}x \$x\_1\textasciicircum{}2\$ \textasciitilde{}\#}"
        in text
    )
    assert "author = {Ada Byron and {Lovelace, A.} and {Rock and Roll}}" in text
    assert "@misc{arxiv2503.20240,\n" in text and "year = {2025}" in text
    assert "@misc{arxivhep-th-9901001,\n" in text and "year = {1999}" in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_make_a_valid_file(form):
    text = write([], form)
    assert text == {"json": "[]\n", "csv": text, "table": "", "daily": "", "bibtex": ""}[form]
    assert form != "csv" or text.startswith("arxiv_id,version,title")


def test_an_unknown_form_suggests_one():
    with pytest.raises(UnknownName, match="Did you mean 'bibtex'"):
        write([], "bibtx")

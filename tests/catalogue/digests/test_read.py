"""Every oddity that digests have, and files that are none."""

from __future__ import annotations

from importlib import import_module

import pytest

from vitkit.catalogue import load
from vitkit.catalogue.digests import Row, read, read_file
from vitkit.catalogue.digests.read import LIMIT_BYTES, plain
from vitkit.errors import BadInput

TABLE = (
    "## Vision Transformers\n\n| **Title** | **Date** | **Abstract** | **Comment** | **CodeRepository** |\n"
    "| --- | --- | --- | --- | --- |\n"
)
DAILY = "\n\n## Papers for 2025-03-27\n\n| Title | Authors | Summary |\n|-------|---------|---------|\n"
LINKS = "(Read more on [arXiv](https://arxiv.org/abs/2503.19757) or [HuggingFace](https://huggingface.co/papers/2503.19757))"
FOLDED = "<details><summary>Show</summary><p>text</p></details>"


def row(
    title="T", link="http://arxiv.org/abs/2505.08517v2", date="2025-05-15", abstract=FOLDED, comment="", code="None"
):
    return f"| **[{title}]({link})** | {date} | {abstract} | {comment} | {code} |\n"


def only(text) -> Row:
    digest = read(text)
    assert not digest.unreadable and len(digest.rows) == 1, digest
    return digest.rows[0]


@pytest.fixture
def digests(shared_data):
    folder = shared_data.parent / "digests"
    if not folder.is_dir():
        pytest.skip("the two digest files are not here")
    return folder


def test_both_real_files_are_read_whole(digests):
    table = read_file(digests / "vision-transformers.md")
    daily = read_file(digests / "daily-2025-03-27.md")
    assert (len(table.rows), len(daily.rows)) == (200, 21)
    assert not (table.unreadable or daily.unreadable or table.notes or daily.notes)
    assert table.sections == ("Vision Transformers",) and daily.sections == ("Papers for 2025-03-27",)
    ids = {r.arxiv_id for r in table.rows + daily.rows}
    assert len(ids) == 219 and ids <= {entry.id for entry in load().values()}
    assert sorted(r.versioned_id for r in table.rows if r.arxiv_id == "2504.02692") == ["2504.02692v2", "2504.02692v3"]
    assert all(r.title and r.abstract and r.date and r.version for r in table.rows)
    assert all(r.title and r.summary and r.authors and r.date == "2025-03-27" for r in daily.rows)
    assert "<" not in "".join(r.comment + r.code for r in table.rows)
    assert sum(bool(r.code) for r in table.rows) == sum(
        "Code Link" in x for x in (digests / "vision-transformers.md").read_text(encoding="utf-8").split("\n")
    )
    # the line numbers lead to the rows
    lines = (digests / "daily-2025-03-27.md").read_text(encoding="utf-8").split("\n")
    for r in daily.rows:
        assert lines[r.line - 1].startswith(f"| {r.title.split()[0]}")


def test_a_row_of_a_keyword():
    found = only(
        TABLE
        + row(
            title="Charm: The Missing Piece",
            comment="<details><summary>Accep...</summary><p>Accepted at CVPR 2025, 9 pages</p></details>",
            code="[Code Link](https://github.com/FBehrad/Charm)",
        )
    )
    assert found == Row(
        arxiv_id="2505.08517",
        version=2,
        title="Charm: The Missing Piece",
        date="2025-05-15",
        abstract="text",
        comment="Accepted at CVPR 2025, 9 pages",
        code="https://github.com/FBehrad/Charm",
        section="Vision Transformers",
        form="table",
        line=5,
    )
    assert found.url == "https://arxiv.org/abs/2505.08517v2"


def test_a_row_of_a_day_with_its_title_over_two_lines():
    digest = read(
        DAILY + f"| Dita: Scaling\n  Policy {LINKS}| TTT, robot-haonan | It is **so**. |\n| B {LINKS}| x | y |\n"
    )
    assert [r.line for r in digest.rows] == [7, 9]
    assert digest.rows[0] == Row(
        arxiv_id="2503.19757",
        title="Dita: Scaling Policy",
        date="2025-03-27",
        authors=("TTT", "robot-haonan"),
        summary="It is **so**.",
        section="Papers for 2025-03-27",
        form="daily",
        line=7,
    )


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"title": "On $|x|$ and |y|"}, {"title": "On $|x|$ and |y|"}),
        ({"title": "A | B | C", "comment": "x | y"}, {"title": "A | B | C", "comment": "x | y"}),
        ({"title": r"A \| B"}, {"title": "A | B"}),
        ({"title": "[CLS] is [x](y)"}, {"title": "[CLS] is [x](y)"}),
        ({"title": "A ] B"}, {"title": "A ] B"}),
        ({"title": r"\[CLS\] of x\_y"}, {"title": "[CLS] of x_y"}),
        ({"title": "H&E &amp; R&D"}, {"title": "H&E & R&D"}),
        ({"title": "PDF"}, {"title": "PDF"}),
        ({"abstract": "costs $5 | and $6"}, {"abstract": "costs $5 | and $6"}),
        ({"abstract": "so $p(x|y)$ it is"}, {"abstract": "so $p(x|y)$ it is"}),
        (
            {"abstract": FOLDED.replace("text", "a | b <details><summary>More</summary>c | d</details>")},
            {"abstract": "a | b More c | d"},
        ),
        ({"abstract": "<details open>\n<summary>Show</summary>\n\none\n\ntwo\n</details>"}, {"abstract": "one two"}),
        (
            {"abstract": r"of 2\% and $\text{SaPE}^2$ at $CNN<ViT<Hybrid$."},
            {"abstract": r"of 2\% and $\text{SaPE}^2$ at $CNN<ViT<Hybrid$."},
        ),
        ({"abstract": "p<0.05, a<b and c>d"}, {"abstract": "p<0.05, a<b and c>d"}),
        ({"comment": "<details><summary>Accepted</summary><p>9 pages</p></details>"}, {"comment": "Accepted 9 pages"}),
        ({"code": ""}, {"code": ""}),
        ({"code": "https://x.org/a_(b)"}, {"code": "https://x.org/a_(b)"}),
        ({"code": "[Code](https://x.org/a_(b)) [Page](https://y.org)"}, {"code": "https://x.org/a_(b) https://y.org"}),
        ({"code": "[Code](javascript:alert(1))"}, {"code": "[Code](javascript:alert(1))"}),
        ({"code": "coming soon"}, {"code": "coming soon"}),
        ({"date": "3 May 2025"}, {"date": "2025-05-03"}),
        ({"date": "2025-05-03T17:59:01Z"}, {"date": "2025-05-03"}),
        ({"date": ""}, {"date": ""}),
        ({"link": "https://www.arxiv.org/pdf/2505.08517v12.pdf"}, {"arxiv_id": "2505.08517", "version": 12}),
        ({"link": "https://arxiv.org/abs/hep-th/9901001"}, {"arxiv_id": "hep-th/9901001", "version": 0}),
    ],
)
def test_odd_cells(cells, expected):
    found = only(TABLE + row(**cells))
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.arxiv_id and (found.abstract == "text" or "abstract" in cells)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (f"A | B {LINKS}| x, y | s", ("A | B", ("x", "y"), "s")),
        (f"A {LINKS}| x | costs $5 | and $6", ("A", ("x",), "costs $5 | and $6")),
        (f"A {LINKS}\n| x | s", ("A", ("x",), "s")),
        (f"A {LINKS}| x | s\nand\nmore", ("A", ("x",), "s and more")),
        (f"**A** {LINKS}|  | ", ("A", (), "")),
        (
            "A [arXiv](https://arxiv.org/abs/2503.19757) [pdf](https://arxiv.org/pdf/2503.19757)| x | s",
            ("A", ("x",), "s"),
        ),
        ("A (arXiv:2503.19757)| x | s", ("A", ("x",), "s")),
    ],
)
def test_odd_rows_of_a_day(cells, expected):
    found = only(DAILY + f"| {cells} |\n")
    assert (found.title, found.authors, found.summary) == expected
    assert found.arxiv_id == "2503.19757"


def test_columns_go_by_their_names():
    header, cells = (
        "Date | Title | Venue\n---|---|---\n",
        "2025-01-02 | [T](https://arxiv.org/abs/2501.00001v1) | CVPR\n",
    )
    text = f"# K\n{header}{cells}\nfoot | note\n"
    digest = read(text, "a.md")
    assert [(r.title, r.date, r.line, r.source) for r in digest.rows] == [("T", "2025-01-02", 4, "a.md")]
    assert [(n.line, n.reason) for n in digest.notes] == [(2, "not kept of this table: column 'Venue'")]
    assert not digest.unreadable


def test_cells_may_be_missing_at_the_end_of_a_row():
    found = only(TABLE + "| **[T](http://arxiv.org/abs/2505.08517v2)** | 2025-05-15 | so |\n")
    assert (found.abstract, found.comment, found.code) == ("so", "", "")


def test_a_date_that_is_none_is_noted():
    digest = read(TABLE + row(date="soon"))
    assert digest.rows[0].date == ""
    assert [(n.line, "'soon'" in n.reason) for n in digest.notes] == [(5, True)]


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends(end):
    assert only((TABLE + row()).replace("\n", end)).line == 5


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (row(), 1, "no header above"),
        (TABLE + row(link="https://example.org"), 5, "no arXiv address"),
        (TABLE + row(title=" "), 5, "no title"),
        (
            TABLE + "| **[T](http://arxiv.org/abs/2505.08517v2)** | 2025-05-15 | <details><summary>Show</sum",
            5,
            "3rd cell of 5",
        ),
        (TABLE + row(comment="a | b", code="x | y | z"), 5, "cells where the header has 5"),
        (TABLE + f"| {'x ' * 60_000}|\n", 5, "longer than 100,000 characters"),
        ("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n", 1, "a table of 2 rows without a column Title"),
        ("<table>\n<tr><td>T</td></tr>\n</table>\n", 1, "an HTML table"),
    ],
)
def test_what_cannot_be_read_is_told_and_nothing_else_suffers(text, line, reason):
    # what follows is read, whatever went before
    digest = read(text + "\n" + DAILY + f"| A {LINKS}| x | s |\n", "a.md")
    assert [r.title for r in digest.rows] == ["A"]
    assert len(digest.unreadable) == 1
    lost = digest.unreadable[0]
    assert (lost.source, lost.line) == ("a.md", line) and reason in lost.reason
    assert lost.text.splitlines()[0] == text.splitlines()[line - 1]


@pytest.mark.parametrize("end", ["", "\n", "\n\n## Next\n"])
def test_a_table_that_was_cut_off(end):
    text = TABLE + row() + row(link="http://arxiv.org/abs/2505.00001v1").rstrip()[:-4]
    digest = read(text + end)
    assert [r.arxiv_id for r in digest.rows] == ["2505.08517"]
    assert [u.line for u in digest.unreadable] == [6] and "without a | at the end" in digest.unreadable[0].reason


def test_a_row_that_was_cut_off_does_not_swallow_the_next():
    digest = read(TABLE + row().rstrip()[:80] + "\n" + row(title="B") + DAILY + f"| A\n  B {LINKS}| x | s |\n")
    assert [(r.title, r.line) for r in digest.rows] == [("B", 6), ("A B", 13)]
    assert [u.line for u in digest.unreadable] == [5]


def test_no_row_is_lost_without_a_word():
    # of every table line there is an account: a row, or a reason
    lines = [row(), "| x | y |\n", row(title="B"), "| [T](http://example.org) | | | | |\n", "||||||||||\n"]
    digest = read(TABLE + "".join(lines))
    told = [r.line for r in digest.rows] + [u.line for u in digest.unreadable]
    assert sorted(told) == [5, 6, 7, 8, 9]


def test_hostile_html_becomes_text():
    found = only(
        TABLE + row(title="<b>X</b><script>alert(1)</script>", abstract="<img src=x onerror=alert(1)>a<iframe src='y'>")
    )
    assert (found.title, found.abstract) == ("X alert(1)", "a")
    assert plain("&lt;script&gt; \x1b[31m") == "<script> [31m"
    # nesting builds no tag that would go unnoticed: it is text from then on
    assert plain("<scr<b>ipt>") == "<script>"


def test_many_unreadable_rows_are_counted(monkeypatch):
    monkeypatch.setattr(import_module("vitkit.catalogue.digests.read"), "MOST_UNREADABLE", 100)
    digest = read(TABLE + row() + "| x |\n" * 150)
    assert len(digest.rows) == 1 and len(digest.unreadable) == 101
    assert "50 more rows" in digest.unreadable[-1].reason
    with pytest.raises(BadInput, match=r"no digest: of more than 100 rows .* line 5"):
        read(TABLE + "| x |\n" * 150)


@pytest.mark.parametrize(
    "fragment", ["<", "<!--", "<a b='", "<details>", "$", "`", "[", "](", "](http://a", r"\|", "| ", " "]
)
def test_hostile_repetition_takes_no_longer_than_its_length(fragment):
    text = DAILY + f"| {fragment * (60_000 // len(fragment))} A {LINKS}| x | s |\n"
    digest = read(text)
    assert len(digest.rows) + len(digest.unreadable) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "a.md").write_bytes((TABLE + row(title="Über ω")).encode(encoding))
    found = read_file(tmp_path / "a.md")
    assert [r.title for r in found.rows] == ["Über ω"] and found.rows[0].source == str(tmp_path / "a.md")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no digest"),
        (b"# Notes\n\nNothing here.\n", r"holds no digest.*\| Title \| Authors"),
        (b"\n<!DOCTYPE html>\n<html><body>| Title |</body></html>", "is an HTML page.*Raw"),
        (b"<!-- saved -->\n<HTML lang='en'>", "is an HTML page"),
        ((TABLE + row(title="Über")).encode("latin-1"), r"not valid UTF-8: byte 136 \(0xDC, line 5\).*iconv"),
        ((TABLE + row()).encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (b"%PDF-1.7 x", "no text file"),
        (b"\xff\xfea", "not valid UTF-16"),
    ],
)
def test_files_that_are_no_digests(tmp_path, content, message):
    path = tmp_path / "a.md"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=f"(?s)a.md.*{message}"):
        read_file(path)


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(BadInput, match="There is no file"):
        read_file(tmp_path / "none.md")
    with pytest.raises(BadInput, match="is a folder"):
        read_file(tmp_path)


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "huge.md"
    with path.open("wb") as stream:
        stream.truncate(LIMIT_BYTES + 1)
    with pytest.raises(BadInput, match="huge.md is larger than 64 MiB"):
        read_file(path)

"""The library: merging, older versions, whole imports or none, several processes, search."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitkit.catalogue.digests import Digest, Row, Unreadable, read_file, write
from vitkit.catalogue.library import SCHEMA, Library, Section, library_path
from vitkit.errors import BadInput, UnknownName, VitkitError


def paper(number=1, version=1, **fields):
    given_fields = {
        "title": f"Paper {number}",
        "section": "K",
        "form": "table",
        "date": f"2025-05-{number:02}",
        **fields,
    }
    return Row(arxiv_id=f"2505.{number:05}", version=version, **given_fields)


def digest(*rows, source="a.md"):
    return Digest(rows=rows, source=source)


@pytest.fixture
def library(tmp_path):
    with Library(tmp_path / "papers.db") as opened:
        yield opened


@pytest.fixture
def digests(shared_data):
    folder = shared_data.parent / "digests"
    if not folder.is_dir():
        pytest.skip("the two digest files are not here")
    return [read_file(folder / name) for name in ("vision-transformers.md", "daily-2025-03-27.md")]


def test_the_real_files_go_in_whole_and_come_out_the_same(library, digests):
    merged = library.merge(*digests)
    assert (merged.rows, len(merged.new)) == (221, 219)
    assert not (merged.updated or merged.known or merged.repeated or merged.unreadable)
    for each, form in zip(digests, ("table", "daily")):
        assert write(library.rows(each.sections[0]), form) == write(each.rows, form)
    assert len(library.papers()) == 219
    again = library.merge(*digests)
    assert len(again.known) == 219 and not (again.new or again.updated)
    assert [row.versioned_id for row in library.versions("2504.02692")] == ["2504.02692v3", "2504.02692v2"]
    assert library.find("2504.02692").title.startswith("GPTAQ")
    assert library.versions("2504.02692")[1].title.startswith("GPTQv2")
    assert library.search("GPTAQ asymmetric calibration")[0].row.arxiv_id == "2504.02692"


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 2, 1), (2, 3, 1)])
def test_the_newest_version_is_kept_whatever_came_first(library, order):
    rows = {
        1: paper(version=1, title="old", comment="draft", code="https://x.org"),
        2: paper(version=2, title="new", comment="CVPR"),
        3: paper(version=0, title="unversioned", summary="s", authors=("a", "b, c"), form="daily", section="D"),
    }
    for number in order:
        library.merge(digest(rows[number]))
    found = library.find("2505.00001")
    assert (found.version, found.title, found.comment) == (2, "new", "CVPR")
    # what the newest lacks comes from the others
    assert (found.code, found.summary, found.authors) == ("https://x.org", "s", ("a", "b, c"))
    assert [row.title for row in library.versions("2505.00001")] == ["new", "old", "unversioned"]


def test_fates_are_told_per_paper(library):
    library.merge(digest(paper(1), paper(2, code="https://x.org"), paper(3)))
    merged = library.merge(
        Digest(
            rows=(
                paper(1, version=2),
                paper(2),
                paper(3, code="https://y.org"),
                paper(4),
                paper(4, version=2),
                paper(4),
            ),
            unreadable=(Unreadable(source="b.md", line=3, reason="torn"),),
        )
    )
    assert (merged.rows, merged.new) == (6, ("2505.00004",))
    assert (merged.updated, merged.known) == (("2505.00001", "2505.00003"), ("2505.00002",))
    assert [row.versioned_id for row in merged.repeated] == ["2505.00004v1"]
    assert [u.line for u in merged.unreadable] == [3]
    # an empty cell of a later digest takes nothing away
    assert library.find("2505.00002").code == "https://x.org"


def test_an_older_version_changes_nothing_but_is_remembered(library):
    library.merge(digest(paper(version=3, comment="c", code="d", abstract="a")))
    before = library.find("2505.00001")
    assert library.merge(digest(paper(version=1, title="old", comment="x", code="y", abstract="z"))).known == (
        "2505.00001",
    )
    assert library.find("2505.00001") == before and len(library.versions("2505.00001")) == 2


def test_a_section_has_the_order_of_its_last_import(library):
    library.merge(digest(paper(2), paper(1)))
    library.merge(digest(paper(4), paper(2), paper(3), source="b.md"))
    assert [row.title for row in library.rows("k")] == ["Paper 4", "Paper 2", "Paper 3", "Paper 1"]
    assert [row.source for row in library.rows("k")] == ["b.md"] * 3 + ["a.md"]
    assert library.sections() == [Section(name="K", form="table", rows=4)]


def test_rows_are_filled_in_only_where_their_form_is_silent(library):
    library.merge(
        digest(
            paper(comment="", abstract="a"),
            paper(version=2, comment="CVPR", abstract="b"),
            paper(version=0, form="daily", section="D", date="", summary="s", authors=("x",)),
        )
    )
    first, second, day = library.rows()
    assert (first.comment, first.abstract, first.summary, first.authors) == ("", "a", "s", ("x",))
    assert (second.comment, second.version) == ("CVPR", 2)
    assert (day.comment, day.abstract, day.date, day.form) == ("CVPR", "b", "2025-05-01", "daily")


def test_papers_from_no_digest_stand_under_no_heading(library):
    library.merge(
        digest(paper(1)), Digest(rows=(paper(2, form="", section=""), paper(1, version=2, form="", section="")))
    )
    assert [(row.title, row.version, row.section) for row in library.rows()] == [
        ("Paper 1", 1, "K"),
        ("Paper 2", 1, ""),
    ]
    assert [(row.title, row.version) for row in library.papers()] == [("Paper 2", 1), ("Paper 1", 2)]
    assert [row.title for row in library.papers(section="K")] == ["Paper 1"]


def test_set_summary_changes_nothing_else(library):
    library.merge(
        digest(paper(1, abstract="a", authors=("x",)), paper(1, version=2, abstract="b"), paper(2)),
        digest(paper(1, version=0, form="daily", section="D", summary="own"), source="b.md"),
    )
    paper_before, rows_before, other = library.find("2505.00001"), library.rows(), library.find("2505.00002")
    library.set_summary("2505.00001", "made of\nsieves")
    assert library.find("2505.00001") == replace(paper_before, summary="made of sieves")
    assert [row.summary for row in library.versions("2505.00001")] == ["made of sieves", "", "own"]
    # no listing more or less; a digest's own words stay in its rows
    by_version = {row.version: row.summary for row in library.rows() if row.arxiv_id == "2505.00001"}
    assert by_version == {2: "made of sieves", 1: "made of sieves", 0: "own"}
    assert [replace(row, summary="") for row in library.rows()] == [replace(row, summary="") for row in rows_before]
    assert library.find("2505.00002") == other
    assert [hit.row.arxiv_id for hit in library.search("sieve")] == ["2505.00001"]
    # the same digest again, and a newer version, leave it
    library.merge(digest(paper(1, version=2, abstract="b")), digest(paper(1, version=3, abstract="c")))
    assert (library.find("2505.00001").summary, library.find("2505.00001").version) == ("made of sieves", 3)
    with pytest.raises(UnknownName, match="No paper of the library is called '2505.00009'"):
        library.set_summary("2505.00009", "s")


def test_since_and_unknown_sections(library):
    library.merge(digest(paper(1), paper(2), paper(3, date="")))
    assert [row.title for row in library.rows(since="2025-05-02")] == ["Paper 2"]
    assert [row.title for row in library.papers(since="2025-05-02")] == ["Paper 2"]
    with pytest.raises(UnknownName, match="Did you mean 'K'"):
        library.rows("Kk")


def test_search_ranks_titles_first_and_keeps_in_step(library):
    library.merge(
        digest(
            paper(1, title="Something else", abstract="about token merging, at length"),
            paper(2, title="Token merging", abstract="quickly"),
            paper(3, title="Merging of a token", summary="state spaces"),
        )
    )
    hits = library.search("token merging")
    assert [hit.row.title for hit in hits][-1] == "Something else" and len(hits) == 3
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert len(library.search("tokens MERGED", limit=2)) == 2
    assert {h.row.title for h in library.search('"token merging"')} == {"Something else", "Token merging"}
    # no paper has both, so either will do
    assert {h.row.title for h in library.search("quickly spaces")} == {"Token merging", "Merging of a token"}
    library.merge(digest(paper(2, version=2, title="Pruning", abstract="slowly")))
    assert [h.row.title for h in library.search("slowly pruning")] == ["Pruning"]
    assert not [h for h in library.search("quickly") if h.row.arxiv_id == "2505.00002"]
    library._db.execute("INSERT INTO fts (fts, rank) VALUES ('integrity-check', 1)")


@given(
    st.text(max_size=20)
    | st.sampled_from(['"', 'a"', "AND", "NOT x", "title:x", "a*", "(", "\0", "NEAR(a b)", "-", "\ud800x"])
)
def test_every_text_is_a_query(query):
    with Library(":memory:") as library:
        library.merge(digest(paper(1, title="x")))
        assert isinstance(library.search(query), list)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_import_that_stops_leaves_the_library_as_it_was(library, error):
    library.merge(digest(paper(1)))

    def stop(done, total):
        if done == 2:
            raise error

    with pytest.raises(error):
        library.merge(digest(paper(1, version=2), paper(2), paper(3)), progress=stop)
    assert [row.versioned_id for row in library.rows()] == ["2505.00001v1"]
    assert library.merge(digest(paper(2))).new == ("2505.00002",)


START = """
import os, signal, sys
from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.library import Library
name, kill = sys.argv[2], int(sys.argv[3])
def progress(done, total):
    if done == kill:
        os.kill(os.getpid(), signal.SIGKILL)
rows = [Row(arxiv_id=f"2505.{i:05}", version=1, title=f"{name} {i}", form="table", section=name) for i in range(300)]
with Library(sys.argv[1]) as library:
    library.merge(Digest(rows=tuple(rows), source=name), progress=progress)
"""


def start(path, name, kill=0):
    return subprocess.Popen([sys.executable, "-c", START, str(path), name, str(kill)], stderr=subprocess.PIPE)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_import_leaves_the_library_as_it_was(tmp_path):
    path = tmp_path / "papers.db"
    with Library(path) as library:
        library.merge(digest(paper(1)))
    assert start(path, "killed", kill=250).wait() == -signal.SIGKILL
    with Library(path) as library:
        assert [row.title for row in library.rows()] == ["Paper 1"]
        assert library.sections() == [Section(name="K", form="table", rows=1)]
        assert library.merge(digest(paper(2))).new == ("2505.00002",)


def test_two_processes_at_once_both_succeed(tmp_path):
    path = tmp_path / "new folder" / "papers.db"
    running = [start(path, name) for name in ("one", "two", "three")]
    for process in running:
        assert process.wait() == 0, process.stderr.read().decode()
        process.stderr.close()
    with Library(path) as library:
        assert {(s.name, s.rows) for s in library.sections()} == {("one", 300), ("two", 300), ("three", 300)}
        assert len(library.papers()) == 300


def test_a_newer_library_is_refused(tmp_path):
    path = tmp_path / "papers.db"
    Library(path).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    db.close()
    with pytest.raises(BadInput, match=r"papers.db was written by a newer vitkit .*pip install -U"):
        Library(path)


def test_the_database_of_another_program_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "papers.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE theirs (x)")
    db.close()
    with pytest.raises(BadInput, match="database of another program"):
        Library(path)
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    db.close()


def test_a_damaged_library_is_named(tmp_path):
    path = tmp_path / "papers.db"
    path.write_bytes(b"no database at all, but long enough to be read as one" * 50)
    with pytest.raises(BadInput, match=r"papers.db is damaged: .*Move it away and import"):
        Library(path)
    path.unlink()
    with Library(path) as library:
        library.merge(digest(*(paper(i, abstract="x" * 3000) for i in range(1, 20))))
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)
    with pytest.raises(BadInput, match="is damaged"), Library(path) as library:
        library.rows()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VitkitError, match="VITKIT_HOME"):
        Library(tmp_path / "file" / "papers.db")
    with pytest.raises(VitkitError, match=r"cannot be used: unable to open .*VITKIT_HOME"):
        Library(tmp_path)


def test_where_the_library_is(monkeypatch, tmp_path):
    monkeypatch.setenv("VITKIT_HOME", str(tmp_path))
    assert library_path() == tmp_path / "papers.db"
    monkeypatch.delenv("VITKIT_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, variable, value, expected in (
        ("linux", "XDG_DATA_HOME", str(tmp_path / "data"), tmp_path / "data"),
        ("linux", "XDG_DATA_HOME", "relative", tmp_path / ".local" / "share"),
        ("linux", "XDG_DATA_HOME", "", tmp_path / ".local" / "share"),
        ("darwin", "XDG_DATA_HOME", "", tmp_path / "Library" / "Application Support"),
        ("win32", "LOCALAPPDATA", str(tmp_path / "Local"), tmp_path / "Local"),
        ("win32", "LOCALAPPDATA", "", tmp_path / "AppData" / "Local"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv(variable, value)
        assert library_path() == expected / "vitkit" / "papers.db"


def test_nothing_heavy_is_imported():
    modules = "vitkit.catalogue.library, vitkit.cli.papers_import, vitkit.cli.papers_export"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_shipped_catalogue_is_not_touched(library):
    from vitkit.catalogue import reader

    before = reader._OWN_TABLE.read_bytes()
    library.merge(digest(replace(paper(1), arxiv_id="2504.02692", version=9)))
    assert reader._OWN_TABLE.read_bytes() == before

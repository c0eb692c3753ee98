"""What `vitkit papers import` prints, and how it ends."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from vitkit.catalogue.library import Library
from vitkit.cli.papers_import import papers_import
from vitkit.errors import BadInput

DAY = "## Papers for 2025-03-27\n\n| Title | Authors | Summary |\n|-------|---------|---------|\n"
GOOD = "| GPTAQ [arXiv](https://arxiv.org/abs/2504.02692v3) | a | s |\n"
OWN = "| My own [arXiv](https://arxiv.org/abs/9912.00001) | a | s |\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_HOME", str(tmp_path / "home"))
    app = typer.Typer()
    app.command()(papers_import)

    def start(*arguments):
        return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "150"})

    return start


def test_counts_and_the_catalogue(run, tmp_path):
    path = tmp_path / "a.md"
    path.write_text(DAY + GOOD + OWN)
    done = run(path)
    assert done.exit_code == 0 and done.stderr == ""
    assert "2 rows of 2 papers: 2 new, 0 updated, 0 already known. All rows were read." in done.stdout
    assert "1 of the papers are in the catalogue" in done.stdout and "not read" not in done.stdout
    assert "0 new, 0 updated, 2 already known" in run(path).stdout
    path.write_text(DAY + GOOD.replace("v3", "v4"))
    assert "0 new, 1 updated, 0 already known" in run(path).stdout


def test_what_is_new_can_be_summarised_at_once(run, tmp_path, monkeypatch):
    from vitkit.catalogue.summaries import extractive

    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr(extractive, "write", lambda row: f"On {row.title}.")
    path = tmp_path / "a.md"
    row = "| **[One](http://arxiv.org/abs/9912.00001v1)** | 2025-01-01 | <details>Words.</details> | | |\n"
    head = "| **Title** | **Date** | **Abstract** | **Comment** | **CodeRepository** |\n"
    path.write_text(f"## Mine\n\n{head}| --- | --- | --- | --- | --- |\n{row}")
    done = run(path, "--summarise")
    assert done.exit_code == 0 and "1 summaries made." in done.stderr
    with Library() as library:
        assert library.find("9912.00001").summary == "On One."
    assert "0 summaries made." in run(path, "--summarise").stderr


def test_unreadable_rows_and_files_are_listed_and_the_rest_goes_in(run, tmp_path):
    path, page = tmp_path / "a.md", tmp_path / "page.md"
    path.write_text(DAY + GOOD + "| [red]no link[/red] | a | s |\n" + OWN + GOOD)
    page.write_text("<html></html>")
    done = run(path, page)
    assert done.exit_code == 0 and "3 rows of 2 papers" in done.stdout and "2 could not be read" in done.stdout
    text = " ".join(done.stdout.split())
    assert f"{path}:6 no arXiv address beside the title" in text
    assert "is an HTML page" in text
    assert f"{path}:8 2504.02692v3 is listed a second time" in text


def test_json(run, tmp_path):
    path = tmp_path / "a.md"
    path.write_text(DAY + GOOD + "| T | a | s |\n")
    found = json.loads(run(path, "--json").stdout)
    assert found["rows"] == 1 and found["new"] == ["2504.02692"] and found["in_catalogue"] == {"2504.02692": "gptaq"}
    reason = "no arXiv address beside the title"
    assert found["unreadable"] == [{"source": str(path), "line": 6, "reason": reason, "text": "| T | a | s |"}]
    assert found["updated"] == found["known"] == found["notes"] == []


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (["<html>"], "a0.md is an HTML page"),
        ([DAY + "| T | a | s |\n"], r"None of the 1 rows of .*a0.md could be read.*line 5: no arXiv"),
        (["x", "y"], r"None of the 2 files could be read, to begin with .*a0.md holds no digest"),
    ],
)
def test_it_is_an_error_if_nothing_could_be_read(run, tmp_path, contents, message):
    paths = []
    for i, content in enumerate(contents):
        paths.append(tmp_path / f"a{i}.md")
        paths[-1].write_text(content)
    done = run(*paths)
    assert done.exit_code != 0
    with pytest.raises(BadInput, match=message):
        raise done.exception
    assert not (tmp_path / "home").exists()


def test_a_long_list_is_cut(run, tmp_path):
    path = tmp_path / "a.md"
    path.write_text(DAY + GOOD + "| T | a | s |\n" * 60)
    assert "… and 10 more; --json lists them all." in run(path).stdout


def test_it_goes_where_vitkit_home_says(run, tmp_path):
    path = tmp_path / "a.md"
    path.write_text(DAY + GOOD)
    run(path)
    with Library(tmp_path / "home" / "papers.db") as library:
        assert library.find("2504.02692").source == ""
        assert [row.source for row in library.rows()] == [str(path)]

"""What `vitkit papers export` writes."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from vitkit.catalogue.digests import read
from vitkit.catalogue.library import Library
from vitkit.cli.papers_export import papers_export
from vitkit.errors import BadInput, UnknownName

TABLE = (
    "## K\n\n| **Title** | **Date** | **Abstract** | **Comment** | **CodeRepository** |\n"
    "| --- | --- | --- | --- | --- |\n"
    "| **[GPTAQ](http://arxiv.org/abs/2504.02692v3)** | 2025-05-13 |  | ICML 2025 | None |\n"
    "| **[GPTQv2](http://arxiv.org/abs/2504.02692v2)** | 2025-04-04 |  |  | None |\n"
)
DAY = (
    "## Papers for 2025-03-27\n\n| Title | Authors | Summary |\n|-------|---------|---------|\n"
    "| ω (Read more on [arXiv](https://arxiv.org/abs/2503.19757) or "
    "[HuggingFace](https://huggingface.co/papers/2503.19757))| a | s |\n"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_HOME", str(tmp_path / "home"))
    app = typer.Typer()
    app.command()(papers_export)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def filled(run):
    with Library() as library:
        library.merge(read(TABLE, "a.md"), read(DAY, "b.md"))


@pytest.mark.usefixtures("filled")
def test_a_section_comes_out_as_it_went_in(run):
    assert run("--section", "k").stdout == TABLE
    assert run("--form", "daily", "--section", "Papers for 2025-03-27").stdout == DAY
    assert run("--form", "table").stdout.startswith(TABLE)


@pytest.mark.usefixtures("filled")
def test_choosing(run):
    assert [row["version"] for row in json.loads(run("--form", "json", "--section", "K").stdout)] == [3, 2]
    assert [row["version"] for row in json.loads(run("--form", "json", "--section", "K", "--newest").stdout)] == [3]
    assert [row["arxiv_id"] for row in json.loads(run("-f", "json", "--since", "20250501").stdout)] == ["2504.02692"]
    assert run("--form", "bibtex").stdout.count("@misc") == 2
    nothing = run("--form", "json", "--since", "2030-01-01")
    assert nothing.exit_code == 0 and nothing.stdout == "[]\n" and "No row matches" in nothing.stderr


@pytest.mark.usefixtures("filled")
def test_a_file(run, tmp_path):
    done = run("--section", "Papers for 2025-03-27", "-f", "daily", "--out", tmp_path / "new" / "out.md")
    assert (tmp_path / "new" / "out.md").read_text(encoding="utf-8") == DAY
    assert done.stdout == "" and "1 rows written to" in done.stderr


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--form", "tabel"], UnknownName, "Did you mean 'table'"),
        (["--section", "Kk"], UnknownName, "No section is called 'Kk'"),
        (["--since", "spring"], BadInput, "--since 'spring' must be a day like 2025-03-27"),
    ],
)
def test_wrong_words(run, arguments, error, message):
    with pytest.raises(error, match=message):
        raise run(*arguments).exception


def test_an_empty_library_says_how_to_fill_it(run):
    with pytest.raises(BadInput, match="still empty: `vitkit papers import FILE`"):
        raise run().exception

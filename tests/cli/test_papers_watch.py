"""What `vitkit papers watch` prints, and how it ends."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from vitkit.catalogue import arxiv_feed
from vitkit.cli import app
from vitkit.testing.arxiv_server import Paper, serving

YAML = "out: new.md\nsections:\n  - {name: Pruning, query: pruning}\n  - {name: Merging, category: cs.CV}\n"


@pytest.fixture
def arxiv(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("VITKIT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(arxiv_feed, "DELAY_SECONDS", 0.0)
    monkeypatch.setattr(arxiv_feed, "ATTEMPTS", 2)
    (tmp_path / "watch.yaml").write_text(YAML)
    with serving() as server:
        monkeypatch.setenv("VITKIT_ARXIV_URL", server.url)
        day = datetime.now(UTC) - timedelta(days=2)
        server.papers = [
            Paper(arxiv_id="9912.00001", published=day, title="Pruning"),
            Paper(arxiv_id="9912.00002", published=day, title="Else"),
        ]
        yield server


@pytest.fixture
def run(arxiv, tmp_path):
    return lambda *arguments: CliRunner().invoke(
        app, ["papers", "watch", str(tmp_path / "watch.yaml"), *arguments], env={"COLUMNS": "150"}
    )


def test_a_digest_and_then_nothing_new(run, tmp_path):
    done = run()
    assert done.exit_code == 0 and done.stderr == ""
    assert f"2 papers written to {tmp_path / 'new.md'}." in done.stdout
    assert "Library: 3 rows of 2 papers: 2 new, 0 updated, 0 already known." in done.stdout
    text = (tmp_path / "new.md").read_text()
    assert text.startswith("# Papers, 20") and text.index("## Pruning") < text.index("## Merging")
    done = run()
    assert done.exit_code == 0 and "Nothing new." in done.stdout
    assert (tmp_path / "new.md").read_text() == text
    # import takes it as it takes any digest
    assert CliRunner().invoke(app, ["papers", "import", str(tmp_path / "new.md")]).exit_code == 0


def test_summaries_stand_in_the_digest_and_in_the_library(run, arxiv, tmp_path, monkeypatch):
    from vitkit.catalogue.library import Library
    from vitkit.catalogue.summaries import NoSummary, extractive

    def write(row):
        if row.arxiv_id.endswith("2"):
            raise NoSummary("nothing to say.")
        return "It is 94% right."

    monkeypatch.setattr(extractive, "write", write)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (tmp_path / "watch.yaml").write_text(YAML + "form: daily\n")
    done = run("--summarise")
    assert done.exit_code == 0 and "Not summarised: 9912.00002: nothing to say." in done.stdout
    assert "It is 94% right. [not in the abstract: 94%]" in (tmp_path / "new.md").read_text().replace("\\", "")
    with Library() as library:
        assert library.find("9912.00001").summary == "It is 94% right. [not in the abstract: 94%]"
        assert library.find("9912.00002").summary == ""


def test_a_dry_run_asks_nothing(run, arxiv):
    done = run("--dry-run")
    assert done.stdout == "Pruning: all:pruning\nMerging: cat:cs.CV\n" and not arxiv.requests


def test_a_failed_section_is_named(run, arxiv, tmp_path):
    arxiv.faults = [(500, {})] * 2
    done = run()
    assert done.exit_code == 1
    assert done.stderr.startswith(
        "Error: section 'Pruning' could not be fetched. 127.0.0.1 cannot be reached (HTTP 500"
    )
    assert "2 papers written to" in done.stdout and "## Merging" in (tmp_path / "new.md").read_text()


def test_offline_it_is_one_line(run, arxiv, tmp_path):
    arxiv.faults = [(500, {})] * 4
    done = run()
    assert done.exit_code == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "cannot be reached (HTTP 500, 2 times in a row)" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["watch.yaml"]


def test_a_mistake_in_the_file(run, arxiv, tmp_path):
    (tmp_path / "watch.yaml").write_text(YAML + "titel: x\n")
    done = run()
    assert done.exit_code == 2 and "unknown key 'titel'. Did you mean 'title'?" in done.stderr and not arxiv.requests

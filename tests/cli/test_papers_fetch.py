"""What `vitkit papers fetch` prints, and how it ends."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from vitkit.catalogue import arxiv_feed
from vitkit.catalogue.library import Library
from vitkit.cli import app
from vitkit.testing.arxiv_server import Paper, serving

DAY = timedelta(days=1)


@pytest.fixture
def arxiv(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("VITKIT_HOME", str(tmp_path))
    monkeypatch.setattr(arxiv_feed, "DELAY_SECONDS", 0.0)
    with serving() as server:
        monkeypatch.setenv("VITKIT_ARXIV_URL", server.url)
        now = datetime.now(UTC)
        server.papers = [
            Paper(arxiv_id="2504.02692", version=3, published=now - 2 * DAY, title="GPTAQ for a vision transformer"),
            Paper(arxiv_id="9912.00001", published=now - 3 * DAY, title="A vision\n  transformer"),
            Paper(arxiv_id="9912.00002", published=now - 20 * DAY, title="An old vision transformer"),
        ]
        yield server


def run(*arguments):
    return CliRunner().invoke(app, ["papers", "fetch", *arguments], env={"COLUMNS": "150"})


def test_a_week_by_default_and_the_query_is_the_section(arxiv, tmp_path):
    done = run("--query", "vision transformer")
    assert done.exit_code == 0 and done.stderr == ""
    assert "2 rows of 2 papers: 2 new, 0 updated, 0 already known. All rows were read." in done.stdout
    assert "1 of the papers are in the catalogue" in done.stdout and str(tmp_path / "papers.db") in done.stdout
    assert arxiv.requests[0]["search_query"].startswith('all:"vision transformer" AND submittedDate:[')
    with Library() as library:
        assert [row.arxiv_id for row in library.rows("vision transformer")] == ["2504.02692", "9912.00001"]
    done = run("--query", "vision transformer")
    assert done.exit_code == 0 and 'nothing more for all:"vision transformer" since 20' in done.stdout


def test_json_and_options(arxiv):
    arguments = ("-c", "cs.CV", "-c", "cs.LG", "--since", "30d", "--section", "Mine", "--limit", "2", "--json")
    found = json.loads(run(*arguments).stdout)
    assert found["new"] == ["2504.02692", "9912.00001"] and found["complete"] is True
    assert found["query"] == "(cat:cs.CV OR cat:cs.LG)" and found["in_catalogue"] == {"2504.02692": "gptaq"}
    assert json.loads(run(*arguments).stdout)["new"] == ["9912.00002"]
    assert json.loads(run(*arguments, "--again").stdout)["known"] == ["2504.02692", "9912.00001"]
    with Library() as library:
        assert [section.name for section in library.sections()] == ["Mine"]


def test_categories_alone_are_their_own_section(arxiv):
    run("-c", "cs.CV", "-c", "cs.LG")
    with Library() as library:
        assert [section.name for section in library.sections()] == ["cs.CV, cs.LG"]


def test_offline(arxiv, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("VITKIT_ARXIV_URL", f"http://127.0.0.1:{taken.getsockname()[1]}/")
        done = run("--query", "x", "--json")
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: 127.0.0.1 cannot be reached (Connection refused)")
    assert done.stderr.count("\n") == 1 and not any(tmp_path.iterdir())


@pytest.mark.parametrize("as_json", [False, True])
def test_what_arrived_before_it_failed_is_kept_and_told(arxiv, monkeypatch, as_json):
    monkeypatch.setattr(arxiv_feed.Feed.__init__, "__defaults__", (0.0, 1, lambda seconds: None))
    arxiv.faults = [None, *[(503, {})] * 5]
    done = run("--query", "vision transformer", *["--json"] * as_json)
    assert done.exit_code == 1
    first, second = done.stderr.splitlines()
    assert first == "What has arrived is in the library; the same command fetches the rest."
    assert second.startswith("Error: 127.0.0.1 cannot be reached (HTTP 503, 5 times in a row)")
    if as_json:
        found = json.loads(done.stdout)
        assert found["new"] == ["2504.02692"] and found["complete"] is False
    else:
        assert "1 row of 1 paper: 1 new" in done.stdout
    assert json.loads(run("--query", "vision transformer", "--json").stdout)["new"] == ["9912.00001"]


def test_ctrl_c(arxiv, monkeypatch):
    monkeypatch.setattr(arxiv_feed.Feed.__init__, "__defaults__", (0.0, 1, lambda seconds: None))
    row, calls = arxiv_feed._row, []

    def interrupted(result):
        calls.append(result)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return row(result)

    monkeypatch.setattr(arxiv_feed, "_row", interrupted)
    done = run("--query", "vision transformer")
    assert done.exit_code == 130 and "the same command fetches the rest" in done.stderr
    with Library() as library:
        assert [r.arxiv_id for r in library.papers()] == ["2504.02692"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "There is nothing to ask arXiv for"),
        (["--query", "x", "--since", "soon"], "since 'soon' must be a day like 2025-05-01"),
        (["--query", "x", "--category", "CV"], "The category 'CV' must be one of arXiv's"),
    ],
)
def test_wrong_words(arxiv, arguments, message):
    done = run(*arguments)
    assert done.exit_code == 2 and message in done.stderr and not arxiv.requests

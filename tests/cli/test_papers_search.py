"""What `vitkit papers search` finds."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.library import Library
from vitkit.cli import app


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_HOME", str(tmp_path))
    monkeypatch.setenv("VITKIT_CACHE", str(tmp_path / "cache"))
    rows = (
        Row(
            arxiv_id="9901.00001", title="Pruning tokens for segmentation", abstract="Fewer tokens.", date="1999-01-02"
        ),
        Row(arxiv_id="9901.00002", title="Something else", abstract="On tokens; pruning hedges; segmentation."),
    )
    with Library(tmp_path / "papers.db") as library:
        library.merge(Digest(rows=rows))


def search(*words):
    done = CliRunner().invoke(app, ["papers", "search", *words])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_word_in_the_title_counts_more():
    found = json.loads(search("token pruning segmentation", "--json"))
    assert [hit["arxiv_id"] for hit in found[:2]] == ["9901.00001", "9901.00002"]
    assert found[0]["run"] == "" and found[0]["url"].endswith("9901.00001")


def test_what_is_here_is_shown_with_its_command():
    found = json.loads(search("doubly stochastic attention quantum", "--json"))
    assert found[0]["arxiv_id"] == "2504.16275" and found[0]["run"].startswith("vitkit show ")
    assert "vitkit show" in search("doubly stochastic")
    assert all(hit["run"] for hit in json.loads(search("attention", "--here", "--json", "-n", "5")))


@pytest.mark.parametrize("query", ['"', "NEAR(", "a AND", "*", "'; DROP TABLE papers; --", "zzzzqqq"])
def test_any_text_is_a_query(query):
    json.loads(search(query, "--json"))
    assert "No paper matches" in search("zzzzqqq")


def test_vectors_find_what_is_said_in_other_words(monkeypatch):
    from vitkit.catalogue import meaning
    from vitkit.catalogue.joined import papers

    class Topic:
        """Tells papers on hedges from all others."""

        def encode(self, texts, **options):
            return np.array([[1.0, 0.0] if "hedge" in t or "gardening" in t else [0.0, 1.0] for t in texts])

    monkeypatch.setattr(meaning, "_load", lambda model: Topic())
    assert not json.loads(search("gardening", "--json"))
    done = CliRunner().invoke(app, ["papers", "embed", "--model", "topics"])
    assert done.exit_code == 0, done.output
    with Library() as library:
        assert f"{len(papers(library))} vectors made by topics" in done.output
    assert json.loads(search("gardening", "--json"))[0]["arxiv_id"] == "9901.00002"
    assert not json.loads(search("gardening", "--json", "--words"))
    # what both orders have is first
    assert json.loads(search("hedges", "--json"))[0]["arxiv_id"] == "9901.00002"
    again = CliRunner().invoke(app, ["papers", "embed"])
    assert "0 vectors made by topics" in again.output

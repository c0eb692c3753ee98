"""Extractive summaries: the abstract's own sentences, in its order, and one for each role."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitkit.catalogue.digests import Row, read_file
from vitkit.catalogue.summaries import figures
from vitkit.catalogue.summaries.extractive import MAX_WORDS, write
from vitkit.catalogue.summaries.sentences import sentences

PARTS = {
    "objective": "However, long sequences remain a challenge for attention in vision transformers at high resolution.",
    "aside": "Attention compares all tokens with all tokens of an image in every one of its layers.",
    "method": "To address this, we propose Sieve, a module that drops tokens of the image that attention ignores.",
    "detail": "Sieve keeps a running mean of the attention that each token got in the layers before, and sorts by it.",
    "result": "Experiments on ImageNet show that a ViT-B/16 with Sieve is 1.8x faster and loses 0.2% of its accuracy.",
    "more": "We repeat all runs with other seeds, and list hyperparameters, schedules and hardware in the appendix.",
    "implication": "Sieve thus enables real-time applications of large transformers on devices with small batteries.",
    "link": "Code and models that achieve state-of-the-art results are available at https://github.com/a/sieve.",
}
ABSTRACT = " ".join(PARTS.values())


def test_one_sentence_of_each_role_in_the_abstracts_order():
    chosen = " ".join(PARTS[role] for role in ("objective", "method", "result", "implication"))
    assert write(Row(arxiv_id="1", title="Sieve", abstract=ABSTRACT)) == chosen


def test_short_abstracts_are_their_own_summary():
    short = "We propose X. It is good. Code: https://x.org."
    assert write(Row(arxiv_id="1", title="X", abstract=short)) == short


def test_one_endless_sentence():
    endless = "We propose " + "and ".join(["it "] * 200) + "go."
    assert write(Row(arxiv_id="1", title="X", abstract=endless)) == endless
    assert write(Row(arxiv_id="1", title="X", abstract=f"{endless} It works.")) == "It works."


@given(st.lists(st.sampled_from([*PARTS.values(), "It is.", "5.", "?", "Ünï çödé 数据。"]), max_size=12))
def test_any_abstract(parts):
    abstract = " ".join(parts)
    summary = write(Row(arxiv_id="1", title="X", abstract=abstract))
    found = sentences(abstract)
    taken = sentences(summary)
    places = [found.index(sentence) for sentence in taken]
    assert places == sorted(set(places)) and len(summary.split()) <= MAX_WORDS
    assert bool(summary) == bool(abstract)
    assert figures.check(summary, abstract) == []
    assert write(Row(arxiv_id="1", title="X", abstract=abstract)) == summary


def test_real_abstracts(shared_data):
    path = shared_data.parent / "digests" / "vision-transformers.md"
    if not path.is_file():
        pytest.skip("the digest is not here")
    for row in read_file(path).rows[::8]:
        summary = write(row)
        assert 30 <= len(summary.split()) <= MAX_WORDS
        assert all(sentence in row.abstract for sentence in sentences(summary))
        assert figures.mark(summary, row.abstract) == summary

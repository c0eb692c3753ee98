"""Abstracts are cut where sentences end, and nowhere else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitkit.catalogue.summaries.sentences import sentences


@pytest.mark.parametrize(
    "text",
    [
        "We use nets, e.g. ViT, i.e. a net.| It is vs. CNNs better.",
        "Liu et al.| We differ.| Liu et al. (2020) did.| Smith et al. propose it.",
        "A gain of 98.5%.| With a ResNet-50.| We beat it by 50.| Our code is v1.0.",
        "See Fig. 3, Eq. 2 and Sec. 4.1.| It holds w.r.t. accuracy.",
        '"Why not?"| We ask.| Is it?| Yes!| No... maybe.| (It is in brackets.)| End',
        "J. Smith did it at https://a.org/b.c etc.| The rest is open.",
        "",
    ],
)
def test_sentences(text):
    assert sentences(text.replace("|", "")) == (text.split("| ") if text else [])


@given(st.text(alphabet="ab. \"'()!?5%A", max_size=60))
def test_nothing_but_white_space_is_lost(text):
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())
    assert all(sentence in text for sentence in sentences(text))

"""Rows and the tidying of their texts."""

from __future__ import annotations

import pytest

from vitkit.catalogue.digests import Digest, Row
from vitkit.catalogue.digests.row import tidy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" a\n  b\t", "a b"),
        ("\x1b[31mred\x07", "[31mred"),
        ("a\u2028b\x85c", "a b c"),
        ("a\u00a0b", "a\u00a0b"),
        ("\n", ""),
    ],
)
def test_tidy(text, expected):
    assert tidy(text) == expected


def test_addresses_carry_the_version_where_it_is_known():
    assert Row(arxiv_id="hep-th/9901001", title="T").url == "https://arxiv.org/abs/hep-th/9901001"
    assert Row(arxiv_id="2505.08517", version=3, title="T").url == "https://arxiv.org/abs/2505.08517v3"


def test_sections_are_those_with_rows_in_order():
    rows = tuple(Row(arxiv_id="2505.08517", title="T", section=name) for name in ("B", "A", "B"))
    assert Digest(rows=rows).sections == ("B", "A")

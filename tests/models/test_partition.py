"""Blocks and dilated grids: which cells meet, and the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.models.partition import cut, join


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_join_undoes_cut_for_any_map(height, width, size, dilated):
    x = torch.arange(2 * 3 * height * width, dtype=torch.float32).reshape(2, 3, height, width) + 1
    tokens, real = cut(x, size, dilated)
    assert torch.equal(join(tokens, height, width, size, dilated), x)
    if real is None:
        assert (tokens != 0).all()
    else:
        # padding is zero, cells are not; every group has a cell to attend to
        assert torch.equal(real, (tokens != 0).all(-1)) and real.any(1).all()


@pytest.mark.parametrize("dilated", [False, True])
def test_groups_hold_the_cells_they_should(dilated):
    height, width, size = 6, 8, 2
    x = torch.arange(height * width).reshape(1, 1, height, width).float()
    found = {frozenset(g.flatten().int().tolist()) for g in cut(x, size, dilated)[0]}
    groups: dict[tuple[int, int], set[int]] = {}
    for i in range(height):
        for j in range(width):
            key = (i % (height // size), j % (width // size)) if dilated else (i // size, j // size)
            groups.setdefault(key, set()).add(i * width + j)
    assert found == {frozenset(g) for g in groups.values()}

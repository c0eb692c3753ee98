"""Tokens as maps: the round trip, and gradients of single images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitkit.errors import BadInput
from vitkit.models.cells import as_cells, as_tokens
from vitkit.models.layout import TokenLayout


@pytest.mark.parametrize("grid", [(5, 7), (3, 2, 4)])
def test_there_and_back(grid):
    layout = TokenLayout(grid=grid, prefix=(("class", 1),))
    x = torch.randn(2, 1 + layout.num_original, 6)
    cells = as_cells(x, layout, len(grid), "a test")
    assert cells.shape == (2, 6, *grid) and torch.equal(as_tokens(cells), x[:, 1:])
    assert torch.equal(cells.movedim(1, -1), x[:, 1:].unflatten(1, grid))


def test_other_grids_are_refused_with_a_hint():
    with pytest.raises(BadInput, match="a test works on grids of 2 axes, and 2×2×2 has 3; give 3."):
        as_cells(torch.zeros(1, 8, 4), TokenLayout(grid=(2, 2, 2)), 2, "a test", "give 3")
    with pytest.raises(BadInput, match="has 1\\.$"):
        as_cells(torch.zeros(1, 8, 4), TokenLayout(grid=(8,)), 2, "a test")


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_through_a_frozen_batch_norm(batch):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8).eval()
    x, weight = torch.randn(batch, 8, 5, 7, requires_grad=True), torch.randn(batch, 35, 8)
    (grad,) = torch.autograd.grad((as_tokens(norm(x)) * weight).sum(), x)
    torch.testing.assert_close(grad, weight.transpose(1, 2).reshape(x.shape) * (1 + norm.eps) ** -0.5)

"""Scores depend on differences of places only."""

import pytest
import torch

import vitkit
from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.positions.rope2d import RoPE2D


def _qk(n, heads=2, d=8):
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, heads, 1, d, generator=g).expand(-1, -1, n, -1), torch.randn(
        1, heads, 1, d, generator=g
    ).expand(-1, -1, n, -1)


@pytest.mark.parametrize("kind", ["axial", "mixed"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_scores_depend_on_coordinate_differences(kind, prefix):
    h, w = 5, 7
    part = RoPE2D(8, 2, kind)
    layout = TokenLayout(grid=(h, w), prefix=(("class", prefix),) if prefix else ())
    q, k = part.rotate(*_qk(prefix + h * w), layout)
    scores = (q @ k.transpose(-2, -1))[0, :, prefix:, prefix:].unflatten(-1, (h, w)).unflatten(-3, (h, w))
    # the same difference of places from another starting point
    torch.testing.assert_close(scores[:, 0, 0, 1, 2], scores[:, 3, 4, 4, 6], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores[:, :3, :4, 1, 3], scores[:, 1:4, 2:6, 2, 5], atol=1e-5, rtol=1e-4)
    assert (scores[:, 0, 0, 1, 2] - scores[:, 0, 0, 2, 1]).abs().max() > 1e-3


def test_prefix_is_not_turned_and_lengths_stay():
    layout = TokenLayout(grid=(2, 3), prefix=(("class", 1),))
    q, k = _qk(7)
    turned, _ = RoPE2D(8, 2).rotate(q, k, layout)
    torch.testing.assert_close(turned[:, :, 0], q[:, :, 0])
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))


def test_axial_pairs_turn_by_row_or_by_column():
    layout = TokenLayout(grid=(1, 4))
    q, k = _qk(4)
    turned, _ = RoPE2D(8, 2, "axial").rotate(q, k, layout)
    # one row: the half that turns by rows stays
    moved = ((turned - q).abs().amax((0, 1, 2)) > 1e-4).tolist()
    assert sum(moved) == 4


def test_a_merged_token_turns_by_its_mean_place():
    layout = TokenLayout(grid=(1, 3))
    merged = layout.regroup(torch.tensor([[0, 1, 0]]), 2)
    part = RoPE2D(8, 2, "axial")
    q, k = _qk(3)
    whole, _ = part.rotate(q, k, layout)
    fewer, _ = part.rotate(q[:, :, :2], k[:, :, :2], merged)
    # cells 0 and 2 stand together at 1
    torch.testing.assert_close(fewer[:, :, 0], whole[:, :, 1], atol=1e-5, rtol=1e-4)


def test_replaces_the_table_and_learns_directions():
    vit = vitkit.build("vit_femto", img_size=8, in_chans=1, num_classes=3, position="rope2d")
    assert vit.pos_embed is None
    torch.nn.init.normal_(vit.head.weight)
    vit(torch.rand(2, 1, 8, 8)).square().sum().backward()
    grads = [b.attn.position[0].rope.freqs.grad for b in vit.blocks]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)


def test_errors():
    with pytest.raises(BadInput, match="multiples of 4.*4 or 8"):
        RoPE2D(6, 2)
    with pytest.raises(UnknownName):
        RoPE2D(8, 2, "diagonal")

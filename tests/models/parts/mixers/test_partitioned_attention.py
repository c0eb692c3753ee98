"""Attention inside rectangles of the grid: equals masked dense attention, and full attention for one block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitkit
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.partitioned_attention import PartitionedAttention
from vitkit.models.vit import Attention, ViT


def host(**kwargs) -> ViT:
    options = {"img_size": (20, 28), "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 4}
    return ViT(**{**options, **kwargs}).eval()


def part(blocks: int, grid: tuple[int, int], dim: int = 12) -> PartitionedAttention:
    made = PartitionedAttention(dim, num_heads=3, qkv_bias=True)
    made.set_blocks(blocks, grid)
    return made.eval()


def brute_force(mixer: PartitionedAttention, x: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Each block by itself through the plain attention, then the mean of the prefix copies."""
    (h, w), (rows, cols), p = layout.grid, mixer.cut, layout.num_prefix
    high, wide = -(-h // rows), -(-w // cols)
    out, copies = torch.zeros_like(x), []
    for top in range(0, high * rows, high):
        for left in range(0, wide * cols, wide):
            cells = [r * w + c for r in range(top, min(top + high, h)) for c in range(left, min(left + wide, w))]
            index = torch.tensor([*range(p), *(p + i for i in cells)])
            inner = TokenLayout(grid=(len(cells), 1), prefix=layout.prefix)
            got = Attention.forward(mixer, x[:, index], inner)
            copies.append(got[:, :p])
            out[:, index[p:]] = got[:, p:]
    out[:, :p] = torch.stack(copies).mean(0)
    return out


@given(h=st.integers(2, 7), w=st.integers(4, 9), blocks=st.sampled_from([1, 2, 3, 4, 8]), p=st.sampled_from([0, 1, 5]))
@settings(max_examples=25, deadline=None)
def test_equals_a_loop_over_blocks(h, w, blocks, p):
    torch.manual_seed(h * w + blocks)
    mixer = part(blocks, (h, w))
    layout = TokenLayout(grid=(h, w), prefix=(("class", p),) if p else ())
    if any(-(-side // n) * (n - 1) >= side for side, n in zip((h, w), mixer.cut)):
        return  # a rectangle of padding only; the loop above has no such block
    x = torch.randn(2, p + h * w, 12)
    with torch.no_grad():
        assert torch.allclose(mixer(x, layout), brute_force(mixer, x, layout), atol=1e-5)


def test_cut_and_join_are_inverse_on_grids_that_do_not_divide():
    mixer = part(6, (5, 7))
    x = torch.randn(3, 35, 12)
    blocks, real = mixer._cut(x, 5, 7)
    assert blocks.shape == (18, 9, 12) and int(real.sum()) == 35
    assert torch.equal(mixer._join(blocks, 5, 7), x)


def test_one_block_is_the_host_itself():
    model, images = host(), torch.randn(2, 3, 20, 28)
    before = model(images)
    vitkit.swap(model, "mixer", PartitionedAttention, blocks=1)
    assert torch.allclose(model(images), before, atol=1e-6)


def test_patches_of_two_blocks_do_not_meet_within_one_layer():
    mixer = part(4, (4, 4))
    layout = TokenLayout(grid=(4, 4), prefix=(("class", 1),))
    x = torch.randn(1, 17, 12, requires_grad=True)
    mixer(x, layout)[0, 1].sum().backward()
    reached = (x.grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist()
    assert reached == [0, 1, 2, 5, 6]
    x.grad = None
    mixer(x, layout)[0, 0].sum().backward()
    assert bool((x.grad[0].abs().sum(-1) > 0).all()), "the class token hears every block"


def test_an_empty_rectangle_of_padding_gives_no_nan():
    mixer = part(4, (5, 7))
    mixer.cut = (4, 1)  # rows of 2, 2, 1 and none
    out = mixer(torch.randn(1, 36, 12), TokenLayout(grid=(5, 7), prefix=(("class", 1),)))
    assert bool(torch.isfinite(out).all())


def test_bad_numbers_of_blocks_are_refused():
    with pytest.raises(BadInput, match="use at most 25"):
        part(64, (5, 7))
    with pytest.raises(BadInput, match="at least 1"):
        part(0, (5, 7))

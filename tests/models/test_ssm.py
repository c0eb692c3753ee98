"""The selective layer, the causal convolution, and lines of tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.scan_order import OMNI, scan_order
from vitkit.models.ssm import CausalConv, SelectiveSSM, mixer_only
from vitkit.models.token_line import TokenLine
from vitkit.models.vit import Block


def test_starting_values_are_mambas():
    layer = SelectiveSSM(64, paths=3, d_state=5, dt_rank=4)
    step = F.softplus(layer.dt_bias.detach())
    assert 1e-3 * 0.999 <= float(step.min()) < 3e-3 and 0.05 < float(step.max()) <= 0.1001
    assert torch.allclose(-layer.A_log.exp(), -torch.arange(1.0, 6).expand(3, 64, 5), atol=1e-5)
    assert float(layer.dt_proj.detach().abs().max()) <= 0.5 and bool((layer.D == 1).all())
    assert layer.no_weight_decay() == {"A_log", "D", "dt_bias"}


def test_paths_have_their_own_weights_and_do_not_meet():
    layer = SelectiveSSM(6, paths=2, d_state=3, dt_rank=2)
    x = torch.randn(2, 9, 2, 6)
    both = layer(x)
    for k in range(2):
        alone = SelectiveSSM(6, 1, 3, 2)
        alone.load_state_dict({name: p[k : k + 1] for name, p in layer.state_dict().items()})
        assert torch.allclose(alone(x[:, :, k : k + 1]), both[:, :, k : k + 1], atol=1e-6)


def test_no_time_passes_where_it_stands_still():
    layer = SelectiveSSM(6, d_state=3, dt_rank=2)
    x = torch.randn(1, 9, 1, 6)
    still = torch.zeros(1, 9, 1, dtype=torch.bool)
    still[0, [2, 3, 8]] = True
    moving = ~still[0, :, 0]
    assert torch.allclose(layer(x, still)[:, moving], layer(x[:, moving]), atol=1e-6)
    x = x.requires_grad_()
    layer(x, still)[:, moving].sum().backward()
    assert bool(x.grad.isfinite().all()) and float(x.grad[:, ~moving].abs().max()) == 0


def test_the_convolution_is_pytorchs_and_causal():
    conv = CausalConv(5, width=4)
    x = torch.randn(2, 7, 5)
    theirs = F.conv1d(F.pad(x.mT, (3, 0)), conv.weight.T.flip(1).unsqueeze(1), conv.bias, groups=5).mT
    assert torch.allclose(conv(x), theirs, atol=1e-6)
    assert CausalConv(5, width=1)(x[:, :1]).shape == (2, 1, 5)


def test_sizes_are_checked():
    with pytest.raises(BadInput, match="d_state=0"):
        SelectiveSSM(4, d_state=0)
    with pytest.raises(BadInput, match="d_conv=0"):
        CausalConv(4, 0)
    with pytest.raises(UnknownName, match="centre"):
        TokenLine(("raster",), prefix="centre")
    with pytest.raises(BadInput, match="raster"):
        TokenLine(())


def test_a_block_with_a_mixer_only():
    block = mixer_only(Block(8, 2), torch.nn.Linear(8, 8))
    x = torch.randn(2, 5, 8)
    y, _ = block(x, TokenLayout(grid=(1, 5)))
    assert torch.allclose(y, x + block.attn(block.norm1(x)), atol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("prefix", ["first", "middle", "last"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_lines_are_undone(count, prefix, mirrored):
    line = TokenLine((*OMNI, "hilbert", "local:3"), mirrored, prefix, grid=(5, 7))
    layout = TokenLayout(grid=(5, 7), prefix=(("class", count),) if count else ())
    rows = torch.randn(2, count + 35, 3)
    paths = line.paths(layout, 2, rows.device)
    lines = line.gather(rows, paths)
    assert lines.shape == (2, count + 35, line.num_paths, 3)
    back = line.restore(lines, paths)
    assert torch.equal(back, rows.unsqueeze(2).expand_as(back))
    at = {"first": 0, "middle": 17, "last": 35}[prefix]
    assert paths.rows[at : at + count, 0].tolist() == list(range(count))
    patches = [r - count for r in paths.rows[:, 4].tolist() if r >= count]
    assert patches == scan_order(5, 7, "diagonal").tolist()
    if mirrored:
        assert torch.equal(paths.rows[:, 10:], paths.rows[:, :10].flip(0))


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("prefix", ["first", "middle", "last"])
def test_moved_tokens_take_the_turn_of_their_cells(prefix, mirrored):
    line = TokenLine(("hilbert", "column_rev"), mirrored, prefix)
    full = TokenLayout(grid=(5, 7), prefix=(("class", 2),))
    shuffle = torch.stack([torch.randperm(35) for _ in range(3)])
    rows = torch.randn(3, 37, 4)
    moved = torch.cat([rows[:, :2], rows[:, 2:].gather(1, shuffle.unsqueeze(-1).expand(-1, -1, 4))], 1)
    straight = line.gather(rows, line.paths(full, 3, rows.device))
    paths = line.paths(full.take(shuffle), 3, rows.device)
    assert torch.equal(line.gather(moved, paths), straight)
    back = line.restore(straight, paths)
    assert torch.equal(back, moved.unsqueeze(2).expand_as(back))


@pytest.mark.parametrize("prefix", ["first", "middle", "last"])
def test_padding_stands_behind_everything_and_is_marked(prefix):
    line = TokenLine(("snake",), False, prefix)
    keep = torch.tensor([[3, 9, 20, 22, 30], [1, 2, 4, 0, 0]])
    valid = torch.tensor([[True] * 5, [True, True, True, False, False]])
    layout = TokenLayout(grid=(5, 7), prefix=(("class", 1),)).take(keep).replace(valid=valid)
    paths = line.paths(layout, 2, keep.device)
    assert paths.still[:, :, 0].tolist() == [[False] * 6, [False] * 4 + [True] * 2]
    place = paths.places[:, 0, 0].tolist()
    assert place == {"first": [0, 0], "middle": [2, 1], "last": [5, 3]}[prefix]
    with pytest.raises(BadInput, match="frame"):
        line.paths(TokenLayout(grid=(2, 5, 7), coords=torch.zeros(70, 2)), 1, keep.device)

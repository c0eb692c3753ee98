"""State-space duality: the block in the words of the paper, against Mamba's scan, and its cost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitkit.compress.cost import count_flops
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.mamba2 import GatedRMSNorm, Mamba2
from vitkit.models.parts.mixers.ss2d import SS2D
from vitkit.models.parts.mixers.vim import Vim
from vitkit.models.scan import selective_scan
from vitkit.models.scan_order import scan_order
from vitkit.models.vit import Attention
from vitkit.testing import check_part
from vitkit.testing.checks import PLACES

GRID = (3, 5)
LAYOUT = TokenLayout(grid=GRID)


def by_steps(mixer, x, k=0):
    """y of path k on rows that are in order, by Mamba's scan with A repeated over channels and states."""
    inner, heads, groups = mixer.sizes[0], mixer.heads, mixer.groups
    z, mixed, step = mixer.in_proj(x).split(mixer.sizes, -1)
    width = mixer.sizes[1]
    weight, bias = mixer.conv.weight[:, k * width : (k + 1) * width], mixer.conv.bias[k * width : (k + 1) * width]
    padded = F.pad(mixed, (0, 0, len(weight) - 1, 0))
    past = sum(weight[j] * padded[:, len(weight) - 1 - j :][:, : x.shape[1]] for j in range(len(weight)))
    u, b, c = F.silu(bias + past).split([inner, (width - inner) // 2, (width - inner) // 2], -1)
    b, c = (t.unflatten(-1, (groups, -1)) for t in (b, c))
    spread = inner // heads
    delta = F.softplus(step + mixer.dt_bias[k]).repeat_interleave(spread, -1)
    A = -mixer.A_log[k].exp().repeat_interleave(spread).unsqueeze(1).expand(-1, b.shape[-1])
    D = mixer.D[k].repeat_interleave(spread)
    return z, selective_scan(u, delta, A, b, c, D, delta_softplus=False, method="sequential")


@pytest.mark.parametrize("order", ["raster", "spiral_out"])
@pytest.mark.parametrize(("prefix", "at"), [("first", 0), ("middle", 7), ("last", 15)])
@pytest.mark.parametrize("sizes", [{}, {"head_dim": 4, "groups": 2, "chunk": 5}, {"head_dim": 1, "expand": 1}])
def test_is_the_block_along_the_path(order, prefix, at, sizes):
    mixer = Mamba2(8, order, d_state=6, prefix=prefix, grid=GRID, **sizes)
    path = (scan_order(*GRID, order) + 2).tolist()
    rows = [*path[:at], 0, 1, *path[at:]]
    x, expected = torch.randn(2, 17, 8), torch.empty(2, 17, 8)
    with torch.no_grad():
        mixer.norm.weight.normal_()
        z, y = by_steps(mixer, x[:, rows])
        gated = (y * F.silu(z)).unflatten(-1, (mixer.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=1e-5).flatten(-2) * mixer.norm.weight
        expected[:, rows] = mixer.out_proj(normed)
        assert torch.allclose(mixer(x, LAYOUT.replace(prefix=(("class", 2),))), expected, atol=1e-5)


def test_both_directions_are_two_scans_under_one_gate():
    mixer, x = Mamba2(8, bidirectional=True, head_dim=4, d_state=6), torch.randn(2, 15, 8)
    with torch.no_grad():
        z, there = by_steps(mixer, x, 0)
        _, back = by_steps(mixer, x.flip(1), 1)
        expected = mixer.out_proj(mixer.norm(there + back.flip(1), z))
        assert torch.allclose(mixer(x, LAYOUT), expected, atol=1e-5)


def test_the_norm_is_gated_before_it_normalises():
    norm = GatedRMSNorm(6, groups=2)
    y, z = torch.randn(4, 6), torch.randn(4, 6)
    out = norm(y, z)
    assert torch.allclose(out.unflatten(-1, (2, 3)).square().mean(-1), torch.ones(4, 2), atol=1e-3)
    # a common factor of the values of a group is taken out again
    assert torch.allclose(norm(300 * y, z), norm(100 * y, z), atol=1e-3)
    assert norm(y.bfloat16(), z.bfloat16()).dtype == torch.bfloat16


def test_starting_values_are_the_papers():
    mixer = Mamba2(512)
    step, decay = F.softplus(mixer.dt_bias.detach()), mixer.A_log.detach().exp()
    assert float(step.min()) >= 1e-3 * 0.99 and float(step.max()) <= 0.101
    assert float(decay.min()) >= 1 and float(decay.max()) <= 16 and mixer.A_log.shape == (1, 16)
    assert bool((mixer.D == 1).all()) and mixer.no_weight_decay() == {"A_log", "D", "dt_bias"}
    # z, u of 1,024, B and C of 64, 16 steps
    assert mixer.in_proj.out_features == 2 * 1024 + 2 * 64 + 16


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_nothing(bidirectional):
    mixer, layout = Mamba2(8, "hilbert", bidirectional), LAYOUT.replace(prefix=(("class", 1),))
    keep, x = torch.tensor([[1, 4, 7, 8, 13]]), torch.randn(1, 6, 8)
    alone = mixer(x, layout.take(keep))
    more = layout.take(torch.cat([keep, torch.tensor([[2, 3, 5]])], 1))
    valid = torch.tensor([[True] * 5 + [False] * 3])
    padded = mixer(torch.cat([x, torch.randn(1, 3, 8)], 1), more.replace(valid=valid))
    assert torch.allclose(padded[:, :6], alone, atol=1e-5)


@pytest.mark.parametrize("options", [{"head_dim": 8, "groups": 4}, {"bidirectional": True, "prefix": "attend"}])
def test_every_choice_conforms(options):
    assert not check_part(Mamba2, places=PLACES[:3], dynamo=False, **options).refused


def test_sizes_must_divide():
    for options in ({"head_dim": 5}, {"head_dim": 4, "groups": 3}, {"d_state": 0}):
        with pytest.raises(BadInput, match="head_dim=None and groups=1"):
            Mamba2(8, **options)
    assert Mamba2(37, expand=1).heads == 1


class OnSquare(nn.Module):
    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        side = math.isqrt(x.shape[1])
        return self.mixer(x, TokenLayout(grid=(side, side)))


@pytest.mark.parametrize(
    ("mixer", "low", "high"),
    [
        (lambda: Mamba2(16, d_state=16), 0.95, 1.05),
        (lambda: Mamba2(16, d_state=16, bidirectional=True), 0.95, 1.05),
        (lambda: Vim(16), 0.95, 1.05),
        (lambda: SS2D(16, num_prefix=0), 0.95, 1.05),
        (lambda: Attention(16, 2), 1.7, 2.05),
    ],
    ids=["mamba2", "mamba2 both ways", "vim", "ss2d", "attention"],
)
def test_operations_grow_linearly_with_the_tokens_and_those_of_attention_do_not(mixer, low, high):
    counts = [count_flops(OnSquare(mixer()), torch.zeros(1, side * side, 16)) for side in (16, 64)]
    slope = math.log(counts[1] / counts[0]) / math.log(16)
    assert low < slope < high

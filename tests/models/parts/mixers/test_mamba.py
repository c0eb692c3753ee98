"""One scan along a path: what it computes, who hears whom, and where prefix tokens stand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import vitkit
from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.mamba import Mamba
from vitkit.models.scan import selective_scan
from vitkit.models.scan_order import scan_order
from vitkit.testing import check_part
from vitkit.testing.checks import PLACES

GRID = (3, 5)


def layout_of(num_prefix=0, grid=GRID):
    return TokenLayout(grid=grid, prefix=(("class", num_prefix),) if num_prefix else ())


def reach(mixer, layout, row, num_rows, dim=8):
    """Rows that the update of ``row`` depends on."""
    x = torch.randn(1, num_rows, dim, requires_grad=True)
    mixer(x, layout)[0, row].sum().backward()
    return set((x.grad[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist())


def by_steps(mixer, x, rows):
    """The block along one path given as a list of rows, in the words of the paper."""
    u, z = mixer.in_proj(x[:, rows]).chunk(2, -1)
    weight, width = mixer.conv.weight, len(mixer.conv.weight)
    padded = F.pad(u, (0, 0, width - 1, 0))
    u = F.silu(mixer.conv.bias + sum(weight[j] * padded[:, width - 1 - j :][:, : u.shape[1]] for j in range(width)))
    ssm = mixer.ssm
    r, b, c = (u @ ssm.x_proj[0].T).split(ssm.sizes, -1)
    y = selective_scan(
        u, r @ ssm.dt_proj[0].T, -ssm.A_log[0].exp(), b.unsqueeze(2), c.unsqueeze(2), ssm.D[0],
        delta_bias=ssm.dt_bias[0], method="sequential",
    )  # fmt: skip
    out = torch.empty_like(x)
    out[:, rows] = mixer.out_proj(y * F.silu(z))
    return out


@pytest.mark.parametrize("order", ["raster", "hilbert", "spiral_out", "atrous:2"])
@pytest.mark.parametrize(("prefix", "at"), [("first", 0), ("middle", 7), ("last", 15)])
def test_is_the_block_along_the_path(order, prefix, at):
    mixer = Mamba(8, order, d_state=4, prefix=prefix, grid=GRID)
    path = (scan_order(*GRID, order) + 2).tolist()
    rows = [*path[:at], 0, 1, *path[at:]]
    x = torch.randn(2, 17, 8)
    with torch.no_grad():
        assert torch.allclose(mixer(x, layout_of(2)), by_steps(mixer, x, rows), atol=1e-5)


def test_a_token_hears_the_past_of_its_path_only():
    mixer = Mamba(8, "column", prefix="last")
    column = scan_order(*GRID, "column").tolist()
    for turn in (0, 4, 14):
        assert reach(mixer, layout_of(), column[turn], 15) == set(column[: turn + 1])
    assert reach(mixer, layout_of(1), 0, 16) == set(range(16)), "the class token at the end hears all"


def test_attending_prefix_tokens_stand_outside():
    mixer = Mamba(8, prefix="attend", num_prefix=1)
    assert 0 not in reach(mixer, layout_of(1), 15, 16)
    assert reach(mixer, layout_of(1), 0, 16) == set(range(16))
    with pytest.raises(BadInput, match="middle"):
        Mamba(8, prefix="attend", num_prefix=0)(torch.randn(1, 16, 8), layout_of(1))


def test_padding_changes_nothing():
    for cls_options in ({}, {"order": "hilbert", "prefix": "middle"}, {"prefix": "attend"}, {"order": "score"}):
        mixer = Mamba(8, **cls_options)
        keep = torch.tensor([[1, 4, 7, 8, 13]])
        layout, x = layout_of(1).take(keep), torch.randn(1, 6, 8)
        alone = mixer(x, layout)
        padded = torch.cat([x, torch.randn(1, 3, 8)], 1)
        more = layout_of(1).take(torch.cat([keep, torch.tensor([[2, 3, 5]])], 1))
        valid = torch.tensor([[True] * 5 + [False] * 3])
        assert torch.allclose(mixer(padded, more.replace(valid=valid))[:, :6], alone, atol=1e-5), cls_options


def test_a_learned_order_is_undone_and_learns():
    mixer = Mamba(8, "score")
    x, layout = torch.randn(2, 16, 8), layout_of(1)
    shuffle = torch.randperm(15)
    moved = torch.cat([x[:, :1], x[:, 1:][:, shuffle]], 1)
    out = mixer(x, layout)
    # its order comes from the tokens, so it does not care where they stand
    assert torch.allclose(mixer(moved, layout)[:, 1:], out[:, 1:][:, shuffle], atol=1e-5)
    out.square().sum().backward()
    assert float(mixer.score.weight.grad.abs().max()) > 0


def test_alternation_with_attention_by_where():
    model = vitkit.build("vit_pico", img_size=8, in_chans=1, num_classes=3, mixer=("mamba", {"where": "even"}))
    assert [type(b.attn).__name__ for b in model.blocks] == ["Mamba", "Attention", "Mamba", "Attention"]
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("options", [{"order": "score"}, {"prefix": "attend"}, {"prefix": "first", "d_conv": 1}])
def test_every_choice_conforms(options):
    assert not check_part(Mamba, places=PLACES[:3], dynamo=options.get("order") == "score", **options).refused


def test_errors_say_what_is_allowed():
    with pytest.raises(UnknownName, match="hilbert"):
        Mamba(8, "hilbet")
    with pytest.raises(UnknownName, match="attend"):
        Mamba(8, prefix="attends")
    with pytest.raises(BadInput, match="expand"):
        Mamba(8, expand=0)

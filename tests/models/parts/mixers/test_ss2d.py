"""The cross-scan: a sum of plain scans along paths, linear in the number of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vitkit
from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.ss2d import SS2D
from vitkit.models.scan import selective_scan
from vitkit.models.scan_order import CROSS, OMNI, scan_order
from vitkit.models.time_order import time_order
from vitkit.models.vit import Attention
from vitkit.testing import check_part
from vitkit.testing.checks import PLACES

GRID = (5, 7)
LAYOUT = TokenLayout(grid=GRID)


def plain_scan(mixer: SS2D, u: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th layer on a sequence (B, L, E) that is in order already."""
    ssm = mixer.ssm
    r, b, c = (u @ ssm.x_proj[k].T).split(ssm.sizes, -1)
    return selective_scan(
        u, r @ ssm.dt_proj[k].T, -ssm.A_log[k].exp(), b.unsqueeze(2), c.unsqueeze(2), ssm.D[k],
        delta_bias=ssm.dt_bias[k], method="sequential",
    )  # fmt: skip


def test_one_raster_direction_is_a_plain_scan():
    mixer, u = SS2D(8, ("raster",), d_state=4), torch.randn(2, 35, 16)
    with torch.no_grad():
        assert torch.allclose(mixer.scan(u, LAYOUT), plain_scan(mixer, u, 0), atol=1e-5)


@pytest.mark.parametrize("orders", [CROSS, OMNI, ("hilbert", "random:3"), ("local:2", "atrous:2", "spiral_in")])
def test_any_set_of_paths_is_the_sum_of_their_scans(orders):
    mixer, u = SS2D(8, orders, d_state=4, grid=GRID), torch.randn(2, 35, 16)
    total = torch.zeros_like(u)
    with torch.no_grad():
        for k, order in enumerate(orders):
            path = scan_order(*GRID, order)
            total[:, path] += plain_scan(mixer, u[:, path], k)
        assert torch.allclose(mixer.scan(u, LAYOUT), total, atol=1e-4)


def test_orders_may_be_written_as_text():
    for text in ("raster, snake_v_rev", "raster+snake_v_rev"):
        assert SS2D(8, text).line.orders == ("raster", "snake_v_rev")
    with pytest.raises(UnknownName, match="raster"):
        SS2D(8, "raster,rastr")
    with pytest.raises(BadInput, match="at least one order"):
        SS2D(8, ",")
    with pytest.raises(UnknownName, match="prefix tokens in SS2D"):
        SS2D(8, prefix="first")


def test_turning_the_image_turns_the_output_if_the_paths_turn_with_it():
    mixer = SS2D(8, CROSS, d_state=4).eval()
    with torch.no_grad():
        # all four paths alike, and a kernel that a half turn does not change
        for p in mixer.ssm.parameters():
            p.copy_(p[:1].expand_as(p))
        mixer.dwconv.weight.copy_((mixer.dwconv.weight + mixer.dwconv.weight.flip(2, 3)) / 2)
        x = torch.randn(1, 35, 8)
        assert torch.allclose(mixer(x.flip(1), LAYOUT), mixer(x, LAYOUT).flip(1), atol=1e-5)


@pytest.mark.parametrize("prefix", ["attend", "middle"])
def test_prefix_tokens_hear_all_patches(prefix):
    mixer = SS2D(8, prefix=prefix, grid=GRID)
    layout = TokenLayout(grid=GRID, prefix=(("class", 2),))
    x = torch.randn(1, 37, 8, requires_grad=True)
    mixer(x, layout)[0, 0].sum().backward()
    assert bool((x.grad[0, 2:].abs().sum(-1) > 0).all())
    x.grad = None
    mixer(x, layout)[0, 20].sum().backward()
    assert bool((x.grad[0, :2].abs().sum(-1) > 0).all()) == (prefix != "attend")


@pytest.mark.parametrize("options", [{"prefix": "middle", "orders": "raster,hilbert_rev"}, {"expand": 1, "d_state": 4}])
def test_every_choice_conforms(options):
    assert not check_part(SS2D, places=PLACES[:3], dynamo=False, **options).refused


def test_other_grids_than_the_one_it_was_made_for():
    mixer = SS2D(8, ("hilbert",), grid=(3, 3))
    fresh = SS2D(8, ("hilbert",), grid=GRID)
    fresh.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 35, 8)
    assert torch.equal(mixer(x, LAYOUT), fresh(x, LAYOUT))


def test_cost_grows_linearly_and_that_of_attention_does_not():
    def count(mixer, side):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            mixer(torch.zeros(1, side * side, 16), TokenLayout(grid=(side, side)))
        return counter.get_total_flops()

    def slope(mixer):
        return math.log(count(mixer, 64) / count(mixer, 16)) / math.log(16)

    attention = Attention(16, 2)
    attention.fused_attn = False
    assert slope(SS2D(16, num_prefix=0)) < 1.05
    assert slope(attention) > 1.7


def test_merged_tokens_are_refused():
    mixer = SS2D(8, num_prefix=0)
    with pytest.raises(ValueError, match="SS2D needs every cell"):
        mixer(torch.randn(1, 3, 8), LAYOUT.take(torch.tensor([[0, 1, 2]])))


def test_dates_are_convolved_apart_and_scanned_together():
    mixer, layout = (
        SS2D(8, ("interleave/snake", "joint", "raster"), d_state=4, num_prefix=0),
        TokenLayout(grid=(3, 2, 4)),
    )
    x = torch.randn(2, 24, 8)
    u = torch.randn(2, 24, 16)
    total = torch.zeros_like(u)
    with torch.no_grad():
        for k, order in enumerate(mixer.line.orders):
            path = time_order(layout.grid, order)
            total[:, path] += plain_scan(mixer, u[:, path], k)
        assert torch.allclose(mixer.scan(u, layout), total, atol=1e-5)
        # scans that are silent leave the convolution of each date alone
        mixer.ssm.D.fill_(1.0)
        mixer.ssm.x_proj.zero_()
        whole = mixer(x, layout)
        alone = [mixer(date, TokenLayout(grid=(2, 4))) for date in x.chunk(3, 1)]
        assert torch.allclose(whole, torch.cat(alone, 1), atol=1e-5)
        assert float(whole.abs().max()) > 1e-3


def test_builds_by_name_with_its_orders():
    model = vitkit.build(
        "vit_pico", img_size=8, in_chans=1, num_classes=3, mixer=("ss2d", {"orders": ("raster", "column")})
    )
    assert model.blocks[0].attn.line.orders == ("raster", "column")
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 3)

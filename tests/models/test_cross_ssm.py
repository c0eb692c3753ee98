"""Two modalities: the exchange in the words of the equations, its limits, and the gate."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cross_ssm import CrossSSM, GatedFusion
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.vim import Vim
from vitkit.models.scan import selective_scan
from vitkit.models.scan_order import scan_order
from vitkit.models.time_order import time_order

LAYOUT = TokenLayout(grid=(3, 5))


def by_steps(cross, x, path):
    """The updates of both modalities, path by path and step by step."""
    ssm, width = cross.ssm, cross.in_proj[0].out_features // 2
    parts = [cross.in_proj[m](cross.norm[m](x[m])).chunk(2, -1) for m in range(2)]
    sums = [torch.zeros_like(parts[m][0]) for m in range(2)]
    for direction, rows in enumerate((path, path.flip(0))):
        mixed = []
        for m in range(2):
            at = (2 * m + direction) * width
            weight, bias = cross.conv.weight[:, at : at + width], cross.conv.bias[at : at + width]
            padded = F.pad(parts[m][0][:, rows], (0, 0, len(weight) - 1, 0))
            past = sum(weight[j] * padded[:, len(weight) - 1 - j :][:, : len(rows)] for j in range(len(weight)))
            mixed.append(F.silu(bias + past))
        for m in range(2):
            k = 2 * m + direction
            r = mixed[m] @ ssm.x_proj[k, : ssm.sizes[0]].T
            b, c = (mixed[1 - m] @ ssm.x_proj[k, ssm.sizes[0] :].T).chunk(2, -1)
            y = selective_scan(
                mixed[m], r @ ssm.dt_proj[k].T, -ssm.A_log[k].exp(), b.unsqueeze(2), c.unsqueeze(2), ssm.D[k],
                delta_bias=ssm.dt_bias[k], method="sequential",
            )  # fmt: skip
            sums[m][:, rows] += y
    return [cross.out_proj[m](sums[m] * F.silu(parts[m][1])) for m in range(2)]


@pytest.mark.parametrize("order", ["raster", "gilbert"])
def test_is_the_exchange_of_B_and_C(order):
    cross, x = CrossSSM(8, order, d_state=4), torch.randn(2, 2, 15, 8)
    with torch.no_grad():
        expected = by_steps(cross, x, scan_order(3, 5, order))
        for update, wanted in zip(cross.updates(*x, LAYOUT), expected):
            assert torch.allclose(update, wanted, atol=1e-5)


def test_several_dates_of_both():
    cross, x = CrossSSM(8, "interleave", d_state=4), torch.randn(2, 2, 12, 8)
    grid = (2, 2, 3)
    with torch.no_grad():
        expected = by_steps(cross, x, time_order(grid, "interleave"))
        assert torch.allclose(cross.updates(*x, TokenLayout(grid=grid))[1], expected[1], atol=1e-5)


def test_equal_modalities_are_vim_on_each():
    cross, vim = CrossSSM(8, d_state=4), Vim(8, d_state=4)
    with torch.no_grad():
        for m in range(2):
            cross.in_proj[m].weight.copy_(vim.in_proj.weight)
            cross.out_proj[m].weight.copy_(vim.out_proj.weight)
        cross.conv.weight.copy_(vim.conv.weight.repeat(1, 2))
        cross.conv.bias.copy_(vim.conv.bias.repeat(2))
        for name, p in vim.ssm.named_parameters():
            getattr(cross.ssm, name).copy_(p.repeat(2, *[1] * (p.ndim - 1)))
        layout = LAYOUT.replace(prefix=(("class", 1),))
        x = torch.randn(2, 16, 8)
        expected = vim(cross.norm[0](x), layout)
        for update in cross.updates(x, x, layout):
            assert torch.allclose(update, expected, atol=1e-5)
        assert torch.allclose(cross(x, x, layout), x + expected, atol=1e-5)


def test_the_other_modality_chooses_but_adds_no_content():
    cross = CrossSSM(8, d_state=4)
    ssm = cross.ssm
    u, other = torch.randn(2, 2, 9, 4, 16).unbind(0)
    with torch.no_grad():
        ssm.dt_proj.zero_()
        # with steps that stand still the scan is linear in its own input, whatever chooses
        assert torch.allclose(ssm(-2 * u, choice=other), -2 * ssm(u, choice=other), atol=1e-5)
        assert float(ssm(torch.zeros_like(u), choice=other).abs().max()) == 0
        # and quadratic in what chooses, but for the skip
        skip = ssm(u, choice=torch.zeros_like(other))
        assert torch.allclose(skip, ssm.D * u, atol=1e-6)
        tripled = ssm(u, choice=3 * other) - skip
        assert torch.allclose(tripled, 9 * (ssm(u, choice=other) - skip), atol=1e-4)
        assert float(tripled.abs().max()) > 1e-3


def test_every_token_hears_both_modalities_and_all_parameters_learn():
    cross = CrossSSM(8)
    a, b = torch.randn(2, 1, 15, 8, requires_grad=True).unbind(0)
    a.retain_grad(), b.retain_grad()
    out = cross(a, b, LAYOUT)
    out[0, 4].square().sum().backward()
    assert bool((a.grad[0].abs().sum(-1) > 0).all()) and bool((b.grad[0].abs().sum(-1) > 0).all())
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in cross.parameters())


def test_padding_changes_nothing():
    cross, layout = CrossSSM(8, "hilbert"), LAYOUT.replace(prefix=(("class", 1),))
    keep, x = torch.tensor([[1, 4, 7, 8, 13]]), torch.randn(2, 1, 6, 8)
    alone = cross(*x, layout.take(keep))
    more = layout.take(torch.cat([keep, torch.tensor([[2, 3, 5]])], 1))
    padded = more.replace(valid=torch.tensor([[True] * 5 + [False] * 3]))
    assert torch.allclose(cross(*torch.cat([x, torch.randn(2, 1, 3, 8)], 2), padded)[:, :6], alone, atol=1e-5)


def test_the_gate_is_the_mean_at_first_and_believes_either():
    fuse, a, b = GatedFusion(4), torch.randn(3, 4), torch.randn(3, 4)
    assert torch.allclose(fuse(a, b), (a + b) / 2, atol=1e-6)
    for bias, winner in ((50.0, a), (-50.0, b)):
        fuse.gate.bias.data.fill_(bias)
        assert torch.allclose(fuse(a, b), winner, atol=1e-6)


def test_bfloat16_and_errors():
    cross = CrossSSM(8).to(torch.bfloat16)
    out = cross(*torch.randn(2, 2, 15, 8, dtype=torch.bfloat16), LAYOUT)
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())
    with pytest.raises(BadInput, match="2×15×8 and 2×14×8"):
        CrossSSM(8)(torch.randn(2, 15, 8), torch.randn(2, 14, 8), LAYOUT)
    with pytest.raises(BadInput, match="parallel"):
        CrossSSM(8, "parallel")

"""The time-invariant scan: starts, the recurrence it stands for, and that it is a convolution."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.s4d import S4D, DiagonalSSM
from vitkit.models.scan_order import scan_order
from vitkit.testing import check_part
from vitkit.testing.checks import PLACES

GRID = (3, 5)
LAYOUT = TokenLayout(grid=GRID)


def by_steps(ssm, u):
    """The recurrence of the paper, step by step, over all states and their conjugates."""
    step = ssm.log_step.double().exp().unsqueeze(1)
    A = -ssm.A_log.double().exp() + 0j
    C = ssm.C.double()
    C = C.squeeze(-1) + 0j if ssm.A_imag is None else torch.view_as_complex(C)
    if ssm.A_imag is not None:
        A = A + 1j * ssm.A_imag.double()
        A, C = torch.cat([A, A.conj()], 1), torch.cat([C, C.conj()], 1)
    fade, gain = (step * A).exp(), ((step * A).exp() - 1) / A
    h, out = torch.zeros(len(u), *A.shape, dtype=A.dtype), []
    for u_t in u.double().unbind(1):
        h = fade * h + gain * u_t.unsqueeze(-1)
        y = (C * h).sum(-1)
        assert float(y.imag.abs().max()) < 1e-10
        out.append(y.real)
    return torch.stack(out, 1)


@pytest.mark.parametrize("init", ["lin", "inv", "real"])
def test_is_the_recurrence(init):
    ssm, u = DiagonalSSM(6, 8, init), torch.randn(2, 37, 6)
    with torch.no_grad():
        expected = by_steps(ssm, u)
        assert float((ssm(u) - expected).abs().max() / expected.abs().max()) < 1e-4
        assert float((ssm.double()(u.double()) - expected).abs().max()) < 1e-5


def test_starts_are_the_papers():
    lin, inv, real = (DiagonalSSM(2, 8, init) for init in ("lin", "inv", "real"))
    assert torch.allclose(lin.A_imag[0], math.pi * torch.arange(4.0))
    assert torch.allclose(-lin.A_log.exp(), torch.tensor(-0.5)) and torch.allclose(inv.A_log, lin.A_log)
    assert torch.allclose(inv.A_imag[1], torch.tensor([8 / math.pi * (8 / (2 * n + 1) - 1) for n in range(4)]))
    assert torch.allclose(-real.A_log.exp()[0], -torch.arange(1.0, 9)) and real.A_imag is None
    step = DiagonalSSM(500).log_step.detach().exp()
    assert 1e-3 <= float(step.min()) < 2e-3 and 0.05 < float(step.max()) <= 0.1
    spread = DiagonalSSM(200, 64).C.detach().square().sum(-1).mean()
    assert abs(float(spread) - 1) < 0.05
    assert lin.no_weight_decay() == {"log_step", "A_log", "A_imag"}


def test_is_linear_and_the_same_everywhere():
    ssm = DiagonalSSM(4).double()
    u, v = torch.randn(2, 2, 30, 4, dtype=torch.float64).unbind(0)
    with torch.no_grad():
        assert torch.allclose(ssm(2 * u - v), 2 * ssm(u) - ssm(v), atol=1e-10)
        later = ssm(F.pad(u, (0, 0, 3, 0)))
        assert torch.allclose(later[:, 3:], ssm(u), atol=1e-10) and float(later[:, :3].abs().max()) < 1e-12


@pytest.mark.parametrize("order", ["raster", "column_rev", "hilbert"])
@pytest.mark.parametrize(("prefix", "at"), [("first", 0), ("middle", 7), ("last", 15)])
def test_is_the_block_along_the_path(order, prefix, at):
    mixer = S4D(8, order, d_state=4, prefix=prefix, grid=GRID)
    path = (scan_order(*GRID, order) + 2).tolist()
    rows = [*path[:at], 0, 1, *path[at:]]
    x = torch.randn(2, 17, 8)
    with torch.no_grad():
        y = torch.empty_like(x)
        y[:, rows] = mixer.ssm(x[:, rows])
        gate = mixer.out_proj(F.gelu(y + mixer.D * x))
        expected = gate[..., :8] * gate[..., 8:].sigmoid()
        assert torch.allclose(mixer(x, LAYOUT.replace(prefix=(("class", 2),))), expected, atol=1e-5)


def test_both_directions_hear_all_and_one_hears_the_past():
    for bidirectional, heard in ((False, set(range(5))), (True, set(range(15)))):
        x = torch.randn(1, 15, 8, requires_grad=True)
        S4D(8, bidirectional=bidirectional)(x, LAYOUT)[0, 4].sum().backward()
        # what a Fourier transform leaves of nothing is rounding
        assert set((x.grad[0].abs().sum(-1) > 1e-5).nonzero()[:, 0].tolist()) == heard


@pytest.mark.parametrize("bidirectional", [False, True])
def test_padding_changes_nothing(bidirectional):
    mixer, layout = S4D(8, "hilbert", bidirectional), LAYOUT.replace(prefix=(("class", 1),))
    keep, x = torch.tensor([[1, 4, 7, 8, 13]]), torch.randn(1, 6, 8)
    alone = mixer(x, layout.take(keep))
    more = layout.take(torch.cat([keep, torch.tensor([[2, 3, 5]])], 1))
    valid = torch.tensor([[True] * 5 + [False] * 3])
    padded = mixer(torch.cat([x, torch.randn(1, 3, 8)], 1), more.replace(valid=valid))
    assert torch.allclose(padded[:, :6], alone, atol=1e-5)


@pytest.mark.parametrize("options", [{"init": "real", "d_state": 5}, {"bidirectional": True, "prefix": "attend"}])
def test_every_choice_conforms(options):
    assert not check_part(S4D, places=PLACES[:3], dynamo=False, **options).refused


def test_errors_say_what_is_allowed():
    with pytest.raises(BadInput, match="d_state=4"):
        S4D(8, d_state=3)
    with pytest.raises(UnknownName, match="lin"):
        S4D(8, init="line")
    with pytest.raises(BadInput, match="interleave"):
        S4D(8, "parallel")

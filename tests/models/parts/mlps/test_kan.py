from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BSpline

from vitkit import swap
from vitkit.models.build import build
from vitkit.models.parts.mlps import kan as kan_file
from vitkit.models.parts.mlps.kan import KAN, WAVELETS, SplineLinear, WaveletLinear, bspline_basis, mother_wavelet


@given(grid=st.integers(1, 8), low=st.floats(-4, 0), width=st.floats(0.5, 6))
def test_bases_are_scipys_and_sum_to_one(grid, low, width):
    layer = SplineLinear(2, 3, grid, (low, low + width))
    knots = layer.knots.double()
    x = torch.linspace(low + 1e-6, low + width - 1e-6, 50, dtype=torch.float64).unsqueeze(1).expand(-1, 2)
    bases = bspline_basis(x, knots)
    torch.testing.assert_close(bases.sum(-1), torch.ones(50, 2, dtype=torch.float64), atol=1e-5, rtol=0)
    for k in range(grid + 3):
        spline = BSpline(knots[0].numpy(), np.eye(grid + 3)[k], 3)
        np.testing.assert_allclose(bases[:, 0, k].numpy(), spline(x[:, 0].numpy()), atol=1e-6)


def test_without_splines_the_base_path_is_left():
    layer = SplineLinear(4, 3)
    x = torch.randn(5, 4)
    with torch.no_grad():
        layer.spline_weight.zero_()
    torch.testing.assert_close(layer(x), torch.nn.functional.silu(x) @ layer.base_weight.T)
    torch.nn.init.normal_(layer.spline_weight)
    with torch.no_grad():
        layer.spline_scale.zero_()
    torch.testing.assert_close(layer(x), torch.nn.functional.silu(x) @ layer.base_weight.T)


def test_the_layer_is_its_equation():
    layer = SplineLinear(3, 2, 4, (-2, 2)).double()
    torch.nn.init.normal_(layer.spline_weight)
    x = torch.randn(6, 3, dtype=torch.float64).clamp(-1.9, 1.9)
    expected = torch.zeros(6, 2, dtype=torch.float64)
    base, scale = layer.base_weight.detach(), layer.spline_scale.detach()
    for m in range(6):
        for o in range(2):
            for i in range(3):
                v = x[m, i]
                curve = BSpline(layer.knots[i].numpy(), layer.spline_weight[o, i].detach().numpy(), 3)(float(v))
                expected[m, o] += base[o, i] * v * torch.sigmoid(v) + scale[o, i] * float(curve)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("psi", WAVELETS)
def test_wavelets_have_mean_zero(psi):
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    y = mother_wavelet(psi, x)
    assert abs(torch.trapezoid(y, x)) < 1e-4 * torch.trapezoid(y.abs(), x)


def test_chunked_wavelets_equal_unchunked(monkeypatch):
    layer, x = WaveletLinear(7, 10), torch.randn(5, 7, requires_grad=True)
    torch.nn.init.normal_(layer.translation)
    whole = layer(x)
    whole.square().sum().backward()
    grads = [p.grad.clone() for p in (x, *layer.parameters())]
    layer.zero_grad()
    x.grad = None
    layer.norm.reset_running_stats()
    monkeypatch.setattr(kan_file, "BUFFER_BYTES", 3 * 5 * 7 * 4)
    parts = layer(x)
    torch.testing.assert_close(parts, whole)
    parts.square().sum().backward()
    for a, b in zip(grads, (x.grad, *(p.grad for p in layer.parameters()))):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("repeated", [False, True])
def test_grid_update_keeps_cubic_polynomials(repeated):
    """Also when half of the data are one value, where quantile knots would coincide."""
    layer = SplineLinear(2, 3, 5, (-1, 1))
    x = torch.rand(400, 2) * 1.6 - 0.8
    if repeated:
        x[:200] = 0.3
    coefficients = torch.randn(3, 2, 4, dtype=torch.float64)

    def cubic(values):
        powers = torch.stack([values.double() ** k for k in range(4)], dim=-1)
        return torch.einsum("mik,oik->mio", powers, coefficients)

    dense = torch.linspace(-0.999, 0.999, 200).unsqueeze(1).expand(-1, 2)
    with torch.no_grad():
        layer.spline_weight.copy_(layer._fit(dense, cubic(dense)).permute(2, 0, 1))
    error = layer.update_grid(x)
    assert error < 1e-5
    assert (layer.knots.diff(dim=1) > 0).all()
    inside = torch.linspace(float(x.min()) + 0.05, float(x.max()) - 0.05, 60).unsqueeze(1).expand(-1, 2)
    gap = (layer.splines(inside) - cubic(inside)).abs().max() / cubic(inside).abs().max()
    assert gap < 1e-4


def test_grid_update_keeps_a_fitted_sine():
    layer = SplineLinear(1, 1, 5, (-1, 1))
    dense = torch.linspace(-0.999, 0.999, 300).unsqueeze(1)
    with torch.no_grad():
        layer.spline_weight.copy_(layer._fit(dense, torch.sin(torch.pi * dense).unsqueeze(-1)).permute(2, 0, 1))
    x = torch.rand(500, 1).sqrt() * 1.8 - 0.9
    layer.update_grid(x)
    assert (layer.splines(x)[..., 0] - torch.sin(torch.pi * x)).abs().max() < 0.05


def test_a_single_spline_layer_learns_a_sine():
    torch.manual_seed(0)
    layer = SplineLinear(1, 1, 8, (-1, 1))
    x = torch.linspace(-1, 0.999, 200).unsqueeze(1)
    y = torch.sin(torch.pi * x)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure() < 1e-4


@pytest.mark.parametrize("kind", ["spline", "wavelet"])
def test_parameters_match_the_mlp(kind):
    model = build("vit_pico", img_size=16, in_chans=1, num_classes=3)
    mlp = sum(p.numel() for p in model.blocks[0].mlp.parameters())
    swap(model, "mlp", "kan", kind=kind)
    ours = sum(p.numel() for p in model.blocks[0].mlp.parameters())
    assert abs(ours / mlp - 1) < 0.06
    swap(model, "head", "kan", kind="spline")
    assert isinstance(model.head, SplineLinear)
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 3)


def test_padding_rows_do_not_enter_the_batch_statistics():
    model = build("vit_femto", img_size=16, in_chans=1, num_classes=3)
    swap(model, "mlp", "kan", kind="wavelet", where=0)
    mlp = model.blocks[0].mlp.train()
    assert isinstance(mlp, KAN)
    x, layout = model.embed(torch.rand(2, 1, 16, 16))
    plain = mlp(x, layout)
    valid = torch.cat([torch.ones(2, 64, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.bool)], dim=1)
    padded = mlp(torch.cat([x, 100 * torch.ones(2, 3, 64)], dim=1), layout.replace(valid=valid))
    torch.testing.assert_close(padded[:, :65], plain, atol=1e-5, rtol=1e-4)


def test_regularizer_reaches_the_loss():
    from vitkit.models.vit import collect_aux

    model = build("vit_femto", img_size=16, in_chans=1, num_classes=3, mlp=("kan", {"reg_weight": 0.1}))
    with collect_aux(model) as aux:
        model.train()(torch.rand(2, 1, 16, 16))
    assert sorted(aux) == [("kan", i) for i in range(4)]
    assert all(v > 0 for v in aux.values())


@pytest.mark.parametrize(
    "options", [{"kind": "fourier"}, {"kind": "wavelet", "psi": "haar"}, {"match": "x"}, {"grid_size": 0}]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        build("vit_femto", img_size=16, mlp=("kan", options))

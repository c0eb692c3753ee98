from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.interpolate import BSpline

from vitkit import swap
from vitkit.errors import BadInput
from vitkit.models.build import build
from vitkit.models.parts.mlps import kan as kan_file
from vitkit.models.parts.mlps.kan import (
    KAN,
    WAVELETS,
    SplineLinear,
    WaveletLinear,
    bspline_basis,
    mother_wavelet,
    report_outside,
)


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
    monkeypatch.setattr(kan_file, "CPU_BUFFER_BYTES", 3 * 5 * 7 * 4)
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


@pytest.mark.parametrize("psi", WAVELETS)
def test_the_wavelet_layer_is_its_equation(psi):
    torch.manual_seed(0)
    layer = WaveletLinear(3, 2, psi).double().eval().requires_grad_(False)
    for p in (layer.translation, layer.raw_scale, layer.norm.weight, layer.norm.bias):
        torch.nn.init.normal_(p)
    layer.norm.running_mean.normal_()
    x = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.zeros(5, 2, dtype=torch.float64)
    for m in range(5):
        for o in range(2):
            total = 0.0
            for i in range(3):
                scale = 0.01 + math.log1p(math.exp(float(layer.raw_scale[o, i])))
                total += float(layer.weight[o, i]) * wavelet((float(x[m, i] - layer.translation[o, i])) / scale, psi)
            norm = layer.norm
            total = (total - float(norm.running_mean[o])) / math.sqrt(float(norm.running_var[o]) + norm.eps)
            expected[m, o] = total * float(norm.weight[o]) + float(norm.bias[o])
    # Meyer's is read from a table
    torch.testing.assert_close(layer(x), expected, atol=2e-4 if psi == "meyer" else 1e-6, rtol=1e-6)


def wavelet(t, psi):
    """Written out from the definitions; Meyer's by numerical quadrature of its Fourier transform."""
    if psi == "dog":
        return -t * math.exp(-(t**2) / 2)
    if psi == "mexican_hat":
        return 2 / (math.sqrt(3) * math.pi**0.25) * (1 - t**2) * math.exp(-(t**2) / 2)
    if psi == "morlet":
        return math.cos(5 * t) * math.exp(-(t**2) / 2)
    if psi == "shannon":
        return (2 * np.sinc(2 * t) - np.sinc(t)) * math.exp(-(t**2) / 18)

    def transform(omega):
        def nu(u):
            return u**4 * (35 - 84 * u + 70 * u**2 - 20 * u**3)

        if omega < 4 * math.pi / 3:
            size = math.sin(math.pi / 2 * nu(3 * omega / (2 * math.pi) - 1))
        else:
            size = math.cos(math.pi / 2 * nu(3 * omega / (4 * math.pi) - 1))
        return size * math.cos(omega * (t - 0.5)) / math.pi

    return quad(transform, 2 * math.pi / 3, 8 * math.pi / 3, limit=200)[0]


def test_meyers_wavelet_is_orthonormal_to_its_shifts():
    t = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    wave = mother_wavelet("meyer", t)
    for shift in range(4):
        product = torch.trapezoid(wave * mother_wavelet("meyer", t - shift), t)
        assert float(product) == pytest.approx(float(shift == 0), abs=1e-4)


def test_meyers_wavelet_in_half_precision():
    x = torch.linspace(-4, 5, 200).bfloat16()
    torch.testing.assert_close(
        mother_wavelet("meyer", x).float(), mother_wavelet("meyer", x.float()), atol=5e-3, rtol=1e-2
    )


def test_an_export_does_not_spoil_the_table():
    kan_file._meyer_values.cache_clear()
    layer = WaveletLinear(4, 3, "meyer").eval()
    x = torch.randn(5, 4)
    torch.export.export(layer, (x,), strict=False)
    out = layer(x)
    assert type(out) is torch.Tensor
    torch.testing.assert_close(out, WaveletLinear.forward(layer.double(), x.double()).float())
    assert type(mother_wavelet("meyer", x)) is torch.Tensor


def test_wavelets_stay_within_their_buffer_on_a_cpu(monkeypatch):
    sizes = []
    wave = kan_file._wave
    monkeypatch.setattr(
        kan_file, "_wave", lambda rows, w, *a: sizes.append(rows.shape[0] * w.numel()) or wave(rows, w, *a)
    )
    layer = WaveletLinear(64, 48).eval()
    layer(torch.randn(1000, 64))
    assert len(sizes) > 1
    assert max(sizes) * 4 <= kan_file.CPU_BUFFER_BYTES


def test_one_row_is_normalised_by_the_running_statistics():
    layer = WaveletLinear(4, 3)
    layer.norm.running_mean.normal_()
    x = torch.randn(1, 4)
    expected = layer.eval()(x)
    before = layer.norm.running_mean.clone()
    torch.testing.assert_close(layer.train()(x), expected)
    assert torch.equal(layer.norm.running_mean, before)
    model = build("vit_femto", img_size=8, in_chans=1, num_classes=3)
    swap(model, "head", "kan", kind="wavelet")
    model.train()(torch.rand(1, 1, 8, 8)).sum().backward()


def test_coinciding_knots_are_no_division_by_zero():
    knots = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 3.0]])
    x = torch.linspace(0, 2.999, 50).unsqueeze(1).requires_grad_()
    bases = bspline_basis(x, knots)
    for k in range(7):
        spline = BSpline(knots[0].double().numpy(), np.eye(7)[k], 3)
        np.testing.assert_allclose(bases[:, 0, k].detach().numpy(), spline(x[:, 0].detach().numpy()), atol=1e-5)
    bases.square().sum().backward()
    assert torch.isfinite(x.grad).all()


def test_knots_that_moved_close_together_survive_half_precision():
    layer = SplineLinear(2, 3, 5, (-3, 3))
    x = torch.randn(400, 2)
    x[:200] = 1.7
    layer.update_grid(x)
    knots = layer.knots.clone()
    assert layer.bfloat16()(x.bfloat16()).isfinite().all()
    assert torch.equal(layer.float().knots, knots)


def test_an_input_that_does_not_vary_keeps_its_grid():
    layer = SplineLinear(3, 2, 5, (-3, 3))
    x = torch.randn(300, 3).clamp(-2.9, 2.9)
    x[:, 1] = 1.0
    knots, weight = layer.knots.clone(), layer.spline_weight.detach().clone()
    layer.update_grid(x)
    assert torch.equal(layer.knots[1], knots[1])
    assert torch.equal(layer.spline_weight[:, 1], weight[:, 1])
    assert not torch.equal(layer.knots[0], knots[0])
    assert layer(x).isfinite().all()
    assert layer.update_grid(x[:1]) == 0
    for wrong in (x[:0], torch.full((4, 3), torch.nan)):
        with pytest.raises(ValueError, match="at least one, all of them finite"):
            layer.update_grid(wrong)


def test_many_rows_cost_no_more_memory_than_some():
    layer = SplineLinear(1, 1, 5, (-1, 1))
    seen = []
    splines = layer.splines
    layer.splines = lambda x: seen.append(len(x)) or splines(x)
    layer.update_grid(torch.rand(100_000, 1) * 1.6 - 0.8)
    assert max(seen) < 1000


def test_grids_follow_the_data_before_the_chosen_epochs():
    model = build("vit_femto", img_size=8, in_chans=1, num_classes=3, mlp=("kan", {"adapt_epochs": 1}))
    layers = [layer for block in model.blocks for layer in block.mlp.layers]
    start = [layer.knots.clone() for layer in layers]
    images = torch.rand(4, 1, 8, 8)

    def tell(epoch):
        for module in model.modules():
            if hasattr(module, "on_epoch"):
                module.on_epoch(epoch, 3)

    tell(0)
    model.eval()(images)
    tell(1)  # evaluation leaves nothing to adapt to
    assert all(torch.equal(layer.knots, knots) for layer, knots in zip(layers, start))
    model.train()(images)
    outside = report_outside(model, images)
    assert list(outside)[:2] == ["blocks.0.mlp.layers.0", "blocks.0.mlp.layers.1"]
    tell(1)
    moved = [layer.knots.clone() for layer in layers]
    assert not any(torch.equal(a, b) for a, b in zip(start, moved))
    assert report_outside(model, images)["blocks.0.mlp.layers.0"] == 0 < max(outside.values())
    model.train()(images)
    tell(2)
    assert all(torch.equal(layer.knots, knots) for layer, knots in zip(layers, moved))
    assert model.training


def test_share_outside_the_grid():
    layer = SplineLinear(2, 1, 4, (-1, 1))
    x = torch.tensor([[-1.0, 1.0], [0.0, 2.0], [-1.5, 0.99], [0.5, 0.5]])
    assert layer.fraction_outside(x) == 3 / 8
    with pytest.raises(BadInput, match="no spline layers"):
        report_outside(build("vit_femto", img_size=8), torch.rand(1, 3, 8, 8))


def test_options_without_effect_are_refused():
    model = build("vit_femto", img_size=8)
    for slot, options in (
        ("head", {"reg_weight": 0.1}),
        ("mlp", {"kind": "wavelet", "reg_weight": 0.1}),
        ("mlp", {"kind": "wavelet", "adapt_epochs": 2}),
        ("mlp", {"reg_weight": -1.0}),
    ):
        with pytest.raises(ValueError, match="reg_weight"):
            swap(model, slot, "kan", **options)

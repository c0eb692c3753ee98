"""Shared convolutions of tokens: the linear layer they are, what they see, whose kernels they use."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput, UnknownName
from vitkit.models.shared_conv import ConvShape, Optics, SharedChain, SharedConv, squares
from vitkit.models.spec import NeedsFixedGrid


def loop(conv: SharedConv, x: torch.Tensor) -> torch.Tensor:
    """Every token, kernel and place by itself."""
    batch, num_tokens, _ = x.shape
    k, s, out = conv.kernel, conv.side, conv.out_side
    before = (k - 1) // 2 if conv.padding == "same" else 0
    y = torch.zeros(batch, num_tokens, conv.kernels, out, out, dtype=x.dtype)
    for b in range(batch):
        for i in range(num_tokens):
            token = x[b, i].view(conv.maps, s, s)
            weight = conv.weight if conv.tokens is None else conv.weight[i]
            bias = conv.bias if conv.tokens is None else conv.bias[i]
            for m in range(conv.kernels):
                for r in range(out):
                    for c in range(out):
                        total = bias[m].clone()
                        for dr in range(k):
                            for dc in range(k):
                                row, col = r + dr - before, c + dc - before
                                if 0 <= row < s and 0 <= col < s:
                                    total += (token[:, row, col] * weight[m, :, dr, dc]).sum()
                        y[b, i, m, r, c] = total
    return y.flatten(2)


@pytest.mark.parametrize("tokens", [None, 3])
@pytest.mark.parametrize(("padding", "kernel"), [("valid", 4), ("valid", 2), ("same", 3), ("same", 2), ("same", 4)])
def test_it_is_the_loop_of_its_equation(padding, kernel, tokens):
    torch.manual_seed(0)
    conv = SharedConv(2, 4, 3, kernel, padding, tokens).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    out = conv(x)
    assert out.shape == (2, 3, conv.out_features)
    with torch.no_grad():
        assert torch.allclose(out, loop(conv, x), atol=1e-12)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_large_maps_and_small_ones_take_two_ways_to_the_same(padding):
    torch.manual_seed(0)
    conv = SharedConv(2, 13, 3, 3, padding).double()
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 2 * 169, dtype=torch.float64)
    assert conv.side**2 > 16 * conv.kernel**2
    assert torch.allclose(conv(x), conv.to_linear()(x), atol=1e-12)


def test_a_full_valid_kernel_is_a_linear_layer():
    linear = torch.nn.Linear(64, 10)
    conv = SharedConv(1, 8, 10)
    assert conv.take(linear.weight, linear.bias)
    x = torch.randn(3, 5, 64)
    assert torch.allclose(conv(x), linear(x), atol=1e-6)
    # and what the correlation of a map with a kernel of its size gives
    maps = F.conv2d(x.view(15, 1, 8, 8), conv.weight, conv.bias).view(3, 5, 10)
    assert torch.allclose(conv(x), maps, atol=1e-5)
    assert not SharedConv(1, 8, 10, 4).take(linear.weight, linear.bias)
    assert not SharedConv(1, 8, 9).take(linear.weight, linear.bias)


@pytest.mark.parametrize(("padding", "kernel"), [("valid", 4), ("valid", 3), ("same", 3)])
def test_dense_form(padding, kernel):
    conv = SharedConv(2, 4, 5, kernel, padding)
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(2, 3, 32)
    assert torch.allclose(conv.to_linear()(x), conv(x), atol=1e-5)
    with pytest.raises(BadInput, match="only shared kernels"):
        SharedConv(1, 4, 5, tokens=3).to_linear()


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_same_padding_moves_nothing_beyond_half_a_kernel_or_between_tokens(kernel):
    conv = SharedConv(1, 6, 1, kernel, "same").double()
    x = torch.randn(1, 4, 36, dtype=torch.float64, requires_grad=True)
    row, col = 2, 3
    conv(x)[0, 1, row * 6 + col].backward()
    seen = x.grad[0].abs() > 0
    assert not seen[[0, 2, 3]].any()
    inside = seen[1].view(6, 6)
    reach = kernel // 2
    far = torch.ones(6, 6, dtype=torch.bool)
    far[max(0, row - reach) : row + reach + 1, max(0, col - reach) : col + reach + 1] = False
    assert inside[row, col] and not (inside & far).any()
    assert int(inside.sum()) == kernel**2


def test_shared_parameters_do_not_depend_on_the_number_of_tokens():
    shared, own = SharedConv(1, 4, 6, 3), SharedConv(1, 4, 6, 3, tokens=5)
    for num_tokens in (2, 5, 9):
        assert shared(torch.randn(1, num_tokens, 16)).shape == (1, num_tokens, 24)
    assert sum(p.numel() for p in own.parameters()) == 5 * sum(p.numel() for p in shared.parameters())
    with pytest.raises(NeedsFixedGrid, match="5 tokens one by one, but 4 came"):
        own(torch.randn(1, 4, 16))


def test_equal_own_kernels_are_shared_kernels():
    shared = SharedConv(1, 4, 6, 3)
    own = SharedConv(1, 4, 6, 3, tokens=5)
    with torch.no_grad():
        own.weight.copy_(shared.weight.expand_as(own.weight))
        own.bias.copy_(shared.bias.expand_as(own.bias))
    x = torch.randn(2, 5, 16)
    assert torch.allclose(own(x), shared(x), atol=1e-6)


@pytest.mark.parametrize(("padding", "kernel"), [("valid", 8), ("valid", 4), ("same", 3)])
def test_the_start_keeps_variances(padding, kernel):
    torch.manual_seed(0)
    # as many kernels as the first layer of a projection has
    conv = SharedConv(1, 8, {8: 64, 4: 3, 3: 1}[kernel], kernel, padding)
    deviation = conv(torch.randn(64, 20, 64)).detach().std()
    assert 0.5 < float(deviation) < 2.0


def test_projections_give_the_width_back():
    for kernel, padding, kind in (
        ("full", "valid", SharedConv),
        ("half", "valid", SharedChain),
        (3, "same", SharedConv),
    ):
        shape = ConvShape.of("x", 32, 2, kernel, padding)
        layer = shape.project(32)
        assert isinstance(layer, kind) and layer(torch.randn(2, 3, 32)).shape == (2, 3, 32)
        first, second = shape.expand(64)
        assert second(first(torch.randn(2, 3, 32))).shape == (2, 3, 32)
        assert first.out_features == second.in_features >= 64


def test_widths_that_are_no_squares_are_named():
    with pytest.raises(
        BadInput, match=r"width 192 is no square; the nearest are 169 and 196.*maps=3 \(3 maps of 8×8\)"
    ):
        ConvShape.of("conv-share", 192, 1, "full", "valid")
    with pytest.raises(BadInput, match="does not fill 2 square maps; maps=3 does"):
        ConvShape.of("conv-share", 192, 2, "full", "valid")
    with pytest.raises(BadInput, match="kernel=9 must be .* 1 to 8"):
        ConvShape.of("conv-share", 64, 1, 9, "valid")
    with pytest.raises(UnknownName, match="sane"):
        ConvShape.of("conv-share", 64, 1, 3, "sane")
    assert all(squares(n)[0] * squares(n)[1] ** 2 == n for n in range(1, 200))


def test_rounding_and_noise():
    x = torch.linspace(-1, 1, 101)
    assert torch.equal(Optics().blur(x, "input"), x)
    four = Optics(input_bits=4).blur(x, "input")
    assert len(four.unique()) == 15 and float((four - x).abs().max()) <= 0.5 / 7 + 1e-6
    noisy = Optics(kernel_noise=0.1, seed=3).blur(2 * torch.ones(20_000), "kernel") - 2
    assert float(noisy.std()) == pytest.approx(0.2, rel=0.05)
    again = Optics(kernel_noise=0.1, seed=3).blur(2 * torch.ones(20_000), "kernel") - 2
    assert torch.equal(noisy, again)
    leaf = x.clone().requires_grad_()
    Optics(input_bits=2).blur(leaf, "input").sum().backward()
    assert torch.allclose(leaf.grad, torch.ones(101))
    for wrong in ({"input_bits": 1}, {"detector_noise": -0.1}):
        with pytest.raises(BadInput):
            Optics(**wrong)

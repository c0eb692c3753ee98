"""All ones is the identity, and the filter is a circular convolution."""

import pytest
import torch

from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.global_filter import GlobalFilter


@pytest.mark.parametrize("grid", [(4, 4), (5, 7), (3, 6), (1, 1)])
def test_ones_are_the_identity(grid):
    part = GlobalFilter(3, grid)
    with torch.no_grad():
        part.weight.copy_(torch.tensor([1.0, 0.0]).expand_as(part.weight))
    x = torch.randn(2, grid[0] * grid[1], 3)
    torch.testing.assert_close(part(x, TokenLayout(grid=grid)), x, atol=1e-5, rtol=1e-5)


def test_equals_a_circular_convolution():
    h, w = 3, 5
    part = GlobalFilter(2, (h, w))
    x = torch.randn(1, h * w, 2)
    spectrum = torch.view_as_complex(part.weight.detach())
    kernel = torch.fft.irfft2(spectrum, s=(h, w), dim=(0, 1))
    cells, wanted = x.reshape(h, w, 2), torch.zeros(h, w, 2)
    for r in range(h):
        for c in range(w):
            for i in range(h):
                for j in range(w):
                    wanted[r, c] += kernel[i, j] * cells[(r - i) % h, (c - j) % w]
    torch.testing.assert_close(part(x, TokenLayout(grid=(h, w)))[0], wanted.reshape(-1, 2), atol=1e-5, rtol=1e-4)


def test_prefix_reads_all_tokens_and_patches_only_patches():
    part, layout = GlobalFilter(8, (2, 3), 2, 1), TokenLayout(grid=(2, 3), prefix=(("class", 1),))
    x = torch.randn(1, 7, 8, requires_grad=True)
    out = part(x, layout)
    (of_class,) = torch.autograd.grad(out[0, 0].sum(), x, retain_graph=True)
    (of_patch,) = torch.autograd.grad(out[0, 3].sum(), x)
    assert (of_class[0].abs().sum(-1) > 0).all()
    assert of_patch[0, 0].abs().sum() == 0 and (of_patch[0, 1:].abs().sum(-1) > 0).all()


def test_another_grid_interpolates_the_spectrum():
    part = GlobalFilter(2, (4, 4))
    with torch.no_grad():
        part.weight.copy_(torch.tensor([2.0, 0.0]).expand_as(part.weight))
    x = torch.randn(1, 42, 2)
    torch.testing.assert_close(part(x, TokenLayout(grid=(6, 7))), 2 * x, atol=1e-4, rtol=1e-4)


def test_half_precision_weights():
    part = GlobalFilter(2, (3, 5)).to(torch.bfloat16)
    assert part(torch.randn(1, 15, 2, dtype=torch.bfloat16), TokenLayout(grid=(3, 5))).dtype == torch.bfloat16

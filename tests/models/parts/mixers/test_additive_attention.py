"""The equation by loops; merged and padded tokens."""

import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import UnknownName
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.additive_attention import AdditiveAttention


@pytest.mark.parametrize("weights", ["softmax", "l2"])
def test_equals_the_equation(weights):
    part, x = AdditiveAttention(6, weights), torch.randn(2, 5, 6)
    out = part(x, TokenLayout(grid=(1, 5)))
    for b in range(2):
        q, k = part.q(x[b]), part.k(x[b])
        if weights == "l2":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        scores = torch.stack([q[n] @ part.w / 6**0.5 for n in range(5)])
        alpha = scores.softmax(0) if weights == "softmax" else scores / scores.norm()
        g = sum(alpha[n] * q[n] for n in range(5))
        for n in range(5):
            torch.testing.assert_close(out[b, n], part.proj(part.mix(g * k[n]) + q[n]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weights", ["softmax", "l2"])
def test_a_merged_token_counts_as_its_patches(weights):
    part = AdditiveAttention(6, weights)
    x = torch.randn(1, 4, 6)
    x[:, 1] = x[:, 0]
    layout = TokenLayout(grid=(1, 4))
    whole = part(x, layout)
    merged = part(x[:, 1:], layout.regroup(torch.tensor([[0, 0, 1, 2]]), 3))
    torch.testing.assert_close(merged, whole[:, 1:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("weights", ["softmax", "l2"])
def test_padding_does_not_matter(weights):
    part, x = AdditiveAttention(6, weights), torch.randn(1, 4, 6)
    valid = torch.tensor([[True, True, True, False]])
    layout = TokenLayout(grid=(1, 4), valid=valid)
    before = part(x, layout)[:, :3]
    x[:, 3] = 100.0
    torch.testing.assert_close(part(x, layout)[:, :3], before)


def test_unknown_weights():
    with pytest.raises(UnknownName):
        AdditiveAttention(6, "max")

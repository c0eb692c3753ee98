"""Cross-attention: fused equals explicit, empty rows stay put, and it starts as the self-attention it replaces."""

from __future__ import annotations

import math

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.cross_attention import CrossAttention, attend_from_prefix
from vitkit.models.layout import TokenLayout
from vitkit.models.vit import Attention


def slow(attention: CrossAttention, q_tokens, kv_tokens, bias=None, mask=None):
    heads, d = attention.num_heads, attention.head_dim
    q, (k, v) = attention.q(q_tokens), attention.kv(kv_tokens).chunk(2, -1)
    out = torch.zeros_like(q)
    for b in range(len(q)):
        for h in range(heads):
            at = slice(h * d, (h + 1) * d)
            for i in range(q.shape[1]):
                logits = k[b, :, at] @ q[b, i, at] / math.sqrt(d)
                if bias is not None:
                    logits = logits + bias[b, h, i]
                seen = torch.ones(k.shape[1], dtype=torch.bool) if mask is None else mask[b, h, i]
                if seen.any():
                    out[b, i, at] = logits[seen].softmax(0) @ v[b, seen][:, at]
    return attention.proj(out)


def tokens(seed: int, n: int, dim: int = 12) -> torch.Tensor:
    return torch.randn(2, n, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_equals_a_loop_fused_and_explicit(with_bias, with_mask):
    torch.manual_seed(0)
    attention = CrossAttention(12, 3, kv_dim=8)
    queries, keys = tokens(1, 4), tokens(2, 6, 8)
    bias = torch.randn(2, 3, 4, 6) if with_bias else None
    mask = torch.rand(2, 3, 4, 6) > 0.4 if with_mask else None
    if mask is not None:
        mask[..., 0] = True
    with torch.no_grad():
        fused = attention(queries, keys, bias, mask)
        explicit, weights = attention(queries, keys, bias, mask, need_weights=True)
        want = slow(attention, queries, keys, bias, mask)
    assert torch.allclose(fused, want, atol=1e-5) and torch.allclose(explicit, want, atol=1e-5)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 3, 4), atol=1e-6)
    if mask is not None:
        assert bool((weights[~mask] == 0).all())


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_query_without_keys_gets_nothing_and_no_nan(need_weights):
    attention = CrossAttention(12, 3)
    torch.nn.init.ones_(attention.proj.bias)
    queries, keys = tokens(1, 4).requires_grad_(), tokens(2, 6).requires_grad_()
    bias = torch.randn(2, 1, 4, 6, requires_grad=True)
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    mask[0, :, 1] = False
    out = attention(queries, keys, bias, mask, need_weights=need_weights)
    if need_weights:
        out, weights = out
        assert bool((weights[0, :, 1] == 0).all())
    assert bool((out[0, 1] == 0).all()) and bool((out[0, 0] != 0).any())
    out.square().sum().backward()
    for leaf in (queries, keys, bias, *attention.parameters()):
        assert bool(torch.isfinite(leaf.grad).all())
    assert bool((bias.grad[1] != 0).any()) and bool((queries.grad[0, 1] == 0).all())


def test_a_bias_that_learns_gets_the_same_gradient_fused_and_explicit():
    torch.manual_seed(0)
    attention, grads = CrossAttention(12, 3), []
    for need_weights in (False, True):
        strength = torch.ones(3, 1, 1, requires_grad=True)
        bias = strength * torch.randn(1, 1, 4, 6, generator=torch.Generator().manual_seed(4))
        out = attention(tokens(1, 4), tokens(2, 6), bias, need_weights=need_weights)
        (out[0] if need_weights else out).square().sum().backward()
        grads.append(strength.grad)
    assert torch.allclose(*grads, rtol=1e-4) and bool((grads[0] != 0).all())


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True}, {"qkv_bias": True, "qk_norm": True}])
def test_on_equal_tokens_it_starts_as_the_self_attention(options):
    norm = {"norm_layer": torch.nn.LayerNorm} if options.get("qk_norm") else {}
    old = Attention(12, num_heads=3, **options, **norm).eval()
    new = CrossAttention.like(old, 12, 4).eval()
    x, layout = tokens(3, 7), TokenLayout(grid=(2, 3), prefix=(("class", 1),))
    with torch.no_grad():
        assert torch.allclose(new(x, x), old(x, layout), atol=1e-6)
        assert torch.allclose(attend_from_prefix(new, x, layout, "it"), old(x, layout)[:, :1], atol=1e-6)


def test_refusals_name_what_fits():
    with pytest.raises(BadInput, match=r"use one of \[1, 2, 3, 4, 6, 12\]"):
        CrossAttention(12, 5)
    with pytest.raises(BadInput, match="here come 1"):
        attend_from_prefix(None, tokens(1, 7), TokenLayout(grid=(2, 3), prefix=(("class", 1),)), "degc")

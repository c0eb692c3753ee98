from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from vitkit.compress.merge import vtu
from vitkit.compress.merge.vtu import expand, remerge, rope_angles, rotate, vtu_attention
from vitkit.errors import BadInput


def problem(unique: int = 5, positions: int = 9, batch: int = 2, heads: int = 3, dim: int = 8, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, unique, dim, generator=generator, dtype=torch.float64) for _ in range(3))
    # every token stands somewhere
    rest = torch.randint(0, unique, (batch, positions - unique), generator=generator)
    source = torch.cat([torch.arange(unique).expand(batch, -1), rest], dim=1)
    order = torch.rand(batch, positions, generator=generator).argsort(1)
    return q, k, v, source.gather(1, order), rope_angles(torch.arange(positions), dim).double()


def naive(q, k, v, source, angles, allowed=None, pairs="half"):
    """The equation, one position and one frequency pair at a time."""
    batch, heads, _, dim = q.shape
    positions = source.shape[1]
    half = dim // 2
    pick = (lambda t, f: (t[f], t[f + half])) if pairs == "half" else (lambda t, f: (t[2 * f], t[2 * f + 1]))
    out = torch.zeros_like(v)
    for b in range(batch):
        for h in range(heads):
            groups: dict[int, list[torch.Tensor]] = {}
            for m in range(positions):
                scores = []
                for n in range(positions):
                    total = 0.0
                    for f in range(half):
                        q1, q2 = pick(q[b, h, source[b, m]], f)
                        k1, k2 = pick(k[b, h, source[b, n]], f)
                        delta = float(angles[m, f] - angles[n, f])
                        total += (q1 * k1 + q2 * k2) * math.cos(delta) + (q1 * k2 - q2 * k1) * math.sin(delta)
                    blocked = allowed is not None and not allowed[m, n]
                    scores.append(-math.inf if blocked else float(total) / math.sqrt(dim))
                weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
                seen = sum(w * v[b, h, source[b, n]] for n, w in enumerate(weights))
                groups.setdefault(int(source[b, m]), []).append(seen)
            for token, rows in groups.items():
                out[b, h, token] = torch.stack(rows).mean(0)
    return out


@pytest.mark.parametrize("impl", ["exact", "expand"])
@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_equation(impl, pairs, causal):
    q, k, v, source, angles = problem()
    allowed = torch.ones(9, 9, dtype=torch.bool).tril() if causal else None
    expected = naive(q, k, v, source, angles, allowed, pairs)
    out = vtu_attention(q, k, v, source, angles, allowed, impl, pairs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mask", ["none", "causal", "additive", "missing"])
def test_exact_equals_expand_rope_attend_mean(seed, mask):
    q, k, v, source, angles = problem(unique=11, positions=40, dim=16, seed=seed)
    q, k, v, angles = q.float(), k.float(), v.float(), angles.float()
    bias = None
    if mask == "causal":
        bias = torch.ones(40, 40, dtype=torch.bool).tril()
    elif mask == "additive":
        bias = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(seed))
    elif mask == "missing":
        source = source.clone()
        source[0, 7:20] = -1
    exact = vtu_attention(q, k, v, source, angles, bias, impl="exact")
    fast = vtu_attention(q, k, v, source, angles, bias, impl="expand")
    torch.testing.assert_close(exact, fast, rtol=1e-5, atol=1e-5)
    assert exact.shape == q.shape
    if mask == "none":
        full_q, full_k, full_v = (torch.stack([t[b][:, source[b]] for b in range(2)]) for t in (q, k, v))
        z = F.scaled_dot_product_attention(rotate(full_q, angles), rotate(full_k, angles), full_v)
        for b in range(2):
            for token in range(11):
                mean = z[b][:, source[b] == token].mean(1)
                torch.testing.assert_close(exact[b, :, token], mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["exact", "expand"])
def test_nothing_merged_is_ordinary_rope_attention(impl):
    q, k, v, _, angles = problem(unique=9, positions=9)
    cos, sin = angles.cos(), angles.sin()

    def turn(t):
        t1, t2 = t[..., :4], t[..., 4:]
        return torch.cat([t1 * cos - t2 * sin, t2 * cos + t1 * sin], -1)

    weights = (turn(q) @ turn(k).transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    out = vtu_attention(q, k, v, torch.arange(9).expand(2, -1), angles, impl=impl)
    torch.testing.assert_close(out, weights @ v, rtol=1e-9, atol=1e-9)


def test_a_permutation_of_unique_tokens_changes_nothing_else():
    q, k, v, source, angles = problem()
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1))
    back = order.argsort()
    out = vtu_attention(q, k, v, source, angles)
    permuted = vtu_attention(q[:, :, order], k[:, :, order], v[:, :, order], back[source], angles)
    torch.testing.assert_close(permuted[:, :, back], out)


def test_chunks_of_frequencies_add_up(monkeypatch):
    q, k, v, source, angles = problem()
    whole = vtu_attention(q, k, v, source, angles, impl="exact")
    monkeypatch.setattr(vtu, "_CHUNK", 1)
    torch.testing.assert_close(vtu_attention(q, k, v, source, angles, impl="exact"), whole)


@pytest.mark.parametrize("impl", ["exact", "expand"])
def test_tokens_without_a_position_and_blind_queries_stay_finite(impl):
    q, k, v, source, angles = problem()
    source = torch.where(source == 4, 0, source)
    allowed = torch.ones(9, 9, dtype=torch.bool)
    allowed[3] = False
    out = vtu_attention(q, k, v, source, angles, allowed, impl)
    assert out.isfinite().all()
    assert (out[:, :, 4] == 0).all()


@pytest.mark.parametrize("impl", ["exact", "expand"])
def test_angles_may_differ_between_images(impl):
    q, k, v, source, angles = problem()
    per_image = torch.stack([angles, angles * 2])
    out = vtu_attention(q, k, v, source, per_image, impl=impl)
    for b in range(2):
        one = slice(b, b + 1)
        torch.testing.assert_close(out[one], vtu_attention(q[one], k[one], v[one], source[one], per_image[b]))


def test_decoding_from_a_cache_of_expanded_keys():
    """Merged picture tokens first, then text: the last text token alone, against the cache, equals the whole pass."""
    q, k, v, source, angles = problem()
    source = torch.cat([source, torch.full((2, 1), 5)], dim=1)
    angles = rope_angles(torch.arange(10), 8).double()
    new = torch.randn(3, 2, 3, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    q_all, k_all, v_all = (torch.cat([t, n], dim=2) for t, n in zip((q, k, v), new))
    whole = vtu_attention(q_all, k_all, v_all, source, angles, torch.ones(10, 10, dtype=torch.bool).tril())
    cache_k = torch.cat([rotate(expand(k, source[:, :9]), angles[:9]), rotate(new[1], angles[9:])], dim=2)
    cache_v = torch.cat([expand(v, source[:, :9]), new[2]], dim=2)
    step = F.scaled_dot_product_attention(rotate(new[0], angles[9:]), cache_k, cache_v)
    torch.testing.assert_close(step, whole[:, :, 5:])


def test_remerge_undoes_expand():
    q, _, _, source, _ = problem()
    torch.testing.assert_close(remerge(expand(q, source), source, 5), q)


@pytest.mark.parametrize("impl", ["exact", "expand"])
def test_half_precision_gradients_and_compile(impl):
    q, k, v, source, angles = problem(dim=16)
    expected = vtu_attention(q, k, v, source, angles, impl=impl)
    low = vtu_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), source, angles, impl=impl)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), expected, rtol=0.1, atol=0.05)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    vtu_attention(*leaves, source, angles, impl=impl).square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in leaves)
    compiled = torch.compile(vtu_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, source, angles, impl=impl), expected)


def test_refusals():
    q, k, v, source, angles = problem()
    with pytest.raises(BadInput, match="'exact' or 'expand'"):
        vtu_attention(q, k, v, source, angles, impl="fast")
    with pytest.raises(BadInput, match="'half' or 'interleaved'"):
        vtu_attention(q, k, v, source, angles, pairs="thirds")
    with pytest.raises(BadInput, match="N=9"):
        vtu_attention(q, k, v, source, angles[:5])
    with pytest.raises(BadInput, match="long"):
        vtu_attention(q, k, v, source.int(), angles)
    with pytest.raises(BadInput, match="key heads"):
        vtu_attention(q, k[:, :1], v, source, angles)

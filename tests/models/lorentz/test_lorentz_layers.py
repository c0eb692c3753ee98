"""Lorentz layers: on the sheet behind every one, equal to their formulas, and flat in the limit."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput, UnknownName
from vitkit.models.lorentz import (
    LorentzActivation,
    LorentzAttention,
    LorentzDropout,
    LorentzLayerNorm,
    LorentzLinear,
    LorentzMlp,
    LorentzMLR,
    LorentzPatchEmbed,
    LorentzPositions,
    LorentzResidual,
    change_curvature,
    inner,
    lift,
)
from vitkit.models.lorentz.layers import start


def tokens(size=1.0, c=1.0, batch=2, num=6, features=18, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return lift((size * torch.randn(batch, num, features - 1, generator=generator)).to(dtype), c)


def on_the_sheet(x, c):
    return bool(((inner(x, x) + c).abs() <= 1e-4 * (c + x[..., 1:].square().sum(-1))).all())


LAYERS = {
    "linear": lambda: LorentzLinear(18, 11),
    "norm": lambda: LorentzLayerNorm(18),
    "activation": LorentzActivation,
    "dropout": lambda: LorentzDropout(0.5),
    "mlp": lambda: LorentzMlp(18, 40, 0.2),
    "attention": lambda: LorentzAttention(18, 3),
    "linear attention": lambda: LorentzAttention(18, 3, "linear"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("size", [1e-4, 1.0, 250.0])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast"])
def test_on_the_sheet_and_finite_at_any_norm_and_precision(name, size, mode):
    torch.manual_seed(0)
    layer = LAYERS[name]().train()
    if mode == "bfloat16":
        layer = layer.bfloat16()
    x = tokens(size, 2.0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        out = layer(x, 2.0)
    assert out.dtype == torch.float32 and torch.isfinite(out).all() and on_the_sheet(out, 2.0)
    out[..., 1:].sum().backward()
    assert torch.isfinite(x.grad).all() and all(torch.isfinite(p.grad).all() for p in layer.parameters())


@pytest.mark.parametrize("size", [1e-4, 1.0, 250.0])
def test_residuals_too(size):
    layer = LorentzResidual(27.5)
    x, y = tokens(size), tokens(1.0, seed=1)
    for a, b in ((x, y), (y, x), (x, x), (x, lift(-x[..., 1:], 1.0))):
        out = layer(a, b, 1.0)
        assert torch.isfinite(out).all() and on_the_sheet(out, 1.0)
        out.sum().backward()
    assert torch.isfinite(layer.log_weight.grad)


def test_linear_is_its_formula_and_starts_deaf_to_time():
    layer, x = LorentzLinear(18, 11), tokens(c=3.0)
    space = x @ layer.linear.weight.t() + layer.linear.bias
    assert torch.allclose(layer(x, 3.0), lift(space, 3.0), atol=1e-6)
    assert torch.allclose(layer(x, 3.0, 5.0), change_curvature(lift(space, 3.0), 3.0, 5.0), atol=1e-5)
    assert (layer.linear.weight[:, 0] == 0).all() and (layer.linear.weight[:, 1:] != 0).all()
    layer(x, 3.0).sum().backward()
    assert (layer.linear.weight.grad[:, 0] != 0).all()
    both = torch.nn.Linear(10, 3)
    start(both, 5)
    assert (both.weight[:, [0, 5]] == 0).all() and (both.weight[:, 1:5] != 0).all()


def test_norm_activation_and_dropout_act_on_space():
    x = tokens(3.0)
    assert torch.allclose(LorentzLayerNorm(18)(x, 1.0)[..., 1:], F.layer_norm(x[..., 1:], (17,)), atol=1e-6)
    assert torch.allclose(LorentzActivation(torch.relu)(x, 1.0), lift(x[..., 1:].relu(), 1.0))
    drop = LorentzDropout(0.5)
    assert drop.eval()(x, 1.0) is x
    dropped = drop.train()(x, 1.0)[..., 1:]
    assert 0.3 < float((dropped == 0).float().mean()) < 0.7
    assert torch.allclose(dropped[dropped != 0], 2 * x[..., 1:][dropped != 0])


@pytest.mark.parametrize("c", [1.0, 4.0])
def test_residual_is_its_formula(c):
    layer = LorentzResidual(2.5, learn_scale=True).double()
    with torch.no_grad():
        layer.log_weight.fill_(0.3)
    x, y = tokens(c=c, dtype=torch.float64), tokens(c=c, seed=1, dtype=torch.float64)
    m = x + math.exp(0.3) * y
    middle = c**0.5 * m / inner(m, m).abs().sqrt().unsqueeze(-1)
    assert torch.allclose(layer(x, y, c), lift(2.5 * middle[..., 1:], c))
    # a point with itself stays where it is
    assert torch.allclose(LorentzResidual()(x, x, c), x)
    with pytest.raises(BadInput, match="positive"):
        LorentzResidual(0.0)


@pytest.mark.parametrize("c", [1.0, 4.0])
def test_attention_is_a_loop(c):
    torch.manual_seed(0)
    layer = LorentzAttention(18, 3).double()
    torch.nn.init.normal_(layer.qkv.weight, std=0.3)
    torch.nn.init.normal_(layer.proj.weight, std=0.3)
    x = tokens(c=c, dtype=torch.float64)
    heads = []
    for h in range(3):
        rows = [slice(15 * part + 5 * h, 15 * part + 5 * h + 5) for part in range(3)]
        q, k, v = (lift(x @ layer.qkv.weight[r].t() + layer.qkv.bias[r], c) for r in rows)
        out = torch.zeros_like(v)
        for b in range(2):
            for i in range(6):
                logits = [(2 * c + 2 * inner(q[b, i], k[b, j])) / layer.log_scale.exp() for j in range(6)]
                weights = torch.stack(logits).softmax(0)
                mu = (weights[:, None] * v[b]).sum(0)
                out[b, i] = c**0.5 * mu / inner(mu, mu).abs().sqrt()
        heads.append(out)
    wanted = lift(layer.proj(torch.cat(heads, -1)), c)
    assert float(layer.log_scale.detach().exp()) == pytest.approx(15**0.5)
    for fused in (True, False):
        layer.fused_attn = fused
        assert torch.allclose(layer(x, c), wanted, atol=1e-9)


def test_fused_and_explicit_attention_agree_in_float32():
    torch.manual_seed(0)
    layer = LorentzAttention(68, 4)
    x = tokens(1.0, num=49, features=68).requires_grad_()
    found = []
    for fused in (True, False):
        layer.fused_attn = fused
        out = layer(x, 1.0)
        found.append((out, torch.autograd.grad(out[..., 1:].square().sum(), x)[0]))
    (fused_out, fused_grad), (out, grad) = found
    assert torch.allclose(fused_out, out, atol=1e-4) and torch.allclose(fused_grad, grad, atol=1e-3, rtol=1e-3)


def test_logits_are_never_above_zero_and_largest_where_query_is_key():
    layer = LorentzAttention(18, 3).double()
    q = lift(torch.randn(2, 3, 7, 5, dtype=torch.float64), 1.0)
    exact = (2 + 2 * (q.unsqueeze(-2) * q.unsqueeze(-3) * torch.tensor([-1.0, 1, 1, 1, 1, 1])).sum(-1)) / 15**0.5
    assert torch.allclose(layer.logits(q, q, 1.0), exact, atol=1e-9)
    assert (exact.argmax(-1) == torch.arange(7)).all() and (exact <= 1e-12).all()
    far = lift(450 * torch.randn(2, 3, 7, 5), 1.0)
    single = LorentzAttention(18, 3).logits(far, far, 1.0)
    assert far[..., 1:].norm(dim=-1).max() > 1000 and (single <= 0).all() and torch.isfinite(single).all()


def test_linear_attention_is_a_loop_and_needs_no_weights():
    torch.manual_seed(0)
    layer = LorentzAttention(18, 3, "linear", power=3.0).double()
    x = tokens(dtype=torch.float64)
    heads = []
    for h in range(3):
        rows = [slice(15 * part + 5 * h, 15 * part + 5 * h + 5) for part in range(3)]
        q, k, v = (x @ layer.qkv.weight[r].t() + layer.qkv.bias[r] for r in rows)
        q, k = (z.relu() + 1e-6 for z in (q, k))
        q, k = (z.norm(dim=-1, keepdim=True) / (z**3).norm(dim=-1, keepdim=True) * z**3 for z in (q, k))
        out = torch.zeros_like(v)
        for b in range(2):
            for i in range(6):
                near = torch.stack([q[b, i] @ k[b, j] for j in range(6)])
                out[b, i] = (near[:, None] * v[b]).sum(0) / near.sum() + layer.value(v[b, i])
        heads.append(lift(out, 1.0))
    assert torch.allclose(layer(x, 1.0), lift(layer.proj(torch.cat(heads, -1)), 1.0), atol=1e-9)
    with pytest.raises(BadInput, match="variant='full'"):
        layer.weights(x, 1.0)


def test_impossible_attention_is_refused():
    with pytest.raises(BadInput, match="multiple of 4"):
        LorentzAttention(18, 4)
    with pytest.raises(UnknownName, match="full"):
        LorentzAttention(18, 3, "ful")
    with pytest.raises(BadInput, match="power"):
        LorentzAttention(18, 3, "linear", power=0)
    with pytest.raises(BadInput, match="least"):
        LorentzLinear(1, 4)


@pytest.mark.parametrize("c", [1.0, 2.5])
def test_the_head_is_its_formula_and_antisymmetric(c):
    head, x = LorentzMLR(18, 4).double(), tokens(2.0, c, dtype=torch.float64)[:, 0]
    wanted = torch.zeros(2, 4, dtype=torch.float64)
    for k in range(4):
        a, z = head.a[k].detach(), head.z[k].detach()
        w_t, w_s = torch.sinh(a / c**0.5) * z.norm(), torch.cosh(a / c**0.5) * z
        beta = (w_s.square().sum() - w_t**2).sqrt()
        alpha = -w_t * x[:, 0] + x[:, 1:] @ w_s
        wanted[:, k] = alpha.sign() * beta * c**0.5 * torch.asinh(alpha / (beta * c**0.5)).abs()
    found = head(x, c)
    assert torch.allclose(found, wanted)
    with torch.no_grad():
        head.a.neg_()
        head.z.neg_()
    assert torch.allclose(head(x, c), -found)


def test_the_head_starts_in_its_bounds():
    for scale in (1.0, 5.0):
        head = LorentzMLR(101, 40, scale)
        assert 0.09 * scale < float(head.z.detach().abs().max()) <= 0.1 * scale
        assert float(head.a.detach().abs().max()) <= 0.1
    with pytest.raises(BadInput, match="0 classes"):
        LorentzMLR(8, 0)


def test_the_head_of_flat_space_is_a_plane_and_zero_normals_are_harmless():
    head = LorentzMLR(18, 4).double()
    c = 1e6
    x = tokens(1.0, c, dtype=torch.float64)[:, 0]
    plane = x[:, 1:] @ head.z.t() - head.a * head.z.norm(dim=1)
    assert torch.allclose(head(x, c), plane, atol=1e-3)
    with torch.no_grad():
        head.z.zero_()
    out = head(x, 1.0)
    out.sum().backward()
    assert (out == 0).all() and torch.isfinite(head.z.grad).all() and torch.isfinite(head.a.grad).all()


@pytest.mark.parametrize("c", [1.0, 3.0])
def test_patch_embedding_joins_the_points_of_the_window(c):
    embed = LorentzPatchEmbed(4, 3, 11).double()
    torch.nn.init.normal_(embed.proj.linear.weight, std=0.2)
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    found = embed(images, c)
    assert found.shape == (2, 6, 11)
    # the window in row 1, column 2
    pixels = lift(images[:, :, 4:8, 8:12].permute(0, 2, 3, 1), c)
    time = (pixels[..., 0].square().sum((1, 2)) - 15 * c).sqrt()
    joined = torch.cat([time[:, None], pixels[..., 1:].permute(0, 3, 1, 2).flatten(1)], 1)
    assert torch.allclose(found[:, 5], embed.proj(joined, c))
    with pytest.raises(BadInput, match="patches of 4"):
        embed(torch.randn(2, 3, 8, 10), c)


def test_positions_are_points_that_no_optimizer_can_spoil():
    positions = LorentzPositions((3, 4), 9)
    assert (
        positions(1.0).shape == (1, 12, 9) and on_the_sheet(positions(1.0), 1.0) and on_the_sheet(positions(4.0), 4.0)
    )
    assert torch.allclose(positions(1.0)[..., 1:].norm(dim=-1), torch.tensor(math.sinh(1)))
    optimizer = torch.optim.AdamW(positions.parameters(), lr=0.5, weight_decay=0.5)
    for _ in range(3):
        positions(1.0).square().sum().backward()
        optimizer.step()
    assert on_the_sheet(positions(1.0), 1.0)
    assert not torch.allclose(positions(1.0)[..., 0], positions.pos_embed[..., 0])


def test_the_mark_of_the_positions_survives_copies():
    positions = LorentzPositions(3, 9)
    other = LorentzPositions(3, 9)
    other.load_state_dict(positions.state_dict(), assign=True)
    made = [copy.deepcopy(positions), pickle.loads(pickle.dumps(positions)), other, copy.deepcopy(positions).double()]
    assert all(m.pos_embed.lorentz_c == 1.0 for m in made)

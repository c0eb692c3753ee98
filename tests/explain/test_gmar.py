from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vitkit.anatomy import Trace
from vitkit.compress.merge.tome import tome
from vitkit.errors import UnknownName
from vitkit.explain.attention_flow import fuse_heads, head_weights, trace_attention, transition
from vitkit.explain.gmar import gmar
from vitkit.explain.rollout import rollout
from vitkit.models.build import build
from vitkit.models.normalized import NormalizedModel
from vitkit.testing.checks import check_probe

IMAGES = torch.rand(3, 1, 20, 28, generator=torch.Generator().manual_seed(5))


def model(**options):
    torch.manual_seed(2)
    defaults = {"img_size": (20, 28), "patch_size": 4, "in_chans": 1, "num_classes": 4, "depth": 3}
    net = build("vit_femto", **{**defaults, **options})
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return NormalizedModel(net.eval(), [0.4], [0.3])


def random_grads(blocks, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, 5, 5, generator=generator) for _ in range(blocks)]


@pytest.mark.parametrize("num_heads", [1, 2, 4, 8])
def test_equal_weights_are_mean_rollout_to_the_bit_for_powers_of_two(num_heads):
    attention = torch.rand(3, num_heads, 17, 17, generator=torch.Generator().manual_seed(0)).softmax(-1)
    weights = head_weights([torch.zeros_like(attention)])[0]
    assert torch.equal(weights, torch.full((3, num_heads), 1 / num_heads))
    assert torch.equal(fuse_heads(attention, weights=weights), fuse_heads(attention, "mean"))


def test_equal_weights_are_mean_rollout_for_any_number_of_heads():
    attention = torch.rand(3, 3, 17, 17).softmax(-1)
    weights = head_weights([torch.ones_like(attention)])[0]
    torch.testing.assert_close(fuse_heads(attention, weights=weights), fuse_heads(attention, "mean"))


class _Constant(nn.Module):
    """A classifier whose logits do not react to its host."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return 0 * self.net(x) + torch.arange(4.0)


@pytest.mark.parametrize("scope", ["layer", "all"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_without_any_gradient_it_is_plain_rollout(scope, norm):
    net = _Constant(model())
    found = gmar(net, IMAGES, norm=norm, scope=scope)
    assert torch.equal(found.map, rollout(net, IMAGES).map)
    assert found.target.tolist() == [3, 3, 3]


@given(blocks=st.integers(1, 4), heads=st.integers(1, 5), seed=st.integers(0, 99), norm=st.sampled_from(["l1", "l2"]))
def test_weights_are_shares(blocks, heads, seed, norm):
    grads = random_grads(blocks, heads, seed)
    layer, everywhere = head_weights(grads, norm, "layer"), head_weights(grads, norm, "all")
    for w in (*layer, *everywhere):
        assert bool((w >= 0).all())
    for w in layer:
        torch.testing.assert_close(w.sum(1), torch.ones(2))
    torch.testing.assert_close(sum(w.sum(1) for w in everywhere), torch.full((2,), float(blocks)))
    size = (lambda g: g.abs().sum()) if norm == "l1" else (lambda g: g.pow(2).sum().sqrt())
    table = torch.tensor([[size(g[1, h]) for h in range(heads)] for g in grads])
    torch.testing.assert_close(torch.stack([w[1] for w in layer]), table / table.sum(1, keepdim=True))
    torch.testing.assert_close(torch.stack([w[1] for w in everywhere]), blocks * table / table.sum())


@given(seed=st.integers(0, 99), factor=st.floats(1e-30, 1e6), norm=st.sampled_from(["l1", "l2"]))
def test_the_unit_of_the_logit_does_not_matter(seed, factor, norm):
    grads = random_grads(3, 4, seed)
    for scope in ("layer", "all"):
        scaled = head_weights([factor * g for g in grads], norm, scope)
        torch.testing.assert_close(scaled, head_weights(grads, norm, scope), atol=1e-5, rtol=1e-4)


def test_equal_gradients_give_the_same_weights_in_both_scopes():
    grads = [torch.ones(2, 4, 5, 5) for _ in range(3)]
    assert torch.equal(torch.stack(head_weights(grads, "l1", "layer")), torch.stack(head_weights(grads, "l1", "all")))


def test_a_head_without_gradient_has_no_weight():
    grads = random_grads(2, 4, 0)
    grads[1][:, 2] = 0
    for norm in ("l1", "l2"):
        for scope in ("layer", "all"):
            assert head_weights(grads, norm, scope)[1][:, 2].tolist() == [0.0, 0.0]


def test_a_head_the_logit_does_not_depend_on_has_no_weight():
    net = model()
    head_dim = net.model.blocks[1].attn.head_dim
    with torch.no_grad():
        net.model.blocks[1].attn.proj.weight[:, 2 * head_dim : 3 * head_dim] = 0
    for scope in ("layer", "all"):
        weights = gmar(net, IMAGES, scope=scope).meta["head_weights"]
        assert weights[1][:, 2].tolist() == [0.0, 0.0, 0.0]
        assert bool((weights[1][:, [0, 1, 3]] > 0).all()) and bool((weights[0] > 0).all())


@pytest.mark.parametrize("scope", ["layer", "all"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_matches_the_definition(norm, scope):
    """Gradients by autograd through a forward written out here, one image at a time."""
    net, target = model(), torch.tensor([0, 3, 1])
    found = gmar(net, IMAGES, target, norm=norm, scope=scope)
    for b in range(3):
        net.zero_grad()
        with Trace(net, "blocks.*.attn.weights", grad=True) as trace:
            net(IMAGES[b : b + 1])[0, target[b]].backward()
        sites = [f"blocks.{i}.attn.weights" for i in range(3)]
        attention = [trace[s][0].detach().double() for s in sites]
        grads = [trace.grad(s)[0].double() for s in sites]
        size = (lambda g: g.abs().sum((1, 2))) if norm == "l1" else (lambda g: g.pow(2).sum((1, 2)).sqrt())
        sizes = torch.stack([size(g) for g in grads])
        weights = sizes / sizes.sum(1, keepdim=True) if scope == "layer" else 3 * sizes / sizes.sum()
        total = torch.eye(36, dtype=torch.float64)
        for a, w in zip(attention, weights):
            mixed = torch.einsum("hij,h->ij", a, w) + torch.eye(36, dtype=torch.float64)
            total = mixed / mixed.sum(1, keepdim=True) @ total
        torch.testing.assert_close(found.map[b].flatten().double(), total[0, 1:], atol=1e-6, rtol=1e-4)


def test_gradients_are_those_of_the_probabilities_of_attention():
    """Finite differences: moving one attention entry moves the logit by its gradient."""
    from vitkit.anatomy import Intervene

    net = model().double()
    images = IMAGES[:1].double()
    with torch.no_grad():
        before = net(images)[0, 1]
    seen = trace_attention(net, images, 1, grad=True)
    step = 1e-4

    def move(value, _):
        out = value.clone()
        out[0, 2, 0, 7] += step
        return out

    with torch.no_grad(), Intervene(net, {"blocks.1.attn.weights": move}):
        after = net(images)[0, 1]
    slope = seen.grads[1][0, 2, 0, 7].item()
    assert slope == pytest.approx(((after - before) / step).item(), rel=1e-2)


def test_every_image_has_its_own_target_in_one_backward():
    net, target = model(), torch.tensor([2, 0, 3])
    together = gmar(net, IMAGES, target)
    for b in range(3):
        alone = gmar(net, IMAGES[b : b + 1], target[b : b + 1])
        torch.testing.assert_close(together.map[b], alone.map[0])
    other = gmar(net, IMAGES, torch.tensor([1, 0, 3]))
    assert not torch.allclose(other.map[0], together.map[0]) and torch.allclose(other.map[1:], together.map[1:])
    torch.testing.assert_close(gmar(net, IMAGES, 2).map[0], together.map[0])


@pytest.mark.parametrize("scope", ["layer", "all"])
def test_transitions_sum_to_one(scope):
    seen = trace_attention(model(), IMAGES, grad=True)
    for attention, w in zip(seen.weights, head_weights(seen.grads, "l1", scope)):
        step = transition(fuse_heads(attention, weights=w))
        torch.testing.assert_close(step.sum(-1), torch.ones(step.shape[:-1]), atol=1e-5, rtol=0)


def test_it_is_the_same_function_as_weighted_rollout():
    net = model()
    for norm in ("l1", "l2"):
        assert torch.equal(gmar(net, IMAGES, norm=norm).map, rollout(net, IMAGES, head_fusion=f"gmar_{norm}").map)


def test_on_merged_tokens_and_frozen_weights():
    net, _ = tome(model(), r=6)
    net.requires_grad_(False)
    found = gmar(net, IMAGES)
    assert found.map.shape == (3, 5, 7) and bool((found.map > 0).all())
    assert not torch.allclose(found.map, rollout(net, IMAGES).map)


def test_unknown_options():
    with pytest.raises(UnknownName, match="norm"):
        gmar(model(), IMAGES, norm="l3")
    with pytest.raises(UnknownName, match="scope"):
        gmar(model(), IMAGES, scope="block")


def test_leaves_the_model_as_found():
    check_probe(gmar)

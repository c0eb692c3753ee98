"""Gyroscope attention: dense attention under a mask, its limits, its medians, and what it refuses."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vitkit
from vitkit.errors import BadInput, UnknownName
from vitkit.models.layout import LogitEdit, TokenLayout
from vitkit.models.parts.mixers.stga import STGA
from vitkit.models.parts.normalizers.sinkhorn import Sinkhorn
from vitkit.models.vit import Attention, ViT
from vitkit.testing import check_part

DIM, HEADS = 12, 3


def part(variant="full", seed=0, **options) -> STGA:
    torch.manual_seed(seed)
    made = STGA(DIM, num_heads=HEADS, qkv_bias=True)
    made.set_variant(variant, **options)
    torch.nn.init.normal_(made.qkv.weight, std=0.5)
    if variant == "diff":
        # where running statistics and the affine map are not trivial
        torch.nn.init.normal_(made.difference[0].weight)
        made.difference[1].running_mean.fill_(0.1)
        made.difference[1].running_var.fill_(0.6)
        torch.nn.init.constant_(made.difference[1].bias, 0.3)
    return made.eval()


def layout_of(t, h, w, prefix=0) -> TokenLayout:
    return TokenLayout(grid=(t, h, w), prefix=(("class", prefix),) if prefix else ())


def cut(mixer, x, t, n, prefix):
    """q, k, v (B, H, T, N, d) and prefix k, v."""
    q, k, v = mixer.heads(x)
    grid = [a[:, :, prefix:].unflatten(2, (t, n)) for a in (q, k, v)]
    return *grid, k[:, :, :prefix], v[:, :, :prefix]


def dense(mixer: Attention, x: torch.Tensor, t: int, n: int, prefix: int) -> torch.Tensor:
    """Plain attention over all rows, where patches of another date and another place are masked."""
    q, k, v = mixer.heads(x)
    date = torch.arange(t).repeat_interleave(n)
    place = torch.arange(n).repeat(t)
    allowed = torch.ones(prefix + t * n, prefix + t * n, dtype=torch.bool)
    allowed[prefix:, prefix:] = (date[:, None] == date) | (place[:, None] == place)
    logits = q @ k.transpose(-2, -1) * mixer.scale
    z = logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    return mixer.proj(z.transpose(1, 2).flatten(2))


@given(t=st.integers(2, 4), h=st.integers(1, 5), w=st.integers(1, 7), prefix=st.sampled_from([0, 1, 5]))
@settings(max_examples=25, deadline=None)
def test_equals_dense_attention_to_the_same_date_or_the_same_place(t, h, w, prefix):
    mixer, x = part(), torch.randn(2, prefix + t * h * w, DIM)
    with torch.no_grad():
        torch.testing.assert_close(
            mixer(x, layout_of(t, h, w, prefix)), dense(mixer, x, t, h * w, prefix), atol=1e-5, rtol=1e-5
        )


def test_gradients_equal_those_of_dense_attention():
    mixer, x = part().double(), torch.randn(2, 1 + 3 * 35, DIM, dtype=torch.float64)
    grads = []
    for call in (lambda a: mixer(a, layout_of(3, 5, 7, 1)), lambda a: dense(mixer, a, 3, 35, 1)):
        mixer.zero_grad()
        a = x.clone().requires_grad_()
        call(a).square().sum().backward()
        grads.append([a.grad, mixer.qkv.weight.grad.clone()])
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("variant", ["full", "diff"])
def test_logits_far_from_zero_stay_finite(variant):
    mixer = part(variant)
    x = (40 * torch.randn(1, 2 * 6, DIM)).requires_grad_()
    mixer(x, layout_of(2, 2, 3)).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("variant", ["full", "diff"])
@pytest.mark.parametrize("grid", [(5, 7), (1, 5, 7)])
def test_one_date_is_ordinary_attention(variant, grid):
    mixer, x = part(variant), torch.randn(2, 1 + 35, DIM)
    layout = TokenLayout(grid=grid, prefix=(("class", 1),))
    with torch.no_grad():
        expected = Attention.forward(mixer, x, TokenLayout(grid=(5, 7), prefix=(("class", 1),)))
        torch.testing.assert_close(mixer(x, layout), expected)


def test_one_place_is_ordinary_attention_over_dates():
    mixer, x = part(), torch.randn(2, 6, DIM)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x, layout_of(6, 1, 1)), Attention.forward(mixer, x, TokenLayout(grid=(6, 1))))


@pytest.mark.parametrize("variant", ["full", "diff"])
@pytest.mark.parametrize("prefix", [0, 5])
def test_rows_sum_to_one_and_no_token_counts_itself_twice(variant, prefix):
    mixer, x = part(variant), torch.randn(2, prefix + 4 * 6, DIM)
    q, k, v, pk, pv = cut(mixer, x, 4, 6, prefix)
    elsewhere, here = mixer.weights(q, k, pk)
    assert elsewhere.shape == (2, HEADS, 4, 6, 4 + prefix) and here.shape == (2, HEADS, 4, 6, 6)
    torch.testing.assert_close(elsewhere.sum(-1) + here.sum(-1), torch.ones(2, HEADS, 4, 6))
    assert (elsewhere[..., :4].diagonal(dim1=2, dim2=4) == 0).all()
    # what the fast path finds is what these weights give
    by_hand = torch.einsum("bhtnm,bhtmd->bhtnd", here, v)
    by_hand += torch.einsum("bhtns,bhsnd->bhtnd", elsewhere[..., :4], v)
    by_hand += torch.einsum("bhtnp,bhpd->bhtnd", elsewhere[..., 4:], pv)
    torch.testing.assert_close(mixer.gyroscope(q, k, v, pk, pv), by_hand, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["full", "diff"])
def test_dropout_drops_joint_weights(variant):
    mixer, x = part(variant), torch.randn(1, 3 * 6, DIM)
    layout = layout_of(3, 2, 3)
    mixer.attn_drop.p = 0.5
    quiet = mixer(x, layout)
    mixer.train()
    if variant == "diff":
        mixer.difference.eval()
    torch.manual_seed(0)
    mean = torch.stack([mixer(x, layout) for _ in range(1200)]).mean(0)
    torch.testing.assert_close(mean, quiet, atol=0.15, rtol=0)


def test_medians_are_exact_and_pass_gradients():
    mixer = part("diff")
    for t in (2, 3, 4, 5):
        q, k = torch.randn(2, 1, HEADS, t, 4, 4).unbind(0)
        q.requires_grad_()
        shared, _ = mixer._medians(q, k)
        middle = [
            torch.tensor([[[statistics.median_low(c) for c in zip(*dates)] for dates in zip(*head)] for head in a[0]])
            for a in (q.detach().tolist(), k.tolist())
        ]
        expected = middle[0] @ middle[1].transpose(-2, -1) * mixer.scale
        torch.testing.assert_close(shared[0], expected, atol=1e-5, rtol=1e-5)
        shared.sum().backward()
        # an element has a gradient where it is the median of its dates, and nowhere else
        hit = q.grad[0] != 0
        assert torch.equal(hit, q[0] == middle[0].unsqueeze(1))


def test_diff_has_the_logits_of_full_when_nothing_changes_and_its_change_is_zero():
    mixer = part("diff")
    torch.nn.init.zeros_(mixer.difference[1].bias)
    mixer.difference[1].running_mean.zero_()
    q, k = (torch.randn(2, HEADS, 1, 6, 4).expand(-1, -1, 5, -1, -1) for _ in range(2))
    ours = mixer.spatial_logits(q, k)
    mixer.variant = "full"
    torch.testing.assert_close(ours, mixer.spatial_logits(q, k))
    mixer.variant = "diff"
    q = q + torch.randn(2, HEADS, 5, 6, 4)
    assert not torch.allclose(mixer.spatial_logits(q, k)[:, :, 0], mixer.spatial_logits(q, k)[:, :, 1])


def test_change_is_a_loop_over_the_formula():
    mixer, (q, k) = part("diff"), torch.randn(2, 2, HEADS, 3, 4, 4)
    _, change = mixer._medians(q, k)
    weight, norm = mixer.difference[0].weight[0], mixer.difference[1]
    for b, h, t, n in torch.cartesian_prod(*map(torch.arange, (2, HEADS, 3, 4))).tolist():
        middle = torch.tensor([statistics.median(q[b, h, :, n, c].tolist()) for c in range(4)])
        raw = (q[b, h, t, n] - middle) @ weight
        scaled = (raw - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(change[b, h, t, n], scaled.relu(), atol=1e-5, rtol=1e-5)


def test_batch_statistics_in_training_and_running_ones_in_evaluation():
    mixer, (q, k) = part("diff"), torch.randn(2, 2, HEADS, 3, 4, 4)
    before = mixer.difference[1].running_mean.clone()
    mixer._medians(q, k)
    assert torch.equal(mixer.difference[1].running_mean, before)
    mixer.train()
    torch.nn.init.zeros_(mixer.difference[1].bias)
    mixer.difference[2] = torch.nn.Identity()
    _, change = mixer._medians(q, k)
    torch.testing.assert_close(change.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(change.var(unbiased=False), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert not torch.equal(mixer.difference[1].running_mean, before)


@pytest.mark.parametrize("variant", ["full", "diff"])
def test_every_weight_learns_from_clips(variant):
    mixer, x = part(variant).train(), torch.randn(2, 1 + 3 * 6, DIM)
    mixer(x, layout_of(3, 2, 3, 1)).square().sum().backward()
    assert all(bool((p.grad != 0).any()) for p in mixer.parameters())


@pytest.mark.parametrize("variant", ["full", "diff"])
@pytest.mark.parametrize("prefix", [0, 1])
def test_bfloat16_and_compiled_without_graph_breaks(variant, prefix):
    mixer, x, layout = part(variant), torch.randn(2, prefix + 2 * 35, DIM), layout_of(2, 5, 7, prefix)
    half = part(variant).to(torch.bfloat16)(x.to(torch.bfloat16), layout)
    assert half.dtype == torch.bfloat16
    assert (half.float() - mixer(x, layout)).abs().max() < 0.1
    torch._dynamo.reset()
    assert torch._dynamo.explain(mixer)(x, layout).graph_break_count == 0


def test_no_matrix_of_all_pairs_is_made():
    """Of 6 dates × 64 places: 384² numbers a head would be 147,456; the largest tensor has 6 · 64 · (64 + 6)."""
    mixer, biggest = part("diff"), 0
    q, k, v = torch.randn(3, 1, HEADS, 6, 64, 4)
    none = torch.zeros(1, HEADS, 0, 4)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    biggest = max(biggest, tensor.numel())
            return out

    with Watch(), torch.no_grad():
        mixer.gyroscope(q, k, v, none, none)
    # one matrix of places for all dates
    assert biggest <= HEADS * 64 * 64
    mixer.variant = "full"
    with Watch(), torch.no_grad():
        mixer.weights(q, k, none)
    assert biggest <= HEADS * 6 * 64 * 70 < HEADS * 384**2


@pytest.mark.parametrize("options", [{}, {"variant": "diff"}, {"scaled": False}])
def test_conforms(options):
    assert "preserves" in check_part(STGA, dynamo=False, **options).passed


def test_a_host_keeps_its_weights_and_runs_clips():
    model = ViT(img_size=(20, 28), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=4).eval()
    old = model.blocks[0].attn.qkv.weight.clone()
    record = vitkit.swap(model, "mixer", STGA, scaled=False)
    assert torch.equal(model.blocks[0].attn.qkv.weight[24:], old[24:])
    x, layout = model.embed(torch.randn(2, 3, 20, 28))
    clip = torch.cat([x, x[:, 1:].flip(1)], 1)
    out, _ = model.run(clip, layout.replace(grid=(2, 5, 7)))
    assert out.shape == (2, 71, 24) and out.isfinite().all()
    record.undo()
    assert torch.equal(model.blocks[0].attn.qkv.weight, old)


def test_unscaled_logits_are_those_of_the_authors():
    mixer, x = part(scaled=False), torch.randn(1, 2 * 6, DIM)
    q, k, *_ = cut(mixer, x, 2, 6, 0)
    raw_q, raw_k, _ = Attention.heads(mixer, x)
    expected = raw_q.unflatten(2, (2, 6)) @ raw_k.unflatten(2, (2, 6)).transpose(-2, -1)
    torch.testing.assert_close(mixer.spatial_logits(q, k), expected)


def test_refusals():
    mixer, x = part(), torch.randn(2, 2 * 6, DIM)
    with pytest.raises(UnknownName, match="'ful'"):
        part("ful")
    edit = LogitEdit("mask", "add", lambda q, k, layout: q.new_zeros(12, 12))
    with pytest.raises(BadInput, match="makes no matrix of all tokens"):
        mixer(x, layout_of(2, 2, 3).replace(edits=(edit,)))
    mixer.normalizer = Sinkhorn()
    with pytest.raises(BadInput, match="Sinkhorn"):
        mixer(x, layout_of(2, 2, 3))
    mixer.normalizer = None
    merged = layout_of(2, 2, 3).regroup(torch.arange(12).expand(2, -1) // 2, 6)
    with pytest.raises(ValueError, match="every cell of the 2×2×3 grid"):
        mixer(x[:, :6], merged)
    normed = ViT(img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=3, qk_norm=True)
    with pytest.raises(BadInput, match="scaled=False"):
        vitkit.swap(normed, "mixer", STGA, scaled=False)

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitkit.models.layout import LogitEdit, TokenLayout
from vitkit.models.vit import ViT, collect_aux

TINY = {
    "img_size": (20, 28),
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 7,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
}
VARIANTS = {
    "class token": {},
    "registers": {"reg_tokens": 4},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "layer scale": {"init_values": 1e-2},
    "q/k norm": {"qk_norm": True},
    "pre-norm (CLIP)": {"pre_norm": True},
    "deit3": {"no_embed_class": True, "init_values": 1e-4},
    "attention norm": {"scale_attn_norm": True},
    "one channel": {"in_chans": 1},
    "five channels": {"in_chans": 5},
    "map pooling": {"class_token": False, "global_pool": "map"},
    "dynamic size": {"dynamic_img_size": True},
}


def pair(**options) -> tuple[VisionTransformer, ViT]:
    torch.manual_seed(1)
    theirs = VisionTransformer(**{**TINY, **options}).eval()
    ours = ViT(**{**TINY, **options}).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_outputs_and_keys_as_timm(variant):
    theirs, ours = pair(**VARIANTS[variant])
    x = torch.randn(2, ours.in_chans, 20, 28)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-6, rtol=1e-5)


def test_same_initial_weights_as_timm_for_the_same_seed():
    torch.manual_seed(3)
    theirs = VisionTransformer(**TINY)
    torch.manual_seed(3)
    ours = ViT(**TINY)
    for (name, a), b in zip(theirs.state_dict().items(), ours.state_dict().values()):
        assert torch.equal(a, b), name


def test_gradients_equal_timms():
    theirs, ours = pair(reg_tokens=1)
    x = torch.randn(2, 3, 20, 28)
    theirs(x).square().sum().backward()
    ours(x).square().sum().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters()):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_forward_intermediates_equals_timms(options, output_fmt):
    theirs, ours = pair(**options)
    x = torch.randn(2, 3, 20, 28)
    arguments = {"indices": [0, 2], "norm": True, "output_fmt": output_fmt, "return_prefix_tokens": True}
    (a_last, a), (b_last, b) = theirs.forward_intermediates(x, **arguments), ours.forward_intermediates(x, **arguments)
    torch.testing.assert_close(b_last, a_last, atol=1e-6, rtol=1e-5)
    for one, other in zip(a, b, strict=True):
        for s, t in zip(one if isinstance(one, tuple) else [one], other if isinstance(other, tuple) else [other]):
            torch.testing.assert_close(t, s, atol=1e-6, rtol=1e-5)


def test_dynamic_size_interpolates_positions_like_timm():
    theirs, ours = pair(dynamic_img_size=True)
    x = torch.randn(2, 3, 32, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)


def test_attn_mask_and_causal_equal_timms():
    theirs, ours = pair()
    x, n = torch.randn(2, 3, 20, 28), 36
    mask = torch.rand(n, n) > 0.3
    mask.fill_diagonal_(True)
    torch.testing.assert_close(ours(x, attn_mask=mask), theirs(x, attn_mask=mask), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, is_causal=True), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_explicit_and_fused_attention_agree(dtype):
    _, ours = pair(reg_tokens=2)
    x = torch.randn(2, 3, 20, 28).to(dtype)
    ours = ours.to(dtype)
    fused = ours(x)
    for block in ours.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(ours(x), fused, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-2)


def test_checkpointing_gives_the_same_gradients():
    _, ours = pair()
    x = torch.randn(2, 3, 20, 28)
    ours.train()
    ours(x).sum().backward()
    plain = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    ours.set_grad_checkpointing(True)
    ours(x).sum().backward()
    for a, b in zip(plain, (p.grad for p in ours.parameters())):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)


def test_padding_rows_change_nothing():
    """Two garbage rows marked invalid must not reach any other row."""
    _, ours = pair(reg_tokens=1)
    images = torch.randn(2, 3, 20, 28)
    x, layout = ours.embed(images)
    garbage = 50 * torch.randn(2, 2, 32)
    valid = torch.cat([torch.ones(2, 35, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    padded, padded_layout = torch.cat([x, garbage], dim=1), layout.replace(valid=valid)
    for fused in (True, False):
        for block in ours.blocks:
            block.attn.fused_attn = fused
        out, out_layout = ours.run(padded, padded_layout)
        torch.testing.assert_close(ours.readout(out, out_layout), ours(images), atol=1e-5, rtol=1e-4)


def test_row_without_any_key_gives_zero_not_nan():
    ours = ViT(**TINY, class_token=False, global_pool="avg").eval()
    x, layout = ours.embed(torch.randn(2, 3, 20, 28))
    valid = torch.ones(2, 35, dtype=torch.bool)
    valid[1] = False
    for fused in (True, False):
        attn = ours.blocks[0].attn
        attn.fused_attn = fused
        q, k, v = attn.heads(x)
        out = attn.attend(q, k, v, x, layout.replace(valid=valid))
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out[1], attn.proj.bias.expand_as(out[1]))


def test_merging_equal_tokens_with_sizes_is_exact():
    """Two identical rows merged into one of size 2 give the same class token: softmax counts them by log size."""
    ours = ViT(**TINY).eval()
    x, layout = ours.embed(torch.randn(1, 3, 20, 28))
    x = torch.cat([x[:, :-1], x[:, -2:-1]], dim=1)
    full, _ = ours.run(x, layout)
    assign = torch.arange(35).unsqueeze(0).clamp(max=33)
    merged, _ = ours.run(x[:, :-1], layout.regroup(assign, 34))
    torch.testing.assert_close(merged[:, 0], full[:, 0], atol=1e-5, rtol=1e-4)


def test_average_pooling_weights_merged_tokens():
    ours = ViT(**TINY, class_token=False, global_pool="avg").eval()
    x, layout = torch.randn(2, 35, 32), TokenLayout(grid=(5, 7))
    assign = torch.arange(35).expand(2, -1).clamp(max=30)
    merged_layout = layout.regroup(assign, 31)
    rows = torch.cat([x[:, :30], x[:, 30:].mean(1, keepdim=True)], dim=1)
    torch.testing.assert_close(ours.pool_tokens(rows, merged_layout), x.mean(1), atol=1e-6, rtol=1e-5)


def test_logit_edits_add_before_set():
    ours = ViT(**TINY).eval()
    attn = ours.blocks[0].attn
    x, layout = ours.embed(torch.randn(1, 3, 20, 28))
    order = []

    def addition(q, k, _):
        order.append("add")
        return torch.zeros(1, 1, 1, 1)

    def setting(logits, _):
        order.append("set")
        return torch.zeros_like(logits)

    edits = (LogitEdit("blur", "set", setting), LogitEdit("bias", "add", addition))
    out = attn(x, layout.replace(edits=edits))
    _, _, v = attn.heads(x)
    uniform = attn.proj(v.mean(2, keepdim=True).expand_as(v).transpose(1, 2).flatten(2))
    assert order == ["add", "set"]
    torch.testing.assert_close(out, uniform, atol=1e-5, rtol=1e-4)


def test_skip_flags():
    ours = ViT(**TINY).eval()
    x, layout = ours.embed(torch.randn(1, 3, 20, 28))
    block = ours.blocks[0]
    attn = block.attn(block.norm1(x), layout)
    block.skip_attn = block.skip_mlp = False
    expected = block.mlp(block.norm2(attn), layout)
    torch.testing.assert_close(block(x, layout)[0], expected)


def test_patch_dropout_keeps_the_layout_right():
    ours = ViT(**TINY, patch_drop_rate=0.5).train()
    x, layout = ours.embed(torch.randn(2, 3, 20, 28))
    assert x.shape[1] == 1 + 17
    assert ((layout.source >= 0).sum(1) == 17).all()
    assert ours(torch.randn(2, 3, 20, 28)).shape == (2, 7)


class Penalty(nn.Module):
    takes_layout = True

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, layout):
        layout.aux["penalty", 0] = x.square().mean()
        return self.inner(x, layout)


def test_auxiliary_losses_are_collected_and_overwritten():
    ours = ViT(**TINY)
    ours.blocks[0].mlp = Penalty(ours.blocks[0].mlp)
    ours.set_grad_checkpointing(True)
    with collect_aux(nn.Sequential(ours)) as aux:
        ours(torch.randn(2, 3, 20, 28)).sum().backward()
    assert list(aux) == [("penalty", 0)]
    assert aux["penalty", 0].ndim == 0
    assert ours.aux_sink is None


def test_deepcopy_and_compile():
    _, ours = pair()
    x = torch.randn(2, 3, 20, 28)
    torch.testing.assert_close(copy.deepcopy(ours)(x), ours(x))
    explanation = torch._dynamo.explain(ours)(x)
    assert explanation.graph_break_count == 0


def test_export_round_trip():
    _, ours = pair()
    x = torch.randn(2, 3, 20, 28)
    program = torch.export.export(ours, (x,))
    torch.testing.assert_close(program.module()(x), ours(x), atol=1e-5, rtol=1e-4)


@given(h=st.integers(1, 5), w=st.integers(1, 5), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_regroup_keeps_sizes_and_sources(h, w, batch, seed):
    generator = torch.Generator().manual_seed(seed)
    n = h * w
    layout = TokenLayout(grid=(h, w))
    groups = int(torch.randint(1, n + 1, (1,), generator=generator))
    assign = torch.randint(0, groups, (batch, n), generator=generator)
    merged = layout.regroup(assign, groups)
    assert merged.sizes.sum(1).tolist() == [n] * batch
    one_hot = merged.source_map(batch, groups)
    assert (one_hot.sum(1) == 1).all()
    assert torch.equal(one_hot.sum(2).float(), merged.sizes)
    values = torch.randn(batch, groups, 3, generator=generator)
    torch.testing.assert_close(merged.unmerge(values), one_hot.transpose(1, 2).float() @ values)
    again = torch.randint(0, 2, (batch, groups), generator=generator)
    twice = merged.regroup(again, 2)
    assert torch.equal(twice.source, again.gather(1, assign))
    centre = (layout.coordinates().mean(0)).expand(batch, -1)
    weighted = (twice.coords * twice.sizes.unsqueeze(-1)).sum(1) / n
    torch.testing.assert_close(weighted, centre, atol=1e-5, rtol=1e-4)


def test_grid_only_parts_get_a_named_refusal():
    layout = TokenLayout(grid=(2, 2)).regroup(torch.tensor([[0, 0, 1, 1]]), 2)
    with pytest.raises(ValueError, match=r"DCT.*2×2"):
        layout.require_full_grid("DCT attention")


def test_timm_creates_the_presets():
    import vitkit.models.presets  # noqa: F401

    model = timm.create_model("vit_pico", img_size=28, in_chans=1, num_classes=10)
    assert type(model) is ViT
    assert model.patch_embed.grid_size == (7, 7)

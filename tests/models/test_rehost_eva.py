from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from timm.layers import AttentionRope, PatchDropoutWithIndices, RmsNorm
from timm.models.eva import Eva, EvaAttention
from torch import nn

from vitkit import build, rehost, swap
from vitkit.anatomy import Intervene, Trace, check, decompose_residual, linear_groups, roles, zero
from vitkit.compress.merge.tome import tome
from vitkit.compress.walker import BlockWalker
from vitkit.errors import BadInput
from vitkit.models.io import ModelConfig, construct, load_model, save_model
from vitkit.models.layout import TokenLayout
from vitkit.models.normalized import NormalizedModel
from vitkit.models.rehost_eva import EvaViT
from vitkit.models.vit import ViT
from vitkit.pretrain.mae import MAE

TINY = {
    "img_size": (20, 28),
    "patch_size": 4,
    "in_chans": 3,
    "num_classes": 7,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 4,
}
ROPE = {"use_rot_pos_emb": True}
DINO = {
    **ROPE,
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "rope_temperature": 100.0,
    "num_reg_tokens": 4,
    "use_abs_pos_emb": False,
    "qkv_bias": False,
    "init_values": 0.1,
    "use_fc_norm": False,
}
VARIANTS = {
    "EVA": {},
    "EVA-02": {**ROPE, "swiglu_mlp": True, "scale_mlp": True, "qkv_fused": False, "ref_feat_shape": (4, 4)},
    "gated MLP in one": {**ROPE, "swiglu_mlp": True, "init_values": 0.1, "use_post_transformer_norm": True},
    "aligned SwiGLU": {**ROPE, "swiglu_mlp": True, "swiglu_align_to": 16, "mlp_ratio": 2.7},
    "inner norms": {**ROPE, "scale_attn_inner": True, "qk_norm": True, "scale_mlp": True},
    "no biases": {**ROPE, "qkv_bias": False, "norm_layer": partial(RmsNorm, eps=1e-6)},
    "axial RoPE-ViT": {**ROPE, "attn_type": "rope", "use_abs_pos_emb": False, "rope_grid_indexing": "xy"},
    "mixed RoPE-ViT": {
        **ROPE,
        "rope_type": "mixed",
        "attn_type": "rope",
        "rope_grid_indexing": "xy",
        "global_pool": "token",
    },
    "DINOv3": DINO,
    "DINOv3, any size": {**DINO, "dynamic_img_size": True},
    "Perception Encoder": {
        **ROPE,
        "global_pool": "map",
        "attn_type": "rope",
        "use_pre_transformer_norm": True,
        "ref_feat_shape": (4, 6),
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "attn_pool_num_heads": 2,
    },
    "M-RoPE": {**ROPE, "rope_type": "mrope", "rope_mrope_section": (1, 1, 1), "no_embed_class": True},
    "grouped queries": {
        **ROPE,
        "attn_type": "rope",
        "num_kv_heads": (2, 4, 1),
        "qkv_fused": False,
        "qk_norm": True,
        "attn_only_layer_scale": True,
        "init_values": 0.1,
    },
    "no class token": {**ROPE, "class_token": False, "num_reg_tokens": 2, "global_pool": "max"},
}


def eva(variant="EVA-02", **options) -> Eva:
    torch.manual_seed(1)
    model = Eva(**{**TINY, **VARIANTS[variant], **options}).eval()
    for name, p in model.named_parameters():  # fresh biases are zero and the fresh head is nearly so
        if "rope" not in name:
            # attention must not be uniform, or positions would not show
            nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return model


def images(batch=2, height=20, width=28):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_function_and_gradients_from_the_same_tensors(variant):
    theirs = eva(variant)
    ours, x = rehost(theirs), images()
    assert isinstance(ours, EvaViT)
    assert isinstance(ours, ViT)
    assert {id(p) for p in ours.parameters()} == {id(p) for p in theirs.parameters()}
    check(ours)
    expected = theirs(x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.forward_features(x), theirs.forward_features(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.forward_head(ours.forward_features(x)), expected, atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    grads = [(p, p.grad) for p in theirs.parameters()]
    theirs.zero_grad()
    ours(x).square().sum().backward()
    for p, grad in grads:
        torch.testing.assert_close(p.grad, grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("variant", ["EVA-02", "mixed RoPE-ViT", "DINOv3"])
def test_intermediates_masks_and_causal_attention_equal_timms(variant):
    theirs = eva(variant)
    ours, x = rehost(theirs), images()
    for arguments in ({"output_fmt": "NLC"}, {"indices": [0, 2], "norm": True, "return_prefix_tokens": True}):
        (a_last, a), (b_last, b) = (m.forward_intermediates(x, **arguments) for m in (theirs, ours))
        torch.testing.assert_close([b_last, *b], [a_last, *a], atol=1e-5, rtol=1e-5)
    n = 35 + theirs.num_prefix_tokens
    mask = torch.rand(n, n) > 0.3
    mask.fill_diagonal_(True)
    torch.testing.assert_close(ours(x, attn_mask=mask), theirs(x, attn_mask=mask), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, is_causal=True), atol=1e-5, rtol=1e-4)


NAMES = {
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch16_clip_224": {"embed_dim": 64, "num_heads": 2},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "vit_betwixt_patch16_rope_reg4_gap_256": {"embed_dim": 64, "num_heads": 2},
    "vit_small_patch16_dinov3_qkvb": {"global_pool": "token"},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_pe_spatial_tiny_patch16_512": {},
    "sapiens2_100m": {"num_kv_heads": 6},
}


@pytest.mark.parametrize("name", [n for n in NAMES if timm.is_model(n)])
def test_models_of_timm_by_name(name):
    size = 28 if "patch14" in name else 32
    options = {"img_size": size, "num_classes": 3, "depth": 2, **NAMES[name]}
    ours = build(name, **options)
    assert isinstance(ours, EvaViT)
    theirs = timm.create_model(name, **options).eval()
    theirs.load_state_dict(ours.timm_state_dict())
    x = images(2, size, size)
    torch.testing.assert_close(ours.eval()(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["axial RoPE-ViT", "mixed RoPE-ViT", "DINOv3", "M-RoPE"])
def test_training_draws_the_same_coordinate_jitter_dropout_and_depth_as_timm(variant):
    jitter = {"rope_shift_coords": 0.3, "rope_jitter_coords": 1.5, "rope_rescale_coords": 2.0}
    theirs = eva(variant, **jitter, pos_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.3).train()
    ours, x = rehost(theirs), images()
    assert ours.training
    outputs = []
    for model in (theirs, ours, ours):
        torch.manual_seed(8)
        outputs.append(model(x))
    torch.testing.assert_close(outputs[1], outputs[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[2], outputs[1])
    theirs.eval()
    with torch.no_grad():
        moved = (ours.eval()(x) - outputs[1]).abs().max()
    assert moved > 1e-3


@pytest.mark.parametrize("variant", ["EVA-02", "mixed RoPE-ViT", "DINOv3", "M-RoPE"])
def test_a_permuted_image_gives_the_same_logits_when_its_layout_is_permuted_too(variant):
    ours = rehost(eva(variant))
    x, layout = ours.embed(images())
    prefix, order = layout.num_prefix, torch.stack([torch.randperm(35), torch.randperm(35)])
    rows = x[:, prefix:].gather(1, order.unsqueeze(-1).expand(-1, -1, 32))
    moved, moved_layout = torch.cat([x[:, :prefix], rows], dim=1), layout.take(order).replace(sizes=None)
    expected = ours.readout(*ours.run(x, layout))
    torch.testing.assert_close(ours.readout(*ours.run(moved, moved_layout)), expected, atol=1e-4, rtol=1e-4)
    # and a layout that does not follow the tokens is another image
    assert (ours.readout(*ours.run(moved, layout)) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["EVA-02", "mixed RoPE-ViT", "DINOv3"])
def test_patch_dropout_keeps_the_rotation_of_every_token(variant):
    theirs = eva(variant, patch_drop_rate=0.5).train()
    assert isinstance(theirs.patch_drop, PatchDropoutWithIndices)
    ours, x = rehost(theirs), images()
    kept = torch.stack([torch.randperm(35)[:17].sort().values for _ in range(2)])
    tokens, layout = rehost(eva(variant)).embed(x)
    prefix = layout.num_prefix
    rows = tokens[:, prefix:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 32))
    dropped = torch.cat([tokens[:, :prefix], rows], dim=1), layout.take(kept).replace(sizes=None)

    class Keep(nn.Module):
        def forward(self, y):
            inner = y[:, prefix:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 32))
            return torch.cat([y[:, :prefix], inner], dim=1), kept

    theirs.patch_drop = Keep()
    torch.testing.assert_close(ours.readout(*ours.run(*dropped)), theirs(x), atol=1e-4, rtol=1e-4)
    assert ours.embed(x)[0].shape[1] == prefix + 17


def test_padding_rows_change_nothing():
    ours = rehost(eva())
    x, layout = ours.embed(images())
    valid = torch.cat([torch.ones(2, 35, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    padded = torch.cat([x, 50 * torch.randn(2, 2, 32)], dim=1)
    out, out_layout = ours.run(padded, layout.replace(valid=valid))
    torch.testing.assert_close(ours.readout(out, out_layout), ours(images()), atol=1e-5, rtol=1e-4)


def test_prompts_are_prefix_tokens_and_not_turned():
    ours = rehost(eva())
    x, layout = ours.embed(images())
    longer = layout.with_prefix("prompt", 3)
    prompted = torch.cat([x[:, :1], torch.randn(2, 3, 32), x[:, 1:]], dim=1)
    attn = ours.blocks[0].attn
    turned = attn.position[0].rotate(*attn.heads(x)[:2], layout)
    for a, b, plain in zip(
        turned, attn.position[0].rotate(*attn.heads(prompted)[:2], longer), attn.heads(prompted)[:2]
    ):
        torch.testing.assert_close(b[:, :, 4:], a[:, :, 1:])
        assert torch.equal(b[:, :, :4], plain[:, :, :4])


def test_merging_runs_on_every_pooling_and_tables_are_made_only_when_tokens_moved(monkeypatch):
    from vitkit.models.parts.positions import rope

    made = []
    table = rope._table
    monkeypatch.setattr(rope, "_table", lambda *args: made.append(args[1].coords is None) or table(*args))
    x = images()
    for variant in ("EVA-02", "mixed RoPE-ViT", "Perception Encoder"):
        ours = rehost(eva(variant), check=False)
        made.clear()
        ours(x)
        assert made == [True]
        merged, change = tome(NormalizedModel(ours, [0.5] * 3, [0.2] * 3), r=4)
        made.clear()
        out = merged(x)
        assert made == [True, False, False]
        assert change.details["tokens"] == [35, 31, 27, 23]
        assert torch.isfinite(out).all()
        assert out.shape == (2, 7)


def test_attention_pooling_counts_a_merged_token_for_all_its_patches():
    ours = rehost(eva("Perception Encoder"))
    x, layout = torch.randn(2, 36, 32), TokenLayout(grid=(5, 7), prefix=(("class", 1),))
    x[:, 32:] = x[:, 31:32]
    short = layout.regroup(torch.arange(35).expand(2, -1).clamp(max=30), 31)
    torch.testing.assert_close(ours.pool_tokens(x[:, :32], short), ours.pool_tokens(x, layout), atol=1e-5, rtol=1e-4)
    valid = torch.arange(35).expand(2, -1) < 20
    hidden = ours.pool_tokens(torch.cat([x[:, :21], 9 + x[:, 21:]], 1), layout.replace(valid=valid))
    torch.testing.assert_close(hidden, ours.attn_pool(x[:, :21]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["EVA-02", "gated MLP in one", "DINOv3", "grouped queries"])
def test_every_call_point_is_seen_with_its_shape(variant):
    theirs = eva(variant)
    ours, x = rehost(theirs), images()
    fused = ours(x)
    with Trace(ours, "*") as trace:
        explicit = ours(x)
    torch.testing.assert_close(explicit, fused, atol=1e-5, rtol=1e-4)
    n, hidden = 35 + ours.num_prefix_tokens, ours.blocks[0].mlp.fc2.in_features
    shapes = {
        "attn.q": (2, 4, n, 8),
        "attn.k": (2, 4, n, 8),
        "attn.weights": (2, 4, n, n),
        "attn.z": (2, n, 4, 8),
        "mlp.hidden": (2, n, hidden),
        "resid_post": (2, n, 32),
    }
    assert {site: tuple(trace[f"blocks.1.{site}"].shape) for site in shapes} == shapes
    torch.testing.assert_close(trace["blocks.2.attn.weights"].sum(-1), torch.ones(2, 4, n))
    with Intervene(ours, {"blocks.*.mlp.hidden": zero()}), Trace(ours, "blocks.0.mlp.out") as trace:
        ours(x)
    bias = ours.blocks[0].mlp.fc2.bias
    expected = ours.blocks[0].ls2(bias.detach()).expand(2, n, 32)
    torch.testing.assert_close(trace["blocks.0.mlp.out"], expected)


def test_the_residual_stream_is_the_sum_of_its_writers():
    ours = rehost(eva("DINOv3"))
    parts = decompose_residual(ours, images())
    torch.testing.assert_close(parts.units.sum(2), parts.stream, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="standard residual block"):
        decompose_residual(rehost(eva("inner norms")), images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("variant", ["EVA-02", "mixed RoPE-ViT", "DINOv3"])
def test_other_precisions_equal_timms(variant, dtype):
    theirs = eva(variant).to(dtype)
    ours, x = rehost(theirs), images().to(dtype)
    torch.testing.assert_close(ours(x), theirs(x), atol=3e-2 if dtype == torch.bfloat16 else 1e-9, rtol=1e-2)
    x, layout = ours.embed(x)
    out, _ = ours.run(x, layout.take(torch.arange(35).expand(2, -1)))
    assert out.dtype == dtype


@pytest.mark.parametrize("variant", ["EVA", "DINOv3, any size", "mixed RoPE-ViT"])
def test_other_image_sizes(variant):
    theirs = eva(variant, dynamic_img_size=True)
    ours, x = rehost(theirs), images(2, 32, 16)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-5)
    fixed = eva(variant, dynamic_img_size=False)
    ours = copy.deepcopy(rehost(fixed))
    for model in (fixed, ours):
        model.set_input_size((32, 16))
    check(ours)
    torch.testing.assert_close(ours(x), fixed(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["EVA-02", "DINOv3", "mixed RoPE-ViT", "grouped queries"])
def test_state_dicts_go_both_ways(variant):
    theirs, x = eva(variant), images()
    ours = rehost(eva(variant))
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.3)
    wrapped = NormalizedModel(ours, [0.0] * 3, [1.0] * 3)
    wrapped.load_state_dict(
        {f"model.{k}": v for k, v in theirs.state_dict().items()} | {"mean": wrapped.mean} | {"std": wrapped.std}
    )
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    assert list(dict(ours.named_parameters())) == [k for k in ours.state_dict() if k in dict(ours.named_parameters())]
    again = Eva(**{**TINY, **VARIANTS[variant]}).eval()
    again.load_state_dict(ours.timm_state_dict())
    torch.testing.assert_close(again(x), theirs(x))
    ours.load_state_dict(copy.deepcopy(ours).state_dict())
    with pytest.raises(RuntimeError, match="gamma_3"):
        ours.load_state_dict({**theirs.state_dict(), "blocks.0.gamma_3": torch.zeros(3)})


def test_a_model_folder_loads_again(tmp_path):
    config = ModelConfig(
        base="vit_small_patch16_dinov3",
        base_options={"img_size": [32, 48], "num_classes": 3, "depth": 1, "embed_dim": 32, "num_heads": 2},
        parts=[{"slot": "normalizer", "part": "sinkhorn", "where": "all", "options": {}}],
        image_size=(32, 48),
        mean=(0.3,) * 3,
        std=(0.2,) * 3,
    )
    model = construct(config).eval()
    assert isinstance(model.model, EvaViT)
    save_model(model, config, tmp_path)
    again, _ = load_model(tmp_path)
    x = torch.rand(2, 3, 32, 48)
    assert torch.equal(again(x), model(x))


def test_checkpointing_gives_the_same_gradients_also_for_learned_frequencies():
    for merging in (False, True):
        ours = rehost(eva("mixed RoPE-ViT"))
        if merging:
            ours, _ = tome(ours, r=4)
        ours.train()
        grads = []
        for flag in (False, True):
            ours.set_grad_checkpointing(flag)
            ours.zero_grad()
            ours(images()).square().sum().backward()
            grads.append({name: p.grad for name, p in ours.named_parameters()})
        assert grads[0]["rope.freqs"].abs().min(-1).values.max() > 0
        for name, grad in grads[0].items():
            torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


def test_compiles_without_graph_breaks_and_exports():
    merged, _ = tome(rehost(eva("mixed RoPE-ViT")), r=4)
    torch._dynamo.reset()
    assert torch._dynamo.explain(merged)(images()).graph_break_count == 0
    ours, x = rehost(eva("DINOv3, any size")), images()
    program = torch.export.export(ours, (x,))
    torch.testing.assert_close(program.module()(x), ours(x), atol=1e-5, rtol=1e-4)


def test_roles_groups_and_walker():
    ours = rehost(eva("EVA-02"))
    assert {"q", "k", "v", "proj", "fc1", "fc2", "patch_embed", "norm1", "head"} <= set(roles(ours).values())
    groups = [["attn.q_proj", "attn.k_proj", "attn.v_proj"], ["attn.proj"], ["mlp.fc1_g", "mlp.fc1_x"], ["mlp.fc2"]]
    assert linear_groups(ours.blocks[0]) == groups
    walker = BlockWalker(ours, copy.deepcopy(ours), images(4), batch_size=2)
    sites = []
    for site in walker:
        sites.append(site.names)
        for batch in site.batches():
            for x, reference in batch.values():
                torch.testing.assert_close(x, reference)
    assert sites[:4] == [tuple(f"blocks.0.{n}" for n in group) for group in groups]
    assert len(sites) == 12


@pytest.mark.parametrize("variant", ["EVA-02", "EVA", "no biases", "grouped queries"])
def test_a_part_starts_from_one_projection_with_all_biases(variant):
    attn = rehost(eva(variant)).blocks[0].attn
    x = torch.randn(2, 5, 32)
    before = list(attn.state_dict())
    for a, b in zip(attn.standard().heads(x), attn.heads(x)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert list(attn.state_dict()) == before
    assert attn.standard().qkv.weight.data_ptr() != getattr(attn.qkv, "weight", x).data_ptr()


def test_swaps_keep_the_rotation_and_are_undone():
    ours, x = rehost(eva("EVA")), images()
    plain = ours(x)
    for variant in ("EVA-02", "gated MLP in one"):
        ours = rehost(eva(variant))
        plain, keys = ours(x), list(ours.state_dict())
        for slot, part in {"normalizer": "sinkhorn", "mlp": "kan", "mixer": "dct-init"}.items():
            record = swap(ours, slot, part)
            assert (ours(x) - plain).abs().max() > 1e-4
            if slot == "mixer":
                assert all(len(block.attn.position) == 1 for block in ours.blocks)
            record.undo()
            assert torch.equal(ours(x), plain)
            assert list(ours.state_dict()) == keys
    with pytest.raises(BadInput, match="turns queries and keys"):
        swap(ours, "mixer", "dct-attention")
    with pytest.raises(BadInput, match="8 channels per head, and DCTAttention has 6"):
        swap(ours, "mixer", "dct-attention", warm=False)
    swap(ours, "mixer", "dct-attention", warm=False, tau=1.0)
    assert ours(x).shape == (2, 7)


class Turn(nn.Module):
    """A position part that turns nothing: attention without positions."""

    slot, per_block, preserves = "position", True, "none"

    @classmethod
    def from_standard(cls, old, spec, warm=True):
        return cls()

    def rotate(self, q, k, layout):
        return q, k


class Bias(nn.Module):
    slot, per_block, preserves = "position", True, "none"

    @classmethod
    def from_standard(cls, old, spec, warm=True):
        return cls()

    def bias(self, q, k, layout):
        return torch.zeros(1, 1, q.shape[-2], q.shape[-2])


def test_a_part_that_turns_takes_the_place_of_the_models_rotation():
    ours, x = rehost(eva("mixed RoPE-ViT")), images()
    plain, keys = ours(x), list(ours.state_dict())
    added = swap(ours, "position", Bias)
    torch.testing.assert_close(ours(x), plain, atol=1e-5, rtol=1e-5)
    first = swap(ours, "position", Turn, where=[0])
    assert ours.rope is not None
    rest = swap(ours, "position", Turn, where=[1, 2])
    assert ours.rope is None
    assert "rope.freqs" not in ours.state_dict()
    assert [type(p) for p in ours.blocks[2].attn.position] == [Bias, Turn]
    assert (ours(x) - plain).abs().max() > 1e-3
    for record in (rest, first, added):
        record.undo()
    assert torch.equal(ours(x), plain)
    assert list(ours.state_dict()) == keys
    swap(ours, "position", "loope", context=False)
    assert ours.rope is not None
    assert ours.pos_embed is None


def test_masked_autoencoding_sees_each_patch_at_its_place():
    task = MAE(rehost(eva("EVA-02")), decoder_dim=16, decoder_heads=2)
    out = task({"images": torch.rand(2, 3, 20, 28)})
    out["loss"].backward()
    assert torch.isfinite(out["loss"])
    assert task.model.blocks[0].attn.q_proj.weight.grad.abs().sum() > 0


def test_classifier_weight_decay_and_initialisation_are_evas():
    ours = rehost(eva("mixed RoPE-ViT"))
    assert {"pos_embed", "cls_token", "rope.freqs"} <= ours.no_weight_decay()
    ours = rehost(eva("Perception Encoder"))
    ours.reset_classifier(2, "avg")
    x = images()
    features = ours.forward_features(x)
    torch.testing.assert_close(ours(x), ours.head(ours.fc_norm(features[:, 1:].mean(1))))
    ours.init_weights()
    assert ours(x).abs().max() < 0.1


def test_gates_and_wide_heads_of_a_modified_model():
    theirs = eva("axial RoPE-ViT", rope_type="cat")
    theirs.blocks[1].attn = EvaAttention(32, 4, gated=True, scale_norm=False)
    nn.init.normal_(theirs.blocks[1].attn.gate.weight)
    plain = eva("EVA")
    plain.blocks[0].attn = AttentionRope(32, 4, attn_head_dim=12, num_prefix_tokens=1)
    for model in (theirs, plain.eval()):
        ours, x = rehost(model.eval()), images()
        torch.testing.assert_close(ours(x), model(x), atol=1e-5, rtol=1e-5)
        check(ours)
    assert linear_groups(rehost(theirs).blocks[1])[0] == ["attn.qkv", "attn.gate"]


def test_opening_a_slot_of_the_host_leaves_the_original_alone():
    theirs, x = eva("DINOv3"), images()
    before = theirs(x)
    ours = rehost(theirs)
    ours.blocks[0].mlp = nn.Identity()
    ours.rope = None
    ours.blocks[1].attn.q_norm = nn.Threshold(0.0, 3.0)
    assert torch.equal(theirs(x), before)


class Changed(Eva):
    pass


def test_what_is_not_covered_is_refused_by_name():
    with pytest.raises(BadInput, match=r"EvaBlockPostNorm.*eva02_large_patch14_clip_224"):
        rehost(Eva(**TINY, use_post_norm=True))
    with pytest.raises(BadInput, match="Changed"):
        rehost(Changed(**TINY))
    with pytest.raises(BadInput, match=r"RotaryEmbedding is not covered.*RotaryEmbeddingCat"):
        rehost(Eva(**TINY, **ROPE, rope_type="base"))
    odd = Eva(**TINY)
    odd.blocks[1].attn = nn.Identity()
    with pytest.raises(BadInput, match=r"blocks\.1 is a EvaBlock with Identity"):
        rehost(odd)
    # build gives timm's model as it is: layers, gradients and outputs still serve
    model = build("eva02_enormous_patch14_clip_224", img_size=28, embed_dim=32, depth=1, num_heads=2, mlp_ratio=2)
    assert type(model) is Eva


def test_a_library_that_computes_something_else_is_noticed():
    theirs = eva("EVA-02")
    theirs.blocks[2].drop_path2 = nn.Threshold(0.0, 3.0)
    rehost(theirs)
    theirs.forward_features = lambda x: Eva.forward_features(theirs, x) * 1.001
    with pytest.raises(RuntimeError, match="differs from the original"):
        rehost(theirs)

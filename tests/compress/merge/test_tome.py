from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch.nn import functional as F

from vitkit.anatomy import check, host
from vitkit.compress.merge.matching import forward_tokens
from vitkit.compress.merge.tome import MergeTokens, restore, tome
from vitkit.errors import BadInput
from vitkit.models.normalized import NormalizedModel
from vitkit.models.vit import ViT

PREFIXES = {
    "mean pool": {"class_token": False, "global_pool": "avg"},
    "class": {},
    "registers": {"reg_tokens": 4},
    "registers, mean pool": {"reg_tokens": 4, "global_pool": "avg"},
    "attention pool": {"class_token": False, "global_pool": "map"},
}


def make(seed: int = 0, **options) -> ViT:
    torch.manual_seed(seed)
    settings = {
        "img_size": (10, 14),
        "patch_size": 2,
        "in_chans": 3,
        "num_classes": 4,
        "embed_dim": 24,
        "depth": 3,
        "num_heads": 3,
        "weight_init": "jax",
    }
    vit = ViT(**(settings | options)).eval()
    torch.nn.init.normal_(vit.head.weight)  # the initial head is zero, and zeros are always equal
    return vit


def pixels(batch: int = 3, size: tuple[int, int] = (10, 14), seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def naive_tome(vit: ViT, image: torch.Tensor, r: int) -> torch.Tensor:
    """ToMe on the whole sequence of one image, class token at place 0, by plain loops; logits (num_classes,)."""
    x = vit.embed(image[None])[0][0]
    sizes = [1.0] * len(x)
    protected = vit.num_prefix_tokens
    for block in vit.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, block.attn.num_heads, -1).unbind(1)
        heads = []
        for h in range(block.attn.num_heads):
            logits = q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5 + torch.tensor(sizes).log()
            heads.append(logits.softmax(-1) @ v[:, h])
        x = x + block.attn.proj(torch.cat(heads, -1))
        metric = F.normalize(k.mean(1), dim=-1)
        edges = []
        for a in range(0, len(x), 2):
            others = [b for b in range(1, len(x), 2) if b >= protected]
            if a >= protected and others:
                best = max(others, key=lambda b: float(metric[a] @ metric[b]))
                edges.append((float(metric[a] @ metric[best]), a, best))
        edges = sorted(edges, key=lambda e: -e[0])[: min(r, (len(x) - protected) // 2)]
        joined = {a: b for _, a, b in edges}
        order = list(range(protected))
        order += [a for a in range(0, len(x), 2) if a >= protected and a not in joined]
        order += [b for b in range(1, len(x), 2) if b >= protected]
        rows, new_sizes = [], []
        for row in order:
            members = [row, *(a for a, b in joined.items() if b == row)]
            total = sum(sizes[m] for m in members)
            rows.append(sum(x[m] * sizes[m] for m in members) / total)
            new_sizes.append(total)
        x, sizes = torch.stack(rows), new_sizes
        x = x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))
    x = vit.norm(x)
    if vit.global_pool == "avg":
        weight = torch.tensor(sizes[protected:])[:, None]
        pooled = vit.fc_norm((x[protected:] * weight).sum(0) / weight.sum())
    elif vit.global_pool == "map":
        pool = vit.attn_pool
        q = pool.q(pool.latent[0, 0]).view(pool.num_heads, -1)
        k, v = pool.kv(x).view(len(x), 2, pool.num_heads, -1).unbind(1)
        heads = []
        for h in range(pool.num_heads):
            logits = k[:, h] @ q[h] / q.shape[-1] ** 0.5 + torch.tensor(sizes).log()
            heads.append(logits.softmax(0) @ v[:, h])
        pooled = pool.proj(torch.cat(heads))
        pooled = vit.fc_norm(pooled + pool.mlp(pool.norm(pooled)))
    else:
        pooled = x[0]
    return vit.head(pooled)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("r", [1, 4, 40])
@torch.no_grad()
def test_equals_a_brute_force_merge(prefix, r):
    vit = make(**PREFIXES[prefix])
    merged, _ = tome(vit, r=r)
    images = pixels()
    expected = torch.stack([naive_tome(vit, image, r) for image in images])
    torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_r_zero_is_the_plain_model(prefix):
    vit = make(**PREFIXES[prefix])
    merged, change = tome(vit, r=0)
    assert torch.equal(merged(pixels()), vit(pixels()))
    assert change.details["tokens"] == [35, 35, 35, 35]


@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_sizes_and_sources_account_for_every_patch(prefix):
    merged, change = tome(make(**PREFIXES[prefix]), r=6)
    x, layout = merged.embed(pixels())
    for block, count in zip(merged.blocks, change.details["tokens"][1:]):
        x, layout = block(x, layout)
        assert x.shape[1] == layout.num_prefix + count
        assert (layout.sizes.sum(1) == 35).all()
        columns = layout.source_map(3, count)
        assert columns.shape == (3, count, 35)
        assert (columns.sum(1) == 1).all()
        assert torch.equal(columns.sum(2).float(), layout.sizes)


def twins(vit: ViT) -> tuple[ViT, torch.Tensor]:
    """A model without positions and images whose neighbouring patches are equal in pairs."""
    if vit.pos_embed is not None:
        torch.nn.init.zeros_(vit.pos_embed)
    cells = torch.rand(2, 3, 2, 8, generator=torch.Generator().manual_seed(5))
    return vit, cells.repeat_interleave(2, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("prefix", PREFIXES)
@torch.no_grad()
def test_merging_twins_changes_nothing(prefix):
    """16 cells of 2×4 pixels are 32 patches of 2×2, equal in pairs: 16 merges lose no information."""
    vit, images = twins(make(img_size=(4, 32), **PREFIXES[prefix]))
    merged, _ = tome(vit, r=16, where=0)
    torch.testing.assert_close(merged(images), vit(images), rtol=1e-5, atol=1e-5)
    full, _ = forward_tokens(vit, images)
    tokens, layout = forward_tokens(merged, images)
    assert tokens.shape[1] == layout.num_prefix + 16
    assert (layout.sizes == 2).all()
    back = layout.unmerge(tokens[:, layout.num_prefix :])
    torch.testing.assert_close(back, full[:, layout.num_prefix :], rtol=1e-4, atol=1e-5)
    grid = layout.to_grid(tokens[:, layout.num_prefix :])
    assert grid.shape == (2, 24, 2, 16)


@torch.no_grad()
def test_without_proportional_attention_uneven_groups_shift_the_output():
    torch.manual_seed(0)
    vit = make(img_size=(4, 32))
    torch.nn.init.zeros_(vit.pos_embed)
    images = torch.rand(2, 3, 4, 32, generator=torch.Generator().manual_seed(5))
    images[:, :, :2] = images[:, :, :2, :2].repeat(1, 1, 1, 16)
    # the upper 16 patches are all equal, the lower 16 all different: 8 merges make one patch of size 9 among them
    plain = vit(images)
    fair = tome(vit, r=8, where=0)[0](images)
    unfair = tome(vit, r=8, where=0, proportional=False)[0](images)
    torch.testing.assert_close(fair, plain, rtol=1e-5, atol=1e-5)
    assert (unfair - plain).abs().max() > 1e-3


@torch.no_grad()
def test_explicit_and_fused_attention_agree():
    merged, _ = tome(make(), r=6)
    fused = merged(pixels())
    for block in merged.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(merged(pixels()), fused, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padded_rows_never_reach_the_others():
    """Tokens that were padded by an earlier part give the same image whatever stands in the padding."""
    vit = make(class_token=False, global_pool="avg")
    merged, _ = tome(vit, r=9)
    x, layout = merged.embed(pixels(2))
    valid = torch.ones(2, 35, dtype=torch.bool)
    valid[1, 4:] = False
    outputs = []
    for fill in (0.0, 7.0):
        padded = x.clone()
        padded[1, 4:] = fill
        tokens, after = merged.run(padded, layout.replace(valid=valid))
        outputs.append(merged.readout(tokens, after))
        assert after.sizes.sum(1).tolist() == [35.0, 4.0]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    alone, after = merged.run(x[:1], layout)
    torch.testing.assert_close(merged.readout(alone, after)[0], outputs[0][0], rtol=1e-4, atol=1e-5)


def test_the_input_model_stays_as_it_was():
    vit = NormalizedModel(make(), [0.5] * 3, [0.25] * 3)
    before = copy.deepcopy(vit.state_dict())
    merged, change = tome(vit, pixels(), ratio=0.5)
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())
    assert all(block.reduce is None for block in vit.model.blocks)
    assert not hasattr(vit.model, "applied") or not vit.model.applied
    assert change.params_before == change.params_after
    assert change.touched == ("blocks.0.reduce", "blocks.1.reduce", "blocks.2.reduce")
    assert change.details["tokens"][-1] == 18
    json.dumps(change.details)
    check(merged)


@torch.no_grad()
def test_restore_rebuilds_the_structure():
    merged, _ = tome(make(), ratio=0.4, schedule="decreasing", proportional=False)
    steps = json.loads(json.dumps(host(merged).applied))
    again = make(seed=9)
    for step in steps:
        assert step["name"] == "tome"
        again = restore(again, step["options"])
    again.load_state_dict(merged.state_dict())
    assert torch.equal(again(pixels()), merged(pixels()))
    assert again.applied == merged.applied


@torch.no_grad()
def test_where_schedule_and_image_size():
    merged, change = tome(make(), r=4, where="last:2", schedule="decreasing")
    assert [type(b.reduce) for b in merged.blocks] == [type(None), MergeTokens, MergeTokens]
    assert change.details["merges"] == [8, 0]
    flexible = make(dynamic_img_size=True)
    _, change = tome(flexible, pixels(1, (20, 14)), r=5)
    assert change.details["tokens"][0] == 70


@torch.no_grad()
def test_ratio_and_default_leave_what_they_say():
    vit = make()
    assert tome(vit)[1].details["tokens"][-1] == 18
    for ratio in (0.0, 0.3, 0.8):
        merged, change = tome(vit, ratio=ratio)
        tokens, layout = forward_tokens(merged, pixels())
        assert tokens.shape[1] - layout.num_prefix == change.details["tokens"][-1] == round(35 * (1 - ratio))


@torch.no_grad()
def test_compiles_to_one_graph_and_exports():
    merged, _ = tome(make(reg_tokens=4), r=6)
    images = pixels()
    compiled = torch.compile(merged, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), merged(images), rtol=1e-5, atol=1e-5)
    exported = torch.export.export(merged, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    torch.testing.assert_close(exported.module()(pixels(5, seed=3)), merged(pixels(5, seed=3)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_other_precisions(dtype):
    merged, _ = tome(make(), r=6)
    expected = merged(pixels())
    out = merged.to(dtype)(pixels().to(dtype))
    assert out.dtype == dtype
    assert out.isfinite().all()
    if dtype == torch.float64:
        torch.testing.assert_close(out.float(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_shapes_on_the_meta_device():
    merged, _ = tome(make(), r=6)
    assert merged.to("meta")(pixels().to("meta")).shape == (3, 4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trains(checkpointing):
    merged, _ = tome(make(reg_tokens=1), r=6)
    merged.set_grad_checkpointing(checkpointing)
    merged.train()
    merged(pixels()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in merged.parameters())


def test_refusals():
    vit = make()
    with pytest.raises(BadInput, match="give one"):
        tome(vit, r=2, ratio=0.5)
    with pytest.raises(BadInput, match="r=-1"):
        tome(vit, r=-1)
    with pytest.raises(BadInput, match=r"ratio=1\.5"):
        tome(vit, ratio=1.5)
    with pytest.raises(BadInput, match="already reduces"):
        tome(tome(vit, r=2)[0], r=2)
    with pytest.raises(TypeError, match="vision transformer"):
        tome(timm.create_model("resnet10t"), r=2)
    other = make()
    other.blocks[1].attn = torch.nn.Identity()
    with pytest.raises(BadInput, match=r"blocks\.1 is a Identity"):
        tome(other, r=2)
    tome(other, r=2, where=[0, 2])

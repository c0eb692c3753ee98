"""Pixels as tokens of a plain ViT: their layout, their positions, and what teaches the scorer."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.anatomy import Trace, check
from vitkit.errors import BadInput
from vitkit.models.parts.tokenizers.sparse_pixels import SparsePixels
from vitkit.models.pixel_selection import distillation
from vitkit.models.vit import collect_aux
from vitkit.testing import check_part
from vitkit.testing.worlds import tiny_vit


def host(options=None, **shape):
    model = tiny_vit(12, 4, 2, 5, depth=2, tokenizer=("sparse-pixels", options or {}), **shape)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model.eval()


def pictures(n=3, side=12):
    return torch.randn(n, 2, side, side, generator=torch.Generator().manual_seed(1))


def test_the_contract_of_parts():
    assert {"gradients", "compiles"} <= check_part(SparsePixels, share=0.2).passed


def test_as_many_tokens_as_the_host_had_patches():
    model = host()
    x, layout = model.embed(pictures())
    assert x.shape == (3, 1 + 9, 64) and model.patch_embed.num_patches == 9
    assert layout.grid == (12, 12) and layout.num_original == 144 and not layout.is_full_grid
    check(model)
    assert host({"share": 0.5}).patch_embed.budget.count == 72


def test_the_layout_says_where_every_pixel_is():
    model, images = host({"share": 0.1}), pictures()
    x, layout = model.patch_embed(images)
    chosen = model.patch_embed.select(images)
    maps = layout.to_grid(x)
    assert torch.equal(maps.abs().sum(1) > 0, chosen.to_map())
    for b in range(3):
        for i, pixel in enumerate(chosen.pixels[b].tolist()):
            row, col = divmod(pixel, 12)
            assert torch.equal(maps[b, :, row, col], x[b, i])
            assert layout.coords[b, i].tolist() == pytest.approx([(row + 0.5) / 12, (col + 0.5) / 12])


def test_pixels_read_the_position_table_at_their_places():
    model, images = host({"share": 0.3}), pictures()
    table = model.pos_embed.detach()[:, 1:].unflatten(1, (3, 3))
    _, layout = model.patch_embed(images)
    found = model.patch_embed.pick_positions(model.pos_embed[:, 1:], (12, 12), layout)
    expected = torch.nn.functional.interpolate(
        table.permute(0, 3, 1, 2), size=(12, 12), mode="bilinear", align_corners=False
    )
    chosen = model.patch_embed.select(images).pixels
    for b in range(3):
        assert torch.allclose(found[b], expected[0].flatten(1)[:, chosen[b]].T, atol=1e-5)


@pytest.mark.parametrize("class_token", [True, False])
def test_attention_of_the_last_block_teaches_the_scorer(class_token):
    shape = {} if class_token else {"class_token": False, "global_pool": "avg"}
    model, images = host({"share": 0.2, "explore": 0.0}, **shape).train(), pictures()
    with collect_aux(model) as aux:
        model(images)
    assert list(aux) == [("sparse-pixels", 0)]
    with Trace(model.eval(), ["blocks.1.attn.q", "blocks.1.attn.k"]) as trace:
        model(images)
    q, k = trace["blocks.1.attn.q"], trace["blocks.1.attn.k"]
    query = q[:, :, 0] if class_token else q.mean(2)
    weights = torch.einsum("bhd,bhnd->bhn", query / 4, k).softmax(-1).mean(1)[:, int(class_token) :]
    expected = 0.5 * distillation(weights, model.patch_embed.select(images).scores)
    assert float(aux["sparse-pixels", 0]) == pytest.approx(float(expected.detach()), rel=1e-4)
    aux["sparse-pixels", 0].backward()
    taught = [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert taught and all("scorer" in name for name in taught)


def test_teaching_leaves_the_logits_alone():
    model, images = host({"explore": 0.0}), pictures()
    plain = model(images)
    assert torch.allclose(model.train()(images), plain, atol=1e-5)


def test_no_teacher_in_evaluation_without_lambda_or_without_attention():
    for model in (host(), host({"distill": 0.0}).train(), host(mixer="mamba").train()):
        with collect_aux(model) as aux:
            model(pictures())
        assert not aux


def test_fewer_tokens_follow_the_loss():
    model = host()
    for epoch, loss in enumerate([None, 1.0, 0.8, 0.6, 0.4]):
        for module in model.modules():
            if hasattr(module, "on_epoch"):
                module.on_epoch(epoch, 100, loss)
    assert model.embed(pictures())[0].shape[1] == 1 + 7
    # by default never more than the patches the host had
    for epoch in range(5, 30):
        model.patch_embed.budget.on_epoch(epoch, 100, 0.4)
    assert model.patch_embed.num_patches == 9


def test_other_sizes_and_merged_tokens():
    model = host({"share": 0.2})
    assert model(pictures(2, 17)).shape == (2, 5)
    _, maps = model.forward_intermediates(pictures())
    assert maps[0].shape == (3, 64, 12, 12)
    from vitkit.compress.merge.tome import tome

    merged, _ = tome(model, pictures(), r=3)
    assert merged(pictures()).shape == (3, 5)


def test_company_of_other_tokenizers():
    behind = tiny_vit(12, 4, 2, 5, depth=1, tokenizer=["sparse-pixels", "neurn"])
    assert behind(pictures()).shape == (3, 5) and behind.patch_embed.num_patches == 9
    again = host({"share": 0.2})
    vitkit.swap(again, "tokenizer", "sparse-pixels", share=0.4)
    assert again.patch_embed.host_grid == (3, 3) and again(pictures()).shape == (3, 5)
    with pytest.raises(BadInput, match="put sparse-pixels in first"):
        tiny_vit(12, 4, 2, 5, tokenizer=["conv-stem", "sparse-pixels"])
    with pytest.raises(BadInput, match="distill=-1"):
        host({"distill": -1})

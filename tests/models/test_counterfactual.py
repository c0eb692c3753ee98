from __future__ import annotations

import pytest
import torch

from vitkit.anatomy import Trace
from vitkit.errors import BadInput
from vitkit.models.counterfactual import Counterfactual, background_logits, both_logits, foreground, watch
from vitkit.testing.worlds import tiny_vit


def model(**options):
    made = tiny_vit(12, 4, 1, num_classes=5, embed_dim=32, depth=2, **options)
    torch.nn.init.normal_(made.head.weight, std=0.3)
    return made.eval()


def images(batch=3):
    return torch.rand(batch, 1, 12, 12, generator=torch.Generator().manual_seed(0))


def kinds():
    return [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 4}]


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.9])
def test_foreground_is_the_smallest_set_that_has_the_mass(mass):
    share = torch.rand(6, 11, generator=torch.Generator().manual_seed(1))
    share = share / share.sum(1, keepdim=True)
    fg = foreground(share, mass)
    for row, chosen in zip(share, fg):
        picked = row[chosen]
        assert picked.sum() >= mass > picked.sum() - picked.min()
        assert picked.min() >= row[~chosen].max()
    assert foreground(share, 1.0).all()
    assert foreground(torch.eye(3), 0.6).sum(1).tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", kinds())
@torch.no_grad()
def test_what_is_watched_is_the_last_attention(options):
    vit = model(**options)
    x, layout = vit.embed(images())
    seen = watch(vit, x, layout)
    with Trace(vit, "blocks.1.attn.weights") as trace:
        plain = vit(images())
    weights, prefix = trace["blocks.1.attn.weights"], layout.num_prefix
    row = weights[:, :, 0, prefix:].mean(1) if vit.has_class_token else weights.mean((1, 2))
    torch.testing.assert_close(seen.logits, plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen.share, row / row.sum(1, keepdim=True))


@pytest.mark.parametrize("options", kinds())
@torch.no_grad()
def test_the_background_alone_is_the_model_without_the_other_tokens(options):
    vit = model(**options)
    x, layout = vit.embed(images())
    fg = torch.rand(3, 9, generator=torch.Generator().manual_seed(2)) < 0.5
    fg[2] = True
    found = background_logits(vit, x, layout, fg)
    for i in range(2):
        rows = (~fg[i]).nonzero().squeeze(1)
        patches = x[i : i + 1, layout.num_prefix :][:, rows]
        few = layout.take(rows.unsqueeze(0)).replace(sizes=None)
        tokens, after = vit.run(torch.cat([x[i : i + 1, : layout.num_prefix], patches], 1), few)
        torch.testing.assert_close(found[i : i + 1], vit.readout(tokens, after), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[2], torch.zeros(5))


@torch.no_grad()
def test_gamma_weighs_the_second_pass_and_zero_has_none():
    vit = model()
    x, layout = vit.embed(images())
    z, z_cf = both_logits(vit, x, layout, 0.6)
    torch.testing.assert_close(Counterfactual(vit, 0.7)(images()), z - 0.7 * z_cf)
    passes = []
    handle = vit.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    for gamma, training, expected in ((0.0, False, 1), (0.7, False, 2), (0.7, True, 1)):
        passes.clear()
        Counterfactual(vit, gamma).train(training)(images())
        assert len(passes) == expected
    handle.remove()
    with pytest.raises(BadInput, match="gamma=-1"):
        Counterfactual(vit, -1)


@torch.no_grad()
def test_whoever_looks_inside_sees_the_pass_of_the_image():
    vit = model()
    wrapped = Counterfactual(vit, 0.7).eval()
    with Trace(wrapped, ["blocks.*.attn.weights", "logits"]) as trace:
        wrapped(images())
    with Trace(vit, "blocks.0.attn.weights") as plain:
        z = vit(images())
    torch.testing.assert_close(trace["blocks.0.attn.weights"], plain["blocks.0.attn.weights"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trace["logits"], z, atol=1e-5, rtol=1e-5)
    assert vit.taps == ()


@torch.no_grad()
def test_merged_tokens_hand_their_attention_to_the_patches_they_hold():
    from vitkit.compress.merge.tome import tome

    vit, _ = tome(model(), r=2)
    x, layout = vit.embed(images())
    seen = watch(vit, x, layout)
    assert seen.share.shape == (3, 9)
    torch.testing.assert_close(seen.share.sum(1), torch.ones(3))
    assert Counterfactual(vit, 0.5)(images()).isfinite().all()


def test_a_model_without_attention_is_refused():
    vit = model(mixer="ninformer")
    with pytest.raises(BadInput, match="Attention weights tell"):
        Counterfactual(vit, 0.5)

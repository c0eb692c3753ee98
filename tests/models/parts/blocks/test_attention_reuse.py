"""With every=1 nothing changes; between, the weights of the last computing block are used."""

import pytest
import torch

import vitkit
from vitkit.anatomy import Intervene, Trace
from vitkit.errors import BadInput


def _vit(**options):
    torch.manual_seed(0)
    vit = vitkit.build("vit_femto", img_size=8, in_chans=1, num_classes=3, **options).eval()
    torch.nn.init.normal_(vit.head.weight)
    return vit


IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_every_1_is_the_host():
    vit = _vit()
    before = vit(IMAGES)
    record = vitkit.swap(vit, "block", "attention-reuse", every=1)
    torch.testing.assert_close(vit(IMAGES), before)
    assert record.params_added == 0


def test_weights_are_those_of_the_computing_block():
    vit = _vit()
    vitkit.swap(vit, "block", "attention-reuse", every=3)
    with Trace(vit, ["blocks.*.attn.weights"]) as trace, torch.no_grad():
        vit(IMAGES)
    weights = [trace[f"blocks.{i}.attn.weights"] for i in range(4)]
    assert torch.equal(weights[1], weights[0]) and torch.equal(weights[2], weights[0])
    assert not torch.equal(weights[3], weights[0])


def test_equals_attention_whose_weights_are_replaced():
    plain, reused = _vit(), _vit()
    vitkit.swap(reused, "block", "attention-reuse", every=2)
    kept = {}

    def keep(value, ctx):
        depth = ctx.depth
        if depth % 2:
            return kept[depth - 1]
        kept[depth] = value
        return value

    with torch.no_grad(), Intervene(plain, {"blocks.*.attn.weights": keep}):
        wanted = plain(IMAGES)
    torch.testing.assert_close(reused(IMAGES), wanted, atol=1e-5, rtol=1e-4)


def test_fewer_parameters_and_gradients_reach_the_computing_block():
    vit = _vit()
    before = sum(p.numel() for p in vit.parameters())
    vitkit.swap(vit, "block", "attention-reuse", every=2)
    dim = vit.embed_dim
    assert before - sum(p.numel() for p in vit.parameters()) == 2 * 2 * (dim * dim + dim)
    vit.train()
    # the second block alone: what reaches the first block's queries comes through the weights it left
    x, layout = vit.embed(IMAGES)
    y, layout = vit.blocks[0](x, layout)
    out, _ = vit.blocks[1](y.detach(), layout)
    out.square().sum().backward()
    grad = vit.blocks[0].attn.qkv.weight.grad
    assert grad[: 2 * dim].abs().sum() > 0 and grad[2 * dim :].abs().sum() == 0


def test_activation_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        vit = _vit()
        vitkit.swap(vit, "block", "attention-reuse", every=2)
        vit.train().set_grad_checkpointing(checkpointing)
        vit(IMAGES).square().sum().backward()
        grads.append(vit.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*grads)


def test_errors():
    with pytest.raises(BadInput, match="at least 1"):
        vitkit.swap(_vit(), "block", "attention-reuse", every=0)
    vit = _vit()
    vitkit.swap(vit, "block", "attention-reuse", where=[1])
    with pytest.raises(BadInput, match="Block 1 uses the attention weights"):
        vit(IMAGES)
    with pytest.raises(BadInput, match="NiNformer"):
        vitkit.swap(_vit(mixer="ninformer"), "block", "attention-reuse")


def test_merged_tokens_in_between_are_refused():
    vit = _vit()
    vitkit.swap(vit, "block", "attention-reuse", every=2)
    x, layout = vit.embed(IMAGES)
    x, layout = vit.blocks[0](x, layout)
    assign = (torch.arange(16) // 2).expand(2, -1)
    with pytest.raises(ValueError, match="have changed since"):
        vit.blocks[1](x[:, :9], layout.regroup(assign, 8))

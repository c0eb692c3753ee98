from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vitkit.anatomy import host
from vitkit.compress.merge.tome import tome
from vitkit.errors import BadInput, UnknownName
from vitkit.explain.grad_cam import grad_cam
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


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_vit_matches_the_definition(options):
    """The last block and the readout written out here, with autograd on the output of norm1."""
    net, target = model(**options), torch.tensor([1, 0, 3])
    found = grad_cam(net, IMAGES, target)
    vit = host(net)
    x, layout = vit.embed((IMAGES - 0.4) / 0.3)
    for block in vit.blocks[:-1]:
        x, layout = block(x, layout)
    last = vit.blocks[-1]
    a = last.norm1(x).detach().requires_grad_(True)
    y = x.detach() + last.attn(a, layout)
    y = y + last.mlp(last.norm2(y), layout)
    logits = vit.readout(y, layout)
    (grad,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), a)
    p = layout.num_prefix
    for b in range(3):
        alpha = grad[b, p:].mean(0)
        expected = (a[b, p:] @ alpha).clamp(min=0).detach().reshape(5, 7)
        torch.testing.assert_close(found.map[b], expected, atol=1e-6, rtol=1e-4)
    assert bool((found.map > 0).any()) and found.meta["layer"] == "blocks.2.norm1"


@pytest.mark.parametrize("name, path", [("resnet10t", "layer4"), ("convnext_atto", "stages.3")])
def test_convolutional_networks(name, path):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5).eval()
    images = torch.rand(2, 3, 64, 96)
    found = grad_cam(net, images, 3)
    kept = []
    handle = net.get_submodule(path).register_forward_hook(lambda _m, _i, out: kept.append(out))
    logits = net(images)
    handle.remove()
    (grad,) = torch.autograd.grad(logits[:, 3].sum(), kept[0])
    expected = torch.einsum("bk,bkij->bij", grad.mean((2, 3)), kept[0]).relu().detach()
    torch.testing.assert_close(found.map, expected, atol=1e-6, rtol=1e-4)
    assert found.map.shape == (2, 2, 3) and found.meta["layer"].endswith(path)
    torch.testing.assert_close(grad_cam(NormalizedModel(net, [0.0] * 3, [1.0] * 3), images, 3).map, found.map)
    torch.testing.assert_close(grad_cam(net, images, 3, layer=path).map, found.map)


def test_hierarchical_transformers_keep_channels_last():
    torch.manual_seed(0)
    net = timm.create_model("swin_tiny_patch4_window7_224", num_classes=4, depths=(1, 1, 1, 1), embed_dim=24).eval()
    images = torch.rand(1, 3, 224, 224)
    found = grad_cam(net, images, 1)
    assert found.map.shape == (1, 7, 7) and bool((found.map > 0).any())
    torch.testing.assert_close(grad_cam(net, images, 1, layer=found.meta["layer"], channels_last=True).map, found.map)


def test_a_layer_may_be_named():
    net = model()
    first = grad_cam(net, IMAGES, layer="model.blocks.0.norm1")
    assert first.map.shape == (3, 5, 7)
    assert torch.equal(grad_cam(net, IMAGES, layer="model.blocks.2.norm1").map, grad_cam(net, IMAGES).map)
    with pytest.raises(UnknownName, match="site"):
        grad_cam(net, IMAGES, layer="model.blocks.9.norm1")


def test_networks_that_say_nothing_about_themselves():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(BadInput, match=r"layer='0'"):
        grad_cam(net, IMAGES)
    assert grad_cam(net, IMAGES, layer="0").map.shape == (3, 18, 26)
    with pytest.raises(BadInput, match="not a feature map"):
        grad_cam(net, IMAGES, layer="3")


def test_foreign_tokens_need_a_grid():
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3).eval()
    images = torch.rand(2, 3, 64, 64)
    with pytest.raises(BadInput, match="rehost"):
        grad_cam(net, images)
    from vitkit.models.rehost import rehost

    by_hand = grad_cam(net, images, layer="blocks.1.norm1", grid=(4, 4))
    torch.testing.assert_close(by_hand.map, grad_cam(rehost(net), images).map)
    with pytest.raises(BadInput, match="more cells"):
        grad_cam(net, images, layer="blocks.1.norm1", grid=(5, 5))
    with pytest.raises(BadInput, match="knows its own"):
        grad_cam(model(), IMAGES, grid=(5, 7))


def test_merged_tokens():
    net = model()
    still, _ = tome(net, r=0)
    torch.testing.assert_close(grad_cam(still, IMAGES).map, grad_cam(net, IMAGES).map)
    merged, _ = tome(net, r=6)
    found = grad_cam(merged, IMAGES)
    assert found.map.shape == (3, 5, 7)
    # members of one token share its score: fewer distinct values than patches
    assert all(len(m.unique()) <= 35 - 12 for m in found.map)


def test_targets_chunks_and_types():
    net, target = model(), torch.tensor([2, 0, 3])
    together = grad_cam(net, IMAGES, target)
    torch.testing.assert_close(grad_cam(net, IMAGES, target, chunk=1).map, together.map)
    with torch.inference_mode():
        torch.testing.assert_close(grad_cam(net, IMAGES + 0.0, target + 0).map, together.map)
    half = grad_cam(net.to(torch.bfloat16), IMAGES, target)
    assert half.map.dtype == torch.float32
    torch.testing.assert_close(half.map, together.map, atol=0.05 * together.map.max().item(), rtol=0.2)


def test_leaves_the_model_as_found():
    check_probe(grad_cam)


def test_a_layer_that_gives_no_tensor_is_refused():
    with pytest.raises(BadInput, match="gives a tuple, not a tensor"):
        grad_cam(model(), IMAGES, layer="model.blocks.1")

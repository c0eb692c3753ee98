"""DCFormer: the published sizes, volumes and images, hybrid stages and the codebook."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput
from vitkit.models.vit import collect_aux
from vitkit.testing import check_backbone


@pytest.mark.parametrize(
    ("size", "chans", "options"),
    [
        (28, 1, {}),
        (8, 5, {}),
        (28, 6, {"dims": 3, "slices": 6, "types": "CCT"}),
        (24, 4, {"dims": 3, "slices": 2, "codes": 16}),
    ],
)
def test_timms_contract(size, chans, options):
    assert "reset_classifier" in check_backbone("dcformer_femto", size, chans, img_size=size, **options).passed


@pytest.mark.parametrize(
    ("name", "count"), [("dcformer_nano", 918_976), ("dcformer_naive", 6_108_192), ("dcformer_tiny", 15_040_064)]
)
def test_published_sizes(name, count):
    # with the projection to 512, and without the biases that batch norm takes out (0.2 % of the published file's)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=512)
        out = model.eval().forward_features(torch.empty(1, 1, 256, 512, 512))
    assert sum(p.numel() for p in model.parameters()) == count
    assert tuple(out.shape[2:]) == (4, 8, 8)


def test_maps_of_volumes_have_five_axes():
    model = timm.create_model("dcformer_nano", features_only=True).eval()
    maps = model(torch.randn(1, 1, 40, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 5, 8, 12), (64, 3, 4, 6), (128, 2, 2, 3), (256, 1, 1, 2)]
    net = timm.create_model("dcformer_femto", dims=3, in_chans=2, num_classes=0).eval()
    volume = torch.randn(2, 2, 9, 16, 12)
    features, maps = net.forward_intermediates(volume, norm=True)
    assert torch.equal(features, maps[-1]) and tuple(maps[0].shape) == (2, 48, 3, 4, 3)
    torch.testing.assert_close(net(volume), features.mean((2, 3, 4)))
    net.reset_classifier(0, "")
    assert torch.equal(net(volume), features)


def test_channels_of_an_image_are_slices_of_a_volume():
    torch.manual_seed(0)
    model = timm.create_model("dcformer_femto", dims=3, slices=8, in_chans=16, num_classes=3).eval()
    image = torch.randn(2, 16, 20, 12)
    # slice by slice, two channels each
    volume = torch.stack([image[:, 2 * i : 2 * i + 2] for i in range(8)], 2)
    torch.testing.assert_close(model(image), model(volume))
    assert model(torch.randn(1, 2, 5, 20, 12)).shape == (1, 3), "other depths too"
    flipped = image.unflatten(1, (8, 2)).flip(1).flatten(1, 2)
    assert not torch.allclose(model(image), model(flipped), atol=1e-6)


def test_the_depth_axis_is_the_first():
    """Turning a volume and the branches of all convolutions turns the maps."""
    torch.manual_seed(0)
    model = timm.create_model("dcformer_femto", dims=3, in_chans=1, layer_scale=1.0).eval()
    other = timm.create_model("dcformer_femto", dims=3, in_chans=1, layer_scale=1.0).eval()
    state = model.state_dict()
    turned = {}
    for name, value in state.items():
        for old, new in ((0, 2), (2, 0)):
            if f"branches.{old}." in name:
                name = name.replace(f"branches.{old}.", f"branches.{new}.")
                break
        turned[name] = value.transpose(2, 4) if value.ndim == 5 else value
    other.load_state_dict(turned)
    x = torch.randn(1, 1, 20, 16, 12)
    torch.testing.assert_close(
        other.forward_features(x.transpose(2, 4)), model.forward_features(x).transpose(2, 4), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("options", [{}, {"dims": 3, "slices": 3}, {"types": "CTT"}])
def test_bfloat16_and_gradients_of_all_parameters(options):
    torch.manual_seed(0)
    model = timm.create_model("dcformer_femto", num_classes=3, layer_scale=1.0, **options).to(torch.bfloat16).train()
    out = model(torch.randn(4, 3, 32, 32, dtype=torch.bfloat16))
    (out * torch.randn_like(out)).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    # the bias of keys adds the same to all logits of a query, but it is a part of qkv's
    assert all(bool(p.grad.any()) for p in model.parameters())


def test_hybrid_stages_attend_over_all_cells():
    torch.manual_seed(0)
    model = timm.create_model("dcformer_femto", dims=3, in_chans=1, types="CTC", depths=(1, 2, 1)).eval()
    block = model.stages[1].blocks[1]
    assert [type(m).__name__ for m in model.stages[1].blocks] == ["PositionedBlock"] * 2
    assert isinstance(block.positions[0].branches[0][1], nn.Identity), "positions have no batch norm"
    x = torch.randn(1, 96, 3, 4, 2, requires_grad=True)
    from vitkit.models.backbones.pyramid import State

    (grad,) = torch.autograd.grad(block(State(x, None, {})).map[0, :, 0, 0, 0].sum(), x)
    assert bool((grad[0] != 0).any(0).all())


def test_the_codebook_is_off_unless_asked_for_and_leaves_its_loss():
    assert timm.create_model("dcformer_femto").codebook is None
    torch.manual_seed(0)
    model = timm.create_model("dcformer_femto", codes=8, num_classes=3)
    images = torch.randn(4, 3, 32, 32)
    with collect_aux(model) as aux:
        model.train()(images).sum().backward()
    assert list(aux) == [("commitment", 3)] and aux["commitment", 3].item() > 0
    features = model.eval().forward_features(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4, 2, 2))
    with collect_aux(model) as aux:
        model(images)
    assert not aux


def test_wrong_images_and_options_are_refused():
    with pytest.raises(BadInput, match="slices=3 does"):
        timm.create_model("dcformer_femto", dims=3, in_chans=6, slices=4)
    timm.create_model("dcformer_femto", dims=3, in_chans=6, slices=3)
    with pytest.raises(BadInput, match="needs dims=3"):
        timm.create_model("dcformer_femto", slices=3)
    with pytest.raises(BadInput, match="letters C and T"):
        timm.create_model("dcformer_femto", types="CX")
    with pytest.raises(BadInput, match=r"takes \(B, 3, H, W\), not"):
        timm.create_model("dcformer_femto")(torch.randn(1, 3, 8, 16, 16))
    with pytest.raises(BadInput, match=r"or \(B, 2, D, H, W\)"):
        timm.create_model("dcformer_femto", dims=3, in_chans=6, slices=3)(torch.randn(1, 4, 16, 16))

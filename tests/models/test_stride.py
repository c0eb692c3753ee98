"""Images are enlarged for networks that need more pixels than they have."""

import pytest
import torch

from vitkit.models.io import ModelConfig, construct, load_model, save_model
from vitkit.models.stride import network_size


@pytest.mark.parametrize(
    "base, image, expected",
    [
        ("resnet18", (8, 8), (32, 32)),
        ("resnet18", (28, 20), (56, 40)),
        ("resnet18", (33, 40), None),
        ("vit_tiny_patch16_224", (8, 8), (64, 64)),
        ("vit_tiny_patch16_224", (64, 96), None),
        ("vit_tiny_patch16_224", (100, 64), (112, 64)),
        ("vit_pico", (8, 8), None),  # chooses its patch by the size
        ("no_such_network", (8, 8), None),
    ],
)
def test_sizes(base, image, expected):
    assert network_size(base, {}, image) == expected


def test_options_count():
    assert network_size("vit_tiny_patch16_224", {"patch_size": 2}, (8, 8)) is None


def test_the_model_takes_small_images_and_keeps_the_size_through_its_folder(tmp_path):
    size = network_size("resnet18", {}, (8, 8))
    config = ModelConfig(
        base="resnet18",
        base_options={"num_classes": 3, "in_chans": 1},
        image_size=(8, 8),
        network_size=size,
        in_chans=1,
        classes=("a", "b", "c"),
    )
    model = construct(config).eval()
    seen = []
    model.model.conv1.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    logits = model(images)
    logits.sum().backward()
    assert seen == [(32, 32)] and images.grad.abs().sum() > 0
    save_model(model, config, tmp_path)
    again, read = load_model(tmp_path)
    assert read.network_size == (32, 32)
    torch.testing.assert_close(again(images), logits)


def test_a_broken_size_in_the_folder_is_named(tmp_path):
    from vitkit.errors import BadInput
    from vitkit.models.io import read_config

    (tmp_path / "config.json").write_text('{"format": 1, "base": "vit_pico", "network_size": 8}')
    with pytest.raises(BadInput, match="network_size = 8"):
        read_config(tmp_path)

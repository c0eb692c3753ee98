"""The modelled cost of a 4f correlator, and running through its imperfections."""

from __future__ import annotations

import math

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.diagnostics.optical4f import optical4f, through_optics
from vitkit.models.shared_conv import Optics
from vitkit.testing.worlds import tiny_vit


def model(**options):
    net = tiny_vit(16, 4, 1, depth=2, mixer=("conv-share", options), mlp=("conv-share-mlp", options)).eval()
    torch.nn.init.normal_(net.head.weight)
    return net


def test_frames_by_hand():
    cost = optical4f(model(), plane=(100, 200), fps=50, patches=False)
    # q, k, v, o: 64 kernels on 17 tokens; fc1: 128; fc2: 64 kernels on each of 2 maps
    tiles = (100 // 15) * (200 // 15)
    one, wide = 2 * math.ceil(17 * 64 / tiles), 2 * math.ceil(17 * 128 / tiles)
    assert [layer.frames for layer in cost.layers] == 2 * [one, one, one, one, wide, wide]
    assert cost.frames == 2 * (4 * one + 2 * wide) and cost.seconds == cost.frames / 50
    assert {layer.tile for layer in cost.layers} == {15} and cost.how == "modelled"
    # as many multiply-adds as the linear layers have
    assert cost.macs == 2 * 17 * (4 * 64 * 64 + 2 * 64 * 128)


def test_patches_are_tokens_of_the_first_layer():
    with_patches, without = (optical4f(model(), patches=p) for p in (True, False))
    first = with_patches.layers[0]
    assert (first.name, first.tokens, first.kernels, first.tile) == ("patch_embed.proj", 16, 64, 7)
    assert with_patches.layers[1:] == without.layers and first.macs == 16 * 64 * 16


def test_twice_the_tiles_are_half_the_frames_up_to_rounding():
    one = optical4f(model(kernel="half"), plane=(60, 60))
    two = optical4f(model(kernel="half"), plane=(60, 120))
    for a, b in zip(one.layers, two.layers):
        if b.tiles_per_frame == 2 * a.tiles_per_frame:
            assert 0 <= 2 * b.frames - a.frames <= 2
    doubled = [b for a, b in zip(one.layers, two.layers) if b.tiles_per_frame == 2 * a.tiles_per_frame]
    assert doubled


def test_unsigned_kernels_and_batches():
    signed, unsigned = optical4f(model()), optical4f(model(), signed=False)
    assert signed.frames == 2 * unsigned.frames
    # a plane that one image leaves half empty
    big = {"plane": (4000, 4000), "signed": False}
    single, batch = optical4f(model(), **big), optical4f(model(), batch=8, **big)
    assert batch.macs == 8 * single.macs and batch.frames < 8 * single.frames


def test_same_padding_has_few_kernels():
    cost = optical4f(model(padding="same", kernel=3), patches=False)
    assert [layer.kernels for layer in cost.layers] == 2 * [1, 1, 1, 1, 2, 2]


def test_what_it_refuses():
    with pytest.raises(BadInput, match='swap\\(model, "mixer", "conv-share"\\)'):
        optical4f(tiny_vit(16, 4))
    with pytest.raises(BadInput, match="15×15 pixels does not fit on a plane of 14×200"):
        optical4f(model(), plane=(14, 200))
    with pytest.raises(BadInput, match="fps=0"):
        optical4f(model(), fps=0)
    with pytest.raises(BadInput, match="no shared convolutions"), through_optics(tiny_vit(16, 4), Optics()):
        pass


def test_light_changes_answers_inside_the_with_only():
    net, x = model(), torch.rand(4, 1, 16, 16)
    with torch.no_grad():
        plain = net(x)
        with through_optics(net, Optics()):
            assert torch.equal(net(x), plain)
        gaps = []
        for bits in (3, 6, 10):
            with through_optics(net, Optics(bits, bits, bits)):
                gaps.append(float((net(x) - plain).abs().max()))
        with pytest.raises(RuntimeError, match="stop"), through_optics(net, Optics(detector_noise=0.1)):
            noisy = net(x)
            raise RuntimeError("stop")
        assert gaps[0] > gaps[1] > gaps[2] > 0 and not torch.equal(noisy, plain)
        assert torch.equal(net(x), plain)

"""Tokens on a grid of three axes, and mixers that walk it."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.tokenizers.cube_tokens import CubeTokens
from vitkit.testing import check_part
from vitkit.testing.checks import PLACES


def host(in_chans=6, groups=3, **options):
    torch.manual_seed(0)
    model = vitkit.build(
        "vit_pico", img_size=8, patch_size=4, in_chans=in_chans, num_classes=3,
        tokenizer=("cube-tokens", {"groups": groups}), **options,
    )  # fmt: skip
    torch.nn.init.normal_(model.head.weight)
    return model


def test_one_token_for_each_patch_and_group():
    model, images = host(), torch.randn(2, 6, 8, 12)
    part = model.patch_embed
    with torch.no_grad():
        x, layout = part(images)
        assert layout.grid == (3, 2, 3) and x.shape == (2, 18, part.proj.out_channels)
        patch = images[:, 2:4, 4:8, 8:12]  # of the second group, the last place
        expected = torch.einsum("bcij,dcij->bd", patch, part.proj.weight) + part.proj.bias + part.group_embed[1]
        assert torch.allclose(x[:, 6 + 5], expected, atol=1e-5)
        assert torch.equal(part(images.unflatten(1, (3, 2)))[0], x)


def test_places_have_the_hosts_positions_in_every_group():
    model = host()
    part, images = model.patch_embed, torch.randn(2, 6, 8, 8)
    with torch.no_grad():
        plain, _ = part(images)
        x, layout = model.embed(images)
        added = x[:, layout.num_prefix :] - plain
    assert torch.allclose(added.unflatten(1, (3, 4)), model.pos_embed[:, -4:].unsqueeze(1), atol=1e-6)
    table = part.pick_positions(model.pos_embed[:, -4:], (2, 2), TokenLayout(grid=(3, 4, 2)))
    assert table.shape == (1, 24, x.shape[-1]) and torch.equal(table[:, :8], table[:, 16:])


def test_one_group_is_the_patch_embedding():
    plain = vitkit.build("vit_pico", img_size=8, patch_size=4, in_chans=3, num_classes=3)
    torch.nn.init.normal_(plain.head.weight)
    images = torch.randn(2, 3, 8, 8)
    before = plain(images)
    vitkit.swap(plain, "tokenizer", "cube-tokens", groups=1)
    plain.patch_embed.group_embed.data.zero_()
    assert torch.allclose(plain(images), before, atol=1e-5)
    assert plain.patch_embed(images)[1].grid == (2, 2)


@pytest.mark.parametrize(
    "mixer",
    [
        ("vim", {"order": "interleave"}),
        ("vim", {"order": "joint/snake"}),
        ("vim", {"order": "parallel", "prefix": "attend"}),
        ("ss2d", {"orders": "sequential+interleave"}),
        ("mamba2", {"order": "joint"}),
        ("s4d", {"order": "interleave/hilbert"}),
        ("conv-ssm", {}),
    ],
)
def test_mixers_walk_it(mixer):
    model, images = host(mixer=mixer), torch.randn(2, 6, 8, 8, requires_grad=True)
    out = model(images)
    assert out.shape == (2, 3)
    out.square().sum().backward()
    heard = images.grad[0].unflatten(0, (3, 2)).abs().amax((1, 2, 3))
    assert bool((heard > 0).all()), "every date reaches the logits"


def test_errors():
    with pytest.raises(BadInput, match="groups=3 would"):
        host(groups=4)
    with pytest.raises(BadInput, match="in_chans=4"):
        host()(torch.randn(1, 4, 8, 8))
    with pytest.raises(BadInput, match="WaveletSSM"):
        host(mixer="wavelet-ssm")(torch.randn(1, 6, 8, 8))


def test_conforms():
    assert not check_part(CubeTokens, places=PLACES[:2], dynamo=False, groups=3).refused

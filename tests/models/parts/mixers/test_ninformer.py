"""The gate of a Mixer block: its limits, its parameters, and what it does on another grid."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitkit
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.ninformer import NiNformer
from vitkit.models.spec import NeedsFixedGrid
from vitkit.models.vit import ViT


def layout(h: int, w: int, p: int = 1) -> TokenLayout:
    return TokenLayout(grid=(h, w), prefix=(("class", p),) if p else ())


def part(h: int = 3, w: int = 4, p: int = 1, **options) -> NiNformer:
    torch.manual_seed(0)
    return NiNformer(p + h * w, 8, 10, 12, grid=(h, w), **options).eval()


def test_with_a_linear_branch_of_one_it_is_a_mixer_block():
    mixer, x = part(), torch.randn(2, 13, 8)
    nn.init.zeros_(mixer.linear.weight)
    nn.init.ones_(mixer.linear.bias)
    # a Mixer block written out with plain matrices
    gelu = nn.functional.gelu
    t1, t2, c1, c2 = mixer.tokens[0], mixer.tokens[3], mixer.channels[0], mixer.channels[3]
    y = mixer.norm1(x)
    hidden = gelu(torch.einsum("kn,bnd->bkd", t1.weight, y) + t1.bias[:, None])
    m = x + torch.einsum("nk,bkd->bnd", t2.weight, hidden) + t2.bias[:, None]
    z = mixer.norm2(m)
    v = m + gelu(z @ c1.weight.T + c1.bias) @ c2.weight.T + c2.bias
    assert torch.allclose(mixer(x, layout(3, 4)), v, atol=1e-5)


def test_with_both_mlps_zero_it_gates_the_tokens_with_themselves():
    mixer, x = part(), torch.randn(2, 13, 8)
    for mlp in (mixer.tokens, mixer.channels):
        nn.init.zeros_(mlp[3].weight)
        nn.init.zeros_(mlp[3].bias)
    assert torch.allclose(mixer(x, layout(3, 4)), mixer.linear(x) * x, atol=1e-6)


def test_position_enters_through_the_token_weights():
    mixer, x, order = part(p=0), torch.randn(1, 12, 8), torch.randperm(12)
    moved = mixer(x[:, order], layout(3, 4, 0))
    assert not torch.allclose(moved, mixer(x, layout(3, 4, 0))[:, order], atol=1e-3)
    with torch.no_grad():
        for linear, dim in ((mixer.tokens[0], 1), (mixer.tokens[3], 0)):
            linear.weight.copy_(linear.weight.mean(dim, keepdim=True).expand_as(linear.weight))
        mixer.tokens[3].bias.fill_(0.3)
    moved = mixer(x[:, order], layout(3, 4, 0))
    assert torch.allclose(moved, mixer(x, layout(3, 4, 0))[:, order], atol=1e-5)


def test_the_gate_of_a_token_depends_on_every_token_of_the_image():
    mixer, x = part(), torch.randn(1, 13, 8, requires_grad=True)
    mixer.gate(x)[0, 5].sum().backward()
    assert bool((x.grad[0].abs().sum(-1) > 0).all())


@pytest.mark.parametrize("share_norm", [False, True])
def test_number_of_parameters(share_norm):
    n, d, dt, dc = 13, 8, 10, 12
    wanted = (d * d + d) + 4 * d + (2 * n * dt + dt + n) + (2 * d * dc + dc + d) - (2 * d if share_norm else 0)
    assert sum(p.numel() for p in part(share_norm=share_norm).parameters()) == wanted


def test_other_numbers_of_tokens_are_refused_until_resized():
    model = vitkit.build("vit_femto", img_size=20, in_chans=1, num_classes=3, mixer="ninformer", dynamic_img_size=True)
    with pytest.raises(NeedsFixedGrid, match=r"built for 26 tokens and got 37 .* resize\(\(6, 6\)\)"):
        model(torch.randn(1, 1, 24, 24))
    for block in model.blocks:
        block.attn.resize((6, 6))
    assert model(torch.randn(1, 1, 24, 24)).shape == (1, 3)


def test_resizing_to_the_same_grid_changes_nothing():
    mixer = part()
    before = copy.deepcopy(mixer.state_dict())
    mixer.resize((3, 4))
    assert all(torch.equal(v, before[k]) for k, v in mixer.state_dict().items())


@pytest.mark.parametrize("p", [0, 1, 5])
def test_nearest_interpolation_repeats_the_output_of_repeated_cells(p):
    mixer = part(p=p)
    x = torch.randn(2, p + 12, 8)
    small = mixer(x, layout(3, 4, p))

    def repeat(t: torch.Tensor) -> torch.Tensor:
        cells = t[:, p:].unflatten(1, (3, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)
        return torch.cat([t[:, :p], cells], 1)

    mixer.resize((6, 8), mode="nearest")
    assert torch.allclose(mixer(repeat(x), layout(6, 8, p)), repeat(small), atol=1e-5)


def test_in_a_host_it_trains():
    model = ViT(img_size=(20, 28), patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=4)
    vitkit.swap(model, "mixer", NiNformer, where="last")
    model(torch.randn(2, 3, 20, 28)).sum().backward()
    assert all(p.grad is not None for p in model.blocks[1].attn.parameters())

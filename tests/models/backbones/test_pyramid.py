"""The shared pyramid keeps timm's contract with and without a class token."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from vitkit.models.backbones.contract import create
from vitkit.models.backbones.pyramid import Halve, MapBlock, Pyramid, Stage, State, TokenBlock, from_tokens, to_tokens
from vitkit.models.vit import Attention, Block, Mlp, collect_aux


class Noting(nn.Module):
    """Writes an auxiliary loss, as parts do."""

    def forward(self, state: State) -> State:
        state.aux["noting", 0] = state.map.mean()
        return state


def tiny(class_token: bool = False, **kwargs) -> Pyramid:
    dims = [8, 16]

    def block(dim: int) -> TokenBlock:
        return TokenBlock(Block(dim, 2, attn_layer=Attention, mlp_layer=Mlp))

    stages = [
        Stage([MapBlock(nn.Conv2d(8, 8, 3, padding=1, groups=8)), block(8)]),
        Stage(
            [block(16), Noting()],
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.Linear(8, 16) if class_token else None,
        ),
    ]
    kwargs = {"num_classes": 5, "in_chans": 1, **kwargs}
    stem = nn.Conv2d(kwargs["in_chans"], 8, 4, stride=4)
    norm = nn.LayerNorm(16) if class_token else LayerNorm2d(16)
    return Pyramid(stem, stages, dims, [4, 8], norm, class_token=class_token, **kwargs)


@pytest.mark.parametrize("class_token", [False, True])
def test_features_head_and_intermediates_agree(class_token):
    net = tiny(class_token).eval()
    x = torch.randn(2, 1, 20, 28)
    features = net.forward_features(x)
    assert features.shape == ((2, 1 + 3 * 4, 16) if class_token else (2, 16, 3, 4))
    assert torch.equal(net.forward_head(features), net(x))
    assert net.forward_head(features, pre_logits=True).shape == (2, net.num_features)
    last, maps = net.forward_intermediates(x)
    assert torch.equal(last, features)
    assert [tuple(m.shape) for m in maps] == [(2, 8, 5, 7), (2, 16, 3, 4)]
    (first,) = net.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(first, maps[0])
    (normed,) = net.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)
    wanted = features[:, 1:].transpose(1, 2).reshape(2, 16, 3, 4) if class_token else features
    assert torch.equal(normed, wanted)


@pytest.mark.parametrize("class_token", [False, True])
def test_class_token_or_mean_reaches_the_classifier(class_token):
    net = tiny(class_token).eval()
    features = net.forward_features(torch.randn(2, 1, 16, 16))
    pooled = features[:, 0] if class_token else features.mean((2, 3))
    assert torch.allclose(net.forward_head(features), net.head(pooled))
    net.reset_classifier(3, "avg")
    assert net(torch.randn(2, 1, 16, 16)).shape == (2, 3)
    net.reset_classifier(0, "")
    assert net(torch.randn(2, 1, 16, 16)).shape == features.shape
    with pytest.raises(ValueError, match="must be one of"):
        net.reset_classifier(3, "max")


def test_checkpointing_computes_the_same_gradients():
    net = tiny(True).train()
    other = copy.deepcopy(net)
    other.set_grad_checkpointing()
    x = torch.randn(2, 1, 16, 16)
    for n in (net, other):
        n(x).square().sum().backward()
    for (name, p), q in zip(net.named_parameters(), other.parameters()):
        assert p.grad is not None, name
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


def test_features_only_gives_maps_and_drops_the_head():
    net = create(tiny, "tiny_pyramid", False, {}, {"features_only": True, "out_indices": (0, 1), "in_chans": 1}, (0, 1))
    maps = net(torch.randn(1, 1, 16, 16))
    assert [m.shape[1] for m in maps] == net.feature_info.channels() == [8, 16]
    assert [16 // m.shape[2] for m in maps] == net.feature_info.reduction() == [4, 8]
    shallow = tiny()
    assert shallow.prune_intermediate_layers([0]) == [0]
    assert len(shallow.stages) == 1
    with pytest.raises(ValueError, match="no pretrained weights"):
        create(tiny, "tiny_pyramid", True, {}, {})


def test_auxiliary_losses_are_collected_and_gone_afterwards():
    net = tiny()
    with collect_aux(net) as aux:
        net(torch.randn(1, 1, 16, 16))
    assert set(aux) == {("noting", 0)} and aux["noting", 0].requires_grad
    assert net.aux_sink is None


def test_tokens_and_map_are_inverse():
    state = State(torch.randn(2, 6, 3, 5), torch.randn(2, 1, 6), {})
    x, layout = to_tokens(state)
    assert x.shape == (2, 16, 6) and layout.num_prefix == 1 and layout.grid == (3, 5)
    back = from_tokens(x, layout, state)
    assert torch.equal(back.map, state.map) and torch.equal(back.prefix, state.prefix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [1, 2, 5])
def test_halving_is_the_plain_convolution_with_finite_gradients(side, dtype):
    torch.manual_seed(side)
    ours = Halve(32, 64).to(dtype)
    x = torch.randn(4, 32, side, side, dtype=dtype)
    plain = nn.functional.conv2d(x.float(), ours.weight.float(), ours.bias.float(), stride=2, padding=1)
    for _ in range(20):
        ours.zero_grad()
        out = ours(x)
        assert out.shape[-1] == (side + 1) // 2
        assert torch.allclose(out.float(), plain, atol=0.05)
        out.sum().backward()
        assert bool(ours.weight.grad.isfinite().all())
        if side == 1:
            assert int((ours.weight.grad[:, :, 0] != 0).sum()) == 0, "only the middle of the kernel meets the cell"

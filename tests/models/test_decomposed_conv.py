"""Decomposed convolutions: the one convolution they equal, their weights, and what moves with what."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.decomposed_conv import DecompBlock, DecompConv

SIZES = {2: (7, 9), 3: (5, 6, 9)}


def conv(*args, **options) -> DecompConv:
    """With batch norms that do something."""
    torch.manual_seed(0)
    made = DecompConv(*args, **options)
    for m in made.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(m.weight), nn.init.normal_(m.bias)
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
    return made.eval()


def x(dims, channels=4):
    return torch.randn(2, channels, *SIZES[dims], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"stride": 4, "k": 7}, {"groups": 4, "k": 9}, {"norm": False}])
def test_the_sum_is_one_convolution_with_a_cross_shaped_kernel(dims, options):
    made = conv(4, 8, **{"k": 3, **options}, dims=dims)
    with torch.no_grad():
        out, one = made(x(dims)), made.merged()
        torch.testing.assert_close(one(x(dims)), out, atol=1e-5, rtol=1e-5)
    middle = one.kernel_size[0] // 2
    off = (torch.stack(torch.meshgrid(*[torch.arange(one.kernel_size[0])] * dims, indexing="ij")) != middle).sum(0) > 1
    assert bool(off.any()) and not one.weight[:, :, off].any() and bool((one.weight[:, :, ~off] != 0).all())


def test_without_batch_norm_it_is_the_cross_by_hand():
    made, kernel = conv(4, 6, 5, norm=False), torch.zeros(6, 4, 5, 5, 5)
    along, down, across = (branch[0] for branch in made.branches)
    with torch.no_grad():
        kernel[:, :, :, 2, 2] += along.weight[..., 0, 0]
        kernel[:, :, 2, :, 2] += down.weight[:, :, 0, :, 0]
        kernel[:, :, 2, 2, :] += across.weight[:, :, 0, 0, :]
        expected = F.conv3d(x(3), kernel, along.bias + down.bias + across.bias, padding=2)
        torch.testing.assert_close(made(x(3)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_are_d_k_for_k_to_the_d(dims):
    full = {2: nn.Conv2d, 3: nn.Conv3d}[dims](6, 10, 7, bias=False)
    few = sum(branch[0].weight.numel() for branch in DecompConv(6, 10, 7, dims=dims).branches)
    assert few * 7**dims == full.weight.numel() * dims * 7


def test_two_axes_are_two_terms():
    made = conv(4, 4, 3, dims=2, act=nn.GELU)
    assert len(made.branches) == 2
    first, second = made.branches
    torch.testing.assert_close(made(x(2)), F.gelu(first(x(2)) + second(x(2))))


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_permuting_axes_and_branches_permutes_the_output(order):
    made, other = conv(4, 4, 5), DecompConv(4, 4, 5).eval()
    axes = (0, 1, *(2 + o for o in order))
    for axis, branch in zip(order, other.branches):
        state = made.branches[axis].state_dict()
        state["0.weight"] = state["0.weight"].permute(axes)
        branch.load_state_dict(state)
    torch.testing.assert_close(other(x(3).permute(axes)), made(x(3)).permute(axes))


def test_batch_norm_is_per_branch():
    made = conv(4, 4, 3).train()
    out = made(x(3))
    parts = [F.batch_norm(b[0](x(3)), None, None, b[1].weight, b[1].bias, True) for b in made.branches]
    torch.testing.assert_close(out, sum(parts))


@pytest.mark.parametrize("size", [(2, 4, 4), (3, 8, 8), (4, 4, 1), (1, 1, 1)])
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (7, 2), (7, 1)])
def test_bfloat16_gradients_on_axes_shorter_than_the_kernel(size, k, stride):
    torch.manual_seed(0)
    made = DecompConv(2, 16, k, stride, norm=False).bfloat16()
    twin = DecompConv(2, 16, k, stride, norm=False)
    twin.load_state_dict(made.state_dict())
    volume = torch.randn(2, 2, *size).bfloat16()
    made(volume).sum().backward()
    twin(volume.float()).sum().backward()
    for p, q in zip(made.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad.float(), q.grad, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_block_is_the_identity_for_gamma_zero(dims):
    torch.manual_seed(0)
    block = DecompBlock(4, 5, dims, layer_scale=0.0)
    assert torch.equal(block(x(dims)), x(dims))
    block = DecompBlock(4, 5, dims, layer_scale=0.5).eval()
    # channels last by hand
    inner = block.conv(x(dims)).movedim(1, -1)
    expected = x(dims) + 0.5 * block.fc2(F.gelu(block.fc1(inner))).movedim(-1, 1)
    torch.testing.assert_close(block(x(dims)), expected)


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="use 5"):
        DecompConv(4, 4, 4)
    with pytest.raises(BadInput, match="dims=4 must be 2"):
        DecompConv(4, 4, 3, dims=4)

"""A k×k or k×k×k convolution as a sum of 1-D convolutions, one along each axis."""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput

# B batch · C channels · n₁×…×n_d cells of a map with d = dims axes · k kernel size

CONVS: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS: dict[int, type[nn.BatchNorm2d] | type[nn.BatchNorm3d]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _Line:
    """What the 1-D convolutions have in common."""

    padding: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: tuple[int, ...] | int = self.padding
        if any(side < k for side, k in zip(x.shape[2:], self.kernel_size) if k > 1):
            # an axis shorter than its kernel, with bfloat16 on a CPU: oneDNN (PyTorch 2.15) returns garbage for the
            # weights' gradient, unless the zeros are there already
            x = F.pad(x, [p for side in reversed(self.padding) for p in (side, side)])
            padding = 0
        conv = F.conv2d if x.ndim == 4 else F.conv3d
        return conv(x, weight, bias, self.stride, padding, 1, self.groups)  # type: ignore[arg-type]


class _Line2d(_Line, nn.Conv2d):
    pass


class _Line3d(_Line, nn.Conv3d):
    pass


LINES: dict[int, type[_Line2d] | type[_Line3d]] = {2: _Line2d, 3: _Line3d}


class DecompConv(nn.Module):
    """``act(Σ_a BN_a(conv_a(x)))`` with one convolution of k cells along each axis a, all beside each other.

    d·k weights for a pair of channels in place of k^d. The sum is the convolution with a cross-shaped kernel that
    :meth:`merged` returns.

    >>> conv = DecompConv(4, 6, 5, dims=3, norm=False)
    >>> x = torch.randn(1, 4, 5, 6, 7)
    >>> torch.allclose(conv(x), conv.merged()(x), atol=1e-5)
    True

    Args:
        in_dim, out_dim: C before and after.
        k: cells of the kernels, odd. stride: the same along all axes. groups: as in a convolution.
        dims: d, 2 or 3.
        norm: False leaves the batch norm of each branch out, and gives the convolutions a bias.
        act: makes the activation behind the sum; None: none.

    Shape: (B, C, n₁, …, n_d) → (B, C', ⌈n₁/stride⌉, …, ⌈n_d/stride⌉).
    Raises: BadInput if ``dims`` is not 2 or 3, or ``k`` is even.
    Paper: DCFormer: Efficient 3D Vision-Language Modeling with Decomposed Convolutions, arXiv:2502.05091.
    Departs from the paper: two axes as well as three. Convolutions before a batch norm have no bias, which would be
        taken out again.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        k: int,
        stride: int = 1,
        groups: int = 1,
        dims: int = 3,
        norm: bool = True,
        act: type[nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_dims(dims)
        if k < 1 or k % 2 == 0:
            raise BadInput(f"A decomposed convolution needs an odd kernel, not k={k}; use {max(1, k) // 2 * 2 + 1}.")
        self.dims = dims
        self.branches = nn.ModuleList()
        for axis in range(dims):
            size = tuple(k if a == axis else 1 for a in range(dims))
            padding = tuple(k // 2 if a == axis else 0 for a in range(dims))
            conv = LINES[dims](in_dim, out_dim, size, stride, padding, groups=groups, bias=not norm)  # type: ignore[arg-type]
            self.branches.append(nn.Sequential(conv, NORMS[dims](out_dim) if norm else nn.Identity()))
        self.act = act() if act is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return self.act(total)

    @torch.no_grad()
    def merged(self) -> nn.Conv2d | nn.Conv3d:
        """One ordinary convolution with a cross-shaped kernel: what eval mode computes, before the activation."""
        convs = [branch[0] for branch in self.branches]  # type: ignore[index]
        first, k = convs[0], max(convs[0].kernel_size)
        new = CONVS[self.dims](first.in_channels, first.out_channels, k, first.stride, k // 2, groups=first.groups).to(
            first.weight
        )
        assert new.bias is not None
        new.weight.zero_()
        new.bias.zero_()
        for axis, branch in enumerate(self.branches):
            conv, norm = branch.get_submodule("0"), branch.get_submodule("1")
            weight: Tensor = conv.get_parameter("weight")
            bias: Tensor = torch.zeros_like(new.bias) if conv.bias is None else conv.get_parameter("bias")
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                assert norm.running_mean is not None and norm.running_var is not None
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()
                weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
                bias = (bias - norm.running_mean) * scale + norm.bias
            middle = slice(k // 2, k // 2 + 1)
            place = tuple(slice(None) if a == axis else middle for a in range(self.dims))
            new.weight[(slice(None), slice(None), *place)] += weight
            new.bias += bias
        return new.train(self.training)


class DecompBlock(nn.Module):
    """``x + γ · MLP(DecompConv(x))``: depthwise decomposed convolution, then C → r·C → C with GELU in every cell.

    Args:
        dim: C. k: cells of the kernels, odd. dims: axes of the map, 2 or 3.
        mlp_ratio: r. Default 4.
        layer_scale: first value of γ (C numbers). Default 1e-6; 0 makes the block the identity.
        drop_path: stochastic depth.

    Shape: (B, C, n₁, …, n_d) → the same.
    Paper: DCFormer, arXiv:2502.05091.
    """

    def __init__(
        self,
        dim: int,
        k: int = 7,
        dims: int = 3,
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.conv = DecompConv(dim, dim, k, groups=dim, dims=dims)
        self.fc1 = nn.Linear(dim, round(dim * mlp_ratio))
        self.act = nn.GELU()
        self.fc2 = nn.Linear(round(dim * mlp_ratio), dim)
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        update = self.fc2(self.act(self.fc1(self.conv(x).movedim(1, -1)))) * self.gamma
        return x + self.drop_path(update.movedim(-1, 1))


def check_dims(dims: int) -> None:
    """Raises: BadInput if ``dims`` is neither 2 nor 3."""
    if dims not in CONVS:
        raise BadInput(f"dims={dims} must be 2 for images or 3 for volumes.")

"""Inception-like attention on maps: a dilated convolution, an inverted bottleneck and attention with registers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput

# B batch · C channels of a map · H×W its cells, N = H·W · h heads · d channels of a head · R registers

#: shares of the channels that the dilated convolution, the inverted bottleneck and the attention get
SPLIT = (1, 6, 1)


class RegisterAttention(nn.Module):
    """r-MHSA: ``x + softmax([q_i·(k_j + r_j), q_i·k_reg] / √d) [v_j; v_reg]`` over all cells j and R registers.

    ``r_j = r_h[row of j] + r_w[column of j]`` is learned per head for a map of ``size`` and interpolated linearly to
    others. Registers are learned keys and values beside the cells; they have no place, so no r.

    Args:
        dim: C. num_heads: h, divides C.
        size: (H, W) of the map the table r is made for.
        registers: R. Default 1; 0 is attention over cells only.
        scaled: False leaves out 1/√d.

    Shape: (B, C, H, W) → (B, C, H, W), any H and W.
    Raises: BadInput if ``num_heads`` does not divide ``dim``, or for a negative number of registers.
    Paper: iiANET: Inception Inspired Attention Hybrid Network for efficient Long-Range Dependency, arXiv:2407.07603.
    Departs from the paper: in the published file the registers are joined to the heads and cut off again, which leaves
        them without effect, the logit of (i, j) has r_i·q_j in place of q_i·r_j, and nothing is divided by √d. First
        values are ours: standard deviation d^(−1/2) for r, 0.02 for registers.
    """

    def __init__(
        self, dim: int, num_heads: int, size: tuple[int, int], registers: int = 1, scaled: bool = True
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise BadInput(
                f"num_heads={num_heads} does not divide the {dim} channels of the attention; use one of "
                f"{[h for h in range(1, dim + 1) if dim % h == 0]}."
            )
        if registers < 0:
            raise BadInput(f"registers={registers} must be 0 or more.")
        self.num_heads, self.registers, self.scaled = num_heads, registers, scaled
        d = dim // num_heads
        self.qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.rel_h = nn.Parameter(torch.randn(num_heads, d, size[0], 1) * d**-0.5)
        self.rel_w = nn.Parameter(torch.randn(num_heads, d, 1, size[1]) * d**-0.5)
        self.register_kv = nn.Parameter(0.02 * torch.randn(2, num_heads, registers, d)) if registers else None

    def relative(self, height: int, width: int) -> Tensor:
        """r of all cells in raster order, (h, N, d)."""
        rows: Tensor = self.rel_h
        columns: Tensor = self.rel_w
        if rows.shape[2] != height:
            rows = F.interpolate(rows, (height, 1), mode="bilinear", align_corners=False)
        if columns.shape[3] != width:
            columns = F.interpolate(columns, (1, width), mode="bilinear", align_corners=False)
        return (rows + columns).flatten(2).transpose(1, 2)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, h, N, d), and k, v (B, h, N+R, d): cells with their r first, then the registers."""
        q, k, v = self.qkv(x).unflatten(1, (3, self.num_heads, -1)).flatten(4).transpose(3, 4).unbind(1)
        k = k + self.relative(x.shape[2], x.shape[3])
        if self.register_kv is not None:
            k_reg, v_reg = self.register_kv.unsqueeze(1).expand(-1, x.shape[0], -1, -1, -1).unbind(0)
            k, v = torch.cat([k, k_reg], 2), torch.cat([v, v_reg], 2)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        z = F.scaled_dot_product_attention(*self.heads(x), scale=None if self.scaled else 1.0)
        return x + z.transpose(2, 3).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, registers={self.registers}"


class Branch(nn.Module):
    """``ReLU(body(x) + shortcut(x))`` with a shortcut of 1×1 convolution and batch norm."""

    def __init__(self, body: nn.Module, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut = conv_bn(in_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class IIA(nn.Module):
    """The iiA block: channels split 1/8 : 6/8 : 1/8, three branches with a shortcut each, outputs joined.

    1. 3×3 convolution of dilation 2 (sees 5×5 cells);
    2. inverted bottleneck: 1×1 to e·o₂ channels, depthwise 3×3, 1×1 to o₂;
    3. :class:`RegisterAttention`, then 1×1 to o₃.

    Each convolution is followed by batch norm, each branch is ``ReLU(branch + shortcut)``. A branch sees its own share
    of the channels only; blocks whose outputs have the proportions of the split keep the branches apart.

    Args:
        in_dim: C, a multiple of 8. outs: (o₁, o₂, o₃).
        num_heads, size, registers, scaled: of the attention.
        expansion: e. Default 4.
        split: proportions of the input channels; a branch with 0 is left out, and has output 0.

    Shape: (B, C, H, W) → (B, o₁+o₂+o₃, H, W).
    Raises: BadInput if the split does not divide C, or leaves a branch without input or output.
    Paper: iiANET, arXiv:2407.07603.
    Departs from the paper: see :class:`RegisterAttention`.
    """

    def __init__(
        self,
        in_dim: int,
        outs: Sequence[int],
        num_heads: int = 1,
        size: tuple[int, int] = (14, 14),
        registers: int = 1,
        expansion: int = 4,
        scaled: bool = True,
        split: Sequence[int] = SPLIT,
    ) -> None:
        super().__init__()
        if len(split) != 3 or min(split) < 0 or not sum(split) or in_dim % sum(split):
            raise BadInput(
                f"IIA: {in_dim} channels cannot be split {':'.join(map(str, split))}; they must be a multiple of "
                f"{max(1, sum(split))}."
            )
        if len(outs) != 3 or any((share > 0) != (out > 0) for share, out in zip(split, outs)):
            raise BadInput(
                f"IIA: outs={tuple(outs)} must be three widths, positive where split={tuple(split)} is, else 0."
            )
        self.widths = [in_dim * share // sum(split) for share in split]
        self.out_dim = sum(outs)
        self.branches = nn.ModuleList()
        (c1, c2, c3), (o1, o2, o3) = self.widths, outs
        if c1:
            self.branches.append(Branch(conv_bn(c1, o1, 3, dilation=2), c1, o1))
        if c2:
            hidden = expansion * o2
            widen, mix = conv_bn(c2, hidden), conv_bn(hidden, hidden, 3, groups=hidden)
            bottleneck = nn.Sequential(widen, nn.ReLU(), mix, nn.ReLU(), conv_bn(hidden, o2))
            self.branches.append(Branch(bottleneck, c2, o2))
        if c3:
            attention = RegisterAttention(c3, num_heads, size, registers, scaled)
            self.branches.append(Branch(nn.Sequential(attention, conv_bn(c3, o3)), c3, o3))

    def forward(self, x: Tensor) -> Tensor:
        shares = [part for part in x.split(self.widths, 1) if part.shape[1]]
        return torch.cat([branch(part) for branch, part in zip(self.branches, shares)], 1)


class ChannelGate(nn.Module):
    """``x · σ(W mean(x))``: a weight per channel from the means of all channels.

    Shape: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x.mean((2, 3), keepdim=True)).sigmoid()


def conv_bn(in_dim: int, out_dim: int, kernel: int = 1, dilation: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution that keeps the map's size, without bias, and batch norm."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_dim, out_dim, kernel, padding=padding, dilation=dilation, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_dim))

"""An MLP whose hidden neurons talk to their neighbours on the grid through a depthwise convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec


class InteractiveFFN(nn.Module):
    """I-FFN: ``u = BN(GELU(W₁ x))``, on patches ``u ← BN(GELU(u + DWConv₃ₓ₃(u)))``, then ``W₂ u``.

    Prefix tokens go through the two linear layers and the first activation only.

    Args:
        ratio: r, hidden width over D; None: that of the module it replaces.
        batch_norm: False leaves both BatchNorms out.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: ValueError after tokens were merged, dropped or padded: a convolution needs every cell of the grid.
    Paper: ECViT: Efficient Convolutional Vision Transformer with Local-Attention and Multi-scale Stages,
        arXiv:2504.14825.
    Departs from the paper: it is known by its abstract and public formulas; the depthwise kernel of 3×3 is ours.
    """

    slot = "mlp"
    preserves = "none"
    takes_layout = True

    def __init__(self, dim: int, hidden: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.norm1: nn.Module = nn.BatchNorm1d(hidden) if batch_norm else nn.Identity()
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.norm2: nn.Module = nn.BatchNorm2d(hidden) if batch_norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, dim)

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        ratio: float | None = None,
        batch_norm: bool = True,
    ) -> InteractiveFFN:
        new = cls(spec.dim, round(spec.dim * (spec.mlp_ratio if ratio is None else ratio)), batch_norm)
        for name in ("fc1", "fc2"):
            theirs = getattr(old, name, None)
            if warm and isinstance(theirs, nn.Linear) and theirs.weight.shape == getattr(new, name).weight.shape:
                getattr(new, name).load_state_dict(theirs.state_dict(), strict=False)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        grid, num_prefix = layout.require_full_grid("The interactive FFN"), layout.num_prefix
        u = self.norm1(self.act(self.fc1(x)).transpose(1, 2))
        cells = u[:, :, num_prefix:].unflatten(2, grid)
        cells = self.norm2(self.act(cells + self.dwconv(cells))).flatten(2)
        return self.fc2(torch.cat([u[:, :, :num_prefix], cells], 2).transpose(1, 2))

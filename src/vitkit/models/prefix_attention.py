"""How class token and registers hear of the image in blocks that work on the grid alone."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vitkit.models.cross_attention import CrossAttention, attend_from_prefix
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Block

# B batch · P prefix tokens · N patches · D width


class PrefixAttention(nn.Module):
    """``p ← p + attn(norm(p) → norm([p; patches]))``: pre-norm attention whose queries are the prefix tokens.

    Args:
        dim: D. num_heads: H.

    Shape: x (B, P+N, D), layout → the new prefix (B, P, D).
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, num_heads)

    @classmethod
    def of(cls, old: nn.Module | None, spec: PartSpec, warm: bool) -> PrefixAttention | None:
        """For the place of ``old``, with its norm and projections if ``warm``; None in a host without prefix tokens."""
        if not spec.num_prefix:
            return None
        new = cls(spec.dim, spec.num_heads)
        if warm and isinstance(old, Block):
            new.norm = copy.deepcopy(old.norm1)
            new.attn = CrossAttention.like(old.attn, spec.dim, spec.num_heads)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        return x[:, : layout.num_prefix] + attend_from_prefix(self.attn, self.norm(x), layout, "a block on the grid")


def renew_prefix(
    attention: PrefixAttention | None, x: Tensor, patches: Tensor, layout: TokenLayout, who: str
) -> Tensor:
    """Tokens (B, P+N, D) of new ``patches`` and a prefix that has read them.

    Args:
        attention: None in a block built for hosts without prefix tokens. x: tokens before the block, (B, P+N, D).
        patches: (B, N, D) after it. who: the block, for the message.

    Raises: BadInput if there are prefix tokens and no ``attention``.
    """
    if attention is None:
        return torch.cat([attend_from_prefix(None, x, layout, who), patches], 1)
    joined = torch.cat([x[:, : layout.num_prefix], patches.to(x.dtype)], 1)
    return torch.cat([attention(joined, layout), joined[:, layout.num_prefix :]], 1)

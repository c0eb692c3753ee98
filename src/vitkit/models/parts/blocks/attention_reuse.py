"""Blocks that look where an earlier block looked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.layout import Tap, TokenLayout
from vitkit.models.rehost import adopt
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention, Block

# B batch · H heads · n = P+N tokens · D width · d head dim

_NAME = "attention-reuse"


class AttentionReuse(Block):
    """Every E-th block computes attention weights, the blocks between use them again: ``update = W_o (A W_v x)``.

    A, (B, H, n, n), comes from the last block whose index is a multiple of E, with its positions, masks and edits. A
    block that reuses has no queries, keys and softmax: 2 n D² + 2 n² D multiplications and half of the attention's
    weights less. It starts from its old values and output projection. With E = 1 nothing changes.

    Args:
        every: E, default 2.

    Shape: (B, n, D), layout → the same; the weights travel in ``layout.memory``.
    Raises: BadInput for ``every`` below 1, for a block without standard attention, and when no earlier block has left
        its weights. ValueError when tokens were merged, dropped or added in between.
    Paper: LazyFormer, arXiv:2102.12702; SkipAt, arXiv:2301.02240; a mechanism of Image Recognition with Online
        Lightweight Vision Transformer: A Survey, arXiv:2505.03113.
    Departs from the papers: SkipAt copies the update through a small network; here the weights are copied.
    """

    slot = "block"
    # with every=1 exactly; reusing blocks attend elsewhere
    preserves = "none"
    every = 1

    @classmethod
    def from_standard(cls, old: nn.Module, spec: PartSpec, warm: bool = True, every: int = 2) -> AttentionReuse:
        if every < 1:
            raise BadInput(f"attention-reuse: every={every} must be at least 1, which changes nothing.")
        attn = getattr(old, "attn", None)
        if not isinstance(old, Block) or not isinstance(attn, Attention):
            found = type(old).__name__ if attn is None else f"a block with {type(attn).__name__}"
            raise BadInput(
                f"attention-reuse takes the attention weights of standard blocks, and block {spec.depth} is {found}; "
                "choose other blocks with where=."
            )
        if getattr(attn, "gate", None) is not None:
            raise BadInput(f"attention-reuse has no place for the gate in the attention of block {spec.depth}.")
        new = adopt(cls, old)
        new.every = every
        if (spec.depth or 0) % every:
            new.attn = ReusedAttention.like(attn.standard(), warm)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        if self.every == 1 or isinstance(self.attn, ReusedAttention):
            return super().forward(x, layout)
        kept = _Keep(layout.tap, self.depth_index)
        out, after = super().forward(x, layout.replace(tap=kept))
        assert kept.weights is not None
        left = Left(kept.weights, layout.coords)
        return out, after.replace(tap=layout.tap, memory={**after.memory, _NAME: left})

    def extra_repr(self) -> str:
        return f"every={self.every}"


@dataclass(frozen=True, eq=False)
class Left:
    """Weights (B, H, n, n) and the places of the rows they are about."""

    weights: Tensor
    coords: Tensor | None


class ReusedAttention(nn.Module):
    """``W_o (A W_v x)`` with weights A of an earlier block; made by :class:`AttentionReuse`."""

    takes_layout = True
    depth_index: int | None = None

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, attn_drop: float = 0.0, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(proj_drop)

    @classmethod
    def like(cls, old: Attention, warm: bool) -> ReusedAttention:
        dim, inner = old.qkv.in_features, old.num_heads * old.head_dim
        new = cls(dim, old.num_heads, old.qkv.bias is not None, old.attn_drop.p, old.proj_drop.p)
        new.v = nn.Linear(dim, inner, bias=old.qkv.bias is not None)
        new.proj = nn.Linear(inner, dim, bias=old.proj.bias is not None)
        new.norm, new.depth_index = old.norm, old.depth_index
        if warm:
            with torch.no_grad():
                new.v.weight.copy_(old.qkv.weight[2 * inner :])
                if old.qkv.bias is not None:
                    new.v.bias.copy_(old.qkv.bias[2 * inner :])
            new.proj.load_state_dict(old.proj.state_dict())
        return new.to(old.qkv.weight.device, old.qkv.weight.dtype)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        left: Left | None = layout.memory.get(_NAME)
        if left is None:
            raise BadInput(
                f"Block {self.depth_index} uses the attention weights of an earlier block, and none has left any; swap "
                "attention-reuse into the block whose index is the multiple of `every` before it too."
            )
        if left.weights.shape[-1] != x.shape[1] or left.coords is not layout.coords:
            raise ValueError(
                f"Block {self.depth_index} uses attention weights for {left.weights.shape[-1]} tokens, and the tokens "
                f"({x.shape[1]}) have changed since; merge or drop them in a block that computes its weights."
            )
        tap, depth = layout.tap, self.depth_index
        v = self.v(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        weights = left.weights
        if tap is not None:
            v, weights = tap("attn.v", v, depth, layout), tap("attn.weights", weights, depth, layout)
        z = self.attn_drop(weights).to(v.dtype) @ v
        if tap is not None:
            z = tap("attn.z", z.transpose(1, 2), depth, layout).transpose(1, 2)
        return self.proj_drop(self.proj(self.norm(z.transpose(1, 2).flatten(2))))


class _Keep:
    """A tap that keeps the attention weights of one block and leaves everything to the tap around it."""

    def __init__(self, outer: Tap | None, depth: int | None) -> None:
        self.outer, self.depth = outer, depth
        self.weights: Tensor | None = None

    def wants(self, site: str, depth: int | None) -> bool:
        return (site == "attn.weights" and depth == self.depth) or (
            self.outer is not None and self.outer.wants(site, depth)
        )

    def __call__(self, site: str, value: Tensor, depth: int | None, layout: TokenLayout) -> Tensor:
        if self.outer is not None and self.outer.wants(site, depth):
            value = self.outer(site, value, depth, layout.replace(tap=self.outer))
        if site == "attn.weights" and depth == self.depth:
            self.weights = value
        return value

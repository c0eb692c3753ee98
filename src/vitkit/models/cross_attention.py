"""Attention of one set of tokens to another."""

from __future__ import annotations

import copy
import math
from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.vit import Attention

# B batch · H heads · d head dim · Q queries · K keys · P prefix tokens · N patches


class CrossAttention(nn.Module):
    """Queries from one set of tokens, keys and values from another: ``proj(softmax(q kᵀ/√d + bias) v)``.

    Fused while nobody asks for the weights, explicit otherwise; both agree to 1e-5 in float32. A query that may see no
    key gets the update 0, so that a residual connection keeps its state.

    Args:
        dim: D of queries and output. num_heads: H, divides D.
        kv_dim: width of the tokens that are attended to; None: D.
        qkv_bias: biases of the three projections in front.
        proj_drop: dropout behind the output projection.

    Shape: q_tokens (B, Q, D), kv_tokens (B, K, kv_dim) → (B, Q, D); ``bias`` is a float tensor added to the logits and
        ``mask`` a bool tensor, True where a query may see a key, both broadcastable to (B, H, Q, K).
    Raises: BadInput if ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, kv_dim: int | None = None, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise BadInput(
                f"num_heads={num_heads} does not divide dim={dim}; use one of "
                f"{[h for h in range(1, dim + 1) if dim % h == 0]}."
            )
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(kv_dim or dim, 2 * dim, bias=qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        for linear in (self.q, self.kv, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    @classmethod
    def like(cls, old: nn.Module | None, dim: int, num_heads: int) -> CrossAttention:
        """One that starts with the projections of a self-attention of the same width, if ``old`` is one.

        Given the same tokens on both sides it then computes what ``old`` does (without positions in its logits).
        """
        if not isinstance(old, Attention) or old.qkv.in_features != dim or old.qkv.out_features != 3 * dim:
            return cls(dim, num_heads)
        new = cls(dim, old.num_heads, qkv_bias=old.qkv.bias is not None, proj_drop=old.proj_drop.p)
        with torch.no_grad():
            new.q.weight.copy_(old.qkv.weight[:dim])
            new.kv.weight.copy_(old.qkv.weight[dim:])
            if old.qkv.bias is not None:
                new.q.bias.copy_(old.qkv.bias[:dim])
                new.kv.bias.copy_(old.qkv.bias[dim:])
            new.proj.load_state_dict(old.proj.state_dict(), strict=False)
        new.q_norm, new.k_norm = copy.deepcopy(old.q_norm), copy.deepcopy(old.k_norm)
        return new

    @overload
    def forward(
        self,
        q_tokens: Tensor,
        kv_tokens: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        q_tokens: Tensor,
        kv_tokens: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        need_weights: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        q_tokens: Tensor,
        kv_tokens: Tensor,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        need_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The update (B, Q, D); with ``need_weights`` also the weights (B, H, Q, K), zero for a query without keys."""
        q = self.q_norm(self.q(q_tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        k, v = self.kv(kv_tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        k = self.k_norm(k)
        added, alive = _merge(bias, mask, q.dtype)
        if need_weights:
            logits = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            if added is not None:
                logits = logits.masked_fill(~added, -math.inf) if added.dtype == torch.bool else logits + added
            weights = logits.softmax(-1)
            if alive is not None:
                weights = weights * alive
            z = weights @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=added)
        if alive is not None:
            z = z * alive
        out = self.proj(z.transpose(1, 2).flatten(2))
        if alive is not None and self.proj.bias is not None:
            # the bias of the projection would move a query that has seen nothing
            out = out * alive.expand(-1, self.num_heads, -1, -1).any(1)
        out = self.proj_drop(out)
        return (out, weights) if need_weights else out


def attend_from_prefix(attention: CrossAttention | None, x: Tensor, layout: TokenLayout, who: str) -> Tensor:
    """Update (B, P, D) of the prefix tokens by attention to all tokens, for mixers that are about patches alone.

    Args:
        attention: None in a mixer built for hosts without prefix tokens. x: (B, P+N, D). who: mixer, for the message.

    Raises: BadInput if there are prefix tokens and no ``attention``.
    """
    num_prefix, mask = layout.num_prefix, layout.key_mask()
    if not num_prefix:
        return x[:, :0]
    if attention is None:
        raise BadInput(
            f"{who} was built for tokens without prefix, and here come {num_prefix}; add the prefix tokens first, then "
            f"swap in {who}."
        )
    return attention(x[:, :num_prefix], x, mask=None if mask is None else mask[:, None, None])


def _merge(bias: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """One mask for the kernel, and which queries have a key at all, (…, Q, 1); None if all have."""
    if bias is not None:
        bias = bias.to(dtype)
    if mask is None:
        return bias, None
    # every broadcast axis has to exist for what follows
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    alive = mask.any(-1, keepdim=True)
    # a row without any key would be softmax over nothing, which is NaN: let it see everything, then zero it
    allowed = mask | ~alive
    return (allowed if bias is None else bias.masked_fill(~allowed, -math.inf)), alive

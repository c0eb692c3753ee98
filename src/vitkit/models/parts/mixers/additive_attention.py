"""Attention without a product of all pairs: one global query for every key."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import unknown
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention

# B batch · P prefix tokens · N patches · n = P+N · D width


class AdditiveAttention(nn.Module):
    """``q = W_q x``, ``k = W_k x``, ``α = softmax_n(q·w/√D)``, ``g = Σ_n α_n q_n``, ``update = W_o (W (g ⊙ k) + q)``.

    Linear in the number of tokens: all of them write into the global query g, and each key reads from it. Prefix tokens
    take part like patches, padding takes none, and a merged token counts as often as the patches it stands for.

    Args:
        dim: D.
        weights: "softmax" (default), or "l2": q and k of length 1 and α divided by its length over the tokens, as in
            SwiftFormer's program.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: UnknownName for other ``weights``.
    Paper: SwiftFormer, arXiv:2303.15446; Fastformer, arXiv:2108.09084; a mechanism of Image Recognition with Online
        Lightweight Vision Transformer: A Survey, arXiv:2505.03113.
    Departs from the papers: one head; with softmax as in Fastformer, whose second pooling over the keys SwiftFormer
        leaves out.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True

    def __init__(self, dim: int, weights: Literal["softmax", "l2"] = "softmax") -> None:
        super().__init__()
        if weights not in ("softmax", "l2"):
            raise unknown("kind of weights", weights, ("softmax", "l2"), "vitkit show additive-attention")
        self.weights = weights
        self.q, self.k = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.w = nn.Parameter(torch.randn(dim))
        self.mix, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for linear in (self.q, self.k, self.mix, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    @classmethod
    def from_standard(
        cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, weights: Literal["softmax", "l2"] = "softmax"
    ) -> AdditiveAttention:
        """``warm`` takes over the host's projections of queries, keys and output, which is a start and no more."""
        new = cls(spec.dim, weights)
        if warm and isinstance(old, Attention) and old.qkv.out_features == 3 * spec.dim:
            with torch.no_grad():
                for i, linear in enumerate((new.q, new.k)):
                    rows = slice(i * spec.dim, (i + 1) * spec.dim)
                    linear.weight.copy_(old.qkv.weight[rows])
                    if old.qkv.bias is not None:
                        linear.bias.copy_(old.qkv.bias[rows])
                new.proj.load_state_dict(old.proj.state_dict(), strict=False)
        return new

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        q, k = self.q(x), self.k(x)
        if self.weights == "l2":
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        alpha = self.alpha(q, layout)
        g = (alpha.unsqueeze(-1).to(q.dtype) * q).sum(1, keepdim=True)
        return self.proj(self.mix(g * k) + q)

    def alpha(self, q: Tensor, layout: TokenLayout) -> Tensor:
        """Weights of the tokens in the global query, (B, n), at least float32."""
        scores = (q @ self.w).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        mask = layout.key_mask()
        sizes = None if layout.sizes is None else F.pad(layout.sizes, (layout.num_prefix, 0), value=1.0)
        if self.weights == "l2":
            if mask is not None:
                scores = scores * mask
            if sizes is None:
                return F.normalize(scores, dim=1)
            # a token of size s is s equal tokens: each has its share of the length, and there are s of them
            return sizes * scores / (sizes * scores.square()).sum(1, keepdim=True).sqrt().clamp(min=1e-12)
        if sizes is not None:
            scores = scores + sizes.clamp(min=1e-6).log()
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(1)

    def extra_repr(self) -> str:
        return f"weights={self.weights!r}"

"""Learned hyperedges pool the patches they fit and hand back what they found."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cross_attention import CrossAttention, attend_from_prefix
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N patches · V vertices · m hyperedges · D width

#: α, the slope of the membership in the cosine
SHARPNESS = 4.0


class Membership(NamedTuple):
    """Who belongs to which hyperedge.

    Attributes:
        log: log A (B, V, m), the soft membership; it carries the gradient. Not masked: see ``hard``.
        hard: Â (B, V, m) bool, A > ½ among the allowed pairs.
        allowed: (V, m) or (B, V, m) bool, pairs that may be linked; None: all.
    """

    log: Tensor
    hard: Tensor
    allowed: Tensor | None

    @property
    def soft(self) -> Tensor:
        """A (B, V, m) in [0, 1], exactly 0 for pairs that are not allowed."""
        soft = self.log.exp()
        return soft if self.allowed is None else soft * self.allowed


class Adjacency(nn.Module):
    """``A = σ(α ⟨ã, ẽ⟩)`` with unit vectors ``ã = W_a v / ‖W_a v‖``, ``ẽ = W_e e / ‖W_e e‖``, and Â = [A > ½].

    Args:
        dim: D. features: width of ã and ẽ.

    Shape: vertices (B, V, D) and hyperedges (B, m, D), both normalised → :class:`Membership`.
    """

    def __init__(self, dim: int, features: int) -> None:
        super().__init__()
        self.vertex, self.edge = nn.Linear(dim, features, bias=False), nn.Linear(dim, features, bias=False)

    def forward(self, vertices: Tensor, edges: Tensor, allowed: Tensor | None = None) -> Membership:
        cosine = F.normalize(self.vertex(vertices), dim=-1) @ F.normalize(self.edge(edges), dim=-1).transpose(1, 2)
        hard = cosine > 0
        return Membership(F.logsigmoid(SHARPNESS * cosine), hard if allowed is None else hard & allowed, allowed)


class HyperPool(nn.Module):
    """Patches to learned hyperedges and back, in place of self-attention: cost N·m, not N².

    Membership A is the sigmoid of a cosine (:class:`Adjacency`). Each hyperedge, of learned initial state e, attends to
    its members, ``e' = e + attn(LN e → x; log A, masked by A > ½)``, then each patch attends to the hyperedges it is a
    member of, ``update = attn(x → LN e'; log A, masked)``. A hyperedge without members keeps its state, a patch without
    hyperedge gets the update 0. Prefix tokens are in no hyperedge and attend to all tokens by ordinary attention.

    Args:
        edges: m. Default 16. features: width of the vectors compared for membership. Default 64.

    Shape: (B, P+N, D) → (B, P+N, D). Works on any set of patches; those with ``valid=False`` are in no hyperedge, and a
        merged one counts for all the patches it stands for.
    Raises: BadInput for fewer than one hyperedge, or prefix tokens in a host built without.
    Paper: Hypergraph Vision Transformers: Images are More than Nodes, More than Edges, arXiv:2504.08710.
    Departs from the paper: these are its aggregation and distribution steps alone, as a mixer; without virtual vertices
        and edges, and with hyperedges that start anew in every block. Log-memberships in the logits are ours.
    """

    slot = "mixer"
    preserves = "none"
    takes_layout = True

    def __init__(
        self, dim: int, num_heads: int, edges: int = 16, features: int = 64, prefix: CrossAttention | None = None
    ) -> None:
        super().__init__()
        if edges < 1 or features < 1:
            raise BadInput(f"edges={edges} and features={features} must be at least 1; the defaults are 16 and 64.")
        # states of the size of normalised tokens: much smaller ones would all become what they pool in the first layer
        self.edges = nn.Parameter(torch.randn(1, edges, dim))
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.adjacency = Adjacency(dim, features)
        self.aggregate = CrossAttention(dim, num_heads)
        self.distribute = CrossAttention(dim, num_heads)
        self.prefix = prefix

    @classmethod
    def from_standard(
        cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, edges: int = 16, features: int = 64
    ) -> HyperPool:
        old = old if warm else None
        prefix = CrossAttention.like(old, spec.dim, spec.num_heads) if spec.num_prefix else None
        new = cls(spec.dim, spec.num_heads, edges, features, prefix)
        new.aggregate = CrossAttention.like(old, spec.dim, spec.num_heads)
        new.distribute = CrossAttention.like(old, spec.dim, spec.num_heads)
        return new

    def membership(self, x: Tensor, layout: TokenLayout) -> Membership:
        """Of the patches of x (B, P+N, D) in the hyperedges."""
        valid = layout.valid
        edges = self.norm1(self.edges.expand(x.shape[0], -1, -1))
        return self.adjacency(x[:, layout.num_prefix :], edges, None if valid is None else valid.unsqueeze(2))

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        patches, links = x[:, layout.num_prefix :], self.membership(x, layout)
        edges = self.edges.expand(x.shape[0], -1, -1)
        edges = edges + aggregate(self.aggregate, self.norm1(edges), patches, links, log_sizes(layout, patches))
        update = distribute(self.distribute, patches, self.norm2(edges), links)
        return torch.cat([attend_from_prefix(self.prefix, x, layout, "hyper-pool"), update], 1)


def aggregate(
    attention: CrossAttention, edges: Tensor, vertices: Tensor, links: Membership, sizes: Tensor | None = None
) -> Tensor:
    """Update of the hyperedges (B, m, D) from their members; 0 for one without. ``sizes``: log sizes (B, V)."""
    bias = links.log.transpose(1, 2)
    if sizes is not None:
        bias = bias + sizes.unsqueeze(1)
    return attention(edges, vertices, bias.unsqueeze(1), links.hard.transpose(1, 2).unsqueeze(1))


def distribute(attention: CrossAttention, vertices: Tensor, edges: Tensor, links: Membership) -> Tensor:
    """Update of the vertices (B, V, D) from their hyperedges; 0 for a vertex in none."""
    return attention(vertices, edges, links.log.unsqueeze(1), links.hard.unsqueeze(1))


def log_sizes(layout: TokenLayout, like: Tensor) -> Tensor | None:
    """Logarithm of how many patches each row stands for (B, N); None if one each."""
    return None if layout.sizes is None else layout.sizes.clamp(min=1e-6).log().to(like.dtype)

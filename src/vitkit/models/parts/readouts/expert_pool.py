"""Hyperedges vote as experts: a read-out that keeps the few that are sure."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.blocks.hgvt_block import EDGE, VIRTUAL_EDGE
from vitkit.models.spec import PartSpec

# B batch · D width · m experts (hyperedges, or patches) · K classes

States = list[tuple[Tensor, TokenLayout]]


class ExpertPool(nn.Module):
    """Expert edge pooling: ``logits = W [z_E; z_I] + b`` with ``z_E = Σ w_e r_e`` and z_I the mean of the patches.

    Every hyperedge state r_e, normalised, gives a confidence ``MLP(r_e)``; the k largest of an image go through a
    softmax, all other weights are exactly 0. In a host without hyperedges (see ``hgvt-block``) the patches are the
    experts. Class token and registers are not read, nor are the host's own norm and head.

    Args:
        experts: k. Default 4. hidden: of the confidence MLP; None: D / 4.

    Shape: states [(x (B, P+N, D), layout), …] → logits (B, K), from the last of them.
    Raises: BadInput for ``experts`` below 1.
    Paper: Hypergraph Vision Transformers: Images are More than Nodes, More than Edges, arXiv:2504.08710.
    Departs from the paper: known by a detailed summary. Norm, width of the MLP, and patches as experts are ours.
    """

    slot = "readout"
    preserves = "none"
    # the host's final norm and head are not read
    no_gradient = ("norm.weight", "norm.bias", "head.weight", "head.bias")

    def __init__(self, dim: int, num_classes: int, experts: int = 4, hidden: int | None = None) -> None:
        super().__init__()
        if experts < 1:
            raise BadInput(f"experts={experts} must be at least 1; the paper has 4.")
        self.experts = experts
        self.ln = nn.LayerNorm(dim, eps=1e-6)
        hidden = max(1, dim // 4) if hidden is None else hidden
        # a last bias would add the same to all confidences
        self.confidence = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, 1, bias=False))
        self.fc: nn.Module
        self.reset(num_classes)

    @classmethod
    def from_standard(
        cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, experts: int = 4, hidden: int | None = None
    ) -> ExpertPool:
        return cls(spec.dim, spec.num_classes, experts, hidden)

    def reset(self, num_classes: int) -> None:
        """A fresh classifier; 0 classes: the pooled vector (B, 2D) comes out."""
        like = self.ln.weight
        self.fc = nn.Identity()
        if num_classes:
            linear = nn.Linear(2 * len(like), num_classes).to(like.device, like.dtype)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            self.fc = linear

    def forward(self, states: States, layout: TokenLayout) -> Tensor:
        x, layout = states[-1]
        logits = self.fc(torch.cat(self.pool(x, layout), 1))
        return layout.tap("logits", logits, None, layout) if layout.tap is not None else logits

    def weights(self, x: Tensor, layout: TokenLayout) -> Tensor:
        """Weight of every expert (B, m); they sum to 1, and all but k are exactly 0."""
        return self._vote(*self._experts(self.ln(x), layout))

    def pool(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor]:
        """z_E and z_I, (B, D) each."""
        x = self.ln(x)
        rows, valid = self._experts(x, layout)
        voted = (self._vote(rows, valid).unsqueeze(1) @ rows).squeeze(1)
        return voted, layout.mean(x[:, layout.num_prefix :])

    def _experts(self, x: Tensor, layout: TokenLayout) -> tuple[Tensor, Tensor | None]:
        if EDGE not in dict(layout.prefix):
            return x[:, layout.num_prefix :], layout.valid
        return x[:, layout.prefix_slice(EDGE).start : layout.prefix_slice(VIRTUAL_EDGE).stop], None

    def _vote(self, rows: Tensor, valid: Tensor | None) -> Tensor:
        confidence = self.confidence(rows).squeeze(-1)
        if valid is not None:
            confidence = confidence.masked_fill(~valid, torch.finfo(confidence.dtype).min)
        best, index = confidence.topk(min(self.experts, rows.shape[1]), dim=1)
        return torch.zeros_like(confidence).scatter(1, index, best.softmax(1).to(confidence.dtype))

    def extra_repr(self) -> str:
        return f"experts={self.experts}"

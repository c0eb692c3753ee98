"""Plain softmax as a normalizer: the baseline of this slot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.models.parts.normalizers.masking import full_precision, values_known
from vitkit.models.spec import PartSpec


class Softmax(nn.Module):
    """The host's own softmax on the explicit attention path, to compare other normalizers at equal cost.

    ``P_ij = exp(S_ij) / Σ_k exp(S_ik)`` over the allowed keys k; a query without any gets a row of zeros.

    Shape: scores (B, H, n, n), mask (B, 1, n, n) bool or None → (B, H, n, n), same dtype.
    Paper: Vaswani et al., Attention Is All You Need, arXiv:1706.03762, eq. 1.
    Departs from the paper: nothing.
    """

    slot = "normalizer"
    preserves = "exact"

    @classmethod
    def from_standard(cls, old: nn.Module | None, spec: PartSpec, warm: bool = True) -> Softmax:
        """There are no weights, so ``warm`` changes nothing."""
        return cls()

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        s = full_precision(scores)
        if mask is not None:
            s = s.masked_fill(~mask, -torch.inf)
        lowest = torch.finfo(s.dtype).min
        # a look at one key saves two passes over the scores; on a GPU it would wait for them
        if s.is_cpu and values_known(s) and bool((s[..., 0] > lowest).all()):
            return s.softmax(-1).to(scores.dtype)
        # a row of -inf alone would give NaN: the lowest number makes it uniform, then it is zeroed
        s = s.clamp(min=lowest)
        return (s.softmax(-1) * (s.amax(-1, keepdim=True) > lowest)).to(scores.dtype)

"""Softmax on scores of unit spread."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.parts.normalizers.masking import full_precision, values_known
from vitkit.models.spec import PartSpec


class NormSoftmax(nn.Module):
    """Softmax whose sharpness does not depend on how large the scores happen to be.

    ``P = softmax(S / sd(S))`` where sd is the standard deviation over all allowed entries of one attention matrix
    (one image, one head), taken as a constant in the backward pass. Equal scores give uniform attention.

    Args:
        eps: floor of sd (no unit), against division by zero.

    Shape: scores (B, H, n, n), mask (B, 1, n, n) bool or None → (B, H, n, n), same dtype; computed in float32 or more.
    Raises: BadInput if ``eps`` is not positive.
    Paper: Born et al., Quantum Doubly Stochastic Transformers, arXiv:2504.16275 (a baseline there).
    Departs from the paper: whose standard deviation it is (matrix, row or batch) is not said there; the matrix is
    used, so that an image's attention does not depend on the other images of the batch.
    """

    slot = "normalizer"
    preserves = "none"

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        if not eps > 0:
            raise BadInput(f"eps={eps} of NormSoftmax must be positive, for example 1e-6.")
        self.eps = eps

    @classmethod
    def from_standard(cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, eps: float = 1e-6) -> NormSoftmax:
        """There are no weights, so ``warm`` changes nothing."""
        return cls(eps)

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        s = full_precision(scores)
        if mask is not None:
            s = s.masked_fill(~mask, -torch.inf)
        if s.is_cpu and s.numel() and values_known(s) and bool(s.detach().amin() > -torch.inf):
            # nothing to leave out, the common case: half of the passes over the scores
            centred = s - s.detach().mean((-2, -1), keepdim=True)
            return self._unit_spread(centred, centred, s.shape[-2] * s.shape[-1]).softmax(-1).to(scores.dtype)
        # NaN scores are not shut out, so that a broken model is seen
        shut, alive = s == -torch.inf, s.detach().amax(-1, keepdim=True) != -torch.inf
        s = s.masked_fill(shut, 0.0)
        count = (s.shape[-2] * s.shape[-1] - shut.sum((-2, -1), keepdim=True)).clamp(min=1)
        s = s - s.detach().sum((-2, -1), keepdim=True) / count
        s = self._unit_spread(s, s.masked_fill(shut, 0.0), count)
        return (s.masked_fill(shut & alive, -torch.inf).softmax(-1) * alive).to(scores.dtype)

    def _unit_spread(self, s: Tensor, allowed: Tensor, count: Tensor | int) -> Tensor:
        # the mean is taken off before dividing: equal scores must stay equal after division by a tiny eps
        length = torch.linalg.vector_norm(allowed.detach(), dim=(-2, -1), keepdim=True)
        return s / (length / count**0.5).clamp(min=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"

"""Doubly stochastic attention by Sinkhorn's alternating normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.parts.normalizers.masking import allowed_entries, full_precision
from vitkit.models.spec import PartSpec

# exp of it is 0 in every format, yet sums of it stay finite: -inf would give NaN gradients in empty rows
_FORBIDDEN = -1e30


class Sinkhorn(nn.Module):
    """Attention in which every token also *receives* a total weight of about one, so none is ignored or overheard.

    ``Z_0 = S/τ``; an odd half-step takes ``Z ← Z − logsumexp(Z)`` over rows, an even one over columns;
    ``P = exp(Z_k)``. The last half-step is over rows, so rows sum to 1 exactly; columns only in the limit.

    How near the columns get depends on the spread of S/τ: at a score sd of 4 and 8 tokens, ``steps=3`` leaves summed
    column errors above 1 and ``steps=21`` still about 0.1. Measure it with
    :func:`vitkit.models.diagnostics.dsm_error`. With one step this is softmax(S/τ).

    Args:
        steps: k, number of half-steps; odd.
        tau: τ, temperature (no unit); larger is smoother and converges faster.

    Shape: scores (B, H, n, n), mask (B, 1, n, n) bool or None → (B, H, n, n), same dtype; computed in float32 or more.
    With a mask (the same for queries and keys) the matrix is doubly stochastic over the valid tokens, zero elsewhere;
    entries with a score of -inf are zero; a query that may see no key at all gives NaN without a mask, as in softmax.
    What is added to all scores of a key alike, such as the log size of a merged token, loses its effect with every step
    over columns, and has none in the limit.
    Raises: BadInput if ``steps`` is even or not positive, or ``tau`` is not positive.
    Paper: Born et al., Quantum Doubly Stochastic Transformers, arXiv:2504.16275 (k = 3 and 21); the normalisation is
    that of Sander et al., Sinkformers, arXiv:2110.11773.
    Departs from the paper: nothing. Pool by class token or by flattening: with unit column sums the mean of P v is the
    mean of v, so under mean pooling the last attention layer drops out.
    """

    slot = "normalizer"
    preserves = "none"

    def __init__(self, steps: int = 3, tau: float = 1.0) -> None:
        super().__init__()
        if steps < 1 or steps % 2 == 0:
            raise BadInput(f"steps={steps} of Sinkhorn must be odd and positive (3, 21, …), so that rows end exact.")
        if not tau > 0:
            raise BadInput(f"tau={tau} of Sinkhorn must be positive; 1 is the usual choice.")
        self.steps, self.tau = steps, tau

    @classmethod
    def from_standard(
        cls, old: nn.Module | None, spec: PartSpec, warm: bool = True, steps: int = 3, tau: float = 1.0
    ) -> Sinkhorn:
        """There are no weights, so ``warm`` changes nothing."""
        return cls(steps, tau)

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        z = full_precision(scores) / self.tau
        if mask is None:
            # a row of -inf alone only needs care before a step over columns: one flag a key, not one an entry
            forbidden = (scores.amax(-2, keepdim=True) == -torch.inf).detach()
        else:
            forbidden = ~allowed_entries(scores, mask)
            z = z.masked_fill(forbidden, _FORBIDDEN)
        if self.steps == 1:
            return z.softmax(-1).masked_fill(forbidden, 0.0).to(scores.dtype)
        # the logarithms matter: a column far below the others would underflow before its own step lifts it
        for step in range(self.steps - 2):
            # z − logsumexp(z) in one pass; it lifts an empty row or column to finite values, hence the second
            z = z.log_softmax(-1 - step % 2).masked_fill(forbidden, _FORBIDDEN)
        weights = z.softmax(-2).masked_fill(forbidden, 0.0)
        # a row was normalised before, so it has an entry of 1/n or more: only one without any allowed key sums to 0
        rows = weights.sum(-1, keepdim=True)
        return (weights / rows.masked_fill(rows == 0, 1.0)).to(scores.dtype)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, tau={self.tau}"

"""Doubly stochastic attention from the orthogonal factor of the scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.parts.normalizers.masking import full_precision, refuse_forbidden, refuse_mask
from vitkit.models.spec import PartSpec


class QROrthostochastic(nn.Module):
    """Exactly doubly stochastic attention without parameters or iteration: the classical twin of the quantum circuit.

    ``S + ridge·I = Q R`` and ``P = Q ⊙ Q``: the squares of an orthogonal matrix sum to 1 along rows and columns.
    S = 0 gives the identity, with zero gradient. The cost is O(n³) per matrix.

    Near rank one the gradient of Q grows without bound (thousands), so it is clipped per matrix: its norm is at most
    ``max_gain`` times the norm of the gradient that came in. The bound does not depend on the scale of the loss.

    Args:
        ridge: added to the diagonal of S so that it has full rank (units of the scores).
        max_gain: largest ratio of outgoing to incoming gradient norm; None leaves the gradient as it is.

    Shape: scores (B, H, n, n) → (B, H, n, n), same dtype; computed in float32 or more.
    Raises: BadInput if ``ridge`` is negative or ``max_gain`` not positive, and in forward if there is a mask or a
    score of -inf.
    Paper: Born et al., Quantum Doubly Stochastic Transformers, arXiv:2504.16275 (the QR baseline).
    Departs from the paper: the sign convention diag R > 0 is left out, because signs vanish in Q ⊙ Q; ridge and
    gradient clipping are ours. Pool by class token or by flattening, never by the mean (see ``Sinkhorn``).
    """

    slot = "normalizer"
    preserves = "none"
    onnx_note = "ONNX has no QR decomposition (aten.linalg_qr)"

    def __init__(self, ridge: float = 1e-4, max_gain: float | None = 10.0) -> None:
        super().__init__()
        if ridge < 0:
            raise BadInput(f"ridge={ridge} of the QR normalizer must not be negative; 1e-4 is the usual choice.")
        if max_gain is not None and not max_gain > 0:
            raise BadInput(f"max_gain={max_gain} of the QR normalizer must be positive, or None for no clipping.")
        self.ridge, self.max_gain = ridge, max_gain

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        ridge: float = 1e-4,
        max_gain: float | None = 10.0,
    ) -> QROrthostochastic:
        """There are no weights, so ``warm`` changes nothing."""
        return cls(ridge, max_gain)

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        refuse_mask(mask, "The QR normalizer")
        refuse_forbidden(scores, "The QR normalizer")
        s = full_precision(scores)
        s = s + self.ridge * torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
        return _SquaredQ.apply(s, self.max_gain).to(scores.dtype)

    def extra_repr(self) -> str:
        return f"ridge={self.ridge}, max_gain={self.max_gain}"


class _SquaredQ(torch.autograd.Function):
    """A → Q ⊙ Q with A = Q R; the backward bounds the gain, which needs both gradients in one place."""

    @staticmethod
    def forward(a: Tensor, max_gain: float | None) -> Tensor:
        return torch.linalg.qr(a)[0].square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | None], output: Tensor) -> None:
        a, ctx.max_gain = inputs
        # Q and R are computed again from A, so that a second derivative sees how they depend on it
        ctx.save_for_backward(a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (a,) = ctx.saved_tensors
        q, r = torch.linalg.qr(a)
        grad_q = 2 * q * grad
        # dA = (dQ + Q·sym) R⁻ᵀ with sym the symmetric completion of the lower triangle of −dQᵀQ
        lower = -(grad_q.mT @ q).tril()
        sym = lower + lower.tril(-1).mT
        out = torch.linalg.solve_triangular(_away_from_zero(r), (grad_q + q @ sym).mT, upper=True).mT
        if ctx.max_gain is not None:
            norm = torch.linalg.matrix_norm(out, keepdim=True)
            bound = ctx.max_gain * torch.linalg.matrix_norm(grad, keepdim=True)
            out = out * (bound / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0)
        return out, None


def _away_from_zero(r: Tensor) -> Tensor:
    """R with diagonal entries of at least the rounding error of its largest one, so that the solve stays finite."""
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    floor = torch.finfo(r.dtype).eps * diagonal.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(r.dtype).tiny)
    signed = torch.where(diagonal >= 0, floor, -floor)
    return r + torch.where(diagonal.abs() < floor, signed - diagonal, torch.zeros_like(floor)).diag_embed()

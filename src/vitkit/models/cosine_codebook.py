"""Vector quantisation by direction: every cell becomes the nearest of K learned unit vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput

# B batch · C channels · n cells · K codes


class CosineCodebook(nn.Module):
    """``q_i = e_k`` with the code k = argmax_k cos(x_i, e_k); codes are unit vectors that follow their members.

    The gradient of q passes to x/|x| unchanged (straight through). In training each code with members moves to
    ``normalise(ρ e_k + (1 − ρ) normalise(Σ x_i/|x_i|))``.

    Args:
        dim: C. codes: K. decay: ρ. Default 0.8.

    Shape: (B, C, …) → quantised (B, C, …), codes (B, …) long, and the commitment loss ``mean (x/|x| − sg(q))²``.
    Raises: BadInput for fewer than 2 codes or ρ outside [0, 1].
    Paper: the quantiser behind the encoder of DCFormer, arXiv:2502.05091, kept from CT-ViT.
    Departs from the paper: codes without members stay where they are.
    """

    codebook: Tensor

    def __init__(self, dim: int, codes: int = 8192, decay: float = 0.8) -> None:
        super().__init__()
        if codes < 2 or not 0 <= decay <= 1:
            raise BadInput(
                f"A codebook needs at least 2 codes and a decay in [0, 1], not codes={codes}, decay={decay}."
            )
        self.decay = decay
        self.register_buffer("codebook", F.normalize(torch.randn(codes, dim), dim=-1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        unit = F.normalize(x.movedim(1, -1), dim=-1)
        rows = unit.flatten(0, -2)
        codes = (rows.detach() @ self.codebook.to(rows.dtype).T).argmax(-1)
        found = self.codebook[codes].to(x.dtype).view_as(unit)
        if self.training:
            self._follow(rows.detach().float(), codes)
        loss = F.mse_loss(unit, found)
        quantised = unit + (found - unit).detach()
        return quantised.movedim(-1, 1), codes.view(unit.shape[:-1]), loss

    @torch.no_grad()
    def _follow(self, rows: Tensor, codes: Tensor) -> None:
        sums = torch.zeros_like(self.codebook, dtype=torch.float32).index_add_(0, codes, rows)
        used = torch.zeros(len(sums), 1, device=sums.device).index_fill_(0, codes, 1.0) > 0
        moved = self.decay * self.codebook.float() + (1 - self.decay) * F.normalize(sums, dim=-1)
        self.codebook.copy_(torch.where(used, F.normalize(moved, dim=-1), self.codebook.float()))

    def extra_repr(self) -> str:
        return f"codes={len(self.codebook)}, decay={self.decay}"

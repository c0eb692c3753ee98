"""Logits from points of the Lorentz model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.lorentz.manifold import Curved, wide

# K classes · D coordinates of a point, time first


class LorentzMLR(nn.Module):
    """Multinomial logistic regression by signed distances from hyperbolic hyperplanes.

    A class has a distance a from the origin and a normal z: ``w = (sinh(a/√c)‖z‖, cosh(a/√c)z)``,
    ``β = √(‖w_s‖² − w_t²)``, ``α = −w_t x_t + w_s·x_s``, ``logit = sign(α)·β·√c·|arsinh(α/(β√c))|``. As
    cosh² − sinh² = 1, β is ‖z‖. For large c the logit is ``z·x_s − a‖z‖``, that of a plane.

    A logit grows with the logarithm of the distance, at most to ``‖z‖√c·arsinh(‖x_s‖/√c)`` at a = 0, so short normals
    keep answers undecided: a larger ``scale`` shortens the time they take to grow.

    Args:
        features: D, time coordinate included. num_classes: K.
        scale: of the normals at the start: z is uniform in ±scale/√(D−1), a in ±1/√(D−1).

    Shape: (…, D), c → (…, K), in the dtype of the parameters.
    Raises: BadInput for no class or fewer than two coordinates.
    Paper: HyperCore, arXiv:2504.08912 (the head of arXiv:2303.15919).
    """

    def __init__(self, features: int, num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        if num_classes < 1 or features < 2:
            raise BadInput(
                f"A Lorentz head from {features} coordinates to {num_classes} classes is impossible; it needs at least "
                "2 coordinates and 1 class."
            )
        bound = 1 / math.sqrt(features - 1)
        self.a = nn.Parameter(torch.empty(num_classes).uniform_(-bound, bound))
        self.z = nn.Parameter(torch.empty(num_classes, features - 1).uniform_(-scale * bound, scale * bound))

    @property
    def out_features(self) -> int:
        return len(self.a)

    def forward(self, x: Tensor, c: Curved) -> Tensor:
        x, a, z = wide(x), wide(self.a), wide(self.z)
        unit = c**0.5
        beta = z.norm(dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            along = x[..., 1:] @ z.to(x.dtype).t()
        alpha = (a / unit).cosh() * along - (a / unit).sinh() * beta * x[..., :1]
        # a zero normal gives a zero logit, not 0/0
        angle = torch.asinh(alpha / (beta.clamp_min(1e-12) * unit))
        return (beta * unit * angle).to(self.z.dtype)

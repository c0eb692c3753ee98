"""Hyperbolic layers on the Lorentz model: geometry, linear, norm, residual, attention, embedding, head.

>>> import torch
>>> points = lift(torch.randn(2, 5, 16), 1.0)
>>> LorentzLinear(17, 9)(points, 1.0).shape
torch.Size([2, 5, 9])
"""

from vitkit.models.lorentz.attention import LorentzAttention
from vitkit.models.lorentz.embed import LorentzPatchEmbed, LorentzPositions
from vitkit.models.lorentz.head import LorentzMLR
from vitkit.models.lorentz.layers import (
    LorentzActivation,
    LorentzDropout,
    LorentzLayerNorm,
    LorentzLinear,
    LorentzMlp,
    LorentzResidual,
)
from vitkit.models.lorentz.manifold import (
    Curvature,
    centroid,
    change_curvature,
    distance,
    exp_map,
    from_poincare,
    inner,
    lift,
    log_map,
    project,
    squared_distance,
    to_poincare,
    transport,
)

__all__ = [
    "Curvature",
    "LorentzActivation",
    "LorentzAttention",
    "LorentzDropout",
    "LorentzLayerNorm",
    "LorentzLinear",
    "LorentzMLR",
    "LorentzMlp",
    "LorentzPatchEmbed",
    "LorentzPositions",
    "LorentzResidual",
    "centroid",
    "change_curvature",
    "distance",
    "exp_map",
    "from_poincare",
    "inner",
    "lift",
    "log_map",
    "project",
    "squared_distance",
    "to_poincare",
    "transport",
]

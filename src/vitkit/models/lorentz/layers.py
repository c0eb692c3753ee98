"""Layers from points to points of the Lorentz model: each acts on the space part and computes the time part anew.

Points are (…, D) with their time coordinate first, in float32 at least; see :mod:`vitkit.models.lorentz.manifold`.
Every layer takes c of the curvature −1/c as its second argument, a number or a learned tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.lorentz.manifold import Curved, change_curvature, lift, squared_distance, wide

# D coordinates of a point, time first · c: the curvature is −1/c


class LorentzLinear(nn.Module):
    """``x' = lift(W[x_t; x_s] + b)``, which may turn and stretch space and mix time into it.

    The matrix product runs in the dtype of the weights or of autocast, the lift in float32.

    Args:
        in_features, out_features: D and D', time coordinate included.
        bias: b, zero at the start.

    Shape: (…, D), c → (…, D'). ``c_new`` changes the curvature of the result, see
        :func:`~vitkit.models.lorentz.manifold.change_curvature`.
    Raises: BadInput below two coordinates.
    Paper: HyperCore, arXiv:2504.08912 (the layer of Hypformer, arXiv:2407.01290).
    Departs from the paper: see :func:`start`.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        if min(in_features, out_features) < 2:
            raise BadInput(
                f"A Lorentz layer from {in_features} to {out_features} coordinates is impossible: a point has one time "
                "coordinate and at least one in space, so 2 is the least."
            )
        self.linear = nn.Linear(in_features, out_features - 1, bias=bias)
        start(self.linear, in_features, gain=math.sqrt(2))

    def space(self, x: Tensor) -> Tensor:
        """The space part (…, D'−1) of the result, for a layer that looks at nothing else."""
        return linear(x, self.linear)

    def forward(self, x: Tensor, c: Curved, c_new: Curved | None = None) -> Tensor:
        x = lift(self.space(x), c)
        return x if c_new is None else change_curvature(x, c, c_new)


class LorentzLayerNorm(nn.Module):
    """LayerNorm of the space part, then lift.

    Args:
        features: D, time coordinate included. eps: of the LayerNorm.

    Shape: (…, D), c → (…, D).
    Paper: HyperCore, arXiv:2504.08912.
    """

    def __init__(self, features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features - 1, eps=eps)

    def forward(self, x: Tensor, c: Curved) -> Tensor:
        space = wide(x[..., 1:])
        weight, bias = self.norm.weight.to(space.dtype), self.norm.bias.to(space.dtype)
        return lift(F.layer_norm(space, self.norm.normalized_shape, weight, bias, self.norm.eps), c)


class LorentzActivation(nn.Module):
    """``lift(f(x_s))`` for a function f of single numbers.

    Args:
        function: f; GELU if None.

    Shape: (…, D), c → (…, D).
    Paper: HyperCore, arXiv:2504.08912.
    """

    def __init__(self, function: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.function = function if function is not None else nn.GELU()

    def forward(self, x: Tensor, c: Curved) -> Tensor:
        return lift(self.function(wide(x[..., 1:])), c)


class LorentzDropout(nn.Module):
    """Dropout of space coordinates in training, then lift.

    Args:
        p: probability of a coordinate to become zero.

    Shape: (…, D), c → (…, D).
    Paper: HyperCore, arXiv:2504.08912.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor, c: Curved) -> Tensor:
        return lift(self.drop(x[..., 1:]), c) if self.training and self.drop.p else x


class LorentzResidual(nn.Module):
    """A residual connection of points: ``m = x + w·y``, ``√c·m/√|⟨m, m⟩_L|``, its space part times a scale, lift.

    The weighted midpoint of two far points lies near the origin, at 1 in space for two orthogonal ones; the scale sets
    it back. ``−⟨m, m⟩_L = c(1 + w)² + w⟨x − y, x − y⟩_L`` is never below c, so nothing is clamped.

    Args:
        scale: of the space part; with ``learn_scale`` where it starts.
        learn_scale: learn it, as e^s.

    Shape: (…, D), (…, D), c → (…, D); the two broadcast.
    Raises: BadInput if the scale is not positive.
    Paper: HyperCore, arXiv:2504.08912 (its LResNet; Lorentzian Residual Neural Networks, arXiv:2412.14695).
    Departs from the paper: w is e^u with u learned from 0, as a negative w could lead off the sheet.
    """

    def __init__(self, scale: float = 1.0, learn_scale: bool = False) -> None:
        super().__init__()
        if not scale > 0:
            raise BadInput(f"scale={scale} of a Lorentz residual must be positive; the paper's network takes 27.5.")
        self.log_weight = nn.Parameter(torch.zeros(()))
        self.scale, self.log_scale = scale, None
        if learn_scale:
            self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, x: Tensor, y: Tensor, c: Curved) -> Tensor:
        weight = wide(self.log_weight).exp()
        size = c * (1 + weight) ** 2 + weight * squared_distance(x, y)
        scale = self.scale if self.log_scale is None else wide(self.log_scale).exp()
        space = wide(x[..., 1:]) + weight * y[..., 1:]
        return lift(space * (scale * (c / size) ** 0.5).unsqueeze(-1), c)


class LorentzMlp(nn.Module):
    """Linear, GELU, linear, dropout, all on points.

    Args:
        features: D of input and output. hidden: D' between them. drop: rate of the dropout.

    Shape: (…, D), c → (…, D).
    Paper: HyperCore, arXiv:2504.08912.
    """

    def __init__(self, features: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1, self.fc2 = LorentzLinear(features, hidden), LorentzLinear(hidden, features)
        self.act, self.drop = nn.GELU(), LorentzDropout(drop)

    def forward(self, x: Tensor, c: Curved) -> Tensor:
        # the time between fc1 and the activation would be thrown away
        return self.drop(self.fc2(lift(self.act(self.fc1.space(x)), c), c), c)


def start(layer: nn.Linear, point: int, gain: float = 1.0) -> None:
    """Xavier weights and zero bias for a linear layer on points, deaf to their time coordinates.

    A time coordinate is as large as all of space together and nearly the same for all tokens. With random weights for
    it each layer adds one constant vector, as large as the answer itself, to all tokens, and images look alike after a
    few layers. What time is good for is learned.

    Args:
        layer: to be filled. point: coordinates of each of the points that stand side by side in its input.
        gain: of the Xavier start.
    """
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    with torch.no_grad():
        layer.weight[:, ::point] = 0
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """A plain linear layer on points, in its own dtype (or autocast's)."""
    return layer(x.to(layer.weight.dtype))

"""Self-attention between points of the Lorentz model."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.lorentz.layers import linear, start
from vitkit.models.lorentz.manifold import (
    Curved,
    flip_time,
    from_mean,
    lift,
    pairwise_squared_distance,
    wide,
)

# B batch · N tokens · D coordinates of a token, time first · H heads · d space coordinates of a head

VARIANTS = ("full", "linear")


class LorentzAttention(nn.Module):
    """Queries, keys and values are points; near keys weigh more; a head's answer is a Lorentz centroid of values.

    q, k, v = lift(linear(x)). "full": ``softmax_j((2c + 2⟨q, k_j⟩_L)/s)``, minus the squared Lorentzian distance over a
    learned s > 0, then ``√c·μ/√|⟨μ, μ⟩_L|`` of ``μ = Σ_j P_j v_j``. "linear", in time and memory linear in N: with
    ``φ(z) = ‖z‖/‖z^p‖·z^p`` of ``z = ReLU(space) + 1e-6``, ``φ(q)(Σ_j φ(k_j)v_jᵀ)/(φ(q)·Σ_j φ(k_j)) + V v`` on the
    space parts, then lift. The coordinates of all heads, side by side, go through a linear layer and are lifted.

    As 2⟨q, k⟩_L/s is the dot product of ``(2/s)(−q_t, q_s)`` with k, and 2c/s cancels in the softmax, "full" runs
    through PyTorch's fused attention; the logits themselves, cut at 0 where rounding lifts them above it, come from
    :meth:`logits`. Both agree to rounding: about 1e-6·q_t·k_t/s of a logit in float32. Everything but the linear layers
    runs in float32 under autocast too: beside a squared time of 800 there is no room for c = 1 in bfloat16.

    Args:
        features: D, a multiple of ``num_heads``; every head gets D/H coordinates, one of them time.
        num_heads: H.
        variant: "full" or "linear".
        power: p of φ, positive; a larger one makes the linear variant more selective.
        qkv_bias: biases of queries, keys and values.

    Attributes: ``fused_attn``: False computes the weights one by one.
    Shape: (B, N, D), c → (B, N, D).
    Raises: BadInput if ``features`` cannot be shared among the heads or ``power`` is not positive; UnknownName for
        another variant.
    Paper: HyperCore, arXiv:2504.08912 (attention of Hypformer, arXiv:2407.01290).
    Departs from the paper: its learned scalar beside the logits and its learned norm of the linear features are left
        out: they cancel. s is kept positive by exp. V of the linear variant is shared by the heads and square. The
        start is that of :func:`~vitkit.models.lorentz.layers.start`.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        variant: Literal["full", "linear"] = "full",
        power: float = 2.0,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__()
        if features % num_heads or features // num_heads < 2:
            raise BadInput(
                f"{features} coordinates cannot be shared by {num_heads} Lorentz heads: each needs as many, at least 2 "
                f"(one of them time); take a multiple of {num_heads} such as {17 * num_heads}."
            )
        if variant not in VARIANTS:
            raise unknown("Lorentz attention", variant, VARIANTS, "vitkit show lvit")
        if not power > 0:
            raise BadInput(f"power={power} of the linear attention must be positive; the paper takes 2.")
        self.num_heads, self.head_dim = num_heads, features // num_heads - 1
        self.variant, self.power, self.fused_attn = variant, power, True
        self.qkv = nn.Linear(features, 3 * num_heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(features, features - 1)
        start(self.qkv, features)
        start(self.proj, self.head_dim + 1)
        self.log_scale: nn.Parameter | None = None
        self.value: nn.Linear | None = None
        if variant == "full":
            self.log_scale = nn.Parameter(torch.tensor(0.5 * math.log(num_heads * self.head_dim)))
        else:
            self.value = nn.Linear(self.head_dim, self.head_dim)

    def no_weight_decay(self) -> set[str]:
        return {"log_scale"} if self.log_scale is not None else set()

    def logits(self, q: Tensor, k: Tensor, c: Curved) -> Tensor:
        """``−max(0, −2c − 2⟨q, k⟩_L)/s`` of points (B, H, N, d+1) → (B, H, N, N): at most 0, which is at q = k."""
        return -pairwise_squared_distance(q, k, c) / self._scale()

    def weights(self, x: Tensor, c: Curved) -> Tensor:
        """What every token takes from every other one, (B, H, N, N), of the full variant.

        Raises: BadInput for the linear variant, which never makes them.
        """
        if self.variant == "linear":
            raise BadInput("Linear Lorentz attention has no weights to look at; build the network with variant='full'.")
        q, k, _ = self._points(x, c)
        return self.logits(q, k, c).softmax(-1)

    def forward(self, x: Tensor, c: Curved) -> Tensor:
        if self.variant == "linear":
            heads = lift(self._linear(*self._space(x)), c)
        else:
            q, k, v = self._points(x, c)
            with torch.autocast(x.device.type, enabled=False):
                if self.fused_attn:
                    q = flip_time(q) * (2 / self._scale())
                    mean = F.scaled_dot_product_attention(q, k, v, scale=1.0)
                else:
                    mean = self.logits(q, k, c).softmax(-1) @ v
            heads = from_mean(mean, c)
        return lift(linear(heads.transpose(1, 2).flatten(2), self.proj), c)

    def _linear(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = self._focus(wide(q)), self._focus(wide(k)), wide(v)
            found = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2).unsqueeze(-1))
        assert self.value is not None
        return found + linear(v, self.value)

    def _focus(self, z: Tensor) -> Tensor:
        """φ: as long as ReLU(z), but nearer to its largest coordinates; never zero."""
        z = z.relu() + 1e-6
        length = z.norm(dim=-1, keepdim=True)
        # the power of a unit vector neither overflows nor vanishes
        sharp = (z / length) ** self.power
        return sharp * (length / sharp.norm(dim=-1, keepdim=True))

    def _space(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = linear(x, self.qkv).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def _points(self, x: Tensor, c: Curved) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self._space(x)
        return lift(q, c), lift(k, c), lift(v, c)

    def _scale(self) -> Tensor:
        assert self.log_scale is not None
        return wide(self.log_scale).exp()

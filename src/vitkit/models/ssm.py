"""What the state-space mixers share: the selective layer with its weights, and a causal convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.scan import selective_scan
from vitkit.models.vit import Block

# B batch · L steps · K paths · E channels · S states · R rank of the step


class SelectiveSSM(nn.Module):
    """K selective state-space layers side by side, in one scan: Δ, B and C are linear in the input.

    ``(r, B, C) = W_x x``, ``Δ = softplus(W_Δ r + b_Δ)``, ``A = −exp(A_log)``, then
    :func:`~vitkit.models.scan.selective_scan` with the skip D.

    Args:
        channels: E.
        paths: K, each with its own weights.
        d_state: S.
        dt_rank: R.

    Attributes:
        method: of the scan, "auto" unless it is set.

    Shape: x (B, L, K, E), still (B, L, K) bool or None → (B, L, K, E) in the dtype of x; at a step that is ``still`` no
        time passes: it neither changes the state nor is it of use to others. ``common`` = T: T neighbours on the batch
        axis are one signal of T·E channels, whose Δ, B and C come from their mean: what a layer does that shares its
        weights between T signals side by side. ``choice`` (B, L, K, E): what B and C are computed from in place of x.
    Raises: BadInput for a size below 1.
    Paper: Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv:2312.00752; starting values are those
        of its code: A = −1 … −S, D = 1, Δ log-uniform between 0.001 and 0.1.
    """

    def __init__(self, channels: int, paths: int = 1, d_state: int = 16, dt_rank: int = 4) -> None:
        super().__init__()
        if min(channels, paths, d_state, dt_rank) < 1:
            raise BadInput(
                f"A state-space layer needs at least one of each: channels={channels}, paths={paths}, "
                f"d_state={d_state}, dt_rank={dt_rank}."
            )
        self.method = "auto"
        self.sizes = (dt_rank, d_state, d_state)
        self.x_proj = nn.Parameter(torch.empty(paths, sum(self.sizes), channels).uniform_(-1, 1) / channels**0.5)
        self.dt_proj = nn.Parameter(torch.empty(paths, channels, dt_rank).uniform_(-1, 1) / dt_rank**0.5)
        self.dt_bias = nn.Parameter(start_of_steps(paths, channels))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(paths, channels, 1))
        self.D = nn.Parameter(torch.ones(paths, channels))

    def no_weight_decay(self) -> set[str]:
        """Decay would pull A towards −1 and the steps towards softplus(0) = 0.69."""
        return {"A_log", "D", "dt_bias"}

    def forward(self, x: Tensor, still: Tensor | None = None, common: int = 1, choice: Tensor | None = None) -> Tensor:
        mean = x if common == 1 else x.unflatten(0, (-1, common)).mean(1)
        if choice is None:
            projected = torch.einsum("blke,kfe->blkf", mean, self.x_proj)
        else:
            step, states = self.x_proj.split((self.sizes[0], 2 * self.sizes[1]), 1)
            projected = torch.cat(
                [torch.einsum("blke,kfe->blkf", mean, step), torch.einsum("blke,kfe->blkf", choice, states)], -1
            )
        if common > 1:
            projected = projected.repeat_interleave(common, 0)
        r, b, c = projected.split(self.sizes, -1)
        delta = torch.einsum("blkr,ker->blke", r, self.dt_proj)
        if still is not None:
            delta = delta.masked_fill(still.unsqueeze(-1), -torch.inf)
        y = selective_scan(
            x.flatten(2),
            delta.flatten(2),
            -self.A_log.float().exp().flatten(0, 1),
            b,
            c,
            self.D.flatten(),
            delta_bias=self.dt_bias.flatten(),
            method=self.method,
        )
        return y.view(x.shape)


class CausalConv(nn.Module):
    """Depthwise convolution along a sequence that sees the present and the past only.

    ``y_t = b + Σ_j w_j x_{t−j}``, j = 0 … width−1, zero before the first step.

    Args:
        channels: each with its own weights. width: taps.

    Shape: (B, L, channels) → same.
    Raises: BadInput for a width below 1.
    """

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise BadInput(f"d_conv={width}: a convolution needs at least one tap.")
        self.weight = nn.Parameter(torch.empty(width, channels).uniform_(-1, 1) / width**0.5)
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-1, 1) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        length, width = x.shape[1], len(self.weight)
        padded = F.pad(x, (0, 0, width - 1, 0))
        # taps, not steps: a grouped convolution would want channels first and copy everything twice
        out = self.bias + self.weight[0] * x
        for j in range(1, width):
            out = out + self.weight[j] * padded[:, width - 1 - j : width - 1 - j + length]
        return out


class NoMlp(nn.Module):
    """The place of the MLP in a block that has none: the update is zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def mixer_only(block: Block, mixer: nn.Module) -> Block:
    """Make of a host's block ``x ← x + mixer(norm(x))``, which is all that a state-space network has."""
    block.attn, block.mlp, block.norm2 = mixer, NoMlp(), nn.Identity()
    return block


def own_names(model: nn.Module) -> set[str]:
    """Full names of what the layers inside ``model`` keep out of weight decay."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if prefix and callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()  # type: ignore[operator]
    }


def start_of_steps(*shape: int) -> Tensor:
    """Biases b whose steps softplus(b) are log-uniform between 0.001 and 0.1."""
    step = torch.empty(shape).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
    # the inverse of softplus
    return step + (-torch.expm1(-step)).log()


def rank_of_step(dim: int, dt_rank: int | None) -> int:
    """R: ⌈D/16⌉ unless it is given."""
    return math.ceil(dim / 16) if dt_rank is None else dt_rank

"""Spiking neurons with surrogate gradients: what networks that fire share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput

# T time steps · B batch · … any places and channels

#: what a layer of neurons remembers: membrane potential u and last spikes s
NeuronState = tuple[Tensor, Tensor]

RESETS = ("hard", "none")


class _Heaviside(torch.autograd.Function):
    """A step in the forward pass, the slope of an arctangent in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha = alpha
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * surrogate_slope(x, ctx.alpha), None


def surrogate_slope(x: Tensor, alpha: float = 2.0) -> Tensor:
    """Derivative of ``(1/π) arctan(π α x / 2)``: α/2 at 0, falling to both sides, with integral 1."""
    return (alpha / 2) / (1 + (math.pi * alpha / 2 * x) ** 2)


def spike(x: Tensor, alpha: float = 2.0) -> Tensor:
    """H(x): exactly 1 where x ≥ 0, else exactly 0; its gradient is :func:`surrogate_slope`.

    >>> x = torch.tensor([-0.5, 0.0, 2.0], requires_grad=True)
    >>> spike(x).tolist()
    [0.0, 1.0, 1.0]
    """
    return _Heaviside.apply(x, alpha)


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons.

    ``u_t = (1 − 1/τ) u_{t−1} (1 − s_{t−1}) + I_t/τ``, ``s_t = H(u_t − θ)``: the potential leaks, a spike sets it back
    to zero. Gradients pass the threshold, and the reset, by the surrogate of :func:`spike`. Potentials are float32 at
    least.

    Args:
        tau: τ ≥ 1, the time constant in steps; 1 forgets at once. Default 2.
        threshold: θ > 0. Default 1.
        alpha: steepness of the surrogate. Default 2.
        reset: "hard", or "none": no factor (1 − s).

    Shape: currents (T, …) and a state of (…) or None (zeros) → spikes (T, …), the state behind the last step.
    Raises: BadInput for options out of range, or a state of another shape.
    Attributes: record: None, or a list that gets the mean firing rate of each call (see ``count_spikes`` in
        :mod:`vitkit.models.diagnostics.spike_energy`).
    """

    def __init__(self, tau: float = 2.0, threshold: float = 1.0, alpha: float = 2.0, reset: str = "hard") -> None:
        super().__init__()
        if tau < 1 or threshold <= 0 or alpha <= 0:
            raise BadInput(f"LIF: tau={tau} must be at least 1, threshold={threshold} and alpha={alpha} above 0.")
        if reset not in RESETS:
            raise BadInput(f"LIF: reset={reset!r} must be one of {RESETS}.")
        self.tau, self.threshold, self.alpha, self.reset = tau, threshold, alpha, reset
        self.record: list[Tensor] | None = None

    def forward(self, current: Tensor, state: NeuronState | None = None) -> tuple[Tensor, NeuronState]:
        if state is not None and state[0].shape != current.shape[1:]:
            raise BadInput(
                f"LIF: the state is of {tuple(state[0].shape)}, the currents of a step of {tuple(current.shape[1:])}; "
                "start a new batch or image size from state=None."
            )
        dtype = torch.promote_types(current.dtype, torch.float32)
        drive = current.to(dtype) / self.tau
        u, s = state if state is not None else (torch.zeros_like(drive[0]), torch.zeros_like(drive[0]))
        keep = 1 - 1 / self.tau
        fired = []
        # steps follow one another; there is no other order to compute them in
        for step in drive.unbind(0):
            u = (keep * u * (1 - s) if self.reset == "hard" else keep * u) + step
            s = spike(u - self.threshold, self.alpha)
            fired.append(s)
        spikes = torch.stack(fired)
        if self.record is not None:
            self.record.append(spikes.detach().mean())
        return spikes.to(current.dtype), (u, s)

    def extra_repr(self) -> str:
        return f"tau={self.tau}, threshold={self.threshold}, alpha={self.alpha}, reset={self.reset!r}"

"""Friendly sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.train.optimizers.perturbed import Entry, PerturbedOptimizer, total_norm


class FriendlySAM(PerturbedOptimizer):
    """SAM that climbs along the batch's own noise: ``ε = ρ·d/‖d‖``, ``d = g − σm``, ``m ← λm + (1−λ)g``.

    The full gradient, estimated by the running mean m, is taken out of the ascent direction; what remains is what
    this batch would spoil for the others. The first step has no mean yet and climbs along g.

    Args:
        params: parameters or groups.
        base: class of the optimizer that takes the step.
        rho: ρ, radius of the ball, in units of the weights.
        sigma: σ, share of the mean that is taken out; 0 is SAM.
        decay: λ of the running mean, in [0, 1).
        model: see :class:`~vitkit.train.optimizers.perturbed.PerturbedOptimizer`.
        base_kwargs: go to ``base``.

    Raises: BadInput if ``rho`` is negative or ``decay`` out of range.
    Paper: Li et al., Friendly Sharpness-Aware Minimization, arXiv:2403.12350.
    Departs from the paper: nothing.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        rho: float = 0.05,
        sigma: float = 1.0,
        decay: float = 0.9,
        model: nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        if not 0 <= decay < 1:
            raise BadInput(f"decay={decay} must be in [0, 1).")
        super().__init__(params, base, {"rho": rho, "sigma": sigma, "decay": decay}, model=model, **base_kwargs)

    def perturbation(self, entries: list[Entry]) -> list[Tensor | None]:
        directions = []
        for p, group in entries:
            state = self.ascent.setdefault(p, {})
            mean = state.get("mean")
            if mean is None:
                state["mean"] = p.grad.clone()  # type: ignore[union-attr]
                directions.append(p.grad.clone())  # type: ignore[union-attr]
            else:
                directions.append(p.grad - group["sigma"] * mean)
                mean.lerp_(p.grad, 1 - group["decay"])  # type: ignore[arg-type]
        norm = total_norm(directions) + 1e-12
        return [d * (group["rho"] / norm).to(d) for d, (_, group) in zip(directions, entries)]

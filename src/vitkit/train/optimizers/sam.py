"""Sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.train.optimizers.perturbed import Entry, PerturbedOptimizer, total_norm


class SAM(PerturbedOptimizer):
    """Seek flat minima: the step uses the gradient at the worst point of a ball, ``ε = ρ·g/(‖g‖ + 1e-12)``.

    Args:
        params: parameters or groups.
        base: class of the optimizer that takes the step.
        rho: ρ, radius of the ball, in units of the weights.
        model: see :class:`~vitkit.train.optimizers.perturbed.PerturbedOptimizer`.
        base_kwargs: go to ``base``.

    Raises: BadInput if ``rho`` is negative.
    Paper: Foret et al., Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv:2010.01412.
    Departs from the paper: nothing.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        rho: float = 0.05,
        model: nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, base, {"rho": rho}, model=model, **base_kwargs)

    def perturbation(self, entries: list[Entry]) -> list[Tensor | None]:
        grads = [p.grad for p, _ in entries]
        norm = total_norm(grads) + 1e-12  # type: ignore[arg-type]
        return [g * (group["rho"] / norm).to(g) for g, (_, group) in zip(grads, entries)]

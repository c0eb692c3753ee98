"""Adaptive sharpness-aware minimization."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.train.optimizers.perturbed import Entry, PerturbedOptimizer, total_norm


class ASAM(PerturbedOptimizer):
    """SAM whose ball is measured relative to each weight: ``ε = ρ·T²g/‖Tg‖``, ``T = |w| + η``.

    Scaling the weights of one layer up and those of the next down does not change the network; it does not change
    this ball either, unlike SAM's. Tensors with one axis (biases, norms) have T = 1.

    Args:
        params: parameters or groups.
        base: class of the optimizer that takes the step.
        rho: ρ, radius relative to the weights.
        eta: η ≥ 0, so that weights at zero can move.
        model: see :class:`~vitkit.train.optimizers.perturbed.PerturbedOptimizer`.
        base_kwargs: go to ``base``.

    Raises: BadInput if ``rho`` or ``eta`` is negative.
    Paper: Kwon et al., ASAM, arXiv:2102.11600.
    Departs from the paper: the authors' program also scales the one-axis weights of normalisation layers, by their
        name; here every tensor with one axis has T = 1.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        rho: float = 0.5,
        eta: float = 0.01,
        model: nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        if eta < 0:
            raise BadInput(f"eta={eta} must be zero or positive.")
        super().__init__(params, base, {"rho": rho, "eta": eta}, model=model, **base_kwargs)

    def perturbation(self, entries: list[Entry]) -> list[Tensor | None]:
        scales = [p.abs() + group["eta"] if p.ndim > 1 else torch.ones_like(p) for p, group in entries]
        scaled = [t * p.grad for t, (p, _) in zip(scales, entries)]
        norm = total_norm(scaled) + 1e-12
        return [t * tg * (group["rho"] / norm).to(tg) for t, tg, (_, group) in zip(scales, scaled, entries)]

"""Sharpness-aware minimization that climbs only along each layer's statistically large gradient entries."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.train.optimizers.perturbed import Entry, PerturbedOptimizer, total_norm


class ZSharp(PerturbedOptimizer):
    """SAM whose ascent direction keeps, in each weight tensor, only the entries with the largest |z-score|.

    For tensors with two or more axes ``z = (g − mean g)/(std g + 1e-12)``, ``τ = quantile(|z|, p)`` and
    ``g̃ = g·1[|z| > τ]``: raw gradient values survive, not z. Tensors with one axis, and those where ties leave no
    entry above τ, keep g. Then

    - ``norm="layer"``: ``ε_l = ρ·g̃_l/(‖g̃_l‖ + 1e-12)`` for each filtered tensor by itself, and SAM's
      ``ε_l = ρ·g_l/(‖g‖ + 1e-12)`` with the norm over all tensors for the others. The total length grows with the
      square root of the number of tensors: compare lengths before comparing with SAM.
    - ``norm="global"``: ``ε = ρ·g̃/‖g̃‖`` over all tensors together.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.ones(4, 5))
    >>> opt = ZSharp([w], base=torch.optim.SGD, percentile=0.8, lr=0.1)
    >>> w.grad = torch.arange(1.0, 21.0).view(4, 5)
    >>> (move,) = opt.perturbation([(w, opt.param_groups[0])])
    >>> int((move != 0).sum()), round(float(move.norm()), 6)
    (4, 0.05)

    Args:
        params: parameters or groups; ``rho``, ``percentile`` and ``norm`` may differ by group.
        base: class of the optimizer that takes the step.
        rho: ρ ≥ 0, length of the perturbation, in units of the weights.
        percentile: p in [0, 1), share of entries that is filtered out; 0 filters nothing.
        norm: ``"layer"`` as the authors' program does, ``"global"`` as the paper writes it.
        model: see :class:`~vitkit.train.optimizers.perturbed.PerturbedOptimizer`.
        base_kwargs: go to ``base``.

    Raises: BadInput if an option is out of range.
    Paper: Sharpness-Aware Minimization with Z-Score Gradient Filtering for Neural Networks, arXiv:2505.02369.
    Departs from the paper: ``norm="layer"`` is the default, after the authors' program; ``percentile=0`` keeps every
        entry, where a strict > would drop the smallest; quantiles come from order statistics, so that tensors of any
        size can be filtered.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: type[torch.optim.Optimizer] = torch.optim.AdamW,
        rho: float = 0.05,
        percentile: float = 0.95,
        norm: Literal["layer", "global"] = "layer",
        model: nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, base, {"rho": rho, "percentile": percentile, "norm": norm}, model=model, **base_kwargs)
        for group in self.param_groups:
            if not 0 <= group["percentile"] < 1:
                raise BadInput(f"percentile={group['percentile']} must be in [0, 1): the share that is filtered out.")
            if group["norm"] not in ("layer", "global"):
                raise BadInput(f"norm={group['norm']!r} must be 'layer' or 'global'.")

    def perturbation(self, entries: list[Entry]) -> list[Tensor | None]:
        grads = [p.grad for p, _ in entries]
        filtered = [z_filter(g, group["percentile"]) for g, (_, group) in zip(grads, entries)]  # type: ignore[arg-type]
        kept = [g if f is None else f for g, f in zip(grads, filtered)]
        sam_norm = total_norm(grads) + 1e-12  # type: ignore[arg-type]
        all_norm = total_norm(kept) + 1e-12  # type: ignore[arg-type]
        moves: list[Tensor | None] = []
        for direction, masked, (_, group) in zip(kept, filtered, entries):
            if group["norm"] == "global":
                length = all_norm
            elif masked is not None:
                length = total_norm([masked]) + 1e-12
            else:
                length = sam_norm
            moves.append(direction * (group["rho"] / length).to(direction))  # type: ignore[arg-type,union-attr]
        return moves


def z_filter(grad: Tensor, percentile: float) -> Tensor | None:
    """``g·1[|z| > τ]`` of one tensor; None where the rule does not filter (one axis, or nothing above τ).

    Args:
        grad: gradient of one parameter.
        percentile: p in [0, 1); 0 gives ``grad`` itself.
    """
    if grad.ndim < 2 or grad.numel() < 2:
        return None
    if percentile == 0:
        return grad
    g = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
    z = ((g - g.mean()) / (g.std() + 1e-12)).abs()
    keep = z > quantile(z, percentile)
    return grad * keep if bool(keep.any()) else None


def quantile(values: Tensor, q: float) -> Tensor:
    """Linear-interpolated quantile over all entries, of tensors of any size.

    ``torch.quantile`` sorts, and in some versions refuses more than 2²⁴ entries; two order statistics are enough.

    Args:
        values: any shape, at least one entry.
        q: in [0, 1].
    """
    flat = values.detach().flatten()
    rank = q * (flat.numel() - 1)
    low = math.floor(rank)
    # not kthvalue: its time is quadratic in entries that happen to be sorted downwards
    tail = flat.topk(flat.numel() - low, sorted=False).values
    if rank == low:
        return tail.min()
    lower, upper = tail.topk(2, largest=False).values
    return torch.lerp(lower, upper, rank - low)

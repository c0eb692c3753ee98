"""Adam on hyperbolic points, AdamW on everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.models.lorentz.manifold import exp_map, flip_time, inner, project, to_tangent, transport, wide


class RiemannianAdam(torch.optim.AdamW):
    """AdamW whose steps on marked parameters follow the Lorentz model of hyperbolic space.

    A parameter (…, D) with the attribute ``lorentz_c`` (c of the curvature −1/c, a number) holds points, their time
    coordinate first. With the ordinary gradient g, time reversed by J, a step is

    - ``r = Jg + ⟨x, Jg⟩_L/c·x``, the gradient in the tangent space at x,
    - ``m ← β₁m + (1−β₁)r`` and ``v ← β₂v + (1−β₂)⟨r, r⟩_L``, one v for each point,
    - ``x' = exp_x(−lr·m̂/(√v̂ + ε))``, the time coordinate computed anew, and m carried from x to x' along the geodesic.

    Before a step the point is put on the sheet by its space part, so it may have been anywhere. A point knows no weight
    decay: pulling its coordinates to zero is no motion on the sheet. Where no parameter is marked this is AdamW.

    Args:
        params: parameters or groups.
        lr, betas, eps: of both; in the groups they hold for points, too.
        others: for ``torch.optim.AdamW``; ``weight_decay`` and ``amsgrad`` do not reach points.

    Paper: Bécigneul and Ganea, Riemannian Adaptive Optimization Methods, arXiv:1810.00760; HyperCore, arXiv:2504.08912,
        trains the positions of LViT with it.
    Departs from the paper: v is not kept at its maximum (that is Riemannian AMSGrad), as in geoopt.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **others: Any,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, **others)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all parameters.

        Args:
            closure: computes the loss and its gradients, and returns the loss; or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        points = [
            (p, p.grad, group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None and getattr(p, "lorentz_c", None) is not None
        ]
        for p, _, _ in points:
            # AdamW passes over what has no gradient
            p.grad = None
        adamw = torch.optim.AdamW.step
        # torch wraps a class's step to call hooks, which our own step does already
        adamw = getattr(adamw, "__wrapped__", adamw) if getattr(adamw, "hooked", False) else adamw
        adamw(self)
        for p, grad, group in points:
            p.grad = grad
            self._move(p, -grad if group["maximize"] else grad, group)
        return loss

    def _move(self, p: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state, c = self.state[p], p.lorentz_c  # type: ignore[attr-defined]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p[..., :1])
        state["step"] += 1
        count, (beta1, beta2) = float(state["step"]), group["betas"]
        x = project(p, c)
        tangent = to_tangent(x, flip_time(wide(grad)), c)
        # a mean that came back from a checkpoint in few bits may have left the tangent space
        mean = beta1 * to_tangent(x, wide(state["exp_avg"]), c) + (1 - beta1) * tangent
        square = inner(tangent, tangent).clamp_min(0).unsqueeze(-1)
        square = beta2 * wide(state["exp_avg_sq"]) + (1 - beta2) * square
        size = (square / (1 - beta2**count)).sqrt() + group["eps"]
        moved = exp_map(x, -float(group["lr"]) / (1 - beta1**count) * mean / size, c)
        state["exp_avg"].copy_(transport(x, moved, mean, c))
        state["exp_avg_sq"].copy_(square)
        p.copy_(moved)

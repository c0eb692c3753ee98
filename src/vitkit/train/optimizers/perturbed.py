"""Two-step optimizers: climb to a worse point nearby, take the gradient there, step from where one was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from vitkit.errors import BadInput, VitkitError

Closure = Callable[[], Any]
# one parameter with a gradient, and the options of its group
Entry = tuple[nn.Parameter, dict[str, Any]]


class PerturbedOptimizer(torch.optim.Optimizer):
    """``w ← base(w, ∇L(w + ε))`` with ``ε`` from :meth:`perturbation`, the one method a rule must write.

    A step computes the gradient twice: at w, which gives ε, and at w+ε. The weights are put back bit by bit before
    the base optimizer steps. Running statistics of BatchNorm see the first pass only. Where every ρ is zero the
    second pass is left out: the step is then the base optimizer's own.

    Args:
        params: parameters or groups; the rule's options (``rho`` …) and the base's (``lr`` …) may differ by group.
        base: class of the optimizer that takes the step.
        model: the module whose BatchNorm layers keep their statistics during the second pass; None finds the layers
            as they are called, which compiled modules do not show.
        rule: options of the rule, stored in every group.
        base_kwargs: go to ``base``.

    Raises: BadInput if ``rho`` is negative or not finite.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base: type[torch.optim.Optimizer],
        rule: dict[str, Any],
        model: nn.Module | None = None,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, dict(rule))
        for group in self.param_groups:
            if not 0 <= group["rho"] < float("inf"):
                raise BadInput(f"rho={group['rho']} must be zero or positive, and finite.")
        # the base adds its own options to the same group dicts: a schedule that sets lr reaches both
        self.base = base(self.param_groups, **base_kwargs)
        self.param_groups = self.base.param_groups
        self.state = self.base.state
        self.model = model
        self.ascent: dict[nn.Parameter, dict[str, Tensor]] = {}
        #: called after the second gradient and before the base's step: the place to clip
        self.before_base_step: Callable[[], Any] | None = None

    def perturbation(self, entries: list[Entry]) -> list[Tensor | None]:
        """ε for each parameter, from ``p.grad``; None or zeros where it is not moved."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Closure | None = None, scaler: torch.amp.GradScaler | None = None) -> Any:  # type: ignore[override]
        """Two gradients, one step.

        Args:
            closure: clears gradients, computes the loss and its gradients, returns the loss; called twice.
            scaler: the gradient scaler with which ``closure`` scaled the loss. Gradients are unscaled before the rule
                sees them; call ``scaler.update()`` afterwards. An overflow skips the step, as always.

        Returns: what the first call of ``closure`` returned.

        Raises: VitkitError without a closure.
        """
        if closure is None:
            raise VitkitError(
                f"{type(self).__name__} computes two gradients a step: call step(closure) with a function that clears "
                "gradients, computes the loss, calls backward and returns the loss."
            )
        with torch.enable_grad():
            loss = closure()
        entries = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self._unscale_first(entries, scaler):
            moves = [
                (p, move)
                for (p, _), move in zip(entries, self.perturbation(entries) if self._moves(entries) else [])
                if move is not None
            ]
            if moves:
                self._second_gradient(closure, moves)
            elif scaler is not None and scaler.is_enabled():
                # the scaler expects the scaled gradient back
                for p, _ in entries:
                    p.grad.mul_(scaler.get_scale())  # type: ignore[union-attr]
        if scaler is not None and scaler.is_enabled():
            scaler.unscale_(self.base)
        if self.before_base_step is not None:
            self.before_base_step()
        if scaler is not None and scaler.is_enabled():
            scaler.step(self.base)
        else:
            self.base.step()
        return loss

    def _moves(self, entries: list[Entry]) -> bool:
        return any(group["rho"] > 0 for _, group in entries)

    @staticmethod
    def _unscale_first(entries: list[Entry], scaler: torch.amp.GradScaler | None) -> bool:
        """Divide by the scale; False, with gradients untouched, if they overflowed."""
        if scaler is None or not scaler.is_enabled():
            return True
        if not all(bool(p.grad.isfinite().all()) for p, _ in entries):  # type: ignore[union-attr]
            return False
        for p, _ in entries:
            p.grad.div_(scaler.get_scale())  # type: ignore[union-attr]
        return True

    def _second_gradient(self, closure: Closure, moves: list[tuple[nn.Parameter, Tensor]]) -> None:
        before = [p.detach().clone() for p, _ in moves]
        try:
            for p, move in moves:
                p.add_(move)
            with torch.enable_grad(), _statistics_kept(self.model):
                closure()
        finally:
            # a copy, not a subtraction: (w + ε) − ε is not w in floating point
            for (p, _), old in zip(moves, before):
                p.copy_(old)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's state, and the rule's own under ``ascent`` by parameter number."""
        numbers = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}
        return {**self.base.state_dict(), "ascent": {numbers[p]: dict(s) for p, s in self.ascent.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # type: ignore[override]
        """Continue from :meth:`state_dict`."""
        self.base.load_state_dict({k: state_dict[k] for k in ("state", "param_groups")})
        self.param_groups, self.state = self.base.param_groups, self.base.state
        params = [p for g in self.param_groups for p in g["params"]]
        self.ascent = {
            params[int(i)]: {name: value.detach().clone().to(params[int(i)].device) for name, value in state.items()}
            for i, state in state_dict.get("ascent", {}).items()
        }

    def __getstate__(self) -> dict[str, Any]:
        # torch's own keeps three fields only, so a copy would have no base to step with
        own = ("base", "model", "ascent", "before_base_step")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the rule and to the base alike."""
        base = self.__dict__.get("base")
        if base is None:
            super().add_param_group(param_group)
            return
        for name, value in self.defaults.items():
            param_group.setdefault(name, value)
        base.add_param_group(param_group)
        self.param_groups = base.param_groups


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all entries of all tensors, in float32 at least."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


@contextmanager
def _statistics_kept(model: nn.Module | None) -> Iterator[None]:
    """BatchNorm normalises by the batch, but does not record it, inside this context."""
    switched: list[_BatchNorm] = []

    def switch_off(module: nn.Module) -> None:
        # with this flag off a layer in training mode uses batch statistics and touches no buffer
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
            module.track_running_stats = False
            switched.append(module)

    handle = None
    if model is None:
        handle = register_module_forward_pre_hook(lambda module, _: switch_off(module))
    else:
        for module in model.modules():
            switch_off(module)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
        for layer in switched:
            layer.track_running_stats = True

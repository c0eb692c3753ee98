"""From settings to an optimizer: names, and which parameters are not decayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vitkit.errors import BadInput, unknown
from vitkit.train.optimizers.asam import ASAM
from vitkit.train.optimizers.friendly_sam import FriendlySAM
from vitkit.train.optimizers.perturbed import PerturbedOptimizer
from vitkit.train.optimizers.sam import SAM
from vitkit.train.optimizers.zsharp import ZSharp

OPTIMIZERS: dict[str, Any] = {
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "sam": SAM,
    "asam": ASAM,
    "friendly-sam": FriendlySAM,
    "zsharp": ZSharp,
}
_TOKENS_AND_TABLES = ("pos_embed", "cls_token", "reg_token", "dist_token", "mask_token")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with weight decay, all else without.

    Not decayed: what has one axis longer than 1 out of none or one or more than two (biases, norms, scales, tokens),
    position tables and tokens by name, and what a submodule names in timm's ``no_weight_decay()``.
    """
    named = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if callable(getattr(module, "no_weight_decay", None))
        for name in module.no_weight_decay()  # type: ignore[operator]
    }
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        # (1, K) is a matrix with one output; (1, 1, D) is a vector in disguise
        vector = p.ndim < 2 or (p.ndim > 2 and sum(side > 1 for side in p.shape) < 2)
        if vector or name in named or name.rpartition(".")[2] in _TOKENS_AND_TABLES:
            plain.append(p)
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(
    name: str, model: nn.Module, lr: float, weight_decay: float, options: dict[str, Any] | None = None
) -> torch.optim.Optimizer:
    """Build an optimizer by name over :func:`param_groups` of ``model``.

    Args:
        name: a key of :data:`OPTIMIZERS`, or an optimizer of the catalogue.
        model: its trainable parameters are optimised.
        lr: learning rate, of the base where there is one.
        weight_decay: of the decayed group.
        options: keyword arguments; ``base="sgd"`` names the base of a two-step optimizer.

    Raises:
        UnknownName: no such optimizer. BadInput: an option it does not take, or no trainable parameter.
    """
    kind = OPTIMIZERS[name] if name in OPTIMIZERS else _from_catalogue(name)
    given = dict(options or {})
    groups = param_groups(model, weight_decay)
    if not groups:
        raise BadInput("No parameter of the objective is trainable; set requires_grad on those that should learn.")
    if issubclass(kind, PerturbedOptimizer):
        given["model"] = model
        base = given.pop("base", "adamw")
        if isinstance(base, str):
            plain = {key: value for key, value in OPTIMIZERS.items() if not issubclass(value, PerturbedOptimizer)}
            if base not in plain:
                raise unknown("base optimizer", base, plain, "vitkit methods --kind optimizer")
            base = plain[base]
        given["base"] = base
        if issubclass(base, torch.optim.SGD):
            given.setdefault("momentum", 0.9)
    elif kind is torch.optim.SGD:
        # without momentum SGD does not train a transformer in any sensible time
        given.setdefault("momentum", 0.9)
    try:
        return kind(groups, lr=lr, **given)
    except TypeError as error:
        raise BadInput(f"The optimizer {name} cannot be built with {sorted(options or {})}: {error}.") from error


def _from_catalogue(name: str) -> Any:
    from vitkit.catalogue import methods

    known = {key: method for key, method in methods().items() if method.kind == "optimizer"}
    if name not in known:
        raise unknown("optimizer", name, {**OPTIMIZERS, **known}, "vitkit methods --kind optimizer")
    return known[name].load()

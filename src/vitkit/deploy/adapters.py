"""Adapters that were trained beside a network's weights, added into them."""

from __future__ import annotations

from torch import nn

from vitkit.errors import BadInput


def folded(model: nn.Module) -> nn.Module:
    """The model with every adapter of PEFT (LoRA, DoRA, IA³ …) added to the weights it belongs to.

    Engines then run one product where there were three. What cannot be added stays: prompts and prefixes are rows of
    their own, which exporters write into the graph.

    Args:
        model: changed in place where something inside it is replaced.

    Raises: BadInput if PEFT cannot merge an adapter.
    """
    if hasattr(model, "merge_and_unload"):
        return _merged(model)
    for name, child in model.named_children():
        new = folded(child)
        if new is not child:
            setattr(model, name, new)
    return model


def _merged(model: nn.Module) -> nn.Module:
    try:
        return model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except (ValueError, NotImplementedError) as error:
        raise BadInput(f"PEFT cannot add the adapters to the weights: {error}") from error

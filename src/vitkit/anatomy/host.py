"""Find the host inside whatever wraps it."""

from __future__ import annotations

from torch import nn

from vitkit.models.vit import ViT


def host(model: nn.Module) -> ViT:
    """The plain-ViT host inside ``model`` (normalising wrappers, objectives, compiled modules …).

    Raises: TypeError when there is none, with the classes that were found and what to do.
    """
    found = find_host(model)
    if found is not None:
        return found
    kinds = sorted({type(m).__name__ for m in model.modules()})[:6]
    raise TypeError(
        f"This method works inside a plain vision transformer or a rotary one, but {type(model).__name__} "
        f"(of {', '.join(kinds)} …) holds none. Bring a timm or Hugging Face ViT in with vitkit.rehost(model)."
    )


def find_host(model: nn.Module) -> ViT | None:
    """Like :func:`host`, but None when there is none."""
    return next((m for m in model.modules() if isinstance(m, ViT)), None)

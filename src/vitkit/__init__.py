"""vitkit: published vision-transformer methods as parts for any ViT, compared on your own images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitkit.after_timm import watch

__version__ = "0.1.0"

__all__ = ["__version__", "build", "deploy", "rehost", "swap"]

_LAZY = {
    "build": "vitkit.models.build",
    "rehost": "vitkit.models.rehost",
    "swap": "vitkit.models.swap",
}

if TYPE_CHECKING:
    from vitkit import deploy
    from vitkit.models.build import build
    from vitkit.models.rehost import rehost
    from vitkit.models.swap import swap


def __getattr__(name: str) -> Any:
    # torch and timm take seconds to import; `vitkit --help` must not pay for them
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "deploy":
        # a package that can be called
        return import_module("vitkit.deploy")
    raise AttributeError(f"module 'vitkit' has no attribute {name!r}")


watch()

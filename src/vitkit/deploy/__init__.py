"""From a trained model to the fastest engine that still answers like it, and a server."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["Artefact", "deploy", "load"]

_LAZY = {
    "Artefact": "vitkit.deploy.artefact",
    "deploy": "vitkit.deploy.tuner",
    "load": "vitkit.deploy.artefact",
}

if TYPE_CHECKING:
    from vitkit.deploy.artefact import Artefact, load
    from vitkit.deploy.tuner import deploy


def __getattr__(name: str) -> Any:
    # an artefact is loaded on machines without torch, which the tuner needs
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitkit.deploy' has no attribute {name!r}")


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """``vitkit.deploy(model, images)`` means ``vitkit.deploy.deploy(model, images)``."""
        return self.deploy(*args, **options)


sys.modules[__name__].__class__ = _Callable

"""Published networks with a data flow of their own: pyramids, feature maps, points, recurrent state, curved space.

A module of this package registers its networks with timm when it is imported; :func:`register` imports them all.
``import vitkit`` sees to it, so ``timm.create_model("ecvit_tiny")`` works after it.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules


def register() -> None:
    """Make the small presets and all networks of this package known to timm; again is harmless."""
    import_module("vitkit.models.presets")
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")

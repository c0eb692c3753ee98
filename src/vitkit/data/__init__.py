"""Images in: sources, splits, checks and loaders."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = [
    "AUGMENTATIONS",
    "DataReport",
    "Fold",
    "Leak",
    "Loader",
    "PointClouds",
    "PointDomains",
    "Record",
    "Skipped",
    "Source",
    "augment_points",
    "check",
    "image_from_bytes",
    "long_tail",
    "make_loader",
    "mean_std",
    "open_source",
    "perceptual_hash",
    "point_domains",
    "read_image",
    "split",
]

_LAZY = {
    "AUGMENTATIONS": "vitkit.data.augment",
    "DataReport": "vitkit.data.checks",
    "Fold": "vitkit.data.splits",
    "Leak": "vitkit.data.checks",
    "Loader": "vitkit.data.loader",
    "PointClouds": "vitkit.data.point_domains",
    "PointDomains": "vitkit.data.point_domains",
    "Record": "vitkit.data.source",
    "Skipped": "vitkit.data.source",
    "Source": "vitkit.data.source",
    "augment_points": "vitkit.data.point_domains",
    "check": "vitkit.data.checks",
    "image_from_bytes": "vitkit.data.decode",
    "long_tail": "vitkit.data.long_tail",
    "make_loader": "vitkit.data.loader",
    "mean_std": "vitkit.data.loader",
    "open_source": "vitkit.data.open",
    "perceptual_hash": "vitkit.data.look",
    "point_domains": "vitkit.data.point_domains",
    "read_image": "vitkit.data.decode",
    "split": "vitkit.data.splits",
}

if TYPE_CHECKING:
    from vitkit.data.augment import AUGMENTATIONS
    from vitkit.data.checks import DataReport, Leak, check
    from vitkit.data.decode import image_from_bytes, read_image
    from vitkit.data.loader import Loader, make_loader, mean_std
    from vitkit.data.long_tail import long_tail
    from vitkit.data.look import perceptual_hash
    from vitkit.data.open import open_source
    from vitkit.data.point_domains import PointClouds, PointDomains, augment_points, point_domains
    from vitkit.data.source import Record, Skipped, Source
    from vitkit.data.splits import Fold, split


def __getattr__(name: str) -> Any:
    # decoding images needs no torch, and a server of a deployed model may have none
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vitkit.data' has no attribute {name!r}")


class _Functions(ModuleType):
    """Keeps a module from taking the place of the function of the same name (``long_tail``) when it is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Functions

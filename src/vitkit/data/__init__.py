"""Images in: sources, splits, checks and loaders."""

from vitkit.data.augment import AUGMENTATIONS
from vitkit.data.checks import DataReport, Leak, check
from vitkit.data.decode import read_image
from vitkit.data.loader import Loader, make_loader, mean_std
from vitkit.data.look import perceptual_hash
from vitkit.data.open import open_source
from vitkit.data.source import Record, Skipped, Source
from vitkit.data.splits import Fold, split

__all__ = [
    "AUGMENTATIONS",
    "DataReport",
    "Fold",
    "Leak",
    "Loader",
    "Record",
    "Skipped",
    "Source",
    "check",
    "make_loader",
    "mean_std",
    "open_source",
    "perceptual_hash",
    "read_image",
    "split",
]

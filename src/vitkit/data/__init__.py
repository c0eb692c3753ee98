"""Images in: sources, splits, checks and loaders."""

from vitkit.data.augment import AUGMENTATIONS
from vitkit.data.checks import DataReport, Leak, check
from vitkit.data.decode import read_image
from vitkit.data.loader import Loader, make_loader, mean_std
from vitkit.data.long_tail import long_tail
from vitkit.data.look import perceptual_hash
from vitkit.data.open import open_source
from vitkit.data.point_domains import PointClouds, PointDomains, augment_points, point_domains
from vitkit.data.source import Record, Skipped, Source
from vitkit.data.splits import Fold, split

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
    "long_tail",
    "make_loader",
    "mean_std",
    "open_source",
    "perceptual_hash",
    "point_domains",
    "read_image",
    "split",
]

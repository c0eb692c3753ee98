"""Does a position table tell near from far? Structural scores of its similarities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from vitkit.errors import BadInput

# h×w cells · D width of a position vector · a ring holds the cells at one distance from a centre

# similarities that differ by less are equal: rounding must not make an order
_SAME = 1e-9


@dataclass(frozen=True, kw_only=True)
class PESI:
    """Structural scores of a position table; None where a score is undefined.

    Attributes:
        monotonicity: M_U in [0, 2]; 2: similarity falls with distance everywhere, 1: no relation. None if similarity
            does not depend on distance at all.
        directed: M_D, the same inside angular buckets.
        asymmetry: A_SU ≥ 0; 0: similarity depends on distance alone. None if every ring has mean similarity 0.
    """

    monotonicity: float | None
    directed: float | None
    asymmetry: float | None


def pesi(table: Tensor, buckets: int = 8) -> PESI:
    """Monotonicity and asymmetry of the cosine similarities of a position table.

    With E_c the similarities to centre c and ρ Spearman's rank correlation between radius and mean similarity at it
    (a radius is one distinct distance above 0):

    - ``M_U`` = mean over centres of 1 − ρ,
    - ``M_D`` = mean over centres and angular buckets of the same inside the bucket; buckets with fewer than 3 cells or
      2 radii are left out,
    - ``A_SU`` = mean over centres and rings of sd/|mean| of the similarities on the ring.

    Correlations of a constant are undefined and left out of the mean; if all are, the score is None. So are rings
    whose mean similarity is 0.

    Args:
        table: (h, w, D).
        buckets: angular sectors, the first from −π.

    Raises: BadInput if the table has another shape, fewer than 3 cells, NaN or infinite entries or a zero vector, or
        ``buckets`` is below 1.
    Paper: LOOPE: Learnable Optimal Patch Order in Positional Embeddings for Vision Transformers, arXiv:2504.14386.
    Departs from the paper: the mean in A_SU is taken as absolute value, so that a score cannot be negative.
    """
    if table.ndim != 3 or table.shape[0] * table.shape[1] < 3:
        raise BadInput(f"pesi needs a table (h, w, D) of at least three cells and got {tuple(table.shape)}.")
    if buckets < 1:
        raise BadInput(f"buckets={buckets} must be at least 1.")
    h, w = table.shape[:2]
    vectors = table.detach().to("cpu", torch.float64).flatten(0, 1).numpy()
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(vectors).all() or not length.all():
        raise BadInput("pesi compares directions, but a position vector is zero, NaN or infinite.")
    similarity = (vectors / length) @ (vectors / length).T
    place = np.stack(np.divmod(np.arange(h * w), w), axis=1)
    undirected, directed, asymmetry = [], [], []
    for centre in range(h * w):
        offset = place - place[centre]
        away = (offset != 0).any(axis=1)
        offset, values = offset[away], similarity[centre][away]
        squared = (offset**2).sum(axis=1)
        undirected.append(_fall(squared, values))
        mean, spread = _rings(squared, values)
        asymmetry += [s / abs(m) for m, s in zip(mean, spread) if abs(m) > _SAME]
        # the small number puts angles on a border into the sector that begins there
        turn = (np.arctan2(offset[:, 0], offset[:, 1]) + math.pi) / (2 * math.pi) + 1e-12
        sector = np.floor(turn * buckets).astype(int) % buckets
        for bucket in range(buckets):
            inside = sector == bucket
            if inside.sum() >= 3:
                directed.append(_fall(squared[inside], values[inside]))
    return PESI(monotonicity=_mean(undirected), directed=_mean(directed), asymmetry=_mean(asymmetry))


def _rings(squared: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the values at every distinct squared radius, by rising radius."""
    _, ring, count = np.unique(squared, return_inverse=True, return_counts=True)
    mean = np.bincount(ring, values) / count
    spread = np.sqrt(np.bincount(ring, (values - mean[ring]) ** 2) / count)
    return mean, spread


def _fall(squared: np.ndarray, values: np.ndarray) -> float | None:
    """1 − ρ between radius and mean similarity; None below two radii or when the similarity is constant."""
    mean, _ = _rings(squared, values)
    if len(mean) < 2 or np.ptp(mean) <= _SAME:
        return None
    rank = rankdata(np.round(mean / _SAME))
    return 1 - float(np.corrcoef(np.arange(len(mean)), rank)[0, 1])


def _mean(values: list[float | None] | list[float]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None

"""Long-tailed subsets: few images of most classes, as in the benchmarks for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vitkit.errors import BadInput


def long_tail(
    labels: Sequence[int] | np.ndarray, factor: float = 100.0, order: Sequence[int] | None = None, seed: int = 0
) -> np.ndarray:
    """Choose images so that the class counts fall exponentially: ``n_c = ⌊n_max · factor^{−c/(C−1)}⌋``, at least 1.

    n_max is the largest number that all C classes can follow; with equal counts it is that count, as in CIFAR-LT.

    >>> labels = np.repeat([0, 1, 2], 100)
    >>> np.bincount(labels[long_tail(labels, factor=100)])
    array([100,  10,   1])

    Args:
        labels: (N,) class numbers.
        factor: images of the first class for one of the last, at least 1.
        order: the classes from the most frequent to the rarest; None: by their numbers.
        seed: of the choice within a class.

    Returns: rows to keep, ascending (int64).
    Raises: BadInput for a factor below 1, labels that are no class numbers, or an order that is not one of the classes.
    """
    found = np.asarray(labels)
    if not factor >= 1:
        raise BadInput(f"factor={factor} must be at least 1, which keeps all classes alike.")
    if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer):
        raise BadInput(f"Labels of shape {found.shape} and type {found.dtype} are not (N,) class numbers.")
    classes = np.unique(found)
    if order is not None:
        if sorted(order) != classes.tolist():
            raise BadInput(f"order={list(order)} must name each of the classes {classes.tolist()} once.")
        classes = np.asarray(order)
    decline = np.array([factor ** (-c / max(1, len(classes) - 1)) for c in range(len(classes))])
    available = np.array([(found == c).sum() for c in classes])
    largest = np.floor((available / decline).min() + 1e-9)
    # powers that should be whole numbers come out a hair below
    counts = np.maximum(1, np.floor(largest * decline + 1e-9)).astype(np.int64)
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(np.flatnonzero(found == c))[:n] for c, n in zip(classes, counts)]
    return np.sort(np.concatenate(kept)).astype(np.int64)

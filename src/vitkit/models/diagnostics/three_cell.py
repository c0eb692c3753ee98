"""A synthetic benchmark that only a model which knows where its patches are can solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput

# g×g cells of a canvas · coordinates 0 … g−1, x column, y row · r, g, b the coloured cells

LABELS = (
    "red-green farther than red-blue",
    "red-blue farther than red-green",
    "clockwise",
    "area red-green larger",
    "area red-blue larger",
    "vector sum outside",
)
_DRAWS = 100_000
# give up on a rare case after this many draws, or after so many that every placement of a small canvas has come up
_MOST, _COVER = 20_000_000, 20


@dataclass(frozen=True, kw_only=True)
class ThreeCellScore:
    """Accuracies in [0, 1]; distance and area are means over their two labels, ``mean`` is that of the four."""

    distance: float
    area: float
    orientation: float
    vector_sum: float

    @property
    def mean(self) -> float:
        return (self.distance + self.area + self.orientation + self.vector_sum) / 4


def three_cell_labels(places: Tensor, cells: int) -> Tensor:
    """The six yes/no answers about three cells, in whole numbers.

    ``d_rg > d_rb``, ``d_rb > d_rg`` (squared distances); ``(x_g−x_r)(y_b−y_r) − (y_g−y_r)(x_b−x_r) > 0``;
    ``A_rg > A_rb``, ``A_rb > A_rg`` with ``2·A_rg = |(y_r+y_g)(x_g−x_r)|``; ``Σx > g−1 and Σy > g−1``.

    Args:
        places: (n, 3, 2) int64, (x, y) of the red, green and blue cell.
        cells: g.

    Returns: (n, 6) bool in the order of :data:`LABELS`.
    """
    d_rg, d_rb, turn, a_rg, a_rb = _facts(places)
    outside = (places.sum(1) > cells - 1).all(dim=1)
    return torch.stack([d_rg > d_rb, d_rb > d_rg, turn > 0, a_rg > a_rb, a_rb > a_rg, outside], dim=1)


def three_cell_data(n: int, cells: int = 8, cell_px: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Black canvases with one red, one green and one blue cell, and six answers about where they are.

    No three cells are on a line, no placement occurs twice, and all nine joint cases of (distance >, <, =) and
    (area >, <, =) are equally frequent (to within one image), so that no label can be guessed better than by its base
    rate: 2/3 for distance and area.

    >>> images, labels, places = three_cell_data(9)
    >>> images.shape, labels.shape, places.shape
    (torch.Size([9, 3, 32, 32]), torch.Size([9, 6]), torch.Size([9, 3, 2]))

    Args:
        n: images.
        cells: g, at least 4; the paper uses 14.
        cell_px: side of a cell in pixels; the paper uses 16. Take the patch size of the model.
        seed: of the draw.

    Returns: images (n, 3, g·px, g·px) float32 in {0, 1}; labels (n, 6) float32, see :data:`LABELS`; places (n, 3, 2)
        int64, (x, y) of red, green and blue.

    Raises: BadInput if a size is too small, or the canvas has fewer different placements of a case than asked for.
    """
    if n < 1 or cells < 4 or cell_px < 1:
        raise BadInput(f"n={n}, cells={cells}, cell_px={cell_px}: three cells need n ≥ 1, a side of ≥ 4 cells, px ≥ 1.")
    places = torch.from_numpy(_balanced(n, cells, np.random.default_rng(seed)))
    labels = three_cell_labels(places, cells).float()
    canvas = torch.zeros(n, 3, cells, cells)
    image, colour = torch.arange(n)[:, None], torch.arange(3)[None]
    canvas[image, colour, places[..., 1], places[..., 0]] = 1
    return canvas.repeat_interleave(cell_px, -2).repeat_interleave(cell_px, -1), labels, places


def three_cell(
    model_factory: Callable[..., nn.Module],
    num_train: int = 6_000,
    num_test: int = 1_000,
    cells: int = 8,
    cell_px: int = 4,
    epochs: int = 10,
    lr: float = 1e-3,
    seed: int = 0,
    fit: Callable[..., Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ThreeCellScore:
    """Train a model on the Three-Cell questions and test it on placements it has not seen.

    Args:
        model_factory: called as ``model_factory(img_size=, patch_size=, in_chans=3, num_classes=6)``; returns a model
            with six logits.
        num_train, num_test: images.
        cells, cell_px, seed: as in :func:`three_cell_data`.
        epochs: passes over the training images.
        lr: peak learning rate.
        fit: ``f(model, x, y, epochs=, seed=, lr=, loss=, progress=)`` that trains in place; default
            :func:`vitkit.testing.worlds.fit_tiny`.
        progress: given to ``fit``.

    Paper: LOOPE: Learnable Optimal Patch Order in Positional Embeddings for Vision Transformers, arXiv:2504.14386.
    Departs from the paper: a smaller canvas by default; training from scratch.
    """
    from vitkit.testing.worlds import fit_tiny, predict_logits

    x, y, _ = three_cell_data(num_train + num_test, cells, cell_px, seed)
    model = model_factory(img_size=cells * cell_px, patch_size=cell_px, in_chans=3, num_classes=len(LABELS))
    train = fit or fit_tiny
    train(model, x[:num_train], y[:num_train], epochs=epochs, seed=seed, lr=lr, loss=_loss, progress=progress)
    return three_cell_score(predict_logits(model, x[num_train:]), y[num_train:])


def three_cell_score(logits: Tensor, labels: Tensor) -> ThreeCellScore:
    """Accuracies of logits (n, 6) against labels (n, 6) of 0 and 1."""
    right = ((logits > 0) == (labels > 0.5)).double().mean(0).tolist()
    return ThreeCellScore(
        distance=(right[0] + right[1]) / 2,
        area=(right[3] + right[4]) / 2,
        orientation=right[2],
        vector_sum=right[5],
    )


def majority_score(labels: Tensor) -> ThreeCellScore:
    """What always giving each question's more frequent answer scores on labels (n, 6)."""
    return three_cell_score((labels.double().mean(0) - 0.5).expand(len(labels), -1), labels)


def _loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(images), labels)


def _facts(cells: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Squared distances, twice the signed area of the triangle, twice the areas under the sides; (n,) each."""
    (x_r, y_r), (x_g, y_g), (x_b, y_b) = (point.unbind(-1) for point in cells.unbind(1))
    d_rg, d_rb = (x_g - x_r) ** 2 + (y_g - y_r) ** 2, (x_b - x_r) ** 2 + (y_b - y_r) ** 2
    turn = (x_g - x_r) * (y_b - y_r) - (y_g - y_r) * (x_b - x_r)
    return d_rg, d_rb, turn, ((y_r + y_g) * (x_g - x_r)).abs(), ((y_r + y_b) * (x_b - x_r)).abs()


def _balanced(n: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """(n, 3, 2) different placements, all nine cases equally often, in random order."""
    # the surplus of n over a multiple of nine goes to cases drawn at random
    wanted = np.full(9, n // 9) + (rng.permutation(9) < n % 9)
    found: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * 9
    for _ in range(min(_MOST, _COVER * cells**6) // _DRAWS + 1):
        codes = rng.integers(cells**6, size=_DRAWS)
        places = _decode(codes, cells)
        d_rg, d_rb, turn, a_rg, a_rb = (f.numpy() for f in _facts(torch.from_numpy(places)))
        case = (np.sign(d_rg - d_rb) + 1) * 3 + np.sign(a_rg - a_rb) + 1
        # cells on a line (two of them equal included) have no orientation
        case[turn == 0] = -1
        for k in range(9):
            if len(found[k]) < wanted[k]:
                merged = np.concatenate([found[k], codes[case == k]])
                # first occurrences in the order drawn, so that the choice is not biased to small codes
                found[k] = merged[np.sort(np.unique(merged, return_index=True)[1])]
        if all(len(f) >= count for f, count in zip(found, wanted)):
            chosen = np.concatenate([f[:count] for f, count in zip(found, wanted)])
            return _decode(rng.permutation(chosen), cells)
    short = int(np.argmax(wanted - [len(f) for f in found]))
    raise BadInput(
        f"{cells}×{cells} cells gave only {len(found[short])} different placements of a case that needs "
        f"{wanted[short]}; take more cells or fewer images."
    )


def _decode(codes: np.ndarray, cells: int) -> np.ndarray:
    digits = codes[:, None] // cells ** np.arange(6) % cells
    return digits.reshape(-1, 3, 2)

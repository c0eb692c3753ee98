"""How doubly stochastic, how sharp and how varied an attention matrix is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vitkit.errors import BadInput


class DSMError(NamedTuple):
    """Summed absolute deviations of row and column sums from 1, one value a matrix (…)."""

    rows: Tensor
    columns: Tensor


def dsm_error(weights: Tensor, valid: Tensor | None = None) -> DSMError:
    """How far matrices are from doubly stochastic: ``Σ_i |Σ_j P_ij − 1|`` and ``Σ_j |Σ_i P_ij − 1|``.

    >>> dsm_error(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    DSMError(rows=tensor(0.), columns=tensor(2.))

    Args:
        weights: (…, n, n).
        valid: (…, n) bool, tokens that count; broadcast against the leading axes. None: all.

    Raises: BadInput if the matrices are not square.
    """
    _require_square(weights, "dsm_error")
    rows, columns = (weights.sum(-1) - 1).abs(), (weights.sum(-2) - 1).abs()
    if valid is not None:
        rows, columns = rows * valid, columns * valid
    return DSMError(rows.sum(-1), columns.sum(-1))


def attention_entropy(weights: Tensor) -> Tensor:
    """Mean over queries of ``−Σ_j P_ij log P_ij`` in nats, (…): 0 is one-hot, log n is uniform.

    Args:
        weights: (…, n, n) with non-negative entries.
    """
    return torch.special.entr(weights.clamp(min=0)).sum(-1).mean(-1)


def project_to_birkhoff(matrix: Tensor, tol: float = 1e-9, max_iter: int = 10_000) -> Tensor:
    """The nearest doubly stochastic matrix in Frobenius norm, by Dykstra's alternating projections, in float64.

    Two sets alternate: matrices with unit row and column sums (a plane, projected to in closed form) and
    non-negative matrices (with Dykstra's correction, without which the limit would be another point).

    Args:
        matrix: (…, n, n).
        tol: stop when no entry is more negative than this and none moves by more than it in one round.
        max_iter: rounds at most.

    Returns: (…, n, n) float64, with exact sums and entries above ``-tol``.

    Raises:
        BadInput: not square or not finite. RuntimeError: not converged after ``max_iter`` rounds.
    """
    _require_square(matrix, "project_to_birkhoff")
    x = matrix.detach().double()
    if not bool(torch.isfinite(x).all()):
        raise BadInput("project_to_birkhoff got a matrix with NaN or infinite entries.")
    correction = torch.zeros_like(x)
    plane = _to_unit_sums(x)
    for _ in range(max_iter):
        positive = (plane + correction).clamp(min=0)
        correction = plane + correction - positive
        before, plane = plane, _to_unit_sums(positive)
        moved = max((plane - before).abs().max().item(), (plane - positive).abs().max().item())
        if moved <= tol:
            return plane
    raise RuntimeError(
        f"Dykstra's projection did not reach tol={tol} in {max_iter} rounds (last move {moved:.1e}); raise one of them."
    )


def birkhoff_distance(matrix: Tensor, tol: float = 1e-9, max_iter: int = 10_000) -> Tensor:
    """Frobenius distance (…) to the Birkhoff polytope, the set of all doubly stochastic matrices.

    Args and Raises as in :func:`project_to_birkhoff`.
    """
    return torch.linalg.matrix_norm(matrix.detach().double() - project_to_birkhoff(matrix, tol, max_iter))


@torch.no_grad()
def expressivity(
    normalizer: Callable[[Tensor], Tensor],
    num_tokens: int,
    levels: int = 2,
    low: float = 0.0,
    high: float = 1.0,
    decimals: int = 6,
    max_inputs: int = 2**16,
) -> int:
    """Number of distinct attention matrices that a normalizer makes of all scores on a discretised cube.

    Every one of the n² scores takes ``levels`` equally spaced values in [low, high]; outputs are rounded to
    ``decimals`` before counting. Compare with the number of inputs, levels^(n²).

    Args:
        normalizer: scores (M, 1, n, n) → weights of that shape.
        num_tokens: n.
        levels: values per score, at least 2.
        low, high: the cube.
        decimals: digits after the point that must differ.
        max_inputs: refuse larger cubes, which would not fit in memory.

    Raises: BadInput if the cube is larger than ``max_inputs`` or ``levels`` is below 2.
    """
    total = levels ** (num_tokens**2)
    if levels < 2 or total > max_inputs:
        raise BadInput(
            f"expressivity with levels={levels} and {num_tokens} tokens has {total} inputs; it needs levels of "
            f"at least 2 and at most max_inputs={max_inputs}. Use fewer levels or tokens."
        )
    digit = torch.arange(total)[:, None] // levels ** torch.arange(num_tokens**2) % levels
    scores = (low + (high - low) * digit.double() / (levels - 1)).reshape(-1, 1, num_tokens, num_tokens)
    found = [torch.round(normalizer(part).double(), decimals=decimals) for part in scores.split(4096)]
    # +0.0 and -0.0 are one output
    return len(torch.unique(torch.cat(found).flatten(1) + 0.0, dim=0))


def _to_unit_sums(x: Tensor) -> Tensor:
    n = x.shape[-1]
    rows = (1 - x.sum(-1, keepdim=True)) / n
    columns = (1 - x.sum(-2, keepdim=True)) / n
    excess = (x.sum((-2, -1), keepdim=True) - n) / n**2
    return x + rows + columns + excess


def _require_square(matrix: Tensor, who: str) -> None:
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise BadInput(f"{who} needs square matrices (…, n, n) and got {tuple(matrix.shape)}.")

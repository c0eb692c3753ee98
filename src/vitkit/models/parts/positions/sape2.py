"""Positions that count how much relevant content lies between two patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

# B batch · H heads · P prefix tokens · N = h·w patches · d head dim · M largest count of a table


class SaPE2(nn.Module):
    """SaPE²: the distance of two patches is a gated count of the cells between them; the content sets the gates.

    For query i and key j at (r_i, c_i) and (r_j, c_j), per head:

    ``g_ij = σ(q_i·k_j/√d)``, ``C_i(r, c) = Σ_{c' ≤ c} g_{i,(r,c')}``, ``p^x_ij = C_i(r_j, c_j) − C_i(r_j, c_i)``, and
    p^y likewise along the columns. Positions are clamped to [−M, M]; with ``a = min(⌊p⌋, M−1)`` and ``f = p − a`` a
    table E of 2M+1 rows, first row −M, gives ``z(p) = (1−f)·q_i·E[a] + f·q_i·E[a+1]``. The sum
    ``z^x(p^x) + z^y(p^y)`` is added to the scaled attention logits. With all gates 1 this is a 2-D relative position
    embedding. Gates are taken after any rotation of q and k. A pair with a prefix token gets 0, and an invalid
    (padding) cell has gate 0. Tables start at zero and count content, so another grid needs no resizing.

    Args:
        head_dim: d.
        max_pos: M, at least 1; from a host the default is the longer side of its grid minus 1. Larger counts share
            the last row.
        keep_absolute: False removes the host's table of absolute positions, as in the paper; with True a swap
            keeps the function of the host exactly.
        gated: False sets all gates to 1: the plain 2-D relative embedding, for comparison.

    Shape: ``bias(q, k, layout)``: q, k (B, H, P+N, d) → (B, H, P+N, P+N), dtype of q; counts are at least float32.
    Raises: BadInput for ``max_pos`` below 1 and for a grid that is not 2-D; ValueError after tokens were merged,
        dropped or packed, since cells are counted along rows and columns.
    Paper: A 2D Semantic-Aware Position Encoding for Vision Transformers, arXiv:2505.09466.
    Departs from the paper: known by its abstract and a review. The gated counts follow contextual position encoding
        of language models (CoPE, arXiv:2405.18719); the signed counts that start at the query's column and row, and
        tables shared by the heads, one pair per block, starting at zero, are ours.
    """

    slot = "position"
    preserves = "none"
    per_block = True

    def __init__(self, head_dim: int, max_pos: int, keep_absolute: bool = False, gated: bool = True) -> None:
        super().__init__()
        if max_pos < 1:
            raise BadInput(f"SaPE²: max_pos={max_pos} must be at least 1, the count of one neighbouring cell.")
        self.max_pos, self.keep_absolute, self.gated = max_pos, keep_absolute, gated
        self.table_x = nn.Parameter(torch.zeros(2 * max_pos + 1, head_dim))
        self.table_y = nn.Parameter(torch.zeros(2 * max_pos + 1, head_dim))

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        max_pos: int | None = None,
        keep_absolute: bool = False,
        gated: bool = True,
    ) -> SaPE2:
        """The host's table has no counterpart here, so ``warm`` changes nothing."""
        longest = max(1, max(spec.grid) - 1)
        return cls(spec.head_dim, longest if max_pos is None else max_pos, keep_absolute, gated)

    def bias(self, q: Tensor, k: Tensor, layout: TokenLayout) -> Tensor:
        """What is added to the scaled logits."""
        grid, num_prefix = self._grid(layout), layout.num_prefix
        q, k = q[..., num_prefix:, :], k[..., num_prefix:, :]
        across, down = gated_positions(self.gates(q, k, layout), grid)
        patches = self._look_up(across, q, self.table_x) + self._look_up(down, q, self.table_y)
        return F.pad(patches.to(q.dtype), (num_prefix, 0, num_prefix, 0))

    def gates(self, q: Tensor, k: Tensor, layout: TokenLayout) -> Tensor:
        """g of the patch rows q, k (B, H, N, d): (B, H, N, N), or broadcastable to it; at least float32."""
        if self.gated:
            gates = _at_least_float32((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).sigmoid()
        else:
            gates = torch.ones(1, 1, q.shape[-2], k.shape[-2], device=q.device)
        return gates if layout.valid is None else gates * layout.valid[:, None, None]

    def _look_up(self, position: Tensor, q: Tensor, table: Tensor) -> Tensor:
        """z(p): positions (B|1, H|1, N, N) → (B, H, N, N), at least float32."""
        # all products with the table at once: one per row of E instead of one per pair
        product = _at_least_float32(q @ table.to(q.dtype).T)
        shifted = position.clamp(-self.max_pos, self.max_pos) + self.max_pos
        # the largest count belongs to the last interval, so that its gates keep a gradient
        lower = shifted.detach().floor().clamp(max=2 * self.max_pos - 1)
        share = shifted - lower
        index = lower.long().expand(*product.shape[:-1], -1)
        below, above = product.gather(-1, index), product.gather(-1, index + 1)
        return torch.lerp(below, above, share.to(below.dtype).expand_as(below))

    def _grid(self, layout: TokenLayout) -> tuple[int, ...]:
        # padding cells may stay: they are still cells of the grid
        grid = layout.replace(valid=None).require_full_grid("SaPE²")
        if len(grid) != 2:
            raise BadInput(f"SaPE² counts along the rows and columns of a plane; the grid {grid} has {len(grid)} axes.")
        return grid

    def extra_repr(self) -> str:
        return f"max_pos={self.max_pos}, keep_absolute={self.keep_absolute}, gated={self.gated}"


def _at_least_float32(x: Tensor) -> Tensor:
    # sums of a row of gates in half precision would be off by whole cells
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gated_positions(gates: Tensor, grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Signed gated counts of the cells between query and key, along the key's row and along its column.

    >>> across, down = gated_positions(torch.ones(6, 6), (2, 3))
    >>> across[0].tolist(), down[4].tolist()
    ([0.0, 1.0, 2.0, 0.0, 1.0, 2.0], [-1.0, -1.0, -1.0, 0.0, 0.0, 0.0])

    Args:
        gates: (…, N, N), query by key. grid: (h, w), N = h·w.

    Returns: p^x and p^y, (…, N, N) each.
    """
    h, w = grid
    cells = gates.unflatten(-1, (h, w))
    own = torch.arange(h * w, device=gates.device)[:, None, None]
    # (…, N, h, w): one running sum an axis, and in each line its value where the query's own column or row crosses
    across, down = cells.cumsum(-1), cells.cumsum(-2)
    from_x = across.gather(-1, (own % w).expand(*across.shape[:-1], 1))
    from_y = down.gather(-2, (own // w).expand(*down.shape[:-2], 1, w))
    return (across - from_x).flatten(-2), (down - from_y).flatten(-2)

"""Turn one weight matrix into codes, column by column, given second-order statistics of its inputs.

A solver sees a matrix, its statistics and a grid; it knows neither layers nor models. RTN, GPTQ and GPTAQ are the same
loop: GPTAQ with P = 0 is GPTQ, GPTQ without propagation is RTN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitkit.compress.quantize.grid import Grid
from vitkit.errors import BadInput, VitkitError

Residual = Literal["pre", "released"]


@dataclass(frozen=True)
class Solution:
    """What a solver found for a weight (o, n).

    Attributes:
        weight: (o, n), the dequantized weight, columns in their own order.
        codes: (o, n) float integers of the grid; None without a grid.
        scale, zero: (o, 1) per channel or (o, n/g) per group; None without a grid.
        perm: (n,) order in which groups were formed, None when groups are consecutive columns.
        damp: the share of mean(diag H) that was added to the diagonal.
    """

    weight: Tensor
    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    perm: Tensor | None = None
    damp: float = 0.0


def round_to_nearest(weight: Tensor, grid: Grid) -> Solution:
    """Each entry goes to its nearest grid value; no entry knows of another."""
    scale, zero = grid.fit(weight)
    codes = grid.code(weight, scale, zero)
    return Solution(grid.value(codes, scale, zero), codes, scale, zero)


def solve(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor | None = None,
    grid: Grid | None = None,
    *,
    alpha: float = 0.25,
    damp: float = 0.1,
    act_order: bool = True,
    static_groups: bool = True,
    block_size: int = 128,
    residual: Residual = "pre",
) -> Solution:
    """Minimise ``‖Q X − W X̃‖²`` over the grid, one column after another.

    With H = XXᵀ + λ·mean(diag)·I, ``H⁻¹ = UᵀU`` (U upper triangular) and ``P = α·triu(D Uᵀ, 1)·U``, column i with
    current value w becomes q = grid(w), and every later column j moves by ``−(w − q)/U_ii · U_ij + w·P_ij``: the first
    term absorbs the rounding error, the second restores what column i would have produced on X̃. Updates beyond the
    running block of columns are applied when it ends.

    Args:
        weight: W (o, n).
        gram: H (n, n), any positive factor.
        cross: D = (X̃ − X)Xᵀ (n, n) with the same factor; None is GPTQ.
        grid: per channel or per group; None rounds nothing (an infinitely fine grid).
        alpha: α, weight of the second term.
        damp: λ.
        act_order: take the columns by descending H_jj.
        static_groups: fit all groups of consecutive columns before the loop; False fits a group when the loop reaches
            it, on the weights as they then are, in the loop's order.
        block_size: columns a block; with ``residual="pre"`` it changes speed only.
        residual: "pre" carries the columns as they were before rounding (w) and the current weights into the blocks'
            lazy updates and the groups' grids, which makes the result independent of ``block_size``; "released" carries
            the overwritten columns and the weights at the beginning of the block, as the authors' code does.

    Raises: BadInput for shapes or options that do not fit; VitkitError if H cannot be factored.
    """
    _check(weight, gram, cross, grid, damp, block_size, residual)
    w_all = weight.to(gram.dtype).clone()
    num_columns = w_all.shape[1]
    grouped = grid is not None and grid.granularity == "group"
    channel_step = grid.fit(w_all) if grid is not None and not grouped else None

    hessian, shift = prepare(gram, cross)
    dead = torch.diagonal(gram) == 0
    w_all[:, dead] = 0
    static_step = grid.fit(w_all) if grid is not None and grouped and static_groups else None

    order = torch.arange(num_columns, device=weight.device)
    if act_order:
        order = torch.argsort(torch.diagonal(hessian), descending=True, stable=True)
        w_all = w_all[:, order]
        hessian = hessian[order][:, order]
        shift = shift[order][:, order] if shift is not None else None
    upper, used_damp = inverse_factor(hessian, damp)
    asymmetry = None if shift is None else alpha * torch.triu(shift @ upper.T, diagonal=1) @ upper

    loop = _Loop(w_all, upper, asymmetry, grid, residual, block_size)
    loop.run(channel_step, static_step, order)

    inverse = torch.argsort(order)
    dynamic = grouped and not static_groups
    result = loop.result[:, inverse]
    if grid is None:
        # nothing was rounded, so inputs that are always zero need not lose their weights
        result[:, dead] = weight[:, dead].to(result.dtype)
    return Solution(
        weight=result,
        codes=None if grid is None else loop.codes[:, inverse],
        scale=loop.scale,
        zero=loop.zero,
        # consecutive groups of the columns' own order need no index list
        perm=order if dynamic and act_order else None,
        damp=used_damp,
    )


def shifted_target(weight: Tensor, gram: Tensor, cross: Tensor, damp: float) -> Tensor:
    """``W* = W (I + D H⁻¹)``, the weight for which ``‖Q X − W X̃‖² = ‖(Q − W*) X‖² + const``, with the damped H."""
    hessian, shift = prepare(gram, cross)
    assert shift is not None
    start = weight.to(gram.dtype).clone()
    upper, _ = inverse_factor(hessian, damp)
    # an input that is always zero in X, but not in X̃, still adds to the target: its weight counts in the product
    move = ((start @ shift) @ upper.T) @ upper
    start[:, torch.diagonal(gram) == 0] = 0
    return start + move


def prepare(gram: Tensor, cross: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Copies of H and D in which inputs that never were non-zero (H_jj = 0) are cut off: H_jj = 1, D_·j = 0."""
    dead = torch.diagonal(gram) == 0
    hessian = gram.clone()
    hessian[dead, dead] = 1
    if cross is None:
        return hessian, None
    shift = cross.to(gram.dtype).clone()
    shift[:, dead] = 0
    return hessian, shift


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, float]:
    """Upper triangular U with ``(H + λ·mean(diag H)·I)⁻¹ = UᵀU``, and the λ that was used.

    λ grows tenfold, at most four times, while rounding leaves H without a Cholesky factor.

    Raises: VitkitError if it has none even then.
    """
    mean = torch.diagonal(hessian).mean()
    used = damp
    for attempt in range(5):
        damped = hessian.clone()
        damped.diagonal().add_(used * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper, used
        if attempt < 4:
            used = max(used, 1e-3) * 10
    raise VitkitError(
        f"The input statistics of a layer ({hessian.shape[0]} features) have no Cholesky factor, even with "
        f"damp={used:g}. Check the calibration images for NaN, or give more of them."
    )


class _Loop:
    """The column loop; ``w`` (o, n) is overwritten."""

    def __init__(
        self,
        w: Tensor,
        upper: Tensor,
        asymmetry: Tensor | None,
        grid: Grid | None,
        residual: Residual,
        block_size: int,
    ) -> None:
        self.w, self.upper, self.asymmetry = w, upper, asymmetry
        self.grid, self.residual, self.block_size = grid, residual, block_size
        self.result, self.codes = torch.zeros_like(w), torch.zeros_like(w)
        self.scale: Tensor | None = None
        self.zero: Tensor | None = None

    def run(
        self,
        channel_step: tuple[Tensor, Tensor] | None,
        static_step: tuple[Tensor, Tensor] | None,
        order: Tensor,
    ) -> None:
        grid, num_columns = self.grid, self.w.shape[1]
        # one column is coded at a time, whatever it shares its step with
        column_grid = None if grid is None else Grid(bits=grid.bits, symmetric=grid.symmetric)
        group_grid = None if grid is None else _per_channel(grid)
        fitted: list[tuple[Tensor, Tensor]] = []
        step: tuple[Tensor, Tensor] | None = channel_step
        positions = order.tolist()
        for i1 in range(0, num_columns, self.block_size):
            i2 = min(i1 + self.block_size, num_columns)
            block = self.w[:, i1:i2].clone()
            kept, errors = torch.zeros_like(block), torch.zeros_like(block)
            for i in range(i2 - i1):
                column = i1 + i
                if grid is not None and grid.granularity == "group":
                    if static_step is not None:
                        group = positions[column] // grid.group_size
                        step = (static_step[0][:, group, None], static_step[1][:, group, None])
                    elif column % grid.group_size == 0:
                        assert group_grid is not None
                        step = group_grid.fit(self._group(column, i1, i2, block, kept, errors, i))
                        fitted.append(step)
                w = block[:, i].clone()
                if column_grid is None:
                    q = w
                else:
                    assert step is not None
                    code = column_grid.code(w[:, None], *step)
                    q = column_grid.value(code, *step)[:, 0]
                    self.codes[:, column] = code[:, 0]
                self.result[:, column] = q
                error = (w - q) / self.upper[column, column]
                kept[:, i], errors[:, i] = w, error
                move = torch.outer(error, self.upper[column, column:i2])
                if self.asymmetry is not None:
                    move = move - torch.outer(w, self.asymmetry[column, column:i2])
                block[:, i:] -= move
            carried = kept if self.residual == "pre" else block
            self.w[:, i2:] -= self._lazy(errors, carried, i1, i2, i2, num_columns)
        if static_step is not None:
            self.scale, self.zero = static_step
        elif fitted:
            self.scale, self.zero = (torch.cat(parts, dim=1) for parts in zip(*fitted))
        elif channel_step is not None:
            self.scale, self.zero = channel_step

    def _lazy(self, errors: Tensor, carried: Tensor, i1: int, i2: int, start: int, stop: int) -> Tensor:
        """What the columns i1 … i2 of a block take from the columns ``start`` … ``stop`` behind it."""
        move = errors @ self.upper[i1:i2, start:stop]
        if self.asymmetry is not None:
            move = move - carried @ self.asymmetry[i1:i2, start:stop]
        return move

    def _group(self, column: int, i1: int, i2: int, block: Tensor, kept: Tensor, errors: Tensor, done: int) -> Tensor:
        """The weights of the group that begins at ``column``, on which its grid is fitted."""
        assert self.grid is not None
        stop = column + self.grid.group_size
        if self.residual == "released":
            return self.w[:, column:stop]
        here = block[:, done : stop - i1]
        if stop <= i2:
            return here
        # columns behind the block have not received the running block's updates yet
        behind = self.w[:, i2:stop] - self._lazy(errors[:, :done], kept[:, :done], i1, i1 + done, i2, stop)
        return torch.cat([here, behind], dim=1)


def _per_channel(grid: Grid) -> Grid:
    return Grid(
        bits=grid.bits,
        symmetric=grid.symmetric,
        clip_search=grid.clip_search,
        clip_norm=grid.clip_norm,
        clip_steps=grid.clip_steps,
        max_shrink=grid.max_shrink,
    )


def _check(
    weight: Tensor,
    gram: Tensor,
    cross: Tensor | None,
    grid: Grid | None,
    damp: float,
    block_size: int,
    residual: str,
) -> None:
    n = weight.shape[1]
    if gram.shape != (n, n) or (cross is not None and cross.shape != (n, n)):
        raise BadInput(
            f"the weight has {n} inputs, the statistics are {tuple(gram.shape)}"
            f"{'' if cross is None else f' and {tuple(cross.shape)}'}."
        )
    if grid is not None and grid.granularity not in ("channel", "group"):
        raise BadInput(f"granularity={grid.granularity!r}: weights are solved per 'channel' or per 'group'.")
    if grid is not None and grid.granularity == "group" and n % grid.group_size:
        raise BadInput(f"group_size={grid.group_size} does not divide the {n} inputs of the layer.")
    if damp < 0 or block_size < 1:
        raise BadInput(f"damp={damp} must not be negative and block_size={block_size} must be at least 1.")
    if residual not in ("pre", "released"):
        raise BadInput(f"residual={residual!r}: use 'pre' or 'released'.")

"""The set of values a number may take after quantization, and how its step and zero point are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkit.errors import BadInput

Granularity = Literal["tensor", "channel", "group", "token"]

# narrower ranges than this are noise: a step of 1e-5/q_max keeps 1/s finite in float32
_MIN_RANGE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Uniform b-bit quantizer: ``code = clip(round(x/s) + z, q_min, q_max)``, ``x̂ = s (code − z)``.

    Asymmetric: codes 0 … 2^b − 1, ``s = (x_max − x_min)/(2^b − 1)``, ``z = round(−x_min/s)`` with
    ``x_min = min(0, min x)``, ``x_max = max(0, max x)``, so zero is always represented exactly. Symmetric: codes
    −2^{b−1} … 2^{b−1} − 1, ``s = max|x|/(2^{b−1} − 1)``, z = 0. A range that is all zero becomes [−1, 1].

    >>> grid = Grid(bits=2)
    >>> x = torch.tensor([[-1.0, 0.0, 0.9, 2.0]])
    >>> scale, zero = grid.fit(x)
    >>> grid.code(x, scale, zero), grid.value(grid.code(x, scale, zero), scale, zero)
    (tensor([[0., 1., 2., 3.]]), tensor([[-1.,  0.,  1.,  2.]]))

    Args:
        bits: b, 2 to 16.
        symmetric: see above.
        granularity: what shares one (s, z): the whole "tensor"; a "channel" (a row of a weight matrix); a "group" of
            ``group_size`` consecutive entries within a row; a "token" (a row of an activation, fitted anew each time).
        group_size: g for "group"; must divide the last axis.
        clip_search: shrink the range to ``p·[x_min, x_max]``, p = 1, 0.99 … 0.21, keeping the p with the smallest
            ``Σ|x̂ − x|^clip_norm`` for each (s, z).
        clip_norm: exponent of the search; 2 gives the mean squared error.
        clip_steps, max_shrink: p falls in steps of 1/clip_steps and by less than max_shrink.

    Raises: BadInput for bits, granularity or group size out of range.
    """

    bits: int = 4
    symmetric: bool = False
    granularity: Granularity = "channel"
    group_size: int = -1
    clip_search: bool = False
    clip_norm: float = 2.4
    clip_steps: int = 100
    max_shrink: float = 0.8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise BadInput(f"bits={self.bits}: a grid has 2 to 16 bits.")
        if self.granularity not in ("tensor", "channel", "group", "token"):
            raise BadInput(f"granularity={self.granularity!r}: use 'tensor', 'channel', 'group' or 'token'.")
        if self.granularity == "group" and self.group_size < 1:
            raise BadInput(f"group_size={self.group_size}: granularity='group' needs the number of entries of a group.")

    @property
    def q_min(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def q_max(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def fit(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for ``x`` (…, n), in the dtype of ``x``.

        Returns: two tensors of shape (1, …, 1) per tensor, (…, 1) per channel or token, (…, n/g) per group.

        Raises: BadInput if ``group_size`` does not divide n.
        """
        rows = self._rows(x)
        low, high = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        empty = (low == 0) & (high == 0)
        low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
        scale, zero = self._step(low, high)
        if self.clip_search:
            scale, zero = self._search(rows, low, high, scale, zero)
        if self.granularity == "tensor":
            shape: tuple[int, ...] = (1,) * x.ndim
        elif self.granularity == "group":
            shape = (*x.shape[:-1], x.shape[-1] // self.group_size)
        else:
            shape = (*x.shape[:-1], 1)
        return scale.reshape(shape), zero.reshape(shape)

    def code(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes of ``x`` (…, n), as floating-point integers; ``scale`` and ``zero`` as :meth:`fit` gives them."""
        scale, zero = self._spread(x, scale), self._spread(x, zero)
        return (torch.round(x / scale) + zero).clamp(self.q_min, self.q_max)

    def value(self, code: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """x̂ of the codes (…, n)."""
        return self._spread(code, scale) * (code - self._spread(code, zero))

    def __call__(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        """x̂ for ``x``, with the given scale and zero point, else with those fitted to ``x``."""
        if scale is None or zero is None:
            scale, zero = self.fit(x)
        return self.value(self.code(x, scale, zero), scale, zero)

    def _rows(self, x: Tensor) -> Tensor:
        """(…, n) → one row for each (s, z)."""
        if self.granularity == "tensor":
            return x.reshape(1, -1)
        if self.granularity != "group":
            return x
        if x.shape[-1] % self.group_size:
            fits = [g for g in range(1, x.shape[-1] + 1) if x.shape[-1] % g == 0]
            raise BadInput(f"group_size={self.group_size} does not divide {x.shape[-1]} entries; pick one of {fits}.")
        return x.unflatten(-1, (-1, self.group_size))

    def _spread(self, x: Tensor, step: Tensor) -> Tensor:
        return step.repeat_interleave(self.group_size, -1) if self.granularity == "group" else step

    def _step(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            scale = high.clamp(min=_MIN_RANGE) / self.q_max
            return scale, torch.zeros_like(scale)
        scale = (high - low).clamp(min=_MIN_RANGE) / self.q_max
        return scale, torch.round(-low / scale)

    def _search(self, rows: Tensor, low: Tensor, high: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        plain = Grid(bits=self.bits, symmetric=self.symmetric)
        best = torch.full_like(scale, math.inf)
        for i in range(int(self.max_shrink * self.clip_steps)):
            p = 1 - i / self.clip_steps
            new_scale, new_zero = self._step(p * low, p * high)
            error = (plain(rows, new_scale, new_zero) - rows).abs_().pow_(self.clip_norm).sum(-1, keepdim=True)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, new_scale, scale), torch.where(better, new_zero, zero)
        return scale, zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """Lay b-bit codes into bytes without a gap, the first code in the lowest bits.

    >>> pack(torch.tensor([[1, 2, 3, 0]]), 2)
    tensor([[57]], dtype=torch.uint8)

    Args:
        codes: (…, n) integers 0 … 2^b − 1 (add 2^{b−1} to signed ones first).
        bits: 2 to 8.

    Returns: (…, ⌈n·b/8⌉) uint8; every row begins at a byte.

    Raises: BadInput if a code does not fit or bits are out of range.
    """
    _check_bits(bits)
    wide = codes.to(torch.int64)
    if wide.numel() and (int(wide.min()) < 0 or int(wide.max()) >= 2**bits):
        raise BadInput(
            f"codes from {int(wide.min())} to {int(wide.max())} do not fit {bits} bits (0 to {2**bits - 1})."
        )
    stream = (wide.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
    flat = stream.flatten(-2)
    flat = F.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (flat << torch.arange(8, device=codes.device)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """The codes (…, ``length``) as uint8 that :func:`pack` laid into ``packed``.

    Raises: BadInput if the bytes hold fewer codes than ``length``.
    """
    _check_bits(bits)
    if packed.shape[-1] != math.ceil(length * bits / 8):
        raise BadInput(
            f"{length} codes of {bits} bits take {math.ceil(length * bits / 8)} bytes, got {packed.shape[-1]}."
        )
    stream = (packed.to(torch.int64).unsqueeze(-1) >> torch.arange(8, device=packed.device)) & 1
    flat = stream.flatten(-2)[..., : length * bits].unflatten(-1, (length, bits))
    return (flat << torch.arange(bits, device=packed.device)).sum(-1).to(torch.uint8)


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise BadInput(f"bits={bits}: codes of 2 to 8 bits can be packed.")

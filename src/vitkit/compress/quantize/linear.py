"""A linear layer whose weight is integer codes, and the quantizer of its inputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.compress.quantize.grid import Grid
from vitkit.compress.quantize.solver import Solution
from vitkit.errors import BadInput


class TokenQuantizer(nn.Module):
    """Round every token to its own 2^b levels, chosen anew in each forward (dynamic, asymmetric).

    Gradients pass as if nothing had been rounded, so attacks and saliency still see the network.

    Shape: (…, n) → (…, n), same dtype; steps are computed in float32.

    Args:
        bits: b, 2 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise BadInput(f"a_bits={bits}: activations have 2 to 8 bits; use None (or 16) to leave them alone.")
        self.bits = bits
        self._grid = Grid(bits=bits, granularity="token")

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wide = x if x.dtype == torch.float64 else x.float()
            rounded = self._grid(wide).to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            # adding a zero that carries the gradient leaves the rounded values exact, unlike x + (rounded − x)
            return rounded + (x - x.detach())
        return rounded

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class QuantLinear(nn.Module):
    """``y = act(x) Ŵᵀ + b`` with ``Ŵ = scale·(codes − zero)`` kept as integers.

    The weight is expanded in each forward, so memory holds one byte per weight; a packed file would hold b bits
    (:meth:`packed_bytes`). No time is saved: the product runs on floating-point numbers.

    Buffers: ``codes`` (out, in) int8, −2^{b−1} … 2^{b−1} − 1, also for asymmetric grids, whose codes and zero points
    are shifted down by 2^{b−1}; ``scale`` (out, G) float32, whatever dtype the model is cast to; ``zero`` (out, G)
    int8, all 0 when symmetric; ``perm`` (in,) int32 or None: the order in which columns form groups, None for
    consecutive columns.

    >>> from vitkit.compress.quantize.solver import round_to_nearest
    >>> linear = nn.Linear(8, 4)
    >>> grid = Grid(bits=4)
    >>> layer = QuantLinear.from_solution(linear, round_to_nearest(linear.weight.detach(), grid), grid)
    >>> layer(torch.zeros(2, 8)).shape, layer.packed_bytes()
    (torch.Size([2, 4]), 50)

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        bits: b of the weight, 2 to 8.
        symmetric: the grid has no zero point.
        group_size: inputs that share a step; −1 for one step per output.
        has_perm: room for ``perm``.
        a_bits: bits of the inputs (:class:`TokenQuantizer`, as ``act``); None leaves them alone.

    Raises: BadInput for bits or a group size that do not fit.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    perm: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        bits: int = 4,
        symmetric: bool = False,
        group_size: int = -1,
        has_perm: bool = False,
        a_bits: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise BadInput(f"bits={bits}: integer weights have 2 to 8 bits.")
        if group_size != -1 and (group_size < 1 or in_features % group_size):
            raise BadInput(f"group_size={group_size} does not divide the {in_features} inputs of the layer.")
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.symmetric, self.group_size, self.a_bits = bits, symmetric, group_size, a_bits
        groups = 1 if group_size == -1 else in_features // group_size
        self.act = nn.Identity() if a_bits is None else TokenQuantizer(a_bits)
        self.register_buffer("codes", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_features, groups, device=device))
        self.register_buffer("zero", torch.zeros(out_features, groups, dtype=torch.int8, device=device))
        perm = torch.arange(in_features, dtype=torch.int32, device=device) if has_perm else None
        self.register_buffer("perm", perm)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_solution(cls, linear: nn.Linear, solution: Solution, grid: Grid, a_bits: int | None = None) -> QuantLinear:
        """The layer that computes ``linear`` with the codes of ``solution`` on ``grid``."""
        if solution.codes is None or solution.scale is None or solution.zero is None:
            raise BadInput("the solution was found without a grid, so there are no codes to keep.")
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            bits=grid.bits,
            symmetric=grid.symmetric,
            group_size=grid.group_size if grid.granularity == "group" else -1,
            has_perm=solution.perm is not None,
            a_bits=a_bits,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        offset = 0 if grid.symmetric else 2 ** (grid.bits - 1)
        layer.codes.copy_((solution.codes - offset).to(torch.int8))
        layer.scale.copy_(solution.scale)
        layer.zero.copy_((solution.zero - offset).to(torch.int8))
        if solution.perm is not None and layer.perm is not None:
            layer.perm.copy_(solution.perm)
        if linear.bias is not None and layer.bias is not None:
            with torch.no_grad():
                layer.bias.copy_(linear.bias)
            layer.bias.requires_grad_(linear.bias.requires_grad)
        layer.train(linear.training)
        return layer

    @property
    def weight(self) -> Tensor:
        """Ŵ (out, in) in float32."""
        scale, zero = self.scale, self.zero.to(self.scale.dtype)
        if self.perm is not None:
            group = torch.empty_like(self.perm, dtype=torch.long)
            group[self.perm.long()] = torch.arange(self.in_features, device=self.perm.device) // self.group_size
            scale, zero = scale[:, group], zero[:, group]
        elif self.group_size != -1:
            scale = scale.repeat_interleave(self.group_size, 1)
            zero = zero.repeat_interleave(self.group_size, 1)
        return scale * (self.codes.to(scale.dtype) - zero)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        # model.bfloat16() would round the steps to 8 bits and move every weight of a row the same way
        exact = self.scale
        super()._apply(fn, recurse)
        if not (exact.is_meta or self.scale.is_meta):
            self.scale = exact.to(self.scale.device)
        return self

    def packed_bytes(self) -> int:
        """Bytes of this layer in a packed file: b bits a code and a zero point, the rest as it is stored."""
        total = math.ceil(self.codes.numel() * self.bits / 8) + self.scale.numel() * self.scale.element_size()
        if not self.symmetric:
            total += math.ceil(self.zero.numel() * self.bits / 8)
        if self.perm is not None:
            total += self.perm.numel() * self.perm.element_size()
        if self.bias is not None:
            total += self.bias.numel() * self.bias.element_size()
        return total

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"]
        parts += ["symmetric"] if self.symmetric else []
        parts += [f"group_size={self.group_size}"] if self.group_size != -1 else []
        return ", ".join(parts)


class ActLinear(nn.Linear):
    """``y = act(x) Wᵀ + b``: weights as they were, inputs rounded per token (:class:`TokenQuantizer`)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, a_bits: int = 8, **kwargs: Any) -> None:
        super().__init__(in_features, out_features, bias, **kwargs)
        self.a_bits = a_bits
        self.act = TokenQuantizer(a_bits)

    @classmethod
    def from_linear(cls, linear: nn.Linear, a_bits: int) -> ActLinear:
        """The same weights (not copied) behind an input quantizer."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, a_bits, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.act(x))

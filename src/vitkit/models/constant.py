"""Tensors that follow from settings alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Constant(nn.Module):
    """A tensor that a module computes once and keeps beside its weights: on their device, never saved, never stale.

    An ordinary buffer stays rounded after ``model.to(torch.bfloat16).float()`` and holds garbage after ``to_empty``;
    this one is made anew from its definition.

    >>> pi = Constant(torch.full, (2,), torch.pi)
    >>> bool((pi.to(torch.bfloat16).float().value == torch.pi).all()), pi.state_dict()
    (True, OrderedDict())

    Args:
        make: a function that pickle can name, called as ``make(*args)``; returns the exact values, on the CPU.
        args: settings, plain values.
        at_least: never rounded to less than this dtype; None: the model's own dtype, whatever it is.
    """

    value: Tensor

    def __init__(self, make: Callable[..., Tensor], *args: Any, at_least: torch.dtype | None = None) -> None:
        super().__init__()
        self.make, self.args, self.at_least = make, args, at_least
        self.register_buffer("value", self._rounded(torch.get_default_dtype(), None), persistent=False)

    def _rounded(self, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        if self.at_least is not None:
            dtype = torch.promote_types(dtype, self.at_least)
        return self.make(*self.args).to(device=device, dtype=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constant:
        before = self.value
        super()._apply(fn, recurse)
        after = self.value
        if after is not before and not after.is_meta:
            self.value = self._rounded(after.dtype, after.device)
        return self

    def extra_repr(self) -> str:
        return f"{getattr(self.make, '__name__', self.make)}{self.args}"

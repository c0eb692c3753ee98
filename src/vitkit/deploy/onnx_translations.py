"""What PyTorch's ONNX exporter has no translation for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vitkit.errors import MissingExtra


def onnx_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What PyTorch's exporter lacks and parts need: the ``custom_translation_table`` of ``torch.onnx.export``.

    Stable sorts only, by ``TopK``, which of equal values takes the lower index first.

    Raises: MissingExtra.
    """
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise MissingExtra("ONNX export", "onnxscript", "deploy") from error

    # the annotations decide what becomes an attribute of the graph; values without one are tensors
    def stable_sort(values, stable: bool = True, dim: int = -1, descending: bool = False):  # type: ignore[no-untyped-def]
        size = op.Gather(op.Shape(values), op.Constant(value_ints=[dim]))  # type: ignore[type-var]
        return op.TopK(values, size, axis=dim, largest=int(descending), sorted=1)

    return {torch.ops.aten.sort.stable: stable_sort}

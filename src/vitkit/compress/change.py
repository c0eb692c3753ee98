"""The account a transform gives of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Change:
    """What a transform did; every row of a report reads this, so nothing is guessed later.

    Args:
        what: one line, e.g. ``"merged 8 tokens in each of 12 blocks"``.
        params_before: weights of the model given.
        params_after: weights of the model returned.
        touched: qualified names of the changed modules, in forward order.
        lost: what the new model can no longer do, e.g. ``"fixed to 4×4 patches"``; empty if nothing.
        details: figures of the method, JSON-like. ``realised`` says where the saving is real: ``"yes"`` (time and
            memory), ``"memory-only"`` or ``"no"`` (simulated).
    """

    what: str
    params_before: int
    params_after: int
    touched: tuple[str, ...]
    lost: str = ""
    details: dict[str, Any] = field(default_factory=dict)

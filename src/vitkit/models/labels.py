"""Labels for modules that need them in the middle of a network: deep supervision, class maps of the right class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def known_labels(model: nn.Module, labels: Tensor | None) -> Iterator[None]:
    """Let the modules of ``model`` that ask for labels see those of this batch; afterwards they see none again.

    A module asks by the class attribute ``wants_labels = True`` and reads ``self.labels``, which is None outside: it
    must work without.

    Args:
        model: any model; one without such modules is left alone.
        labels: class numbers (B,), or probabilities (B, K) of mixed images; None: nothing is known.
    """
    asking = [m for m in model.modules() if getattr(m, "wants_labels", False)]
    before = [m.labels for m in asking]
    for module in asking:
        module.labels = labels  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, old in zip(asking, before):
            module.labels = old

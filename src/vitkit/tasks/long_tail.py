"""Accuracy by how many training images a class had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkit.errors import BadInput


def group_accuracy(
    outputs: Tensor, labels: Tensor, counts: Sequence[int] | Tensor, many: int = 100, few: int = 20
) -> dict[str, float]:
    """Accuracy on the classes with many (> ``many``), medium, and few (< ``few``) training images.

    >>> outputs = torch.eye(3)[[0, 1, 1, 2]]
    >>> group_accuracy(outputs, torch.tensor([0, 1, 2, 2]), counts=[500, 50, 5])
    {'many': 1.0, 'medium': 1.0, 'few': 0.5}

    Args:
        outputs: (N, K) logits or probabilities. labels: (N,) class numbers. counts: training images of the K classes.
        many, few: bounds of the groups; both ends belong to the middle one.

    Returns: ``many``, ``medium`` and ``few``, images alike; a group that no image is of is left out.
    Raises: BadInput if the shapes do not fit or the bounds cross.
    """
    sizes = torch.as_tensor(counts, device=labels.device)
    if outputs.ndim != 2 or labels.shape != (len(outputs),) or sizes.shape != (outputs.shape[1],) or few > many:
        raise BadInput(
            f"Outputs {tuple(outputs.shape)}, labels {tuple(labels.shape)} and counts {tuple(sizes.shape)} must be "
            f"(N, K), (N,) and (K,), and few={few} at most many={many}."
        )
    right = (outputs.argmax(1).to(labels.device) == labels).double()
    size = sizes[labels]
    groups = {"many": size > many, "medium": (size <= many) & (size >= few), "few": size < few}
    return {name: float(right[rows].mean()) for name, rows in groups.items() if bool(rows.any())}

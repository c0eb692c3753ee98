"""Which attention scores count: shared by the normalizers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from vitkit.errors import BadInput


def allowed_entries(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Bool tensor, True where a query may attend to a key: inside ``mask`` and not forbidden by a score of -inf.

    NaN scores stay allowed, so that a broken model is seen and not masked away.
    """
    open_ = scores != -torch.inf
    return open_ if mask is None else open_ & mask


def refuse_mask(mask: Tensor | None, who: str) -> None:
    """Raise for normalizers whose matrix is doubly stochastic only as a whole.

    Raises: BadInput if there is a mask.
    """
    if mask is not None:
        raise BadInput(
            f"{who} was given a mask (padded or dropped tokens). Its matrix is doubly stochastic only over all tokens; "
            "cutting rows and columns out breaks that. Give every image the same number of tokens, or use the "
            "normalizer 'sinkhorn', which stays doubly stochastic over the valid tokens."
        )


def refuse_forbidden(scores: Tensor, who: str) -> None:
    """The same for scores that forbid a key: -inf, or as good as that (below half the lowest number of their dtype).

    In a compiled or exported graph nothing can be raised for the sake of values: there such scores give NaN.

    Raises: BadInput if there is one.
    """
    if not values_known(scores):
        return
    if bool((scores < 0.5 * torch.finfo(scores.dtype).min).any()):
        raise BadInput(
            f"{who} was given scores of -inf (an attention mask such as is_causal). No matrix is doubly stochastic and "
            "zero there in general; take the mask away, or use the normalizer 'sinkhorn', which leaves forbidden "
            "entries at zero."
        )


def values_known(scores: Tensor) -> bool:
    """Whether Python may branch on the values: not while a graph is recorded for values that come later."""
    recording = torch.compiler.is_compiling() or torch.jit.is_tracing() or scores.is_meta
    # subclasses of tensors stand for values that are not known yet, and vmap's tensors for one of many
    return not recording and type(scores) is Tensor and not is_functorch_wrapped_tensor(scores)


def full_precision(scores: Tensor) -> Tensor:
    """Scores in at least float32: sums over a row lose three digits in bfloat16."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))

"""The attacked classifier as attacks see it: frozen, in eval mode, pixels in, logits out, put back afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vitkit.anatomy import untouched
from vitkit.errors import BadInput

Logits = Callable[[Tensor], Tensor]


@contextmanager
def attacked(model: nn.Module) -> Iterator[Logits]:
    """Freeze ``model`` and give the function pixels → logits that attacks differentiate.

    Pixels are cast to the model's own dtype at its door and logits back to float32 at least, so that perturbations
    are kept in full precision also when the model computes in bfloat16. Gradients are on inside, whatever the caller
    set, and reach the pixels only.
    """
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    def logits(pixels: Tensor) -> Tensor:
        out = model(pixels if own is None else pixels.to(own))
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != len(pixels) or out.shape[1] < 2:
            seen = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise BadInput(
                f"Attacks need a classifier with logits (B, K), K ≥ 2; {type(model).__name__} gave {seen} for "
                f"{len(pixels)} images."
            )
        return out if out.dtype == torch.float64 else out.float()

    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        yield logits


def pixels_of(images: Tensor) -> Tensor:
    """A detached working copy of the images in float32 at least.

    Raises: BadInput unless they are (B, C, H, W), B ≥ 1, of a floating dtype and within [0, 1].
    """
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise BadInput(
            f"images must be a non-empty float tensor (B, C, H, W); got {tuple(images.shape)}, {images.dtype}."
        )
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):
        raise BadInput(
            f"images must lie in [0, 1]; they span {low:.3g} … {high:.3g}. Put the normalisation inside the model: "
            "vitkit.models.normalized.NormalizedModel(model, mean, std)."
        )
    return images.detach().to(images.dtype if images.dtype == torch.float64 else torch.float32, copy=True)


def clean_logits(logits: Logits, pixels: Tensor) -> Tensor:
    """Logits of the untouched images (B, K), without a graph; see :func:`require_finite`."""
    with torch.no_grad():
        return require_finite(logits(pixels))


def require_finite(clean: Tensor) -> Tensor:
    """The logits themselves.

    Raises: BadInput if they are not finite: no direction then means anything.
    """
    bad = ~clean.isfinite().all(1)
    if bool(bad.any()):
        raise BadInput(f"The model gives NaN or infinite logits for {int(bad.sum())} of {len(clean)} clean images.")
    return clean


def classes_of(value: Tensor | int, like: Tensor, what: str) -> Tensor:
    """Labels or targets as (B,) int64 beside the logits ``like`` (B, K); one number stands for all images."""
    found = torch.as_tensor(value, device=like.device)
    if found.is_floating_point() or found.dtype == torch.bool:
        raise BadInput(f"{what} must hold class numbers; it is {found.dtype}.")
    if found.ndim > 1 or found.numel() not in (1, len(like)) or (found.ndim == 1 and len(found) != len(like)):
        raise BadInput(f"{what} has shape {tuple(found.shape)}; it must be one class or one for each of {len(like)}.")
    found = found.long().expand(len(like)).clone()
    if bool(((found < 0) | (found >= like.shape[1])).any()):
        raise BadInput(f"{what} names class {int(found.min())} … {int(found.max())}; the model has {like.shape[1]}.")
    return found


def own_generator(generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a fresh one of seed 0: the global random state is never drawn from."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """log p_k − log(1 − p_k) = z_k − log Σ_{j≠k} exp z_j for each image: (B, K), (B,) → (B,).

    A monotone function of cross-entropy with the same direction of steepest ascent, but it does not saturate: where
    float32 rounds p_k to 1 the gradient of cross-entropy is exactly 0 and an attack would stand still.
    """
    at = classes[:, None]
    others = logits.scatter(1, at, float("-inf"))
    return logits.gather(1, at)[:, 0] - others.logsumexp(1)


class Goal:
    """What an attack drives up, and when it is reached.

    Untargeted: −log-odds of the label, until another class wins. Targeted: log-odds of the target, until it wins.

    Args:
        labels: (B,).
        target: (B,) or None.
    """

    def __init__(self, labels: Tensor, target: Tensor | None) -> None:
        self.targeted = target is not None
        self._classes = labels if target is None else target

    def __call__(self, logits: Tensor, at: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Score (b,), to be driven up, and whether the goal is reached (b,), for the images ``at`` of the batch."""
        classes = self._classes[at]
        odds = log_odds(logits, classes)
        wins = logits.detach().argmax(1) == classes
        return (odds, wins) if self.targeted else (-odds, ~wins)

"""FGSM: one step of size ε along the sign of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.stress.attacks.projection import assert_allowed, into_ball_and_range
from vitkit.stress.attacks.result import AttackResult, account
from vitkit.stress.attacks.victim import Goal, attacked, classes_of, pixels_of, require_finite


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    target: Tensor | int | None = None,
    epsilon: float = 8 / 255,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """The cheapest gradient attack: change every pixel by ε in the direction that hurts.

    ``x' = clip(x + ε · sign ∇_x J(x, y), 0, 1)``; with a target, towards it.

    Args:
        model: images (B, C, H, W) in [0, 1] → logits (B, K); any classifier. Left as found.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true classes; the model's own predictions if None.
        target: class to reach, one or (B,); None attacks the label.
        epsilon: largest change of a pixel, in [0, 1] pixel units.
        generator: unused, the attack is deterministic; taken so that all attacks are called alike.

    Shape: ``x_adv`` as the images; see :class:`~vitkit.stress.attacks.result.AttackResult`.
    Raises: BadInput for images outside [0, 1], a negative ε, unknown classes, or a model without class logits.
    Paper: Goodfellow et al., Explaining and Harnessing Adversarial Examples, arXiv:1412.6572, §4.
    Departs from the paper: J is the log-odds, whose gradient has the direction of cross-entropy's everywhere and does
        not vanish in float32 where the model is certain; the result is clipped to the pixel range.
    """
    del generator
    if not epsilon >= 0:
        raise BadInput(f"epsilon={epsilon} must be at least 0 (pixel units of [0, 1]).")
    x = pixels_of(images)
    with attacked(model) as logits_of:
        leaf = x.clone().requires_grad_(True)
        clean = require_finite(logits_of(leaf))
        known = clean.detach().argmax(1) if labels is None else classes_of(labels, clean, "labels")
        wanted = None if target is None else classes_of(target, clean, "target")
        goal = Goal(known, wanted)
        (grad,) = torch.autograd.grad(goal(clean)[0].sum(), leaf)
        x_adv = into_ball_and_range(x + epsilon * grad.sign(), x, epsilon, "linf")
        with torch.no_grad():
            final = logits_of(x_adv)
    assert_allowed(x_adv, x, epsilon, "linf")
    ones = torch.ones(len(x), dtype=torch.long, device=x.device)
    return account(
        images=x,
        x_adv=x_adv,
        clean=clean.detach(),
        final=final,
        labels=known,
        target=wanted,
        success=goal(final)[1],
        num_iter=ones,
        queries=2 * ones,
    )

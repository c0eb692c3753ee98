"""C&W-L2: the shortest change by optimisation, slow and thorough; a yardstick for the faster ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.stress.attacks.projection import assert_allowed, size
from vitkit.stress.attacks.result import AttackResult, account
from vitkit.stress.attacks.victim import attacked, classes_of, clean_logits, pixels_of


def carlini_wagner(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    target: Tensor | int | None = None,
    margin: float = 0.0,
    steps: int = 100,
    learning_rate: float = 0.05,
    search_steps: int = 5,
    initial_weight: float = 1.0,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """The smallest L2 change that optimisation finds; every pixel stays in [0, 1] by a change of variables.

    With ``x' = (tanh w + 1) / 2``, Adam minimises over w::

        ‖x' − x‖₂² + a · max( max_{j≠t} z_j(x') − z_t(x'), −κ )

    (without a target: ``max( z_y − max_{j≠y} z_j, −κ )``). The weight a is searched for each image: halved between the
    largest that failed and the smallest that succeeded, or ten times larger while none did.

    Args:
        model: images (B, C, H, W) in [0, 1] → logits (B, K); any classifier. Left as found.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true classes; the model's own predictions if None.
        target: class to reach, one or (B,); None leaves the label.
        margin: κ ≥ 0, lead in logits that the wanted outcome must have.
        steps: of Adam for one weight.
        learning_rate: of Adam, in the unit of w.
        search_steps: weights tried for each image.
        initial_weight: a > 0 of the first try.
        generator: unused, the attack is deterministic; taken so that all attacks are called alike.

    Shape: ``x_adv`` as the images (the image itself where nothing was found); see
        :class:`~vitkit.stress.attacks.result.AttackResult`.
    Raises: BadInput for images outside [0, 1], settings out of range, unknown classes, or a model without class logits.
    Paper: Carlini and Wagner, Towards Evaluating the Robustness of Neural Networks, arXiv:1608.04644, §VI-A.
    Departs from the paper: fewer search and Adam steps by default (the paper: 20 and 10,000), a larger first weight
        and rate, no early abort; pixels at a bound start 5e-4 inside.
    """
    del generator
    if not margin >= 0 or not learning_rate > 0 or not initial_weight > 0:
        raise BadInput(
            f"margin={margin} must be at least 0; learning_rate={learning_rate} and initial_weight={initial_weight} "
            "positive."
        )
    if steps < 1 or search_steps < 1:
        raise BadInput(f"steps={steps} and search_steps={search_steps} must be at least 1.")
    x = pixels_of(images)
    with attacked(model) as logits_of:
        clean = clean_logits(logits_of, x)
        known = clean.argmax(1) if labels is None else classes_of(labels, clean, "labels")
        wanted = None if target is None else classes_of(target, clean, "target")

        def lead(logits: Tensor) -> Tensor:
            """How far the wanted outcome is ahead, in logits (B,)."""
            at = (known if wanted is None else wanted)[:, None]
            ahead = logits.gather(1, at)[:, 0] - logits.scatter(1, at, float("-inf")).amax(1)
            return -ahead if wanted is None else ahead

        best, final = x.clone(), clean.clone()
        shortest = torch.full_like(clean[:, 0], torch.inf)
        # an image that is as wanted already needs no change
        shortest[_won(lead(clean), margin)] = 0.0
        weight = torch.full_like(shortest, initial_weight)
        failed, succeeded = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
        # tanh never reaches 1; nearer to it a pixel that starts at its bound would need hundreds of steps to leave
        inside = torch.atanh((2 * x - 1).clamp(-1 + 1e-3, 1 - 1e-3))
        for _ in range(search_steps):
            w = inside.clone().requires_grad_(True)
            adam = torch.optim.Adam([w], lr=learning_rate)
            reached = torch.zeros_like(shortest, dtype=torch.bool)
            for step in range(steps + 1):
                x_adv = (w.tanh() + 1) / 2
                logits = logits_of(x_adv)
                with torch.no_grad():
                    length = size(x_adv - x, "l2").to(shortest.dtype)
                    won = _won(lead(logits), margin)
                    reached |= won
                    better = won & (length < shortest)
                    best[better], final[better] = x_adv[better], logits[better]
                    shortest[better] = length[better]
                if step == steps:
                    break
                behind = (-lead(logits)).clamp_min(-margin)
                loss = (x_adv - x).square().flatten(1).sum(1) + weight * behind
                (w.grad,) = torch.autograd.grad(loss.sum(), w)
                adam.step()
            succeeded = torch.where(reached, torch.minimum(succeeded, weight), succeeded)
            failed = torch.where(reached, failed, torch.maximum(failed, weight))
            weight = torch.where(succeeded.isfinite(), (failed + succeeded) / 2, weight * 10)
    assert_allowed(best, x, None, "l2")
    iterations = torch.full_like(known, search_steps * steps)
    return account(
        images=x,
        x_adv=best,
        clean=clean,
        final=final,
        labels=known,
        target=wanted,
        success=shortest.isfinite(),
        num_iter=iterations,
        queries=iterations + search_steps + 1,
    )


def _won(lead: Tensor, margin: float) -> Tensor:
    return (lead > 0) & (lead >= margin)

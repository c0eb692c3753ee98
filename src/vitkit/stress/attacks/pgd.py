"""PGD: many small steepest-ascent steps, each projected back into the ball."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.stress.attacks.projection import (
    Norm,
    assert_allowed,
    into_ball_and_range,
    random_in_ball,
    steepest,
)
from vitkit.stress.attacks.result import AttackResult, account
from vitkit.stress.attacks.victim import Goal, attacked, classes_of, clean_logits, own_generator, pixels_of


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    target: Tensor | int | None = None,
    epsilon: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    restarts: int = 1,
    norm: Norm = "linf",
    random_start: bool = True,
    early_stop: bool = False,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """The standard strong first-order attack within an L∞ or L2 ball.

    ``x_{i+1} = Π_{B(x,ε) ∩ [0,1]}( x_i + α · u(∇_x J(x_i, y)) )`` with ``u`` the sign (linf) or the unit vector (l2);
    with a target, towards it. Of all iterates and restarts the one that reaches the goal with the highest score is
    returned, so more steps or more restarts are never weaker.

    Args:
        model: images (B, C, H, W) in [0, 1] → logits (B, K); any classifier. Left as found.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true classes; the model's own predictions if None.
        target: class to reach, one or (B,); None attacks the label.
        epsilon: radius of the ball in pixel units of [0, 1]: largest change of a pixel (linf) or Euclidean length (l2).
        step_size: α, in the same unit.
        steps: gradient steps of a restart.
        restarts: independent random starts; the best result of each image counts.
        norm: of ball and step, "linf" or "l2".
        random_start: begin at a uniform draw from the ball instead of at the image.
        early_stop: leave an image alone once its goal is reached; the same successes for less work.
        generator: of the random starts; a fresh one of seed 0 if None.

    Shape: ``x_adv`` as the images; see :class:`~vitkit.stress.attacks.result.AttackResult`.
    Raises: BadInput for images outside [0, 1], settings out of range, unknown classes, restarts without random
        starts, or a model without class logits.
    Paper: Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv:1706.06083, §2.1.
    Departs from the paper: J is the log-odds (direction of cross-entropy, no vanishing gradient where the model is
        certain); the best iterate is returned, not the last.
    """
    if not epsilon >= 0 or not step_size >= 0:
        raise BadInput(f"epsilon={epsilon} and step_size={step_size} must be at least 0 (pixel units of [0, 1]).")
    if steps < 1 or restarts < 1:
        raise BadInput(f"steps={steps} and restarts={restarts} must be at least 1.")
    if restarts > 1 and not random_start:
        raise BadInput(f"restarts={restarts} would repeat one run: they need random_start=True.")
    x = pixels_of(images)
    draws = own_generator(generator)
    with attacked(model) as logits_of:
        clean = clean_logits(logits_of, x)
        known = clean.argmax(1) if labels is None else classes_of(labels, clean, "labels")
        wanted = None if target is None else classes_of(target, clean, "target")
        goal = Goal(known, wanted)
        best, final = x.clone(), clean.clone()
        best_score = torch.full_like(clean[:, 0], -torch.inf)
        success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        num_iter = torch.zeros(len(x), dtype=torch.long, device=x.device)
        queries = torch.ones_like(num_iter)
        for _ in range(restarts):
            # drawn for the whole batch, so that an image's start does not depend on which others are still active
            start = x + random_in_ball(x, epsilon, norm, draws) if random_start else x
            start = into_ball_and_range(start, x, epsilon, norm)
            active = (~success).nonzero()[:, 0] if early_stop else torch.arange(len(x), device=x.device)
            x_adv = start[active]
            for step in range(steps + 1):
                if not len(active):
                    break
                leaf = x_adv.detach().requires_grad_(step < steps)
                logits = logits_of(leaf)
                queries[active] += 1
                score, hit = goal(logits, active)
                if step:
                    with torch.no_grad():
                        more = (hit & ~success[active]) | ((hit == success[active]) & (score > best_score[active]))
                        at = active[more]
                        best[at], final[at] = x_adv[more], logits[more]
                        best_score[at], success[at] = score[more], hit[more]
                if step == steps:
                    break
                kept = ~hit if early_stop and step else torch.ones_like(hit)
                if not kept.any():
                    break
                (grad,) = torch.autograd.grad(score.sum(), leaf)
                active, x_adv, grad = active[kept], x_adv[kept], grad[kept]
                num_iter[active] += 1
                x_adv = into_ball_and_range(x_adv + step_size * steepest(grad, norm), x[active], epsilon, norm)
    assert_allowed(best, x, epsilon, norm)
    return account(
        images=x,
        x_adv=best,
        clean=clean,
        final=final,
        labels=known,
        target=wanted,
        success=success,
        num_iter=num_iter,
        queries=queries,
    )

"""ET DeepFool: the shortest way into a chosen class, continued until the model is sure of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.stress.attacks.projection import assert_allowed, size, steepest
from vitkit.stress.attacks.result import AttackResult, account
from vitkit.stress.attacks.victim import attacked, classes_of, clean_logits, own_generator, pixels_of


def et_deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    target: Tensor | int | None = None,
    overshoot: float = 0.02,
    min_confidence: float = 0.95,
    max_iter: int = 100,
    official_overshoot: bool = True,
    clamp: bool = True,
    reference: Literal["initial", "runner_up"] = "initial",
    generator: torch.Generator | None = None,
) -> AttackResult:
    """A small change that makes the model see a class of one's choice, with at least a chosen confidence.

    While ``argmax f(x_i) ≠ t`` or ``p_t(x_i) < c``, with ``w = ∇(f_t − f_k)`` at ``x_i``::

        s_i = (|f_t − f_k| / ‖w‖₂ + 1e-4) · w / ‖w‖₂
        r  ← r + (1 + η) s_i
        x_{i+1} = clip(x + (1 + η) r, 0, 1)

    k is the class predicted for the clean image. With ``min_confidence=0`` this is targeted DeepFool.

    Args:
        model: images (B, C, H, W) in [0, 1] → logits (B, K); any classifier. Left as found.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true classes, for the log only; the model's own predictions if None.
        target: class to reach, one or (B,); None draws one of the classes that were not predicted.
        overshoot: η ≥ 0, share by which steps go too far.
        min_confidence: c in [0, 1), softmax probability the target must get.
        max_iter: most steps for an image.
        official_overshoot: True adds the overshoot to each step and again to the sum, as the authors' code does, so a
            single step is (1 + η)² long; False adds it to the steps only.
        clamp: keep every iterate in [0, 1]. The sum r is not clamped, so a pixel may come back from its bound.
        reference: "initial" keeps k throughout; "runner_up" takes the strongest class besides the target at every
            step, which helps when a third class rises together with the target.
        generator: of random targets; a fresh one of seed 0 if None.

    Shape: ``x_adv`` as the images; see :class:`~vitkit.stress.attacks.result.AttackResult`. The log adds
        ``confidence_reference`` (of the clean prediction, or the runner-up if that is the target) and ``stuck``
        (the gradient vanished).
    Raises: BadInput for images outside [0, 1], settings out of range, unknown classes, or a model without class logits.
    Paper: Labib et al., Tailoring Adversarial Attacks on Deep Neural Networks for Targeted Class Manipulation Using
        DeepFool Algorithm, arXiv:2310.13019, Algorithm 2.
    Departs from the paper: a cap on the steps and an account of failures; iterates are clamped to the pixel range
        unless told otherwise; if the image is already seen as the target but with too little confidence, k is the
        runner-up; ``reference="runner_up"`` and ``official_overshoot=False`` are additions.
    """
    if not 0 <= min_confidence < 1:
        raise BadInput(f"min_confidence={min_confidence} must lie in [0, 1); softmax never reaches 1.")
    if not overshoot >= 0 or max_iter < 1:
        raise BadInput(f"overshoot={overshoot} must be at least 0 and max_iter={max_iter} at least 1.")
    if reference not in ("initial", "runner_up"):
        raise BadInput(f"reference={reference!r}: use 'initial' or 'runner_up'.")
    x = pixels_of(images)
    twice = 1 + overshoot if official_overshoot else 1.0
    with attacked(model) as logits_of:
        clean = clean_logits(logits_of, x)
        predicted = clean.argmax(1)
        known = predicted if labels is None else classes_of(labels, clean, "labels")
        wanted = another_class(clean, generator) if target is None else classes_of(target, clean, "target")
        start_class = torch.where(predicted == wanted, strongest_besides(clean, wanted), predicted)

        x_adv, total, final = x.clone(), torch.zeros_like(x), clean.clone()
        success = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        stuck = torch.zeros_like(success)
        num_iter = torch.zeros(len(x), dtype=torch.long, device=x.device)
        queries = torch.ones_like(num_iter)
        active = torch.arange(len(x), device=x.device)
        for step in range(max_iter + 1):
            leaf = x_adv[active].requires_grad_(step < max_iter)
            logits = logits_of(leaf)
            queries[active] += 1
            final[active] = logits.detach()
            hit = _reached(logits.detach(), wanted[active], min_confidence)
            success[active] = hit
            if step == max_iter or bool(hit.all()):
                break
            rows = torch.arange(len(active), device=x.device)
            against = start_class[active] if reference == "initial" else strongest_besides(logits, wanted[active])
            gap = logits[rows, wanted[active]] - logits[rows, against]
            (w,) = torch.autograd.grad(gap.sum(), leaf)
            length = size(w, "l2")
            reach = (gap.detach().abs() / length + 1e-4).view(-1, 1, 1, 1).to(x.dtype)
            sums = total[active] + (1 + overshoot) * reach * steepest(w, "l2")
            # a flat difference of logits gives no direction; an overflowing one none that can be followed
            dead = ~hit & ~((length >= 1e-12) & sums.flatten(1).isfinite().all(1))
            stuck[active[dead]] = True
            goes_on = ~hit & ~dead
            active, sums = active[goes_on], sums[goes_on]
            if not len(active):
                break
            total[active] = sums
            moved = x[active] + twice * sums
            x_adv[active] = moved.clamp(0.0, 1.0) if clamp else moved
            num_iter[active] += 1
    assert_allowed(x_adv, x, None, "l2", in_range=clamp)
    return account(
        images=x,
        x_adv=x_adv,
        clean=clean,
        final=final,
        labels=known,
        target=wanted,
        success=success,
        num_iter=num_iter,
        queries=queries,
        confidence_reference=final.softmax(1).gather(1, start_class[:, None])[:, 0],
        stuck=stuck,
    )


def strongest_besides(logits: Tensor, classes: Tensor) -> Tensor:
    """The class of the largest logit other than the given one: (B, K), (B,) → (B,)."""
    return logits.detach().scatter(1, classes[:, None], float("-inf")).argmax(1)


def another_class(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """A class other than the predicted one for each image, all equally likely."""
    draws = own_generator(generator)
    shift = torch.randint(1, logits.shape[1], (len(logits),), generator=draws, device=draws.device)
    return (logits.argmax(1) + shift.to(logits.device)) % logits.shape[1]


def _reached(logits: Tensor, target: Tensor, min_confidence: float) -> Tensor:
    enough = logits.softmax(1).gather(1, target[:, None])[:, 0] >= min_confidence
    return (logits.argmax(1) == target) & enough

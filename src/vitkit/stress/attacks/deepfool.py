"""DeepFool: the shortest way out of the predicted class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.stress.attacks.projection import assert_allowed, size, steepest
from vitkit.stress.attacks.result import AttackResult, account
from vitkit.stress.attacks.victim import attacked, classes_of, clean_logits, pixels_of


def deepfool(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    overshoot: float = 0.02,
    max_iter: int = 50,
    num_candidates: int = 10,
    clamp: bool = True,
    generator: torch.Generator | None = None,
) -> AttackResult:
    """About the smallest change that makes the model give any other answer; its length estimates the local margin.

    With ``w_k = ∇(f_k − f_{k₀})`` each step goes to the nearest linearised boundary::

        l = argmin_k |f_k − f_{k₀}| / ‖w_k‖₂,   r ← r + (|f_l − f_{k₀}| / ‖w_l‖₂ + 1e-4) · w_l / ‖w_l‖₂
        x_{i+1} = clip(x + (1 + η) r, 0, 1)

    Args:
        model: images (B, C, H, W) in [0, 1] → logits (B, K); any classifier. Left as found.
        images: (B, C, H, W) in [0, 1].
        labels: (B,) true classes, for the log only; the attack leaves the predicted class.
        overshoot: η ≥ 0, share by which the sum goes too far.
        max_iter: most steps for an image.
        num_candidates: classes considered, the strongest on the clean image; each costs a backward pass a step.
        clamp: keep every iterate in [0, 1].
        generator: unused, the attack is deterministic; taken so that all attacks are called alike.

    Shape: ``x_adv`` as the images; see :class:`~vitkit.stress.attacks.result.AttackResult`. The log adds ``stuck``.
    Raises: BadInput for images outside [0, 1], settings out of range, unknown classes, or a model without class logits.
    Paper: Moosavi-Dezfooli et al., DeepFool: a simple and accurate method to fool deep neural networks,
        arXiv:1511.04599, Algorithm 2.
    Departs from the paper: steps are 1e-4 longer than the linearised distance, as in the authors' code, so that an
        image on a boundary moves; iterates are clamped to the pixel range unless told otherwise, and pixels that a
        step would push against their bound are then left out of its direction; only the strongest candidates are
        tried.
    """
    del generator
    if not overshoot >= 0 or max_iter < 1 or num_candidates < 2:
        raise BadInput(
            f"overshoot={overshoot} must be at least 0, max_iter={max_iter} at least 1 and "
            f"num_candidates={num_candidates} at least 2."
        )
    x = pixels_of(images)
    with attacked(model) as logits_of:
        clean = clean_logits(logits_of, x)
        known = clean.argmax(1) if labels is None else classes_of(labels, clean, "labels")
        # column 0 is the predicted class
        candidates = clean.topk(min(num_candidates, clean.shape[1]), dim=1).indices
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
            hit = logits.detach().argmax(1) != candidates[active, 0]
            success[active] = hit
            if step == max_iter or bool(hit.all()):
                break
            offered = logits.gather(1, candidates[active])
            gaps = offered[:, 1:] - offered[:, :1]
            # one backward pass a candidate class; images share it
            w_all = torch.stack(
                [torch.autograd.grad(gap.sum(), leaf, retain_graph=True)[0] for gap in gaps.unbind(1)], dim=1
            )
            if clamp:
                # a pixel at its bound cannot go on: with it in the direction the step falls short again and again
                here = leaf.detach()[:, None]
                w_all = w_all.masked_fill(((here <= 0) & (w_all < 0)) | ((here >= 1) & (w_all > 0)), 0.0)
            lengths = size(w_all.flatten(0, 1), "l2").view(gaps.shape)
            usable = (lengths >= 1e-12) & lengths.isfinite()
            distance = torch.where(usable, gaps.detach().abs() / lengths, torch.inf)
            nearest, which = distance.min(1)
            dead = ~hit & ~nearest.isfinite()
            stuck[active[dead]] = True
            goes_on = ~hit & ~dead
            w = w_all[torch.arange(len(active), device=x.device), which][goes_on]
            active = active[goes_on]
            if not len(active):
                break
            total[active] += (nearest[goes_on] + 1e-4).view(-1, 1, 1, 1).to(x.dtype) * steepest(w, "l2")
            moved = x[active] + (1 + overshoot) * total[active]
            x_adv[active] = moved.clamp(0.0, 1.0) if clamp else moved
            num_iter[active] += 1
    assert_allowed(x_adv, x, None, "l2", in_range=clamp)
    return account(
        images=x,
        x_adv=x_adv,
        clean=clean,
        final=final,
        labels=known,
        target=None,
        success=success,
        num_iter=num_iter,
        queries=queries,
        stuck=stuck,
    )

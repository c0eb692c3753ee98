"""Where an adversarial image may lie: in a ball around the image and in the pixel range [0, 1]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitkit.errors import BadInput

Norm = Literal["linf", "l2"]


def size(delta: Tensor, norm: Norm) -> Tensor:
    """‖δ‖ of each image: (B, C, H, W) → (B,)."""
    order = float("inf") if _known(norm) == "linf" else 2.0
    return torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1)


def project(delta: Tensor, epsilon: float | Tensor, norm: Norm) -> Tensor:
    """The point of the ball ‖δ‖ ≤ ε nearest to ``delta``, for each image.

    Args:
        delta: (B, C, H, W), in pixel units.
        epsilon: radius, pixel units; one for all images or (B,).
        norm: of the ball.
    """
    radius = torch.as_tensor(epsilon, dtype=delta.dtype, device=delta.device).reshape(-1, 1, 1, 1)
    if _known(norm) == "linf":
        return delta.clamp(-radius, radius)
    length = size(delta, norm).view(-1, 1, 1, 1)
    # tiny floor: a perturbation of length 0 would give 0/0
    return delta * (radius / length.clamp_min(torch.finfo(delta.dtype).tiny)).clamp(max=1.0)


def steepest(grad: Tensor, norm: Norm) -> Tensor:
    """The direction of unit norm along which a loss with gradient ``grad`` grows most; 0 where the gradient is 0."""
    if _known(norm) == "linf":
        return grad.sign()
    # scaled by the largest entry first: squares of tiny gradients underflow in float32
    scaled = grad / size(grad, "linf").view(-1, 1, 1, 1).clamp_min(torch.finfo(grad.dtype).tiny)
    return scaled / size(scaled, "l2").view(-1, 1, 1, 1).clamp_min(torch.finfo(grad.dtype).tiny)


def random_in_ball(like: Tensor, epsilon: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """Uniform draw from the ball, one for each image of ``like`` (B, C, H, W)."""
    where = {"generator": generator, "device": generator.device, "dtype": like.dtype}
    if _known(norm) == "linf":
        return ((torch.rand(like.shape, **where) * 2 - 1) * epsilon).to(like.device)
    direction = steepest(torch.randn(like.shape, **where), "l2")
    dimensions = like[0].numel()
    # in d dimensions the volume within radius ρ grows with ρ^d
    radius = torch.rand((len(like), 1, 1, 1), **where) ** (1 / dimensions)
    return (direction * radius * epsilon).to(like.device)


def random_of_norm(like: Tensor, epsilon: float, norm: Norm, generator: torch.Generator) -> Tensor:
    """Noise of exactly the given norm: ±ε on every pixel (linf) or a uniform direction of length ε (l2)."""
    noise = torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return (steepest(noise, norm) * epsilon).to(like.device)


def into_ball_and_range(x_adv: Tensor, images: Tensor, epsilon: float, norm: Norm) -> Tensor:
    """Project onto the ball around ``images``, then clamp to [0, 1].

    The images lie in [0, 1], so clamping only moves pixels towards them and never leaves the ball.
    """
    return (images + project(x_adv - images, epsilon, norm)).clamp(0.0, 1.0)


def assert_allowed(x_adv: Tensor, images: Tensor, epsilon: float | None, norm: Norm, in_range: bool = True) -> None:
    """Check what every attack promises of its result.

    Raises: RuntimeError if a pixel lies outside [0, 1] or an image outside the ball.
    """
    if in_range and not bool(((x_adv >= 0) & (x_adv <= 1)).all()):
        raise RuntimeError("An attack returned pixels outside [0, 1] or NaN; this is a bug of the attack.")
    if epsilon is not None:
        longest = float(size(x_adv - images, norm).max())
        # x + δ is rounded to the spacing of floats near 1, once for every pixel
        slack = 1e-6 * max(1.0, images[0].numel() ** 0.5 if norm == "l2" else 1.0)
        if not longest <= epsilon + slack:
            raise RuntimeError(f"An attack left its ball: {norm} norm {longest:.6g} > ε = {epsilon:.6g}.")


def _known(norm: Norm) -> Norm:
    if norm not in ("linf", "l2"):
        raise BadInput(f"norm={norm!r}: use 'linf' or 'l2'.")
    return norm

"""Sparse coding by the Locally Competitive Algorithm: leaky neurons that inhibit those with similar atoms."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitkit.errors import BadInput

# B signals · d their width · M atoms

THRESHOLDS = ("positive", "two-sided", "hard")
#: steps between two looks at the stop rule
_LOOK = 10


@dataclass(frozen=True)
class Codes:
    """What the competition ended with.

    Attributes:
        codes: (B, M) activations a.
        potentials: (B, M) membrane potentials u.
        steps: (B,) steps run.
        converged: (B,) bool: stopped by the rule, not by the number of steps.
        active_steps: (B,) active neurons summed over the steps, for
            :func:`vitkit.models.diagnostics.spike_energy.competition_energy`.
    """

    codes: Tensor
    potentials: Tensor
    steps: Tensor
    converged: Tensor
    active_steps: Tensor


def threshold(u: Tensor, lam: Tensor, kind: str) -> Tensor:
    """T_λ(u): "positive" max(u − λ, 0), "two-sided" sign(u)·max(|u| − λ, 0), "hard" u where |u| > λ, else 0."""
    if kind == "positive":
        return (u - lam).relu()
    if kind == "two-sided":
        return u - torch.maximum(-lam, torch.minimum(u, lam))
    return torch.where(u.abs() > lam, u, 0)


def stable_eta(dictionary: Tensor) -> float:
    """``min(0.1, 1/λ_max(ΦΦᵀ))``: half of the largest step that cannot diverge."""
    return min(0.1, 1 / _largest(_gram(_wide(dictionary))))


def check_eta(dictionary: Tensor, eta: float) -> None:
    """Warn if steps of size η may diverge: η must stay below ``2/λ_max(ΦΦᵀ)``."""
    limit = 2 / _largest(_gram(_wide(dictionary)))
    if eta >= limit:
        warnings.warn(
            f"lca: eta={eta} may diverge: the largest eigenvalue of the dictionary's Gram matrix is {2 / limit:.4g}; "
            f"use eta below {limit:.3g}.",
            stacklevel=3,
        )


def lca(
    signals: Tensor,
    dictionary: Tensor,
    lam: float | Tensor,
    kind: str = "positive",
    eta: float | None = None,
    steps: int | None = None,
    max_steps: int = 5000,
    tol: float = 1e-6,
    check: bool = True,
) -> Codes:
    """Let the atoms of a dictionary compete for each signal until they agree.

    From u = 0, with drive ``b = Φ s``, ``a = T_λ(u)`` and ``G = Φ Φᵀ`` (atoms are the rows of Φ here):
    ``u ← u + η [b − (G − I) a − u]``. For the soft thresholds the fixed point minimises ``½‖s − Φᵀa‖² + λ‖a‖₁`` (for
    "positive" over a ≥ 0). A signal stops when ``‖Δu‖ ≤ tol·η·‖u‖``, a rule in which η cancels; signals do not wait for
    each other, so a batch gives what its signals give one by one.

    Gradients: of the fixed point by the implicit function theorem (one linear system on the active atoms, no history of
    the steps), or through every step if ``steps`` is given. The dictionary gets none.

    >>> Phi = torch.eye(3)
    >>> lca(torch.tensor([[2.0, 0.5, -3.0]]), Phi, lam=1.0).codes.round(decimals=4).tolist()
    [[1.0, 0.0, 0.0]]

    Args:
        signals: (B, d). dictionary: (M, d), rows of length 1.
        lam: λ ≥ 0, one for all or (B,) or (B, 1).
        kind: T_λ, one of :data:`THRESHOLDS`.
        eta: η; None: :func:`stable_eta`.
        steps: run exactly so many; None: until the stop rule.
        check: warn if a given η may diverge, which costs an eigenvalue problem of size M.
        max_steps: at most. tol: of the stop rule; moves below 16 roundings of ‖b‖ stop it, too.

    Returns: :class:`Codes`, in the precision of the signals, at least float32.

    Raises: BadInput for shapes or options out of range.
    Paper: Rozell et al., Sparse Coding via Thresholding and Local Competition in Neural Circuits, 2008; as used in
        ViT-LCA: A Neuromorphic Approach for Vision Transformers, arXiv:2411.00140.
    """
    if signals.ndim != 2 or dictionary.ndim != 2 or signals.shape[1] != dictionary.shape[1] or not len(dictionary):
        raise BadInput(
            f"lca takes signals (B, d) and a dictionary (M, d) of one width d, not {tuple(signals.shape)} and "
            f"{tuple(dictionary.shape)}."
        )
    if kind not in THRESHOLDS:
        raise BadInput(f"The threshold {kind!r} is unknown; use one of {THRESHOLDS}.")
    if max_steps < 1 or (steps is not None and steps < 1) or tol <= 0 or (eta is not None and eta <= 0):
        raise BadInput(f"lca: steps={steps}, max_steps={max_steps}, tol={tol} and eta={eta} must be above 0.")
    s = _wide(signals)
    atoms = dictionary.detach().to(s.dtype)
    level = lam.to(s).reshape(-1, 1) if isinstance(lam, Tensor) else s.new_full((1, 1), lam)
    if len(level) not in (1, len(s)) or (not isinstance(lam, Tensor) and lam < 0):
        raise BadInput(f"lca: lam must be at least 0, one number or one for each of the {len(s)} signals, not {lam}.")
    level = level.expand(len(s), 1)
    with torch.autocast(s.device.type, enabled=False):
        gram = _gram(atoms)
        if eta is None:
            eta = min(0.1, 1 / _largest(gram))
        elif check:
            check_eta(dictionary, eta)
        drive = s @ atoms.T
        if steps is not None:
            return _run(drive, gram, level, kind, eta, steps)
        with torch.no_grad():
            found = _settle(drive.detach(), gram, level.detach(), kind, eta, max_steps, tol)
        if torch.is_grad_enabled() and (drive.requires_grad or level.requires_grad):
            shift = 0 if kind == "hard" else level * found.codes.sign()
            codes = _AtFixedPoint.apply(drive - shift, found.codes, gram)
            return Codes(codes, found.potentials, found.steps, found.converged, found.active_steps)
        return found


@torch.no_grad()
def optimality_gap(signals: Tensor, dictionary: Tensor, codes: Tensor, lam: float | Tensor, kind: str) -> Tensor:
    """How far codes are from the fixed point: the largest violation of its conditions as a share of the largest drive.

    With ``r = b − G a``, the fixed point has ``r = λ sign(a)`` where a ≠ 0 ("hard": r = 0) and elsewhere ``r ≤ λ``
    ("positive") or ``|r| ≤ λ``.

    Args:
        signals, dictionary, lam, kind: as :func:`lca` had them. codes: (B, M).

    Returns: (B,), 0 at the fixed point.
    """
    drive = signals.to(codes.dtype) @ dictionary.T.to(codes.dtype)
    rest = drive - codes @ _gram(dictionary.to(codes.dtype))
    level = lam.to(codes).reshape(-1, 1) if isinstance(lam, Tensor) else lam
    on = (rest - (0 if kind == "hard" else level * codes.sign())).abs()
    off = ((rest if kind == "positive" else rest.abs()) - level).clamp(min=0)
    worst = torch.where(codes != 0, on, off).amax(1)
    return worst / drive.abs().amax(1).clamp(min=torch.finfo(drive.dtype).tiny)


def update_dictionary(dictionary: Tensor, signals: Tensor, codes: Tensor, mu: float) -> Tensor:
    """One step of dictionary learning: ``Φ ← Φ + μ · mean a (s − Φᵀa)``, rows back to length 1.

    Args:
        dictionary: (M, d). signals: (B, d). codes: (B, M) of them. mu: μ.
    """
    residual = signals - codes @ dictionary
    learned = dictionary + mu * codes.T @ residual / len(signals)
    return torch.nn.functional.normalize(learned, dim=1)


# -- the dynamics ----------------------------------------------------------------------------------------------------


def _run(drive: Tensor, gram: Tensor, lam: Tensor, kind: str, eta: float, steps: int) -> Codes:
    """So many steps, differentiable one by one."""
    inhibition = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    u = torch.zeros_like(drive)
    a = threshold(u, lam, kind)
    fired = torch.zeros(len(u), device=u.device)
    for _ in range(steps):
        u = u + eta * (drive - a @ inhibition - u)
        a = threshold(u, lam, kind)
        fired = fired + (a != 0).sum(1)
    done = torch.full((len(u),), steps, device=u.device)
    return Codes(a, u, done, torch.zeros_like(done, dtype=torch.bool), fired)


def _settle(drive: Tensor, gram: Tensor, lam: Tensor, kind: str, eta: float, max_steps: int, tol: float) -> Codes:
    """Until every signal has come to rest; those that have drop out of the arithmetic."""
    inhibition = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    final = torch.zeros_like(drive)
    count = torch.full((len(drive),), max_steps, device=drive.device)
    fired_in_all = torch.zeros(len(drive), device=drive.device)
    converged = torch.zeros(len(drive), dtype=torch.bool, device=drive.device)
    rows = torch.arange(len(drive), device=drive.device)
    u, a, fired = torch.zeros_like(drive), torch.zeros_like(drive), torch.zeros(len(drive), device=drive.device)
    b, push, level = drive, eta * drive, lam
    for step in range(1, max_steps + 1):
        before = u
        # thousands of small steps: as few operations as the equation can be written with
        u = torch.addmm(u, a, inhibition, beta=1 - eta, alpha=-eta).add_(push)
        a = threshold(u, level, kind)
        fired += a.count_nonzero(1)
        if step % _LOOK and step < max_steps:
            continue
        move = u - before
        # what is subtracted from the drive is as large as it: smaller differences than its roundings say nothing
        floor = 16 * torch.finfo(u.dtype).eps * b.norm(dim=1)
        still = move.norm(dim=1) > eta * torch.maximum(tol * u.norm(dim=1), floor)
        rest = ~still
        final[rows], fired_in_all[rows] = u, fired
        converged[rows[rest]], count[rows[rest]] = True, step
        if not still.any():
            break
        if rest.any():
            rows, u, a, b, push, level, fired = (v[still] for v in (rows, u, a, b, push, level, fired))
    return Codes(threshold(final, lam, kind), final, count, converged, fired_in_all)


class _AtFixedPoint(torch.autograd.Function):
    """The codes, with the derivative of ``G_SS a_S = drive_S`` on the active atoms S of each signal."""

    @staticmethod
    def forward(ctx: Any, drive: Tensor, codes: Tensor, gram: Tensor) -> Tensor:
        ctx.save_for_backward(codes, gram)
        return codes.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        codes, gram = ctx.saved_tensors
        return _solve_on((codes != 0).to(gram.dtype), gram, grads[0]), None, None


def _solve_on(mask: Tensor, gram: Tensor, right: Tensor, tol: float = 1e-10) -> Tensor:
    """x with ``G_SS x_S = right_S`` and 0 elsewhere, for all signals at once by conjugate gradients.

    Args:
        mask: (B, M), 1 on S. gram: (M, M). right: (B, M).
    """
    x = torch.zeros_like(right)
    r = mask * right
    p, rho = r, (r * r).sum(1, keepdim=True)
    goal = tol * rho
    # exact arithmetic needs one step per active atom; rounding a few more
    for _ in range(2 * int(mask.sum(1).max().item()) if len(mask) else 0):
        if bool((rho <= goal).all()):
            break
        q = mask * (p @ gram)
        # signals that are done have p = 0 and stay where they are
        alpha = rho / (p * q).sum(1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        x, r = x + alpha * p, r - alpha * q
        new = (r * r).sum(1, keepdim=True)
        p = torch.where(new > goal, r + new / rho.clamp(min=torch.finfo(p.dtype).tiny) * p, 0)
        rho = torch.where(new > goal, new, 0)
    return x


def _gram(dictionary: Tensor) -> Tensor:
    return dictionary @ dictionary.T


def _largest(gram: Tensor) -> float:
    return max(float(torch.linalg.eigvalsh(gram)[-1]), torch.finfo(gram.dtype).tiny)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

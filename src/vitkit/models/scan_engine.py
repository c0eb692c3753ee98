"""The selective scan without its trimmings, as one PyTorch operator with a gradient of its own.

``h_t = exp(Δ_t A) h_{t−1} + b_t`` and ``y_t = Σ_s C_t h_t`` for G groups of n channels with S states each. The states
of all steps never exist at once: the forward keeps one in front of every segment, the backward computes a segment
again from there. :mod:`vitkit.models.scan` is the way in.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitkit.errors import BadInput
from vitkit.models import scan_kernel

# B batch · L steps · G groups · n channels of a group, E = G·n · S states · T steps of a segment

_LOG2_E = 1 / math.log(2)
# numbers in one work space: what a core's cache holds, and what keeps a GPU busy
_CPU_BUFFER, _GPU_BUFFER = 2**18, 2**26


def core(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor, zoh: bool, chunk: int, native: bool
) -> tuple[Tensor, Tensor]:
    """y (B, L, E) and the last state (B, G, S, n).

    Args:
        x: (B, L, E): Δu for Euler's rule, u for the zero-order hold.
        delta: Δ (B, L, E), positive. A: (G, S, n). Bm, Cm: (B, L, G, S). h0: (B, G, S, n).
        zoh: b = expm1(ΔA)/A · x ⊗ B in place of x ⊗ B.
        chunk: steps that are walked one after another. native: use the compiled kernel (float32, CPU, Euler).
    """
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, delta, A, Bm, Cm, h0))
    y, last, _ = _scan(x, delta, A, Bm, Cm, h0, zoh, chunk, native, keep)
    return y, last


def count_operations(batch: int, length: int, channels: int, states: int) -> int:
    """Operations of one scan: per channel, state and step two for a, one for b, two for h and two for y."""
    return 7 * batch * length * channels * states


# -- the operator and its gradient -----------------------------------------------------------------------------------


@torch.library.custom_op("vitkit::selective_scan", mutates_args=())
def _scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    h0: Tensor,
    zoh: bool,
    chunk: int,
    native: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if native:
        return scan_kernel.forward(x, delta, A, Bm, Cm, h0, chunk, keep)
    with torch.autocast(x.device.type, enabled=False):
        return _forward(x, delta, A, Bm, Cm, h0, zoh, chunk, keep)


@torch.library.custom_op("vitkit::selective_scan_backward", mutates_args=())
def _scan_backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    marks: Tensor,
    dy: Tensor,
    dlast: Tensor,
    zoh: bool,
    chunk: int,
    native: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if native:
        return scan_kernel.backward(x, delta, A, Bm, Cm, marks, dy, dlast, chunk)
    with torch.autocast(x.device.type, enabled=False):
        return _backward(x, delta, A, Bm, Cm, marks, dy, dlast, zoh, chunk)


@_scan.register_fake
def _(x, delta, A, Bm, Cm, h0, zoh, chunk, native, keep):  # type: ignore[no-untyped-def]
    segment = chunk if native else _segment(x, A, chunk)
    marks = -(-x.shape[1] // segment) if keep else 0
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        h0.new_empty(h0.shape),
        h0.new_empty((marks, *h0.shape)),
    )


@_scan_backward.register_fake
def _(x, delta, A, Bm, Cm, marks, dy, dlast, zoh, chunk, native):  # type: ignore[no-untyped-def]
    return tuple(t.new_empty(t.shape) for t in (x, delta, A, Bm, Cm, dlast))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, delta, A, Bm, Cm, _, ctx.zoh, ctx.chunk, ctx.native, _ = inputs
    ctx.save_for_backward(x, delta, A, Bm, Cm, output[2])


def _gradient(ctx: Any, dy: Tensor, dlast: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _scan_backward(*ctx.saved_tensors, dy, dlast, ctx.zoh, ctx.chunk, ctx.native)
    return (*found, None, None, None, None)


_scan.register_autograd(_gradient, setup_context=_remember)


# -- the same in plain PyTorch ---------------------------------------------------------------------------------------


def _segment(x: Tensor, A: Tensor, chunk: int) -> int:
    """T: as many chunks as the work space holds are walked side by side, if that is worth doing everything twice."""
    room = (_GPU_BUFFER if x.is_cuda else _CPU_BUFFER) // (x.shape[0] * A.numel() * chunk)
    return chunk * min(room if room >= 8 else 1, -(-x.shape[1] // chunk))


def _forward(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, h0: Tensor, zoh: bool, chunk: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    work = _Segments(x, delta, A, Bm, Cm, zoh, chunk)
    y = x.new_empty(work.length, *work.xs.shape[1:])
    marks = x.new_empty((work.count if keep else 0, *h0.shape))
    state = h0
    for i in range(work.count):
        if keep:
            marks[i] = state
        k = work.load(i)
        at = slice(i * work.segment, i * work.segment + k)
        state = work.walk(state).clone()
        # (T·B·G, 1, S) @ (T·B·G, S, n)
        y[at] = torch.bmm(work.Cs[at].flatten(0, 2).unsqueeze(1), work.h[:k].flatten(0, 2)).view(y[at].shape)
    return work.channels(y), state.clone(), marks


def _backward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    marks: Tensor,
    dy: Tensor,
    dlast: Tensor,
    zoh: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    work = _Segments(x, delta, A, Bm, Cm, zoh, chunk)
    dys = work.time_first(dy)
    dx, dd = torch.empty_like(work.xs), torch.empty_like(work.xs)
    dB, dC, dA = torch.empty_like(work.Bs), torch.empty_like(work.Cs), torch.zeros_like(A)
    gradients = torch.empty_like(work.h)
    carry = dlast
    for i in reversed(range(work.count)):
        k = work.load(i)
        at = slice(i * work.segment, i * work.segment + k)
        work.walk(marks[i])
        g, h, a, before = gradients[:k], work.h[:k], work.a[:k], work.states[:k]
        dyk, xk, dk = dys[at].unsqueeze(3), work.xs[at].unsqueeze(3), work.deltas[at].unsqueeze(3)
        # g_t = C_t dy_t + a_{t+1} g_{t+1}; behind the last step a is 1 and carries what comes from the next segment
        torch.mul(dyk, work.Cs[at].unsqueeze(-1), out=g)
        gradients[k:] = 0
        carry = _walk(work.decays[1:], gradients, carry, chunk, backwards=True) * work.decays[0]
        dC[at] = torch.bmm(dyk.flatten(0, 2), h.flatten(0, 2).mT).view(dC[at].shape)
        into = g * work.phi[:k] if zoh else g
        dx[at] = torch.bmm(work.Bs[at].flatten(0, 2).unsqueeze(1), into.flatten(0, 2)).view(dx[at].shape)
        dB[at] = torch.bmm(xk.flatten(0, 2), into.flatten(0, 2).mT).view(dB[at].shape)
        if zoh:
            # φ = expm1(ΔA)/A has the derivatives a and Δ² f'(ΔA), where f is the ratio
            via_phi = g * xk * work.Bs[at].unsqueeze(-1)
            dA += (via_phi * dk.square() * _slope(dk * A)).sum((0, 1))
            dd[at] = (via_phi * a).sum(3)
        else:
            dd[at] = 0
        # what reaches ΔA through a
        g.mul_(a).mul_(before)
        dd[at] += torch.mul(g, A, out=a).sum(3)
        dA += g.mul_(dk).sum((0, 1))
    back = (work.channels(dx), work.channels(dd), dA, dB.transpose(0, 1).contiguous(), dC.transpose(0, 1).contiguous())
    return (*back, carry.contiguous())


class _Segments:
    """The inputs with time first and groups apart, and work spaces for one segment.

    Attributes: xs, deltas (L, B, G, n); Bs, Cs (L, B, G, S); a, h, phi (T, B, G, S, n); ``states`` is h with the state
        in front of it, ``decays`` is a with ones behind it.
    """

    def __init__(self, x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, zoh: bool, chunk: int) -> None:
        self.A, self.zoh, self.chunk = A, zoh, chunk
        self.length, self.segment = x.shape[1], _segment(x, A, chunk)
        self.count = -(-self.length // self.segment)
        self.xs, self.deltas = self.time_first(x), self.time_first(delta)
        self.Bs, self.Cs = Bm.transpose(0, 1).contiguous(), Cm.transpose(0, 1).contiguous()
        shape = (self.segment + 1, x.shape[0], *A.shape)
        self.states, self.decays = x.new_empty(shape), x.new_ones(shape)
        self.a, self.h = self.decays[:-1], self.states[1:]
        self.phi = torch.empty_like(self.a) if zoh else self.a
        # on a CPU PyTorch computes 2^x four times faster than e^x
        self.scaled = A * _LOG2_E

    def time_first(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (len(self.A), -1)).transpose(0, 1).contiguous()

    def channels(self, x: Tensor) -> Tensor:
        """(L, B, G, n) → (B, L, G·n)."""
        return x.transpose(0, 1).flatten(2).contiguous()

    def load(self, i: int) -> int:
        """Put a and b of segment ``i`` into ``a`` and ``h``; returns its number of steps, the rest stands still."""
        at = slice(i * self.segment, min((i + 1) * self.segment, self.length))
        k = at.stop - at.start
        delta = self.deltas[at].unsqueeze(3)
        torch.exp2(torch.mul(delta, self.scaled, out=self.a[:k]), out=self.a[:k])
        torch.mul(self.xs[at].unsqueeze(3), self.Bs[at].unsqueeze(-1), out=self.h[:k])
        if self.zoh:
            self.phi[:k] = delta * ratio(delta * self.A)
            self.h[:k] *= self.phi[:k]
        self.a[k:], self.h[k:] = 1, 0
        return k

    def walk(self, start: Tensor) -> Tensor:
        """Turn b in ``h`` into the states after ``start``, and return the last."""
        self.states[0] = start
        return _walk(self.a, self.h, start, self.chunk, backwards=False)


def _walk(a: Tensor, h: Tensor, start: Tensor, chunk: int, backwards: bool) -> Tensor:
    """``h_t ← h_t + a_t h_{t−1}`` in place along the first axis, from ``start``; ``backwards`` from the other end.

    Chunks are walked side by side: once from zero to see where each ends, then from where the one before it ended.
    That touches every number twice whatever the length of a chunk; doubling steps would do so log₂(chunk) times.
    """
    chunks_a, chunks_h = a.unflatten(0, (-1, chunk)), h.unflatten(0, (-1, chunk))
    count = len(chunks_a)
    steps, order = list(range(chunk)), list(range(count))
    if backwards:
        steps.reverse()
        order.reverse()
    a_at, h_at = chunks_a.unbind(1), chunks_h.unbind(1)
    entry = start.unsqueeze(0)
    if count > 1:
        end = torch.zeros_like(h_at[0])
        for t in steps:
            torch.addcmul(h_at[t], a_at[t], end, out=end)
        fade = chunks_a.prod(1)
        entry, state = torch.empty_like(end), start
        for m in order:
            entry[m] = state
            state = torch.addcmul(end[m], fade[m], state)
    for t in steps:
        entry = h_at[t].addcmul_(a_at[t], entry)
    return entry[order[-1]]


# -- expm1(z)/z ------------------------------------------------------------------------------------------------------


def ratio(z: Tensor) -> Tensor:
    """``expm1(z)/z``, 1 at zero."""
    small = z.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(z), z)
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5)))
    return torch.where(small, series, torch.expm1(safe) / safe)


def _slope(z: Tensor) -> Tensor:
    """The derivative of :func:`ratio`, ``(e^z − ratio(z))/z``."""
    # the difference cancels: the series has to reach further than that of the ratio itself
    small = z.abs() < 0.1
    safe = torch.where(small, torch.ones_like(z), z)
    series = torch.zeros_like(z)
    for k in range(9, 0, -1):
        series = series * z + k / math.factorial(k + 1)
    return torch.where(small, series, (safe.exp() - torch.expm1(safe) / safe) / safe)


def group_states(A: Tensor, groups: int) -> Tensor:
    """(…, E, S) → (…, G, S, n): the states' own layout, in which channels are neighbours."""
    return A.unflatten(-2, (groups, -1)).transpose(-1, -2).contiguous()


def native_problem(dtype: torch.dtype, device: torch.device, states: int, zoh: bool) -> str:
    """Why the compiled kernel cannot serve a scan; empty if it can. The first call that gets so far compiles it."""
    if device.type != "cpu":
        return f"it runs on the CPU, and the tensors are on {device}"
    if dtype != torch.float32:
        return f"it computes in float32, not in {str(dtype).removeprefix('torch.')}"
    if states > scan_kernel.MOST_STATES:
        return f"it takes up to {scan_kernel.MOST_STATES} states per channel, not {states}"
    return "it knows Euler's rule only" if zoh else scan_kernel.reason()


def require_native(dtype: torch.dtype, device: torch.device, states: int, zoh: bool) -> None:
    """Raises: BadInput that says why the compiled kernel cannot serve."""
    why = native_problem(dtype, device, states, zoh)
    if why:
        raise BadInput(f'method="native" is not possible: {why}; use method="chunked".')

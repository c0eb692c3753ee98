"""Linear recurrences along a sequence whose pace depends on the input: the operation behind Mamba.

Three of them: :func:`selective_scan` (Mamba: every channel and state has its own decay), :func:`ssd_scan` (Mamba-2: one
decay per head, so that a chunk is a matrix product) and :func:`lti_scan` (S4D: nothing depends on the input, so that it
is a convolution).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vitkit.errors import BadInput, unknown
from vitkit.models.scan_engine import core, count_operations, group_states, native_problem, ratio, require_native

# B batch · L steps · E channels · S states · G groups of channels · H heads · P channels of a head

METHODS = ("auto", "sequential", "associative", "chunked", "native", "cuda")
DISCRETIZATIONS = ("euler", "zoh")


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    h0: Tensor | None = ...,
    reverse: bool = ...,
    discretization: str = ...,
    method: str = ...,
    chunk: int = ...,
    return_state: Literal[False] = False,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    delta_softplus: bool = ...,
    h0: Tensor | None = ...,
    reverse: bool = ...,
    discretization: str = ...,
    method: str = ...,
    chunk: int = ...,
    *,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    h0: Tensor | None = None,
    reverse: bool = False,
    discretization: str = "euler",
    method: str = "auto",
    chunk: int = 32,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's scan: ``h_t = exp(Δ_t A) h_{t−1} + b_t``, ``y_t = Σ_s C_t h_t + D u_t``, gated by ``SiLU(z)``.

    ``Δ = softplus(delta + delta_bias)``; ``b_t = Δ_t u_t B_t`` (Euler) or ``expm1(Δ_t A)/A · u_t B_t`` (zero-order
    hold). The cost grows linearly with L. Computed in float32, under autocast too; in float64 if an input is.

    Methods, all the same to rounding:

    - ``sequential``: a loop over the steps; the reference.
    - ``associative``: log₂ L doubling steps over all of L; plain PyTorch operations only, so it exports and has second
      derivatives. Keeps all L·E·S states in memory several times.
    - ``chunked``: an operator with its own gradient that holds the states of a few chunks and computes them again in
      the backward; first derivatives only.
    - ``native``: the same in machine code, several times faster; float32 on a CPU, Euler's rule, a C compiler
      (see :mod:`vitkit.models.scan_kernel`). The first call compiles into the user's cache, about a second.
    - ``cuda``: the kernel of the package ``mamba-ssm``, which must be installed; Euler's rule, no ``h0``.
    - ``auto``: ``cuda`` or ``native`` where possible, ``associative`` while a model is exported, else ``chunked``.

    >>> ones = torch.ones(1, 4, 1)
    >>> one = torch.ones(1, 4, 1, 1)
    >>> selective_scan(ones, ones, torch.zeros(1, 1), one, one, delta_softplus=False)[0, :, 0]
    tensor([1., 2., 3., 4.])

    Args:
        u: (B, L, E).
        delta: (B, L, E), raw, or positive with ``delta_softplus=False``.
        A: (E, S), not positive.
        Bm: (B, L, G, S); group g serves the channels g·E/G … (g+1)·E/G − 1.
        Cm: (B, L, G, S).
        D: (E,) or None.
        z: (B, L, E) or None.
        delta_bias: (E,) or None.
        delta_softplus: Δ is the softplus of delta.
        h0: (B, E, S), the state before the first step; None: zero.
        reverse: run from the last step to the first; ``h0`` is then the state behind the last.
        discretization: "euler" or "zoh".
        method: one of :data:`METHODS`.
        chunk: steps between states that the backward starts from; only "chunked" and "native" use it.
        return_state: also return the state after the last step (the first with ``reverse``).

    Returns: y (B, L, E) in the dtype of u; with ``return_state`` also (B, E, S) in the dtype of the computation.

    Raises:
        BadInput: shapes or devices do not match, a method cannot do what is asked, or ``chunk`` is below 1.
        UnknownName: another method or discretization.

    Paper: Mamba: Linear-Time Sequence Modeling with Selective State Spaces, arXiv:2312.00752.
    Departs from the paper: nothing in Euler's rule, which is what its code computes; the zero-order hold of its text is
        offered beside it.
    """
    _check(u, delta, A, Bm, Cm, D, z, delta_bias, h0, discretization, method, chunk)
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(torch.float32, torch.promote_types(u.dtype, A.dtype))
        tensors: list[Any] = [None if t is None else t.to(dtype) for t in (u, delta, A, Bm, Cm, D, z, delta_bias, h0)]
        y, state = _scan(
            *tensors,
            softplus=delta_softplus,
            reverse=reverse,
            zoh=discretization == "zoh",
            method=method,
            chunk=chunk,
        )
        y = y.to(u.dtype)
    return (y, state) if return_state else y


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    h0: Tensor | None,
    *,
    softplus: bool,
    reverse: bool,
    zoh: bool,
    method: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    groups = Bm.shape[2]
    method = _choose(u, A, h0, zoh, method)
    if reverse:
        u, delta, Bm, Cm = (t.flip(1) for t in (u, delta, Bm, Cm))
        z = None if z is None else z.flip(1)
    if method == "cuda":
        y, state = _mamba_ssm(u, delta, A, Bm, Cm, D, z, bias, softplus)
        return (y.flip(1) if reverse else y), state
    if bias is not None:
        delta = delta + bias
    if softplus:
        delta = F.softplus(delta)
    if method in ("chunked", "native"):
        if h0 is None:
            h0 = u.new_zeros(u.shape[0], *A.shape)
        source = u if zoh else delta * u
        y, last = core(
            source,
            delta,
            group_states(A, groups),
            Bm,
            Cm,
            group_states(h0, groups),
            zoh,
            min(chunk, u.shape[1]),
            method == "native",
        )
        state = last.transpose(-1, -2).flatten(1, 2)
    else:
        a, b = _discretise(u, delta, A, Bm, zoh)
        h = (_sequential if method == "sequential" else _associative)(a, b, h0)
        # (B, L, G, n, S) @ (B, L, G, S, 1)
        y = (h.unflatten(2, (groups, -1)) @ Cm.unsqueeze(-1)).flatten(2)
        state = h[:, -1]
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return (y.flip(1) if reverse else y), state


def _choose(u: Tensor, A: Tensor, h0: Tensor | None, zoh: bool, method: str) -> str:
    """The method behind "auto"; for any other, that it can do what is asked."""
    states = A.shape[1]
    if method == "auto":
        if torch.compiler.is_exporting():
            return "associative"
        if u.is_cuda and not zoh and h0 is None and u.dtype == torch.float32 and _mamba_ssm_kernel() is not None:
            return "cuda"
        return "native" if _native_serves(u.dtype, u.device, states, zoh) else "chunked"
    if method == "native":
        require_native(u.dtype, u.device, states, zoh)
    if method == "cuda":
        if zoh or h0 is not None or u.dtype != torch.float32:
            raise BadInput('method="cuda" knows Euler\'s rule in float32 without h0 only; use method="chunked".')
        if _mamba_ssm_kernel() is None:
            raise BadInput('method="cuda" needs the package mamba-ssm: pip install mamba-ssm; or use method="chunked".')
    return method


@torch.compiler.assume_constant_result
def _native_serves(dtype: torch.dtype, device: torch.device, states: int, zoh: bool) -> bool:
    return native_problem(dtype, device, states, zoh) == ""


def _discretise(u: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, zoh: bool) -> tuple[Tensor, Tensor]:
    """a and b, (B, L, E, S)."""
    exponent = delta.unsqueeze(-1) * A
    step = delta.unsqueeze(-1)
    source = (step * ratio(exponent) if zoh else step) * u.unsqueeze(-1)
    # (B, L, G, n, S or 1) · (B, L, G, 1, S)
    return exponent.exp(), (source.unflatten(2, (Bm.shape[2], -1)) * Bm.unsqueeze(3)).flatten(2, 3)


def _sequential(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    """All states (B, L, E, S). Walks views: indexing a[:, t] would make the backward quadratic in L."""
    h = torch.zeros_like(b[:, 0]) if h0 is None else h0
    states = []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, 1)


def _associative(a: Tensor, b: Tensor, h0: Tensor | None) -> Tensor:
    """All states by doubling: after the step of width w, (a, b)_t stands for the steps t−2w+1 … t together.

    Products of a, never quotients: every a is at most 1, while exp(−cumsum) overflows.
    """
    if h0 is not None:
        b = torch.cat([(b[:, 0] + a[:, 0] * h0).unsqueeze(1), b[:, 1:]], 1)
    length, width = a.shape[1], 1
    while width < length:
        b = torch.cat([b[:, :width], b[:, width:] + a[:, width:] * b[:, :-width]], 1)
        a = torch.cat([a[:, :width], a[:, width:] * a[:, :-width]], 1)
        width *= 2
    return b


@torch.compiler.assume_constant_result
@lru_cache(maxsize=1)
def _mamba_ssm_kernel() -> Any:
    """The function ``selective_scan_fn`` of mamba-ssm, None without the package."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn


def _mamba_ssm(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """mamba-ssm has channels before time, (B, E, L), and (B, G, S, L)."""
    first = [None if t is None else t.transpose(1, 2).contiguous() for t in (u, delta, z)]
    states = [t.permute(0, 2, 3, 1).contiguous() for t in (Bm, Cm)]
    y, state = _mamba_ssm_kernel()(
        first[0],
        first[1],
        A.contiguous(),
        *states,
        D=D,
        z=first[2],
        delta_bias=bias,
        delta_softplus=softplus,
        return_last_state=True,
    )
    return y.transpose(1, 2), state


def _operations(
    x: Any, delta: Any, A: Any, Bm: Any, Cm: Any, h0: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    batch, length, channels = x
    return count_operations(batch, length, channels, A[1])


# a second import of this file, as doctests make, must not register it again
if torch.ops.vitkit.selective_scan not in flop_registry:
    register_flop_formula(torch.ops.vitkit.selective_scan)(_operations)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    bias: Tensor | None,
    h0: Tensor | None,
    discretization: str,
    method: str,
    chunk: int,
) -> None:
    if method not in METHODS:
        raise unknown("scan method", method, METHODS, "vitkit.models.scan.METHODS")
    if discretization not in DISCRETIZATIONS:
        raise unknown("discretization", discretization, DISCRETIZATIONS, "vitkit.models.scan.DISCRETIZATIONS")
    if chunk < 1:
        raise BadInput(f"chunk={chunk} must be at least 1.")
    if u.ndim != 3 or A.ndim != 2 or Bm.ndim != 4:
        raise BadInput(
            f"The scan takes u (B, L, E), A (E, S) and Bm (B, L, G, S); it got {_shape(u)}, {_shape(A)}, {_shape(Bm)}."
        )
    batch, length, channels = u.shape
    groups, states = Bm.shape[2:]
    if length < 1 or channels % groups:
        raise BadInput(f"u of shape {_shape(u)} needs at least one step, and channels that {groups} groups divide.")
    wanted = {
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, states)),
        "Bm": (Bm, (batch, length, groups, states)),
        "Cm": (Cm, (batch, length, groups, states)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "delta_bias": (bias, (channels,)),
        "h0": (h0, (batch, channels, states)),
    }
    _require_shapes(wanted)
    away = [name for name, (tensor, _) in wanted.items() if tensor is not None and tensor.device != u.device]
    if away:
        raise BadInput(f"{', '.join(away)} must be on {u.device}, where u is; move them with .to(u.device).")


def _require_shapes(wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise BadInput(f"{name} must have the shape {'×'.join(map(str, shape))}; it has {_shape(tensor)}.")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


# -- Mamba-2 ---------------------------------------------------------------------------------------------------------


def ssd_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    Bm: Tensor,
    Cm: Tensor,
    D: Tensor | None = None,
    h0: Tensor | None = None,
    reverse: bool = False,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan, with one decay per head: ``h_t = exp(Δ_t A) h_{t−1} + Δ_t u_t B_tᵀ``, ``y_t = h_t C_t + D u_t``.

    Equal to :func:`selective_scan` with A repeated over channels and states. Inside a chunk it is a masked attention
    without softmax, ``Y = (M ⊙ C Bᵀ)(Δ u)`` with ``M_ts = exp(A Σ_{r=s+1..t} Δ_r)`` for t ≥ s, else 0; between chunks
    the states are carried on. Computed in float32, in float64 if an input is; all operations are plain PyTorch.

    >>> y, state = ssd_scan(torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1), torch.zeros(1), *torch.ones(2, 1, 3, 1, 1))
    >>> y[0, :, 0, 0], state.shape
    (tensor([1., 2., 3.]), torch.Size([1, 1, 2, 1]))

    Args:
        u: (B, L, H, P).
        delta: Δ (B, L, H), positive: softplus and bias are the caller's.
        A: (H,), not positive.
        Bm: (B, L, G, S); group g serves the heads g·H/G … (g+1)·H/G − 1.
        Cm: (B, L, G, S).
        D: (H,) or None.
        h0: (B, H, P, S), the state before the first step; None: zero.
        reverse: run from the last step to the first.
        chunk: steps of a chunk; its matrix has chunk² entries per head.

    Returns: y (B, L, H, P) in the dtype of u, and the state after the last step (B, H, P, S).

    Raises: BadInput if shapes do not match, or ``chunk`` is below 1.
    Paper: Transformers are SSMs (Mamba-2), arXiv:2405.21060, §6.
    Departs from the paper: nothing.
    """
    if u.ndim != 4 or Bm.ndim != 4 or chunk < 1 or u.shape[1] < 1 or u.shape[2] % Bm.shape[2]:
        raise BadInput(
            f"ssd_scan takes u (B, L, H, P), Bm (B, L, G, S) with G dividing H, and chunk ≥ 1; it got {_shape(u)}, "
            f"{_shape(Bm)} and chunk={chunk}."
        )
    batch, length, heads, width = u.shape
    groups, states = Bm.shape[2:]
    _require_shapes(
        {
            "delta": (delta, (batch, length, heads)),
            "A": (A, (heads,)),
            "Bm": (Bm, (batch, length, groups, states)),
            "Cm": (Cm, (batch, length, groups, states)),
            "D": (D, (heads,)),
            "h0": (h0, (batch, heads, width, states)),
        }
    )
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(torch.float32, torch.promote_types(u.dtype, A.dtype))
        x, step, rate, keys, queries = (t.to(dtype) for t in (u, delta, A, Bm, Cm))
        if reverse:
            x, step, keys, queries = (t.flip(1) for t in (x, step, keys, queries))
        state = x.new_zeros(batch, heads, width, states) if h0 is None else h0.to(dtype)
        y, state = _ssd(x, step, rate, keys, queries, state, min(chunk, length))
        if D is not None:
            y = y + D.to(dtype).unsqueeze(-1) * x
        return (y.flip(1) if reverse else y).to(u.dtype), state


def _ssd(
    x: Tensor, step: Tensor, rate: Tensor, keys: Tensor, queries: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    length, heads = x.shape[1:3]
    short = -length % chunk
    # a step with Δ = 0 leaves the state alone
    source, decay = F.pad(step.unsqueeze(-1) * x, (0, 0, 0, 0, 0, short)), F.pad(step * rate, (0, 0, 0, short))
    repeat = heads // keys.shape[2]
    keys, queries = (F.pad(t, (0, 0, 0, 0, 0, short)).repeat_interleave(repeat, 2) for t in (keys, queries))
    # (B, M chunks, H, K steps, …)
    source, keys, queries = (t.unflatten(1, (-1, chunk)).transpose(2, 3) for t in (source, keys, queries))
    total = decay.unflatten(1, (-1, chunk)).transpose(2, 3).cumsum(-1)
    above = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    # masked before exp: the unused half would overflow, and infinity times zero is no gradient
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(above, -torch.inf).exp()
    inside = (between * (queries @ keys.mT)) @ source
    # what a chunk adds to the state until its end, (B, M, H, P, S)
    adds = (source * (total[..., -1:] - total).exp().unsqueeze(-1)).mT @ keys
    fades = total[..., -1].exp()
    entries = []
    for fade, add in zip(fades.unbind(1), adds.unbind(1)):
        entries.append(state)
        state = fade[..., None, None] * state + add
    carried = (queries * total.exp().unsqueeze(-1)) @ torch.stack(entries, 1).mT
    return (inside + carried).transpose(2, 3).flatten(1, 2)[:, :length], state


# -- S4D -------------------------------------------------------------------------------------------------------------


def lti_scan(u: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor, D: Tensor | None = None) -> Tensor:
    """The scan without selection: Δ, B and C are the same at every step, so y is a causal convolution of u.

    ``y_t = Σ_k κ_k u_{t−k} + D u_t`` with ``κ_k = Σ_s C_s exp(Δ A_s)^k b_s`` and ``b_s = expm1(Δ A_s)/A_s · B_s``
    (zero-order hold), by Fourier transform in O(L log L). A complex A_s stands for itself and its conjugate, so that
    ``κ_k = 2 Re Σ_s …``.

    >>> one = torch.ones(1, 1)
    >>> y = lti_scan(torch.ones(1, 3, 1), torch.ones(1), torch.zeros(1, 1), one, one)
    >>> [round(v, 4) for v in y.flatten().tolist()]
    [1.0, 2.0, 3.0]

    Args:
        u: (B, L, E).
        delta: Δ (E,), positive.
        A: (E, S), real or complex, the real part not positive.
        Bm: (E, S), complex at most where A is.
        Cm: (E, S), likewise.
        D: (E,) or None.

    Returns: (B, L, E) in the dtype of u; computed in float32, in float64 if an input is.

    Raises: BadInput if shapes do not match, or Bm or Cm is complex beside a real A.
    Paper: On the Parameterization and Initialization of Diagonal State Space Models (S4D), arXiv:2206.11893.
    Departs from the paper: nothing; a real A is its S4D-Real.
    """
    if u.ndim != 3 or A.ndim != 2 or u.shape[1] < 1:
        raise BadInput(f"lti_scan takes u (B, L, E) and A (E, S); it got {_shape(u)} and {_shape(A)}.")
    channels, states = u.shape[2], A.shape[1]
    square = (channels, states)
    _require_shapes(
        {"delta": (delta, (channels,)), "A": (A, square), "Bm": (Bm, square), "Cm": (Cm, square), "D": (D, (channels,))}
    )
    if not A.is_complex() and (Bm.is_complex() or Cm.is_complex()):
        raise BadInput("lti_scan: Bm and Cm are complex and A is not; make A complex too, A.to(torch.complex64).")
    with torch.autocast(u.device.type, enabled=False):
        dtype = torch.promote_types(torch.float32, torch.promote_types(u.dtype, A.real.dtype))
        inside = torch.promote_types(dtype, A.dtype)
        x, step = u.to(dtype), delta.unsqueeze(-1).to(dtype)
        A, Bm, Cm = (t.to(inside) for t in (A, Bm, Cm))
        length = x.shape[1]
        exponent = step * A
        weight = Cm * step * ratio(exponent) * Bm
        times = torch.arange(length, device=x.device, dtype=dtype)
        kernel = ((exponent.unsqueeze(-1) * times).exp() * weight.unsqueeze(-1)).sum(1)
        if kernel.is_complex():
            kernel = 2 * kernel.real
        # twice the length, so that nothing wraps around
        product = torch.fft.rfft(x.mT, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        y = torch.fft.irfft(product, n=2 * length)[..., :length].mT
        return (y if D is None else y + D.to(dtype) * x).to(u.dtype)

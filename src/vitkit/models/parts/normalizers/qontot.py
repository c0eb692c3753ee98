"""Doubly stochastic attention from a simulated parametric quantum circuit."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitkit.errors import BadInput
from vitkit.models.parts.normalizers.masking import full_precision, refuse_forbidden, refuse_mask
from vitkit.models.spec import NeedsFixedGrid, PartSpec

# M matrices (batch·heads) · L layers · q qubits · T tokens = 2^n · a ancillas · dimension 2^q with q = n + a

MODES = ("static", "mixed", "differentiable")
# sd of gain·S: angles far below π, where the circuit is smooth in S
_TARGET_SPREAD = 0.3
# matrices kept from a batch for the gradient-free steps of mode "mixed"
_HELD_IN = 64
# adjacent gates are multiplied into one matrix up to this size: fewer passes over the state
_MAX_BLOCK = 8


class QontOT(nn.Module):
    """Attention weights read off a quantum circuit: |U|² of any unitary U is doubly stochastic, exactly.

    A circuit of q = n + a qubits (n data qubits for T = 2ⁿ tokens, a ancillas) has L layers. Layer l turns every qubit
    by RY then RZ and then applies CNOTs (first qubit controls) on the pairs (0,1),(2,3)… for even l and (1,2),(3,4)…
    for odd l. The angles multiply parameters by scores: gate number g = (l·q + qubit)·2 + (0 for RY, 1 for RZ) turns by
    ``θ_g · gain · S_{g mod T²}``, with S in row-major order. Then, with i, j data and k, k' ancilla states,

        ``P_ij = 2^{−a} Σ_{k,k'} |U_{(i,k),(j,k')}|²``.

    Qubit 0 is the most significant bit; the ancillas are the last a qubits. The simulation is exact (a state vector for
    every basis state) and differentiable in S. With S = 0 the circuit is a fixed permutation.

    Args:
        num_tokens: T = P+N, a power of two: there is no such circuit for another number, and a doubly stochastic
            matrix that is cropped is none any more.
        ancillas: a ≥ 0. The activations grow with 4^{n+a}; 1 suits a laptop, 4 is the paper's.
        layers: L, with 2·L·(n+a) ≥ T² so that every score is used. None: 16, or as many as that needs.
        mode: "static": θ stays as seeded (queries and keys still learn, through S). "differentiable": θ is trained
            by gradient descent. "mixed": θ is changed by gradient-free steps in every ``on_epoch``.
        gain: factor on S (no unit). None: chosen at the first batch so that sd(gain·S) = 0.3, then fixed and saved in
            the state dict. Angles θ·S of several radians make P a chaotic, nearly uniform function of S.
        shots: estimate every column of P from this many measurements, as hardware would, in evaluation too (drawn
            from torch's generator); gradients pass straight through. Columns still sum to 1, rows only on average.
            None: exact.
        seed: of θ, uniform in [−π, π].
        steps: gradient-free steps an epoch in mode "mixed".
        recompute: keep only every √L-th state for the backward pass and compute the others again.

    Shape: scores (B, H, T, T) → (B, H, T, T), same dtype; computed in complex64, or complex128 for float64 scores.
    Raises: BadInput if T is not a power of two, there are too few layers, an option is out of range, or a mask
        or a score of -inf is given; NeedsFixedGrid if the scores have another size than T×T.
    Paper: Born et al., Quantum Doubly Stochastic Transformers, arXiv:2504.16275.
    Departs from the paper: gate layout and the order of scores over the gates are ours, as is the gain. In mode
    "mixed" a part does not see the task's loss, so its steps reduce the loss's first-order change on the last batch of
    the epoch, ⟨∂loss/∂P, P(θ)⟩; ``tune`` takes the true loss. The RZ angles of the last layer only turn phases and
    have no effect. Pool by class token or by flattening, never by the mean (see ``Sinkhorn``).
    """

    slot = "normalizer"
    preserves = "none"
    onnx_note = "its gates are complex, and the exporter has few complex operators (aten.expand is the first it lacks)"
    theta: Tensor
    gain: Tensor
    entry: Tensor

    def __init__(
        self,
        num_tokens: int,
        ancillas: int = 1,
        layers: int | None = None,
        mode: str = "static",
        gain: float | None = None,
        shots: int | None = None,
        seed: int = 0,
        steps: int = 200,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        if num_tokens < 2 or num_tokens & (num_tokens - 1):
            raise BadInput(f"QontOT needs a power of two as the number of tokens, not {num_tokens}. " + _advice())
        _check_options(ancillas, mode, gain, shots, steps)
        self.num_tokens, self.ancillas = num_tokens, ancillas
        self.num_qubits = num_tokens.bit_length() - 1 + ancillas
        needed = -(-(num_tokens**2) // (2 * self.num_qubits))
        self.layers = max(16, needed) if layers is None else layers
        if self.layers < needed:
            raise BadInput(
                f"layers={layers} give {2 * self.layers * self.num_qubits} gates, fewer than the {num_tokens**2} "
                f"scores of {num_tokens} tokens, so some would be ignored. Use layers={needed} or more."
            )
        self.mode, self.shots, self.steps, self.recompute = mode, shots, steps, recompute
        generator = torch.Generator().manual_seed(seed)
        theta = (2 * torch.rand(self.layers, self.num_qubits, 2, generator=generator) - 1) * math.pi
        if mode == "differentiable":
            self.theta = nn.Parameter(theta)
        else:
            self.register_buffer("theta", theta)
        # 0 stands for "not chosen yet"
        self.register_buffer("gain", torch.tensor(0.0 if gain is None else float(gain)))
        entry = torch.arange(self.layers * self.num_qubits * 2) % num_tokens**2
        self.register_buffer("entry", entry, persistent=False)
        self._held: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        ancillas: int = 1,
        layers: int | None = None,
        mode: str = "static",
        gain: float | None = None,
        shots: int | None = None,
        seed: int = 0,
        steps: int = 200,
        recompute: bool = True,
    ) -> QontOT:
        """Nothing can be taken over from a softmax, so ``warm`` changes nothing; every block has its own θ."""
        if spec.num_tokens < 2 or spec.num_tokens & (spec.num_tokens - 1):
            raise BadInput(
                f"QontOT needs a power of two as the number of tokens, but this model has {spec.num_prefix} prefix + "
                f"{spec.num_patches} patch tokens = {spec.num_tokens}. {_advice(spec)}"
            )
        depth_seed = seed + 1009 * (spec.depth or 0)
        return cls(spec.num_tokens, ancillas, layers, mode, gain, shots, depth_seed, steps, recompute)

    def forward(self, scores: Tensor, mask: Tensor | None = None) -> Tensor:
        refuse_mask(mask, "QontOT")
        if scores.shape[-1] != self.num_tokens or scores.shape[-2] != self.num_tokens:
            raise NeedsFixedGrid(
                f"This QontOT circuit is built for {self.num_tokens} tokens but was given scores of "
                f"{scores.shape[-2]}×{scores.shape[-1]}. Tokens were merged, dropped or added before it, or the image "
                "size changed; swap the part in again for the new size."
            )
        refuse_forbidden(scores, "QontOT")
        s = full_precision(scores)
        weights = self.weights(s * self._gain_for(s).to(s.dtype), self.theta)
        if self._records(weights):
            held = s.detach().flatten(0, -3)[:_HELD_IN]
            weights.register_hook(lambda grad: self._hold(held, grad))
        if self.shots is not None:
            weights = weights + (self._measure(weights.detach()) - weights).detach()
        return weights.to(scores.dtype)

    def weights(self, s: Tensor, theta: Tensor) -> Tensor:
        """P of the circuit with parameters ``theta`` (L, q, 2) for scores (…, T, T) to which the gain was applied."""
        flat = s.reshape(-1, self.num_tokens**2)
        angles = flat[:, self.entry] * theta.to(s.dtype).flatten()
        unitary = circuit_unitary(angles.reshape(-1, self.layers, self.num_qubits, 2), self.recompute)
        power = torch.view_as_real(unitary).square().sum(-1)
        split = (self.num_tokens, 2**self.ancillas)
        power = power.unflatten(-1, split).unflatten(-3, split).sum((-3, -1))
        return (power / 2**self.ancillas).reshape(s.shape)

    def _gain_for(self, s: Tensor) -> Tensor:
        """The gain, chosen at the first batch. No branch on data: the graph stays whole and the GPU is not awaited."""
        if not s.numel():
            return torch.ones_like(self.gain)
        with torch.no_grad():
            spread = s.float().std(correction=0)
            # equal scores (a dry run on zeros, say) tell nothing about the spread to come, an overflow even less
            known = (self.gain != 0) | ~(spread.isfinite() & (spread >= 1e-6))
            gain = torch.where(known, self.gain, (_TARGET_SPREAD / spread.clamp(min=1e-6)).to(self.gain.dtype))
            self.gain.copy_(gain)
            return torch.where(gain == 0, torch.ones_like(gain), gain)

    def _measure(self, weights: Tensor) -> Tensor:
        """Counts of ``shots`` measurements for every input state j, as shares: a noisy column of P."""
        columns = weights.mT.reshape(-1, self.num_tokens).clamp(min=0)
        shots = self.shots or 1
        drawn = torch.multinomial(columns, shots, replacement=True)
        counts = torch.zeros_like(columns).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=columns.dtype))
        return (counts / shots).reshape(weights.shape).mT

    # -- gradient-free training of θ -----------------------------------------------------------------------------

    def on_epoch(self, epoch: int, total: int) -> None:
        """Mode "mixed": ``steps`` gradient-free steps on the batch held in; nothing in the other modes.

        Args:
            epoch: epochs done so far, the seed of the directions.
            total: epochs planned; not used, since the number of steps is the same every time.
        """
        if self.mode != "mixed" or self._held is None:
            return
        scores, grad = self._held
        self._held = None
        s = scores * self.gain.to(scores.dtype)
        with torch.no_grad():
            self.tune(lambda: float((grad * self.weights(s, self.theta)).sum()), seed=epoch)

    @torch.no_grad()
    def tune(
        self, loss: Callable[[], float], steps: int | None = None, size: float = 0.05, seed: int = 0
    ) -> tuple[float, float]:
        """Change θ without gradients so that ``loss()`` falls, by simultaneous perturbation (SPSA).

        Each step evaluates the loss at θ ± cΔ for a random sign vector Δ and moves against the slope between them; the
        best θ met is kept, so the loss never ends higher than it began.

        Args:
            loss: evaluates the loss with the θ that this module holds at the moment of the call.
            steps: pairs of evaluations; None: the ``steps`` of the module.
            size: first length of a step and of a perturbation, radians; both shrink as SPSA prescribes.
            seed: of the directions.

        Returns: the loss before and after.
        """
        generator = torch.Generator().manual_seed(seed)
        theta = self.theta
        now = theta.detach().clone()
        start = best = float(loss())
        kept = now.clone()
        slope_scale = 0.0
        for step in range(self.steps if steps is None else steps):
            # 0.602 and 0.101: Spall's exponents for the two sequences
            reach = size / (step + 1) ** 0.101
            delta = (2 * torch.randint(0, 2, now.shape, generator=generator) - 1).to(now)
            found = []
            for sign in (1, -1):
                theta.copy_(now + sign * reach * delta)
                found.append(float(loss()))
                if found[-1] < best:
                    best, kept = found[-1], theta.detach().clone()
            slope = (found[0] - found[1]) / (2 * reach)
            slope_scale = max(abs(slope), 0.9 * slope_scale)
            if slope_scale > 0:
                # divided by the recent slopes: the unit of the loss must not set the length of the step
                now = now - size * (10 / (step + 10)) ** 0.602 * (slope / slope_scale) * delta
        theta.copy_(kept)
        return start, best

    def _records(self, weights: Tensor) -> bool:
        return self.mode == "mixed" and self.training and weights.requires_grad

    def _hold(self, scores: Tensor, grad: Tensor) -> None:
        self._held = (scores, grad.detach().flatten(0, -3)[:_HELD_IN])

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, ancillas={self.ancillas}, layers={self.layers}, mode={self.mode!r}"


def circuit_unitary(angles: Tensor, recompute: bool = False) -> Tensor:
    """The unitary (M, 2^q, 2^q) of the circuit for angles (M, L, q, 2), the last axis (RY, RZ); column j is U|j⟩.

    Args:
        angles: radians; float64 gives complex128.
        recompute: keep only every √L-th state for the backward pass.
    """
    layers, qubits = angles.shape[1], angles.shape[2]
    dtype = torch.complex128 if angles.dtype == torch.float64 else torch.complex64
    state = torch.eye(2**qubits, dtype=dtype, device=angles.device).expand(angles.shape[0], -1, -1)
    stride = math.isqrt(layers - 1) + 1 if recompute else layers
    for first in range(0, layers, stride):
        part = angles[:, first : first + stride]
        if recompute and torch.is_grad_enabled() and angles.requires_grad:
            state = checkpoint(_run_layers, state, part, first, use_reentrant=False, preserve_rng_state=False)
        else:
            state = _run_layers(state, part, first)
    return state


def _run_layers(state: Tensor, angles: Tensor, first: int) -> Tensor:
    """Layers ``first``, ``first + 1`` … with angles (M, L', q, 2) on the columns of ``state`` (M, 2^q, 2^q)."""
    gates = _rotations(angles)
    for index in range(angles.shape[1]):
        left = 1
        for block in _blocks(gates[:, index], odd=(first + index) % 2 == 1):
            size = block.shape[-1]
            view = state.reshape(state.shape[0], left, size, state.shape[1] * state.shape[2] // (left * size))
            state = (block.unsqueeze(1) @ view).reshape(state.shape)
            left *= size
    return state


def _rotations(angles: Tensor) -> Tensor:
    """RZ(z)·RY(y) for angles (…, 2): (…, 2, 2) complex."""
    y, z = (angles / 2).unbind(-1)
    turn, cos, sin = torch.complex(z.cos(), z.sin()), y.cos(), y.sin()
    top = torch.stack([turn.conj() * cos, -turn.conj() * sin], -1)
    return torch.stack([top, torch.stack([turn * sin, turn * cos], -1)], -2)


def _blocks(gates: Tensor, odd: bool) -> list[Tensor]:
    """One layer as matrices on adjacent groups of qubits, from the most significant: gates (M, q, 2, 2)."""
    qubits = gates.shape[1]
    units = [gates[:, 0]] if odd else []
    for q in range(int(odd), qubits, 2):
        if q + 1 == qubits:
            units.append(gates[:, q])
            continue
        pair = _kron(gates[:, q], gates[:, q + 1])
        # CNOT after the rotations: rows |10⟩ and |11⟩ change places
        units.append(torch.cat([pair[:, :2], pair[:, 2:].flip(1)], dim=1))
    blocks = units[:1]
    for unit in units[1:]:
        if blocks[-1].shape[-1] * unit.shape[-1] <= _MAX_BLOCK:
            blocks[-1] = _kron(blocks[-1], unit)
        else:
            blocks.append(unit)
    return blocks


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """Kronecker product of batches (M, r, r) and (M, s, s)."""
    r, s = a.shape[-1], b.shape[-1]
    # as a matrix product: the backward of a broadcast product sums complex numbers, three times slower
    outer = a.reshape(-1, r * r, 1) @ b.reshape(-1, 1, s * s)
    return outer.reshape(-1, r, r, s, s).transpose(2, 3).reshape(-1, r * s, r * s)


def _advice(spec: PartSpec | None = None) -> str:
    if spec is None:
        return "Choose a tokenizer with 2, 4, 8, 16, 32 … tokens, the class token counted."
    prefix = spec.num_prefix
    counts = [2**m - prefix for m in range(1, 11) if 2**m > prefix]
    below = [c for c in counts if c < spec.num_patches][-1:]
    fitting = [*below, *[c for c in counts if c > spec.num_patches][:1]]
    words = " or ".join(str(c) for c in fitting)
    hint = f"With {prefix} prefix tokens it works for {words} patch tokens: change patch size, image size or tokenizer"
    hint += " (`row-stripes` makes any number)"
    if prefix != 0 and not spec.num_patches & (spec.num_patches - 1):
        hint += f"; or keep the {spec.num_patches} patches and drop the prefix tokens"
    return hint + ". Pad tokens, never the matrix."


def _check_options(ancillas: int, mode: str, gain: float | None, shots: int | None, steps: int) -> None:
    if ancillas < 0:
        raise BadInput(f"ancillas={ancillas} of QontOT must be 0 or more; 1 suits a laptop, 4 is the paper's.")
    if mode not in MODES:
        raise BadInput(f"mode={mode!r} of QontOT is unknown; use one of {', '.join(map(repr, MODES))}.")
    if gain is not None and not gain > 0:
        raise BadInput(f"gain={gain} of QontOT must be positive, or None to choose it from the first batch.")
    if shots is not None and shots < 1:
        raise BadInput(f"shots={shots} of QontOT must be at least 1, or None for the exact matrix.")
    if steps < 0:
        raise BadInput(f"steps={steps} of QontOT must not be negative.")

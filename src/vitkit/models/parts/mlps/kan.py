"""Kolmogorov–Arnold layers: a learned one-dimensional function on every edge, as splines or as wavelets."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vitkit.errors import BadInput
from vitkit.models.constant import Constant
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec

DEGREE = 3
WAVELETS = ("dog", "mexican_hat", "morlet", "shannon", "meyer")
# the wavelet layer forms (tokens, out, in); larger buffers than this are cut along out and recomputed in backward
BUFFER_BYTES = 64 * 2**20
# on a CPU what leaves the cache costs ten times the arithmetic
CPU_BUFFER_BYTES = 2**20
# places per input that a grid update keeps the functions at
_MAX_PLACES = 512


class KAN(nn.Module):
    """The MLP of a block (or a linear head) as Kolmogorov–Arnold layers.

    ``KAN(D→H)`` then ``KAN(H→D)``, no activation between them: the edges are the nonlinearity. In the slot ``head``
    it is one layer D→K. See :class:`SplineLinear` and :class:`WaveletLinear` for the equations.

    Args:
        kind: "spline" (Eff-KAN) or "wavelet" (Wav-KAN).
        psi: mother wavelet: "dog" (default, the paper's best), "mexican_hat", "morlet", "shannon" or "meyer".
        match: "params": the hidden width that gives the old module's number of parameters; "width": its width.
        grid_size: G intervals of the splines. Default 5.
        grid_range: of the splines. Default (−3, 3): a LayerNorm leaves 0.3 % of its outputs outside, against 32 %
            outside (−1, 1), where only the base path works.
        reg_weight: weight of the L1 + entropy regulariser of the splines, added as an auxiliary loss. Default 0.
        adapt_epochs: number of epochs, from the second on, before which the knots of the splines move to the inputs of
            the last batch (:meth:`SplineLinear.update_grid`); for training loops that call ``on_epoch``. Default 0.

    Shape: (B, P+N, D) → (B, P+N, D); as a head (B, D) → (B, K).

    Raises: ValueError for unknown kinds or wavelets, a grid below 1 interval, a module it cannot replace, or options
        of splines (``reg_weight``, ``adapt_epochs``) for wavelets or in the head, which has no block to carry them.

    Paper: Hyb-KAN ViT, arXiv:2505.04740. Hybrid-1 is ``mlp=kan:kind=wavelet+head=kan:kind=spline``, Hybrid-2 the other
    way round.

    Departs from the paper: it is known by its abstract only; parameter-matched widths and the grid range are ours, the
    layers follow the published efficient-KAN and Wav-KAN formulations. Nothing of an MLP's weights can be taken over.
    """

    slot = "mlp"
    preserves = "none"
    takes_layout = True

    def __init__(
        self, layers: list[nn.Module], reg_weight: float = 0.0, depth: int | None = None, adapt_epochs: int = 0
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.reg_weight, self.depth_index, self.adapt_epochs = reg_weight, depth, adapt_epochs
        self._inputs: list[Tensor] = []

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        kind: Literal["spline", "wavelet"] = "spline",
        psi: str = "dog",
        match: Literal["params", "width"] = "params",
        grid_size: int = 5,
        grid_range: tuple[float, float] = (-3.0, 3.0),
        reg_weight: float = 0.0,
        adapt_epochs: int = 0,
    ) -> nn.Module:
        if kind not in ("spline", "wavelet"):
            raise ValueError(f"kind={kind!r} is not known; use 'spline' or 'wavelet'.")
        if match not in ("params", "width"):
            raise ValueError(f"match={match!r} is not known; use 'params' or 'width'.")
        if reg_weight < 0 or adapt_epochs < 0:
            raise ValueError(f"reg_weight={reg_weight} and adapt_epochs={adapt_epochs} must not be negative.")
        if (reg_weight or adapt_epochs) and (kind == "wavelet" or isinstance(old, nn.Linear)):
            raise ValueError(
                f"reg_weight={reg_weight} and adapt_epochs={adapt_epochs} are for splines in the slot mlp; leave them "
                "out for wavelets and in the head."
            )

        def layer(a: int, b: int) -> nn.Module:
            if kind == "spline":
                return SplineLinear(a, b, grid_size, (float(grid_range[0]), float(grid_range[1])))
            return WaveletLinear(a, b, psi)

        if isinstance(old, nn.Linear):
            return layer(old.in_features, old.out_features)
        if not hasattr(old, "fc2"):
            raise ValueError(
                f"KAN replaces an MLP with fc1 and fc2, or a linear head, but found {type(old).__name__}; put it in "
                "before other parts of this slot."
            )
        hidden = round(spec.mlp_ratio * spec.dim)
        if match == "params":
            budget = sum(p.numel() for p in old.parameters())  # type: ignore[union-attr]
            per_edge = grid_size + DEGREE + 2 if kind == "spline" else 3
            hidden = max(1, round(budget / (2 * spec.dim * per_edge)))
        return cls([layer(spec.dim, hidden), layer(hidden, spec.dim)], reg_weight, spec.depth, adapt_epochs)

    def forward(self, x: Tensor, layout: TokenLayout) -> Tensor:
        keep = None
        if layout.valid is not None:
            keep = F.pad(layout.valid, (layout.num_prefix, 0), value=True)
        inputs: list[Tensor] = []
        for layer in self.layers:
            inputs.append(x)
            x = layer(x, keep) if isinstance(layer, WaveletLinear) else layer(x)
        if self.training and self.adapt_epochs:
            self._inputs = [(i if keep is None else i[keep]).detach() for i in inputs]
        if self.training and self.reg_weight > 0:
            terms = [m.regularizer() for m in self.layers if isinstance(m, SplineLinear)]
            if terms:
                layout.aux["kan", self.depth_index or 0] = self.reg_weight * sum(terms)  # type: ignore[assignment]
        return x

    def on_epoch(self, epoch: int, total: int) -> None:
        """Move the grids to the inputs of the last batch, before epochs 1 … ``adapt_epochs`` (epochs count from 0)."""
        inputs, self._inputs = self._inputs, []
        if not 1 <= epoch <= self.adapt_epochs:
            return
        for layer, x in zip(self.layers, inputs):
            if isinstance(layer, SplineLinear):
                layer.update_grid(_of_first_process(x))


def _of_first_process(x: Tensor) -> Tensor:
    """Rows every process of a distributed training agrees on: the fits of all must stay the same."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    rows = x.reshape(-1, x.shape[-1])[:_MAX_PLACES].contiguous()
    torch.distributed.broadcast(rows, 0)
    return rows


@torch.no_grad()
def report_outside(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Share of the inputs of every spline layer that lie outside its grid, where only the base path works.

    Args:
        model: any model with :class:`SplineLinear` layers; left as found.
        images: (B, C, H, W).

    Returns: ``{"blocks.3.mlp.layers.0": 0.003, …}``.

    Raises: BadInput if there is no such layer.
    """
    from vitkit.anatomy import linear_inputs, untouched

    layers = {name: module for name, module in model.named_modules() if isinstance(module, SplineLinear)}
    if not layers:
        raise BadInput(f"{type(model).__name__} has no spline layers; put them in with swap(model, 'mlp', 'kan').")
    shares: dict[str, float] = {}

    def record(name: str, x: Tensor) -> None:
        shares[name] = layers[name].fraction_outside(x)

    with untouched(model), linear_inputs(model, layers, record):
        model(images)
    return shares


# -- splines ---------------------------------------------------------------------------------------------------------


def bspline_basis(x: Tensor, knots: Tensor, degree: int = DEGREE) -> Tensor:
    """Cox–de Boor: values of all B-splines.

    Args:
        x: (…, I).
        knots: (I, G+2·degree+1), not falling; where some coincide, 0/0 counts as 0.
        degree: of the splines.

    Returns: (…, I, G+degree); the bases sum to 1 inside the grid and are 0 beyond the outermost knots.
    """
    away = x.unsqueeze(-1) - knots
    passed = (away >= 0).to(x.dtype)
    basis = passed[..., :-1] - passed[..., 1:]
    for k in range(1, degree + 1):
        width = knots[:, k:] - knots[:, :-k]
        share = basis * torch.where(width > 0, 1 / width, 0.0)
        basis = away[..., : -(k + 1)] * share[..., :-1] - away[..., k + 1 :] * share[..., 1:]
    return basis


class SplineLinear(nn.Module):
    """``y_o = Σ_i [ w_oi SiLU(x_i) + s_oi Σ_k c_oik B_k(x_i) ]`` with cubic B-splines B_k.

    Args:
        in_features: I.
        out_features: O.
        grid_size: G intervals on ``grid_range``; 3 more knots on each side give G+3 bases.
        grid_range: where the splines live; beyond it only the base path works.
        noise: the splines start as least-squares fits of uniform noise of ±noise/(2G).

    Shape: (…, I) → (…, O). Bases are computed in float32 or wider.
    """

    knots: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        grid_size: int = 5,
        grid_range: tuple[float, float] = (-1.0, 1.0),
        noise: float = 0.1,
    ) -> None:
        super().__init__()
        low, high = grid_range
        if grid_size < 1 or not low < high:
            raise ValueError(f"grid_size={grid_size} must be at least 1 and grid_range={grid_range} rising.")
        self.in_features, self.out_features, self.grid_size = in_features, out_features, grid_size
        step = (high - low) / grid_size
        knots = low + step * torch.arange(-DEGREE, grid_size + DEGREE + 1, dtype=torch.float32)
        self.register_buffer("knots", knots.repeat(in_features, 1))
        self.base_weight = nn.Parameter(torch.empty(out_features, in_features))
        self.spline_weight = nn.Parameter(torch.empty(out_features, in_features, grid_size + DEGREE))
        self.spline_scale = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.spline_scale, a=math.sqrt(5))
        places = torch.linspace(low, high - 1e-4 * step, grid_size + 1).unsqueeze(1).expand(-1, in_features)
        values = (torch.rand(grid_size + 1, in_features, out_features) - 0.5) * noise / grid_size
        with torch.no_grad():
            self.spline_weight.copy_(self._fit(places, values).permute(2, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(F.silu(x), self.base_weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        bases = bspline_basis(x.to(wide), self.knots.to(wide)).flatten(-2).to(base.dtype)
        weight = (self.spline_weight * self.spline_scale.unsqueeze(-1)).flatten(1)
        return base + F.linear(bases, weight.to(base.dtype))

    def _fit(self, x: Tensor, y: Tensor) -> Tensor:
        """Coefficients (I, G+3, O), float64, of the least-squares splines through x (M, I), y (M, I, O)."""
        bases = bspline_basis(x.double(), self.knots.double()).transpose(0, 1)
        # gelsd copes with data that leave some bases untouched: those get the smallest coefficients
        return torch.linalg.lstsq(bases.cpu(), y.double().transpose(0, 1).cpu(), driver="gelsd").solution.to(x.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SplineLinear:
        exact = self.knots
        super()._apply(fn, recurse)
        # neighbours may lie closer than half precision can tell apart
        if self.knots.dtype in (torch.bfloat16, torch.float16) and not exact.is_meta:
            self.knots = exact.to(self.knots.device)
        return self

    def splines(self, x: Tensor) -> Tensor:
        """The functions on the edges without their scales: x (M, I) → (M, I, O)."""
        bases = bspline_basis(x.double(), self.knots.double())
        return torch.einsum("mik,oik->mio", bases, self.spline_weight.double())

    @torch.no_grad()
    def update_grid(self, x: Tensor, margin: float = 0.01, eps: float = 0.02) -> float:
        """Move the knots to where the data are and refit, so that the functions are kept there.

        An input that hardly varies (by less than 1e-3 of its size and of its grid) keeps its knots.

        Args:
            x: (…, I) inputs of this layer; parts of them outside the old grid are not kept, the old splines were
                zero there. Of many rows, evenly spaced ranks are used.
            margin: the new grid reaches beyond the data by this share of their range.
            eps: share of uniform knots, the rest follow the quantiles; neighbours stay 1e-3 of the range apart.

        Returns: the largest change of a function at the data, relative to its largest value there.

        Raises: ValueError if there is no row, or one that is not finite.
        """
        data = x.detach().reshape(-1, self.in_features).double().sort(dim=0).values
        if not len(data) or not bool(torch.isfinite(data).all()):
            raise ValueError(f"update_grid got {len(data)} rows; it needs at least one, all of them finite.")
        if len(data) > _MAX_PLACES:
            data = data[torch.linspace(0, len(data) - 1, _MAX_PLACES, device=data.device).round().long()]
        low, high = data[0], data[-1]
        first, last = self.knots[:, DEGREE].double(), self.knots[:, -DEGREE - 1].double()
        still = high - low <= 1e-3 * torch.maximum(data.abs().amax(0), last - first)
        spread = torch.where(still, 1.0, high - low)
        places = torch.linspace(0, len(data) - 1, self.grid_size + 1, device=data.device).round().long()
        adaptive = data[places].T
        low, high = low - margin * spread, high + margin * spread
        steps = torch.linspace(0, 1, self.grid_size + 1, device=data.device, dtype=torch.float64)
        uniform = low.unsqueeze(1) + (high - low).unsqueeze(1) * steps
        inner = eps * uniform + (1 - eps) * adaptive
        inner[:, 0], inner[:, -1] = low, high
        gaps = inner.diff(dim=1).maximum(1e-3 * spread.unsqueeze(1))
        # widened gaps push the last knot outwards; scaled back, all keep their order and their least distance nearly
        gaps = gaps * ((high - low) / gaps.sum(1)).unsqueeze(1)
        inner = torch.cat([low.unsqueeze(1), low.unsqueeze(1) + gaps.cumsum(1)], dim=1)
        outer = ((high - low) / self.grid_size).unsqueeze(1) * torch.arange(1, DEGREE + 1, device=data.device)
        knots = torch.cat([low.unsqueeze(1) - outer.flip(1), inner, high.unsqueeze(1) + outer], dim=1)
        knots = torch.where(still.unsqueeze(1), self.knots.double(), knots)
        # besides the data, even places between them: the function is kept over their whole range
        steps = torch.linspace(0, 1, 8 * (self.grid_size + DEGREE), device=data.device, dtype=torch.float64)
        even = data[0] + (data[-1] - data[0]) * steps.unsqueeze(1)
        support = torch.cat([data, even]).clamp(first, last - 1e-9 * (last - first))
        before = self.splines(support)
        self.knots.copy_(knots)
        fitted = self._fit(support, before).permute(2, 0, 1).to(self.spline_weight.dtype)
        self.spline_weight.copy_(torch.where(still.unsqueeze(1), self.spline_weight, fitted))
        change = (self.splines(support) - before).abs().amax()
        return float(change / before.abs().amax().clamp(min=1e-12))

    def regularizer(self) -> Tensor:
        """L1 of the edges' mean |c| plus the entropy of its distribution over edges."""
        size = self.spline_weight.abs().mean(-1)
        total = size.sum()
        share = size / total.clamp(min=1e-12)
        return total - (share * share.clamp(min=1e-12).log()).sum()

    def fraction_outside(self, x: Tensor) -> float:
        """Share of the inputs (…, I) that lie outside the grid, where the splines cannot act."""
        low, high = self.knots[:, DEGREE], self.knots[:, -DEGREE - 1]
        return float(((x < low) | (x >= high)).float().mean())


# -- wavelets --------------------------------------------------------------------------------------------------------


def mother_wavelet(name: str, x: Tensor, table: Tensor | None = None) -> Tensor:
    """ψ(x), elementwise: "dog" −x e^{−x²/2}, "mexican_hat", "morlet", "shannon" or "meyer"; all have mean zero.

    Args:
        name: one of :data:`WAVELETS`.
        x: any shape.
        table: :func:`meyer_table` where it is at hand; only "meyer" looks at it.
    """
    if name == "dog":
        return -x * torch.exp(-x.square() / 2)
    if name == "mexican_hat":
        return 2 / (math.sqrt(3) * math.pi**0.25) * (1 - x.square()) * torch.exp(-x.square() / 2)
    if name == "morlet":
        return torch.cos(5 * x) * torch.exp(-x.square() / 2)
    if name == "shannon":
        # the window keeps it local; torch.sinc is sin(πx)/(πx)
        return (2 * torch.sinc(2 * x) - torch.sinc(x)) * torch.exp(-x.square() / 18)
    if name == "meyer":
        # a place among 5001 does not fit into half precision
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        table = meyer_table().to(wide) if table is None else table.to(wide.dtype)
        return _interpolate(table, wide, -12.0, 13.0).to(x.dtype)
    raise ValueError(f"psi={name!r} is not known; use one of {', '.join(WAVELETS)}.")


def _interpolate(table: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    place = (x - low) * ((len(table) - 1) / (high - low))
    inside = (place >= 0) & (place < len(table) - 1)
    place = place.clamp(0, len(table) - 2)
    index = place.detach().long()
    left, right = table[index], table[index + 1]
    return torch.where(inside, left + (right - left) * (place - index), torch.zeros_like(x))


def meyer_table() -> Tensor:
    """ψ at 5001 even places of [−12, 13], float64, by its Fourier definition: (1/π) ∫ m(ω) cos(ω(t − ½)) dω."""
    return torch.from_numpy(_meyer_values().copy())


# numbers, not tensors: a tensor made while a model is exported would be a fake one, and stay in the cache
@lru_cache(maxsize=1)
def _meyer_values(points: int = 5001) -> np.ndarray:
    omega = np.linspace(2 * math.pi / 3, 8 * math.pi / 3, 4001)

    def step(u: np.ndarray) -> np.ndarray:
        u = u.clip(0, 1)
        return u**4 * (35 - 84 * u + 70 * u**2 - 20 * u**3)

    rising = np.sin(math.pi / 2 * step(3 * omega / (2 * math.pi) - 1))
    falling = np.cos(math.pi / 2 * step(3 * omega / (4 * math.pi) - 1))
    band = np.where(omega < 4 * math.pi / 3, rising, falling)
    # trapezoidal weights
    band[[0, -1]] /= 2
    t = np.linspace(-12, 13, points)
    return np.cos((t[:, None] - 0.5) * omega) @ band * (omega[1] - omega[0]) / math.pi


class WaveletLinear(nn.Module):
    """``y_o = BN( Σ_i w_oi ψ((x_i − t_oi)/a_oi) )`` with a learned translation and scale on every edge.

    a = 0.01 + softplus(parameter) stays positive; t starts at 0, a at 1, w is Kaiming-uniform.

    Args:
        in_features: I.
        out_features: O.
        psi: mother wavelet, see :func:`mother_wavelet`.

    Shape: (…, I) → (…, O). Rows marked False in ``keep`` (…) do not enter the batch statistics. A single row has none,
    so in training it is normalised by the running ones.
    """

    def __init__(self, in_features: int, out_features: int, psi: str = "dog") -> None:
        super().__init__()
        if psi not in WAVELETS:
            raise ValueError(f"psi={psi!r} is not known; use one of {', '.join(WAVELETS)}.")
        self.in_features, self.out_features, self.psi = in_features, out_features, psi
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.translation = nn.Parameter(torch.zeros(out_features, in_features))
        self.raw_scale = nn.Parameter(torch.full((out_features, in_features), math.log(math.expm1(0.99))))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.norm = nn.BatchNorm1d(out_features)
        self.table = Constant(meyer_table, at_least=torch.float32) if psi == "meyer" else None

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        out = self._edges(rows)
        if len(rows) == 1 and type(self.norm) is nn.BatchNorm1d:
            norm = self.norm
            out = F.batch_norm(out, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        elif keep is None or not self.training:
            out = self.norm(out)
        else:
            kept = keep.reshape(-1)
            out = out.masked_scatter(kept.unsqueeze(1), self.norm(out[kept]))
        return out.reshape(*x.shape[:-1], self.out_features)

    def _edges(self, rows: Tensor) -> Tensor:
        scale = 0.01 + F.softplus(self.raw_scale)
        table = None if self.table is None else self.table.value
        per_out = max(1, rows.shape[0] * self.in_features * rows.element_size())
        # a compiler fuses the passes over the buffer, and would unroll many small ones
        in_cache = rows.device.type == "cpu" and not torch.compiler.is_compiling()
        chunk = max(1, min(self.out_features, (CPU_BUFFER_BYTES if in_cache else BUFFER_BYTES) // per_out))
        if chunk >= self.out_features:
            return _wave(rows, self.weight, self.translation, scale, self.psi, table)
        parts = zip(self.weight.split(chunk), self.translation.split(chunk), scale.split(chunk))
        run: Any = _wave
        if torch.is_grad_enabled():

            def run(*args: Any) -> Tensor:
                return checkpoint(_wave, *args, use_reentrant=False, preserve_rng_state=False)

        return torch.cat([run(rows, w, t, a, self.psi, table) for w, t, a in parts], dim=1)


def _wave(
    rows: Tensor, weight: Tensor, translation: Tensor, scale: Tensor, psi: str, table: Tensor | None = None
) -> Tensor:
    return (weight * mother_wavelet(psi, (rows.unsqueeze(1) - translation) / scale, table)).sum(-1)

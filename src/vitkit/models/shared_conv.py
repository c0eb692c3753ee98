"""Linear layers of tokens as convolutions whose kernels all tokens share, as an optical correlator computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.spec import NeedsFixedGrid

# B images · n tokens · c maps of a token · s side of a map · M kernels · k side of a kernel · s' side of what comes out

PADDINGS = ("valid", "same")
# convolutions of small maps are so much slower than matrix products that this many times the multiplications pay off
_WASTE = 16


@dataclass(eq=False)
class Optics:
    """How imperfect light and detector are; with the defaults nothing changes.

    Each of the three tensors a layer deals with is rounded to 2^b − 1 levels symmetric about zero, up to its largest
    magnitude, and gets Gaussian noise with a deviation of that share of the same magnitude. Rounding passes gradients
    on as they are.

    Args:
        input_bits, kernel_bits, detector_bits: b ≥ 2; None: exact.
        input_noise, kernel_noise, detector_noise: deviation over the largest magnitude.
        seed: of the noise.

    Raises: BadInput for fewer than 2 bits or negative noise.
    """

    input_bits: int | None = None
    kernel_bits: int | None = None
    detector_bits: int | None = None
    input_noise: float = 0.0
    kernel_noise: float = 0.0
    detector_noise: float = 0.0
    seed: int = 0
    _generator: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("input", "kernel", "detector"):
            bits, noise = getattr(self, f"{name}_bits"), getattr(self, f"{name}_noise")
            if bits is not None and bits < 2:
                raise BadInput(f"{name}_bits={bits} leaves no level besides zero; use at least 2, or None for exact.")
            if not noise >= 0:
                raise BadInput(f"{name}_noise={noise} must be 0 or more.")
        self._generator = torch.Generator().manual_seed(self.seed)

    def blur(self, x: Tensor, what: str) -> Tensor:
        """``x`` as the device has it; ``what`` is "input", "kernel" or "detector"."""
        bits, noise = getattr(self, f"{what}_bits"), getattr(self, f"{what}_noise")
        top = x.detach().abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
        if bits is not None:
            step = top / (2 ** (bits - 1) - 1)
            x = x + ((x / step).round() * step - x).detach()
        if noise:
            # drawn on the CPU, so that a seed means the same on every device
            x = x + noise * top * torch.randn(x.shape, generator=self._generator).to(x)
        return x


class SharedConv(nn.Module):
    """Convolves every token, laid out as c maps of s×s, with the same M kernels.

    ``y[i, m] = Σ_c x[i, c] ⋆ w[m, c] + b[m]`` for token i and kernel m, ⋆ the correlation. "valid" gives maps of side
    s' = s − k + 1, "same" (zeros around the map) of side s. A token is the concatenation of its flattened maps, before
    and after.

    With "valid" and k = s a kernel gives one number a token: the layer is ``nn.Linear(c·s², M)`` with the kernels as
    its rows. A smaller k is a banded (Toeplitz) matrix: each output sees k×k pixels of a map. No layer here moves
    anything from one token to another.

    Args:
        maps: c. side: s. kernels: M.
        kernel: k, 1 to s; None: s.
        padding: "valid" or "same".
        tokens: None: kernels are shared by all tokens, so the parameters do not depend on how many there are. A number
            n: each of n tokens has kernels of its own (a depthwise convolution).
        bias: add b.

    Shape: (B, n, c·s²) → (B, n, M·s'²).
    Raises: UnknownName for another padding; BadInput for a kernel larger than the map; NeedsFixedGrid if kernels are
        not shared and other than ``tokens`` tokens come.
    Paper: ConvShareViT, arXiv:2504.11517.
    """

    def __init__(
        self,
        maps: int,
        side: int,
        kernels: int,
        kernel: int | None = None,
        padding: str = "valid",
        tokens: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if padding not in PADDINGS:
            raise unknown("padding", padding, PADDINGS, "vitkit show conv-share")
        self.maps, self.side, self.kernels, self.padding, self.tokens = maps, side, kernels, padding, tokens
        self.kernel = side if kernel is None else kernel
        if not 1 <= self.kernel <= side:
            raise BadInput(f"kernel={kernel} must be 1 to {side}, the side of a token's map.")
        self.out_side = side if padding == "same" else side - self.kernel + 1
        self.in_features, self.out_features = maps * side**2, kernels * self.out_side**2
        own = () if tokens is None else (tokens,)
        self.weight = nn.Parameter(torch.empty(*own, kernels, maps, self.kernel, self.kernel))
        self.bias = nn.Parameter(torch.empty(*own, kernels)) if bias else None
        #: set by :func:`vitkit.models.diagnostics.optical4f.through_optics`
        self.optics: Optics | None = None
        self.reset_parameters()

    def reset_parameters(self, joint: int = 1) -> None:
        """Xavier-uniform kernels for the matrix that the convolution is, zero biases.

        Args:
            joint: layers on the same input that count as one, as q, k and v do in the fused layer of a ViT.
        """
        # how many outputs an input pixel takes part in: all of a full kernel's, at most k×k positions of a sliding one
        reach = min(self.kernel, self.out_side) ** 2
        bound = math.sqrt(6 / (self.maps * self.kernel**2 + joint * self.kernels * reach))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def take(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Copy weights (M, c·s²) and (M,) of a linear layer into full-size valid kernels; False if they do not fit."""
        if not (self.one_number_a_kernel and self.tokens is None):
            return False
        if weight.shape != (self.out_features, self.in_features):
            return False
        self.weight.copy_(weight.view_as(self.weight))
        if self.bias is not None:
            if bias is None:
                self.bias.zero_()
            else:
                self.bias.copy_(bias)
        return True

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The same map as a dense layer.

        Raises: BadInput if tokens have kernels of their own.
        """
        if self.tokens is not None:
            raise BadInput("Kernels of single tokens are no one linear layer; only shared kernels are.")
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None).to(self.weight)
        linear.weight.copy_(self._matrix(self.weight))
        if self.bias is not None:
            linear.bias.copy_(self.bias.repeat_interleave(self.out_side**2))
        return linear

    @property
    def one_number_a_kernel(self) -> bool:
        """True where a kernel meets a token at one place only, so that the layer is a matrix product."""
        return self.out_side == 1 and self.kernel == self.side

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is not None and x.shape[1] != self.tokens:
            raise NeedsFixedGrid(
                f"These kernels belong to {self.tokens} tokens one by one, but {x.shape[1]} came; use images of the "
                "size the part was built for, without token merging, or share=True."
            )
        optics = self.optics
        weight: Tensor = self.weight
        if optics is not None:
            x, weight = optics.blur(x, "input"), optics.blur(weight, "kernel")
        y = self._correlate(x, weight)
        return y if optics is None else optics.blur(y, "detector")

    def _correlate(self, x: Tensor, weight: Tensor) -> Tensor:
        batch, num_tokens = x.shape[:2]
        if self.one_number_a_kernel:
            if self.tokens is None:
                return F.linear(x, weight.flatten(1), self.bias)
            y = torch.einsum("bni,noi->bno", x, weight.flatten(2))
            return y if self.bias is None else y + self.bias
        if self.tokens is None and self.side**2 <= _WASTE * self.kernel**2:
            bias = None if self.bias is None else self.bias.repeat_interleave(self.out_side**2)
            return F.linear(x, self._matrix(weight), bias)
        maps = x.reshape(-1, self.maps if self.tokens is None else num_tokens * self.maps, self.side, self.side)
        bias = None if self.bias is None else self.bias.flatten()
        if self.tokens is None:
            y = F.conv2d(self._padded(maps), weight, bias)
        else:
            # with own kernels the tokens of an image are groups of one convolution
            y = F.conv2d(self._padded(maps), weight.flatten(0, 1), bias, groups=num_tokens)
        return y.reshape(batch, num_tokens, self.out_features)

    def _padded(self, maps: Tensor) -> Tensor:
        if self.padding == "valid":
            return maps
        before, after = (self.kernel - 1) // 2, self.kernel // 2
        return F.pad(maps, (before, after, before, after))

    def _matrix(self, weight: Tensor) -> Tensor:
        """(M·s'², c·s²): the banded matrix that shared kernels are."""
        # which pixel of the kernel meets row i of the map in output row r: the same for columns
        before = (self.kernel - 1) // 2 if self.padding == "same" else 0
        place = torch.arange(self.side, device=weight.device) + before
        offset = place - torch.arange(self.out_side, device=weight.device)[:, None]
        meets = (offset[..., None] == torch.arange(self.kernel, device=weight.device)).to(weight.dtype)
        rows = torch.einsum("mcab,ria->mcrib", weight, meets)
        return torch.einsum("mcrib,qjb->mrqcij", rows, meets).reshape(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        return (
            f"maps={self.maps}, side={self.side}, kernels={self.kernels}, kernel={self.kernel}, "
            f"padding={self.padding!r}, tokens={self.tokens}"
        )


class SharedChain(nn.Module):
    """Two :class:`SharedConv` with an activation between, where one small valid kernel does not give the width back.

    Shape: (B, n, in) → (B, n, out).
    """

    def __init__(self, first: SharedConv, last: SharedConv) -> None:
        super().__init__()
        self.first, self.act, self.last = first, nn.GELU(), last
        self.in_features, self.out_features = first.in_features, last.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


@dataclass(frozen=True, kw_only=True)
class ConvShape:
    """How tokens of one width become maps, and how they are convolved.

    Attributes: maps: c. side: s. kernel: k. padding: "valid" or "same". tokens: see :class:`SharedConv`.
    """

    maps: int
    side: int
    kernel: int
    padding: str
    tokens: int | None

    @classmethod
    def of(
        cls, who: str, width: int, maps: int | None, kernel: int | str, padding: str, tokens: int | None = None
    ) -> ConvShape:
        """Check what a user asked for; ``kernel`` is a side in pixels, "full" (s) or "half" (s/2, rounded up).

        ``maps`` None: as few as the width allows, see :func:`squares`.

        Raises: BadInput if ``width`` is not ``maps`` squares or the kernel does not fit; UnknownName for a padding.
        """
        if padding not in PADDINGS:
            raise unknown("padding", padding, PADDINGS, "vitkit show conv-share")
        maps = squares(width)[0] if maps is None else maps
        side = _side(who, width, maps)
        sizes = {"full": side, "half": (side + 1) // 2}
        size = sizes.get(kernel, kernel) if isinstance(kernel, str) else kernel
        if not isinstance(size, int) or not 1 <= size <= side:
            raise BadInput(
                f'{who}: kernel={kernel!r} must be "full", "half" or a number of pixels from 1 to {side}, the side of '
                f"a token's map at width {width}."
            )
        return cls(maps=maps, side=side, kernel=size, padding=padding, tokens=tokens)

    @property
    def is_linear(self) -> bool:
        """Full-size valid kernels, shared: plain linear layers."""
        return self.kernel == self.side and self.padding == "valid" and self.tokens is None

    @property
    def out_side(self) -> int:
        return self.side if self.padding == "same" else self.side - self.kernel + 1

    def project(self, width: int, bias: bool = True) -> SharedConv | SharedChain:
        """A layer of tokens of c·s² to ``width``.

        "same" has as many kernels as ``width`` has maps of s×s. "valid" with k = s has one kernel an output. "valid"
        with k < s has first as many kernels as keep the width through the smaller maps, then, behind a GELU, kernels as
        large as those maps, one an output.
        """
        options: dict[str, Any] = {"tokens": self.tokens, "bias": bias}
        if self.padding == "same":
            return SharedConv(self.maps, self.side, width // self.side**2, self.kernel, "same", **options)
        if self.kernel == self.side:
            return SharedConv(self.maps, self.side, width, **options)
        middle = -(-self.maps * self.side**2 // self.out_side**2)
        first = SharedConv(self.maps, self.side, middle, self.kernel, **options)
        return SharedChain(first, SharedConv(middle, self.out_side, width, **options))

    def expand(self, hidden: int, bias: bool = True) -> tuple[SharedConv, SharedConv]:
        """Both layers of an MLP: c·s² → about ``hidden`` → c·s².

        The hidden width is ``hidden`` for full-size valid kernels, and rounded up to whole maps of s' × s' for others.
        """
        options: dict[str, Any] = {"tokens": self.tokens, "bias": bias}
        width = self.maps * self.side**2
        if self.padding == "valid" and self.kernel == self.side:
            first = SharedConv(self.maps, self.side, hidden, **options)
            maps, side = squares(hidden)
            return first, SharedConv(maps, side, width, **options)
        middle = -(-hidden // self.out_side**2)
        first = SharedConv(self.maps, self.side, middle, self.kernel, self.padding, **options)
        if self.padding == "same":
            return first, SharedConv(middle, self.side, self.maps, self.kernel, "same", **options)
        return first, SharedConv(middle, self.out_side, width, **options)


def squares(width: int) -> tuple[int, int]:
    """The fewest equal square maps that ``width`` numbers fill, and their side.

    >>> squares(64), squares(192), squares(30)
    ((1, 8), (3, 8), (30, 1))
    """
    side = max(s for s in range(1, math.isqrt(width) + 1) if width % s**2 == 0)
    return width // side**2, side


def _side(who: str, width: int, maps: int) -> int:
    if not isinstance(maps, int) or maps < 1:
        raise BadInput(f"{who}: maps={maps!r} must be a whole number of maps, 1 or more.")
    side = math.isqrt(width // maps)
    if side and maps * side**2 == width:
        return side
    if maps > 1:
        best = squares(width)
        raise BadInput(
            f"{who}: a token of width {width} does not fill {maps} square maps; maps={best[0]} does, with maps of "
            f"{best[1]}×{best[1]}."
        )
    low = math.isqrt(width)
    count, own = squares(width)
    raise BadInput(
        f"{who} lays a token out as a square map, but the width {width} is no square; the nearest are {low**2} and "
        f"{(low + 1) ** 2}: use a host with embed_dim={(low + 1) ** 2}, or maps={count} ({count} maps of {own}×{own})."
    )

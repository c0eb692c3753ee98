"""Look at and change what flows through a model: one mechanism, no traces left.

Sites of the host (``{l}`` is a block index, ``*`` matches all):

=============================  ==========================  ============================================
site                           shape                       what
=============================  ==========================  ============================================
``embed``                      (B, P+N, D)                 tokens entering block 0
``blocks.{l}.resid_pre``       (B, P+N, D)                 residual stream before the block
``blocks.{l}.attn.q|k|v``      (B, H, P+N, d)              after q/k norms and rotation
``blocks.{l}.attn.logits``     (B, H, P+N, P+N)            after all logit edits, before the softmax
``blocks.{l}.attn.weights``    (B, H, P+N, P+N)            after the softmax (or another normaliser)
``blocks.{l}.attn.z``          (B, P+N, H, d)              per-head outputs before the output projection
``blocks.{l}.attn.out``        (B, P+N, D)                 update of the attention branch (scaled)
``blocks.{l}.resid_mid``       (B, P+N, D)                 stream between attention and MLP
``blocks.{l}.mlp.hidden``      (B, P+N, M)                 MLP neurons after activation and gate
``blocks.{l}.mlp.out``         (B, P+N, D)                 update of the MLP branch (scaled)
``blocks.{l}.resid_post``      (B, P+N, D)                 stream after the block
``final_norm``                 (B, P+N, D)                 after the last norm
``logits``                     (B, K)                      output
=============================  ==========================  ============================================

Any other name is taken as a module path of the model (``stages.3``) and gives that module's output, so the same calls
serve convolutional networks and Swin.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.anatomy.host import find_host
from vitkit.errors import unknown
from vitkit.models.layout import TokenLayout
from vitkit.models.vit import ViT

BLOCK_SITES = (
    "resid_pre",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.logits",
    "attn.weights",
    "attn.z",
    "attn.out",
    "resid_mid",
    "mlp.hidden",
    "mlp.out",
    "resid_post",
)
MODEL_SITES = ("embed", "final_norm", "logits")


@dataclass(frozen=True)
class SiteContext:
    """Where an edit is called: full site name, block index (None at model level) and the token layout there.

    ``layout`` is None for sites that are plain modules of a foreign model.
    """

    site: str
    depth: int | None
    layout: TokenLayout | None


class _Sites:
    """Resolves patterns to call points of the host and to modules of a foreign model."""

    def __init__(self, model: nn.Module, patterns: Iterable[str]) -> None:
        self.host = find_host(model)
        known = site_names(self.host) if self.host is not None else []
        modules = dict(model.named_modules())
        self.taps: set[str] = set()
        self.modules: dict[str, nn.Module] = {}
        for pattern in patterns:
            hits = fnmatch.filter(known, pattern)
            if hits:
                self.taps.update(hits)
            elif pattern in modules and pattern:
                self.modules[pattern] = modules[pattern]
            else:
                raise unknown("site", pattern, [*known, *filter(None, modules)], "vitkit.anatomy.site_names(model)")


def site_names(model: nn.Module) -> list[str]:
    """All call points of the host inside ``model``."""
    vit = model if isinstance(model, ViT) else find_host(model)
    if vit is None:
        return []
    return [*MODEL_SITES, *(f"blocks.{i}.{site}" for i in range(len(vit.blocks)) for site in BLOCK_SITES)]


def _name(site: str, depth: int | None) -> str:
    return site if depth is None else f"blocks.{depth}.{site}"


class Trace:
    """Collect tensors at call points during the forwards inside the ``with``.

    >>> import torch
    >>> from vitkit.models.build import build
    >>> model = build("vit_femto", img_size=8, in_chans=1, num_classes=3)
    >>> with Trace(model, ["blocks.*.attn.weights"]) as trace:
    ...     _ = model(torch.zeros(2, 1, 8, 8))
    >>> trace["blocks.0.attn.weights"].shape
    torch.Size([2, 4, 17, 17])

    Args:
        model: any model; call points need a host inside, module paths do not.
        sites: patterns as in the table above.
        grad: keep the graph and make ``trace.grad(site)`` available after a backward, also when parameters and
            the input are frozen (a zero leaf is spliced in, so later sites keep their graph).
        tokens: keep "all" rows, the "prefix" rows or the "patch" rows of (B, P+N, D) sites.

    Only the last forward inside the ``with`` is kept. Leaving the ``with`` removes every trace from the model.

    Raises: UnknownName for a site that does not exist; LookupError on exit if a site received nothing.
    """

    def __init__(self, model: nn.Module, sites: Iterable[str] | str, grad: bool = False, tokens: str = "all") -> None:
        if tokens not in ("all", "prefix", "patch"):
            raise ValueError(f"tokens={tokens!r}: use 'all', 'prefix' or 'patch'.")
        self._sites = _Sites(model, [sites] if isinstance(sites, str) else sites)
        self._grad, self._tokens = grad, tokens
        self._values: dict[str, Tensor] = {}
        self._leaves: dict[str, Tensor] = {}
        self.layouts: dict[str, TokenLayout] = {}
        self._handles: list[Any] = []

    def wants(self, site: str, depth: int | None) -> bool:
        return _name(site, depth) in self._sites.taps

    def __call__(self, site: str, value: Tensor, depth: int | None, layout: TokenLayout | None) -> Tensor:
        name = _name(site, depth)
        # a module of a foreign model may give a tuple; who asked for it decides what to say
        if self._grad and isinstance(value, Tensor):
            leaf = torch.zeros_like(value, requires_grad=True)
            value = value + leaf
            self._leaves[name] = leaf
        self._values[name] = value
        if layout is not None:
            self.layouts[name] = layout
        return value

    def __enter__(self) -> Trace:
        _attach(self._sites.host, self, bool(self._sites.taps))
        for name, module in self._sites.modules.items():
            self._handles.append(module.register_forward_hook(lambda _m, _i, out, n=name: self(n, out, None, None)))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        _detach(self._sites.host, self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None:
            missing = sorted((self._sites.taps | set(self._sites.modules)) - set(self._values))
            if missing:
                raise LookupError(
                    f"Nothing was captured at {missing[:3]}: no forward ran inside the `with`, or the part there "
                    "has no such call point (for example a mixer without attention weights)."
                )

    def __getitem__(self, site: str) -> Tensor:
        value = self._raw(site)
        return value if self._grad or not isinstance(value, Tensor) else value.detach()

    def _raw(self, site: str) -> Tensor:
        if site not in self._values:
            raise unknown("captured site", site, self._values, "trace.sites")
        value, layout = self._values[site], self.layouts.get(site)
        if self._tokens == "all" or layout is None or not isinstance(value, Tensor) or value.ndim != 3:
            return value
        return value[:, : layout.num_prefix] if self._tokens == "prefix" else value[:, layout.num_prefix :]

    def grad(self, site: str) -> Tensor:
        """∂(what was backpropagated)/∂(value at the site), same shape as the whole value."""
        if site not in self._leaves:
            raise LookupError(f"No gradient for {site!r}: trace with grad=True and call backward() on the output.")
        grad = self._leaves[site].grad
        return torch.zeros_like(self._leaves[site]) if grad is None else grad

    def stack(self, site: str) -> list[Tensor]:
        """Values of ``blocks.*.<site>`` in block order."""
        depths = sorted(
            int(n.split(".")[1]) for n in self._values if n.startswith("blocks.") and n.endswith(f".{site}")
        )
        return [self[f"blocks.{d}.{site}"] for d in depths]

    @property
    def sites(self) -> list[str]:
        return sorted(self._values)


class Intervene:
    """Change tensors at call points during the forwards inside the ``with``.

    >>> import torch
    >>> from vitkit.models.build import build
    >>> model = build("vit_femto", img_size=8, in_chans=1, num_classes=3).eval()
    >>> with Intervene(model, {"blocks.*.attn.out": zero(), "blocks.*.mlp.out": zero()}):
    ...     a, b = model(torch.rand(2, 1, 8, 8))
    >>> bool(torch.allclose(a, b))   # only the class token's own path is left
    True

    Args:
        model: any model.
        edits: ``{site pattern: fn(tensor, ctx) -> tensor}``; ``ctx`` is a :class:`SiteContext`. Ready-made ones:
            :func:`zero`, :func:`scale`, :func:`add`, :func:`set_to`, :func:`uniform_attention`.

    Nested contexts compose in the order they were entered.

    Raises: UnknownName for a site that does not exist; LookupError on exit if an edit was never applied at one of its
        sites: no forward ran, or the part there has no such call point.
    """

    def __init__(self, model: nn.Module, edits: Mapping[str, Callable[[Tensor, SiteContext], Tensor]]) -> None:
        self._edits = {pattern: (_Sites(model, [pattern]), fn) for pattern, fn in edits.items()}
        self._host = find_host(model)
        self._wanted = {name for sites, _ in self._edits.values() for name in sites.taps}
        self._seen: set[str] = set()
        self._handles: list[Any] = []

    def wants(self, site: str, depth: int | None) -> bool:
        return _name(site, depth) in self._wanted

    def __call__(self, site: str, value: Tensor, depth: int | None, layout: TokenLayout | None) -> Tensor:
        name = _name(site, depth)
        for sites, fn in self._edits.values():
            if name in sites.taps or name in sites.modules:
                self._seen.add(name)
                value = fn(value, SiteContext(name, depth, layout))
        return value

    def __enter__(self) -> Intervene:
        self._seen.clear()
        _attach(self._host, self, bool(self._wanted))
        for sites, _ in self._edits.values():
            for name, module in sites.modules.items():
                self._handles.append(module.register_forward_hook(lambda _m, _i, out, n=name: self(n, out, None, None)))
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        _detach(self._host, self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None:
            missed = sorted(self._wanted.union(*(sites.modules for sites, _ in self._edits.values())) - self._seen)
            if missed:
                raise LookupError(
                    f"Nothing was changed at {missed[:3]}: no forward ran inside the `with`, or the part there has no "
                    "such call point (for example a mixer without attention weights)."
                )


def _attach(vit: ViT | None, tap: Any, needed: bool) -> None:
    if vit is not None and needed:
        vit.taps = (*vit.taps, tap)


def _detach(vit: ViT | None, tap: Any) -> None:
    if vit is not None:
        vit.taps = tuple(t for t in vit.taps if t is not tap)


def zero(index: Any = ...) -> Callable[[Tensor, SiteContext], Tensor]:
    """Set ``value[index]`` to zero (all of it by default); the index counts from the batch axis."""
    return scale(index, 0.0)


def scale(index: Any = ..., factor: float = 1.0) -> Callable[[Tensor, SiteContext], Tensor]:
    """Multiply ``value[index]`` by ``factor``."""

    def edit(value: Tensor, _: SiteContext) -> Tensor:
        factors = torch.ones_like(value)
        factors[index] = factor
        return value * factors

    return edit


def set_to(new: Tensor, index: Any = ...) -> Callable[[Tensor, SiteContext], Tensor]:
    """Replace ``value[index]`` by ``new`` (a cached activation, a mean …), on a copy."""

    def edit(value: Tensor, _: SiteContext) -> Tensor:
        out = value.clone()
        out[index] = new.to(value)
        return out

    return edit


def add(vector: Tensor) -> Callable[[Tensor, SiteContext], Tensor]:
    """Add ``vector`` (broadcast to the site's shape)."""
    return lambda value, _: value + vector.to(value)


def uniform_attention(heads: Iterable[int] | None = None) -> Callable[[Tensor, SiteContext], Tensor]:
    """At ``attn.weights``: the chosen heads (default all) attend to every row equally; padding gets nothing."""
    chosen = slice(None) if heads is None else list(heads)

    def edit(value: Tensor, ctx: SiteContext) -> Tensor:
        mask = ctx.layout.key_mask() if ctx.layout is not None else None
        share = torch.ones_like(value[:, :1, :1]) if mask is None else mask[:, None, None].to(value.dtype)
        out = value.clone()
        out[:, chosen] = share / share.sum(-1, keepdim=True).clamp(min=1)
        return out

    return edit


@contextmanager
def linear_inputs(model: nn.Module, names: Iterable[str], callback: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``callback(name, input)`` with the input of each named layer as that layer sees it.

    A layer wrapped by an activation quantizer is named by its inner path, so the quantized input is seen.
    """
    modules = dict(model.named_modules())
    handles = []
    try:
        for name in names:
            if name not in modules:
                raise unknown("layer", name, filter(None, modules), "dict(model.named_modules())")
            handles.append(
                modules[name].register_forward_pre_hook(lambda _m, args, n=name: callback(n, args[0].detach()))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def expand(x: Tensor, times: int, chunk: int = 256) -> Iterator[tuple[Tensor, slice]]:
    """Repeat a batch ``times`` times and hand it out in chunks that fit in memory.

    Yields (images, rows): ``rows`` is the slice of the (B·times) virtual batch, image-major (image 0 repeated first).
    """
    total = x.shape[0] * times
    for start in range(0, total, chunk):
        stop = min(total, start + chunk)
        index = torch.arange(start, stop, device=x.device) // times
        yield x[index], slice(start, stop)

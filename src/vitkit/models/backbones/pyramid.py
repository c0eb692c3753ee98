"""Networks of stages that halve the map and widen the channels; what all of them share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from vitkit.models.backbones.contract import Backbone
from vitkit.models.cells import as_tokens
from vitkit.models.layout import TokenLayout

# B batch · C channels · H×W map · P prefix tokens · N = H·W


class State(NamedTuple):
    """What walks through the stages of a pyramid.

    Attributes:
        map: (B, C, H, W).
        prefix: (B, P, C) tokens beside the map (class token), or None.
        aux: auxiliary losses, written as ``aux[name, depth]``.
    """

    map: Tensor
    prefix: Tensor | None
    aux: dict[tuple[str, int], Tensor]


class MapBlock(nn.Module):
    """A module on maps, ``(B, C, H, W) → (B, C', H', W')``, as a block of a stage; the prefix passes by."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, state: State) -> State:
        return state._replace(map=self.module(state.map))


class TokenBlock(nn.Module):
    """A block on tokens, ``(x (B, P+N, C), layout) → (x, layout)``, as a block of a stage.

    The host's own :class:`~vitkit.models.vit.Block` and every part made for it work here.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: State) -> State:
        x, layout = to_tokens(state)
        x, layout = self.block(x, layout)
        return from_tokens(x, layout, state)


@register_notrace_module  # reason: asks for the size of the map
class Halve(nn.Conv2d):
    """3×3 convolution of stride 2: (B, C, H, W) → (B, C', ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int = 1, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (1, 1):
            # one cell with bfloat16 on a CPU: oneDNN (PyTorch 2.15) returns garbage for the weights' gradient; zeros
            # beside the cell are what the padding holds anyway
            x = nn.functional.pad(x, (0, 1, 0, 1))
        return super().forward(x)


@register_notrace_module  # reason: blocks ask for the size of the map
class Stage(nn.Module):
    """Downsampling, then blocks ``State → State``.

    Args:
        blocks: modules from state to state, see :class:`MapBlock` and :class:`TokenBlock`.
        down: module on maps before the blocks; None keeps the map.
        prefix_down: module on the prefix tokens (B, P, C) beside ``down``; None keeps them.
    """

    def __init__(
        self, blocks: Iterable[nn.Module], down: nn.Module | None = None, prefix_down: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.down = down if down is not None else nn.Identity()
        self.prefix_down = prefix_down if prefix_down is not None else nn.Identity()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, state: State) -> State:
        prefix = None if state.prefix is None else self.prefix_down(state.prefix)
        state = state._replace(map=self.down(state.map), prefix=prefix)
        for block in self.blocks:
            state = block(state)
        return state


class Pyramid(Backbone):
    """Stem, stages, norm, head; with or without a class token.

    With a class token the features are tokens (B, 1+N, C), normalised by ``norm`` over channels, and the class token is
    read (``global_pool="token"``); without one they are a map (B, C, H, W) that goes through ``norm`` as it is.

    Args:
        stem: images (B, in_chans, H, W) → map (B, C_1, H', W').
        stages: one :class:`Stage` each.
        dims: C of every stage. reductions: pixels per cell after every stage.
        norm: on tokens (…, C) with a class token, on maps without.
        class_token: add a learned token of width ``stem_dim`` beside the map.
        stem_dim: channels after the stem, if the first stage changes them; ``dims[0]`` if None.
        num_classes, in_chans, global_pool, drop_rate: see :meth:`Backbone.finish_init`.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Iterable[nn.Module],
        dims: list[int],
        reductions: list[int],
        norm: nn.Module,
        class_token: bool = False,
        stem_dim: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.cls_token: nn.Parameter | None = None
        if class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, stem_dim or dims[0]))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            self.pools = ("token", "avg", "")
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        self.finish_init(dims, reductions, num_classes, in_chans, global_pool, drop_rate)

    def begin(self, images: Tensor) -> State:
        x = self.stem(images)
        prefix = None if self.cls_token is None else self.cls_token.expand(x.shape[0], -1, -1)
        return State(x, prefix, self.aux_sink if self.aux_sink is not None else {})

    def as_map(self, state: State) -> Tensor:
        return state.map

    def features(self, state: State) -> Tensor:
        return self.norm(state.map if self.cls_token is None else to_tokens(state)[0])

    def pool(self, features: Tensor) -> Tensor:
        if self.cls_token is None or self.global_pool == "":
            return super().pool(features)
        return features[:, 0] if self.global_pool == "token" else features[:, 1:].mean(1)


@torch.fx.wrap
def to_tokens(state: State) -> tuple[Tensor, TokenLayout]:
    """(B, P+N, C), prefix first, and the layout that says so."""
    x = as_tokens(state.map)
    groups: tuple[tuple[str, int], ...] = ()
    if state.prefix is not None:
        x = torch.cat([state.prefix, x], 1)
        groups = (("class", state.prefix.shape[1]),)
    return x, TokenLayout(grid=tuple(state.map.shape[2:]), prefix=groups, aux=state.aux)


def from_tokens(x: Tensor, layout: TokenLayout, state: State) -> State:
    """Back to a map and its prefix; the inverse of :func:`to_tokens` for any width of the tokens."""
    num_prefix = layout.num_prefix
    return state._replace(
        map=layout.to_grid(x[:, num_prefix:]).contiguous(), prefix=x[:, :num_prefix] if num_prefix else None
    )

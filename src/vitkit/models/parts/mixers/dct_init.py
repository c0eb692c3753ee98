"""Start query, key or value projections from the DCT matrix."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.anatomy.roles import roles
from vitkit.errors import BadInput
from vitkit.models.dct import dct_matrix
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention


def init_dct(model: nn.Module, which: str = "kv", trainable: bool = True) -> tuple[str, ...]:
    """Set chosen attention projections of a fresh model to the orthonormal DCT matrix, in place.

    The chosen C×C weights become D_C (whole width, before the split into heads), their biases zero; everything else
    stays. Rows of D_C are decorrelated and of equal length, so heads start on different frequencies of the token.
    Works on any model whose attention layers are recognised (timm, Hugging Face), with each layer's own width, so
    also inside the windows and stages of a Swin.

    Args:
        model: any model with attention; changed in place, as initialisers are.
        which: the projections: "q", "k", "v", "qk", "kv", "qv" or "qkv".
        trainable: False keeps the chosen weights at D_C (biases still learn). In a fused qkv layer they then are a
            buffer of a :class:`PartlyFixedLinear`, since an optimizer's weight decay would move them otherwise.

    Returns: names of the layers that were changed.

    Raises: BadInput if ``which`` is another string, no attention projection is found, or one is not square.
    Paper: Discrete Cosine Transform Based Decorrelated Attention for Vision Transformers, arXiv:2405.13901.
    Departs from the paper: nothing; it studies Swin, this runs on any attention.
    """
    letters = _letters(which)
    found = [(name, role) for name, role in roles(model).items() if role in ("qkv", "q", "k", "v")]
    found = [(name, role) for name, role in found if role == "qkv" or role in letters]
    modules = dict(model.named_modules())
    # checked before the first change, so that an error leaves the model as it was
    for name, role in found:
        _require_square(modules[name], role, name)
    if not found:
        raise BadInput(
            f"init_dct found no attention projections in {type(model).__name__}. It needs layers whose role is qkv, "
            "q, k or v; vitkit.anatomy.roles(model) lists the roles it sees."
        )
    for name, role in found:
        layer = modules[name]
        if role == "qkv":
            _write_fused(layer, letters)
            if not trainable:
                owner, _, child = name.rpartition(".")
                setattr(modules[owner], child, PartlyFixedLinear(layer, letters))
        else:
            _write(layer.weight, layer.bias)
            layer.weight.requires_grad_(trainable)
    return tuple(name for name, _ in found)


class DCTInitAttention(Attention):
    """Standard attention whose projections start as the DCT matrix: :func:`init_dct` as a part, block by block.

    Args:
        which: the projections: "q", "k", "v", "qk", "kv", "qv" or "qkv".
        trainable: False keeps the chosen weights at D_C, as constants of a :class:`PartlyFixedLinear`; quantizers and
            adapters that work on linear layers pass over it.

    Shape: (B, P+N, D) → (B, P+N, D).
    Raises: BadInput if the old mixer is not standard attention with D×D projections, or ``which`` is none of these.
    Paper: Discrete Cosine Transform Based Decorrelated Attention for Vision Transformers, arXiv:2405.13901.
    Departs from the paper: nothing.
    """

    slot = "mixer"
    preserves = "none"
    qkv: Any  # a Linear, or a PartlyFixedLinear when the chosen weights are constants

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        which: str = "kv",
        trainable: bool = True,
    ) -> DCTInitAttention:
        """A copy of ``old`` with the chosen projections replaced; ``warm=False`` draws the other weights anew."""
        letters = _letters(which)
        if not isinstance(old, Attention):
            raise BadInput(f"DCT initialisation needs standard attention in the slot, not {type(old).__name__}.")
        _require_square(old.qkv, "qkv", "attn.qkv")
        if old.qkv.in_features != spec.dim:
            raise BadInput(
                f"{type(old).__name__} projects {old.qkv.in_features} of the {spec.dim} channels of a token; DCT "
                "initialisation needs the whole width, so put it in place of standard attention."
            )
        new = cls(
            old.qkv.in_features,
            old.num_heads,
            attn_head_dim=old.head_dim,
            dim_out=old.proj.out_features,
            attn_drop=old.attn_drop.p,
            proj_drop=old.proj_drop.p,
            depth=old.depth_index,
        )
        for child in ("qkv", "proj", "q_norm", "k_norm", "norm", "gate"):
            setattr(new, child, copy.deepcopy(getattr(old, child)))
        new.fused_attn, new.normalizer, new.position = old.fused_attn, old.normalizer, nn.ModuleList(old.position)
        if not warm:
            for linear in (new.qkv, new.proj):
                nn.init.trunc_normal_(linear.weight, std=0.02)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        _write_fused(new.qkv, letters)
        if not trainable:
            new.qkv = PartlyFixedLinear(new.qkv, letters)
        return new


class PartlyFixedLinear(nn.Module):
    """A fused qkv projection of which some of the three D×D parts are constants.

    Args:
        layer: the linear layer (D → 3D) whose values are taken over.
        fixed: the letters of the constant parts, of "qkv".

    Shape: (…, D) → (…, 3D). ``weight`` gives the assembled (3D, D) matrix.
    """

    q: Tensor
    k: Tensor
    v: Tensor

    def __init__(self, layer: nn.Linear, fixed: str) -> None:
        super().__init__()
        self.fixed = fixed
        self.in_features, self.out_features = layer.in_features, layer.out_features
        for letter, part in zip("qkv", layer.weight.detach().chunk(3)):
            if letter in fixed:
                self.register_buffer(letter, part.clone())
            else:
                self.register_parameter(letter, nn.Parameter(part.clone()))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.q, self.k, self.v])

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fixed={self.fixed!r}"


def _letters(which: str) -> str:
    letters = "".join(letter for letter in "qkv" if letter in which)
    if not which or sorted(which) != sorted(letters):
        raise BadInput(f"which={which!r} must be one of 'q', 'k', 'v', 'qk', 'kv', 'qv', 'qkv'.")
    return letters


@torch.no_grad()
def _write(weight: Tensor, bias: Tensor | None) -> None:
    weight.copy_(dct_matrix(weight.shape[0], torch.float64))
    if bias is not None:
        bias.zero_()


@torch.no_grad()
def _write_fused(layer: nn.Linear, letters: str) -> None:
    biases = (None, None, None) if layer.bias is None else layer.bias.chunk(3)
    for letter, weight, bias in zip("qkv", layer.weight.chunk(3), biases):
        if letter in letters:
            _write(weight, bias)


def _require_square(layer: nn.Module, role: str, name: str) -> None:
    if not isinstance(layer, nn.Linear):
        raise BadInput(f"{name} is a {type(layer).__name__}, not a linear layer; initialise a freshly built model.")
    out, width = layer.weight.shape
    if out != width * (3 if role == "qkv" else 1):
        raise BadInput(
            f"{name} maps {width} to {out} channels; DCT initialisation needs square projections (C → C each), so "
            "heads must fill the whole width."
        )

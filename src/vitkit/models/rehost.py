"""Bring a foreign ViT into the host: its tensors are reused, its outputs checked."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from timm.layers import GluMlp as TimmGluMlp
from timm.layers import Mlp as TimmMlp
from timm.layers import SwiGLU as TimmSwiGLU
from timm.layers.attention import Attention as TimmAttention
from timm.models.eva import Eva
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitkit.errors import BadInput
from vitkit.models.vit import Attention, Block, GluMlp, Mlp, SwiGLU, ViT

M = TypeVar("M", bound=nn.Module)


def rehost(model: nn.Module, check: bool = True) -> ViT:
    """Turn a ViT of timm or Hugging Face into the host :class:`~vitkit.models.vit.ViT`.

    timm models share every tensor with the result (no copy is made). Hugging Face models keep q, k and v apart, which
    the host fuses; their other tensors are shared.

    Args:
        model: timm ``VisionTransformer`` or ``Eva`` (EVA-02, DINOv3, Perception Encoder, RoPE-ViT: see
            :mod:`vitkit.models.rehost_eva`); transformers ``ViT*``, ``DeiT*``, ``Dinov2*``, CLIP or SigLIP vision
            model. A :class:`ViT` is returned as it is.
        check: compare features and outputs on a random batch (float32, eval mode).

    Raises:
        BadInput: the architecture is not a plain ViT, or has a feature the host lacks; the message names it.
        RuntimeError: features or outputs differ by more than 1e-5, or 1e-5 of their largest value where that is more.
    """
    if isinstance(model, ViT):
        return model
    if isinstance(model, (VisionTransformer, Eva)):
        vit = _from_timm(model)
        if check:
            _compare(model, vit)
        return vit
    if type(model).__module__.startswith("transformers."):
        from vitkit.models.rehost_hf import from_transformers

        return from_transformers(model, check=check)
    raise BadInput(
        f"{type(model).__name__} is not a plain vision transformer, so its slots cannot be opened. Methods that need "
        "only linear layers, gradients or outputs work on it as it is."
    )


def _from_timm(model: VisionTransformer | Eva) -> ViT:
    if isinstance(model, Eva):
        from vitkit.models.rehost_eva import from_eva

        return from_eva(model)
    if type(model) is not VisionTransformer:
        raise BadInput(
            f"timm's {type(model).__name__} changes the plain forward pass (for example a second head), which the "
            "host does not copy; use its VisionTransformer variant."
        )
    vit = adopt(ViT, model)
    vit.open_slots()
    vit.blocks = nn.Sequential(*[_adopt_block(block, i) for i, block in enumerate(model.blocks)])
    return vit


def _adopt_block(block: nn.Module, depth: int) -> Block:
    if type(block) is not TimmBlock:
        raise BadInput(f"blocks.{depth} is a {type(block).__name__}; the host covers timm's pre-norm Block only.")
    if type(block.attn) is not TimmAttention:
        raise BadInput(f"blocks.{depth}.attn is a {type(block.attn).__name__}; the host covers timm's Attention only.")
    new = adopt(Block, block)
    new.attn = adopt(Attention, block.attn)
    new.attn.open_slots(depth)
    new.mlp = adopt_mlp(block.mlp)
    new.open_slots(depth)
    return new


def adopt_mlp(mlp: nn.Module) -> nn.Module:
    """timm's MLP with the host's call point; another module stays as it is."""
    kinds: dict[type, type[nn.Module]] = {TimmMlp: Mlp, TimmGluMlp: GluMlp, TimmSwiGLU: SwiGLU}
    # with 1×1 convolutions it works on maps, not on tokens
    return adopt(kinds[type(mlp)], mlp) if type(mlp) in kinds and isinstance(mlp.fc2, nn.Linear) else mlp


def adopt(cls: type[M], module: nn.Module) -> M:
    """A new ``cls`` object around the very same parameters, buffers and children as ``module``."""
    new = cls.__new__(cls)
    state: dict[str, Any] = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        # own containers, shared contents: opening a slot of the new module must not change the old one
        state[name] = state[name].copy()
    new.__dict__.update(state)
    return new


@torch.no_grad()
def _compare(old: nn.Module, new: ViT, tolerance: float = 1e-5) -> None:
    from vitkit.anatomy.untouched import untouched

    parameter = next(old.parameters())
    size = old.patch_embed.img_size or tuple(16 * p for p in old.patch_embed.patch_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, old.in_chans, *size, generator=generator).to(parameter.device, parameter.dtype)
    with untouched(old), untouched(new):
        features = old.forward_features(images)
        theirs = (features, old.forward_head(features))
        x, layout = new.run(*new.embed(images))
        ours = (new.norm(x), new.readout(x, layout))
    # a fresh head may give logits near zero, which would prove nothing
    gaps = [float((a - b).abs().max() / a.abs().max().clamp(min=1.0)) for a, b in zip(theirs, ours)]
    gap = max(gaps)
    if parameter.dtype == torch.float32 and not all(g <= tolerance for g in gaps):
        raise RuntimeError(
            f"The re-hosted {type(old).__name__} differs from the original by {gap:.2e} (allowed: {tolerance}). This "
            "version of the library computes something the host does not know; please report it."
        )

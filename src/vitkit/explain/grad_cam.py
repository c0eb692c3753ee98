"""Grad-CAM: channels of a feature map weighted by how the class logit reacts to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkit.anatomy import Trace, find_host, untouched
from vitkit.errors import BadInput
from vitkit.explain.base import Explanation, differentiable, for_model, in_chunks, resolve_target
from vitkit.models.layout import TokenLayout


def grad_cam(
    model: nn.Module,
    images: Tensor,
    target: Tensor | int | None = None,
    layer: str | None = None,
    grid: tuple[int, int] | None = None,
    channels_last: bool | None = None,
    chunk: int = 32,
) -> Explanation:
    """Which places speak for a class, in any network with a spatial feature map.

    ``α_k = mean_ij ∂y_c/∂A^k_ij``, map ``= ReLU(Σ_k α_k A^k)``.

    For a plain ViT, A is the output of ``norm1`` of the last block without prefix rows: after the last attention a
    class-token model does not read its patches any more, so later features have no gradient. For timm's convolutional
    and hierarchical networks it is the last stage.

    >>> import timm
    >>> net = timm.create_model("resnet10t", num_classes=5)
    >>> grad_cam(net, torch.rand(2, 3, 64, 64)).map.shape
    torch.Size([2, 2, 2])

    Args:
        model: a classifier on images in [0, 1].
        images: (B, C, H, W).
        target: (B,) or one index; None is the predicted class.
        layer: module path whose output is A, for example ``"layer4"`` or ``"model.blocks.2.norm1"``; None chooses as
            said above.
        grid: (gh, gw) for a layer whose output is a sequence (B, n, C) in a network without a host; rows before the
            last gh·gw are prefix tokens.
        channels_last: True for a feature map (B, h, w, C), False for (B, C, h, w); None asks the network (timm says it)
            and takes (B, C, h, w) otherwise.
        chunk: images at a time.

    Raises:
        UnknownName: there is no such layer. LookupError: the layer did not run.
        BadInput: no layer can be chosen, or its output is not a feature map.

    Paper: Selvaraju et al., Grad-CAM, arXiv:1610.02391, §3.
    Departs from the paper: the token form for ViTs and the choice of ``norm1`` are later practice; the gradient of a
    merged token counts for each patch it stands for by its share.
    """
    vit = find_host(model)

    def explain(part: Tensor, chosen: Tensor | int | None) -> Explanation:
        root, path, last = _place(model, layer)
        # the layout of the tokens is known at call points only
        beside = f"blocks.{last}.resid_pre" if last is not None else None
        with untouched(model), differentiable():
            with Trace(root, [path] if beside is None else [path, beside], grad=True) as trace:
                logits = model(for_model(model, part))
            picked = resolve_target(logits, chosen)
            features = trace[path]
            if not isinstance(features, Tensor):
                raise BadInput(f"{path!r} gives a {type(features).__name__}, not a tensor; choose another layer.")
            logits.gather(1, picked.unsqueeze(1)).sum().backward()
            activation, gradient = features.detach().float(), trace.grad(path).float()
        layout = trace.layouts.get(beside) if beside is not None else None
        return Explanation(
            map=_map(activation, gradient, layout, grid, _last_axis(model, channels_last), path),
            target=picked.detach(),
            meta={"layer": path},
        )

    if vit is not None and grid is not None:
        raise BadInput("grid is for networks without a host; a plain ViT knows its own.")
    return in_chunks(explain, images, target, chunk)


def _place(model: nn.Module, layer: str | None) -> tuple[nn.Module, str, int | None]:
    """Where to look: the module paths start from, the path, and the block index if it is inside a host's block."""
    vit = find_host(model)
    if layer is None and vit is not None:
        last = len(vit.blocks) - 1
        return vit, f"blocks.{last}.norm1" if hasattr(vit.blocks[last], "norm1") else f"blocks.{last}.resid_pre", last
    if layer is not None:
        if vit is None:
            return model, layer, None
        prefix = next(name for name, m in model.named_modules() if m is vit)
        inner = layer.removeprefix(f"{prefix}.") if prefix else layer
        steps = inner.split(".")
        if steps[0] == "blocks" and len(steps) > 1 and steps[1].isdigit():
            return vit, inner, int(steps[1])
        return model, layer, None
    owner = next((m for m in model.modules() if _feature_info(m)), None)
    if owner is None:
        raise BadInput(
            f"{type(model).__name__} does not say which layer is its last feature map; name one, for example "
            f"layer={_suggest(model)!r}."
        )
    return owner, _feature_info(owner)[-1]["module"], None


def _feature_info(module: nn.Module) -> list[dict[str, Any]]:
    info = getattr(module, "feature_info", None)
    return info if isinstance(info, list) and info and "module" in info[-1] else []


def _suggest(model: nn.Module) -> str:
    convolutions = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return convolutions[-1] if convolutions else "stages.3"


def _last_axis(model: nn.Module, channels_last: bool | None) -> bool:
    if channels_last is not None:
        return channels_last
    return any(str(getattr(m, "output_fmt", "")).upper().endswith("NHWC") for m in model.modules())


def _map(
    activation: Tensor,
    gradient: Tensor,
    layout: TokenLayout | None,
    grid: tuple[int, int] | None,
    channels_last: bool,
    path: str,
) -> Tensor:
    if activation.ndim == 4:
        if channels_last:
            activation, gradient = activation.movedim(-1, 1), gradient.movedim(-1, 1)
        alpha = gradient.mean((2, 3), keepdim=True)
        return (alpha * activation).sum(1).relu()
    if activation.ndim != 3:
        raise BadInput(f"{path!r} gives shape {tuple(activation.shape)}, not a feature map; choose another layer.")
    if layout is None:
        if grid is None:
            raise BadInput(
                f"{path!r} gives a sequence of tokens {tuple(activation.shape)}, not a feature map; bring a plain ViT "
                "in with vitkit.rehost(model), or give the grid of its last rows with grid=(gh, gw)."
            )
        if grid[0] * grid[1] > activation.shape[1]:
            raise BadInput(f"grid={grid} has more cells than the {activation.shape[1]} tokens of {path!r}.")
        layout = TokenLayout(grid=grid, prefix=(("prefix", activation.shape[1] - grid[0] * grid[1]),))
    activation, gradient = activation[:, layout.num_prefix :], gradient[:, layout.num_prefix :]
    # Σ over rows / number of original patches: equals the mean on the plain grid, and on merged tokens the mean of
    # every patch's share of its token's gradient
    alpha = gradient.sum(1, keepdim=True) / layout.num_original
    scores = (alpha * activation).sum(-1).relu()
    if layout.valid is not None:
        scores = torch.where(layout.valid, scores, torch.zeros_like(scores))
    return layout.to_grid(scores)

"""Number format and attention path: what is fastest here, and how to use it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitkit.errors import BadInput

Precision = Literal["fp32", "bf16"]


def native_bf16(device: torch.device | str) -> bool:
    """Whether matrix products in bfloat16 run on the hardware's own instructions (CPU: AVX512-BF16, AMX or Arm's)."""
    kind = torch.device(device).type
    if kind == "cpu":
        capabilities = torch.cpu.get_capabilities()
        # the names differ between x86 and Arm; absent means not supported
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    if kind == "cuda":
        # emulated bf16 on older cards is slower than float32
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return False


# training steps in bf16 against fp32 on a CPU with AVX512-BF16: 2.3 times as long at a width of 80 (vit_femto), 1.7 at
# 120 (vit_pico), 1.1 at 160 (vit_nano), 0.7 at 384 (ViT-Ti at 224 pixels)
_BF16_PAYS = 240


def width(model: nn.Module) -> float:
    """Mean number of terms in a sum of a matrix product, over the weights of linear layers and convolutions.

    For a ViT whose MLP is four times as wide as the embedding it is about twice the embedding's dimension.

    >>> width(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8)))
    6.0
    """
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    total = sum(w.numel() for w in weights)
    return sum(w.numel() * w[0].numel() for w in weights) / total if total else 0.0


def resolve(precision: str, device: torch.device | str, model: nn.Module | None = None) -> Precision:
    """The format to compute in: ``auto`` is bf16 where it is native, else fp32.

    On a CPU it is also fp32 for a ``model`` of narrow layers, whose products gain less than the conversions cost.

    >>> resolve("fp32", "cpu")
    'fp32'

    Raises: BadInput for anything but auto, fp32 and bf16.
    """
    if precision == "auto":
        narrow = model is not None and torch.device(device).type == "cpu" and width(model) < _BF16_PAYS
        return "bf16" if native_bf16(device) and not narrow else "fp32"
    if precision == "fp32":
        return "fp32"
    if precision == "bf16":
        return "bf16"
    raise BadInput(f"precision={precision!r} must be auto, fp32 or bf16.")


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """Context in which matrix products run in ``precision``; weights and reductions stay float32."""
    where = torch.device(device)
    return torch.autocast(where.type, dtype=torch.bfloat16, enabled=resolve(precision, where) == "bf16")


def needs_fp32(model: nn.Module, images: Tensor | dict[str, Any]) -> tuple[str, ...]:
    """Names of the convolutions whose bfloat16 gradient cannot be trusted on a CPU, at these images' size.

    oneDNN's weight gradient of a padded convolution whose stride is larger than its input map (a ResNet's last
    stages on 8×8 images: stride 2 on 1×1) holds whatever was in memory: no error, then NaN some steps later. The
    model is left as found.

    Args: as for :func:`choose_attention`.
    """
    from vitkit.anatomy.untouched import untouched

    found: list[str] = []
    suspects = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and max(module.stride) > 1
        and max(module.kernel_size) > 1
        # a string ("same") exists for stride 1 only
        and not isinstance(module.padding, str)
        and max(module.padding) > 0
    }
    if not suspects:
        return ()

    def look(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(conv: Any, given: tuple[Tensor, ...]) -> None:
            if any(s > side for s, side in zip(conv.stride, given[0].shape[-2:])):
                found.append(name)

        return hook

    with untouched(model), torch.no_grad():
        for name, conv in suspects.items():
            # untouched removes it
            conv.register_forward_pre_hook(look(name))
        model(images)
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """What :func:`choose_attention` decided.

    Attributes:
        path: ``fused``, ``explicit``, or ``unchanged`` where the model has no layer that can do both.
        ratio: seconds of the fused path divided by seconds of the explicit one; above 1 the explicit one is faster.
        layers: names of the layers it holds for.
    """

    path: Literal["fused", "explicit", "unchanged"]
    ratio: float
    layers: tuple[str, ...]


def choose_attention(
    model: nn.Module,
    images: Tensor | dict[str, Any],
    precision: str = "auto",
    repeats: int = 4,
    margin: float = 1.15,
) -> AttentionChoice:
    """Time a forward and backward with fused and with explicit attention, and set the faster path.

    The fused kernel is left only if the explicit path is ``margin`` times faster: close races would otherwise be
    decided by noise, and differently each time. Apart from ``fused_attn`` the model is left as found: weights,
    gradients, mode, buffers and random state; after an error the flags too.

    Args:
        model: any module that maps images to a tensor, or an objective; layers with a boolean ``fused_attn`` are
            switched.
        images: a small batch (B, C, H, W) on the model's device; the dict of tensors for an objective.
        precision: fp32, bf16 or auto.
        repeats: timed runs of each path after one to warm up; the fastest of each counts.
        margin: how much faster the explicit path must be, at least 1.
    """
    from vitkit.anatomy.untouched import untouched

    layers = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "fused_attn", None), bool)}
    if not layers:
        return AttentionChoice(path="unchanged", ratio=1.0, layers=())
    best = {True: float("inf"), False: float("inf")}
    with untouched(model, params_grad=True), torch.enable_grad():
        model.train()
        for repeat in range(repeats + 1):
            for fused in (True, False):
                _set(layers, fused)
                seconds = _time_step(model, images, precision)
                if repeat:
                    best[fused] = min(best[fused], seconds)
    ratio = best[True] / best[False]
    path: Literal["fused", "explicit"] = "explicit" if ratio >= margin else "fused"
    _set(layers, path == "fused")
    return AttentionChoice(path=path, ratio=ratio, layers=tuple(layers))


def _set(layers: dict[str, nn.Module], fused: bool) -> None:
    for layer in layers.values():
        layer.fused_attn = fused  # type: ignore[assignment]


def _time_step(model: nn.Module, images: Tensor | dict[str, Any], precision: str) -> float:
    device = next(model.parameters()).device
    _synchronize(device)
    start = time.perf_counter()
    with autocast(precision, device):
        output = model(images)
        loss = output["loss"] if isinstance(output, dict) else output.float().square().mean()
    loss.backward()
    _synchronize(device)
    seconds = time.perf_counter() - start
    for p in model.parameters():
        p.grad = None
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

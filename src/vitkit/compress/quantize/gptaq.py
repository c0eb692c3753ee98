"""GPTAQ: quantize each layer towards the output of the full-precision network, not of its own noisy input."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from vitkit.compress.change import Change
from vitkit.compress.quantize.calibrate import LayerStatistics, Precision, Progress, quantize_layers, restore_layers
from vitkit.compress.quantize.grid import Grid
from vitkit.compress.quantize.solver import Residual, Solution, shifted_target, solve
from vitkit.compress.walker import Images
from vitkit.errors import BadInput

Mode = Literal["gptaq", "shift"]


def gptaq(
    model: nn.Module,
    images: Images,
    w_bits: int = 4,
    a_bits: int | None = None,
    sym: bool = False,
    group_size: int = -1,
    act_order: bool = True,
    static_groups: bool = True,
    damp: float = 0.1,
    alpha: float | None = None,
    residual: Residual = "pre",
    mode: Mode = "gptaq",
    w_clip: bool = True,
    head_bits: int | None = None,
    block_size: int = 128,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[nn.Module, Change]:
    """Quantize the blocks' linear layers so that each reproduces what it gave in the full-precision network.

    Minimises ``‖Q X − W X̃‖²``, X the layer's input in the network quantized so far and X̃ in the original. With
    ``H = XXᵀ``, ``D = (X̃ − X)Xᵀ``, ``H⁻¹ = UᵀU`` and ``P = α·triu(D Uᵀ, 1)·U``, column i with value w becomes q and
    every later column j moves by ``−(w − q)/U_ii · U_ij + w·P_ij``. The first term is GPTQ's; the second corrects the
    error that has accumulated in the input. Both networks see the same images, and tokens are matched one by one.

    >>> import torch
    >>> from vitkit.models.build import build
    >>> vit = build("vit_femto", img_size=8, in_chans=1, num_classes=3)
    >>> small, change = gptaq(vit, torch.rand(8, 1, 8, 8), w_bits=4, a_bits=8)
    >>> change.what, change.details["realised"]
    ('16 linear layers to 4-bit weights and 8-bit inputs', 'memory-only')

    Args:
        model: any network with plain ``nn.Linear`` layers; not changed. A plain ViT is walked block by block, others
            layer by layer.
        images: (N, C, H, W) in [0, 1], or batches as a loader gives them (labels are not read). 128 are usual.
        w_bits: bits of the weights, 2 to 8. 16 rounds nothing: weights then only move to make up for quantized inputs.
        a_bits: bits of every such layer's input (per token, asymmetric, dynamic), on while statistics are gathered;
            None leaves inputs alone.
        sym: symmetric grid instead of asymmetric.
        group_size: inputs of a row that share a step; −1 for one step per output channel.
        act_order: columns by descending ``H_jj``, so that important ones are rounded first.
        static_groups: groups of consecutive inputs, fitted before the loop (needed for export together with
            ``act_order``); False forms and fits them in the loop's order.
        damp: share of ``mean(diag H)`` added to the diagonal; 0.1 is the authors' value for ViTs, 0.01 for language.
        alpha: α of mode "gptaq"; None is 0.25, the released code's value (the derivation has 1).
        residual: "pre" carries the columns as they were before rounding into later blocks; "released" carries the
            overwritten ones, as the authors' code does, and then depends on ``block_size``.
        mode: "gptaq", or "shift": GPTQ on ``W* = W(I + D H⁻¹)``, for which ``‖QX − WX̃‖² = ‖(Q − W*)X‖² + const``
            exactly; it can overfit when there are few tokens.
        w_clip: search the clipping range of each step.
        head_bits: also round the classifier's weights to nearest; None leaves it.
        block_size: columns whose updates are applied at once; with ``residual="pre"`` a matter of speed only.
        batch_size: images pushed through at once.
        progress: called as ``progress("gptaq", layers done, layers)``.

    Returns: the quantized copy and the account of the change; ``details["layers"]`` has each layer's
        ``error = ‖QX − WX̃‖²/‖WX̃‖²``.

    Raises: BadInput for options that do not fit; VitkitError if a layer's statistics cannot be factored.
    Paper: GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration, arXiv:2504.02692.
    Departs from the paper: later blocks of columns get the values before rounding (``residual``), which makes the
        result independent of the block size; ``mode="shift"`` is not in the paper.
    """
    if mode not in ("gptaq", "shift"):
        raise BadInput(f"mode={mode!r}: use 'gptaq' or 'shift'.")
    if mode == "shift" and alpha is not None:
        raise BadInput(f"alpha={alpha} belongs to mode='gptaq'; mode='shift' is exact and has none.")
    precision = Precision(
        w_bits=w_bits, a_bits=a_bits, sym=sym, group_size=group_size, w_clip=w_clip, head_bits=head_bits
    )

    def solver(weight: Tensor, statistics: LayerStatistics, grid: Grid | None) -> Solution:
        gram, cross = statistics.gram.value, statistics.cross.value
        if mode == "shift":
            weight = shifted_target(weight, gram, cross, damp)
        return solve(
            weight,
            gram,
            cross if mode == "gptaq" else None,
            grid,
            alpha=0.25 if alpha is None else alpha,
            damp=damp,
            act_order=act_order,
            static_groups=static_groups,
            block_size=block_size,
            residual=residual,
        )

    return quantize_layers(model, images, "gptaq", precision, solver, batch_size=batch_size, progress=progress)


def restore(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Rebuild the structure that :func:`gptaq` left, for saved weights."""
    return restore_layers(model, "gptaq", options)

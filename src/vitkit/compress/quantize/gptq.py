"""GPTQ: round a column, let the columns that are left absorb the error."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitkit.compress.change import Change
from vitkit.compress.quantize.calibrate import LayerStatistics, Precision, Progress, quantize_layers, restore_layers
from vitkit.compress.quantize.grid import Grid
from vitkit.compress.quantize.solver import Residual, Solution, solve
from vitkit.compress.walker import Images


def gptq(
    model: nn.Module,
    images: Images,
    w_bits: int = 4,
    a_bits: int | None = None,
    sym: bool = False,
    group_size: int = -1,
    act_order: bool = True,
    static_groups: bool = True,
    damp: float = 0.1,
    residual: Residual = "pre",
    w_clip: bool = True,
    head_bits: int | None = None,
    block_size: int = 128,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[nn.Module, Change]:
    """Quantize the blocks' linear layers so that each layer's output on its own (quantized) input changes least.

    Minimises ``‖(Q − W) X‖²`` column by column: with ``H = XXᵀ``, ``H⁻¹ = UᵀU``, column i becomes q and every later
    column j moves by ``−(w − q)/U_ii · U_ij``. It does not know that X differs from what the full-precision network
    would have sent; :func:`~vitkit.compress.quantize.gptaq.gptaq` does.

    Args:
        model: any network with plain ``nn.Linear`` layers; not changed. A plain ViT is walked block by block, others
            layer by layer.
        images: (N, C, H, W) in [0, 1], or batches as a loader gives them (labels are not read). 128 are usual.
        w_bits: bits of the weights, 2 to 8; 16 leaves them.
        a_bits: bits of every such layer's input (per token, asymmetric, dynamic), on while statistics are gathered;
            None leaves inputs alone.
        sym: symmetric grid instead of asymmetric.
        group_size: inputs of a row that share a step; −1 for one step per output channel.
        act_order: columns by descending ``H_jj``, so that important ones are rounded first.
        static_groups: groups of consecutive inputs, fitted before the loop (needed for export together with
            ``act_order``); False forms and fits them in the loop's order.
        damp: share of ``mean(diag H)`` added to the diagonal; 0.1 is the authors' value for ViTs, 0.01 for language.
        residual: "pre", or "released" for the authors' grids of dynamic groups, which read the weights as they stood
            at the beginning of a block of columns.
        w_clip: search the clipping range of each step.
        head_bits: also round the classifier's weights to nearest; None leaves it.
        block_size: columns whose updates are applied at once; with ``residual="pre"`` a matter of speed only.
        batch_size: images pushed through at once.
        progress: called as ``progress("gptq", layers done, layers)``.

    Returns: the quantized copy and the account of the change; ``details["layers"]`` has each layer's
        ``error = ‖QX − WX̃‖²/‖WX̃‖²``.

    Raises: BadInput for options that do not fit; VitkitError if a layer's statistics cannot be factored.
    Paper: the baseline of GPTAQ, arXiv:2504.02692 (GPTQ itself: arXiv:2210.17323).
    Departs from the paper: nothing with ``residual="released"``; see ``residual`` for the default.
    """
    precision = Precision(
        w_bits=w_bits, a_bits=a_bits, sym=sym, group_size=group_size, w_clip=w_clip, head_bits=head_bits
    )

    def solver(weight: Tensor, statistics: LayerStatistics, grid: Grid | None) -> Solution:
        return solve(
            weight,
            statistics.gram.value,
            None,
            grid,
            damp=damp,
            act_order=act_order,
            static_groups=static_groups,
            block_size=block_size,
            residual=residual,
        )

    return quantize_layers(model, images, "gptq", precision, solver, batch_size=batch_size, progress=progress)


def restore(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Rebuild the structure that :func:`gptq` left, for saved weights."""
    return restore_layers(model, "gptq", options)

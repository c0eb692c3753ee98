"""Classifiers behind several blocks: easy images leave early."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.spec import PartSpec
from vitkit.models.vit import ViT

# B batch · E exits · D width · K classes

States = list[tuple[Tensor, TokenLayout]]


class EarlyExit(nn.Module):
    """Exits ``W_e LN_e(pool(x_{l_e})) + b_e`` behind blocks l_1 < … < l_E = L; the first that is sure answers.

    In eval mode an image's logits are those of the first exit with ``max softmax > threshold``, strictly, or of the
    last; with a threshold of 1 that is the last exit for every image. In training mode they are the last exit's, and
    each earlier one learns by a loss in ``layout.aux``: cross-entropy where the labels are known (see
    :func:`vitkit.models.labels.known_labels`, which the training loop uses for single-label classification), else
    ``KL(p_L ‖ p_e)``, which has no gradient for the last exit. Pooled is the class token, or the mean of the patches
    without one.

    A forward of the host still runs every block, so that explanations and measures work; :func:`exit_early` stops.

    Args:
        dim: D. num_classes: K. depth: L.
        head_at: blocks counted from 1 behind which there is an exit besides the last, or how many such exits to
            spread evenly. Default 2, or as many as there are blocks before the last.
        threshold: in (0, 1]; default 0.9.
        weight: of the loss of each early exit.

    Shape: states [(x (B, P+N, D), layout), …] of all blocks → logits (B, K).
    Raises: BadInput for exits that are no blocks and for a threshold outside of (0, 1].
    Paper: BranchyNet, arXiv:1709.01686; a mechanism of Image Recognition with Online Lightweight Vision Transformer: A
        Survey, arXiv:2505.03113.
    Departs from the papers: without labels early exits learn from the last one.
    """

    slot = "readout"
    preserves = "none"
    wants_states = True
    wants_labels = True
    labels: Tensor | None = None
    # the host's final norm and head are not read
    no_gradient = ("norm.weight", "norm.bias", "head.weight", "head.bias")

    def __init__(
        self,
        dim: int,
        num_classes: int,
        depth: int,
        head_at: int | Sequence[int] = 2,
        threshold: float = 0.9,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(head_at, int):
            if not 0 <= head_at < depth:
                raise BadInput(f"early-exit: head_at={head_at} exits need as many blocks before the last of {depth}.")
            early = [round(depth * (i + 1) / (head_at + 1)) for i in range(head_at)]
        else:
            early = sorted(set(head_at) - {depth})
            if any(not 1 <= block < depth for block in early):
                raise BadInput(f"early-exit: head_at={list(head_at)} must be blocks from 1 to {depth}.")
        if not 0 < threshold <= 1:
            raise BadInput(f"early-exit: threshold={threshold} must be above 0 and at most 1, such as 0.9.")
        self.blocks, self.threshold, self.weight = (*early, depth), threshold, weight
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in self.blocks)
        self.heads = nn.ModuleList(nn.Linear(dim, num_classes) if num_classes else nn.Identity() for _ in self.blocks)
        for head in self.heads:
            if isinstance(head, nn.Linear):
                nn.init.trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        head_at: int | Sequence[int] | None = None,
        threshold: float = 0.9,
        weight: float = 1.0,
    ) -> EarlyExit:
        """The host's classifier is not at hand here, so ``warm`` changes nothing."""
        exits = min(2, spec.num_blocks - 1) if head_at is None else head_at
        return cls(spec.dim, spec.num_classes, spec.num_blocks, exits, threshold, weight)

    def forward(self, states: States, layout: TokenLayout) -> Tensor:
        logits = torch.stack(self.exits(states))
        if self.training:
            self._teach(logits, layout)
            chosen = logits[-1]
        else:
            index = self.first_sure(logits)
            chosen = logits.gather(0, index[None, :, None].expand(1, -1, logits.shape[-1]))[0]
        return layout.tap("logits", chosen, None, layout) if layout.tap is not None else chosen

    def exits(self, states: States) -> list[Tensor]:
        """Logits (B, K) of every exit."""
        if len(states) != self.blocks[-1]:
            raise BadInput(
                f"early-exit was made for {self.blocks[-1]} blocks and got the states of {len(states)}; swap it in "
                "again after blocks were removed."
            )
        return [self.exit(i, *states[block - 1]) for i, block in enumerate(self.blocks)]

    def exit(self, number: int, x: Tensor, layout: TokenLayout) -> Tensor:
        """Logits (B, K) of one exit from the tokens behind its block."""
        groups = dict(layout.prefix)
        if "class" in groups:
            pooled = x[:, layout.prefix_slice("class").start]
        else:
            pooled = layout.mean(x[:, layout.num_prefix :])
        return self.heads[number](self.norms[number](pooled))

    def first_sure(self, logits: Tensor) -> Tensor:
        """Number of the exit each image takes, (B,), from logits (E, B, K)."""
        sure = self.sure(logits)
        sure[-1] = True
        return sure.to(torch.uint8).argmax(0)

    def sure(self, logits: Tensor) -> Tensor:
        return logits.float().softmax(-1).amax(-1) > self.threshold

    def _teach(self, logits: Tensor, layout: TokenLayout) -> None:
        wanted = logits[-1].detach().float().log_softmax(-1)
        for i, block in enumerate(self.blocks[:-1]):
            found = logits[i].float()
            if self.labels is not None:
                loss = F.cross_entropy(found, self.labels)
            else:
                loss = F.kl_div(found.log_softmax(-1), wanted, log_target=True, reduction="batchmean")
            layout.aux["early-exit", block - 1] = self.weight * loss

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, threshold={self.threshold}"


@torch.no_grad()
def exit_early(vit: ViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Run a host with :class:`EarlyExit` block by block, and only on the images that are still in doubt.

    Args:
        vit: in eval mode. images: (B, C, H, W), normalised.

    Returns: logits (B, K), equal to ``vit(images)``, and the number of blocks each image went through (B,).

    Raises: BadInput if the read-out is another one. ValueError if tokens were merged or padded, or blocks keep
        something for later ones, since images then cannot be told apart.
    """
    read = vit.read_out
    if not isinstance(read, EarlyExit):
        raise BadInput(f"exit_early needs the read-out early-exit; this model has {type(read).__name__}.")
    x, layout = vit.embed(images)
    left = torch.arange(len(images), device=x.device)
    depth = torch.full((len(images),), read.blocks[-1], device=x.device)
    logits: Tensor | None = None
    start = 0
    for number, block in enumerate(read.blocks):
        for module in vit.blocks[start:block]:
            x, layout = module(x, layout) if getattr(module, "takes_layout", False) else (module(x), layout)
        layout.require_full_grid("exit_early")
        if layout.memory:
            raise ValueError(f"exit_early cannot split what {', '.join(layout.memory)} keeps for later blocks.")
        start = block
        found = read.exit(number, x, layout)
        if logits is None:
            logits = found.new_zeros(len(images), found.shape[-1])
        done = read.sure(found) if block != read.blocks[-1] else torch.ones_like(left, dtype=torch.bool)
        logits[left[done]] = found[done]
        depth[left[done]] = block
        x, left = x[~done], left[~done]
        if not len(left):
            break
    assert logits is not None
    return logits, depth

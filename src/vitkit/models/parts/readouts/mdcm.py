"""Blocks of different depth as the scales of MDCM's head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.mdcm import Cues, Grid, MultiScaleCues
from vitkit.models.spec import PartSpec

# B batch · P prefix tokens · N patches · D width · K classes

States = list[tuple[Tensor, TokenLayout]]


class MDCMReadout(nn.Module):
    """Reads the patches of S chosen blocks with :class:`~vitkit.models.mdcm.MultiScaleCues`, shallow to deep.

    A plain ViT has one grid, so "fine to coarse" becomes "shallow to deep"; pyramids have
    :class:`vitkit.models.backbones.mdcm_host.MDCM`. Class token and registers are not read: every stage has a class
    token of its own. The host's final norm and head are not read either. Labels may be handed in as
    ``vit(images, target=labels)``; a study's training does so by itself.

    Args:
        dim: D of the host.
        num_classes: K.
        depths: the blocks that are read, ascending.
        heads: of the stages' layers.
        mlp_ratio: of the stages' layers.
        width: of the heads.
        keep: share of the tokens that each stage reads; None: evenly spaced from 0.25 to 0.75.
        suppress: β, how far cues of one stage are suppressed in the next, in [0, 1]; training only.
        top: share of a stage's places whose cues are suppressed.
        score: of a token, "logit" (its largest logit) or "entropy" (how sure its probabilities are).
        gate: False weighs all stages alike.
        diversity: weight of the cosine between the stages' cue maps.
        background: weight of the loss that makes rejected tokens unsure.
        stage_loss: weight of the stages' own cross-entropies.
        smoothing: of the labels in those.

    Shape: states [(x (B, P+N, D), layout), …] of all blocks → logits (B, K).
    Raises: BadInput for depths that the host has not got; ValueError where tokens were merged, dropped or padded.
    Paper: Multi-scale Activation, Refinement, and Aggregation: Exploring Diverse Cues for Fine-Grained Bird
        Recognition, arXiv:2504.09215.
    Departs from the paper: see the head; that a host without scales is read at several depths is ours.
    """

    slot = "readout"
    preserves = "none"
    wants_states = True
    # the host's final norm and head are not read
    no_gradient = ("norm.weight", "norm.bias", "head.weight", "head.bias")

    def __init__(
        self,
        dim: int,
        num_classes: int,
        depths: Sequence[int],
        heads: int | None = None,
        mlp_ratio: float = 4.0,
        width: int | None = None,
        keep: Sequence[float] | float | None = None,
        suppress: float = 0.5,
        top: float = 0.2,
        score: str = "logit",
        gate: bool = True,
        diversity: float = 0.1,
        background: float = 0.1,
        stage_loss: float = 1.0,
        smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.depths = tuple(depths)
        self.cue_head = MultiScaleCues(
            [dim] * len(self.depths), num_classes, width or min(512, dim), heads, mlp_ratio, keep, suppress, top,
            score, gate, diversity, background, stage_loss, smoothing,
        )  # fmt: skip

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        stages: int | Sequence[int] = 3,
        width: int | None = None,
        keep: Sequence[float] | float | None = None,
        suppress: float = 0.5,
        top: float = 0.2,
        score: str = "logit",
        gate: bool = True,
        diversity: float = 0.1,
        background: float = 0.1,
        stage_loss: float = 1.0,
        smoothing: float = 0.1,
    ) -> MDCMReadout:
        """The host's classifier reads something else, so ``warm`` changes nothing.

        Args:
            stages: how many blocks, evenly spread up to the last (at most as many as there are), or which.
            width: D of the heads; None: the host's, at most 512.
        """
        width = width or min(512, spec.dim)
        heads = spec.num_heads if width == spec.dim else None
        return cls(
            spec.dim, spec.num_classes, chosen_depths(stages, spec.num_blocks), heads, spec.mlp_ratio, width, keep,
            suppress, top, score, gate, diversity, background, stage_loss, smoothing,
        )  # fmt: skip

    def forward(self, states: States, layout: TokenLayout) -> Tensor:
        tokens, grids = self._stages(states)
        z = self.cue_head.read(tokens, grids, layout.aux, layout.cond.get("target"))
        logits = self.cue_head.answer(z)
        return layout.tap("logits", logits, None, layout) if layout.tap is not None else logits

    def cues(self, states: States, target: Tensor | None = None) -> Cues:
        """Maps, gate and answers of the stages; ``target`` (B,) chooses the class of the maps.

        >>> import torch, vitkit
        >>> vit = vitkit.build("vit_femto", img_size=28, in_chans=1, num_classes=5, readout="mdcm").eval()
        >>> states = []
        >>> _ = vit.run(*vit.embed(torch.rand(2, 1, 28, 28)), states)
        >>> cues = vit.read_out.cues(states)
        >>> [tuple(m.shape) for m in cues.maps], tuple(cues.gate.shape)
        ([(2, 7, 7), (2, 7, 7), (2, 7, 7)], (2, 3))
        """
        return self.cue_head.cues(*self._stages(states), target)

    def _stages(self, states: States) -> tuple[list[Tensor], list[Grid]]:
        if self.depths[-1] >= len(states):
            raise BadInput(
                f"MDCM reads the blocks {list(self.depths)}, but the host gave the states of {len(states)}; put the "
                "read-out in again after blocks were removed."
            )
        tokens, grids = [], []
        for depth in self.depths:
            x, layout = states[depth]
            grid = layout.require_full_grid("MDCM")
            tokens.append(x[:, layout.num_prefix :])
            grids.append((grid[0], grid[1]) if len(grid) == 2 else (x.shape[1] - layout.num_prefix, 1))
        return tokens, grids

    def extra_repr(self) -> str:
        return f"depths={list(self.depths)}"


def chosen_depths(stages: int | Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Block numbers, ascending.

    >>> chosen_depths(3, 12), chosen_depths([-1, 2], 4)
    ((3, 7, 11), (2, 3))

    Raises: BadInput for a number below 1, or blocks that are not there.
    """
    if isinstance(stages, int):
        if stages < 1:
            raise BadInput(f"stages={stages} must be at least 1, or a list of blocks.")
        num = min(stages, num_blocks)
        return tuple(num_blocks * (i + 1) // num - 1 for i in range(num))
    found = sorted({d % num_blocks for d in stages if -num_blocks <= d < num_blocks})
    if len(found) != len(stages) or not found:
        raise BadInput(f"stages={list(stages)} must be different blocks from 0 to {num_blocks - 1}.")
    return tuple(found)

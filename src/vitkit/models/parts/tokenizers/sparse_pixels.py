"""Tokens that are single pixels, the few that a small convolutional net picks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.layout import LogitEdit, TokenLayout
from vitkit.models.pixel_selection import PixelBudget, PixelSelector, Selection, distillation
from vitkit.models.spec import PartSpec

# B images · C channels · k chosen pixels · D embedding · P prefix tokens · H heads


class SparsePixels(nn.Module):
    """SparseAttnNet's choice of pixels in front of any plain ViT: k tokens, each one pixel.

    Every pixel gets a score F; the k pixels of largest ``A = σ(F)`` become tokens
    ``e_i = A_i·MLP(row, column, value)``; see :class:`~vitkit.models.backbones.sparse_attn_net.SparseAttnNet` for the
    network of the paper and for how k follows the training loss. The host's position table is read by bilinear
    interpolation at the place of each pixel.

    The scorer learns through the gates A, and in training from the auxiliary loss ``λ·KL(w ‖ softmax F)`` with w the
    attention to the pixels in the host's last block: of the class token, or of the mean patch query where there is
    none; softmax, mean over heads, renormalised. Hosts without attention, and blocks in which tokens were merged or
    dropped, give no such loss.

    Args:
        share: k at the start over H·W. None: as many tokens as the host had patches.
        least: lower bound of that share. None: a sixth of ``share``.
        most: upper bound. None: 5/3 of ``share``, at most 1; ``share`` itself if that is None, so that by default the
            host never gets more tokens than it had patches.
        adaptive: False keeps k.
        every: epochs between comparisons of the training loss.
        tolerance: τ, relative improvement that makes k smaller.
        explore: ε, share of the k drawn at random in training.
        distill: λ, 0 leaves the auxiliary loss out.
        bands: frequencies of the places, 0: the plain numbers.

    Shape: images (B, C, H, W) → (B, k, D) and a layout whose grid is the H×W pixels, with ``coords`` and ``source``.
        Images of another size run with k scaled.
    Raises: BadInput for impossible shares, other channels, or behind another part that makes tokens.
    Paper: Hierarchical Sparse Attention Framework for Computationally Efficient Classification of Biological Cells,
        arXiv:2505.07661.
    Departs from the paper: the paper's classifier is the backbone; this is its first half for other hosts. Default
        share and the position table are ours; the others as in the backbone. Patch weights have nothing to give, so
        ``warm`` changes nothing.
    """

    slot = "tokenizer"
    preserves = "none"

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        share: float | None = None,
        least: float | None = None,
        most: float | None = None,
        adaptive: bool = True,
        every: int = 2,
        tolerance: float = 0.01,
        explore: float = 0.1,
        distill: float = 0.5,
        bands: int = 4,
    ) -> SparsePixels:
        if getattr(old, "slot", None) == "tokenizer" and not isinstance(old, cls):
            raise BadInput(
                f"sparse-pixels takes the place of the patch embedding, but the tokenizer is {type(old).__name__}; put "
                "sparse-pixels in first."
            )
        host_grid = old.host_grid if isinstance(old, cls) else spec.grid
        if share is None:
            share = min(1.0, host_grid[0] * host_grid[1] / (spec.image_size[0] * spec.image_size[1]))
            most = share if most is None else most
        budget = PixelBudget(spec.image_size, share, least, most, every, tolerance, adaptive)
        selector = PixelSelector(spec.in_chans, spec.dim, budget, explore, bands)
        return cls(selector, spec.image_size, host_grid, distill)

    def __init__(
        self, selector: PixelSelector, img_size: tuple[int, int], host_grid: tuple[int, int], distill: float = 0.5
    ) -> None:
        super().__init__()
        if not distill >= 0:
            raise BadInput(f"distill={distill} must be 0 or more.")
        self.selector, self.distill = selector, distill
        self.img_size, self.patch_size, self.grid_size = img_size, (1, 1), img_size
        #: the grid that the host's position table was made for
        self.host_grid = host_grid

    @property
    def budget(self) -> PixelBudget:
        """k and its schedule."""
        return self.selector.budget

    @property
    def num_patches(self) -> int:
        """k, tokens of an image of ``img_size``."""
        return self.budget.count

    def dynamic_feat_size(self, img_size: Sequence[int]) -> tuple[int, int]:
        """The grid of an image: its pixels."""
        return int(img_size[0]), int(img_size[1])

    def select(self, images: Tensor) -> Selection:
        """The pixels of ``images`` as the model sees them (normalised); ``to_map()`` lays them out."""
        return self.selector.select(images)

    def forward(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        chosen = self.select(images)
        tokens = self.selector.embed(images, chosen)
        rows = torch.arange(chosen.pixels.shape[1], device=images.device).expand_as(chosen.pixels)
        source = torch.full((rows.shape[0], chosen.size[0] * chosen.size[1]), -1, device=images.device)
        edits: tuple[LogitEdit, ...] = ()
        if self.training and self.distill:
            # the logits of the host are the one place where its attention can be seen; nothing is added to them
            edits = (LogitEdit("distillation of the pixel scores", "add", _Teacher(chosen.scores, self.distill)),)
        return tokens, TokenLayout(
            grid=chosen.size, coords=chosen.coords, source=source.scatter(1, chosen.pixels, rows), edits=edits
        )

    def pick_positions(self, table: Tensor, grid: tuple[int, ...], layout: TokenLayout) -> Tensor:
        """(B, k, D): the host's table (1, N, D), read between its cells at the places of the pixels."""
        cells = table.unflatten(1, self.host_grid).permute(0, 3, 1, 2).float()
        coords = layout.coordinates(table.device)
        # grid_sample wants (x, y) in [-1, 1]
        places = coords.flip(-1).unsqueeze(1) * 2 - 1
        found = F.grid_sample(
            cells.expand(places.shape[0], -1, -1, -1), places.to(cells), padding_mode="border", align_corners=False
        )
        return found.squeeze(2).transpose(1, 2).to(table.dtype)

    def extra_repr(self) -> str:
        return f"distill={self.distill}"


class _Teacher:
    """Looks at the queries and keys of a block, writes the auxiliary loss, and adds zero to the logits."""

    def __init__(self, scores: Tensor, factor: float) -> None:
        self.scores, self.factor = scores, factor

    def __call__(self, q: Tensor, k: Tensor, layout: TokenLayout) -> Tensor:
        num_prefix = layout.num_prefix
        if k.shape[2] - num_prefix == self.scores.shape[1] and layout.sizes is None:
            at = layout.prefix_slice("class") if "class" in dict(layout.prefix) else slice(num_prefix, None)
            query = q[:, :, at].detach().mean(2, keepdim=True)
            logits = query @ k.detach().transpose(-2, -1) * q.shape[-1] ** -0.5
            weights = logits.float().softmax(-1).mean(1)[:, 0, num_prefix:]
            # one entry, overwritten by every block: the last one stays
            layout.aux["sparse-pixels", 0] = self.factor * distillation(weights, self.scores)
        return q.new_zeros(1, 1, 1, k.shape[2])

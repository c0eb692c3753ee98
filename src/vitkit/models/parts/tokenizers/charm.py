"""Patches of an image at several scales under a token budget, without cropping it or changing its aspect."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.errors import BadInput, unknown
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.tokenizers.cell_scores import entropy, frequency, gradient
from vitkit.models.spec import PartSpec

# B images · C channels · D embedding · L budget · S scales, 0 the coarsest · p patch side
# A cell is K×K patches, K = 2^(S−1); at scale s it is resized to k_s×k_s patches, k_{S−1} = K
# H_c×W_c cells in an image · n_s of them at scale s · N tokens

SELECTIONS = ("random", "saliency", "frequency", "gradient", "entropy")
# image sizes whose fixed draw is remembered
_MAX_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class CharmPlan:
    """What becomes of an image of one size; all of it follows from the size alone.

    Attributes:
        size: (H, W) that is padded or cropped, in pixels; smaller than the image if that was shrunk first.
        padded: (H', W') after padding or cropping at the lower and right border.
        cells: (H_c, W_c); (0, 0) for an image within the budget, which gives ordinary patches.
        counts: n_0 … n_{S−1}, cells kept at each scale; empty within the budget.
        kept_coarse: tokens of scale 0 that stay; the others are dropped at random.
        num_coarse: tokens of scale 0 before dropping.
        num_tokens: N.
    """

    size: tuple[int, int]
    padded: tuple[int, int]
    cells: tuple[int, int] = (0, 0)
    counts: tuple[int, ...] = ()
    kept_coarse: int = 0
    num_coarse: int = 0
    num_tokens: int = 0

    @property
    def dropped_share(self) -> float:
        """Share of the tokens of scale 0 that the budget has no place for."""
        return 1 - self.kept_coarse / self.num_coarse if self.num_coarse else 0.0


@dataclass(frozen=True, eq=False)
class CharmLayout(TokenLayout):
    """A layout that also knows where its tokens come from.

    Attributes:
        plans: of every image; one if they all have the same size.
        table_rows: (1 or B, N), each token's row in the position tables of all scales, one after another; None while
            all images are within the budget.
    """

    plans: tuple[CharmPlan, ...] = ()
    table_rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Arrangement:
    """Which patches are shown: of one image for all, or of every image (first axis 1 or B).

    places: per scale, patch numbers on its whole grid; the others as in :class:`CharmLayout`.
    """

    places: tuple[Tensor, ...]
    coords: Tensor
    scale_id: Tensor
    table_rows: Tensor
    source: Tensor


class Charm(nn.Module):
    """Tokens for images of any size: some cells at full resolution, the rest downscaled, never more than a budget.

    An image with at most L patches gives exactly the host's tokens (padded to whole patches, positions interpolated to
    its grid). A larger one is padded or cropped, whichever touches fewer pixels, to whole cells of K×K patches,
    ``K = 2^{S−1}``. ``n_{S−1} = ⌊(L/S)/K²⌋`` cells keep their resolution; then for s = S−2 … 1,
    ``n_s = ⌊(L/S)/k_s²⌋`` of the others are shown at ``k_s/K`` of it, and all that is left at ``k_0/K``, where
    ``k_s = ⌈f_s K⌉`` and ``f_s = f + s(1−f)/(S−1)``. The host's own patch projection embeds all of them. Tokens go
    scale 0 … S−1, cells and patches in raster order. If they are more than L, tokens of scale 0 are dropped at random.
    A token's position is the host's table, interpolated to the whole grid of its scale and read at its place, plus a
    learned vector of its scale.

    In training, cells are drawn anew at every call from torch's global random state: an augmentation. In evaluation
    the draw is fixed, the same for all images, whatever else is in the batch; ``average_draws`` averages several.

    Args:
        budget: L, patch tokens at most. None: half of the host's grid, but no less than one full-resolution cell needs
            (S·K²), raised until no token of the host's own image size is dropped.
        scales: S ≥ 2.
        factor: f in (0, 1), resolution of the coarsest scale.
        select: which cells keep their resolution. "random"; "frequency", "gradient" and "entropy" draw n from the 2n
            cells with the highest score (scales between: from ranks 2n … 4n); "saliency" draws from those whose mask
            sum exceeds half the largest.
        saliency: for ``select="saliency"``: images (B, C, H, W) → masks (B, H, W), non-negative.
        eval_repeats: draws that :func:`average_draws` averages in evaluation.
        see_padding: let the encoder see the padding of a batch with several sizes, as a learned token. Default: padding
            is masked.
        freeze_scale: leave the scale vectors as drawn.
        shrink_above: share in (0, 1]. When the budget would drop more of the tokens of scale 0 than this, the image is
            shrunk first, just enough.
        seed: of the draws in evaluation.

    Shape: images (B, C, H, W), or a list of (C, H_i, W_i) of different sizes → (B, N, D) and a layout with
    ``scale_id``, ``coords``, ``source`` and, for a list, ``valid``. One size is one vectorised pass; a list loops over
    its images. The layout's grid counts patches at full resolution.
    Raises: BadInput if an option is out of range, rounding makes two scales equal, saliency has no masks, images have
        other channels than the host, or the host's tokenizer is no plain patch projection.
    Paper: Charm: The Missing Piece in ViT fine-tuning for Image Aesthetic Assessment, arXiv:2504.02522.
    Departs from the paper: padding is masked in attention; scale vectors are trained, and added only to images over
        the budget; only tokens of scale 0 are dropped, since dropping the others would undo the selection; the whole
        image is resized once per scale, not cell by cell, which leaves seams; default budget and shrinking are ours.
        On a host without a position table (a part that replaces it) the scale vectors have no effect.
    """

    slot = "tokenizer"
    preserves = "approx"

    def __init__(
        self,
        proj: nn.Conv2d,
        norm: nn.Module | None = None,
        img_size: tuple[int, int] = (224, 224),
        budget: int | None = None,
        scales: int = 2,
        factor: float = 0.5,
        select: str = "random",
        saliency: Callable[[Tensor], Tensor] | None = None,
        eval_repeats: int = 1,
        see_padding: bool = False,
        freeze_scale: bool = False,
        shrink_above: float = 0.7,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.patch_size = (int(proj.kernel_size[0]), int(proj.kernel_size[1]))
        if proj.stride != proj.kernel_size:
            raise BadInput(f"Charm needs patches side by side; this projection has stride {proj.stride}.")
        if select not in SELECTIONS:
            raise unknown("selection of cells", select, SELECTIONS, "vitkit show charm")
        if (select == "saliency") != (saliency is not None):
            raise BadInput(
                'select="saliency" and saliency=… (a callable, images (B, C, H, W) → masks (B, H, W)) belong together.'
            )
        if eval_repeats < 1 or not 0 < shrink_above <= 1:
            raise BadInput(f"eval_repeats={eval_repeats} must be at least 1, shrink_above={shrink_above} in (0, 1].")
        self.sides = scale_sides(scales, factor)
        self.proj = proj
        self.norm = norm if norm is not None else nn.Identity()
        self.img_size = img_size
        self.grid_size = (img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.scales, self.factor, self.select, self.saliency = scales, factor, select, saliency
        self.eval_repeats, self.shrink_above, self.seed = eval_repeats, shrink_above, seed
        self.draw = 0
        self._fixed_arrangements: dict[tuple[CharmPlan, int, int, torch.device], _Arrangement] = {}
        if budget is not None and budget < scales:
            raise BadInput(f"budget={budget} tokens cannot hold {scales} scales; give at least {scales}.")
        self.budget = budget if budget is not None else self._default_budget()
        self.scale_embed = nn.Parameter(
            torch.empty(scales, proj.out_channels).normal_(std=0.02), requires_grad=not freeze_scale
        )
        # a masked row has no effect, so its vector is learned only where the encoder sees it
        self.mask_token = nn.Parameter(torch.empty(proj.out_channels).normal_(std=0.02)) if see_padding else None

    @classmethod
    def from_standard(
        cls,
        old: nn.Module | None,
        spec: PartSpec,
        warm: bool = True,
        budget: int | None = None,
        scales: int = 2,
        factor: float = 0.5,
        select: str = "random",
        saliency: Callable[[Tensor], Tensor] | None = None,
        eval_repeats: int = 1,
        see_padding: bool = False,
        freeze_scale: bool = False,
        shrink_above: float = 0.7,
        seed: int = 0,
    ) -> Charm:
        """Around the host's own patch projection, or with ``warm=False`` around a fresh one of the same shape."""
        proj = getattr(old, "proj", None)
        if not isinstance(proj, nn.Conv2d) or getattr(old, "slot", None) is not None:
            raise BadInput(
                f"Charm wraps a plain patch projection, but the host's tokenizer is {type(old).__name__}; undo that "
                "swap before this one."
            )
        if not warm:
            proj = nn.Conv2d(
                spec.in_chans, spec.dim, spec.patch_size, stride=spec.patch_size, bias=proj.bias is not None
            )
        return cls(
            proj,
            getattr(old, "norm", None),
            spec.image_size,
            budget,
            scales,
            factor,
            select,
            saliency,
            eval_repeats,
            see_padding,
            freeze_scale,
            shrink_above,
            seed,
        )

    # -- what happens to a size --------------------------------------------------------------------------------

    def plan(self, size: tuple[int, int]) -> CharmPlan:
        """The :class:`CharmPlan` of images of ``size`` (H, W) in pixels."""
        return self._plan(size, self.budget)

    def _plan(self, size: tuple[int, int], budget: int) -> CharmPlan:
        plan = self._plan_without_shrinking(size, budget)
        percent = 100
        while plan.dropped_share > self.shrink_above and percent > 1:
            percent -= 1
            smaller = (max(1, size[0] * percent // 100), max(1, size[1] * percent // 100))
            plan = self._plan_without_shrinking(smaller, budget)
        return plan

    def _plan_without_shrinking(self, size: tuple[int, int], budget: int) -> CharmPlan:
        (height, width), (p_h, p_w) = size, self.patch_size
        rows, cols = -(-height // p_h), -(-width // p_w)
        if rows * cols <= budget:
            return CharmPlan(size=size, padded=(rows * p_h, cols * p_w), num_tokens=rows * cols)
        largest = self.sides[-1]
        cells = (_whole(height, largest * p_h), _whole(width, largest * p_w))
        left = cells[0] * cells[1]
        counts = [0] * self.scales
        for scale in range(self.scales - 1, 0, -1):
            counts[scale] = min(left, budget // self.scales // self.sides[scale] ** 2)
            left -= counts[scale]
        counts[0] = left
        fine = sum(n * side**2 for n, side in zip(counts[1:], self.sides[1:]))
        num_coarse = counts[0] * self.sides[0] ** 2
        kept = min(num_coarse, budget - fine)
        return CharmPlan(
            size=size,
            padded=(cells[0] * largest * p_h, cells[1] * largest * p_w),
            cells=cells,
            counts=tuple(counts),
            kept_coarse=kept,
            num_coarse=num_coarse,
            num_tokens=fine + kept,
        )

    def _default_budget(self) -> int:
        lowest = max(self.num_patches // 2, self.scales * self.sides[-1] ** 2)
        fits = (b for b in range(lowest, self.num_patches) if not self._plan(self.img_size, b).dropped_share)
        return next(fits, max(lowest, self.num_patches))

    # -- tokens ------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor | Sequence[Tensor]) -> tuple[Tensor, TokenLayout]:
        if isinstance(images, Tensor):
            return self._equal_sizes(images)
        return self._pack([self._equal_sizes(image[None]) for image in images])

    def _equal_sizes(self, images: Tensor) -> tuple[Tensor, TokenLayout]:
        if images.ndim != 4 or images.shape[1] != self.proj.in_channels:
            raise BadInput(
                f"Charm was built for images of {self.proj.in_channels} channels, (B, C, H, W) or a list of (C, H, W); "
                f"it got {tuple(images.shape)}."
            )
        plan = self.plan((images.shape[-2], images.shape[-1]))
        if plan.size != tuple(images.shape[-2:]):
            images = _resize(images, plan.size)
        images = _fit(images, plan.padded)
        if not plan.counts:
            grid = (plan.padded[0] // self.patch_size[0], plan.padded[1] // self.patch_size[1])
            return self._embed(images).flatten(2).transpose(1, 2).contiguous(), CharmLayout(grid=grid, plans=(plan,))
        shown = self._arrangement(images, plan)
        batch, tokens = images.shape[0], []
        for scale, place in enumerate(shown.places):
            if not place.shape[1]:
                continue
            size = tuple(n // self.sides[-1] * self.sides[scale] for n in plan.padded)
            table = self._embed(images if scale == self.scales - 1 else _resize(images, size)).flatten(2).mT
            tokens.append(table.gather(1, place.unsqueeze(-1).expand(batch, -1, table.shape[-1])))
        layout = CharmLayout(
            grid=(plan.cells[0] * self.sides[-1], plan.cells[1] * self.sides[-1]),
            coords=shown.coords.expand(batch, -1, -1),
            scale_id=shown.scale_id.expand(batch, -1),
            source=shown.source.expand(batch, -1),
            plans=(plan,),
            table_rows=shown.table_rows,
        )
        return torch.cat(tokens, dim=1), layout

    def _arrangement(self, images: Tensor, plan: CharmPlan) -> _Arrangement:
        """Drawn for every image, or, where the draw is fixed and blind to the image, once for all and kept."""
        if self.training or self.select != "random":
            return self._arrange(images, plan)
        # stands for any one image
        nobody = torch.empty(1, device=images.device)
        # what a tracer makes are not the values themselves, and must not stay
        if torch.compiler.is_compiling() or type(images) is not Tensor:
            return self._arrange(nobody, plan)
        key = (plan, self.seed, self.draw, images.device)
        if key not in self._fixed_arrangements:
            if len(self._fixed_arrangements) >= _MAX_KEPT:
                self._fixed_arrangements.clear()
            # tensors of inference mode could not take part in training later
            with torch.inference_mode(False), torch.no_grad():
                self._fixed_arrangements[key] = self._arrange(nobody, plan)
        return self._fixed_arrangements[key]

    def _arrange(self, images: Tensor, plan: CharmPlan) -> _Arrangement:
        chosen = self._choose(images, plan)
        places, coords, scale_ids, rows = [], [], [], []
        first_row = 0
        for scale, cells in enumerate(chosen):
            place = self._places(cells, scale, plan)
            if scale == 0 and plan.kept_coarse < plan.num_coarse:
                order = self._random(place.shape, images.device, stream=0).argsort(dim=1)
                place = place.gather(1, order[:, : plan.kept_coarse].sort(dim=1).values)
            grid_h, grid_w = (n * self.sides[scale] for n in plan.cells)
            row = torch.div(place, grid_w, rounding_mode="floor")
            places.append(place)
            coords.append(torch.stack([(row + 0.5) / grid_h, (place - row * grid_w + 0.5) / grid_w], dim=-1))
            scale_ids.append(torch.full_like(place, scale))
            rows.append(place + first_row)
            first_row += grid_h * grid_w
        table_rows = torch.cat(rows, dim=1)
        return _Arrangement(
            places=tuple(places),
            coords=torch.cat(coords, dim=1),
            scale_id=torch.cat(scale_ids, dim=1),
            table_rows=table_rows,
            source=self._source(chosen, table_rows, plan),
        )

    def _embed(self, images: Tensor) -> Tensor:
        """(B, C, h·p, w·p) → (B, D, h, w) by the host's projection and norm."""
        x = self.proj(images)
        return x if isinstance(self.norm, nn.Identity) else self.norm(x.movedim(1, -1)).movedim(-1, 1)

    def _places(self, cells: Tensor, scale: int, plan: CharmPlan) -> Tensor:
        """Cells (B, n) → (B, n·k_s²) patch numbers on the scale's whole grid, cell by cell."""
        side, cells_w = self.sides[scale], plan.cells[1]
        inside = torch.arange(side, device=cells.device)
        offset = (inside[:, None] * (cells_w * side) + inside).flatten()
        row = torch.div(cells, cells_w, rounding_mode="floor")
        corner = row * side * (cells_w * side) + (cells - row * cells_w) * side
        return (corner[:, :, None] + offset).flatten(1)

    def _source(self, chosen: list[Tensor], table_rows: Tensor, plan: CharmPlan) -> Tensor:
        """(B, N_1): the row that shows the centre of every full-resolution patch, -1 where it was dropped."""
        batch, num_tokens = table_rows.shape
        (cells_h, cells_w), largest = plan.cells, self.sides[-1]
        device = table_rows.device
        scale_of = torch.zeros(batch, cells_h * cells_w, dtype=torch.long, device=device)
        for number, cells in enumerate(chosen):
            scale_of = scale_of.scatter(1, cells, number)
        rows = torch.arange(cells_h * largest, device=device)[:, None].expand(-1, cells_w * largest).flatten()
        cols = torch.arange(cells_w * largest, device=device).repeat(cells_h * largest)
        cell = torch.div(rows, largest, rounding_mode="floor") * cells_w + torch.div(
            cols, largest, rounding_mode="floor"
        )
        scale = scale_of[:, cell]
        side = torch.tensor(self.sides, device=device)
        own = side[scale]
        # patch centre (r + ½)/K of the cell grid, times k_s, in whole numbers
        row = torch.div((2 * rows + 1) * own, 2 * largest, rounding_mode="floor")
        col = torch.div((2 * cols + 1) * own, 2 * largest, rounding_mode="floor")
        # one table for all scales: a block of k_s² times the cells each
        start = F.pad(side.square().cumsum(0), (1, 0))[:-1] * (cells_h * cells_w)
        wanted = start[scale] + row * (cells_w * own) + col
        total = cells_h * cells_w * sum(s**2 for s in self.sides)
        held = torch.full((batch, total), -1, dtype=torch.long, device=device)
        held = held.scatter(1, table_rows, torch.arange(num_tokens, device=device).expand(batch, -1))
        return held.gather(1, wanted)

    def _pack(self, parts: list[tuple[Tensor, TokenLayout]]) -> tuple[Tensor, TokenLayout]:
        """Images of different sizes, each (1, N_i, D), as one batch padded to the longest."""
        if not parts:
            raise BadInput("Charm got an empty list of images.")
        longest = max(x.shape[1] for x, _ in parts)
        grid = (max(t.grid[0] for _, t in parts), max(t.grid[1] for _, t in parts))
        device = parts[0][0].device
        tokens, coords, scale_ids, rows, sources, lengths = [], [], [], [], [], []
        for x, layout in parts:
            missing = longest - x.shape[1]
            if self.mask_token is not None:
                tokens.append(torch.cat([x, self.mask_token.to(x.dtype).expand(1, missing, -1)], dim=1))
            else:
                tokens.append(F.pad(x, (0, 0, 0, missing)))
            coord = layout.coordinates(device).expand(1, -1, -1) if layout.coords is None else layout.coords
            coords.append(F.pad(coord, (0, 0, 0, missing)))
            # patches of an image within the budget are at full resolution
            scale_id = layout.scale_id
            if scale_id is None:
                scale_id = torch.full(x.shape[:2], self.scales - 1, device=device)
            scale_ids.append(F.pad(scale_id, (0, missing)))
            table_rows = getattr(layout, "table_rows", None)
            rows.append(torch.zeros_like(scale_ids[-1]) if table_rows is None else F.pad(table_rows, (0, missing)))
            source = layout.source_indices(1, device).unflatten(1, layout.grid)
            sources.append(
                F.pad(source, (0, grid[1] - source.shape[2], 0, grid[0] - source.shape[1]), value=-1).flatten(1)
            )
            lengths.append(x.shape[1])
        valid = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        packed = CharmLayout(
            grid=grid,
            coords=torch.cat(coords),
            valid=None if self.mask_token is not None else valid,
            source=torch.cat(sources),
            scale_id=torch.cat(scale_ids),
            plans=tuple(plan for _, layout in parts for plan in getattr(layout, "plans", ())),
            table_rows=torch.cat(rows),
        )
        return torch.cat(tokens), packed

    # -- positions ---------------------------------------------------------------------------------------------

    def pick_positions(self, table: Tensor, grid: tuple[int, ...], layout: TokenLayout) -> Tensor:
        """Rows of the host's position table for these tokens.

        Args:
            table: (1, N_host, D), the host's patch positions.
            grid: the table's cells (h, w).
            layout: as this tokenizer returned it.

        Returns: (1 or B, N, D). Padding gets zeros.
        """
        if not isinstance(layout, CharmLayout) or not layout.plans:
            raise BadInput("Charm picks positions only for the layout that it returned itself.")
        rows = layout.table_rows
        if rows is None or (len(layout.plans) == 1 and layout.valid is None):
            return self._positions(table, grid, layout.plans[0], rows)
        longest, packed = rows.shape[1], []
        for index, plan in enumerate(layout.plans):
            found = self._positions(table, grid, plan, rows[index : index + 1, : plan.num_tokens])
            packed.append(F.pad(found, (0, 0, 0, longest - plan.num_tokens)))
        return torch.cat(packed)

    def _positions(self, table: Tensor, grid: tuple[int, ...], plan: CharmPlan, rows: Tensor | None) -> Tensor:
        if not plan.counts:
            own = (plan.padded[0] // self.patch_size[0], plan.padded[1] // self.patch_size[1])
            return _interpolate(table, grid, own)
        per_scale = [
            _interpolate(table, grid, (plan.cells[0] * side, plan.cells[1] * side))[0] + self.scale_embed[scale]
            for scale, side in enumerate(self.sides)
        ]
        assert rows is not None
        return torch.cat(per_scale)[rows]

    # -- selection ---------------------------------------------------------------------------------------------

    def _choose(self, images: Tensor, plan: CharmPlan) -> list[Tensor]:
        """Cell numbers per scale 0 … S−1, each (B, n_s) in raster order; together every cell once."""
        num_cells = plan.cells[0] * plan.cells[1]
        shape = (images.shape[0], num_cells)
        scores = None if self.select == "random" else self._scores(images.detach(), plan)
        left = torch.ones(shape, dtype=torch.bool, device=images.device)
        chosen: list[Tensor] = []
        for scale in range(self.scales - 1, 0, -1):
            count = plan.counts[scale]
            priority = self._random(shape, images.device, stream=scale)
            if scores is not None:
                priority = self._prefer(scores, priority, left, count, first=scale == self.scales - 1)
            order = priority.masked_fill(~left, -torch.inf).argsort(dim=1, descending=True, stable=True)
            cells = order[:, :count].sort(dim=1).values
            left = left.scatter(1, cells, False)
            chosen.append(cells)
        rest = (~left).long().argsort(dim=1, stable=True)[:, : plan.counts[0]]
        return [rest, *reversed(chosen)]

    def _prefer(self, scores: Tensor, priority: Tensor, left: Tensor, count: int, first: bool) -> Tensor:
        """Random priorities (B, cells) in [0, 1), plus 1 in the pool to draw from; outside it the higher score wins."""
        if self.select == "saliency":
            scores = scores.masked_fill(~left, 0)
            pool = scores > 0.5 * scores.amax(dim=1, keepdim=True)
            rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        else:
            rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            pool = rank < 2 * count if first else (rank >= 2 * count) & (rank < 4 * count)
        return torch.where(pool, 1 + priority, 1 - (rank + 1) / (rank.shape[1] + 1))

    def _scores(self, images: Tensor, plan: CharmPlan) -> Tensor:
        """(B, cells), float32; larger is more worth its resolution."""
        if self.saliency is not None:
            masks = self.saliency(images)
            if masks.shape != (len(images), *plan.padded):
                raise BadInput(
                    f"saliency=… returned {tuple(masks.shape)} for images of {tuple(images.shape)}; it must return "
                    "one mask (H, W) an image."
                )
            return _cells_of(masks.float(), plan.cells).sum((-2, -1))
        score = {"frequency": frequency, "gradient": gradient, "entropy": entropy}[self.select]
        return score(_cells_of(images.float().mean(dim=1), plan.cells))

    def _random(self, shape: tuple[int, ...] | torch.Size, device: torch.device, stream: int) -> Tensor:
        """Numbers in [0, 1): torch's generator in training, a fixed function of the column in evaluation."""
        if self.training:
            return torch.rand(shape, device=device)
        return _fixed(shape[1], (self.seed * 65_537 + self.draw) * 16 + stream, device).expand(shape)

    def extra_repr(self) -> str:
        return f"budget={self.budget}, scales={self.scales}, factor={self.factor}, select={self.select!r}"


@torch.no_grad()
def average_draws(model: nn.Module, images: Tensor | Sequence[Tensor], repeats: int | None = None) -> Tensor:
    """Mean output of a model over several draws of cells; the model is left as found.

    Args:
        model: with a :class:`Charm` tokenizer somewhere inside, in eval mode.
        images: (B, C, H, W), or a list if the model takes one.
        repeats: number of draws; None: the tokenizer's ``eval_repeats``.

    Raises: BadInput if there is no such tokenizer, or the model is in training mode.
    """
    charm = next((m for m in model.modules() if isinstance(m, Charm)), None)
    if charm is None or charm.training:
        raise BadInput("average_draws needs a model with a Charm tokenizer, in eval mode.")
    before, total = charm.draw, repeats if repeats is not None else charm.eval_repeats
    try:
        outputs = []
        for charm.draw in range(total):
            outputs.append(model(images))
    finally:
        charm.draw = before
    return torch.stack(outputs).mean(0)


def scale_sides(scales: int, factor: float) -> tuple[int, ...]:
    """k_0 … k_{S−1}, patches along a cell's side at every scale: ``⌈(f + s(1−f)/(S−1))·2^{S−1}⌉``.

    >>> scale_sides(2, 0.5), scale_sides(3, 0.5)
    ((1, 2), (2, 3, 4))

    Raises: BadInput if ``scales`` is below 2, ``factor`` not in (0, 1), or two scales come out equal.
    """
    if scales < 2 or not 0 < factor < 1:
        raise BadInput(f"scales={scales} must be at least 2 and factor={factor} strictly between 0 and 1.")
    sides = _sides(scales, factor)
    if len(set(sides)) < scales:
        # from f = 1/2 downwards the S values spread over at least half of K
        works = next((f / 100 for f in range(50, 0, -1) if len(set(_sides(scales, f / 100))) == scales), None)
        advice = f"; factor={works} works" if works else "; take fewer scales"
        raise BadInput(f"With factor={factor}, rounding to whole patches makes scales equal ({sides}){advice}.")
    return sides


def _sides(scales: int, factor: float) -> tuple[int, ...]:
    largest = 2 ** (scales - 1)
    # the small number keeps 0.7·10 = 7.000000000000001 from becoming 8
    return tuple(math.ceil((factor + s * (1 - factor) / (scales - 1)) * largest - 1e-9) for s in range(scales))


def _whole(length: int, cell: int) -> int:
    """Cells along one side: cropped if that touches fewer pixels than padding, at least one."""
    rest = length % cell
    return max(1, length // cell + (1 if rest and cell - rest <= rest else 0))


def _fit(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros added or pixels cut at the lower and right border."""
    down, right = size[0] - images.shape[-2], size[1] - images.shape[-1]
    return images if down == right == 0 else F.pad(images, (0, right, 0, down))


def _resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    # in float32: antialiased resizing of half precision is not available everywhere
    shown = F.interpolate(images.float(), size=list(size), mode="bicubic", antialias=True, align_corners=False)
    return shown.to(images.dtype)


def _interpolate(table: Tensor, grid: tuple[int, ...], own: tuple[int, int]) -> Tensor:
    if tuple(grid) == own:
        return table
    return resample_abs_pos_embed(table, new_size=list(own), old_size=list(grid), num_prefix_tokens=0)


def _cells_of(values: Tensor, cells: tuple[int, int]) -> Tensor:
    """(B, H, W) → (B, cells, H/H_c, W/W_c)."""
    split = values.unflatten(2, (cells[1], -1)).unflatten(1, (cells[0], -1))
    return split.transpose(2, 3).flatten(1, 2)


def _fixed(count: int, seed: int, device: torch.device) -> Tensor:
    """(1, count) numbers in [0, 1) that look random: a 32-bit mix of the index, the same on every device.

    A random generator would do as well, but not inside a compiled or exported graph.
    """
    mask = 0xFFFFFFFF
    x = torch.arange(count, device=device) + (seed * 0x9E3779B1 & mask)
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 1)):
        x = x & mask
        x = (x ^ (x >> shift)) * factor
    return ((x & mask).double() / 2**32).float().clamp(max=1 - 2.0**-24)[None]

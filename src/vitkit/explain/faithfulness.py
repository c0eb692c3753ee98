"""Does a map show what the model uses? Scores that every explanation of an image classifier gets alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from vitkit.anatomy import Trace, expand, find_host, untouched
from vitkit.errors import BadInput, unknown
from vitkit.explain.base import Explanation, for_model, normalize, resolve_target, to_pixels
from vitkit.models.normalized import NormalizedModel

# B images · M = gh·gw cells · T steps · K draws

CONTROLS = ("random", "centred gaussian")


def score_explainers(
    model: nn.Module,
    images: Tensor,
    maps: Mapping[str, Tensor],
    targets: Tensor | None = None,
    steps: int = 20,
    chunk: int = 256,
    generator: torch.Generator | None = None,
    substrate: str | Tensor = "mean",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Every map by every measure, on the same images, cells and steps, with two maps that know nothing as controls.

    * ``deletion``: area under p_c while cells are replaced by the substrate, highest score first; low is good.
    * ``insertion``: area under p_c while they are put into the bare substrate; high is good.
    * ``insertion_minus_deletion``: high is good; 0 for an order that says nothing.
    * ``average_drop``: max(0, p−o)/p, where o is p_c on the image seen through the map scaled to [0, 1]; low is good.
    * ``average_increase``: 1 where o > p, else 0.
    * ``average_gain``: max(0, o−p)/(1−p).

    The last three are shares in [0, 1] (papers print them times 100). The rows ``random`` and ``centred gaussian``
    are always added.

    Args:
        model: a classifier on images in [0, 1].
        images: (B, C, H, W).
        maps: name → (B, gh, gw) raw scores; may be empty. Maps of unequal grids are brought to one grid (the host's
            patches, else the finest given) by bilinear interpolation, so that one step removes as much for all.
        targets: (B,) output c of each image; None is the predicted class.
        steps: T, equal steps from 0 to all cells; at most M.
        chunk: images in one forward.
        generator: of the random map (CPU); None is seeded with 0.
        substrate: "mean" is zero in the model's normalised space (the mean colour of a :class:`NormalizedModel`, else
            0), "blur" the image blurred with σ = 5 % of its side, or a tensor broadcastable to the images.
        progress: called as ``progress("faithfulness of <name>", done, total)``.

    Returns: name → measure → (B,) float32. Equal scores are removed in raster order.
    Raises: BadInput if a map is not (B, gh, gw) or holds NaN, a name is taken by a control, or steps < 1.

    Paper: deletion and insertion: Petsiuk et al., RISE, arXiv:1806.07421; average drop and increase: Chattopadhay et
    al., Grad-CAM++, arXiv:1710.11063; average gain: Zhang et al., Opti-CAM, arXiv:2301.07002.
    Departs from the papers: whole patches instead of pixels; one substrate for deletion and insertion.
    """
    taken = [name for name in maps if name in CONTROLS]
    if taken:
        raise BadInput(f"{taken[0]!r} is the name of a control that is added to every table; rename the map.")
    with untouched(model), torch.no_grad():
        images = for_model(model, images)
        cells = common_grid(model, images, maps)
        # one grid for all: on coarser cells one step would remove more, and areas would not compare
        scored = {name: _on_grid(_checked(name, m, images), cells) for name, m in maps.items()}
        scored |= control_maps(len(images), cells, images.device, generator)
        base = _substrate(model, images, substrate)
        targets = _targets(model, images, targets, chunk)
        ends = (_probability(model, images, targets, chunk), _probability(model, base, targets, chunk))
        table = {}
        for i, (name, patch_map) in enumerate(scored.items()):
            if progress is not None:
                progress(f"faithfulness of {name}", i, len(scored))
            table[name] = _score(model, images, base, patch_map, targets, steps, chunk, ends)
    return table


def deletion_curve(
    model: nn.Module,
    images: Tensor,
    patch_map: Tensor,
    targets: Tensor | None = None,
    steps: int = 20,
    chunk: int = 256,
    substrate: str | Tensor = "mean",
) -> tuple[Tensor, Tensor]:
    """p_c while the cells of the map are replaced by the substrate, highest score first.

    Args: as in :func:`score_explainers`.

    Returns: fractions of cells removed (T+1,), from 0 to 1, and probabilities (B, T+1).
    """
    return _public_curve(model, images, patch_map, targets, steps, chunk, substrate, insert=False)


def insertion_curve(
    model: nn.Module,
    images: Tensor,
    patch_map: Tensor,
    targets: Tensor | None = None,
    steps: int = 20,
    chunk: int = 256,
    substrate: str | Tensor = "mean",
) -> tuple[Tensor, Tensor]:
    """p_c while the cells of the map are put into the substrate, highest score first; see :func:`deletion_curve`."""
    return _public_curve(model, images, patch_map, targets, steps, chunk, substrate, insert=True)


def area_under(fractions: Tensor, curve: Tensor) -> Tensor:
    """Trapezoid rule: fractions (T+1,) in rising order, curve (B, T+1) → (B,)."""
    return torch.trapezoid(curve, fractions.to(curve), dim=1)


def control_maps(
    batch: int, grid: tuple[int, int], device: torch.device | None = None, generator: torch.Generator | None = None
) -> dict[str, Tensor]:
    """The two maps without knowledge: uniform noise, and a Gaussian at the centre (σ = a quarter of the side)."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    noise = torch.rand(batch, *grid, generator=generator, device=generator.device)
    rows, cols = ((torch.arange(n, dtype=torch.float32) + 0.5) / n - 0.5 for n in grid)
    bump = (-(rows[:, None] ** 2 + cols[None, :] ** 2) / (2 * 0.25**2)).exp()
    return {"random": noise.to(device), "centred gaussian": bump.expand(batch, -1, -1).to(device)}


def max_sensitivity(
    explain: Callable[..., Explanation],
    model: nn.Module,
    images: Tensor,
    targets: Tensor | None = None,
    draws: int = 10,
    radius: float = 0.02,
    generator: torch.Generator | None = None,
) -> Tensor:
    """How far a map can move when the image hardly does: ``max_δ ‖Φ(x+δ) − Φ(x)‖₂ / ‖Φ(x)‖₂``, ‖δ‖_∞ ≤ radius.

    Args:
        explain: an explainer ``f(model, images, target) -> Explanation``.
        model: a classifier on images in [0, 1].
        images: (B, C, H, W).
        targets: (B,), kept the same for all draws; None is the class predicted for the clean image.
        draws: K random perturbations, uniform in the cube.
        radius: in pixel units of [0, 1].
        generator: of the perturbations (CPU); None is seeded with 0.

    Returns: (B,); low is good. 0 for an all-zero map that stays so, infinity if it does not.
    Raises: BadInput if draws < 1.

    Paper: Yeh et al., On the (In)fidelity and Sensitivity of Explanations, arXiv:1901.09392, §4.
    """
    if draws < 1:
        raise BadInput(f"draws={draws} must be at least 1.")
    generator = generator or torch.Generator().manual_seed(0)
    clean = explain(model, images, targets)
    size = clean.map.flatten(1).norm(dim=1)
    worst = torch.zeros_like(size)
    for _ in range(draws):
        noise = (2 * torch.rand(images.shape, generator=generator, device=generator.device) - 1) * radius
        moved = explain(model, images + noise.to(images), clean.target)
        gap = (moved.map - clean.map).flatten(1).norm(dim=1)
        worst = torch.maximum(worst, torch.where(gap > 0, gap / size, torch.zeros_like(gap)))
    return worst


def infidelity(
    model: nn.Module,
    images: Tensor,
    attribution: Tensor,
    targets: Tensor | None = None,
    draws: int = 50,
    share: float = 0.2,
    scale: bool = True,
    chunk: int = 256,
    generator: torch.Generator | None = None,
    substrate: str | Tensor = "mean",
) -> Tensor:
    """How badly a map predicts what removing parts does to the logit: ``E_I[(Iᵀ Φ − (f(x) − f(x − I)))²]``.

    I removes a random set of cells: ``I = m ⊙ (x − substrate)``.

    Args:
        model: a classifier on images in [0, 1].
        images: (B, C, H, W).
        attribution: (B, C, H, W) per pixel, taken literally as Φ; or a patch map (B, gh, gw), whose score is what a
            whole cell contributes, so that ``Iᵀ Φ`` is the sum of the removed cells' scores.
        targets: (B,) output; None is the predicted one.
        draws: K random sets.
        share: chance of each cell to be removed, in (0, 1).
        scale: multiply Φ per image by the factor that fits best; maps have no unit of their own.
        chunk: images in one forward.
        generator: of the sets (CPU); None is seeded with 0.
        substrate: as in :func:`score_explainers`.

    Returns: (B,); low is good.
    Raises: BadInput if the attribution does not fit the images or an option is out of range.

    Paper: Yeh et al., arXiv:1901.09392, definition 2.1 and (for ``scale``) its optimal scaling.
    Departs from the paper: cells of a grid instead of random squares.
    """
    if draws < 1 or not 0 < share < 1:
        raise BadInput(f"draws={draws} must be at least 1 and share={share} strictly between 0 and 1.")
    pixelwise = attribution.ndim == 4
    if pixelwise and attribution.shape != images.shape:
        raise BadInput(f"pixel attributions {tuple(attribution.shape)} must have the images' {tuple(images.shape)}.")
    generator = generator or torch.Generator().manual_seed(0)
    with untouched(model), torch.no_grad():
        images = for_model(model, images)
        base = _substrate(model, images, substrate)
        targets = _targets(model, images, targets, chunk)
        phi = attribution.to(images.device).float()
        grid = common_grid(model, images, {}) if pixelwise else _grid_of(_checked("attribution", phi, images))
        chance = torch.rand(len(images), draws, grid[0] * grid[1], generator=generator, device=generator.device)
        removed = (chance < share).to(images.device)
        drops = _drops(model, images, base, removed, grid, targets, chunk)
        if pixelwise:
            weight = (phi * (images - base).float()).sum(1)
            gains = torch.einsum("bm,bkm->bk", _per_cell(weight, grid), removed.float())
        else:
            gains = torch.einsum("bm,bkm->bk", phi.flatten(1), removed.float())
        if scale:
            power = gains.square().sum(1, keepdim=True)
            best = (gains * drops).sum(1, keepdim=True) / torch.where(power > 0, power, 1.0)
            gains = best * gains
        return (gains - drops).square().mean(1)


def sensitivity_n(
    model: nn.Module,
    images: Tensor,
    patch_map: Tensor,
    targets: Tensor | None = None,
    n: int = 4,
    draws: int = 50,
    chunk: int = 256,
    generator: torch.Generator | None = None,
    substrate: str | Tensor = "mean",
) -> Tensor:
    """Pearson correlation between the scores of n random cells and the logit's drop when they are removed.

    Args:
        patch_map: (B, gh, gw).
        n: cells removed at once, from 1 to M − 1.
        draws: K random sets of n cells, at least 3.
        model, images, targets, chunk, generator, substrate: as in :func:`infidelity`.

    Returns: (B,) in [-1, 1]; high is good. 0 where the map or the drop is the same for all sets.
    Raises: BadInput if n or draws is out of range.

    Paper: Ancona et al., Towards better understanding of gradient-based attribution methods, arXiv:1711.06104, §4.
    """
    generator = generator or torch.Generator().manual_seed(0)
    with untouched(model), torch.no_grad():
        images = for_model(model, images)
        patch_map = _checked("map", patch_map, images)
        grid = _grid_of(patch_map)
        total = grid[0] * grid[1]
        if not 1 <= n < total or draws < 3:
            raise BadInput(
                f"n={n} must lie in 1…{total - 1} (fewer than the cells of the map) and draws={draws} be at least 3."
            )
        base = _substrate(model, images, substrate)
        targets = _targets(model, images, targets, chunk)
        chance = torch.rand(len(images), draws, total, generator=generator, device=generator.device)
        removed = (chance.argsort(-1).argsort(-1) < n).to(images.device)
        drops = _drops(model, images, base, removed, grid, targets, chunk)
        sums = torch.einsum("bm,bkm->bk", patch_map.flatten(1), removed.float())
        return _pearson(sums, drops)


def model_randomisation(
    explain: Callable[..., Explanation],
    model: nn.Module,
    images: Tensor,
    targets: Tensor | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Sanity check: does the map change when what the model learned is destroyed, from the last block to the first?

    The parameters of one block after another are redrawn from a normal distribution with each tensor's own mean and
    standard deviation (in a copy); a map that stays the same does not explain the model.

    Args:
        explain: an explainer ``f(model, images, target) -> Explanation``.
        model: a plain ViT or a wrapper around one; any other network is randomised by its top-level children, without
            the one that holds its classifier (where the network says which that is).
        images: (B, C, H, W).
        targets: (B,); None is the class the intact model predicts.
        seed: of the new parameters.

    Returns: name of the last block destroyed → Spearman's ρ (B,) with the intact model's map, in the order of
        destruction. ρ must fall towards 0; it is 1 for a constant map that stays constant.

    Paper: Adebayo et al., Sanity Checks for Saliency Maps, arXiv:1810.03292, §4 (cascading randomisation).
    Departs from the paper: redrawn parameters keep each tensor's mean and spread; the head stays.
    """
    clean = explain(model, images, targets)
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    vit = find_host(copied)
    if vit is not None:
        layers = [(f"blocks.{i}", block) for i, block in enumerate(vit.blocks)]
    else:
        layers = _children(copied)
    table = {}
    for name, layer in reversed(layers):
        with torch.no_grad():
            for p in layer.parameters():
                if p.is_floating_point() and p.numel() > 1:
                    noise = torch.randn(p.shape, generator=generator)
                    p.copy_(p.float().mean() + p.float().std() * noise.to(p.device))
        table[name] = spearman(clean.map, explain(copied, images, clean.target).map)
    return table


def _children(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The parts that data passes through one after another, below any wrapper and without the classifier."""
    prefix = ""
    while isinstance(network, NormalizedModel):
        network, prefix = network.model, f"{prefix}model."
    get = getattr(network, "get_classifier", None)
    found = get() if callable(get) else None
    heads = {id(h) for h in (found if isinstance(found, tuple) else (found,)) if h is not None}
    return [
        (prefix + name, child)
        for name, child in network.named_children()
        if next(child.parameters(), None) is not None and not any(id(m) in heads for m in child.modules())
    ]


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of two batches of maps (B, …) → (B,); ties share their mean rank.

    1 when both maps of an image are constant, 0 when one of them is.
    """
    from scipy.stats import rankdata

    ranks = [torch.from_numpy(rankdata(m.detach().flatten(1).double().cpu().numpy(), axis=1)) for m in (a, b)]
    flat = [r.var(1) == 0 for r in ranks]
    return torch.where(flat[0] & flat[1], 1.0, _pearson(*ranks)).to(a.device)


# -- inside ----------------------------------------------------------------------------------------------------------


def _score(
    model: nn.Module,
    images: Tensor,
    base: Tensor,
    patch_map: Tensor,
    targets: Tensor,
    steps: int,
    chunk: int,
    ends: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    areas = {}
    for name, insert in (("deletion", False), ("insertion", True)):
        fractions, curve = _curve(model, images, base, patch_map, targets, steps, chunk, insert, ends)
        areas[name] = area_under(fractions, curve)
    height, width = images.shape[-2:]
    seen = to_pixels(normalize(patch_map), (height, width)).unsqueeze(1).to(images.dtype)
    p, o = ends[0], _probability(model, base + seen * (images - base), targets, chunk)
    tiny = torch.finfo(p.dtype).tiny
    return {
        **areas,
        "insertion_minus_deletion": areas["insertion"] - areas["deletion"],
        "average_drop": (p - o).clamp(min=0) / p.clamp(min=tiny),
        "average_increase": (o > p).float(),
        # p = 1 leaves nothing to gain
        "average_gain": torch.where(p < 1, (o - p).clamp(min=0) / (1 - p).clamp(min=tiny), 0.0),
    }


def _public_curve(
    model: nn.Module,
    images: Tensor,
    patch_map: Tensor,
    targets: Tensor | None,
    steps: int,
    chunk: int,
    substrate: str | Tensor,
    insert: bool,
) -> tuple[Tensor, Tensor]:
    with untouched(model), torch.no_grad():
        images = for_model(model, images)
        patch_map = _checked("map", patch_map, images)
        base = _substrate(model, images, substrate)
        targets = _targets(model, images, targets, chunk)
        ends = (_probability(model, images, targets, chunk), _probability(model, base, targets, chunk))
        return _curve(model, images, base, patch_map, targets, steps, chunk, insert, ends)


def _curve(
    model: nn.Module,
    images: Tensor,
    base: Tensor,
    patch_map: Tensor,
    targets: Tensor,
    steps: int,
    chunk: int,
    insert: bool,
    ends: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    if steps < 1:
        raise BadInput(f"steps={steps} must be at least 1.")
    total = patch_map[0].numel()
    counts = torch.linspace(0, total, min(steps, total) + 1, dtype=torch.float64).round().long().to(images.device)
    rank = _to_cells(_ranks(patch_map), images.shape[-2:])
    whole, bare = ends
    start, end = (bare, whole) if insert else (whole, bare)
    inner = counts[1:-1]
    middle = torch.empty(len(images), len(inner), device=images.device)
    if len(inner):
        flat = middle.view(-1)
        for part, rows in expand(images, len(inner), chunk):
            index = torch.arange(rows.start, rows.stop, device=images.device)
            image, step = index // len(inner), index % len(inner)
            hit = (rank[image] < inner[step][:, None, None]).unsqueeze(1)
            shown = hit if insert else ~hit
            flat[rows] = _p(model(torch.where(shown, part, base[image])), targets[image])
    return counts.float() / total, torch.cat([start[:, None], middle, end[:, None]], dim=1)


def _ranks(patch_map: Tensor) -> Tensor:
    """(B, gh, gw) → rank of each cell, 0 the highest score; equal scores in raster order."""
    order = patch_map.flatten(1).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, places).reshape(patch_map.shape)


def _to_cells(values: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """(…, gh, gw) → (…, H, W): every pixel gets the value of the cell it lies in."""
    rows, cols = (_cell_index(pixels, cells, values.device) for pixels, cells in zip(size, values.shape[-2:]))
    return values[..., rows[:, None], cols]


def _cell_index(pixels: int, cells: int, device: torch.device) -> Tensor:
    return torch.arange(pixels, device=device) * cells // pixels


def _per_cell(pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, H, W) → (B, M): sums over the pixels of each cell."""
    height, width = pixel_values.shape[-2:]
    rows = _cell_index(height, grid[0], pixel_values.device)
    cols = _cell_index(width, grid[1], pixel_values.device)
    index = (rows[:, None] * grid[1] + cols).flatten()
    out = torch.zeros(len(pixel_values), grid[0] * grid[1], device=pixel_values.device, dtype=pixel_values.dtype)
    return out.index_add_(1, index, pixel_values.flatten(1))


def _drops(
    model: nn.Module,
    images: Tensor,
    base: Tensor,
    removed: Tensor,
    grid: tuple[int, int],
    targets: Tensor,
    chunk: int,
) -> Tensor:
    """(B, K) fall of the target logit when the cells ``removed`` (B, K, M) are replaced by the substrate."""
    batch, draws, _ = removed.shape
    whole = torch.cat([model(x) for x in images.split(chunk)]).float().gather(1, targets[:, None])
    flat = torch.empty(batch * draws, device=images.device)
    sets = removed.reshape(batch * draws, *grid)
    for part, rows in expand(images, draws, chunk):
        image = torch.arange(rows.start, rows.stop, device=images.device) // draws
        gone = _to_cells(sets[rows], images.shape[-2:]).unsqueeze(1)
        logits = model(torch.where(gone, base[image], part)).float()
        flat[rows] = logits.gather(1, targets[image][:, None]).squeeze(1)
    return whole - flat.view(batch, draws)


def _p(logits: Tensor, targets: Tensor) -> Tensor:
    """Probability of the target: softmax, or a sigmoid for a network with a single output."""
    logits = logits.float()
    probs = logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(-1)
    return probs.gather(1, targets[:, None]).squeeze(1)


def _probability(model: nn.Module, images: Tensor, targets: Tensor, chunk: int) -> Tensor:
    return torch.cat([_p(model(x), t) for x, t in zip(images.split(chunk), targets.split(chunk))])


def _targets(model: nn.Module, images: Tensor, targets: Tensor | None, chunk: int) -> Tensor:
    return resolve_target(torch.cat([model(x) for x in images.split(chunk)]), targets)


def _substrate(model: nn.Module, images: Tensor, how: str | Tensor) -> Tensor:
    """(B, C, H, W) what replaces a removed cell."""
    if isinstance(how, Tensor):
        return how.to(images).expand_as(images)
    if how == "mean":
        normal = next((m for m in model.modules() if isinstance(m, NormalizedModel)), None)
        return torch.zeros_like(images) if normal is None else normal.mean.to(images).expand_as(images)
    if how == "blur":
        from torchvision.transforms.functional import gaussian_blur

        sigma = [max(0.05 * side, 0.1) for side in reversed(images.shape[-2:])]
        kernel = [2 * max(1, int(np.ceil(3 * s))) + 1 for s in sigma]
        # torchvision reflects at the border, which allows a kernel of less than twice the side only
        limit = [2 * side - 1 for side in reversed(images.shape[-2:])]
        return gaussian_blur(images, [min(k, top) for k, top in zip(kernel, limit)], sigma)
    raise unknown("substrate", how, ("mean", "blur"), "help(vitkit.explain.score_explainers)")


def _checked(name: str, patch_map: Tensor, images: Tensor) -> Tensor:
    if patch_map.ndim != 3 or len(patch_map) != len(images):
        raise BadInput(f"{name!r} has shape {tuple(patch_map.shape)}; maps are (B, gh, gw) with B={len(images)}.")
    patch_map = patch_map.detach().to(images.device).float()
    if not bool(patch_map.isfinite().all()):
        raise BadInput(f"{name!r} holds NaN or infinite scores; such a map has no order.")
    return patch_map


def _grid_of(patch_map: Tensor) -> tuple[int, int]:
    return patch_map.shape[-2], patch_map.shape[-1]


def _on_grid(patch_map: Tensor, grid: tuple[int, int]) -> Tensor:
    return patch_map if _grid_of(patch_map) == grid else to_pixels(patch_map, grid)


def common_grid(model: nn.Module, images: Tensor, maps: Mapping[str, Tensor]) -> tuple[int, int]:
    """Cells for all maps: the host's patches, else the finest map's, else at most 14 a side."""
    shapes = {(m.shape[-2], m.shape[-1]) for m in maps.values() if m.ndim == 3}
    if len(shapes) == 1:
        return next(iter(shapes))
    vit = find_host(model)
    if vit is not None:
        with Trace(vit, ["embed"]) as trace:
            model(images[:1])
        grid = trace.layouts["embed"].grid
        return grid[-2], grid[-1]
    if shapes:
        return max(shapes, key=lambda s: (s[0] * s[1], s))
    return min(images.shape[-2], 14), min(images.shape[-1], 14)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """(B, K) twice → (B,); 0 where one of them does not vary beyond rounding."""
    centred, alive = [], torch.ones(len(a), dtype=torch.bool, device=a.device)
    for values in (a.double(), b.double()):
        deviation = values - values.mean(1, keepdim=True)
        alive = alive & (deviation.abs().amax(1) > 1e-6 * values.abs().amax(1))
        centred.append(deviation)
    spread = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    r = (centred[0] * centred[1]).sum(1) / torch.where(alive, spread, 1.0)
    return torch.where(alive, r, 0.0).float()

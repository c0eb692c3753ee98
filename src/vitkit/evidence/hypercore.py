"""Evidence for LViT: against a plain ViT on classes with super-classes, and what its curvature and optimizer add."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.backbones.lvit import LViT
from vitkit.models.diagnostics.delta_hyperbolicity import Metric, delta_hyperbolicity
from vitkit.models.lorentz.manifold import pairwise_distance
from vitkit.testing.worlds import World, fashion_mnist, fit_tiny, predict_logits, tiny_vit
from vitkit.train.optimizers.riemannian_adam import RiemannianAdam

NUM_TRAIN, NUM_TEST, EPOCHS, DEPTH, WIDTH, HEADS, LR = 1500, 2000, 4, 2, 64, 4, 3e-3
# images whose tokens are compared for δ
NUM_DELTA = 40
# clothes for the body, shoes, bags
SUPER = torch.tensor([0, 0, 0, 0, 0, 1, 0, 1, 2, 1])
VIT, LVIT, EUCLIDEAN = "plain ViT", "LViT, c = 1", "LViT, c = 1, AdamW for positions too"
LONG, FLAT = "LViT, c = 1, classifier's normals 5 times as long at the start", "LViT, c = 100, nearly flat"
# options of LViT; c of the curvature −1/c
ARMS: dict[str, dict[str, Any] | None] = {
    VIT: None,
    LVIT: {"curvature": 1.0},
    EUCLIDEAN: {"curvature": 1.0},
    LONG: {"curvature": 1.0, "head_scale": 5.0},
    FLAT: {"curvature": 100.0},
}


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Train all arms on the same images; the test images of all seeds are the pairs."""
    right: dict[str, list[Tensor]] = {arm: [] for arm in ARMS}
    crossed: dict[str, list[float]] = {arm: [] for arm in ARMS}
    delta: dict[str, list[float]] = {arm: [] for arm in ARMS}
    params: dict[str, int] = {}
    for i, seed in enumerate(seeds):
        world = fashion_mnist(NUM_TRAIN, NUM_TEST, seed)
        for j, arm in enumerate(ARMS):
            if progress:
                progress(f"train {arm}, seed {seed}", i * len(ARMS) + j, len(ARMS) * len(seeds))
            model = build(arm, seed)
            params[arm] = sum(p.numel() for p in model.parameters())
            kind: Any = torch.optim.AdamW if arm in (VIT, EUCLIDEAN) else RiemannianAdam
            fit_tiny(
                model,
                world.x_train,
                world.y_train,
                EPOCHS,
                seed,
                batch=64,
                lr=LR,
                optimizer_factory=lambda groups, lr, kind=kind: kind(groups, lr=lr),
            )
            found = predict_logits(model, world.x_test).argmax(-1)
            right[arm].append((found == world.y_test).double())
            crossed[arm].append(super_share(found, world.y_test))
            delta[arm].append(token_delta(model, world))
    pooled = {arm: torch.cat(values).tolist() for arm, values in right.items()}
    gaps = {arm: paired(values, pooled[VIT]) for arm, values in pooled.items()}
    _, low, high = gaps[LVIT]
    flat, optimizer, long = (paired(pooled[LVIT], pooled[arm]) for arm in (FLAT, EUCLIDEAN, LONG))
    return Evidence(
        claim="A ViT in hyperbolic space (LViT) is more accurate than its Euclidean counterpart.",
        shown=True if low > 0 else False if high < 0 else None,
        rows=[
            {
                "network": arm,
                "test accuracy %": summarise([100 * float(r.mean()) for r in right[arm]], 1),
                "ahead of the ViT, points [95 %]": None if arm == VIT else _points(gaps[arm]),
                "errors across super-classes %": summarise([100 * s for s in crossed[arm]], 1),
                "relative δ of tokens": summarise(delta[arm]),
                "parameters": params[arm],
            }
            for arm in ARMS
        ],
        notes=(
            f"Points by which LViT with c = 1 differs: {_points(flat)} from the same in nearly flat space, "
            f"{_points(optimizer)} from AdamW for its positions, {_points(long)} from longer normals at the start (its "
            "logits grow with the logarithm of a distance only, which costs time in a short training). Intervals: 95 % "
            "bootstrap over the test images of all seeds. δ is Gromov's, 0 for a tree, by the distances of the "
            "network's own space, from sampled quadruples. The paper trains on larger sets for far longer."
        ),
        settings={
            "data": f"Fashion-MNIST, {NUM_TRAIN} training and {NUM_TEST} test images a seed; super-classes: clothes, "
            "shoes, bags",
            "network": f"patch 4 (49 tokens), width {WIDTH} (with time), {DEPTH} blocks, {HEADS} heads, MLP ×2",
            "epochs": EPOCHS,
            "optimizer": f"AdamW, lr {LR:g}, weight decay 0.05, cosine, batch 64; positions of LViT by Riemannian Adam",
        },
    )


def build(arm: str, seed: int) -> nn.Module:
    """The untrained network of an arm; torch's random state is left alone."""
    options = ARMS[arm]
    if options is None:
        return tiny_vit(28, 4, 1, 10, seed, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.0}
        return LViT(img_size=28, patch_size=4, in_chans=1, num_classes=10, **sizes, **options)


def super_share(found: Tensor, labels: Tensor) -> float:
    """Share of the wrong answers that are in another super-class than the label; 0 if none is wrong."""
    wrong = found != labels
    return float((SUPER[found] != SUPER[labels])[wrong].double().mean()) if bool(wrong.any()) else 0.0


@torch.no_grad()
def token_delta(model: nn.Module, world: World) -> float:
    """Relative δ of the patch tokens behind the last block, by the distance of the space they live in."""
    tokens = model.forward_features(world.x_test[:NUM_DELTA])
    if isinstance(model, LViT):
        metric: Metric = partial(pairwise_distance, c=model.curvature())
        return delta_hyperbolicity(tokens.double().flatten(0, 1), metric).relative
    return delta_hyperbolicity(tokens[:, model.num_prefix_tokens :].flatten(0, 1)).relative  # type: ignore[misc]


def _points(difference: tuple[float, float, float]) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in difference))

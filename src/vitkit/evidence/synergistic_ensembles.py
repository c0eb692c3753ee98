"""Do a CNN, a Mixer and a ViT make a better team than three networks of one kind?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from vitkit.compress.cost import count_params, measure_latency
from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.study.ensembles import Team, complementarity, mixed_against_same, teams
from vitkit.testing.worlds import fashion_mnist, fit_tiny, predict_proba, tiny_vit

FAMILIES = ("CNN", "Mixer", "ViT")
# mean accuracy of the members of two teams may differ by this much for them to count as alike
WITHIN = 0.01


def network(family: str, seed: int) -> nn.Module:
    """A tiny network of a family, for grey images of 28×28 pixels."""
    if family == "ViT":
        return tiny_vit(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "Mixer":
            from timm.models.mlp_mixer import MlpMixer

            return MlpMixer(
                img_size=28, in_chans=1, num_classes=10, patch_size=4, num_blocks=4, embed_dim=64, mlp_ratio=(0.5, 2.0)
            )
        return nn.Sequential(
            *_stage(1, 32), *_stage(32, 64), *_stage(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
        )


def _stage(wide: int, out: int) -> list[nn.Module]:
    return [
        nn.Conv2d(wide, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.GELU(), nn.MaxPool2d(2)
    ]  # fmt: skip


def run(
    seeds: tuple[int, ...] = (0, 1, 2),
    progress: Callable[[str, int, int], None] | None = None,
    num_train: int = 4_000,
    num_test: int = 4_000,
    epochs: int = 6,
) -> Evidence:
    """Three networks of each family (one a seed), all teams of two and three, on the same test images.

    Args:
        seeds: of weights and batch order; at least 2, so that there are teams of one family.
        progress: called as ``progress(network, networks done, networks)``.
    """
    world = fashion_mnist(num_train, num_test, seed=0)
    held = num_train // 4
    parts = {
        "val": (world.x_train[:held], world.y_train[:held]),
        "test": (world.x_test, world.y_test),
    }
    probs: dict[str, dict[str, np.ndarray]] = {name: {} for name in parts}
    families: dict[str, str] = {}
    nets: dict[str, Any] = {}
    for i, seed in enumerate(seeds):
        for j, family in enumerate(FAMILIES):
            name = f"{family} {seed}"
            if progress is not None:
                progress(name, i * len(FAMILIES) + j, len(seeds) * len(FAMILIES))
            net = fit_tiny(network(family, seed), world.x_train[held:], world.y_train[held:], epochs, seed)
            families[name] = family
            nets.setdefault(family, net)
            for part, (x, _) in parts.items():
                probs[part][name] = predict_proba(net, x).numpy()
    times = measure_latency(nets, world.x_test[:64], repeats=20, warmup=3)
    costs = {name: times[family][0] for name, family in families.items()}
    sizes = (2, 3) if len(seeds) > 2 else (2,)
    val_labels, test_labels = (y.numpy() for _, y in parts.values())
    found = teams(probs["val"], val_labels, probs["test"], test_labels, families, sizes, costs=costs)
    return _table(found, probs["test"], test_labels, families, nets, seeds, num_train, num_test, epochs)


def _table(
    found: list[Team],
    test: dict[str, np.ndarray],
    labels: np.ndarray,
    families: dict[str, str],
    nets: dict[str, Any],
    seeds: tuple[int, ...],
    num_train: int,
    num_test: int,
    epochs: int,
) -> Evidence:
    names = sorted(test)
    apart = np.array(complementarity(np.stack([test[n].argmax(1) for n in names]), labels)["disagreement"])
    kinds = np.array([families[n] for n in names])
    accuracy = {n: float((test[n].argmax(1) == labels).mean()) for n in names}
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        own = np.ix_(kinds == family, kinds == family)
        among = apart[own][~np.eye(int((kinds == family).sum()), dtype=bool)]
        of = [t for t in found if not t.mixed and t.members[0].startswith(family)]
        rows.append(
            _row(f"{family} only", of, [accuracy[n] for n in names if families[n] == family], among, nets[family])
        )
    different = apart[kinds[:, None] != kinds[None]]
    rows.append(_row("mixed", [t for t in found if t.mixed], list(accuracy.values()), different, None))
    largest = max(len(t.members) for t in found)
    num_val = num_train // 4
    fair = {
        size: mixed_against_same([t for t in found if len(t.members) == size], within=WITHIN) for size in (2, largest)
    }
    one_of_each = [t for t in found if len({families[n] for n in t.members}) == len(t.members) == largest]
    same = [t for t in found if not t.mixed and len(t.members) == largest]
    plain = paired(np.mean([t.right for t in one_of_each], 0), np.mean([t.right for t in same], 0))
    result, count = fair[largest]
    verdict = result or plain

    def told(value: tuple[float, float, float] | None) -> str:
        return "no pair" if value is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*value)

    return Evidence(
        claim="Teams of a CNN, a Mixer and a ViT answer better than teams of as many networks of one kind.",
        shown=True if verdict[1] > 0 else False if verdict[2] < 0 else None,
        rows=rows,
        notes=(
            "Mean of probabilities. Mixed − same at equal team size, each team of one family against the mixed team "
            f"whose members' mean accuracy is nearest (within {100 * WITHIN:.0f} point): teams of {largest}: "
            f"{told(result)} from {count} pairs; of 2: {told(fair[2][0])} from {fair[2][1]} pairs. One of each family "
            f"− one family, whatever their accuracy: {told(plain)}. Intervals: 95 % bootstrap over test images; they "
            "say nothing about other networks. Gain: over the member that is best on validation images. The verdict is "
            f"that of the matched teams of {largest}."
        ),
        settings={
            "data": f"Fashion-MNIST: {num_train - num_val} training, {num_val} validation, {num_test} test images",
            "members": f"{len(seeds)} of each family, {epochs} epochs of AdamW, batch 128 (paper: ImageNet networks)",
        },
    )


def _row(
    label: str, of: list[Team], accuracies: list[float], disagreement: np.ndarray, net: nn.Module | None
) -> dict[str, Any]:
    by_size = {size: [t for t in of if len(t.members) == size] for size in (2, 3)}
    row: dict[str, Any] = {"teams": label, "one network": summarise(accuracies)}
    for size, chosen in by_size.items():
        row[f"teams of {size}"] = summarise([t.accuracy for t in chosen]) if chosen else "–"
    row["gain"] = f"{np.mean([t.gain[0] for t in of]):+.3f}"
    row["disagreement"] = f"{float(np.mean(disagreement)):.3f}"
    row["parameters"] = "–" if net is None else f"{count_params(net):,}"
    row["ms, batch 64, in turn"] = f"{np.mean([t.cost / len(t.members) for t in of]):.1f} each"
    return row

"""Evidence for ViT-LCA: competing training features against the linear classifier of the same frozen ViT."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vitkit.adapt.vit_lca import LCAHead, vit_lca
from vitkit.anatomy import host
from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.models.diagnostics.spike_energy import MAC_PJ, competition_energy
from vitkit.testing.worlds import World, fashion_mnist, train_tiny

TRAIN, TEST, EPOCHS, ATOMS, CODED = 4_000, 300, 5, 200, 800
LAMBDAS = (0.02, 0.05, 0.1, 0.3)
MIDDLE = 0.1
NOISE = 0.05
LINEAR = "linear classifier of the ViT"
CHOSEN = f"LCA max, λ={MIDDLE}"
READS = ("max", "sum", "nn")


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """One frozen ViT and one dictionary a seed; heads differ in λ and in how the codes are read."""
    right: dict[str, list[Tensor]] = {}
    figures: dict[str, dict[str, list[float]]] = {}
    done, total = 0, len(seeds) * (len(LAMBDAS) + 1)
    for seed in seeds:
        if progress:
            progress(f"ViT, seed {seed}", done, total)
        world = fashion_mnist(TRAIN, TEST, seed=seed)
        vit = host(train_tiny(world, epochs=EPOCHS, seed=seed))
        noise = NOISE * torch.randn(world.x_test.shape, generator=torch.Generator().manual_seed(seed))
        clean, noisy = (_features(vit, x) for x in (world.x_test, (world.x_test + noise).clamp(0, 1)))
        with torch.no_grad():
            right.setdefault(LINEAR, []).append(_hits(vit.head(clean), world))
            found = figures.setdefault(LINEAR, {})
            _add(
                found, noisy=100 * float(_hits(vit.head(noisy), world).mean()), energy=MAC_PJ * vit.head.weight.numel()
            )
        done += 1
        head = _head(vit, world, seed)
        for lam in LAMBDAS:
            if progress:
                progress(f"λ={lam}, seed {seed}", done, total)
            # the network of "nn" is trained on codes of the middle λ and read there only
            head.lam_rel = lam
            with torch.no_grad():
                codes = head.encode(clean)
                disturbed = head.encode(noisy) if lam == MIDDLE else None
                gap = float(head.gap(clean, codes.codes).mean())
            energy = competition_energy(codes.active_steps, codes.steps, ATOMS, clean.shape[1]).picojoules
            for read in READS if lam == MIDDLE else READS[:2]:
                name = f"LCA {read}, λ={lam}"
                found = figures.setdefault(name, {})
                right.setdefault(name, []).append(_hits(_read(head, codes.codes, read), world))
                extra = MAC_PJ * sum(p.numel() for p in head.parameters() if p.ndim == 2) if read == "nn" else 0.0
                _add(
                    found, active=100 * float((codes.codes != 0).double().mean()), gap=100 * gap, energy=energy + extra
                )
                if disturbed is not None:
                    _add(found, noisy=100 * float(_hits(_read(head, disturbed.codes, read), world).mean()))
            done += 1
    pooled = {name: torch.cat(values).tolist() for name, values in right.items()}
    gaps = {name: paired(values, pooled[LINEAR]) for name, values in pooled.items() if name != LINEAR}
    _, low, high = gaps[CHOSEN]
    times = sum(figures[CHOSEN]["energy"]) / sum(figures[LINEAR]["energy"])
    return Evidence(
        claim="Coding frozen features by competition among training features beats a linear classifier.",
        shown=True if low > 0 else False if high < 0 else None,
        rows=[
            {
                "head": name,
                "test accuracy %": summarise([100 * float(r.mean()) for r in right[name]], 1),
                "ahead of linear by, points": None
                if name == LINEAR
                else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * v for v in gaps[name])),
                f"with noise {NOISE}, %": _cell(figures[name], "noisy"),
                "active atoms %": _cell(figures[name], "active"),
                "gap to the fixed point %": _cell(figures[name], "gap", 2),
                "modelled energy of the head, nJ": summarise([v / 1000 for v in figures[name]["energy"]], 1),
            }
            for name in pooled
        ],
        notes=(
            "Intervals: 95 % bootstrap over the test images of all seeds. `shown` speaks of the strongest atom "
            "(max) at the middle λ. The paper compares with other spiking vision transformers on ImageNet, in "
            "which the whole network spikes; here the ViT is the same in all rows, so only heads are compared. "
            "Its claim of less energy cannot be tested so: next to a linear layer, the smallest head there is, "
            f"the competition needs {times:,.0f} times the modelled energy. That is 4.6 pJ for a multiply- "
            "accumulate and 0.9 pJ for each atom that an active neuron inhibits in a step, run until the atoms "
            "rest or for 5,000 steps, where the authors' code takes 50; fewer steps need less energy and leave "
            "the codes unfinished. Features of a small ViT fill few directions, so the slowest dynamics may not "
            "have come to rest: the gap says by how much, as a share of the largest drive."
        ),
        settings={
            "data": f"Fashion-MNIST, {TRAIN} training and {TEST} test images a seed",
            "ViT": f"tiny, width 64, 4 blocks, from scratch, {EPOCHS} epochs (paper: ViT-B from ImageNet), then frozen",
            "atoms": f"{ATOMS} of {CODED} training images, balanced over the classes",
            "λ": f"{', '.join(map(str, LAMBDAS))} of the largest drive of an image",
            "nn": f"trained at λ={MIDDLE} on the codes of the other {CODED - ATOMS} images",
        },
    )


def _head(vit: nn.Module, world: World, seed: int) -> LCAHead:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images, labels = world.x_train[:CODED], world.y_train[:CODED]
        made, _ = vit_lca(vit, images, labels, atoms=ATOMS, read="nn", lam_rel=MIDDLE, seed=seed)
    head = host(made).head
    assert isinstance(head, LCAHead)
    return head


@torch.no_grad()
def _read(head: LCAHead, codes: Tensor, read: str) -> Tensor:
    """Logits of codes; the three ways share one dictionary."""
    if read == "nn":
        return head.read_codes(codes)
    twin = LCAHead(head.dictionary.shape[1], len(head.dictionary), head.num_classes, read)
    twin.atom_labels.copy_(head.atom_labels)
    return twin.read_codes(codes)


def _features(vit: nn.Module, images: Tensor) -> Tensor:
    """What the classifier gets."""
    with torch.no_grad():
        return torch.cat([vit.forward_head(vit.forward_features(x), pre_logits=True) for x in images.split(256)])


def _hits(logits: Tensor, world: World) -> Tensor:
    return (logits.argmax(-1) == world.y_test).double()


def _add(found: dict[str, list[float]], **values: float) -> None:
    for name, value in values.items():
        found.setdefault(name, []).append(value)


def _cell(found: dict[str, list[float]], name: str, digits: int = 1) -> str | None:
    return summarise(found[name], digits) if name in found else None

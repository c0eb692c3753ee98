"""Softmax-space rejection on Fashion-MNIST with a tiny ViT, beside maximum softmax probability at equal coverage."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitkit.evidence.record import Evidence, paired, summarise
from vitkit.stress.ood import scores
from vitkit.stress.ood.softmax_rejection import SelectiveReport, selective_report, softmax_rejection
from vitkit.testing.worlds import fashion_mnist, fit_tiny, predict_logits, tiny_vit

NUM_TRAIN, NUM_CALIBRATION, NUM_TEST = 4000, 2000, 2000
EPOCHS = 8
QUANTILES = (0.0, 0.05, 0.25)
MAX_RISK = 0.1


def run(seeds: tuple[int, ...] = (0, 1, 2), progress: Callable[[str, int, int], None] | None = None) -> Evidence:
    """Nine classes are learned, the tenth is unseen; thresholds come from images that were not trained on.

    Each quantile's detector meets the maximum softmax probability (MSP) that answers equally many test images.
    """
    table: dict[str, list[dict[str, float]]] = {}
    gain: list[float] = []
    fewer_errors: dict[float, list[float]] = {q: [] for q in QUANTILES}
    unseen_classes = []
    for i, seed in enumerate(seeds):
        if progress:
            progress(f"train, seed {seed}", i, len(seeds))
        unseen = (8 - 3 * seed) % 10
        world = fashion_mnist(NUM_TRAIN + NUM_CALIBRATION, NUM_TEST, seed)
        unseen_classes.append(world.classes[unseen])
        x, y = _without(world.x_train, world.y_train, unseen)
        split = round(len(x) * NUM_TRAIN / (NUM_TRAIN + NUM_CALIBRATION))
        model = fit_tiny(tiny_vit(28, 4, 1, 9, seed=seed), x[:split], y[:split], epochs=EPOCHS, seed=seed)
        z_cal, y_cal = predict_logits(model, x[split:]), y[split:]
        x_test, y_test = _without(world.x_test, world.y_test, unseen)
        z = predict_logits(model, x_test)
        noise = torch.randn(x_test.shape, generator=torch.Generator().manual_seed(seed))
        others = {
            "unseen": predict_logits(model, world.x_test[world.y_test == unseen]),
            "noisy": predict_logits(model, (x_test + 0.2 * noise).clamp(0, 1)),
        }
        p, p_cal = z.softmax(1), z_cal.softmax(1)
        wrong = p.argmax(1) != y_test

        def figures(
            doubt: Callable[[Tensor], Tensor],
            known: Tensor,
            p: Tensor = p,
            z: Tensor = z,
            y_test: Tensor = y_test,
            others: dict[str, Tensor] = others,
        ) -> dict[str, float]:
            report = selective_report(p, y_test, known, doubt(z))
            return _shares(report) | {f"auroc_{n}": _auroc(doubt(z), doubt(o)) for n, o in others.items()}

        def msp(z: Tensor) -> Tensor:
            return scores.msp(z.softmax(1))

        everything = torch.ones(len(p), dtype=torch.bool)
        _add(table, "answer everything (MSP order)", figures(msp, everything))
        for q in QUANTILES:
            fitted = softmax_rejection(p_cal, y_cal, quantile=q)
            _, known, _ = fitted.predict(p)
            _add(table, f"softmax rejection, q={q:g}", figures(lambda z, f=fitted: f.score(z.softmax(1)), known))
            same = scores.accept_most_certain(msp(z), float(known.double().mean()))
            _add(table, f"MSP at the coverage of q={q:g}", figures(msp, same))
            fewer_errors[q] += ((same & wrong).double() - (known & wrong).double()).tolist()
            if q == 0:
                # each answered image against the average image
                gain += ((~wrong)[known].double() - (~wrong).double().mean()).tolist()
        for label, options in (
            ("softmax rejection, q=0, k-means", {"centroid": "kmeans"}),
            (f"softmax rejection, risk ≤ {MAX_RISK:g}", {"max_risk": MAX_RISK}),
        ):
            fitted = softmax_rejection(p_cal, y_cal, **options)  # type: ignore[arg-type]
            _, known, _ = fitted.predict(p)
            _add(table, label, figures(lambda z, f=fitted: f.score(z.softmax(1)), known))
        temperature = scores.fit_temperature(z_cal, y_cal)
        others_scores: dict[str, Callable[[Tensor], Tensor]] = {
            "margin": lambda z: scores.margin(z.softmax(1)),
            "entropy": lambda z: scores.entropy(z.softmax(1)),
            "energy": scores.energy,
            "temperature-scaled MSP": lambda z, t=temperature: scores.scaled_msp(z, t),
        }
        coverage = table["softmax rejection, q=0.05"][-1]["coverage"]
        for label, doubt in others_scores.items():
            known = scores.accept_most_certain(doubt(z), coverage)
            _add(table, f"{label} at the coverage of q=0.05", figures(doubt, known))
    rows: list[dict[str, Any]] = [
        {"rule": rule, **{k: _summary([f[k] for f in found]) for k in found[0]}} for rule, found in table.items()
    ]
    raises = paired(gain, [0.0] * len(gain)) if gain else (math.nan,) * 3
    against = {q: paired(values, [0.0] * len(values)) for q, values in fewer_errors.items()}
    better = bool(gain) and raises[1] > 0
    worse_than_msp = any(high < 0 for _, _, high in against.values())
    return Evidence(
        claim="An answer's distance from its class's centroid in softmax space tells when not to answer: accuracy "
        "rises on what is answered, and not less than with the maximum softmax probability at equal coverage.",
        shown=better and not worse_than_msp,
        rows=rows,
        notes=(
            f"Accuracy of answered images at q=0 above that of all: {_interval(raises)}. Errors that MSP passes beyond "
            "softmax rejection at equal coverage, as a share of test images: "
            + "; ".join(f"q={q:g} {_interval(found)}" for q, found in against.items())
            + f". Unseen classes: {', '.join(unseen_classes)}. 'not less' is judged by the interval: a rule "
            "significantly worse than MSP at any quantile counts as not shown."
        ),
        settings={
            "data": f"Fashion-MNIST, about 9/10 of {NUM_TRAIN} training, {NUM_CALIBRATION} calibration and {NUM_TEST} "
            "test images (nine classes; the paper: MNIST and CIFAR-10)",
            "model": f"ViT of width 64, 4 blocks, patch 4, {EPOCHS} epochs (the paper: a CNN and a pretrained ViT)",
            "auroc_noisy": "the test images with Gaussian noise of σ = 0.2 against without",
        },
    )


def _without(x: Tensor, y: Tensor, unseen: int) -> tuple[Tensor, Tensor]:
    kept = y != unseen
    labels = y[kept]
    return x[kept], labels - (labels > unseen).long()


def _shares(report: SelectiveReport) -> dict[str, float]:
    names = ("coverage", "selective_accuracy", "errors_caught", "correct_rejected", "aurc")
    return {name: getattr(report, name) for name in names}


def _auroc(known: Tensor, unknown: Tensor) -> float:
    marks = torch.cat([torch.zeros(len(known)), torch.ones(len(unknown))]).bool()
    return scores.detection(torch.cat([known, unknown]), marks)["auroc"]


def _add(table: dict[str, list[dict[str, float]]], rule: str, found: dict[str, float]) -> None:
    table.setdefault(rule, []).append(found)


def _summary(values: list[float]) -> str:
    """As all tables print it; a seed in which nothing was answered has no accuracy and is left out."""
    finite = [v for v in values if math.isfinite(v)]
    return summarise(finite) if finite else "–"


def _interval(found: tuple[float, ...]) -> str:
    return f"{found[0]:+.4f} [{found[1]:+.4f}, {found[2]:+.4f}]"

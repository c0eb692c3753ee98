"""From finished stages to the study's result: measures with intervals, comparisons, costs, curves."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.catalogue import methods
from vitkit.study import ensembles, statistics
from vitkit.study.gallery import make_gallery
from vitkit.study.plan import DataFacts, Plan, RecipePlan, model_config, training_of
from vitkit.study.results import (
    Comparison,
    Cost,
    Curves,
    DataReport,
    Ensembles,
    Faithfulness,
    Interval,
    Paper,
    RecipeResult,
    RobustnessPoint,
    StudyResult,
    TeamResult,
    TrainPoint,
)
from vitkit.study.settings import Recipe, StudySettings
from vitkit.study.store import Store

# of all pairs, those that are best on the validation part
_PAIRS_SHOWN = 5
PACKAGES = ("vitkit", "torch", "torchvision", "timm", "numpy", "scikit-learn", "torchmetrics", "lightning-fabric")


def summarise(
    settings: StudySettings,
    store: Store,
    plan: Plan,
    facts: DataFacts,
    failures: dict[str, str],
    command: str,
    notes: list[str],
) -> StudyResult:
    """Everything the report shows.

    Args:
        settings: the resolved study.
        store: holds the finished stages.
        plan: which stages belong to which recipe.
        facts: of the data.
        failures: recipe name → reason, for recipes with a failed stage.
        command: what the user typed, to reproduce.
        notes: what the study decided by itself (epochs cut by the budget …).
    """
    table = [_recipe(entry, store, facts, failures, settings) for entry in plan.recipes]
    recipes = [row for row, _ in table]
    scores = {row.name: s for row, s in table if s is not None}
    _note_shared_models(recipes, plan)
    baseline = next((r for r in recipes if r.status == "ok"), None)
    if baseline is not None:
        baseline.baseline = True
        measure = "accuracy" if facts.task == "classify" else ("mae" if facts.task == "regress" else "subset_accuracy")
        entry = next(e for e in plan.recipes if e.recipe.name == baseline.name)
        groups = test_groups(entry, store, facts)
        family: dict[str, Comparison | None] = {
            r.name: statistics.compare(scores[r.name], scores[baseline.name], measure=measure, groups=groups)
            for r in recipes
            if r.status == "ok" and r is not baseline and r.same_model_as is None
        }
        for name, comparison in statistics.correct_family(family).items():
            next(r for r in recipes if r.name == name).versus_baseline = comparison
    if plan.costs and store.has(plan.costs):
        _add_costs(recipes, json.loads((store.folder(plan.costs) / "costs.json").read_text(encoding="utf-8")), baseline)
    report = json.loads((store.folder(facts.key) / "report.json").read_text(encoding="utf-8"))
    galleries = {
        e.recipe.name: store.folder(e.explain) for e in plan.recipes if e.explain is not None and store.has(e.explain)
    }
    result = StudyResult(
        name=settings.name,
        task=facts.task,
        primary={"classify": "accuracy", "regress": "mae"}.get(facts.task, "macro_f1"),
        data=DataReport.model_validate({"name": settings.data.path, "classes": list(facts.classes), **report}),
        settings={
            "command": command,
            "study": settings.model_dump(mode="json", by_alias=True),
            "epochs": plan.epochs,
            "image_size": list(facts.image_size),
            "notes": notes,
        },
        versions=versions(),
        machine=machine(),
        recipes=recipes,
        gallery=make_gallery(galleries, facts.classes) if galleries and settings.measures.gallery_images else None,
    )
    if settings.measures.ensembles and facts.task == "classify":
        result.ensembles = _ensembles(recipes, plan, store, facts, settings.measures.ensembles, notes)
    from vitkit.study.verdict import verdict

    result.verdict = verdict(result)
    return result


def _ensembles(
    recipes: list[RecipeResult], plan: Plan, store: Store, facts: DataFacts, combiners: list[str], notes: list[str]
) -> Ensembles | None:
    """All models together in every way asked for, and the best pairs in the first of them."""
    entries = {e.recipe.name: e for e in plan.recipes}
    names = [r.name for r in recipes if r.status == "ok" and r.same_model_as is None]
    if len(names) < 2:
        notes.append("An ensemble needs two models that finished; there are fewer.")
        return None
    folds = sorted({fold for fold, _ in entries[names[0]].predict})
    try:
        parts = {
            part: [{n: _of_fold(entries[n], store, fold, part) for n in names} for fold in folds]
            for part in ("test", "val")
        }
    except LookupError:
        notes.append("Ensembles are fitted and chosen on a validation part; set protocol.val above 0.")
        return None
    groups = test_groups(entries[names[0]], store, facts)
    latency = {r.name: r.costs["latency_ms_b1"].value for r in recipes if "latency_ms_b1" in r.costs}
    right_alone = {
        part: {n: _right(given, lambda number, seed, n=n, given=given: given[number][n][0][seed]) for n in names}
        for part, given in parts.items()
    }
    alone, on_val = right_alone["test"], {n: float(r.mean()) for n, r in right_alone["val"].items()}

    def together(members: tuple[str, ...], combine: str) -> tuple[float, TeamResult]:
        def answer(part: str) -> np.ndarray:
            def of(number: int, seed: int) -> np.ndarray:
                # fitted on the validation images of the same fold, so that no test image has a say
                own, fold = parts["val"][number], parts[part][number]
                fitted = ensembles.fit(np.stack([own[n][0][seed] for n in members]), own[members[0]][1], combine)
                return fitted.predict(np.stack([fold[n][0][seed] for n in members]))

            return _right(parts[part], of)

        right, best = answer("test"), max(members, key=lambda n: on_val[n])
        times = [latency.get(n) for n in members]
        row = TeamResult(
            members=list(members),
            combine=combine,
            accuracy=statistics.bootstrap_ci(right, groups=groups),
            best_member=best,
            gain=statistics.bootstrap_ci(right.astype(float) - alone[best], groups=groups),
            latency_ms_b1=None if None in times else sum(t for t in times if t is not None),
        )
        return float(answer("val").mean()), row

    teams = [together(tuple(names), combine)[1] for combine in combiners]
    if len(names) > 2:
        pairs = [together(pair, combiners[0]) for pair in combinations(names, 2)]
        teams += [row for _, row in sorted(pairs, key=lambda pair: -pair[0])[:_PAIRS_SHOWN]]
    answers = {n: stack_predictions(entries[n], store) for n in names}
    per_seed = [
        ensembles.complementarity(np.stack([answers[n][0][s].argmax(-1) for n in names]), answers[names[0]][1])
        for s in range(len(alone[names[0]]))
    ]
    return Ensembles(
        teams=teams,
        names=names,
        disagreement=np.mean([c["disagreement"] for c in per_seed], 0).tolist(),
        oracle=float(np.mean([c["oracle"] for c in per_seed])),
    )


def _right(folds: list[dict[str, Any]], answer: Callable[..., np.ndarray]) -> np.ndarray:
    """(S, N) bool, whether ``answer(number of the fold, number of the seed)`` (N, K) is right, folds pooled."""
    found = []
    for number, fold in enumerate(folds):
        values, labels = next(iter(fold.values()))
        found.append(np.stack([answer(number, seed).argmax(-1) == labels for seed in range(len(values))]))
    return np.concatenate(found, axis=1)


def _note_shared_models(recipes: list[RecipeResult], plan: Plan) -> None:
    """Recipes that differ in probes only have one model: the first of them, the baseline before all, stands for it."""
    entries = {e.recipe.name: e for e in plan.recipes}
    first: dict[str, str] = {}
    for row in recipes:
        if row.status == "ok":
            model = repr(sorted(entries[row.name].final.items()))
            if model in first:
                row.same_model_as = first[model]
            first.setdefault(model, row.name)


def test_groups(entry: RecipePlan, store: Store, facts: DataFacts) -> np.ndarray | None:
    """Group (patient, slide …) of every test image in the order of :func:`stack_predictions`, or None without groups.

    Images of one group are not independent, so intervals and tests resample whole groups.
    """
    with np.load(store.folder(facts.key) / "folds.npz") as data:
        if "groups" not in data:
            return None
        codes = data["groups"]
    indices = []
    for fold in sorted({fold for fold, _ in entry.predict}):
        key = next(key for (f, _), key in entry.predict.items() if f == fold)
        with np.load(store.folder(key) / "predictions.npz") as data:
            indices.append(data["test_indices"])
    return codes[np.concatenate(indices)]


def stack_predictions(entry: RecipePlan, store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Test predictions (S, N, K) and labels (N,) with folds pooled."""
    folds = [_of_fold(entry, store, fold, "test") for fold in sorted({fold for fold, _ in entry.predict})]
    return statistics.pool_folds([values for values, _ in folds], [labels for _, labels in folds])


def _of_fold(entry: RecipePlan, store: Store, fold: int, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (S, N, K) of the "test" or "val" part of a fold and labels (N,).

    Raises: LookupError if there is no such part.
    """
    rows, labels = [], None
    for seed in sorted({seed for _, seed in entry.predict}):
        with np.load(store.folder(entry.predict[fold, seed]) / "predictions.npz") as data:
            if f"{part}_predictions" not in data:
                raise LookupError(part)
            rows.append(data[f"{part}_predictions"])
            labels = data[f"{part}_labels"]
    assert labels is not None
    return np.stack(rows), labels


def _recipe(
    entry: RecipePlan, store: Store, facts: DataFacts, failures: dict[str, str], settings: StudySettings
) -> tuple[RecipeResult, np.ndarray | None]:
    recipe = entry.recipe
    row = RecipeResult(
        name=recipe.name,
        title=recipe.title,
        parts={p.slot: p.name for p in recipe.parts},
        steps=_steps(recipe, model_config(recipe, facts, 0).network_size),
        papers=_papers(recipe),
    )
    if recipe.name in failures:
        row.status, row.error = "failed", failures[recipe.name]
        return row, None
    values, labels = stack_predictions(entry, store)
    resamples = settings.measures.bootstrap
    groups = test_groups(entry, store, facts)
    curves: dict[str, Any] = {"train": _train_curves(entry, store)}
    if facts.task == "classify":
        row.measures = statistics.measure_classify(values, labels, resamples=resamples, groups=groups)
        correct = values.argmax(2) == labels
        curves["reliability"] = statistics.reliability(values, labels)
        curves["confusion"] = statistics.confusion(values, labels)
        curves["rejection"], _ = statistics.rejection(values.max(2), correct)
        score = correct
        _add_rejection(row, entry, store)
    elif facts.task == "multilabel":
        row.measures = statistics.measure_multilabel(values, labels, resamples=resamples, groups=groups)
        score = ((values > 0.5) == labels.astype(bool)).all(-1)
    else:
        targets = np.asarray(labels).reshape(values.shape[1:])
        row.measures = statistics.measure_regress(values, targets, resamples=resamples, groups=groups)
        error = np.abs(values - targets)
        score = error.mean(-1)
    if entry.attack is not None and store.has(entry.attack):
        curves["robustness"] = _robustness(row, store.folder(entry.attack))
    if entry.explain is not None and store.has(entry.explain):
        _faithfulness(row, store.folder(entry.explain))
    row.curves = Curves(**{k: v for k, v in curves.items() if v})
    seconds = sum(store.note(k)["seconds"] for k in dict.fromkeys(entry.chain) if store.has(k))
    row.costs["train_seconds"] = Cost(value=seconds, how="measured", note="all folds and seeds, shared stages included")
    row.model_dir = f"models/{folder_name(recipe.name)}"
    return row, score


def folder_name(recipe: str) -> str:
    """A recipe's name as a folder name.

    >>> folder_name("mixer=dct-attention:tau=0.5+gptq-w4")
    'mixer-dct-attention-tau-0.5+gptq-w4'
    """
    return "".join(c if c.isalnum() or c in "+-._" else "-" for c in recipe)


def _steps(recipe: Recipe, network_size: tuple[int, int] | None) -> list[str]:
    def text(name: str, options: dict[str, Any]) -> str:
        return name + (f" ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")

    pretraining, learning = training_of(recipe)
    steps = [f"pretrain with {text(u.name, u.options)}" for u in pretraining]
    base = "the baseline ViT" if recipe.base == "auto" else recipe.base
    if network_size is not None:
        height, width = network_size
        steps.insert(0, f"enlarge the images to {height}×{width} inside the model, as few pixels as {base} can work on")
    parts = ", ".join(f"{p.slot} = {text(p.name, p.options)}" for p in recipe.parts)
    optimizer = text(recipe.optimizer.name, recipe.optimizer.options) if recipe.optimizer else "AdamW"
    by = f" by {text(learning.name, learning.options)}" if learning else ""
    steps.append(f"train {base}{f' with {parts}' if parts else ''}{by} with {optimizer}")
    steps += [f"apply {text(u.name, u.options)}" for u in recipe.transforms]
    return steps + [f"probe with {text(u.name, u.options)}" for u in recipe.probes]


def _papers(recipe: Recipe) -> list[Paper]:
    table, out = methods(), {}
    uses = [*recipe.parts, *recipe.objectives, *recipe.transforms, *recipe.probes]
    for use in [*uses, *([recipe.optimizer] if recipe.optimizer else [])]:
        entry = table[use.name].entry
        out[use.name] = Paper(name=use.name, title=entry.title or use.name, id=entry.id or None)
    return list(out.values())


def _train_curves(entry: RecipePlan, store: Store) -> list[TrainPoint]:
    points = []
    for (fold, seed), key in entry.train.items():
        if fold != 0:
            continue
        history = json.loads((store.folder(key) / "history.json").read_text(encoding="utf-8"))
        for r in history["rows"]:
            points.append(
                TrainPoint(
                    epoch=r["epoch"],
                    seed=seed,
                    loss=r.get("loss"),
                    val_loss=r.get("val_loss"),
                    val_accuracy=r.get("val_accuracy"),
                    lr=r.get("lr"),
                )
            )
    return points


def _add_rejection(row: RecipeResult, entry: RecipePlan, store: Store) -> None:
    """For recipes with softmax-space rejection: thresholds from the validation part, figures on the test part."""
    use = next((p for p in entry.recipe.probes if ".stress.ood." in methods()[p.name].dotted), None)
    if use is None:
        return
    from vitkit.catalogue import resolve
    from vitkit.stress.ood.softmax_rejection import selective_report

    fit, reports = resolve(use.name), []
    for key in entry.predict.values():
        with np.load(store.folder(key) / "predictions.npz") as data:
            if "val_predictions" not in data:
                row.notes.append(f"{use.name} needs a validation part; set protocol.val above 0.")
                return
            fitted = fit(data["val_predictions"], data["val_labels"], **use.options)
            _, known, _ = fitted.predict(data["test_predictions"])
            reports.append(selective_report(data["test_predictions"], data["test_labels"], known))
    for name in ("coverage", "selective_accuracy"):
        values = [float(getattr(r, name) if hasattr(r, name) else r[name]) for r in reports]
        row.measures[f"{name}/{use.name}"] = Interval(value=float(np.mean(values)), per_seed=list(values))


def _robustness(row: RecipeResult, folder: Path) -> list[RobustnessPoint]:
    points = []
    for r in json.loads((folder / "robustness.json").read_text(encoding="utf-8")):
        interval = statistics.bootstrap_ci(np.array(r["correct"], dtype=bool))
        if r["epsilon_255"] is not None:
            points.append(
                RobustnessPoint(
                    attack=r["attack"],
                    epsilon_255=r["epsilon_255"],
                    accuracy=interval.value,
                    low=interval.low,
                    high=interval.high,
                )
            )
            if r.get("headline"):
                row.measures[f"robust_accuracy/{r['attack']}"] = interval.model_copy(
                    update={"note": f"epsilon {r['epsilon_255']:g}/255, {len(r['correct'])} images"}
                )
        for name, value in r.get("extra", {}).items():
            row.measures[f"{name}/{r['attack']}"] = Interval(value=value, note=r.get("note"))
    return points


def _faithfulness(row: RecipeResult, folder: Path) -> None:
    raw = json.loads((folder / "faithfulness.json").read_text(encoding="utf-8"))
    for explainer, scores in raw["scores"].items():
        for measure, values in scores.items():
            interval = statistics.bootstrap_ci(values)
            row.faithfulness.append(
                Faithfulness(
                    explainer=explainer, measure=measure, value=interval.value, low=interval.low, high=interval.high
                )
            )
    row.notes += [f"{explainer}: {reason}" for explainer, reason in raw["notes"].items()]


def _add_costs(recipes: list[RecipeResult], raw: dict[str, Any], baseline: RecipeResult | None) -> None:
    reference = raw["rows"].get(baseline.name, {}) if baseline else {}
    for row in recipes:
        found = raw["rows"].get(row.name)
        if found is None or row.status != "ok":
            continue
        for name in ("params", "flops", "size_bytes"):
            if found[name] is not None:
                ratio = found[name] / reference[name] if reference.get(name) else None
                row.costs[name] = Cost(value=found[name], how="counted", ratio=ratio)
        if found["peak_memory_bytes"] is not None:
            row.costs["peak_memory_bytes"] = Cost(
                value=found["peak_memory_bytes"], how="measured", engine=raw["engine"], note="one forward, batch 32"
            )
        for batch in (1, 32):
            timed = found[f"latency_ms_b{batch}"]
            base = reference.get(f"latency_ms_b{batch}", {}).get("value")
            row.costs[f"latency_ms_b{batch}"] = Cost(
                value=timed["value"],
                p95=timed["p95"],
                ratio=timed["value"] / base if base else None,
                how="measured",
                engine=raw["engine"],
            )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, cores and accelerator of this machine."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        **({"gpu": gpu} if gpu else {}),
    }

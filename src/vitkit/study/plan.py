"""A study as a graph of stages, each keyed by the hash of everything that decides its result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from vitkit import __version__
from vitkit.errors import BadInput
from vitkit.models.io import ModelConfig
from vitkit.study.settings import Measures, Protocol, Recipe, StudySettings, Use

# raise when a stage's meaning changes, so that results of older code are not taken for new ones
STAGE_FORMAT = 2


def stage_key(kind: str, settings: dict[str, Any]) -> str:
    """Readable kind and 16 hex digits of the hash over version, kind and settings."""
    text = json.dumps([STAGE_FORMAT, __version__, kind, settings], sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Stage:
    """One unit of work.

    Args:
        kind: data, pretrain, train, transform, predict, explain, attack or costs.
        title: for people, e.g. ``"train (seed 0)"``.
        settings: JSON; with ``kind`` it decides ``key``. Upstream stages appear in it by their keys.
        needs: keys of the stages whose outputs it reads.
        recipes: names of the recipes that use it.
    """

    kind: str
    title: str
    settings: dict[str, Any]
    needs: tuple[str, ...] = ()
    recipes: list[str] = field(default_factory=list, compare=False)

    @property
    def key(self) -> str:
        return stage_key(self.kind, self.settings)


@dataclass
class RecipePlan:
    """The stages of one recipe, by (fold, seed) where they repeat."""

    recipe: Recipe
    final: dict[tuple[int, int], str] = field(default_factory=dict)
    train: dict[tuple[int, int], str] = field(default_factory=dict)
    predict: dict[tuple[int, int], str] = field(default_factory=dict)
    explain: str | None = None
    attack: str | None = None
    chain: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """All stages in an order that respects their needs, and which recipe uses which."""

    stages: dict[str, Stage]
    recipes: list[RecipePlan]
    costs: str | None
    epochs: int


@dataclass(frozen=True)
class DataFacts:
    """What planning must know about the data, written by the data stage."""

    key: str
    task: str
    classes: tuple[str, ...]
    num_outputs: int
    in_chans: int
    image_size: tuple[int, int]
    num_folds: int
    mean: list[list[float]]
    std: list[list[float]]
    num_train: int
    wide: bool
    value_range: tuple[float, float] | None


def data_stage(settings: StudySettings, fingerprint: str) -> Stage:
    """The stage that checks and splits the data with this fingerprint."""
    protocol = settings.protocol
    return Stage(
        "data",
        "check and split the data",
        {
            "data": settings.data.model_dump(mode="json", exclude={"cache_mb", "augment"}),
            "fingerprint": fingerprint,
            "split": [protocol.test, protocol.val, protocol.folds, protocol.seed],
            # only where it is asked for: other data keep their key
            **({"long_tail": protocol.long_tail} if protocol.long_tail is not None else {}),
        },
    )


def model_config(recipe: Recipe, facts: DataFacts, fold: int) -> ModelConfig:
    """The model of a recipe, sized to the images."""
    from vitkit.models.presets import default_patch
    from vitkit.models.stride import network_size

    options: dict[str, Any] = {
        "num_classes": facts.num_outputs,
        "in_chans": facts.in_chans,
        "img_size": list(facts.image_size),
    }
    base = recipe.base
    if base == "auto":
        base = "vit_pico"
        options["patch_size"] = default_patch(facts.image_size)
    options |= recipe.model_options
    # a size the user asks for is taken as it is
    size = None if "img_size" in recipe.model_options else network_size(base, options, facts.image_size)
    if size is not None:
        options["img_size"] = list(size)
    return ModelConfig(
        base=base,
        base_options=options,
        parts=[{"slot": p.slot, "part": p.name, "where": p.where, "options": dict(p.options)} for p in recipe.parts],
        image_size=facts.image_size,
        network_size=size,
        in_chans=facts.in_chans,
        mean=tuple(facts.mean[fold]),
        std=tuple(facts.std[fold]),
        wide=facts.wide,
        value_range=facts.value_range,
        task=facts.task,
        classes=facts.classes,
    )


def training_of(recipe: Recipe) -> tuple[list[Use], Use | None]:
    """The objectives that pretrain, and the one with ``supervised = True`` that takes the place of plain training.

    Raises: BadInput if two would take it.
    """
    from vitkit.catalogue import resolve

    learning = [use for use in recipe.objectives if getattr(resolve(use.name), "supervised", False)]
    if len(learning) > 1:
        raise BadInput(
            f"Recipe {recipe.name!r}: {learning[0].name!r} and {learning[1].name!r} both take the place of the "
            "training from labels; keep one of them."
        )
    return [use for use in recipe.objectives if use not in learning], (learning[0] if learning else None)


def default_batch(num_train: int) -> int:
    """Batch size that gives a small data set some 40 steps an epoch: 16, 32 or 64."""
    return next((size for size in (16, 32) if num_train < 2 * size * 40), 64)


def _train_settings(protocol: Protocol, facts: DataFacts, epochs: int, seed: int) -> dict[str, Any]:
    names = ("lr", "weight_decay", "warmup_epochs", "label_smoothing", "mixup", "cutmix", "ema_decay", "clip_grad")
    more = ("accumulate", "class_weights", "early_stop", "precision", "devices", "strategy")
    batch_size = protocol.batch_size or default_batch(facts.num_train)
    return {**{n: getattr(protocol, n) for n in names + more}, "batch_size": batch_size, "epochs": epochs, "seed": seed}


def make_plan(settings: StudySettings, recipes: list[Recipe], facts: DataFacts, epochs: int) -> Plan:
    """Lay out every stage of every recipe; equal prefixes become one stage."""
    plan = Plan({}, [], None, epochs)
    protocol, measures = settings.protocol, settings.measures

    def put(kind: str, title: str, wanted: dict[str, Any], needs: tuple[str, ...], recipe: str) -> str:
        stage = Stage(kind, title, wanted, needs)
        stage = plan.stages.setdefault(stage.key, stage)
        if recipe not in stage.recipes:
            stage.recipes.append(recipe)
        return stage.key

    data = {"data": facts.key, "augment": settings.data.augment, "cache_mb": settings.data.cache_mb}
    for recipe in recipes:
        entry = RecipePlan(recipe)
        pretraining, learning = training_of(recipe)
        for fold in range(facts.num_folds):
            config = asdict(model_config(recipe, facts, fold))
            for seed in range(protocol.seed, protocol.seed + protocol.seeds):
                place = {**data, "fold": fold, "seed": seed}
                where = f"fold {fold}, seed {seed}" if facts.num_folds > 1 else f"seed {seed}"
                upstream: tuple[str, ...] = (facts.key,)
                key = None
                for use in pretraining:
                    train = _train_settings(protocol, facts, protocol.pretrain_epochs or epochs, seed)
                    key = put(
                        "pretrain",
                        f"pretrain {use.name} ({where})",
                        {**place, "config": config, "train": train, "method": use.model_dump(), "init": key},
                        upstream,
                        recipe.name,
                    )
                    upstream = (facts.key, key)
                optimizer = recipe.optimizer.model_dump() if recipe.optimizer else None
                key = put(
                    "train",
                    f"train ({where})",
                    {
                        **place,
                        "config": config,
                        "pretrained": recipe.pretrained,
                        "train": _train_settings(protocol, facts, epochs, seed),
                        "optimizer": optimizer,
                        "init": key,
                        # only where there is one: what was trained without keeps its key
                        **({"method": learning.model_dump()} if learning else {}),
                    },
                    upstream,
                    recipe.name,
                )
                entry.train[fold, seed] = key
                for use in recipe.transforms:
                    wanted = {**place, "method": use.model_dump(), "model": key, "calibration": protocol.calibration}
                    key = put("transform", f"{use.name} ({where})", wanted, (facts.key, key), recipe.name)
                entry.final[fold, seed] = key
                entry.predict[fold, seed] = put(
                    "predict", f"predict ({where})", {**place, "model": key}, (facts.key, key), recipe.name
                )
        _put_probes(entry, put, data, protocol, measures, facts)
        plan.recipes.append(entry)
    if measures.latency:
        first = [entry.final[0, protocol.seed] for entry in plan.recipes]
        wanted = {**data, "models": {e.recipe.name: k for e, k in zip(plan.recipes, first)}}
        plan.costs = put("costs", "latency, memory and size, interleaved", wanted, (facts.key, *first), "")
    return plan


def _put_probes(
    entry: RecipePlan, put: Any, data: dict[str, Any], protocol: Protocol, measures: Measures, facts: DataFacts
) -> None:
    from vitkit.catalogue import methods

    recipe, table = entry.recipe, methods()
    key = entry.final[0, protocol.seed]
    place = {**data, "fold": 0, "seed": protocol.seed, "model": key}
    rooms = {p.name: table[p.name].dotted for p in recipe.probes}
    explainers = [{"name": n, "options": {}} for n in measures.explainers]
    explainers += [p.model_dump() for p in recipe.probes if ".explain." in rooms[p.name]]
    attacks = [{"name": n, "options": {}} for n in measures.attacks]
    attacks += [p.model_dump() for p in recipe.probes if ".stress.attacks." in rooms[p.name]]
    if explainers and facts.task == "classify":
        wanted = {
            **place,
            "explainers": list({e["name"]: e for e in explainers}.values()),
            "images": measures.explain_images,
            "gallery": measures.gallery_images,
        }
        entry.explain = put("explain", "explanations", wanted, (facts.key, key), recipe.name)
    if attacks and facts.task == "classify":
        wanted = {
            **place,
            "attacks": list({a["name"]: a for a in attacks}.values()),
            "epsilons_255": list(measures.epsilons_255),
            "images": measures.attack_images,
        }
        entry.attack = put("attack", "robustness", wanted, (facts.key, key), recipe.name)

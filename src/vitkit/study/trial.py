"""What the options of a recipe build, tried on made-up images before any real one is read."""

from __future__ import annotations

import warnings
from typing import Any

from vitkit.errors import BadInput, VitkitError
from vitkit.study.plan import DataFacts, model_config
from vitkit.study.settings import PartUse, Recipe, Use

# patches along height and width, channels, classes: what is wrong with a value alone is wrong for both
_PLACES = ((8, 8, 3, 10), (12, 10, 1, 7))


def check_values(recipe: Recipe) -> None:
    """Build a recipe's network, objectives and optimizer once, so that a value no method takes is said at once.

    Options that fail on some images only (a window that does not divide the grid) are left to the recipe's own stage,
    which knows the images: an error counts if it goes away without the options and reads the same for images of
    another shape. Transforms and probes need data and a trained model, so they are left too.

    Raises: BadInput naming recipe, method and values, or a part and the slot it is for.
    """
    _check_slots(recipe)
    trials = _one_by_one(recipe)
    if not trials or _failure(recipe, 0) is None:
        return
    if _failure(_without_options(recipe), 0) is not None:
        return
    for what, given, alone in trials:
        error = _failure(alone, 0)
        if error is not None and error == _failure(alone, 1):
            where = f" See `vitkit show {what[1:-1]}`." if what[0] == "'" else ""
            values = ", ".join(f"{k}={v}" for k, v in given.items())
            raise BadInput(f"Recipe {recipe.name!r}: {what} cannot be made with {values}: {error.rstrip('.')}.{where}")


def _check_slots(recipe: Recipe) -> None:
    from vitkit.models.swap import canonical_slot, part_class

    for part in recipe.parts:
        try:
            part_class(canonical_slot(part.slot), part.name)
        except VitkitError as error:
            raise BadInput(f"Recipe {recipe.name!r}: {error}") from error


def _one_by_one(recipe: Recipe) -> list[tuple[str, dict[str, Any], Recipe]]:
    """(what it is, its options, the recipe with these options and no others) of everything that has some."""
    bare = _without_options(recipe)
    found: list[tuple[str, dict[str, Any], Recipe]] = []
    if recipe.model_options:
        base = "vit_pico" if recipe.base == "auto" else recipe.base
        found.append((f"the network {base}", recipe.model_options, _with(bare, model_options=recipe.model_options)))
    for i, part in enumerate(recipe.parts):
        given = dict(part.options) | ({} if part.where == "all" else {"where": part.where})
        if given:
            found.append((repr(part.name), given, _with(bare, parts=[*bare.parts[:i], part, *bare.parts[i + 1 :]])))
    for i, use in enumerate(recipe.objectives):
        if use.options:
            uses = [*bare.objectives[:i], use, *bare.objectives[i + 1 :]]
            found.append((repr(use.name), use.options, _with(bare, objectives=uses)))
    if recipe.optimizer is not None and recipe.optimizer.options:
        optimizer = recipe.optimizer
        found.append((repr(optimizer.name), optimizer.options, _with(bare, optimizer=optimizer)))
    return found


def _with(recipe: Recipe, **changed: Any) -> Recipe:
    return recipe.model_copy(update=changed)


def _without_options(recipe: Recipe) -> Recipe:
    return _with(
        recipe,
        model_options={},
        parts=[PartUse(name=p.name, slot=p.slot) for p in recipe.parts],
        objectives=[Use(name=u.name) for u in recipe.objectives],
        optimizer=None if recipe.optimizer is None else Use(name=recipe.optimizer.name),
    )


def _failure(recipe: Recipe, place: int) -> str | None:
    """What building the recipe in one of the places says; None if it works."""
    import torch

    from vitkit.catalogue import resolve
    from vitkit.models.io import construct
    from vitkit.models.presets import SIZES

    try:
        config = model_config(recipe, _made_up(recipe, place), 0)
        # published networks can be large; without weights they cost nothing, and the presets are small
        preset = recipe.base in ("auto", *SIZES)
        with torch.random.fork_rng(devices=[]), torch.device("cpu" if preset else "meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = construct(config).eval()
            if preset:
                with torch.inference_mode():
                    model(torch.rand(1, config.in_chans, *config.image_size))
            for use in recipe.objectives:
                resolve(use.name)(model, **use.options)
            if recipe.optimizer is not None and recipe.optimizer.options:
                from vitkit.train.optimizers.choose import make_optimizer

                make_optimizer(recipe.optimizer.name, model, 1e-3, 0.05, recipe.optimizer.options)
    except Exception as error:
        # methods of other packages raise what they like; which errors count is decided by comparison
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _made_up(recipe: Recipe, place: int) -> DataFacts:
    rows, columns, chans, classes = _PLACES[place]
    patch = recipe.model_options.get("patch_size", 4)
    patch = patch if isinstance(patch, int) and patch > 0 else 4
    return DataFacts(
        key="trial",
        task="classify",
        classes=tuple(str(i) for i in range(classes)),
        num_outputs=classes,
        in_chans=chans,
        image_size=(rows * patch, columns * patch),
        num_folds=1,
        mean=[[0.5] * chans],
        std=[[0.5] * chans],
        num_train=1,
        wide=False,
        value_range=None,
    )

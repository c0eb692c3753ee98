"""From the names a person types to a full recipe.

``vit`` is the baseline sized to the images; a method of the catalogue is the baseline with that method; a timm name is
that network; ``a+b`` combines; ``slot=name`` names the slot; ``name:key=value`` sets an option; ``gptaq-w4a8`` is short
for ``gptaq:w_bits=4:a_bits=8``.
"""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any

import yaml

from vitkit.catalogue import methods, resolve
from vitkit.catalogue.options import options as options_of
from vitkit.errors import BadInput, unknown
from vitkit.study.plan import training_of
from vitkit.study.settings import PartUse, Recipe, StudySettings, Use
from vitkit.study.trial import check_values
from vitkit.yaml_settings import load_yaml

BASELINE = "vit"


def resolve_recipes(settings: StudySettings) -> list[Recipe]:
    """All recipes of a study, the baseline first.

    The baseline is ``vit`` when it is asked for, else the first recipe.

    Raises: UnknownName for a name that is no recipe, method or timm model; BadInput for a bad option or a cycle.
    """
    written = {r.name: r for r in settings.recipes if isinstance(r, Recipe)}
    _check_measures(settings)
    out: list[Recipe] = []
    from vitkit.models.build import check_name

    for item in settings.recipes:
        recipe = expand(item, written) if isinstance(item, Recipe) else parse(item, written)
        if recipe.base == "auto":
            recipe = recipe.model_copy(update={"base": settings.base})
        if recipe.base != "auto":
            check_name(recipe.base)
        if any(r.name == recipe.name for r in out):
            raise BadInput(f"The recipe {recipe.name!r} is named twice; give one of them another name.")
        check_options(recipe)
        check_values(recipe)
        out.append(recipe)
    if not out:
        raise BadInput("A study needs at least one recipe, for example --recipes vit,sinkhorn.")
    plain = next((r for r in out if r.name == BASELINE), out[0])
    return [plain, *(r for r in out if r is not plain)]


def expand(recipe: Recipe, written: dict[str, Recipe], seen: tuple[str, ...] = ()) -> Recipe:
    """Fill in what ``from`` another recipe brings: its model and parts, then ours behind them."""
    if recipe.from_ is None:
        return _check(recipe)
    if recipe.name in seen:
        raise BadInput(f"The recipes {' → '.join((*seen, recipe.name))} refer to each other in a circle.")
    parent = (
        expand(written[recipe.from_], written, (*seen, recipe.name))
        if recipe.from_ in written
        else parse(recipe.from_, written)
    )
    own = recipe.model_fields_set
    return _check(
        parent.model_copy(
            update={
                "name": recipe.name,
                "title": recipe.title,
                "base": recipe.base if "base" in own else parent.base,
                "pretrained": recipe.pretrained if "pretrained" in own else parent.pretrained,
                "model_options": {**parent.model_options, **recipe.model_options},
                "parts": [*parent.parts, *recipe.parts],
                "objectives": [*parent.objectives, *recipe.objectives],
                "optimizer": recipe.optimizer or parent.optimizer,
                "transforms": [*parent.transforms, *recipe.transforms],
                "probes": [*parent.probes, *recipe.probes],
            }
        )
    )


def parse(text: str, written: dict[str, Recipe] | None = None) -> Recipe:
    """One recipe from its short form.

    >>> r = parse("mixer=dct-attention:tau=0.5+gptq-w4")
    >>> r.parts[0].slot, r.parts[0].options, r.transforms[0].name, r.transforms[0].options
    ('mixer', {'tau': 0.5}, 'gptq', {'w_bits': 4})
    >>> parse("ss2d:where=last:2").parts[0].where
    'last:2'
    """
    recipe = Recipe(name=text)
    for token in text.split("+"):
        recipe = _join(recipe, token.strip(), written or {})
    return recipe.model_copy(update={"name": text})


def _join(recipe: Recipe, token: str, written: dict[str, Recipe]) -> Recipe:
    slot = None
    if match := re.match(r"^([a-z_]+)=(?=[A-Za-z])", token):
        slot, token = match.group(1), token[match.end() :]
    name, *pairs = token.split(":")
    options = _options(pairs, token)
    if slot is None and name in written:
        if options:
            raise BadInput(f"{token!r}: {name!r} is a recipe of the study file; write its options there.")
        return _merge(recipe, expand(written[name], written))
    if slot is None and name == BASELINE:
        return recipe.model_copy(update={"model_options": {**recipe.model_options, **options}})
    table = methods()
    if name not in table and (match := re.fullmatch(r"(.+)-w(\d+)(?:a(\d+))?", name)):
        name = match.group(1)
        options = {
            "w_bits": int(match.group(2)),
            **({"a_bits": int(match.group(3))} if match.group(3) else {}),
            **options,
        }
    if name in table:
        return _add_method(recipe, table[name], slot, options)
    if slot == "base" or slot is None:
        import timm

        from vitkit.models.backbones import register

        register()
        if timm.is_model(name.split(".")[0]):
            return recipe.model_copy(update={"base": name, "model_options": {**recipe.model_options, **options}})
        raise unknown(
            "recipe, method or timm model", name, [BASELINE, *written, *table, *timm.list_models()], "vitkit methods"
        )
    raise unknown("method", name, table, "vitkit methods")


def _options(pairs: list[str], token: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    # a number behind a colon belongs to the value before it: where=last:2, order=local:3
    joined: list[str] = []
    for pair in pairs:
        if joined and pair.isdigit():
            joined[-1] += f":{pair}"
        else:
            joined.append(pair)
    for pair in joined:
        key, sep, value = pair.partition("=")
        if not sep or not key:
            raise BadInput(f"{token!r}: {pair!r} is not an option; write name:key=value.")
        try:
            out[key] = load_yaml(value)
        except yaml.YAMLError as error:
            raise BadInput(
                f"{token!r}: the value {value!r} of {key!r} cannot be read; a list is written [1,2], and text "
                "with brackets in quotes."
            ) from error
    return out


def _add_method(recipe: Recipe, method: Any, slot: str | None, options: dict[str, Any]) -> Recipe:
    use = Use(name=method.name, options=options)
    if method.kind == "part":
        own = slot or method.slot
        where = options.pop("where", "all") if "where" in options else "all"
        part = PartUse(name=method.name, options=options, slot=own, where=where)
        return recipe.model_copy(update={"parts": [*recipe.parts, part]})
    if slot is not None and slot not in ("objective", "transform", "probe", "optimizer"):
        raise BadInput(
            f"{method.name!r} is a {method.kind}, not a part for the slot {slot!r}; write just {method.name!r}."
        )
    if method.kind == "optimizer":
        if recipe.optimizer is not None:
            raise BadInput(f"A recipe has one optimizer; {recipe.optimizer.name!r} and {method.name!r} were given.")
        return recipe.model_copy(update={"optimizer": use})
    if method.kind == "backbone":
        # what a backbone's file provides are timm's entry points, which bear the names of the networks
        base = method.dotted.partition(":")[2]
        return recipe.model_copy(update={"base": base, "model_options": {**recipe.model_options, **options}})
    field = {"objective": "objectives", "transform": "transforms", "probe": "probes"}.get(method.kind)
    if field is None:
        raise BadInput(
            f"{method.name!r} is a {method.kind}; a recipe takes parts, objectives, transforms, probes and optimizers."
        )
    return recipe.model_copy(update={field: [*getattr(recipe, field), use]})


def _merge(recipe: Recipe, other: Recipe) -> Recipe:
    return recipe.model_copy(
        update={
            "base": other.base if other.base != "auto" else recipe.base,
            "pretrained": recipe.pretrained or other.pretrained,
            "model_options": {**recipe.model_options, **other.model_options},
            "parts": [*recipe.parts, *other.parts],
            "objectives": [*recipe.objectives, *other.objectives],
            "optimizer": other.optimizer or recipe.optimizer,
            "transforms": [*recipe.transforms, *other.transforms],
            "probes": [*recipe.probes, *other.probes],
        }
    )


def _check(recipe: Recipe) -> Recipe:
    """Every method that a written recipe names must exist and be of the right kind."""
    table = methods()
    wanted: list[tuple[str, list[Any]]] = [
        ("part", recipe.parts),
        ("objective", recipe.objectives),
        ("transform", recipe.transforms),
        ("probe", recipe.probes),
    ]
    if recipe.optimizer is not None:
        wanted.append(("optimizer", [recipe.optimizer]))
    for kind, uses in wanted:
        for use in uses:
            if use.name not in table:
                raise unknown(f"{kind} (in recipe {recipe.name!r})", use.name, table, "vitkit methods")
            if table[use.name].kind != kind:
                raise BadInput(f"Recipe {recipe.name!r}: {use.name!r} is a {table[use.name].kind}, not a {kind}.")
    return recipe


def check_options(recipe: Recipe) -> None:
    """Every option of a recipe must be one that its method or network takes, said before anything is trained.

    Raises: BadInput naming recipe, method, option and what is allowed.
    """
    # a second one in place of the training would be noticed after hours
    training_of(recipe)
    uses: list[Use] = [*recipe.parts, *recipe.objectives, *recipe.transforms, *recipe.probes]
    if recipe.optimizer is not None:
        uses.append(recipe.optimizer)
    for use in uses:
        if not use.options:
            continue
        found = resolve(use.name)
        if _takes_anything(found):
            continue
        allowed = [o.name for o in options_of(found)]
        wrong = [str(k) for k in use.options if k not in allowed]
        if wrong:
            near = difflib.get_close_matches(wrong[0], allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise BadInput(
                f"Recipe {recipe.name!r}: {use.name!r} has no option {wrong[0]!r}.{hint} "
                f"It takes {', '.join(allowed) or 'none'}; see `vitkit show {use.name}`."
            )
    if recipe.model_options:
        _check_network(recipe)


def _takes_anything(found: Any) -> bool:
    """True if the innermost signature passes unknown names on, so that only the call itself can tell."""
    source = found.__init__ if inspect.isclass(found) else found
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(source).parameters.values())


def _check_network(recipe: Recipe) -> None:
    import timm
    import torch
    from timm.models.vision_transformer import VisionTransformer

    from vitkit.models.backbones import register

    register()
    base = "vit_pico" if recipe.base == "auto" else recipe.base
    # YAML knows lists only, timm wants tuples
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recipe.model_options.items()}
    try:
        # on the meta device a network has shapes but no weights, so even a large one costs nothing
        with torch.device("meta"):
            timm.create_model(base, **given)
    except TypeError as error:
        name = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if name is None:
            raise BadInput(
                f"Recipe {recipe.name!r}: {base} cannot be made with {recipe.model_options}: {error}."
            ) from error
        near = difflib.get_close_matches(name[1], inspect.signature(VisionTransformer.__init__).parameters, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise BadInput(
            f"Recipe {recipe.name!r}: the network {base} has no option {name[1]!r}.{hint} "
            "Options of a network are those of its constructor in timm."
        ) from error
    except Exception:
        # values that do not fit, which only matter if they are what does not fit: the trial tells
        return


def _check_measures(settings: StudySettings) -> None:
    """Attacks and explainers must be known ones; a mistyped name would cost its figures only after hours."""
    table = methods()
    rooms = {"attacks": ".stress.attacks.", "explainers": ".explain."}
    for key, room in rooms.items():
        known = [name for name, m in table.items() if m.kind == "probe" and room in m.dotted]
        for name in getattr(settings.measures, key):
            if name not in known:
                raise unknown(f"method (in measures.{key})", name, known, "vitkit methods --kind probe")

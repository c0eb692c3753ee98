"""The study files that come with vitkit can be read, and everything they name exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitkit.catalogue import methods
from vitkit.data import open_source
from vitkit.study.plan import DataFacts, make_plan
from vitkit.study.recipe import resolve_recipes
from vitkit.study.settings import read_study

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(FOLDER.glob("*.yaml"))
# facts of scikit-learn's digits, which all of them use
DIGITS = DataFacts(
    key="data-0",
    task="classify",
    classes=tuple("0123456789"),
    num_outputs=10,
    in_chans=1,
    image_size=(32, 32),
    num_folds=1,
    mean=[[0.3]],
    std=[[0.3]],
    num_train=1258,
    wide=False,
    value_range=None,
)


def plan_of(name):
    settings = read_study(FOLDER / name)
    return make_plan(settings, resolve_recipes(settings), DIGITS, settings.protocol.epochs)


def test_the_folder_has_studies_and_the_readme_lists_them():
    assert len(FILES) >= 6
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in FILES:
        assert f"`{path.name}`" in listed


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_study_resolves(path):
    settings = read_study(path)
    # the folder of results is named after the study
    assert settings.name.replace("-", "_") == path.stem
    recipes = resolve_recipes(settings)
    assert len(recipes) == len(settings.recipes) > 1
    plan = make_plan(settings, recipes, DIGITS, settings.protocol.epochs)
    assert all(entry.predict for entry in plan.recipes)
    # runs without a network
    assert open_source(settings.data.path).task == "classify"


def test_compression_shares_one_training():
    plan = plan_of("compress.yaml")
    assert sum(s.kind == "train" for s in plan.stages.values()) == 1
    steps = sum(len(entry.recipe.transforms) for entry in plan.recipes)
    # the last recipe starts from the merging that another one made
    assert sum(s.kind == "transform" for s in plan.stages.values()) == steps - 1


def test_self_pretraining_differs_from_scratch_by_its_start_alone():
    plan = plan_of("defect_mae.yaml")
    entries = {e.recipe.name: e for e in plan.recipes}
    scratch, own = (plan.stages[entries[n].train[0, 0]].settings for n in ("scratch", "self-mae"))
    assert scratch["init"] is None and own["init"].startswith("pretrain-")
    assert {**own, "init": None} == scratch


def test_the_folder_visits_nearly_all_methods():
    seen, networks = set(), set()
    for path in FILES:
        settings = read_study(path)
        seen |= {*settings.measures.attacks, *settings.measures.explainers}
        for recipe in resolve_recipes(settings):
            uses = [*recipe.parts, *recipe.objectives, *recipe.transforms, *recipe.probes, recipe.optimizer]
            seen |= {use.name for use in uses if use is not None}
            networks.add(recipe.base)
    own = {n: m for n, m in methods().items() if m.entry.source == "vitkit"}
    usable = {n for n, m in own.items() if m.kind not in ("backbone", "strategy")}
    assert seen <= set(methods())
    assert len(seen & usable) >= 0.95 * len(usable), f"in no recipe: {sorted(usable - seen)}"
    # the first network of each file is its small one
    small = {}
    for method in own.values():
        if method.kind == "backbone":
            small.setdefault(method.dotted.partition(":")[0], method.dotted.partition(":")[2])
    assert set(small.values()) <= networks

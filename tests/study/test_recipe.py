from __future__ import annotations

import pytest

from vitkit.errors import BadInput, UnknownName
from vitkit.study.recipe import parse, resolve_recipes
from vitkit.study.settings import make_settings


def resolved(*recipes):
    return resolve_recipes(make_settings({"recipes": list(recipes)}))


def test_short_forms():
    assert parse("vit").parts == []
    assert parse("resnet18").base == "resnet18"
    one = parse("mixer=dct-attention:tau=0.5+gptq-w4a8")
    assert (one.parts[0].slot, one.parts[0].options) == ("mixer", {"tau": 0.5})
    assert (one.transforms[0].name, one.transforms[0].options) == ("gptq", {"w_bits": 4, "a_bits": 8})
    assert one.name == "mixer=dct-attention:tau=0.5+gptq-w4a8"
    assert parse("sinkhorn:where=even").parts[0].where == "even"
    assert parse("zsharp").optimizer.name == "zsharp"
    assert parse("vit_tiny_patch16_224+sinkhorn").base == "vit_tiny_patch16_224"


def test_the_baseline_comes_first():
    assert [r.name for r in resolved("sinkhorn", "vit", "tome")] == ["vit", "sinkhorn", "tome"]
    assert [r.name for r in resolved("sinkhorn", "tome")] == ["sinkhorn", "tome"]


def test_from_brings_the_other_recipe():
    small = {"name": "small", "parts": {"normalizer": "sinkhorn"}, "model_options": {"depth": 2}}
    child = {"name": "child", "from": "small", "transforms": ["tome"], "model_options": {"embed_dim": 64}}
    _, out = resolved(small, child)
    assert [p.name for p in out.parts] == ["sinkhorn"]
    assert [t.name for t in out.transforms] == ["tome"]
    assert out.model_options == {"depth": 2, "embed_dim": 64}
    assert parse("small+tome", {"small": resolved(small)[0]}).parts[0].name == "sinkhorn"


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        ("sinkhron", UnknownName, "Did you mean 'sinkhorn'"),
        ("vit_tiny_patch16_223", UnknownName, "vit_tiny_patch16_224"),
        ("sinkhorn:steps", BadInput, "name:key=value"),
        ("zsharp+sam", BadInput, "one optimizer"),
        ("mixer=tome", BadInput, "is a transform"),
        ({"name": "a", "transforms": ["sinkhorn"]}, BadInput, "is a part, not a transform"),
        ({"name": "a", "from": "b"}, UnknownName, "'b'"),
        ({"name": "a", "base": "vit_femtoo"}, UnknownName, "Did you mean 'vit_femto'"),
    ],
)
def test_errors(recipe, error, words):
    with pytest.raises(error, match=words):
        resolved(recipe)


def test_the_study_names_the_network_of_recipes_that_name_none():
    settings = {"base": "vit_femto", "recipes": ["vit", "cpe", "resnet18", {"name": "own", "base": "vit_nano"}]}
    assert [r.base for r in resolve_recipes(make_settings(settings))] == [
        "vit_femto",
        "vit_femto",
        "resnet18",
        "vit_nano",
    ]
    with pytest.raises(UnknownName, match="vit_femto"):
        resolve_recipes(make_settings({**settings, "base": "vit_femtoo"}))


def test_circles_and_twins():
    with pytest.raises(BadInput, match="circle"):
        resolved({"name": "a", "from": "b"}, {"name": "b", "from": "a"})
    with pytest.raises(BadInput, match="named twice"):
        resolved("vit", "tome", "tome")

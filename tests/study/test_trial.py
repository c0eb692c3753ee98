"""Values no method takes are said before an image is read; what depends on the images is left to the images."""

from __future__ import annotations

import pytest
import torch

from vitkit.catalogue import methods
from vitkit.errors import BadInput
from vitkit.study import run as run_module
from vitkit.study import trial
from vitkit.study.recipe import parse, resolve_recipes
from vitkit.study.run import run_study
from vitkit.study.settings import make_settings
from vitkit.study.trial import check_values


def resolved(*recipes):
    return resolve_recipes(make_settings({"recipes": list(recipes)}))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            "sinkhorn:steps=-3",
            ["'sinkhorn' cannot be made with steps=-3", "odd and positive", "`vitkit show sinkhorn`"],
        ),
        ("token-graying:eps=abc", ["'token-graying' cannot be made with eps=abc"]),
        ("token-graying:mode=foo+tome", ["mode=foo", "'dct' or 'svd'"]),
        ("sinkhorn:tau=1+kan:where=elsewhere", ["'kan' cannot be made with where=elsewhere"]),
        ("mixer=sinkhorn", ["slot 'normalizer', not for 'mixer'"]),
        ("mae:mask_ratio=2", ["'mae' cannot be made with mask_ratio=2", "[0, 1)"]),
        ("zsharp:percentile=-3", ["'zsharp' cannot be made with percentile=-3", "[0, 1)"]),
        ("resnet18+sam:rho=-1", ["'sam' cannot be made with rho=-1", "zero or positive"]),
        ("vit:num_heads=5", ["the network vit_pico cannot be made with num_heads=5", "divisible"]),
        ("vit:depth=-2+sinkhorn", ["the network vit_pico cannot be made with depth=-2"]),
        ("vit_femto+sinkhorn:steps=2", ["'sinkhorn' cannot be made with steps=2"]),
    ],
)
def test_impossible_values_name_recipe_method_and_value(recipe, words):
    with pytest.raises(BadInput) as error:
        resolved("vit", recipe)
    for word in [f"Recipe {recipe!r}: ", *words]:
        assert word in str(error.value)
    assert ".." not in str(error.value) and "\n" not in str(error.value)


def test_a_written_recipe_is_tried_as_a_whole():
    """The one of several whose values are wrong is named, and two wrong ones do not hide each other."""
    wrong = {"name": "mine", "parts": [{"slot": "normalizer", "name": "sinkhorn", "options": {"steps": 4}}]}
    wrong["objectives"] = [{"name": "mae", "options": {"mask_ratio": 7}}]
    with pytest.raises(BadInput, match="Recipe 'mine': 'sinkhorn' cannot be made with steps=4"):
        resolved(wrong)
    wrong["parts"][0]["options"]["steps"] = 3
    with pytest.raises(BadInput, match="Recipe 'mine': 'mae' cannot be made with mask_ratio=7"):
        resolved(wrong)


def test_what_depends_on_the_images_is_no_error_yet():
    # 65 and 121 tokens are no powers of two; other images may have 64
    assert "power of two" in trial._failure(parse("qontot"), 0)
    assert resolved("qontot", "qontot:seed=3", "vit:patch_size=64", "vit:img_size=[40,24]")
    # 5 divides neither grid, but another one
    sized = parse("sinkhorn:steps=3")
    failures = {0: "a window of 5 does not divide 8×8", 1: "a window of 5 does not divide 12×10"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "_failure", lambda r, place: failures[place] if r.parts[0].options else None)
        check_values(sized)
        failures[1] = failures[0]
        with pytest.raises(BadInput, match="window of 5"):
            check_values(sized)


def test_every_part_objective_and_optimizer_passes_with_its_own_defaults():
    names = [n for n, m in methods().items() if m.kind in ("part", "objective", "optimizer")]
    failures = {name: trial._failure(parse(name), 0) for name in names}
    # a circuit for other numbers of tokens, and a read-out for hosts without class token
    assert {n for n, e in failures.items() if e} <= {"qontot", "edit"}
    assert "class_token=False" in (failures["edit"] or "")


def test_a_trial_leaves_no_trace():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    resolved("vit", "sinkhorn:steps=3", "mae:mask_ratio=0.5", "zsharp:rho=0.1")
    assert torch.equal(torch.rand(2), expected)
    assert torch.zeros(1).device.type == "cpu"


def test_recipes_without_options_build_nothing(monkeypatch):
    monkeypatch.setattr(trial, "_failure", lambda *_: pytest.fail("built"))
    resolved("vit", "sinkhorn", "tome:r=2", "gptaq-w4", "zsharp")


def test_a_study_stops_before_it_reads_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "open_data", lambda *_: pytest.fail("the data were opened"))
    with pytest.raises(BadInput, match="steps=-1"):
        run_study(make_settings({"recipes": ["vit", "sinkhorn:steps=-1"]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()

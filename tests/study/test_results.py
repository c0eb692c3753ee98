"""results.json and results.csv: published, finite, complete, readable again."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from vitkit.errors import BadInput
from vitkit.study import results
from vitkit.study.modelcard import model_card
from vitkit.study.results import (
    Comparison,
    Cost,
    Curves,
    DataReport,
    Explanation,
    Gallery,
    GalleryImage,
    Interval,
    Paper,
    RecipeResult,
    StudyResult,
)

PIXEL = "data:image/png;base64,iVBORw0KGgo="


def study() -> StudyResult:
    vit = RecipeResult(
        name="vit",
        baseline=True,
        measures={"accuracy": Interval(value=0.9, low=0.85, high=0.95, per_seed=[0.88, 0.92])},
        costs={"params": Cost(value=1e6, how="counted")},
    )
    tome = RecipeResult(
        name="tome",
        title="Token *merging*",
        steps=["vit", "tome r=4"],
        papers=[Paper(name="tome", title="Token Merging", id="2210.09461")],
        measures={
            "accuracy": Interval(value=0.92, low=0.87, high=0.96),
            "auroc": Interval(note="needs at least two classes in the test set"),
            "ece": Interval(value=0.08, low=0.05, high=0.11),
        },
        versus_baseline=Comparison(difference=0.02, low=-0.01, high=0.05, p=0.2, p_holm=0.2, test="mcnemar"),
        costs={"latency_ms_b1": Cost(value=2.0, p95=2.6, ratio=0.5, how="measured", engine="torch eager fp32")},
        curves=Curves(confusion=[[5, 1], [0, 4]]),
        model_dir="models/tome",
    )
    broken = RecipeResult(name="broken", status="failed", error="out of memory")
    data = DataReport(
        name="digits",
        classes=["a_b", "c"],
        counts={"train": {"a_b": 50, "c": 40}, "test": {"a_b": 6, "c": 4}},
        warnings=["Few images."],
        imaging="x-ray",
    )
    return StudyResult(
        name="s",
        data=data,
        settings={"lr": float("nan"), "seeds": 2},
        versions={"vitkit": "0.1.0"},
        recipes=[vit, tome, broken],
    )


def test_json_round_trip(tmp_path):
    path = tmp_path / "results.json"
    results.write_json(study(), path)
    text = path.read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    again = results.read_json(path)
    assert [r.name for r in again.recipes] == ["vit", "tome", "broken"]
    assert again.recipes[1].measures == study().recipes[1].measures
    assert again.data.model_extra == {"imaging": "x-ray"}


def test_json_has_the_published_keys(tmp_path):
    results.write_json(study(), tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    vit, tome, broken = data["recipes"]
    assert tome["measures"]["accuracy"] == {"value": 0.92, "low": 0.87, "high": 0.96}
    assert tome["measures"]["auroc"] == {
        "value": None,
        "low": None,
        "high": None,
        "note": "needs at least two classes in the test set",
    }
    assert tome["costs"]["latency_ms_b1"]["ratio"] == 0.5
    assert vit["versus_baseline"] is None
    assert vit["measures"]["accuracy"]["per_seed"] == [0.88, 0.92]
    assert "train" not in tome["curves"] and tome["curves"]["confusion"] == [[5, 1], [0, 4]]
    assert "error" not in tome and broken["error"] == "out of memory"
    assert {"settings", "versions"} <= set(data)


def test_the_committed_schema_is_in_step():
    path = Path(__file__).parents[2] / "docs" / "results.schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == results.schema(), (
        "run: python -m vitkit.study.results > docs/results.schema.json"
    )


def test_csv_has_one_row_per_recipe_best_first(tmp_path):
    results.write_csv(study(), tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [r["recipe"] for r in rows] == ["tome", "vit", "broken"]
    tome = rows[0]
    assert (tome["accuracy"], tome["accuracy_low"], tome["accuracy_high"]) == ("0.92", "0.87", "0.96")
    assert tome["auroc"] == "" and tome["versus_baseline_difference"] == "0.02"
    assert (tome["latency_ms_b1_p95"], tome["latency_ms_b1_how"]) == ("2.6", "measured")
    assert rows[2]["status"] == "failed" and rows[2]["error"] == "out of memory"


def test_csv_of_an_empty_study(tmp_path):
    results.write_csv(StudyResult(name="s", data=DataReport(name="d")), tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text().strip() == "recipe"


@pytest.mark.parametrize("value", [math.nan, math.inf, np.float32("nan"), np.float64("-inf")])
def test_what_is_not_finite_becomes_none(value):
    assert Interval(value=value).value is None


def test_numpy_numbers_are_accepted():
    assert Interval(value=np.float32(0.5), low=np.int64(0)).model_dump()["value"] == 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: RecipeResult(name="a", accuracy=0.9),
        lambda: Cost(value=1, how="guessed"),
        lambda: Curves(confusion=[[1, 2]]),
        lambda: GalleryImage(key="a", png="https://example.org/cat.png"),
        lambda: Paper(name="a", title="b", url="javascript:alert(1)"),
        lambda: Gallery(
            images=[GalleryImage(key="a", png=PIXEL)],
            explanations=[Explanation(recipe="r", explainer="e", heatmaps=[PIXEL, PIXEL])],
        ),
        lambda: StudyResult(
            name="s", data=DataReport(name="d"), recipes=[RecipeResult(name="a"), RecipeResult(name="a")]
        ),
    ],
)
def test_what_the_schema_does_not_allow(wrong):
    with pytest.raises(ValidationError):
        wrong()


def test_an_arxiv_id_becomes_a_link():
    assert Paper(name="a", title="b", id="2504.02692v2").url == "https://arxiv.org/abs/2504.02692v2"
    assert Paper(name="a", title="b", id="doi:10.1/2").url is None


def test_a_file_of_another_shape_is_named(tmp_path):
    path = tmp_path / "r.json"
    path.write_text('{"name": "s", "data": {"name": "d"}, "recipes": [{"nam": "vit"}]}')
    with pytest.raises(BadInput, match=r"r\.json is not a study result: recipes\.0\."):
        results.read_json(path)


def test_ranking_knows_which_way_is_better():
    recipes = [RecipeResult(name=n, measures={"mae": Interval(value=v)}) for n, v in (("a", 2.0), ("b", 1.0))]
    recipes.append(RecipeResult(name="c"))
    result = StudyResult(name="s", data=DataReport(name="d"), recipes=recipes)
    assert result.primary_measure == "mae"
    assert [r.name for r in result.ranked()] == ["b", "a", "c"]


def test_model_card_says_what_it_is_and_where_it_ends():
    result = study()
    card = model_card(result.recipes[1], result)
    assert card.startswith("---\nlibrary_name: vitkit")
    assert "arxiv:2210.09461" in card
    assert "Token \\*merging\\*" in card and "a\\_b" in card
    assert "| Accuracy | 92.0 % | 87.0–96.0 % |" in card
    assert "not significant" in card
    assert "| 2 ms | measured, torch eager fp32 |" in card
    assert "Fewer than 30 test images" in card and "Few images." in card
    assert "off by 8 points" in card and "was not measured" in card
    assert "vitkit predict models/tome IMAGES" in card
    assert "[Token Merging](https://arxiv.org/abs/2210.09461)" in card

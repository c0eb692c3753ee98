"""What a path means where a model is wanted."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitkit.cli.find_model import find_model
from vitkit.errors import BadInput
from vitkit.study.results import DataReport, Interval, RecipeResult, StudyResult, write_json


def test_paths_without_a_model(tmp_path):
    with pytest.raises(BadInput, match="There is no folder"):
        find_model(tmp_path / "gone")
    for network in ("vit_small_patch16_224", "vit_small_patch16_224.augreg_in21k_ft_in1k", "hgvt_tiny"):
        with pytest.raises(BadInput, match=f"{network} names a network .* --recipes {network}"):
            find_model(Path(network))
    (tmp_path / "x").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        find_model(tmp_path / "x")
    with pytest.raises(BadInput, match="holds no model"):
        find_model(tmp_path)
    (tmp_path / "models" / "vit").mkdir(parents=True)
    (tmp_path / "models" / "vit" / "config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"Try .*models.vit\."):
        find_model(tmp_path)
    assert find_model(tmp_path / "models" / "vit") == tmp_path / "models" / "vit"


def test_of_a_study_the_best_model_that_is_there(tmp_path):
    recipes = [
        RecipeResult(name=name, measures={"accuracy": Interval(value=value)}, model_dir=f"models/{name}")
        for name, value in (("worse", 0.6), ("better", 0.9), ("lost", 1.0))
    ]
    write_json(StudyResult(name="study", data=DataReport(name="x"), recipes=recipes), tmp_path / "results.json")
    with pytest.raises(BadInput, match="no model that finished"):
        find_model(tmp_path)
    for name in ("worse", "better"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    assert find_model(tmp_path).name == "better"

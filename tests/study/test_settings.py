from __future__ import annotations

import pytest

from vitkit.errors import BadInput
from vitkit.study.settings import StudySettings, make_settings, parse_duration, read_study


def test_defaults_and_forms():
    made = make_settings({"data": "digits", "recipes": ["vit", {"name": "x", "parts": {"mixer": "dct-attention"}}]})
    assert made.data.path == "digits"
    assert made.recipes[1].parts[0].slot == "mixer"
    assert made.recipes[1].parts[0].name == "dct-attention"
    again = StudySettings.model_validate(made.model_dump(mode="json", by_alias=True))
    assert again == made


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"protocl": {}}, ["protocl", "Did you mean 'protocol'"]),
        ({"protocol": {"epoch": 3}}, ["protocol.epoch", "Did you mean 'epochs'"]),
        ({"protocol": {"epochs": 0}}, ["protocol.epochs", "0", "greater than or equal to 1"]),
        ({"protocol": {"budget": "six minutes"}}, ["six minutes", "90s, 6m or 1h30m"]),
        ({"data": {"path": "x", "tsk": "classify"}}, ["data", "tsk", "Did you mean 'task'"]),
        ({"recipes": [{"name": "a", "part": {}}]}, ["part", "Did you mean 'parts'"]),
    ],
)
def test_errors_name_key_value_and_the_nearest_allowed(raw, words):
    with pytest.raises(BadInput) as error:
        make_settings(raw)
    for word in words:
        assert word in str(error.value)


def test_errors_name_file_and_line(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: x\nprotocol:\n  epochs: 3\n  sedes: 2\n")
    with pytest.raises(BadInput, match=r"study\.yaml line 4.*seeds"):
        read_study(path)
    path.write_text("name: [x\n")
    with pytest.raises(BadInput, match=r"study\.yaml line \d+ is not valid YAML"):
        read_study(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(BadInput, match="must be a mapping"):
        read_study(path)
    with pytest.raises(BadInput, match="There is no study file"):
        read_study(tmp_path / "absent.yaml")


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("6m", 360), ("1.5h", 5400), ("1h30m", 5400)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


def test_unknown_ways_to_combine_are_named():
    with pytest.raises(BadInput, match="'median' is none of mean, geometric"):
        make_settings({"name": "x", "data": {"path": "digits"}, "measures": {"ensembles": ["median"]}})

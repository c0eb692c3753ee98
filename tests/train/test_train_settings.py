from __future__ import annotations

import dataclasses

import pytest

from vitkit.errors import BadInput
from vitkit.train import TrainSettings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 2.5),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("weight_decay", -1.0),
        ("min_lr_ratio", 2.0),
        ("precision", "fp16"),
        ("ema_decay", 1.0),
        ("accumulate", 0),
        ("clip_grad", 0.0),
        ("label_smoothing", 1.0),
        ("early_stop", 0),
        ("devices", 0),
        ("strategy", "horovod"),
        ("seed", -1),
    ],
)
def test_an_impossible_value_is_named(name, value):
    with pytest.raises(BadInput, match=f"{name}={value!r}"):
        TrainSettings(**{name: value})


def test_options_as_pairs_or_mapping_are_the_same():
    assert TrainSettings(optimizer_options=(("rho", 0.1),)).options() == {"rho": 0.1}
    assert TrainSettings(optimizer_options={"rho": 0.1}).to_dict()["optimizer_options"] == {"rho": 0.1}


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainSettings().lr = 1.0  # type: ignore[misc]

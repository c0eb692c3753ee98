"""The conformance checks over the whole catalogue, and over methods that are wrong on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitkit.catalogue import methods, resolve
from vitkit.testing import (
    NotConforming,
    check_backbone,
    check_objective,
    check_part,
    check_probe,
    check_transform,
)
from vitkit.testing.checks import PLACES

TABLE = methods()
OPTIONS = {
    "tome": {"r": 3},
    "pgd": {"steps": 2},
    "et-deepfool": {"max_iter": 5},
    "gptq": {"w_bits": 4, "a_bits": 8},
    "gptaq": {"w_bits": 4, "a_bits": 8},
    "rtn": {"w_bits": 4},
    "dymu": {"target_tokens": 9},
}


def names(kind):
    return [n for n, m in TABLE.items() if m.kind == kind and m.entry.source == "vitkit"]


@pytest.mark.parametrize("name", names("part"))
def test_parts(name):
    report = check_part(name, **OPTIONS.get(name, {}))
    assert {"shape", "gradients", "state_dict", "undo"} <= report.passed


# the first network of a file is the one for small images, which a study takes by the method's name
SMALL = {TABLE[n].dotted.partition(":")[0]: n for n in reversed(names("backbone"))}


@pytest.mark.parametrize("name", sorted(SMALL.values()))
def test_backbones(name):
    report = check_backbone(TABLE[name].dotted.partition(":")[2], image_size=32, img_size=32)
    assert "gradient checkpointing" in report.passed


@pytest.mark.parametrize("name", names("transform"))
def test_transforms(name):
    assert "deepcopy" in check_transform(resolve(name), **OPTIONS.get(name, {})).passed


@pytest.mark.parametrize("name", [n for n in names("probe") if n != "softmax-rejection"])
def test_probes(name):
    assert check_probe(resolve(name), places=PLACES[:2], **OPTIONS.get(name, {})).passed


@pytest.mark.parametrize("name", names("objective"))
def test_objectives(name):
    assert check_objective(resolve(name), **OPTIONS.get(name, {})).passed


class Wrong(nn.Module):
    slot = "mlp"

    def __init__(self, dim, fault):
        super().__init__()
        self.linear, self.unused, self.fault = nn.Linear(dim, dim), nn.Linear(dim, dim), fault

    @classmethod
    def from_standard(cls, old, spec, warm=True, fault=""):
        if fault == "mute refusal":
            raise ValueError("no")
        return cls(spec.dim, fault)

    def forward(self, x):
        if self.fault == "changes its input":
            x.add_(1)
        noise = torch.rand_like(x) if self.fault == "random in eval" else 0
        nan = float("nan") if self.fault == "NaN" else 1
        extra = 0 if self.fault == "unused parameters" else 1e-1 * self.unused(x)
        return (self.linear(x) + extra + noise) * nan


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ("random in eval", "deterministic"),
        ("NaN", "finite"),
        ("unused parameters", "gradients"),
        ("mute refusal", "refuses with a reason"),
    ],
)
def test_faulty_parts_are_caught(fault, rule):
    with pytest.raises(NotConforming, match=rule):
        check_part(Wrong, dynamo=False, fault=fault)
    check_part(Wrong, dynamo=False)


def test_faulty_probes_are_caught():
    def leaves_eval(model, images):
        model.eval()
        return images

    def draws(model, images):
        return torch.rand(1)

    with pytest.raises(NotConforming, match="modes"):
        check_probe(leaves_eval)
    with pytest.raises(NotConforming, match="random state"):
        check_probe(draws)


def test_a_transform_that_changes_its_input_is_caught():
    def in_place(model, images):
        with torch.no_grad():
            next(model.parameters()).zero_()
        return model, None

    with pytest.raises(NotConforming, match="leaves the model as found"):
        check_transform(in_place)

"""Properties of the ONNX check, on models that are right and on models that are wrong on purpose."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import nn

from vitkit.catalogue import methods
from vitkit.errors import BadInput, MissingExtra, UnknownName
from vitkit.testing import PLACES, NotConforming
from vitkit.testing.onnx import onnx_case, onnx_gap, onnx_names, onnx_program

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


class Function(nn.Module):
    def __init__(self, eager, exported=None):
        super().__init__()
        self.eager, self.exported = eager, exported or eager

    def forward(self, x):
        return self.exported(x) if torch.compiler.is_exporting() else self.eager(x)


@pytest.mark.parametrize("name", ["plain", "sinkhorn", "ninformer"])
def test_onnx_answers_like_pytorch(name):
    if name == "plain":
        model, images = PLACES[0].host(), PLACES[0].images()
    else:
        model, images, note = onnx_case(name)
        assert note == ""
    with torch.no_grad():
        scale = float(model(images).abs().max())
    assert scale > 0.1
    assert onnx_gap(model, images, images.flip(-1)) < 1e-3 * scale


def test_the_model_and_the_random_state_stay_as_they_were():
    model, images = PLACES[0].host().train(), PLACES[0].images()
    model.blocks[0].eval()
    model.blocks[1].requires_grad_(False)
    model.norm.weight.grad = torch.ones_like(model.norm.weight)
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes, grads = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    onnx_gap(model, images)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(model.norm.weight.grad, torch.ones_like(model.norm.weight))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("eager", "exported", "gap"),
    [
        (lambda x: x, lambda x: x + 0.5, 0.5),
        (lambda x: (x, 2 * x), lambda x: (x, 2 * x - 3), 3.0),
        (lambda x: (x - 9).sqrt(), None, 0.0),
        (lambda x: x, lambda x: (x - 9).sqrt(), math.inf),
        (lambda x: x, lambda x: x / 0, math.inf),
        (lambda x: x, lambda x: x[:, :1], math.inf),
    ],
)
def test_the_gap_is_that_of_the_worst_output(eager, exported, gap):
    assert onnx_gap(Function(eager, exported), torch.ones(2, 3)) == pytest.approx(gap, abs=1e-6)


def test_a_second_input_shows_what_the_example_decided():
    model = Function(lambda x: x, lambda x: x.square())
    ones = torch.ones(2, 3)
    assert onnx_gap(model, ones) == 0
    assert onnx_gap(model, ones, 3 * ones) == pytest.approx(6)
    with pytest.raises(BadInput, match=r"other has the shapes \[\(2, 4\)\]"):
        onnx_gap(model, ones, torch.ones(2, 4))


def test_stable_sorts_keep_the_order_of_equal_values():
    def sorts(x):
        return [x.sort(dim=dim, descending=down, stable=True) for dim in (0, 1, -2) for down in (False, True)]

    first, second = torch.randint(0, 4, (2, 40, 30), generator=torch.Generator().manual_seed(0)).float()
    assert onnx_gap(Function(sorts), first, second) == 0
    assert onnx_gap(Function(sorts), first.long()) == 0


def test_several_inputs_of_other_dtypes():
    table = nn.Embedding(5, 4)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = table

        def forward(self, x, index):
            return x + self.table(index)

    assert onnx_gap(Two().double(), (torch.zeros(3, 4, dtype=torch.float64), torch.tensor([0, 4, 2]))) < 1e-6


def test_what_does_not_export_says_why():
    with pytest.raises(NotConforming, match=r"exports to ONNX: .*linalg_qr"):
        onnx_program(Function(lambda x: torch.linalg.qr(x)[0]), torch.eye(3))
    with pytest.raises(NotConforming, match=r"exports to ONNX: .*data-dependent"):
        onnx_gap(Function(lambda x: x if x.sum() > 0 else -x), torch.eye(3))


@pytest.mark.parametrize("package", ["onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_line(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=f'needs {package}: pip install "vitkit\\[deploy\\]"$'):
        onnx_gap(nn.Identity(), torch.ones(1))


def test_names_are_all_parts_and_one_network_of_every_file():
    table, names = methods(), onnx_names()
    own = {n: m for n, m in table.items() if m.entry.source == "vitkit"}
    assert [n for n in names if table[n].kind == "part"] == [n for n, m in own.items() if m.kind == "part"]
    files = [table[n].dotted.partition(":")[0] for n in names if table[n].kind == "backbone"]
    assert len(set(files)) == len(files)
    assert set(files) == {m.dotted.partition(":")[0] for m in own.values() if m.kind == "backbone"}
    assert "clustervig" in names and "clustervig-b" not in names
    with pytest.raises(UnknownName, match="Did you mean 'sinkhorn'"):
        onnx_case("sinkhrn")


def test_a_case_has_its_note_and_no_gate_of_zero():
    model, images, note = onnx_case("conv-share")
    assert note == "" and images.shape == (3, 3, 20, 28) and not model.training
    assert all(p.any() for p in model.parameters())
    assert "complex" in onnx_case("s4d")[2]
    assert "largest clusters" in onnx_case("degc")[2]

"""The tuner with engines made of sleep and noise, so that what it should choose is known."""

from __future__ import annotations

import json
import sys
import time
import types

import numpy as np
import pytest
import torch

from vitkit.deploy import engines, tuner
from vitkit.deploy.engines import Setting
from vitkit.deploy.manifest import read_manifest
from vitkit.deploy.tuner import deploy
from vitkit.errors import BadInput, UnknownName, VitkitError


class Fake(types.ModuleType):
    """An engine: per precision its seconds a call and what it adds to the first logit."""

    def __init__(self, name, kinds, missing="", hook=None):
        super().__init__(name)
        self.kinds, self.missing, self.hook, self.made = kinds, missing, hook, []

    def unavailable(self):
        return self.missing

    def precisions(self):
        return tuple(self.kinds)

    def settings(self, batch, cores):
        return [Setting(batch, cores), Setting(batch, cores, 2)]

    def make(self, source, precision, folder):
        if self.hook:
            self.hook(precision)
        self.made.append(precision)
        torch.save(source.program().state_dict, folder / "weights.bin")
        self.source = source

    def load(self, folder, precision, setting):
        seconds, shift = self.kinds[precision]
        source = self.source

        class Runner:
            def run(self, images):
                # two streams are slower here
                time.sleep(seconds * setting.streams)
                found = source.logits(images)
                found[:, 0] += shift
                return found

            def describe(self):
                return {}

        return Runner()


@pytest.fixture
def fake(monkeypatch):
    def put(**modules):
        monkeypatch.setattr(engines, "ENGINES", {})
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, f"fake_{name}", module)
            engines.ENGINES[name] = f"fake_{name}"
        monkeypatch.setattr(tuner, "ENGINES", engines.ENGINES)
        return modules

    return put


def test_the_fastest_faithful_engine_is_kept(fake, model, images, tmp_path):
    fake(
        a=Fake("a", {"f32": (0.05, 0.0), "wrong": (0.0, 50.0)}),
        b=Fake("b", {"f32": (0.02, 0.01)}),
        c=Fake("c", {"f32": (0.0, 0.0)}, missing='c needs it: pip install "vitkit[deploy]"'),
    )
    with torch.no_grad():
        labels = model(torch.from_numpy(images)).argmax(1).numpy()
    found = deploy(model, images, labels, out=tmp_path / "out", max_drop=20, budget=30)
    by_name = {row.name.strip(): row for row in found.rows}
    assert found.chosen.name == "b f32" and found.chosen.setting.streams == 1
    assert by_name["c"].status == "not installed" and "pip install" in by_name["c"].reason
    assert by_name["a wrong"].status == "too much lost" and by_name["a wrong"].fidelity.agreement < 0.8
    assert found.chosen.rounds >= 3 and found.chosen.ratio > 0 and "b f32 is the fastest of" in found.reason
    manifest = read_manifest(tmp_path / "out")
    assert manifest.engine == "b" and manifest.image_size == (8, 8) and manifest.in_chans == 1
    summary = json.loads((tmp_path / "out" / "tuning.json").read_text())
    assert {row["name"].strip() for row in summary["rows"]} == set(by_name)
    assert (tmp_path / "out" / "tuning.svg").read_text().lstrip().startswith("<?xml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "out"]


def test_too_much_lost_is_not_kept_however_fast(fake, model, images, tmp_path):
    fake(a=Fake("a", {"f32": (0.03, 0.0), "wrong": (0.0, 50.0)}))
    with torch.no_grad():
        labels = model(torch.from_numpy(images)).argmax(1).numpy()
    found = deploy(model, images, labels, out=tmp_path / "out", max_drop=1, budget=30)
    wrong = next(r for r in found.rows if r.precision == "wrong")
    assert found.chosen.precision == "f32" and wrong.status == "too much lost" and "more than 1" in wrong.reason
    # the same without labels, by what the model itself expects to lose
    unlabelled = deploy(model, images, out=tmp_path / "other", max_drop=1, budget=30)
    assert unlabelled.chosen.precision == "f32" and not unlabelled.chosen.fidelity.labelled


def test_nothing_faithful_is_an_error_that_leaves_nothing(fake, model, images, tmp_path):
    fake(a=Fake("a", {"wrong": (0.0, 50.0)}))
    with pytest.raises(VitkitError, match="a wrong came nearest"):
        deploy(model, images, out=tmp_path / "out", max_drop=0.1, budget=30)
    assert not (tmp_path / "out").exists() and [p.name for p in tmp_path.iterdir() if p.name != "cache"] == []


def test_a_failing_engine_does_not_stop_the_others(fake, model, images, tmp_path):
    def fail(precision):
        raise RuntimeError("no kernel for this\nlong trace")

    fake(a=Fake("a", {"f32": (0.0, 0.0)}, hook=fail), b=Fake("b", {"f32": (0.01, 0.0)}))
    found = deploy(model, images, out=tmp_path / "out", budget=30)
    failed = next(r for r in found.rows if r.engine == "a")
    assert found.chosen.engine == "b" and failed.reason == "RuntimeError: no kernel for this"


def test_interrupted_the_best_so_far_is_kept(fake, model, images, tmp_path):
    def stop(precision):
        raise KeyboardInterrupt

    fake(a=Fake("a", {"f32": (0.0, 0.0)}), b=Fake("b", {"f32": (0.0, 0.0)}, hook=stop))
    found = deploy(model, images, out=tmp_path / "out", budget=30)
    assert found.interrupted and found.chosen.engine == "a" and read_manifest(tmp_path / "out").engine == "a"
    fake(b=Fake("b", {"f32": (0.0, 0.0)}, hook=stop))
    with pytest.raises(KeyboardInterrupt):
        deploy(model, images, out=tmp_path / "none", budget=30)
    assert not (tmp_path / "none").exists()


def test_a_spent_budget_is_said(fake, model, images, tmp_path):
    fake(a=Fake("a", {"f32": (0.0, 0.0), "bf16": (0.0, 0.0), "int8": (0.0, 0.0)}, hook=lambda p: time.sleep(0.3)))
    found = deploy(model, images, out=tmp_path / "out", budget=0.4)
    assert [r.status for r in found.rows].count("not tried") == 2
    assert all(r.reason == "the budget was spent" for r in found.rows if r.status == "not tried")


def test_the_same_question_is_answered_from_memory(fake, model, images, tmp_path):
    made = fake(a=Fake("a", {"f32": (0.0, 0.0), "bf16": (0.01, 0.0)}))["a"].made
    first = deploy(model, images, out=tmp_path / "out", budget=30)
    assert len(made) == 2 and not first.cached
    again = deploy(model, images, out=tmp_path / "out", budget=30)
    assert again.cached and len(made) == 2 and again.chosen == first.chosen
    # in another folder only the chosen one is made
    moved = deploy(model, images, out=tmp_path / "moved", budget=30)
    assert moved.cached and made[2:] == [first.chosen.precision]
    with torch.no_grad():
        model.head.bias += 1
    assert not deploy(model, images, out=tmp_path / "out", budget=30).cached


def test_an_older_artefact_is_replaced_and_other_folders_are_not(fake, model, images, tmp_path):
    fake(a=Fake("a", {"f32": (0.0, 0.0)}))
    deploy(model, images, out=tmp_path / "out", budget=30, name="first")
    deploy(model, images, out=tmp_path / "out", budget=30, name="second")
    assert read_manifest(tmp_path / "out").name == "second"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match="holds other things"):
        deploy(model, images, out=mine, budget=30)
    with pytest.raises(BadInput, match="is a file"):
        deploy(model, images, out=mine / "thesis.tex", budget=30)


def test_bad_input(fake, model, images, tmp_path):
    fake(openvino=Fake("openvino", {"f32": (0.0, 0.0)}))
    out = {"out": tmp_path / "out", "budget": 10}
    with pytest.raises(UnknownName, match="openvino"):
        deploy(model, images, engines=["openvin"], **out)
    with pytest.raises(BadInput, match="at least 8"):
        deploy(model, images[:5], **out)
    with pytest.raises(BadInput, match="60 images and 3 labels"):
        deploy(model, images, np.zeros(3), **out)
    with pytest.raises(BadInput, match="they offer no fp4"):
        deploy(model, images, precisions=["fp4"], **out)
    with pytest.raises(BadInput, match="resize them"):
        deploy(model, images, calibration=np.zeros((9, 1, 4, 4)), **out)


def test_temperature_is_fitted_on_the_engines_own_answers(fake, model, images, tmp_path):
    fake(a=Fake("a", {"f32": (0.0, 0.0)}))
    labels = np.random.default_rng(0).integers(0, 10, len(images))
    found = deploy(
        model, images, labels, out=tmp_path / "out", max_drop=100, budget=30,
        calibration=images, calibration_labels=labels,
    )  # fmt: skip
    # random labels and sure answers: probabilities must become flat
    assert read_manifest(found.folder).temperature > 3

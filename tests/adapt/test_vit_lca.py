"""A ViT that classifies by sparse coding: where its atoms come from, how codes are read, and how it is restored."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitkit.adapt.vit_lca import LCAHead, restore, vit_lca
from vitkit.anatomy import host
from vitkit.errors import BadInput
from vitkit.models.normalized import NormalizedModel
from vitkit.study.run import run_study
from vitkit.study.settings import make_settings
from vitkit.testing import check_transform
from vitkit.testing.worlds import accuracy, digits, tiny_vit, train_tiny

pytestmark = pytest.mark.filterwarnings("ignore:vit-lca. class")
CHEAP = {"max_steps": 300}


@pytest.fixture(scope="module")
def world():
    return digits()


@pytest.fixture(scope="module")
def vit(world):
    return train_tiny(world, epochs=4)


def features_of(model, images):
    vit = copy.deepcopy(model)
    host(vit).head = torch.nn.Identity()
    with torch.no_grad():
        return vit(images)


@pytest.mark.parametrize("read", ["max", "sum", "nn"])
def test_conformance(read):
    assert {"restore", "bfloat16"} <= check_transform(vit_lca, read=read, **CHEAP).passed


@pytest.mark.parametrize("read", ["max", "sum", "nn"])
def test_it_classifies_about_as_well_as_the_classifier_it_replaces(world, vit, read):
    new, change = vit_lca(vit, world.x_train[:600], world.y_train[:600], atoms=200, read=read, **CHEAP)
    assert accuracy(new, world.x_test, world.y_test) > accuracy(vit, world.x_test, world.y_test) - 0.15
    assert accuracy(vit, world.x_test, world.y_test) > 0.6
    assert 0 < change.details["active"] < 0.5 and change.touched == ("head",)


def test_atoms_are_features_of_all_classes_alike(world, vit):
    images, labels = world.x_train[:500], world.y_train[:500]
    new, change = vit_lca(vit, images, labels, atoms=50, **CHEAP)
    head = host(new).head
    assert change.details["atoms_per_class"] == [5] * 10
    features = F.normalize(features_of(vit, images), dim=1)
    nearest = (head.dictionary @ features.T).max(1)
    assert torch.allclose(nearest.values, torch.ones(50), atol=1e-5)
    assert torch.equal(labels[nearest.indices], head.atom_labels)
    other = vit_lca(vit, images, labels, atoms=50, seed=1, **CHEAP)[0]
    assert not torch.equal(host(other).head.dictionary, head.dictionary)


def test_rare_classes_give_what_they_have(world, vit):
    labels = world.y_train
    keep = torch.cat([(labels == 0).nonzero()[:2, 0], (labels != 0).nonzero()[:300, 0]])
    with pytest.warns(UserWarning, match="class 0 has 2 of 60"):
        _, change = vit_lca(vit, world.x_train[keep], labels[keep], atoms=60, **CHEAP)
    counts = change.details["atoms_per_class"]
    assert counts[0] == 2 and sum(counts) == 60 and max(counts[1:]) - min(counts[1:]) <= 1


def test_codes_are_read_three_ways():
    head = LCAHead(4, 5, 3, "max")
    head.atom_labels.copy_(torch.tensor([0, 0, 1, 1, 2]))
    codes = torch.tensor([[2.0, 2.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    strongest = head.read_codes(codes)
    assert strongest.argmax(1).tolist() == [1, 2]
    assert torch.allclose(strongest.softmax(1)[0], torch.tensor([2 / 5, 3 / 5, 0.0]), atol=2e-3)
    head.read = "sum"
    assert head.read_codes(codes).argmax(1).tolist() == [0, 2]
    assert torch.allclose(head.read_codes(codes).softmax(1)[0], torch.tensor([4 / 7, 3 / 7, 0.0]), atol=2e-3)
    # no active atom: no class is preferred, and nothing is infinite
    assert torch.allclose(head.read_codes(torch.zeros(1, 5)).softmax(1), torch.full((1, 3), 1 / 3))
    net = LCAHead(4, 5, 3, "nn")
    assert torch.allclose(net.read_codes(codes), net.net(codes / codes.amax(1, keepdim=True)))
    assert net.net[0].out_features == 1000


def test_a_network_on_codes_never_sees_its_atoms(world, vit):
    new, change = vit_lca(vit, world.x_train[:80], world.y_train[:80], atoms=400, read="nn", epochs=1, **CHEAP)
    assert change.details["atoms"] == 40 and host(new).head.dictionary.shape[0] == 40


def test_fixed_lambda_and_the_authors_settings(world, vit):
    images, labels = world.x_train[:200], world.y_train[:200]
    new, change = vit_lca(vit, images, labels, atoms=100, lam=2.0, eta=0.01, steps=50)
    assert (change.details["converged"], change.details["steps"], change.details["eta"]) == (0, 50, 0.01)
    features = features_of(vit, images)
    rested, settled = vit_lca(vit, images, labels, atoms=100, lam=2.0)
    assert settled.details["gap"] < change.details["gap"] / 5
    a, b = (host(m).head.encode(features).codes for m in (new, rested))
    assert torch.allclose(host(new).head.gap(features, a).mean(), torch.tensor(change.details["gap"]), atol=1e-4)
    assert not torch.allclose(a, b, atol=1e-2)


def test_learning_changes_the_atoms_but_not_their_length(world, vit):
    images, labels = world.x_train[:120], world.y_train[:120]
    plain = host(vit_lca(vit, images, labels, atoms=40, **CHEAP)[0]).head
    learned = host(vit_lca(vit, images, labels, atoms=40, learn=2, learning_rate=0.5, **CHEAP)[0]).head
    assert not torch.allclose(plain.dictionary, learned.dictionary, atol=1e-3)
    assert torch.allclose(learned.dictionary.norm(dim=1), torch.ones(40), atol=1e-5)
    features = F.normalize(features_of(vit, images), dim=1)
    errors = [float((features - h.encode(features).codes @ h.dictionary).square().sum()) for h in (plain, learned)]
    assert errors[1] < errors[0]


def test_images_can_be_attacked_through_the_codes(world, vit):
    new, _ = vit_lca(vit, world.x_train[:200], world.y_train[:200], atoms=100)
    x, y = world.x_test[:32].clone().requires_grad_(), world.y_test[:32]
    before = F.cross_entropy(new(x), y)
    (gradient,) = torch.autograd.grad(before, x)
    assert gradient.isfinite().all() and (gradient != 0).any()
    with torch.no_grad():
        assert F.cross_entropy(new(x + 0.02 * gradient.sign()), y) > before + 0.01


def test_it_is_restored_from_json_and_weights(world, vit):
    model = NormalizedModel(vit, [0.3], [0.3])
    new, _ = vit_lca(model, world.x_train[:100], world.y_train[:100], atoms=30, read="nn", epochs=2, **CHEAP)
    (step,) = host(new).applied
    assert step["name"] == "vit-lca"
    fresh = NormalizedModel(tiny_vit(8, 2, 1, 10, seed=5), [0.3], [0.3]).eval()
    restore(fresh, json.loads(json.dumps(step["options"])))
    fresh.load_state_dict(new.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(world.x_test[:20]), new(world.x_test[:20]))
    assert host(fresh).applied == host(new).applied


def test_errors_say_what_is_needed(world, vit):
    images, labels = world.x_train[:20], world.y_train[:20]
    with pytest.raises(BadInput, match=r"got no labels; call vit_lca\(model, images, labels\)"):
        vit_lca(vit, images)
    with pytest.raises(BadInput, match="images and labels"):
        vit_lca(vit)
    with pytest.raises(BadInput, match=r"\(20, 3\) \(torch.float32\) for 20 images"):
        vit_lca(vit, images, torch.zeros(20, 3))
    with pytest.raises(BadInput, match="0 to 9"):
        vit_lca(vit, images, labels + 3)
    with pytest.raises(BadInput, match="'mean'"):
        vit_lca(vit, images, labels, read="mean")
    with pytest.raises(BadInput, match="lam_rel=1"):
        vit_lca(vit, images, labels, lam_rel=1.0)
    new, _ = vit_lca(vit, images, labels, **CHEAP)
    with pytest.raises(BadInput, match="already"):
        vit_lca(new, images, labels)
    with pytest.raises(TypeError, match="holds none"):
        vit_lca(torch.nn.Linear(2, 2), images, labels)


def test_a_study_hands_it_labels(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 2
    images = rng.integers(0, 90, (60, 8, 8))
    images[labels == 1, :, 4:] += 140
    np.savez(tmp_path / "halves.npz", x=images.astype(np.uint8), y=labels)
    settings = make_settings(
        {
            "name": "codes",
            "data": {"path": str(tmp_path / "halves.npz")},
            "protocol": {"epochs": 1, "batch_size": 16, "precision": "fp32", "calibration": 24},
            "recipes": ["vit", "vit-lca:max_steps=200"],
            "measures": {"attacks": [], "explainers": [], "latency": False, "bootstrap": 200},
        }
    )
    result = run_study(settings, tmp_path / "out", command="vitkit study halves.npz")
    row = {r.name: r for r in result.recipes}["vit-lca:max_steps=200"]
    assert row.status == "ok", row.error
    # two halves of different brightness are told apart by features alone, before the classifier has learned anything
    assert row.measures["accuracy"].value > 0.8

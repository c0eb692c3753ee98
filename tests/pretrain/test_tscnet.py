from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vitkit.anatomy.host import host
from vitkit.errors import BadInput
from vitkit.models.counterfactual import Counterfactual
from vitkit.models.normalized import NormalizedModel
from vitkit.models.vit import ViT
from vitkit.pretrain import tscnet as module
from vitkit.pretrain.tscnet import TSCNet, adapted_prior, balanced, disagreement, donors, fit_gamma, held_rows
from vitkit.tasks import Classify, Regress
from vitkit.testing.worlds import tiny_vit
from vitkit.train import Supervised, TrainSettings, fit

COUNTS = [24, 12, 6, 4]


def model(**options):
    vit = tiny_vit(12, 4, 1, num_classes=4, embed_dim=32, depth=2, **options)
    torch.nn.init.normal_(vit.head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return NormalizedModel(vit, [0.5], [0.25])


def batches(size=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(COUNTS))
    labels = labels[torch.randperm(len(labels), generator=g)]
    images = torch.rand(len(labels), 1, 12, 12, generator=g) * 0.5
    images[:, 0, 4:8, 4:8] += labels[:, None, None] / 8
    rows = torch.arange(len(labels))
    whole = {"images": images, "labels": labels, "indices": rows}
    return [{k: v[i : i + size] for k, v in whole.items()} for i in range(0, len(labels), size)]


def one(size=16):
    return batches(size)[0]


def settings(**changes):
    return TrainSettings(
        **{"epochs": 4, "batch_size": 8, "precision": "fp32", "warmup_epochs": 0, "checkpoint_steps": 1} | changes
    )


# -- stage 1 -------------------------------------------------------------------------------------------------------


def test_without_background_stage_1_is_plain_cross_entropy():
    objective = TSCNet(model(), mass=1.0)
    objective.shares.fill_(1 / 64)
    plain = Supervised(copy.deepcopy(objective.model), Classify("0123"))
    a, b = objective(one()), plain(one())
    assert torch.equal(a["loss"], b["loss"]) and torch.equal(a["output"], b["output"])
    a["loss"].backward()
    b["loss"].backward()
    for p, q in zip(objective.model.parameters(), plain.model.parameters()):
        assert torch.equal(p.grad, q.grad)


def test_the_warm_up_is_plain_cross_entropy_and_fills_the_dictionary():
    objective = TSCNet(model(), warmup=2, recalibration=0.0)
    plain = Supervised(objective.model, Classify("0123"))
    for epoch, seen in ((0, 0), (1, 16)):
        objective.on_epoch(epoch, 6)
        assert torch.equal(objective(one())["loss"], plain(one())["loss"])
        assert int(objective.seen) == seen
    objective.on_epoch(2, 6)
    assert objective(one())["loss"] > plain(one())["loss"]


def test_donors_are_of_another_class():
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    torch.manual_seed(0)
    found = donors(labels, 400)
    assert (labels[found] != labels).all()
    # and any of them
    assert set(found[:, 0].tolist()) == {2, 3, 4, 5} and set(found[:, 5].tolist()) == {0, 1, 2, 3, 4}
    assert donors(torch.zeros(4, dtype=torch.long), 3).tolist() == [[0, 1, 2, 3]] * 3


def test_backgrounds_are_swapped_in_place_and_nothing_else():
    g = torch.Generator().manual_seed(0)
    x, fg = torch.randn(4, 2 + 6, 3, generator=g), torch.rand(4, 6, generator=g) < 0.4
    partners = torch.tensor([[2, 0, 1, 3], [1, 3, 0, 2]])
    found, changed = module.swap_background(x, fg, partners, 2)
    for n in range(2):
        for i in range(4):
            j = int(partners[n, i])
            expected, moved = x[i].clone(), False
            for p in range(6):
                if not fg[i, p] and not fg[j, p] and i != j:
                    expected[2 + p], moved = x[j, 2 + p], True
            assert torch.equal(found[n, i], expected) and bool(changed[n, i]) == moved


def test_disagreement_is_the_mean_divergence_of_pairs():
    z = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    p = z.softmax(-1)
    pairs = [(p[a] * (p[a].log() - p[b].log())).sum(-1) for a in range(3) for b in range(3) if a != b]
    torch.testing.assert_close(disagreement(z), torch.stack(pairs).mean(0))
    assert torch.equal(disagreement(z[:1]), torch.zeros(5))


def test_patch_loss_is_that_of_the_swapped_images(monkeypatch):
    objective = TSCNet(model(), consistency=0.5, feature=0.0).train()
    batch = one(6)
    partners = torch.tensor([[1, 0, 3, 2, 5, 4], [2, 3, 0, 1, 4, 5]])
    monkeypatch.setattr(module, "donors", lambda labels, n: partners)
    out = objective(batch)
    vit, images = host(objective.model), objective.model.prepare(batch["images"])
    fg = objective.masks(images)
    x, layout = vit.embed(images)
    answers, active = [], torch.zeros(6, dtype=torch.bool)
    for row in partners:
        swapped, changed = module.swap_background(x, fg, row[None], 1)
        active |= changed[0]
        answers.append(vit.readout(*vit.run(swapped[0], layout)))
    ce = torch.stack([F.cross_entropy(z[active], batch["labels"][active]) for z in answers]).mean()
    a, b = (z.softmax(-1) for z in answers)
    kl = ((a - b) * (a.log() - b.log())).sum(-1)[active].mean() / 2
    torch.testing.assert_close(out["logs"]["patch_loss"], ce.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out["logs"]["consistency"], kl.detach(), atol=1e-5, rtol=1e-5)
    expected = F.cross_entropy(out["output"], batch["labels"]) + ce + 0.5 * kl
    torch.testing.assert_close(out["loss"], expected, atol=1e-5, rtol=1e-5)


def test_context_is_the_equation_over_the_entries_there_are():
    objective = TSCNet(model(), confounders=5)
    torch.nn.init.normal_(objective.dictionary)
    objective.shares.copy_(torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0]))
    f = torch.randn(3, 32)
    d, share = objective.dictionary[:3], objective.shares[:3]
    expected = []
    for row in f:
        alpha = torch.softmax(torch.stack([objective.relate(row) @ d[k] for k in range(3)]), 0)
        expected.append(sum(share[k] * alpha[k] * d[k] for k in range(3)))
    torch.testing.assert_close(objective.context(f), torch.stack(expected))


def test_dictionary_and_its_shares_come_from_the_backgrounds():
    objective = TSCNet(model(), confounders=4).train()
    rows = torch.randn(100, 32, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(32)[torch.arange(100) % 5]
    objective._remember(rows)
    objective.refresh()
    rows = F.normalize(rows, dim=1)
    nearest = torch.cdist(rows, objective.dictionary).argmin(1)
    for k in range(4):
        members = rows[nearest == k]
        torch.testing.assert_close(objective.dictionary[k], members.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(objective.shares[k], torch.tensor(len(members) / 100))
    assert int(objective.seen) == 0
    # fewer backgrounds than entries: the others have no share
    few = TSCNet(model(), confounders=64)
    few._remember(torch.randn(10, 32))
    few.refresh()
    assert (few.shares > 0).sum() <= 10 and few.shares.sum() == pytest.approx(1)


def test_the_feature_loss_is_used_once_there_is_a_dictionary():
    objective = TSCNet(model(), patch=0.0).train()
    first = objective(one())
    assert first["logs"]["feature_loss"] == 0
    objective.refresh()
    second = objective(one())
    assert second["logs"]["feature_loss"] > 0
    second["loss"].backward()
    for module_ in (objective.relate, objective.causal_head):
        assert module_.weight.grad.abs().sum() > 0


def test_the_moving_average_makes_the_masks_and_is_not_trained():
    objective = TSCNet(model(), ema=0.9).train()
    assert not objective.teacher.training and not any(p.requires_grad for p in objective.teacher.parameters())
    vit, before = host(objective.model), [p.clone() for p in objective.teacher.parameters()]
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(1)
    objective.after_step(0, 10)
    # the decay of the first step is (1 + 1)/(10 + 1)
    for old, new, own in zip(before, objective.teacher.parameters(), vit.parameters()):
        torch.testing.assert_close(new, old * (2 / 11) + own * (9 / 11))


# -- stage 2 -------------------------------------------------------------------------------------------------------


def recalibrating(epoch=2, total=4, **options):
    objective = TSCNet(model(), recalibration=0.5, **options).train()
    objective.counts.copy_(torch.tensor(COUNTS))
    objective.on_epoch(2, total)
    if epoch > 2:
        objective.on_epoch(epoch, total)
    return objective


def test_stage_2_is_the_logit_adjusted_loss():
    objective = recalibrating(eta=0.0, gamma=0.0)
    out, batch = objective(one()), one()
    prior = torch.tensor(COUNTS) / sum(COUNTS)
    expected = F.cross_entropy(objective.model(batch["images"]) + prior.log(), batch["labels"])
    torch.testing.assert_close(out["loss"], expected)
    # a uniform prior shifts all logits alike
    objective.log_prior.fill_(-math.log(4))
    plain = F.cross_entropy(objective.model(batch["images"]), batch["labels"])
    torch.testing.assert_close(objective(batch)["loss"], plain)


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_stage_2_goes_on_where_stage_1_ended(tau):
    objective, batch = TSCNet(model(), recalibration=0.5, tau=tau), one()
    objective.counts.copy_(torch.tensor(COUNTS))
    before = F.cross_entropy(objective.model(batch["images"]), batch["labels"])
    objective.on_epoch(2, 4)
    torch.testing.assert_close(objective(batch)["loss"], before)
    objective.on_epoch(3, 4)
    torch.testing.assert_close(objective(batch)["loss"], before)


def test_epochs_of_the_stages():
    objective = TSCNet(model())
    for total, first in ((1, 1), (2, 1), (4, 3), (30, 21), (100, 70)):
        objective.on_epoch(0, total)
        assert objective.first_epochs == first and objective.warm_epochs == min(5, first // 3)
        assert [objective.on_epoch(e, total) or objective.stage for e in range(total)].count(1) == first
    assert not TSCNet(model()).recalibrated
    objective = TSCNet(model(), recalibration=0.0)
    objective.on_epoch(9, 10)
    assert objective.stage == 1


@pytest.mark.parametrize("factor", [0.0, 0.1, 1.0])
def test_the_backbone_is_frozen_or_slowed(factor):
    def step(backbone_lr):
        objective = recalibrating(backbone_lr=backbone_lr)
        optimizer = torch.optim.AdamW(objective.parameters(), lr=0.01, weight_decay=0.1)
        before = {n: p.detach().clone() for n, p in host(objective.model).named_parameters()}
        objective(one())["loss"].backward()
        optimizer.step()
        objective.after_step(0, 100)
        return {n: p.detach() - before[n] for n, p in host(objective.model).named_parameters()}

    moved, full = step(factor), step(1.0)
    for name, change in moved.items():
        scale = 1.0 if name.startswith(("norm.", "head.")) else factor
        torch.testing.assert_close(change, scale * full[name], atol=1e-7, rtol=1e-3)
    assert full["blocks.0.attn.qkv.weight"].abs().sum() > 0 and moved["head.weight"].abs().sum() > 0


def test_the_prior_follows_what_is_predicted():
    logits, labels = (
        torch.randn(12, 4, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0] * 8 + [1, 2, 3, 3]),
    )
    weights = balanced(labels, 4)
    torch.testing.assert_close(weights[labels == 3], torch.full((2,), 1 / 8))
    prior = torch.tensor([0.4, 0.3, 0.2, 0.1])
    p = logits.softmax(-1)
    mean = torch.stack([p[labels == c].mean(0) for c in range(4)]).mean(0)
    expected = prior**0.9 * mean**0.1
    torch.testing.assert_close(adapted_prior(prior.log(), logits, weights, 0.1).exp(), expected / expected.sum())
    torch.testing.assert_close(adapted_prior(prior.log(), logits, weights, 0.0), prior.log())


def test_gamma_is_the_most_likely_one():
    g = torch.Generator().manual_seed(0)
    z, b = torch.randn(60, 4, generator=g), torch.randn(60, 4, generator=g)
    labels = (z - 1.3 * b + 0.5 * torch.randn(60, 4, generator=g)).argmax(1)
    weights = balanced(labels, 4)

    def nll(gamma):
        return float((weights * F.cross_entropy(z - gamma * b, labels, reduction="none")).sum())

    found = fit_gamma(z, b, labels, weights)
    best = min(np.linspace(0, 10, 2001), key=nll)
    assert found == pytest.approx(best, abs=0.01) and 0.5 < found < 5
    assert fit_gamma(z, -b, labels, weights) == 0.0
    assert fit_gamma(z, torch.zeros_like(b), labels, weights) == 0.0
    assert fit_gamma(torch.zeros(1, 2), torch.tensor([[-1.0, 0.0]]), torch.tensor([0]), torch.ones(1)) == 10.0


def test_the_hold_out_is_disjoint_and_has_every_class_that_can_spare_an_image():
    labels = np.repeat([0, 1, 2, 3], [1000, 50, 4, 3])
    rows = held_rows(labels, 0.1)
    assert np.bincount(labels[rows], minlength=4).tolist() == [50, 5, 1, 0]
    assert np.array_equal(rows, held_rows(labels, 0.1)) and not np.array_equal(rows, held_rows(labels, 0.1, seed=1))
    objective = TSCNet(model(), holdout=0.25)
    rest = objective.hold_out(batches())
    held = torch.cat([b["indices"] for b in objective.held.batches])
    kept = torch.cat([b["indices"] for b in rest])
    assert sorted([*held.tolist(), *kept.tolist()]) == list(range(sum(COUNTS)))
    assert objective.counts.tolist() == COUNTS
    assert torch.bincount(torch.cat([b["labels"] for b in objective.held.batches])).tolist() == [6, 3, 2, 1]
    # a copy for a moving average shares the images
    assert copy.deepcopy(objective).held is objective.held


# -- the whole -----------------------------------------------------------------------------------------------------


def trained(**options):
    torch.manual_seed(0)
    objective = TSCNet(model(), recalibration=0.5, warmup=1, confounders=4, holdout=0.25, **options)
    return objective, objective.hold_out(batches())


def test_a_fit_runs_both_stages_and_the_model_takes_the_calibration_along(tmp_path):
    objective, rest = trained(gamma=0.8)
    own = objective.model
    history = fit(objective, rest, batches(), settings=settings())
    assert [row["val_gamma"] for row in history.rows] == [0, 0, 0.8, 0.8]
    assert {"val_medium", "val_few", "val_accuracy"} <= set(history.rows[-1])
    assert "val_many" not in history.rows[-1]
    x = one()["images"]
    objective.eval()
    with torch.no_grad():
        expected = objective.predict(x)
        plain = own(x)
    assert not torch.allclose(expected, plain)
    result = objective.encoder()
    assert result is own and isinstance(own.model, Counterfactual)
    torch.testing.assert_close(result.eval()(x), expected)
    # twice is as once
    assert objective.encoder() is own and isinstance(own.model.vit, ViT)
    assert host(own).applied == [{"name": "tscnet", "options": {"gamma": 0.8, "mass": 0.6}}]
    again = module.restore(model(), host(own).applied[0]["options"])
    again.load_state_dict(own.state_dict())
    torch.testing.assert_close(again.eval()(x), expected)


def test_without_gamma_the_model_stays_what_it_was():
    objective, rest = trained(gamma=0.0)
    own = objective.model
    fit(objective, rest, settings=settings())
    assert objective.encoder() is own and type(own.model) is ViT
    assert not hasattr(own.model, "applied")
    bare = tiny_vit(12, 4, 1, num_classes=4, embed_dim=32, depth=2)
    objective = TSCNet(bare, gamma=0.5)
    assert objective.encoder() is bare
    objective.recalibrated.fill_(1)
    assert objective.encoder().vit is bare


def test_weights_of_stage_1_are_not_calibrated():
    """Early stopping may bring back an epoch of stage 1."""
    objective, rest = trained(gamma=0.8)
    objective.on_epoch(0, 4)
    first = copy.deepcopy(objective.state_dict())
    fit(objective, rest, settings=settings())
    assert objective.gamma() == 0.8
    objective.load_state_dict(first)
    assert objective.gamma() == 0.0 and type(objective.encoder().model) is ViT


@pytest.mark.parametrize("stop", [2, 9, 15, 16])
def test_a_killed_fit_ends_where_the_other_does(tmp_path, stop):
    objective, rest = trained(backbone_lr=0.1)
    fit(objective, rest, batches(), settings=settings(ema_decay=0.9))
    expected, gamma = objective.state_dict(), objective.gamma()

    def kill(what, done, total):
        if done == stop:
            raise KeyboardInterrupt

    killed, rest = trained(backbone_lr=0.1)
    with pytest.raises(KeyboardInterrupt):
        fit(killed, rest, batches(), settings=settings(ema_decay=0.9), out_dir=tmp_path, progress=kill)
    resumed, rest = trained(backbone_lr=0.1)
    fit(resumed, rest, batches(), settings=settings(ema_decay=0.9), out_dir=tmp_path)
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert resumed.gamma() == gamma


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mass": 0.0}, "mass=0.0"),
        ({"recalibration": 1.0}, "recalibration=1.0"),
        ({"gamma": -1.0}, "gamma=-1.0"),
        ({"draws": 0}, "draws=0"),
        ({"task": Regress(4)}, "classes of which an image has one"),
        ({"task": Classify("0123", multilabel=True)}, "classes of which an image has one"),
    ],
)
def test_wrong_arguments_are_named(options, said):
    with pytest.raises(BadInput, match=said):
        TSCNet(model(), **options)


def test_hosts_that_cannot_do_it_say_so_before_the_training():
    with pytest.raises(BadInput, match="Attention weights tell"):
        TSCNet(model(mixer="ninformer"))
    objective = TSCNet(model(readout="mdcm"))
    with pytest.raises(BadInput, match="gamma=0"):
        objective.hold_out(batches())
    objective = TSCNet(model(readout="mdcm"), gamma=0.0)
    out = objective(objective.hold_out(batches())[0])
    assert bool(out["loss"].isfinite())
    with pytest.raises(BadInput, match="mixup"):
        objective({"images": one()["images"], "labels": F.one_hot(one()["labels"], 4).float()})

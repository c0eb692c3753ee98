from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import r2_score

from vitkit.errors import BadInput
from vitkit.tasks import Regress


def test_loss_is_the_mean_square_of_standardised_errors():
    task = Regress(2, mean=[1.0, -2.0], std=[2.0, 4.0])
    outputs, labels = torch.randn(5, 2), torch.randn(5, 2)
    z = (labels - torch.tensor([1.0, -2.0])) / torch.tensor([2.0, 4.0])
    torch.testing.assert_close(task.loss(outputs, {"labels": labels}), (outputs - z).square().mean())
    torch.testing.assert_close(task.predict(z), labels)


def test_one_target_may_come_as_a_vector():
    task = Regress(1)
    outputs, labels = torch.randn(4, 1), torch.randn(4)
    torch.testing.assert_close(task.loss(outputs, {"labels": labels}), (outputs[:, 0] - labels).square().mean())


def test_missing_targets_and_weights():
    task = Regress(2)
    outputs, labels = torch.randn(3, 2), torch.randn(3, 2)
    labels[0, 1] = math.nan
    kept = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 1.0]])
    square = (outputs - labels.nan_to_num()).square()
    torch.testing.assert_close(task.loss(outputs, {"labels": labels}), (square * kept).sum() / 5)
    off = task.loss(outputs, {"labels": labels, "weights": torch.tensor([0.0, 1.0, 1.0])})
    torch.testing.assert_close(off, square[1:].mean())


def test_scores_match_scikit_learn():
    task = Regress(2)
    outputs, labels = torch.randn(20, 2), torch.randn(20, 2)
    scores = task.score(outputs, labels)
    assert scores["r2"] == pytest.approx(r2_score(labels.numpy(), outputs.numpy()), abs=1e-5)
    assert scores["mae"] == pytest.approx(float((outputs - labels).abs().mean()), abs=1e-6)
    assert task.main_metric in scores
    assert math.isnan(task.score(outputs[:1], labels[:1])["r2"])


def test_bad_arguments_are_named():
    with pytest.raises(BadInput, match="num_targets=0"):
        Regress(0)
    with pytest.raises(BadInput, match="std positive"):
        Regress(1, std=[0.0])
    with pytest.raises(BadInput, match=r"\(4, 3\)"):
        Regress(2).loss(torch.zeros(4, 2), {"labels": torch.zeros(4, 3)})


def test_batch_weight_puts_the_parts_of_a_batch_together():
    task = Regress(2, mean=[1.0, 2.0], std=[2.0, 0.5])
    outputs, labels = torch.randn(6, 2), torch.randn(6, 2)
    labels[0, 1] = labels[4, 0] = float("nan")
    batch = {"labels": labels, "weights": torch.rand(6)}
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 6))]
    losses = [task.loss(outputs[:1], parts[0]), task.loss(outputs[1:], parts[1])]
    shares = [task.batch_weight(part) for part in parts]
    together = (losses[0] * shares[0] + losses[1] * shares[1]) / (shares[0] + shares[1])
    torch.testing.assert_close(together, task.loss(outputs, batch))

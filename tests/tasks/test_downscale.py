"""Downscaling: the prior by a loop, limits of the loss, weights, metrics against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vitkit.errors import BadInput, UnknownName
from vitkit.tasks.downscale import Downscale, bayesian_tv, field_metrics, latitude_weights, total_variation
from vitkit.train import Supervised

NAMES = ("temperature_2m", "precipitation")


def fields(seed: int = 0, rows: int = 12, cols: int = 14, samples: int = 3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 2, rows, cols, generator=g)


def test_total_variation_equals_a_loop():
    x = fields(rows=5, cols=6)[0, 0]
    expected = torch.zeros(5, 6)
    for i in range(5):
        for j in range(6):
            if i < 4:
                expected[i, j] += (x[i + 1, j] - x[i, j]).abs()
            if j < 5:
                expected[i, j] += (x[i, j + 1] - x[i, j]).abs()
            if i < 4 and j < 5:
                expected[i, j] += 0.7 * (x[i + 1, j + 1] - x[i, j]).abs()
            if i < 4 and j > 0:
                expected[i, j] += 0.7 * (x[i + 1, j - 1] - x[i, j]).abs()
    torch.testing.assert_close(total_variation(x[None, None])[0, 0], expected)


def test_a_constant_field_has_no_variation_and_without_prior_the_loss_is_the_squared_error():
    assert not total_variation(torch.full((1, 2, 4, 5), 3.0)).any()
    pred, y = fields(0), fields(1)
    mse = torch.nn.functional.mse_loss(pred, y)
    torch.testing.assert_close(bayesian_tv(pred, y, prior=0.0), mse)
    torch.testing.assert_close(bayesian_tv(pred, y, prior=0.5), mse + 0.5 * total_variation(pred).mean())
    flat = torch.zeros_like(y)
    torch.testing.assert_close(bayesian_tv(flat, y), y.square().mean())


def test_weights_multiply_error_and_prior():
    pred, y = fields(0), fields(1)
    latitude, w = latitude_weights(np.linspace(80, -20, 12)), torch.tensor([10.0, 1.0])
    each = ((pred - y).square() + 0.02 * total_variation(pred)) * latitude[:, None] * w[:, None, None]
    torch.testing.assert_close(bayesian_tv(pred, y, weights=w, latitude=latitude), each.mean())


def test_latitude_weights_have_mean_one_and_follow_the_cosine():
    weights = latitude_weights([60.0, 0.0, -60.0, 45.0])
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[1] / weights[0]) == pytest.approx(2, rel=1e-5)
    assert float(latitude_weights([90.0, 0.0])[0]) >= 0
    for bad in ([100.0], [90.0, -90.0], [], [float("nan")]):
        with pytest.raises(BadInput, match="latitudes"):
            latitude_weights(bad)


def test_missing_cells_have_no_say():
    pred, y = fields(0).requires_grad_(), fields(1)
    hole = y.clone()
    hole[:, :, :4] = float("nan")
    loss = bayesian_tv(pred, hole, prior=0.0)
    torch.testing.assert_close(loss, (pred - y)[:, :, 4:].square().mean())
    loss.backward()
    assert bool(torch.isfinite(pred.grad).all()) and not pred.grad[:, :, :4].any()
    assert float(bayesian_tv(pred.detach(), torch.full_like(y, float("nan")))) == 0


def test_the_task_standardises_weighs_and_gives_back_units():
    task = Downscale(NAMES, prior=0.0, mean=[280.0, 2.0], std=[10.0, 4.0])
    assert task.weights == (10.0, 1.0) and Downscale(NAMES, weights={}).weights == (1.0, 1.0)
    out, labels = fields(0), fields(1) * 5 + 100
    units = torch.tensor([[10.0, 280.0], [4.0, 2.0]])
    expected = sum(
        w * (out[:, k] - (labels[:, k] - units[k, 1]) / units[k, 0]).square().mean() / 2
        for k, w in enumerate(task.weights)
    )
    torch.testing.assert_close(task.loss(out, {"labels": labels}), expected)
    torch.testing.assert_close(task.predict(out)[:, 0], out[:, 0] * 10 + 280)
    perfect = (labels - units[:, 1, None, None]) / units[:, 0, None, None]
    assert float(task.loss(perfect, {"labels": labels})) == pytest.approx(0, abs=1e-6)
    assert task.score(perfect, labels)["r2"] == pytest.approx(1, abs=1e-5)


def test_samples_count_by_their_weights():
    task = Downscale(NAMES, weights={}, loss="mae")
    out, labels = fields(0), fields(1)
    batch = {"labels": labels, "weights": torch.tensor([0.0, 2.0, 2.0])}
    torch.testing.assert_close(task.loss(out, batch), task.loss(out[1:], {"labels": labels[1:]}))
    assert float(task.batch_weight(batch)) == 4 * 2 * 12 * 14


def test_other_losses():
    out, labels = fields(0), fields(1)
    batch = {"labels": labels}
    absolute = (out - labels).abs().mean()
    torch.testing.assert_close(Downscale(NAMES, "mae", weights={}).loss(out, batch), absolute)
    # quantiles that lie symmetrically weigh both signs alike
    torch.testing.assert_close(Downscale(NAMES, "quantile", weights={}).loss(out, batch), absolute / 2)
    squared = Downscale(NAMES, "mse", weights={}).loss(out, batch)
    torch.testing.assert_close(squared, (out - labels).square().mean())
    far = Downscale(NAMES, "perceptual", weights={}, distance=lambda a, b: (a - b).square().mean((1, 2, 3)))
    torch.testing.assert_close(far.loss(out, batch), absolute + 0.5 * squared)


def test_metrics_are_what_they_say():
    pred, y = fields(0, samples=4), fields(1, samples=4)
    latitude = latitude_weights(np.linspace(70, 10, 12))
    found = field_metrics(pred, y, NAMES, latitude)
    a, b = pred[:, 0].numpy(), y[:, 0].numpy()
    assert found["r2/temperature_2m"] == pytest.approx(1 - np.square(a - b).sum() / np.square(b - b.mean()).sum(), 1e-4)
    assert found["rmse/temperature_2m"] == pytest.approx(np.sqrt(np.square(a - b).mean((1, 2))).mean(), rel=1e-5)
    one = field_metrics(pred[:, :1], y[:, :1], NAMES[:1], latitude)
    rows = latitude.numpy()[:, None]
    assert one["weighted_rmse"] == pytest.approx(np.sqrt((np.square(a - b) * rows).mean((1, 2))).mean(), rel=1e-5)
    assert one["pearson"] == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-5)
    for metric, share in (("rmse_q68", 0.68), ("rmse_q95", 0.95)):
        above = b > np.quantile(b, share)
        assert one[metric] == pytest.approx(np.sqrt(np.square(a - b)[above].mean()), rel=1e-5)
    assert field_metrics(y, y)["ssim"] == pytest.approx(1, abs=1e-5) and one["ssim"] < 0.5
    assert field_metrics(pred, y)["weighted_rmse"] == pytest.approx(found["rmse"], rel=1e-5)


def test_metrics_leave_missing_cells_out():
    pred, y = fields(0), fields(1)
    y[:, :, :, 10:] = float("nan")
    found, cut = field_metrics(pred, y), field_metrics(pred[..., :10], y[..., :10])
    for metric in ("r2", "rmse", "pearson", "rmse_q95"):
        assert found[metric] == pytest.approx(cut[metric], rel=1e-5)
    flat = field_metrics(pred, torch.zeros_like(y))
    assert math.isnan(flat["r2"]) and flat["rmse"] > 0


def test_it_runs_under_the_supervised_objective():
    from vitkit.models.reslim import reslim

    torch.manual_seed(0)
    model = reslim(("t", "z"), ("t",), size="femto", img_size=(4, 6), scale=2)
    objective = Supervised(model, Downscale(("t",), latitudes=np.linspace(50, 30, 8)))
    batches = [{"images": torch.randn(2, 2, 4, 6), "labels": torch.randn(2, 1, 8, 12)} for _ in range(2)]
    objective(batches[0])["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {"loss", "r2", "ssim", "rmse_q95", "r2/t"} <= set(objective.evaluate(batches))


def test_refusals():
    with pytest.raises(UnknownName, match="bayesian_tv"):
        Downscale(NAMES, "bayesian-tv")
    with pytest.raises(UnknownName, match="target"):
        Downscale(NAMES, weights={"wind": 1})
    with pytest.raises(BadInput, match="go together"):
        Downscale(NAMES, "perceptual")
    with pytest.raises(BadInput, match="std positive"):
        Downscale(NAMES, std=[1.0, 0.0])
    task = Downscale(NAMES, latitudes=[0.0, 1.0])
    with pytest.raises(BadInput, match="2 latitudes for fields of 12 rows"):
        task.loss(fields(), {"labels": fields()})
    with pytest.raises(BadInput, match="do not fit the targets"):
        task.loss(fields(), {"labels": fields()[:, :1]})

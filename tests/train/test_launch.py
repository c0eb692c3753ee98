"""Several processes on one CPU; each test starts interpreters, so they are few."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitkit.errors import VitkitError
from vitkit.tasks import Classify
from vitkit.train import Supervised, TrainSettings, fit, load_weights

pytestmark = pytest.mark.slow


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, images):
        return self.head(self.blocks(images.flatten(1)))


def _batches(count: int = 2, size: int = 9, bad: bool = False):
    g = torch.Generator().manual_seed(0)
    batches = [
        {"images": torch.rand(size, 1, 2, 3, generator=g), "labels": torch.randint(0, 3, (size,), generator=g)}
        for _ in range(count)
    ]
    if bad:
        batches[-1]["images"][0] = float("nan")
    return batches


def _objective():
    torch.manual_seed(0)
    return Supervised(Net(), Classify("abc"))


def _run(batches=None, val=None, **options):
    objective, told = _objective(), []
    settings = TrainSettings(
        **{"epochs": 2, "optimizer": "sgd", "lr": 0.5, "precision": "fp32", "clip_grad": None, **options}
    )
    folder = options.pop("out_dir", None)
    history = fit(
        objective, batches or _batches(), val, settings=settings, out_dir=folder,
        progress=lambda *message: told.append(message),
    )  # fmt: skip
    return objective, history, told


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "ddp", "accumulate": 2, "mixup": 0.5, "optimizer": "zsharp"},
        {"strategy": "fsdp"},
    ],
)
def test_two_processes_compute_the_gradient_of_one(options):
    """Odd batches, so that the shares differ; SGD with a large rate, so that a wrong gradient shows."""
    if options["strategy"] == "ddp":
        options = {**options, "optimizer_options": {"base": "sgd", "percentile": 0.0, "norm": "global"}}
    one, history_one, _ = _run(val=_batches(), **{**options, "strategy": "auto"})
    two, history_two, told = _run(val=_batches(), **options, devices=2)
    start = _objective().state_dict()
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], value, atol=1e-5, rtol=1e-5)
    assert not torch.equal(start["model.head.weight"], one.state_dict()["model.head.weight"])
    for a, b in zip(history_one.rows, history_two.rows):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-5)
    assert told[-1][1] == told[-1][2]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_checkpoints_of_several_processes(tmp_path, strategy):
    objective = _objective()
    settings = TrainSettings(epochs=2, precision="fp32", devices=2, strategy=strategy, early_stop=2)
    fit(objective, _batches(), _batches(), settings=settings, out_dir=tmp_path)
    assert load_weights(Net(), next(tmp_path.glob("ckpt-*"))) == ([], [])
    again = _objective()
    history = fit(again, _batches(), _batches(), settings=settings, out_dir=tmp_path)
    assert len(history.rows) == 2
    for a, b in zip(objective.state_dict().values(), again.state_dict().values()):
        assert torch.equal(a, b)


def test_an_error_in_a_process_is_the_callers():
    with pytest.raises(VitkitError, match="loss became nan"):
        _run(_batches(bad=True), devices=2)

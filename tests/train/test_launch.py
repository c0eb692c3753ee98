"""Several processes on one CPU; each test starts interpreters, so they are few."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vitkit.data import make_loader, open_source
from vitkit.errors import BadInput, VitkitError
from vitkit.models.presets import vit_pico
from vitkit.tasks import Classify, balanced_weights
from vitkit.train import Supervised, TrainSettings, fit, load_weights

slow = pytest.mark.slow


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


@slow
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


@slow
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


@slow
def test_an_error_in_a_process_is_the_callers():
    with pytest.raises(VitkitError, match="loss became nan"):
        _run(_batches(bad=True), devices=2)


def _trained(strategy: str, devices: int):
    """A ViT on digits: 8 + 8 + 7 images, unequal weights of images and of classes, gradients clipped."""
    source = open_source("digits")
    indices = np.arange(3, 26)
    torch.manual_seed(0)
    model = vit_pico(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=2, num_heads=2)
    weights = balanced_weights(np.bincount(source.labels(indices), minlength=10).tolist())
    objective = Supervised(model, Classify(source.classes, class_weights=weights))
    loader = make_loader(source, indices, (8, 8), 1, batch_size=8, train=True, augment="light", seed=1)
    loader.weights = torch.linspace(0.2, 3, 23)
    settings = TrainSettings(
        epochs=2, optimizer="sgd", lr=0.3, precision="fp32", clip_grad=1.0, devices=devices, class_weights=True,
        accumulate=2 if strategy == "ddp" else 1, cutmix=1.0, mixup=1.0, strategy="auto" if devices == 1 else strategy,
    )  # fmt: skip
    history = fit(objective, loader, make_loader(source, np.arange(40, 60), (8, 8), 1), settings=settings)
    return objective.state_dict(), history


@slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_that_read_their_shares_end_where_one_does(strategy):
    one, history_one = _trained(strategy, 1)
    two, history_two = _trained(strategy, 2)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, atol=1e-5, rtol=1e-5)
    for a, b in zip(history_one.rows, history_two.rows, strict=True):
        assert {**a, "seconds": 0} == pytest.approx({**b, "seconds": 0}, abs=1e-5)


class Shuffled(Dataset):
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.images, self.labels = torch.rand(10, 1, 2, 3, generator=g), torch.randint(0, 3, (10,), generator=g)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"images": self.images[i], "labels": self.labels[i]}


class Witness(Supervised):
    """Writes down which images it saw; stops where a file says so."""

    def __init__(self, folder: Path, stop: int) -> None:
        torch.manual_seed(0)
        net = Net()
        net.blocks.append(nn.Dropout(0.3))
        super().__init__(net, Classify("abc"))
        self.folder, self.stop, self.steps = folder, stop, 0

    def forward(self, batch):
        if self.training:
            rank = torch.distributed.get_rank()
            with (self.folder / f"seen-{rank}").open("a") as file:
                file.writelines(f"{image.sum():.5f}\n" for image in batch["images"])
        return super().forward(batch)

    def after_step(self, step, total):
        if step == self.stop:
            raise VitkitError("stopped here")


@slow
def test_a_stopped_run_of_two_goes_on_as_if_it_had_not(tmp_path):
    """Order, dropout of both processes and momentum come back; a loader that shuffles by the global generator gives
    both processes the same batches."""

    def run(name: str, stop: int) -> Witness:
        (tmp_path / name).mkdir(exist_ok=True)
        objective = Witness(tmp_path / name, stop)
        settings = TrainSettings(
            epochs=2, batch_size=4, lr=0.1, optimizer="sgd", precision="fp32", devices=2, checkpoint_steps=1
        )
        loader = DataLoader(Shuffled(), batch_size=4, shuffle=True)
        fit(objective, loader, None, settings=settings, out_dir=tmp_path / name / "out")
        return objective

    whole = run("whole", -1)
    with pytest.raises(VitkitError, match="stopped here"):
        run("killed", 4)
    again = run("killed", -1)
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    seen = [(tmp_path / "whole" / f"seen-{rank}").read_text().split() for rank in (0, 1)]
    everything = sorted(f"{image.sum():.5f}" for image in Shuffled().images)
    # 4 + 4 + 2 images an epoch, halved
    for epoch in range(2):
        assert sorted(s for rows in seen for s in rows[5 * epoch : 5 * epoch + 5]) == everything
    assert seen[0][:5] != seen[0][5:]


def test_what_cannot_be_sent_to_a_process_is_named():
    objective = _objective()
    objective.aux_loss_fn = lambda model: torch.zeros(())
    with pytest.raises(BadInput, match="cannot be sent to other processes.*torchrun"):
        fit(objective, _batches(), settings=TrainSettings(devices=2))

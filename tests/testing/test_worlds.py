"""Worlds are seeded, balanced and in range; the tiny loop learns and leaves no trace."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vitkit.errors import BadInput, VitkitError
from vitkit.testing import worlds


def check(world, shape):
    assert world.x_train.shape[1:] == world.x_test.shape[1:] == shape
    for x, y in ((world.x_train, world.y_train), (world.x_test, world.y_test)):
        assert x.dtype == torch.float32 and x.min() >= 0 and 0.5 < x.max() <= 1
        assert y.dtype == torch.int64 and len(x) == len(y)
        counts = torch.bincount(y, minlength=world.num_classes)
        assert len(counts) == world.num_classes == 10 and counts.min() > 0
    assert (world.in_chans, world.img_size) == (shape[0], shape[1:])


def test_digits_split_every_image_once():
    world = worlds.digits()
    check(world, (1, 8, 8))
    both = torch.cat([world.x_train, world.x_test]).flatten(1)
    from sklearn.datasets import load_digits

    original = torch.from_numpy(load_digits().data / 16).float()
    assert len(both) == 1797
    # sorted rows: the same multiset of images
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(original, axis=0))


def test_worlds_repeat_with_the_seed():
    a, b, c = worlds.digits(seed=1), worlds.digits(seed=1), worlds.digits(seed=2)
    assert torch.equal(a.x_test, b.x_test) and not torch.equal(a.y_test, c.y_test)


def test_a_share_must_be_a_share():
    with pytest.raises(BadInput, match=r"test_fraction=1\.5"):
        worlds.digits(test_fraction=1.5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with small archives of the shared shape."""
    rng = np.random.default_rng(0)
    for name, shape in (("fashion_mnist.npz", (28, 28)), ("cifar10_small.npz", (32, 32, 3))):
        arrays = {
            "x_train": rng.integers(256, size=(60, *shape), dtype=np.uint8),
            "y_train": rng.permutation(np.repeat(np.arange(10), 6)).astype(np.uint8),
            "x_test": rng.integers(256, size=(30, *shape), dtype=np.uint8),
            "y_test": rng.permutation(np.repeat(np.arange(10), 3)).astype(np.uint8),
        }
        if "cifar" in name:
            arrays["classes"] = np.array([f"c{i}" for i in range(10)])
        np.savez(tmp_path / name, **arrays)
    monkeypatch.setenv(worlds.DATA_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("load", "shape"), [(worlds.fashion_mnist, (1, 28, 28)), (worlds.cifar10, (3, 32, 32))])
def test_archives_are_drawn_balanced(folder, load, shape):
    world = load(n_train=25, n_test=20, seed=3)
    check(world, shape)
    counts = torch.bincount(world.y_train, minlength=10)
    assert counts.max() - counts.min() <= 1 and len(world.y_test) == 20
    assert torch.equal(world.x_train, load(n_train=25, n_test=20, seed=3).x_train)
    # labels stay with their images
    with np.load(folder / f"{'cifar10_small' if shape[0] == 3 else 'fashion_mnist'}.npz") as arrays:
        known = {bytes(x): y for x, y in zip(arrays["x_train"], arrays["y_train"])}
    for x, y in zip(world.x_train, world.y_train):
        pixels = (x * 255).round().to(torch.uint8)
        pixels = pixels.permute(1, 2, 0) if shape[0] == 3 else pixels[0]
        assert known[bytes(pixels.contiguous().numpy())] == y


def test_asking_for_too_many_says_how_many_there_are(folder):
    with pytest.raises(BadInput, match="61 cifar10 train images were asked for; there are 60"):
        worlds.cifar10(n_train=61, n_test=1)


def test_an_absent_folder_or_file_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv(worlds.DATA_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(VitkitError, match=r"Set VITKIT_DATA"):
        worlds.fashion_mnist(10, 10)
    monkeypatch.setenv(worlds.DATA_VARIABLE, str(tmp_path))
    with pytest.raises(VitkitError, match=r"fashion_mnist\.npz is missing"):
        worlds.fashion_mnist(10, 10)


def test_clutter_canvas_shows_the_digit_in_its_box():
    images, labels, boxes = worlds.clutter_canvas(64, seed=5)
    assert images.shape == (64, 1, 32, 32) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    assert boxes.shape == (64, 4) and (boxes[:, 2:] - boxes[:, :2] == 12).all()
    assert boxes.min() >= 0 and boxes.max() <= 32
    again = worlds.clutter_canvas(64, seed=5)
    assert all(torch.equal(a, b) for a, b in zip((images, labels, boxes), again))
    # the box holds exactly a digit of that label: some original, rescaled, matches it
    from sklearn.datasets import load_digits

    data = load_digits()
    originals = F.interpolate(torch.from_numpy(data.images / 16).float()[:, None], size=(12, 12), mode="bilinear")[:, 0]
    for image, label, (x0, y0, x1, y1) in zip(images, labels, boxes.tolist()):
        error = (originals - image[0, y0:y1, x0:x1]).abs().amax((1, 2))
        assert error.min() < 1e-6 and data.target[error.argmin()] == label
    outside = images.clone()
    for image, (x0, y0, x1, y1) in zip(outside, boxes.tolist()):
        image[:, y0:y1, x0:x1] = 0
    assert (outside.flatten(1).amax(1) > 0.2).float().mean() > 0.95


def test_clutter_places_are_uniform():
    _, _, boxes = worlds.clutter_canvas(4000, seed=0)
    counts = np.bincount(boxes[:, 0].numpy(), minlength=21)
    assert len(counts) == 21
    # chi-square with 20 degrees of freedom: 99.9 % below 45.3
    assert ((counts - 4000 / 21) ** 2 / (4000 / 21)).sum() < 45.3


def test_a_canvas_too_small_is_refused():
    with pytest.raises(BadInput, match="digit_size=12 does not fit"):
        worlds.clutter_canvas(1, size=10)


def test_tiny_vit_is_the_host_of_the_protocol():
    model = worlds.tiny_vit()
    assert (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (64, 4, 4)
    assert model.blocks[0].mlp.fc1.out_features == 128
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    other = worlds.tiny_vit(8, 2, in_chans=3, num_classes=4, embed_dim=32, depth=1, reg_tokens=2)
    assert other(torch.zeros(1, 3, 8, 8)).shape == (1, 4) and other.num_prefix_tokens == 3


def test_tiny_vit_is_seeded_and_leaves_the_random_state():
    before = torch.get_rng_state()
    a, b, c = worlds.tiny_vit(seed=0), worlds.tiny_vit(seed=0), worlds.tiny_vit(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.blocks[0].mlp.fc1.weight, b.blocks[0].mlp.fc1.weight)
    assert not torch.equal(a.blocks[0].mlp.fc1.weight, c.blocks[0].mlp.fc1.weight)


def small(**options):
    return worlds.tiny_vit(8, 2, embed_dim=16, depth=1, num_heads=2, **options)


def test_fit_tiny_learns_repeats_and_leaves_the_random_state():
    world = worlds.digits()
    x, y = world.x_train[:256], world.y_train[:256]
    before = torch.get_rng_state()
    start = F.cross_entropy(worlds.predict_logits(small(), x), y)
    seen = []
    a = worlds.fit_tiny(small(), x, y, epochs=8, lr=3e-3, batch=32, progress=lambda *p: seen.append(p))
    b = worlds.fit_tiny(small(), x, y, epochs=8, lr=3e-3, batch=32)
    assert not a.training and seen[-1] == ("train", 8, 8)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert all(p.grad is None for p in a.parameters())
    assert F.cross_entropy(worlds.predict_logits(a, x), y) < start - 0.3


def test_fit_tiny_equals_a_plain_loop():
    world = worlds.digits()
    x, y = world.x_train[:64], world.y_train[:64]
    fitted = worlds.fit_tiny(small(), x, y, epochs=2, batch=16, lr=1e-2, wd=0.1, seed=4)
    model = small().train()
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    generator = torch.Generator().manual_seed(4)
    step = 0
    for _ in range(2):
        for at in torch.randperm(64, generator=generator).split(16):
            # 8 steps: 5 % of them round to none, and one is the least; then a half cosine over the other 7
            factor = 1.0 if step < 1 else 0.5 * (1 + np.cos(np.pi * (step - 1) / 7))
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * factor
            optimizer.zero_grad()
            F.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
            step += 1
    for p, q in zip(fitted.parameters(), model.parameters()):
        torch.testing.assert_close(p, q)


def test_fit_tiny_takes_two_step_optimizers_and_own_losses():
    calls = []

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            calls.append(closure().item())
            return super().step()

    model = small()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    worlds.fit_tiny(
        model, x, y, epochs=3, optimizer_factory=Twice, loss=lambda m, a, b: F.mse_loss(m(a), F.one_hot(b, 10).float())
    )
    assert len(calls) == 3 and calls[-1] < calls[0]


def test_fit_tiny_adds_the_losses_of_parts():
    class Host(nn.Module):
        """Stands for a network whose part writes an auxiliary loss."""

        def __init__(self):
            super().__init__()
            self.vit = small()

        def forward(self, x):
            if self.vit.aux_sink is not None:
                self.vit.aux_sink["pull", 0] = (self.vit.head.bias - 7).square().sum()
            return self.vit(x)

    model = Host()
    worlds.fit_tiny(model, torch.rand(4, 1, 8, 8), torch.zeros(4).long(), epochs=20, lr=0.05)
    assert model.vit.head.bias.min() > 0.2


def test_fit_tiny_refuses_unequal_numbers():
    with pytest.raises(BadInput, match="3 images and 2 labels"):
        worlds.fit_tiny(small(), torch.rand(3, 1, 8, 8), torch.zeros(2).long(), epochs=1)


def test_scores_restore_the_mode_and_add_up():
    model = small().train()
    x = torch.rand(7, 1, 8, 8)
    probabilities = worlds.predict_proba(model, x, batch=3)
    assert model.training and not probabilities.requires_grad
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(7))
    model.eval()
    labels = model(x).argmax(-1)
    assert worlds.accuracy(model, x, labels) == 1
    labels[:2] = (labels[:2] + 1) % 10
    assert worlds.accuracy(model, x, labels) == pytest.approx(5 / 7)


def test_train_tiny_fits_the_world():
    world = worlds.digits(test_fraction=0.9)
    model = worlds.train_tiny(world, epochs=1, embed_dim=16, depth=1)
    assert model.patch_embed.patch_size == (2, 2) and not model.training


def test_the_tiny_host_takes_every_form_of_part_that_build_takes():
    one = worlds.tiny_vit(tokenizer=["conv-stem", ("neurn", {"k": 5})], normalizer={"name": "sinkhorn"})
    assert type(one.patch_embed).__name__ == "NeuRN" and type(one.patch_embed.tokenizer).__name__ == "ConvStem"
    assert one(torch.rand(2, 1, 28, 28)).shape == (2, 10)

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vitkit.testing.worlds import digits, fit_tiny, tiny_vit


class Linear(nn.Module):
    """Logits W x + b of flattened pixels: every attack has a closed form on it."""

    def __init__(self, shape: tuple[int, int, int], num_classes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.fc = nn.Linear(shape[0] * shape[1] * shape[2], num_classes)
        with torch.no_grad():
            self.fc.weight.normal_(0, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


@pytest.fixture(scope="session")
def make_linear():
    def make(shape=(1, 4, 4), num_classes=2, scale=1.0, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Linear(shape, num_classes, scale)

    return make


@pytest.fixture(scope="session")
def digits_cnn():
    """A small convolutional network that knows the digits, and 48 test images it was not trained on."""
    world = digits()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(24 * 16, 10),
        )
        fit_tiny(model, world.x_train, world.y_train, epochs=6, lr=3e-3)
    return model, world.x_test[:48], world.y_test[:48]


@pytest.fixture()
def untrained_vit():
    return tiny_vit(img_size=8, patch_size=2, in_chans=1, num_classes=5, embed_dim=16, depth=2, num_heads=2)

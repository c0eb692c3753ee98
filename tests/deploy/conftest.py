from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vitkit.testing.worlds import tiny_vit


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VITKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    vit = tiny_vit(8, 2, 1, 10, depth=2)
    nn.init.normal_(vit.head.weight, std=0.5)
    return vit.eval()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).random((60, 1, 8, 8), dtype=np.float32)

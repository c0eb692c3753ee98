from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from vitkit.compress.cost import count_flops, count_params, measure_latency, peak_memory, size_bytes
from vitkit.errors import BadInput
from vitkit.models.build import build


class _Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(8, 6, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(8, 1))
        self.bias = nn.Parameter(torch.zeros(8))

    def packed_bytes(self) -> int:
        return 100


def test_shared_tensors_count_once_and_codes_count_as_weights():
    a, b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    b.weight = a.weight
    model = nn.Sequential(a, b, _Packed())
    assert count_params(model) == 36 + 48 + 8
    assert size_bytes(model) == 36 * 4 + 100


def test_non_persistent_buffers_are_not_stored():
    model = nn.Linear(2, 2)
    model.register_buffer("table", torch.zeros(50), persistent=False)
    assert size_bytes(model) == 24


@pytest.mark.parametrize("batch", [1, 3])
def test_flops_of_a_vit_are_its_matrix_products(batch):
    model = build("vit_femto", img_size=8, in_chans=1, num_classes=5)
    blocks, dim, tokens, patch = 4, 64, 17, 2
    per_block = 2 * tokens * (dim * 3 * dim + dim * dim + 2 * dim * 2 * dim) + 4 * tokens**2 * dim
    expected = blocks * per_block + 2 * (tokens - 1) * patch**2 * dim + 2 * dim * 5
    assert count_flops(model, torch.rand(batch, 1, 8, 8)) == batch * expected
    assert model.training


def test_peak_memory_of_a_chain_is_its_largest_moment():
    wide = nn.Sequential(nn.Linear(16, 4096, bias=False), nn.Linear(4096, 16, bias=False))
    weights = 2 * 16 * 4096 * 4
    found = peak_memory(wide, torch.zeros(8, 16))
    assert found == weights + 8 * 4096 * 4 + 8 * 16 * 4
    # memory taken by something else in the process does not count
    held = torch.zeros(10_000_000)
    assert peak_memory(wide, torch.zeros(8, 16)) == found
    assert held.numel() == 10_000_000


def test_peak_memory_of_a_function():
    assert peak_memory(lambda x: (x + 1).sum(), torch.zeros(1000)) >= 4000


def test_models_take_turns():
    order: list[str] = []

    def slow(x):
        order.append("slow")
        time.sleep(0.004)

    def fast(x):
        order.append("fast")
        time.sleep(0.001)

    found = measure_latency({"slow": slow, "fast": fast}, torch.zeros(1), repeats=4, warmup=1)
    assert order == ["slow", "fast"] * 5
    median, p95, ratio = found["fast"]
    assert median <= p95
    assert found["slow"][2] == 1.0 and ratio < 1
    assert 0.9 < median < found["slow"][0]


def test_latency_leaves_modules_in_training_mode():
    model = nn.BatchNorm1d(3).train()
    measure_latency({"m": model}, torch.rand(4, 3), repeats=2, warmup=1)
    assert model.training and int(model.num_batches_tracked) == 0


@pytest.mark.parametrize("options", [{"repeats": 0}, {"warmup": -1}])
def test_latency_needs_rounds(options):
    with pytest.raises(BadInput, match="timed round"):
        measure_latency({"m": nn.Identity()}, torch.rand(1), **options)


def test_a_block_counts_as_by_hand():
    from vitkit.testing.worlds import tiny_vit

    n, dim = 50, 64
    counts = [count_flops(tiny_vit(depth=d, mlp_ratio=4.0), torch.zeros(1, 1, 28, 28)) / 2 for d in (1, 2)]
    # multiply-adds of one block, prefix included
    assert counts[1] - counts[0] == 12 * n * dim**2 + 2 * n**2 * dim

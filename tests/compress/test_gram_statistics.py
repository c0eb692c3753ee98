from __future__ import annotations

import pytest
import torch

from vitkit.compress.statistics import CrossGram, Gram
from vitkit.errors import BadInput


def _batch(n: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mean_over_images_whatever_the_batches():
    x = _batch()
    rows = x.reshape(-1, 4)
    expected = 2 * rows.T @ rows / 7
    for size in (1, 3, 7):
        gram = Gram(4, torch.float64, factor=2.0)
        for part in x.split(size):
            gram.update(part)
        torch.testing.assert_close(gram.value, expected)
        assert gram.count == 7
    half = Gram(4)
    half.update(x)
    assert half.value.dtype == torch.float32
    torch.testing.assert_close(half.value, (expected / 2).float())


def test_cross_gram_keeps_its_order():
    a, b = _batch(seed=1), _batch(seed=2)
    cross = CrossGram(4, torch.float64)
    for pair in zip(a.split(2), b.split(2)):
        cross.update(*pair)
    torch.testing.assert_close(cross.value, a.reshape(-1, 4).T @ b.reshape(-1, 4) / 7)


def test_merging_equals_seeing_everything():
    x = _batch()
    whole = Gram(4, torch.float64).update(x)
    left, right = Gram(4, torch.float64).update(x[:2]), Gram(4, torch.float64).update(x[2:])
    torch.testing.assert_close(left.merge(right).value, whole.value)
    torch.testing.assert_close(Gram(4, torch.float64).merge(whole).value, whole.value)
    assert left.merge(Gram(4, torch.float64)).count == 7


def test_an_image_of_weight_two_counts_like_two():
    x = _batch(3)
    weighted = Gram(4, torch.float64).update(x, torch.tensor([2.0, 1.0, 0.0]))
    repeated = Gram(4, torch.float64).update(torch.cat([x[:1], x[:2]]))
    torch.testing.assert_close(weighted.value, repeated.value)
    a = CrossGram(4, torch.float64).update(x, 2 * x, torch.tensor([2.0, 1.0, 0.0]))
    torch.testing.assert_close(a.value, 2 * repeated.value)


def test_errors():
    with pytest.raises(BadInput, match="no images"):
        _ = Gram(4).value
    with pytest.raises(BadInput, match="float32 or float64"):
        Gram(4, torch.bfloat16)
    with pytest.raises(BadInput, match="4 features, the batch 3"):
        Gram(4).update(torch.zeros(1, 3))
    with pytest.raises(BadInput, match="tokens must match"):
        CrossGram(4).update(torch.zeros(1, 4), torch.zeros(2, 4))
    with pytest.raises(BadInput, match="same kind"):
        Gram(4).merge(CrossGram(4))
    with pytest.raises(BadInput, match="one weight per image"):
        Gram(4).update(torch.zeros(2, 4), torch.ones(3))

"""Row stripes are what they say."""

from __future__ import annotations

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.parts.tokenizers.row_stripes import RowStripes
from vitkit.models.swap import swap
from vitkit.models.vit import ViT


def test_each_token_sees_its_rows_only() -> None:
    part = RowStripes((8, 6), 2, 5, window=3, stride=2).double()
    images = torch.randn(4, 2, 8, 6, dtype=torch.float64)
    x, layout = part(images)
    assert x.shape == (4, 3, 5) and layout.grid == (3, 1)
    for t in range(3):
        rows = images[:, :, 2 * t : 2 * t + 3].flatten(1)
        torch.testing.assert_close(x[:, t], rows @ part.proj.weight.flatten(1).T + part.proj.bias)


def test_seven_overlapping_pairs_on_digits() -> None:
    model = ViT(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=1, num_heads=2)
    record = swap(model, "tokenizer", RowStripes, window=2, stride=1)
    x, layout = model.embed(torch.rand(3, 1, 8, 8))
    assert x.shape == (3, 8, 32) and layout.grid == (7, 1)
    model(torch.rand(3, 1, 8, 8)).sum().backward()
    assert (model.pos_embed.grad[:, 1:] != 0).any()
    assert model(torch.rand(2, 1, 12, 8)).shape == (2, 10)
    record.undo()
    assert model.embed(torch.rand(3, 1, 8, 8))[1].grid == (4, 4)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(BadInput, match="window=9"):
        RowStripes(8, 1, 4, window=9)
    with pytest.raises(BadInput, match="8 pixels wide"):
        RowStripes(8, 1, 4, window=2)(torch.rand(1, 1, 8, 7))

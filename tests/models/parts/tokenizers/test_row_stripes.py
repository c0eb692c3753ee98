"""Row stripes are what they say."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitkit.anatomy import check
from vitkit.errors import BadInput
from vitkit.models.build import build
from vitkit.models.layout import TokenLayout
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
    with pytest.raises(BadInput, match=r"\(B, 1, H, W\)"):
        RowStripes(8, 1, 4, window=2)(torch.rand(1, 3, 8, 8))


def test_its_model_is_consistent_and_other_stripes_can_take_its_place() -> None:
    torch.manual_seed(0)
    model = build("vit_femto", img_size=8, in_chans=1, num_classes=3, tokenizer="row-stripes")
    check(model)
    swap(model, "tokenizer", RowStripes, window=4, stride=4)
    assert model.embed(torch.rand(2, 1, 8, 8))[1].grid == (2, 1)
    check(model)
    plain = model.get_parameter("pos_embed")[:, 1:].unflatten(1, (4, 4)).movedim(-1, 1)
    # two stripes see the upper and the lower half of the 4×4 table
    rows = model.patch_embed.pick_positions(model.get_parameter("pos_embed")[:, 1:], (2, 1), TokenLayout(grid=(2, 1)))
    shrunk = F.interpolate(plain, size=(2, 1), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(rows, shrunk.flatten(2).mT, rtol=1e-4, atol=1e-5)


def test_feeds_a_circuit_its_power_of_two() -> None:
    model = build(
        "vit_femto",
        img_size=8,
        in_chans=1,
        num_classes=3,
        tokenizer=("row-stripes", {"window": 2, "stride": 1}),
        normalizer=("qontot", {"layers": 8}),
    )
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)

from __future__ import annotations

import pytest
import torch

from vitkit.anatomy import host
from vitkit.compress.merge.tome import MergeTokens, tome
from vitkit.deploy.merging import DenseMerge, dense_merges
from vitkit.testing.worlds import tiny_vit


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("proportional", [True, False])
def test_dense_merging_answers_like_token_merging(prefix, proportional):
    torch.manual_seed(0)
    options = {"class_token": prefix > 0, "global_pool": "token" if prefix else "avg", "reg_tokens": max(0, prefix - 1)}
    vit = tiny_vit(8, 2, 1, 10, depth=3, **options).double().eval()
    torch.nn.init.normal_(vit.head.weight)
    merged, _ = tome(vit, r=3, proportional=proportional)
    dense = dense_merges(merged)
    assert [type(b.reduce) for b in host(dense).blocks] == [DenseMerge] * 3
    assert [type(b.reduce) for b in host(merged).blocks] == [MergeTokens] * 3
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), merged(x))


def test_a_model_that_merges_nothing_is_returned_as_it_is(model):
    assert dense_merges(model) is model
    net = torch.nn.Conv2d(1, 1, 1)
    assert dense_merges(net) is net


def test_no_merges_left_to_make():
    x, layout = tiny_vit(8, 2, 1, 10).embed(torch.rand(1, 1, 8, 8))
    assert DenseMerge(0, True)(x, torch.rand(1, 2, x.shape[1], 4), layout)[0] is x

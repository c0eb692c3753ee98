"""Constants survive what a model goes through on its way."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from vitkit.models.constant import Constant
from vitkit.models.dct import dct_matrix, dct_rows

EXACT = dct_matrix(9, torch.float64)[:5]


def test_a_detour_through_half_precision_leaves_no_trace() -> None:
    constant = Constant(dct_rows, 9, 5)
    torch.testing.assert_close(constant.to(torch.bfloat16).value, EXACT.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(constant.half().float().value, EXACT.float(), rtol=0, atol=0)
    torch.testing.assert_close(constant.half().double().value, EXACT, rtol=0, atol=0)


def test_a_least_precision_is_kept() -> None:
    constant = Constant(dct_rows, 9, 5, at_least=torch.float32)
    assert constant.bfloat16().value.dtype == torch.float32
    assert torch.equal(constant.value, EXACT.float())
    assert torch.equal(constant.double().value, EXACT)


def test_it_is_never_saved_and_is_made_where_weights_come_later() -> None:
    with torch.device("meta"):
        constant = Constant(dct_rows, 9, 5)
    constant.to_empty(device="cpu")
    assert torch.equal(constant.value, EXACT.float())
    assert not constant.state_dict()
    assert not list(constant.parameters())


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_the_same(way: str) -> None:
    constant = Constant(dct_rows, 9, 5).bfloat16()
    if way == "deepcopy":
        again = copy.deepcopy(constant)
    else:
        file = io.BytesIO()
        torch.save(constant, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert torch.equal(again.value, constant.value)
    assert torch.equal(again.float().value, EXACT.float())

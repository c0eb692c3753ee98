from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitkit.compress.quantize.grid import Grid, pack
from vitkit.compress.quantize.linear import ActLinear, QuantLinear, TokenQuantizer
from vitkit.compress.quantize.solver import round_to_nearest, solve
from vitkit.errors import BadInput

GRIDS = [
    Grid(bits=2),
    Grid(bits=3, symmetric=True),
    Grid(bits=4, granularity="group", group_size=4, clip_search=True),
    Grid(bits=8),
    Grid(bits=8, symmetric=True, granularity="group", group_size=8),
]


def _linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 6, bias=bias)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}-{g.granularity}-{g.symmetric}")
@pytest.mark.parametrize("a_bits", [None, 4, 8])
def test_computes_the_solution_and_round_trips(grid, a_bits):
    linear = _linear()
    solution = round_to_nearest(linear.weight.detach(), grid)
    layer = QuantLinear.from_solution(linear, solution, grid, a_bits)
    torch.testing.assert_close(layer.weight, solution.weight, rtol=0, atol=0)
    x = torch.randn(2, 5, 16)
    seen = x if a_bits is None else Grid(bits=a_bits, granularity="token")(x)
    torch.testing.assert_close(layer(x), nn.functional.linear(seen, solution.weight, linear.bias))
    assert layer.codes.dtype == torch.int8 and layer.zero.dtype == torch.int8
    assert layer.codes.min() >= -(2 ** (grid.bits - 1)) and layer.codes.max() <= 2 ** (grid.bits - 1) - 1

    empty = QuantLinear(16, 6, bits=grid.bits, symmetric=grid.symmetric, group_size=layer.group_size, a_bits=a_bits)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))
    torch._dynamo.reset()  # each case is a new shape of the same class; the compiler keeps eight
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


def test_groups_in_another_order():
    linear, grid = _linear(), Grid(bits=3, granularity="group", group_size=4)
    x = torch.randn(200, 16)
    h = x.T @ x / 200
    solution = solve(linear.weight.detach(), h, None, grid, static_groups=False)
    layer = QuantLinear.from_solution(linear, solution, grid)
    torch.testing.assert_close(layer.weight, solution.weight, rtol=0, atol=0)
    empty = QuantLinear(16, 6, bits=3, group_size=4, has_perm=True)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.weight, layer.weight)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g.bits}-{g.granularity}-{g.symmetric}")
def test_packed_bytes_is_the_length_of_a_packed_file(grid):
    linear = _linear(bias=False)
    layer = QuantLinear.from_solution(linear, round_to_nearest(linear.weight.detach(), grid), grid)
    offset = 2 ** (grid.bits - 1)
    expected = len(pack(layer.codes.long().flatten() + offset, grid.bits)) + 4 * layer.scale.numel()
    if not grid.symmetric:
        expected += len(pack(layer.zero.long().flatten() + offset, grid.bits))
    assert layer.packed_bytes() == expected
    assert layer.packed_bytes() < 4 * linear.weight.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting_the_model_keeps_the_steps(dtype):
    linear, grid = _linear(), Grid(bits=4)
    layer = QuantLinear.from_solution(linear, round_to_nearest(linear.weight.detach(), grid), grid)
    before = layer.weight.clone()
    layer.to(dtype)
    assert torch.equal(layer.weight, before) and layer.bias.dtype == dtype
    assert layer(torch.randn(3, 16, dtype=dtype)).dtype == dtype


def test_token_quantizer_rounds_every_token_alone_and_lets_gradients_through():
    x = torch.randn(2, 3, 16, requires_grad=True)
    act = TokenQuantizer(3)
    out = act(x)
    assert torch.equal(out, Grid(bits=3, granularity="token")(x))
    assert all(len(token.unique()) <= 8 for token in out.reshape(-1, 16))
    assert float((out - x).detach().abs().max()) > 0
    out.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    # one token's outlier does not coarsen the others
    wild = x.detach().clone()
    wild[0, 0, 0] = 100.0
    assert torch.equal(act(wild)[1], out[1].detach())
    assert act(x.detach().bfloat16()).dtype == torch.bfloat16


def test_act_linear_keeps_its_weights():
    linear = _linear()
    layer = ActLinear.from_linear(linear, 8)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    x = torch.randn(4, 16)
    assert torch.equal(layer(x), linear(TokenQuantizer(8)(x)))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_misuse_says_what_is_allowed():
    with pytest.raises(BadInput, match="2 to 8"):
        QuantLinear(4, 4, bits=16)
    with pytest.raises(BadInput, match="does not divide"):
        QuantLinear(4, 4, group_size=3)
    with pytest.raises(BadInput, match="a_bits=16"):
        TokenQuantizer(16)
    with pytest.raises(BadInput, match="no codes"):
        linear = _linear()
        QuantLinear.from_solution(linear, solve(linear.weight.detach(), torch.eye(16)), Grid(bits=4))

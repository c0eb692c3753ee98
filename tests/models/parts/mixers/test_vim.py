"""The scan in both directions: two one-directional blocks under one gate."""

from __future__ import annotations

import torch

from vitkit.models.layout import TokenLayout
from vitkit.models.parts.mixers.mamba import Mamba
from vitkit.models.parts.mixers.vim import Vim

LAYOUT = TokenLayout(grid=(3, 5), prefix=(("class", 1),))


def one_direction(vim: Vim, k: int) -> Mamba:
    """The block that has only the forward or only the backward half of the weights."""
    order = vim.line.orders[0] + ("_rev" if k else "")
    single, inner = Mamba(8, order, d_state=4, prefix="middle"), 16
    state = {name: p for name, p in vim.state_dict().items() if not name.startswith(("conv", "ssm"))}
    state |= {f"ssm.{name}": p[k : k + 1] for name, p in vim.ssm.state_dict().items()}
    state["conv.weight"] = vim.conv.weight.unflatten(1, (2, inner))[:, k]
    state["conv.bias"] = vim.conv.bias.unflatten(0, (2, inner))[k]
    single.load_state_dict(state)
    return single


def test_is_the_sum_of_the_two_directions():
    for order in ("raster", "gilbert"):
        vim = Vim(8, order, d_state=4)
        # 16 rows, so that backwards "the middle" is one place further
        x, layout = torch.randn(2, 15, 8), LAYOUT.replace(prefix=())
        with torch.no_grad():
            both = one_direction(vim, 0)(x, layout) + one_direction(vim, 1)(x, layout)
            assert torch.allclose(vim(x, layout), both, atol=1e-5)


def test_the_class_token_is_in_the_middle_of_both_directions():
    vim = Vim(8)
    paths = vim.line.paths(LAYOUT, 1, torch.device("cpu"))
    assert paths.rows[7, 0] == 0 and paths.rows[8, 1] == 0
    assert paths.rows[:, 1].tolist() == paths.rows[:, 0].tolist()[::-1]


def test_every_token_hears_every_other():
    vim = Vim(8)
    for row in (0, 1, 9, 15):
        x = torch.randn(1, 16, 8, requires_grad=True)
        vim(x, LAYOUT)[0, row].sum().backward()
        assert bool((x.grad[0].abs().sum(-1) > 0).all())


def test_padding_changes_nothing_in_either_direction():
    vim = Vim(8)
    keep, more = torch.tensor([[1, 4, 7, 8, 13]]), torch.tensor([[1, 4, 7, 8, 13, 2, 3]])
    x = torch.randn(1, 6, 8)
    padded = torch.cat([x, torch.randn(1, 2, 8)], 1)
    layout = LAYOUT.take(more).replace(valid=torch.tensor([[True] * 5 + [False] * 2]))
    assert torch.allclose(vim(padded, layout)[:, :6], vim(x, LAYOUT.take(keep)), atol=1e-5)

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitkit.errors import BadInput, UnknownName
from vitkit.models.normalized import NormalizedModel
from vitkit.testing.worlds import tiny_vit
from vitkit.train.optimizers import ZSharp, make_optimizer, param_groups


def test_biases_norms_tokens_and_positions_are_not_decayed():
    model = NormalizedModel(tiny_vit(8, 2, 1, 10, depth=1, reg_tokens=2), [0.5], [0.5])
    decayed, plain = param_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    rest = {names[id(p)] for p in plain["params"]}
    assert {"model.pos_embed", "model.cls_token", "model.reg_token", "model.norm.weight", "model.head.bias"} <= rest
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_no_weight_decay_of_a_part_is_respected():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.weight = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
            self.temperature = nn.Parameter(torch.ones(3, 1, 1))

        def no_weight_decay(self):
            return {"table"}

    model = nn.ModuleDict({"part": Part()})
    decayed, plain = param_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model["part"].weight)] and len(plain["params"]) == 2


@pytest.mark.parametrize("name", ["adamw", "sgd", "sam", "asam", "friendly-sam", "zsharp"])
def test_every_name_builds(name):
    model = nn.Linear(3, 2)
    opt = make_optimizer(name, model, lr=0.1, weight_decay=0.01)
    assert [g["weight_decay"] for g in opt.param_groups] == [0.01, 0.0]
    assert all(g["lr"] == 0.1 for g in opt.param_groups)


def test_options_reach_rule_and_base():
    opt = make_optimizer("zsharp", nn.Linear(3, 2), 0.1, 0.0, {"rho": 0.3, "base": "sgd", "momentum": 0.5})
    assert isinstance(opt, ZSharp) and isinstance(opt.base, torch.optim.SGD)
    assert opt.param_groups[0]["rho"] == 0.3 and opt.param_groups[0]["momentum"] == 0.5


def test_wrong_names_and_options_are_answered():
    model = nn.Linear(3, 2)
    with pytest.raises(UnknownName, match="Did you mean 'zsharp'"):
        make_optimizer("zshrp", model, 0.1, 0.0)
    with pytest.raises(UnknownName, match="base optimizer"):
        make_optimizer("sam", model, 0.1, 0.0, {"base": "sam"})
    with pytest.raises(BadInput, match="roh"):
        make_optimizer("adamw", model, 0.1, 0.0, {"roh": 1})
    with pytest.raises(BadInput, match="roh"):
        make_optimizer("zsharp", model, 0.1, 0.0, {"roh": 1})
    with pytest.raises(BadInput, match="trainable"):
        make_optimizer("adamw", model.requires_grad_(False), 0.1, 0.0)

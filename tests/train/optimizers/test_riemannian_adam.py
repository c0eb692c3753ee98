"""Riemannian Adam: a step by hand, geoopt's steps, AdamW for the rest, and points that stay on the sheet."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

import vitkit  # noqa: F401 - registers the networks
from vitkit.models.lorentz import LorentzPositions, distance, inner, lift
from vitkit.train.optimizers import make_optimizer
from vitkit.train.optimizers.riemannian_adam import RiemannianAdam


def point(*space, c=1.0):
    p = nn.Parameter(lift(torch.tensor(space, dtype=torch.float64), c))
    p.lorentz_c = c
    return p


def test_a_first_step_by_hand():
    """From the origin, a gradient (0.7, 3, 4): the unit step is 0.1 against (0, 0.6, 0.8)."""
    p = point(0.0, 0.0)
    optimizer = RiemannianAdam([p], lr=0.1)
    p.grad = torch.tensor([0.7, 3.0, 4.0], dtype=torch.float64)
    optimizer.step()
    wanted = [math.cosh(0.1), -0.6 * math.sinh(0.1), -0.8 * math.sinh(0.1)]
    assert p.tolist() == pytest.approx(wanted, abs=1e-9)
    # the mean, carried along its own geodesic: 0.1·5 long, and tangent in the new place
    mean = optimizer.state[p]["exp_avg"]
    assert mean.tolist() == pytest.approx([-0.5 * math.sinh(0.1), 0.3 * math.cosh(0.1), 0.4 * math.cosh(0.1)], abs=1e-9)
    assert float(optimizer.state[p]["exp_avg_sq"]) == pytest.approx(0.001 * 25)


@pytest.mark.parametrize("c", [1.0, 3.0])
def test_a_second_step_is_a_loop_of_the_equations(c):
    p = point(0.4, -1.0, 0.3, c=c)
    optimizer = RiemannianAdam([p], lr=0.05, betas=(0.8, 0.95))
    x, m, v = p.detach().clone(), torch.zeros(4, dtype=torch.float64), 0.0
    flip = torch.tensor([-1.0, 1, 1, 1], dtype=torch.float64)
    for t, g in enumerate((torch.tensor([1.0, -2, 0.5, 3]), torch.tensor([-0.3, 1, 4, -2])), start=1):
        g = g.double()
        p.grad = g.clone()
        optimizer.step()
        h = flip * g
        r = h + inner(x, h) / c * x
        m, v = 0.8 * m + 0.2 * r, 0.95 * v + 0.05 * float(inner(r, r))
        u = -0.05 * (m / (1 - 0.8**t)) / (math.sqrt(v / (1 - 0.95**t)) + 1e-8)
        length = math.sqrt(float(inner(u, u)) / c)
        y = math.cosh(length) * x + math.sinh(length) / length * u
        m = m + inner(y, m) / (c - inner(x, y)) * (x + y)
        x = y
        assert torch.allclose(p, x, atol=1e-9)


@pytest.mark.parametrize("c", [1.0, 2.0])
def test_geoopt_steps_the_same(c):
    geoopt = pytest.importorskip("geoopt")
    generator = torch.Generator().manual_seed(0)
    space, other = torch.randn(2, 5, 7, dtype=torch.float64, generator=generator)
    p, goal = nn.Parameter(lift(space, c)), lift(other, c)
    p.lorentz_c = c
    manifold = geoopt.Lorentz(torch.tensor(c, dtype=torch.float64))
    theirs = geoopt.ManifoldParameter(p.detach().clone(), manifold=manifold)
    mine = RiemannianAdam([p], lr=0.05)
    reference = geoopt.optim.RiemannianAdam([theirs], lr=0.05)
    for _ in range(5):
        for q, optimizer in ((p, mine), (theirs, reference)):
            optimizer.zero_grad()
            (-inner(q, goal)).sum().backward()
            optimizer.step()
        assert torch.allclose(p, theirs, atol=1e-7)


def test_without_marked_parameters_it_is_adamw():
    torch.manual_seed(0)
    a = nn.Linear(4, 3)
    b = copy.deepcopy(a)
    x = torch.randn(8, 4)
    for model, kind in ((a, torch.optim.AdamW), (b, RiemannianAdam)):
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.2)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)


def test_points_go_to_the_goal_and_stay_on_the_sheet_in_float32():
    torch.manual_seed(0)
    positions = LorentzPositions(4, 17)
    goal = lift(torch.randn(1, 16, 16), 1.0)
    optimizer = RiemannianAdam(positions.parameters(), lr=0.05, weight_decay=0.5)
    start = float(distance(positions(1.0), goal, 1.0).mean().detach())
    for _ in range(200):
        optimizer.zero_grad()
        distance(positions(1.0), goal, 1.0).square().sum().backward()
        optimizer.step()
    points = positions.pos_embed.detach()
    assert float(distance(points, goal, 1.0).mean()) < 0.05 * start
    assert ((inner(points, points) + 1).abs() < 1e-4 * (1 + points[..., 1:].square().sum(-1))).all()
    mean = optimizer.state[positions.pos_embed]["exp_avg"]
    assert inner(points, mean).abs().max() < 1e-4


def test_a_point_moves_by_the_geometry_and_not_by_its_coordinates():
    """The same loss, seen from another place of the space: the step is carried along by the isometry."""
    boost, rapidity = torch.eye(3, dtype=torch.float64), 1.3
    boost[0, 0] = boost[1, 1] = math.cosh(rapidity)
    boost[0, 1] = boost[1, 0] = math.sinh(rapidity)
    here, goal = point(0.2, -0.4), lift(torch.tensor([1.0, 0.5], dtype=torch.float64), 1.0)
    there = nn.Parameter(boost @ here.detach())
    there.lorentz_c = 1.0
    for p, target in ((here, goal), (there, boost @ goal)):
        optimizer = RiemannianAdam([p], lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            distance(p, target, 1.0).backward()
            optimizer.step()
    assert torch.allclose(boost @ here, there, atol=1e-6)


def test_it_takes_a_name_resumes_and_answers_a_closure():
    torch.manual_seed(0)
    model = timm.create_model("lvit_femto", img_size=8, in_chans=1, num_classes=3, depth=1)
    images = torch.randn(4, 1, 8, 8)
    optimizer = make_optimizer("riemannian-adam", model, 0.01, 0.05)
    assert isinstance(optimizer, RiemannianAdam) and model.positions.pos_embed.lorentz_c == 1.0

    def closure(net=model, opt=optimizer):
        opt.zero_grad()
        loss = net(images).square().sum()
        loss.backward()
        return loss

    losses = [float(optimizer.step(closure).detach()) for _ in range(3)]
    assert losses[2] < losses[0] and model.positions.pos_embed.grad is not None
    twin = copy.deepcopy(model)
    resumed = make_optimizer("riemannian-adam", twin, 0.01, 0.05)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(closure)
    resumed.step(lambda: closure(twin, resumed))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))
    # one number of squared length for each of the 16 points
    assert optimizer.state[model.positions.pos_embed]["exp_avg_sq"].shape == (1, 16, 1)


def test_hooks_are_called_once_and_half_precision_points_move():
    calls = []
    torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    p = nn.Parameter(lift(torch.zeros(4, 5), 1.0).bfloat16())
    p.lorentz_c = 1.0
    optimizer = RiemannianAdam([p, nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(calls) == 1 and p.dtype == torch.bfloat16 and (p[:, 1:] < -0.01).all()

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitkit.errors import BadInput, VitkitError
from vitkit.train.optimizers import ASAM, SAM, FriendlySAM, ZSharp
from vitkit.train.optimizers.perturbed import total_norm

RULES = [SAM, ASAM, FriendlySAM, ZSharp]


def _net(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.GELU(), nn.Linear(8, 3))


def _data(step: int):
    g = torch.Generator().manual_seed(step)
    return torch.randn(12, 6, generator=g), torch.randint(0, 3, (12,), generator=g)


def _closure(model, opt, step, seen=None, scaler=None):
    x, y = _data(step)

    def closure():
        opt.zero_grad()
        if seen is not None:
            seen.append([p.detach().clone() for p in model.parameters()])
        loss = nn.functional.cross_entropy(model(x), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return closure


def _train(model, opt, steps=range(5)):
    for step in steps:
        opt.step(_closure(model, opt, step))
    return [p.detach().clone() for p in model.parameters()]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("rho", [0.0, 1e-30])
def test_rho_zero_is_the_base_optimizer_bit_for_bit(rule, base, rho):
    """1e-30 is lost in every weight, so all of the two-pass machinery runs and must leave no trace."""
    plain, perturbed = _net(), _net()
    reference = base(plain.parameters(), lr=0.05)
    for step in range(5):
        reference.step(_closure(plain, reference, step))
    assert _equal(plain.parameters(), _train(perturbed, rule(perturbed.parameters(), base=base, rho=rho, lr=0.05)))


@pytest.mark.parametrize("rule", RULES)
def test_weights_are_restored_exactly_before_the_base_steps(rule):
    model = _net()
    opt = rule(model.parameters(), lr=0.1, rho=0.37)
    before, seen, at_base = [p.detach().clone() for p in model.parameters()], [], []
    opt.before_base_step = lambda: at_base.append([p.detach().clone() for p in model.parameters()])
    opt.step(_closure(model, opt, 0, seen))
    assert len(seen) == 2 and _equal(seen[0], before) and not _equal(seen[1], before)
    assert _equal(at_base[0], before)


@pytest.mark.parametrize("rule", RULES)
def test_the_step_uses_the_gradient_at_the_perturbed_point(rule):
    model, seen = _net(), []
    opt = rule(model.parameters(), base=torch.optim.SGD, lr=0.1, rho=0.2)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(_closure(model, opt, 0, seen))
    other = _net()
    for p, value in zip(other.parameters(), seen[1]):
        p.data.copy_(value)
    x, y = _data(0)
    nn.functional.cross_entropy(other(x), y).backward()
    for p, old, q in zip(model.parameters(), before, other.parameters()):
        torch.testing.assert_close(p.detach(), old - 0.1 * q.grad)


@pytest.mark.parametrize("rule", RULES)
def test_an_error_in_the_second_pass_leaves_the_weights(rule):
    model = _net()
    opt = rule(model.parameters(), lr=0.1, rho=0.3)
    before, calls = [p.detach().clone() for p in model.parameters()], []
    inner = _closure(model, opt, 0)

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("second")
        return inner()

    with pytest.raises(RuntimeError, match="second"):
        opt.step(closure)
    assert _equal(model.parameters(), before)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("told", [True, False])
def test_batchnorm_statistics_see_the_first_pass_only(rule, told):
    model = _net(norm=True)
    reference = copy.deepcopy(model)
    opt = rule(model.parameters(), lr=0.1, rho=0.5, model=model if told else None)
    opt.step(_closure(model, opt, 0))
    reference(_data(0)[0])
    for name, value in reference.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], value, rtol=0, atol=0)
    assert model[1].track_running_stats and int(model[1].num_batches_tracked) == 1


@pytest.mark.parametrize("rule", RULES)
def test_saved_state_continues_identically(rule):
    model = _net()
    opt = rule(model.parameters(), lr=0.05, rho=0.1)
    _train(model, opt, range(3))
    state, copied = copy.deepcopy(opt.state_dict()), copy.deepcopy(model)
    expected = _train(model, opt, range(3, 6))
    again = rule(copied.parameters(), lr=9.0, rho=0.9)
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == 0.05 and again.param_groups[0]["rho"] == 0.1
    assert _equal(expected, _train(copied, again, range(3, 6)))


@pytest.mark.parametrize("rule", RULES)
def test_a_copied_optimizer_continues_identically(rule):
    model = _net()
    opt = rule(model.parameters(), lr=0.05, rho=0.1)
    _train(model, opt, range(2))
    other_model, other = copy.deepcopy((model, opt))
    assert _equal(_train(model, opt, range(2, 4)), _train(other_model, other, range(2, 4)))


@pytest.mark.parametrize("rule", RULES)
def test_groups_have_their_own_options_and_share_the_schedule(rule):
    model = _net()
    opt = rule(
        [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "rho": 0.0}],
        base=torch.optim.SGD,
        lr=0.1,
        rho=0.2,
    )
    before, seen = [p.detach().clone() for p in model.parameters()], []
    opt.step(_closure(model, opt, 0, seen))
    # lr 0 holds the first layer; rho 0 keeps the second where it is during the second pass
    assert _equal(list(model.parameters())[:2], before[:2]) and not _equal(list(model.parameters())[2:], before[2:])
    assert _equal(seen[1][2:], before[2:]) and not _equal(seen[1][:2], before[:2])
    torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 0.5)
    assert opt.base.param_groups[1]["lr"] == 0.05


@pytest.mark.parametrize("rule", RULES)
def test_a_group_added_later_is_trained(rule):
    model = _net()
    opt = rule(model[0].parameters(), base=torch.optim.SGD, lr=0.1, rho=0.2)
    opt.add_param_group({"params": list(model[2].parameters())})
    before = [p.detach().clone() for p in model.parameters()]
    assert opt.param_groups[1]["rho"] == 0.2
    assert not _equal(_train(model, opt, range(1))[2:], before[2:])


@pytest.mark.parametrize("rule", RULES)
def test_gradients_are_unscaled_before_the_rule_sees_them(rule):
    plain, scaled = _net(), _net()
    a = rule(plain.parameters(), lr=0.05, rho=0.1)
    b = rule(scaled.parameters(), lr=0.05, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        a.step(_closure(plain, a, step))
        b.step(_closure(scaled, b, step, scaler=scaler), scaler=scaler)
        scaler.update()
    # the scale is a power of two, so nothing may differ
    assert _equal(plain.parameters(), scaled.parameters())


def test_an_overflow_skips_the_step():
    model = _net()
    opt = SAM(model.parameters(), lr=0.1, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = [p.detach().clone() for p in model.parameters()]
    inner = _closure(model, opt, 0, scaler=scaler)

    def closure():
        loss = inner()
        next(model.parameters()).grad.fill_(float("inf"))
        return loss

    opt.step(closure, scaler=scaler)
    scaler.update()
    assert _equal(model.parameters(), before) and scaler.get_scale() == 512.0


@pytest.mark.parametrize("rule", RULES)
def test_parameters_without_gradient_are_left_alone(rule):
    model = _net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    _train(model, rule(model.parameters(), lr=0.05, rho=0.1))
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("rule", RULES)
def test_half_precision_weights_train(rule):
    model = _net().bfloat16()
    opt = rule(model.parameters(), base=torch.optim.SGD, lr=0.05, rho=0.5)
    x, y = _data(0)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x.bfloat16()).float(), y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    opt.step(closure)
    assert all(p.isfinite().all() for p in model.parameters()) and not _equal(model.parameters(), before)


def test_what_cannot_be_is_said():
    model = _net()
    with pytest.raises(VitkitError, match=r"step\(closure\)"):
        SAM(model.parameters(), lr=0.1).step()
    with pytest.raises(BadInput, match="rho=-1"):
        SAM(model.parameters(), lr=0.1, rho=-1)
    with pytest.raises(BadInput, match="eta=-1"):
        ASAM(model.parameters(), lr=0.1, eta=-1)
    with pytest.raises(BadInput, match=r"decay=1\.0"):
        FriendlySAM(model.parameters(), lr=0.1, decay=1.0)


def _moves(opt, model, step=0):
    _closure(model, opt, step)()
    entries = [(p, g) for g in opt.param_groups for p in g["params"]]
    return [p.grad.clone() for p, _ in entries], opt.perturbation(entries)


def test_sam_climbs_along_the_gradient_by_rho():
    model = _net()
    grads, moves = _moves(SAM(model.parameters(), lr=0.1, rho=0.2), model)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    for g, e in zip(grads, moves):
        torch.testing.assert_close(e, 0.2 * g / norm)


def test_asam_scales_weights_but_not_vectors():
    model = _net()
    grads, moves = _moves(ASAM(model.parameters(), lr=0.1, rho=0.5, eta=0.01), model)
    scales = [p.detach().abs() + 0.01 if p.ndim > 1 else torch.ones_like(p) for p in model.parameters()]
    norm = torch.cat([(t * g).flatten() for t, g in zip(scales, grads)]).norm()
    for t, g, e in zip(scales, grads, moves):
        torch.testing.assert_close(e, 0.5 * t * t * g / norm)


def test_friendly_sam_takes_the_running_mean_out():
    model = _net()
    opt = FriendlySAM(model.parameters(), lr=0.1, rho=0.2, sigma=1.0, decay=0.9)
    g0, moves = _moves(opt, model, 0)
    for g, e in zip(g0, moves):
        torch.testing.assert_close(e, 0.2 * g / total_norm(g0))
    g1, moves = _moves(opt, model, 1)
    d = [b - a for a, b in zip(g0, g1)]
    for x, e in zip(d, moves):
        torch.testing.assert_close(e, 0.2 * x / total_norm(d))
    g2, moves = _moves(opt, model, 2)
    d = [c - (0.9 * a + 0.1 * b) for a, b, c in zip(g0, g1, g2)]
    for x, e in zip(d, moves):
        torch.testing.assert_close(e, 0.2 * x / total_norm(d))


def test_friendly_sam_without_mean_is_sam():
    a, b = _net(), _net()
    _train(a, SAM(a.parameters(), lr=0.05, rho=0.1))
    _train(b, FriendlySAM(b.parameters(), lr=0.05, rho=0.1, sigma=0.0))
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_accumulated_over_parts_of_a_batch_are_those_of_the_whole(rule):
    """Both gradients, the one that gives ε and the one of the step, are sums over the parts."""
    whole, parts = _net().double(), _net().double()
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % 3
    for model, pieces in ((whole, [slice(0, 12)]), (parts, [slice(0, 4), slice(4, 12)])):
        opt = rule(model.parameters(), lr=0.05, rho=0.2)

        def closure(model=model, pieces=pieces, opt=opt):
            opt.zero_grad()
            total = 0.0
            for rows in pieces:
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="sum") / 12
                loss.backward()
                total += loss.detach()
            return total

        for _ in range(3):
            opt.step(closure)
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["swin", "convnext", "resnet"])
def test_networks_of_timm_train(rule, name):
    from timm.models.convnext import ConvNeXt
    from timm.models.resnet import BasicBlock, ResNet
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    if name == "swin":
        model: nn.Module = SwinTransformer(
            img_size=16, patch_size=2, window_size=4, in_chans=1, num_classes=3, embed_dim=8, depths=(1, 1),
            num_heads=(2, 2),
        )  # fmt: skip
    elif name == "convnext":
        model = ConvNeXt(in_chans=1, num_classes=3, depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), patch_size=2)
    else:
        model = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=3, in_chans=1, channels=(8, 8, 8, 8))
    images = torch.rand(6, 1, *((16, 16) if name == "swin" else (32, 32)))
    opt = rule(model.parameters(), lr=3e-3, rho=0.02, model=model)
    losses = []

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(images), torch.arange(6) % 3)
        loss.backward()
        return loss

    for _ in range(8):
        losses.append(float(opt.step(closure).detach()))
    assert losses[-1] < losses[0]
    counts = [int(b) for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert set(counts) <= {8}

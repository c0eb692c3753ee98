from __future__ import annotations

import pytest
import torch
from torch import nn

from vitkit.errors import BadInput
from vitkit.explain.base import Explanation, normalize
from vitkit.explain.faithfulness import (
    area_under,
    control_maps,
    deletion_curve,
    infidelity,
    insertion_curve,
    max_sensitivity,
    model_randomisation,
    score_explainers,
    sensitivity_n,
    spearman,
)
from vitkit.explain.gmar import gmar
from vitkit.explain.rollout import rollout
from vitkit.models.build import build
from vitkit.models.normalized import NormalizedModel

GRID = (3, 4)
IMAGES = torch.rand(5, 2, 12, 20, generator=torch.Generator().manual_seed(3)) + 0.1
MEASURES = {"deletion", "insertion", "insertion_minus_deletion", "average_drop", "average_increase", "average_gain"}


class Additive(nn.Module):
    """Logits (0, Σ_cells w·(mean of the cell)): every cell contributes on its own, by a known amount."""

    def __init__(self, seed=0):
        super().__init__()
        self.weight = nn.Parameter(3 * torch.randn(GRID, generator=torch.Generator().manual_seed(seed)))

    def contributions(self, x):
        return self.weight * nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), GRID).squeeze(1)

    def forward(self, x):
        total = self.contributions(x).sum((1, 2))
        return torch.stack([torch.zeros_like(total), total], dim=1)


def test_the_true_contributions_beat_every_other_order():
    net, target = Additive(), torch.ones(5, dtype=torch.long)
    truth = net.contributions(IMAGES).detach()
    maps = {"truth": truth, "reversed": -truth}
    generator = torch.Generator().manual_seed(0)
    maps |= {f"order {i}": torch.rand(5, *GRID, generator=generator) for i in range(20)}
    table = score_explainers(net, IMAGES, maps, target, steps=12)
    for name, row in table.items():
        assert bool((table["truth"]["deletion"] <= row["deletion"] + 1e-6).all()), name
        assert bool((table["truth"]["insertion"] >= row["insertion"] - 1e-6).all()), name
        assert bool((table["reversed"]["deletion"] >= row["deletion"] - 1e-6).all()), name
    assert bool((table["truth"]["insertion_minus_deletion"] > 0).all())
    assert bool((table["reversed"]["insertion_minus_deletion"] < 0).all())


@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_curves_match_a_loop_over_images_steps_and_cells(insert, chunk):
    net, target = NormalizedModel(Additive(1), [0.3, 0.5], [0.2, 0.4]), torch.tensor([0, 1, 1, 0, 1])
    patch_map = torch.rand(5, *GRID, generator=torch.Generator().manual_seed(8))
    curve = insertion_curve if insert else deletion_curve
    fractions, found = curve(net, IMAGES, patch_map, target, steps=5, chunk=chunk)
    assert fractions.tolist() == pytest.approx([0, 2 / 12, 5 / 12, 7 / 12, 10 / 12, 1])
    for b in range(5):
        cells = sorted(range(12), key=lambda c: -patch_map[b].flatten()[c].item())
        for t, fraction in enumerate(fractions.tolist()):
            picked = set(cells[: round(fraction * 12)])
            image = IMAGES[b].clone()
            for y in range(12):
                for x in range(20):
                    cell = (y * 3 // 12) * 4 + x * 4 // 20
                    if (cell in picked) != insert:
                        image[:, y, x] = torch.tensor([0.3, 0.5])
            expected = net(image[None]).softmax(-1)[0, target[b]].item()
            assert found[b, t].item() == pytest.approx(expected, abs=1e-6)
    row = score_explainers(net, IMAGES, {"m": patch_map}, target, steps=5)["m"]
    torch.testing.assert_close(row["insertion" if insert else "deletion"], area_under(fractions, found))
    by_hand = ((found[:, 1:] + found[:, :-1]) / 2 * fractions.diff()).sum(1)
    torch.testing.assert_close(area_under(fractions, found), by_hand)


def test_average_drop_increase_and_gain():
    net, target = NormalizedModel(Additive(2), [0.3, 0.5], [0.2, 0.4]), torch.tensor([0, 1, 1, 0, 1])
    patch_map = torch.rand(5, *GRID, generator=torch.Generator().manual_seed(8))
    row = score_explainers(net, IMAGES, {"m": patch_map}, target)["m"]
    seen = Explanation(normalize(patch_map), target).pixel_map((12, 20))[:, None]
    mean = torch.tensor([0.3, 0.5])[None, :, None, None]
    at = torch.arange(5)
    p = net(IMAGES).softmax(-1)[at, target].detach()
    o = net(mean + seen * (IMAGES - mean)).softmax(-1)[at, target].detach()
    torch.testing.assert_close(row["average_drop"], torch.tensor([max(0, (a - b) / a) for a, b in zip(p, o)]))
    torch.testing.assert_close(row["average_increase"], (o > p).float())
    torch.testing.assert_close(row["average_gain"], torch.tensor([max(0, (b - a) / (1 - a)) for a, b in zip(p, o)]))
    assert 0 < row["average_increase"].mean() < 1
    # a map that shows everything loses nothing
    full = torch.zeros(5, *GRID)
    full[:, 0, 0] = 1
    assert bool((row["average_drop"] >= 0).all())


def test_controls_are_always_there():
    net = Additive()
    table = score_explainers(net, IMAGES, {})
    assert list(table) == ["random", "centred gaussian"]
    for row in table.values():
        assert set(row) == MEASURES
        assert all(v.shape == (5,) and bool(v.isfinite().all()) for v in row.values())
    controls = control_maps(5, GRID)
    again = score_explainers(net, IMAGES, {f"my {k}": v for k, v in controls.items()})
    for name in controls:
        assert torch.equal(again[name]["deletion"], again[f"my {name}"]["deletion"])
    with pytest.raises(BadInput, match="control"):
        score_explainers(net, IMAGES, {"random": torch.rand(5, *GRID)})


def test_the_random_control_says_nothing_on_average():
    net, images = Additive(), IMAGES.repeat(200, 1, 1, 1)
    row = score_explainers(net, images, {}, torch.ones(1000, dtype=torch.long))["random"]
    difference = row["insertion_minus_deletion"]
    assert abs(difference.mean()) < 4 * difference.std() / 1000**0.5


def test_maps_of_unequal_grids_are_scored_on_the_same_cells():
    torch.manual_seed(0)
    vit = build("vit_femto", img_size=(12, 20), patch_size=4, in_chans=2, num_classes=3, depth=1)
    fine, coarse = torch.rand(5, 3, 5), torch.rand(5, 2, 2)
    table = score_explainers(vit, IMAGES, {"fine": fine, "coarse": coarse})
    alone = score_explainers(vit, IMAGES, {"fine": fine})
    torch.testing.assert_close(table["fine"]["deletion"], alone["fine"]["deletion"])
    grown = Explanation(coarse, torch.zeros(5)).pixel_map((3, 5))
    torch.testing.assert_close(
        table["coarse"]["insertion"], score_explainers(vit, IMAGES, {"grown": grown})["grown"]["insertion"]
    )


@pytest.mark.parametrize(
    "bad", [torch.rand(5, 12), torch.rand(4, 3, 4), torch.full((5, 3, 4), float("nan")), torch.rand(5, 2, 3, 4)]
)
def test_bad_maps_are_refused(bad):
    with pytest.raises(BadInput, match="'bad'"):
        score_explainers(Additive(), IMAGES, {"bad": bad})


def test_substrates():
    net, patch_map = Additive(), torch.rand(5, *GRID)
    ends = {}
    for substrate in ("mean", "blur", torch.full((1, 2, 1, 1), 0.7)):
        _, curve = deletion_curve(net, IMAGES, patch_map, torch.ones(5, dtype=torch.long), substrate=substrate)
        torch.testing.assert_close(curve[:, 0], net(IMAGES).softmax(-1)[:, 1].detach())
        ends[str(substrate)[:5]] = curve[:, -1]
    torch.testing.assert_close(ends["mean"], torch.full((5,), 0.5))  # zeros: both logits are 0
    assert not torch.allclose(ends["blur"], ends["mean"])
    with pytest.raises(LookupError, match="substrate"):
        deletion_curve(net, IMAGES, patch_map, substrate="median")


def test_a_network_with_one_output_is_scored_by_its_sigmoid():
    class Single(Additive):
        def forward(self, x):
            return super().forward(x)[:, 1:]

    two, one = Additive(), Single()
    patch_map = torch.rand(5, *GRID)
    _, a = deletion_curve(two, IMAGES, patch_map, torch.ones(5, dtype=torch.long))
    _, b = deletion_curve(one, IMAGES, patch_map)
    torch.testing.assert_close(a, b)


def test_infidelity_is_zero_for_what_is_exactly_right():
    net, target = NormalizedModel(Additive(), [0.3, 0.5], [0.2, 0.4]), torch.ones(5, dtype=torch.long)
    zeros = torch.zeros_like(IMAGES)
    inner = net.model
    exact = (inner.contributions((IMAGES - net.mean) / net.std) - inner.contributions(zeros)).detach()
    pixel = inner.weight.repeat_interleave(4, 0).repeat_interleave(5, 1) / 40 / net.std
    pixel = pixel.expand(5, -1, -1, -1).detach()
    for phi in (exact, pixel):
        error = infidelity(net, IMAGES, phi, target, scale=False)
        assert bool((error < 1e-8).all()), error
    assert bool((infidelity(net, IMAGES, 5 * exact, target, scale=True) < 1e-8).all())
    assert bool((infidelity(net, IMAGES, 5 * exact, target, scale=False) > 1e-3).all())
    assert bool((infidelity(net, IMAGES, torch.rand(5, *GRID), target) > 1e-4).all())
    with pytest.raises(BadInput, match="share"):
        infidelity(net, IMAGES, exact, target, share=1.0)
    with pytest.raises(BadInput, match="pixel attributions"):
        infidelity(net, IMAGES, torch.rand(5, 1, 12, 20), target)


def test_sensitivity_n_is_the_correlation_with_the_drop():
    net, target = Additive(), torch.ones(5, dtype=torch.long)
    truth = net.contributions(IMAGES).detach()
    for n in (1, 4, 11):
        torch.testing.assert_close(sensitivity_n(net, IMAGES, truth, target, n=n), torch.ones(5), atol=1e-4, rtol=0)
        torch.testing.assert_close(sensitivity_n(net, IMAGES, -truth, target, n=n), -torch.ones(5), atol=1e-4, rtol=0)
    assert torch.equal(sensitivity_n(net, IMAGES, torch.ones(5, *GRID), target), torch.zeros(5))
    # all cells at once is one set only
    with pytest.raises(BadInput, match="n=12"):
        sensitivity_n(net, IMAGES, truth, target, n=12)


def test_max_sensitivity():
    net = Additive()

    def constant(model, images, target=None):
        return Explanation(torch.ones(len(images), 2, 2), torch.zeros(len(images), dtype=torch.long))

    def pixels(model, images, target=None):
        return Explanation(images.mean(1), torch.zeros(len(images), dtype=torch.long))

    assert torch.equal(max_sensitivity(constant, net, IMAGES), torch.zeros(5))
    small, large = (max_sensitivity(pixels, net, IMAGES, radius=r) for r in (0.01, 0.02))
    assert bool((small > 0).all())
    torch.testing.assert_close(large, 2 * small, atol=1e-4, rtol=1e-3)
    worst = max_sensitivity(pixels, net, IMAGES, radius=0.02, draws=30)
    assert bool((worst >= large).all()) and bool(
        (worst <= 0.02 * 240**0.5 / IMAGES.mean(1).flatten(1).norm(dim=1)).all()
    )
    with pytest.raises(BadInput, match="draws"):
        max_sensitivity(pixels, net, IMAGES, draws=0)


def test_randomising_the_model_changes_an_honest_map_and_no_other():
    torch.manual_seed(0)
    vit = build("vit_femto", img_size=(12, 20), patch_size=4, in_chans=2, num_classes=3, depth=3)
    for p in vit.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
    before = {k: v.clone() for k, v in vit.state_dict().items()}
    rho = model_randomisation(gmar, vit, IMAGES)
    assert list(rho) == ["blocks.2", "blocks.1", "blocks.0"]
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    assert rho["blocks.0"].mean() < 0.8 and bool((rho["blocks.0"].abs() <= 1).all())

    def edges(model, images, target=None):
        return Explanation(images.mean(1), torch.zeros(len(images), dtype=torch.long))

    assert all(torch.equal(r, torch.ones(5)) for r in model_randomisation(edges, vit, IMAGES).values())


def test_spearman_matches_scipy():
    from scipy.stats import spearmanr

    a, b = torch.randint(0, 5, (4, 3, 4)).float(), torch.rand(4, 3, 4)
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a.numpy(), b.numpy())]
    torch.testing.assert_close(spearman(a, b), torch.tensor(expected, dtype=torch.float32))
    assert spearman(torch.ones(1, 4), torch.rand(1, 4)).item() == 0
    assert spearman(torch.ones(1, 4), torch.ones(1, 4)).item() == 1


def test_leaves_the_model_as_found():
    from vitkit.testing.checks import check_probe

    check_probe(lambda model, images: score_explainers(model, images, {}, steps=3))
    check_probe(lambda model, images: sensitivity_n(model, images, images.mean(1)[:, :2, :2], draws=4, n=2))
    check_probe(lambda model, images: infidelity(model, images, images, draws=4))
    check_probe(lambda model, images: max_sensitivity(gmar, model, images, draws=2))
    check_probe(lambda model, images: model_randomisation(gmar, model, images))


def test_bfloat16_model():
    torch.manual_seed(0)
    vit = build("vit_femto", img_size=(12, 20), patch_size=4, in_chans=2, num_classes=3, depth=2)
    net = NormalizedModel(vit, [0.5, 0.5], [0.2, 0.2])
    patch_map = rollout(net, IMAGES).map
    exact = score_explainers(net, IMAGES, {"rollout": patch_map})
    half = score_explainers(net.to(torch.bfloat16), IMAGES, {"rollout": patch_map})
    for measure in ("deletion", "insertion"):
        torch.testing.assert_close(half["rollout"][measure], exact["rollout"][measure], atol=0.03, rtol=0)


@pytest.mark.parametrize("wrapped", [True, False])
def test_networks_that_are_no_vit_are_randomised_part_by_part_and_keep_their_head(wrapped):
    from timm.models.resnet import BasicBlock, ResNet

    from vitkit.explain.grad_cam import grad_cam

    torch.manual_seed(0)
    net = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=3, in_chans=2, channels=(8, 8, 8, 8)).eval()
    model = NormalizedModel(net, [0.5, 0.5], [0.2, 0.2]) if wrapped else net
    heads = []

    def explain(model, images, target=None):
        heads.append(next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.clone())
        return grad_cam(model, images, target)

    rho = model_randomisation(explain, model, torch.rand(3, 2, 64, 64))
    prefix = "model." if wrapped else ""
    assert list(rho) == [prefix + name for name in ("layer4", "layer3", "layer2", "layer1", "bn1", "conv1")]
    assert len(heads) == 7 and all(torch.equal(h, net.fc.weight) for h in heads)

"""Training on several domains: prototypes, pairs, the loss, and a network that knows nothing of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import timm
import torch
from torch.nn import functional as F

import vitkit  # noqa: F401 - registers the networks
from vitkit.errors import BadInput
from vitkit.models.vit import collect_aux
from vitkit.pretrain.point_dg import PointDG, accuracy_by_domain, same_class_pairs, same_domain_pairs
from vitkit.testing import check_objective
from vitkit.testing.checks import Place
from vitkit.testing.worlds import tiny_vit

TINY = {"embed_dim": 16, "depth": 2, "groups": 8, "neighbours": 6, "point_width": 4, "d_state": 3}


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return timm.create_model("point_dg_mamba_femto", **{**TINY, "num_classes": 3, **options})


def batch(size=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {
        "points": torch.randn(size, 30, 3, generator=generator),
        "target": torch.arange(size) % 3,
        "domain": torch.arange(size) // 3 % 2,
    }


def frozen_norms(objective):
    """In training mode, but with batch norms that do not look at the batch, so that two calls agree."""
    for module in objective.train().modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    return objective


@dataclass(frozen=True)
class PointPlace(Place):
    def host(self, seed=0):
        return tiny(seed, in_chans=self.in_chans, num_classes=5)


class WithDomains(PointDG):
    def forward(self, given):
        return super().forward({**given, "domain": torch.tensor([0, 1, 0, 1])})


def test_it_is_an_objective():
    report = check_objective(WithDomains, places=[PointPlace((5, 7)), PointPlace((3, 5), in_chans=1)], num_domains=2)
    assert {"gradients reach the encoder", "state_dict"} <= report.passed


# -- pairs -------------------------------------------------------------------------------------------------------------


def sizes_of(groups):
    return [int((groups == g).sum()) for g in groups.unique()]


@pytest.mark.parametrize("seed", range(20))
def test_pairs_of_one_domain(seed):
    torch.manual_seed(seed)
    domain = torch.randint(0, 3, (seed,))
    first, second = same_domain_pairs(domain)
    assert torch.equal(domain[first], domain[second])
    both = torch.cat([first, second])
    assert len(both.unique()) == len(both) == sum(n - n % 2 for n in sizes_of(domain))


@pytest.mark.parametrize("seed", range(40))
def test_pairs_of_one_class_are_as_many_as_there_can_be(seed):
    torch.manual_seed(seed)
    size = seed // 2
    target, domain = torch.randint(0, 3, (size,)), (torch.rand(size) ** 2 * 4).long()
    first, second = same_class_pairs(target, domain)
    assert torch.equal(target[first], target[second]) and not (domain[first] == domain[second]).any()
    both = torch.cat([first, second])
    assert len(both.unique()) == len(both)
    possible = 0
    for c in target.unique():
        sizes = sizes_of(domain[target == c])
        possible += min(sum(sizes) // 2, sum(sizes) - max(sizes))
    assert len(first) == possible


def test_pairs_are_drawn_anew():
    domain, target = torch.arange(12) % 2, torch.zeros(12, dtype=torch.long)
    for draw in (lambda: same_domain_pairs(domain), lambda: same_class_pairs(target, domain)):
        seen = {tuple(map(tuple, torch.stack(draw()).T.tolist())) for _ in range(20)}
        assert len(seen) > 15
    firsts = {int(domain[same_class_pairs(target, domain)[0][0]]) for _ in range(20)}
    assert firsts == {0, 1}


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_without_scans_in_pairs_it_is_plain_training():
    model = tiny()
    objective = frozen_norms(PointDG(model, 2, intra=0, cross=0))
    out = objective(batch())
    with collect_aux(model) as aux:
        logits = model(batch()["points"])
    assert torch.equal(out["output"], logits)
    assert torch.allclose(out["loss"], F.cross_entropy(logits, batch()["target"]) + aux["mask", 0])


@pytest.mark.parametrize("name", ["intra", "cross"])
def test_the_losses_of_the_pairs(name):
    """Every pair by itself: join the sequences, scan, take apart, average with the single scan, classify."""
    model = tiny(combine="average", orders=("hilbert",), max_masked=0)
    objective = frozen_norms(PointDG(model, 2, intra=name == "intra", cross=name == "cross", aggregate=False))
    torch.manual_seed(3)
    out = objective(batch())
    torch.manual_seed(3)
    data = batch()
    if name == "intra":
        first, second = same_domain_pairs(data["domain"])
    else:
        first, second = same_class_pairs(data["target"], data["domain"])
    tokens = model.tokenise(data["points"]).x

    def blocks(x):
        for block in model.stages:
            x = x + block.mixer(block.norm(x))
        return x

    losses = []
    for pair in zip(first.tolist(), second.tolist()):
        a, b = (tokens[i] for i in pair)
        if name == "intra":
            scanned = blocks(torch.cat([a, b])[None])[0].chunk(2)
        else:
            scanned = blocks(torch.stack([t for ab in zip(a, b) for t in ab])[None])[0]
            scanned = scanned[::2], scanned[1::2]
        for i, half in zip(pair, scanned):
            mean = model.norm((half + blocks(tokens[i][None])[0]) / 2).mean(0)
            losses.append(F.cross_entropy(model.head(mean), data["target"][i]))
    assert len(losses) == 12
    assert torch.allclose(out["logs"][name], torch.stack(losses).mean(), atol=1e-5)
    single = F.cross_entropy(model(data["points"]), data["target"])
    assert torch.allclose(out["loss"], single + torch.stack(losses).mean(), atol=1e-5)


def test_clouds_without_partners_are_no_trouble():
    objective = PointDG(tiny(), 3).train()
    data = batch(3)
    data["domain"] = torch.arange(3)
    out = objective(data)
    assert float(out["logs"]["intra"]) == float(out["logs"]["cross"]) == 0
    out["loss"].backward()


def test_evaluation_needs_no_domains():
    objective = PointDG(tiny(), 2).eval()
    data = {"points": batch()["points"], "labels": batch()["target"]}
    out = objective(data)
    assert torch.equal(out["output"], objective.encoder()(data["points"])) and "cross" not in out["logs"]
    objective.prototypes.fill_(torch.nan)
    assert torch.equal(objective.encoder()(data["points"]), out["output"])
    assert not any("proto" in name for name in objective.encoder().state_dict())


# -- prototypes --------------------------------------------------------------------------------------------------------


def taught(**options):
    objective = frozen_norms(PointDG(tiny(**options), 2))
    objective(batch())
    objective.after_step(1, 2)
    return objective


def test_prototypes_are_moving_averages_of_the_tokens():
    objective = taught()
    data = batch()
    tokens = objective.network.tokenise(data["points"]).x.detach()
    for c, d in itertools.product(range(3), range(2)):
        mean = tokens[(data["target"] == c) & (data["domain"] == d)].mean(0)
        assert torch.allclose(objective.prototypes[c, d], mean, atol=1e-5)
    old = objective.prototypes.clone()
    later = {key: value[:1] for key, value in batch(seed=2).items()}
    objective(later)
    # a forward alone changes nothing: the loss is of the state that a checkpoint holds
    assert torch.equal(objective.prototypes, old)
    objective(later)
    objective.after_step(2, 2)
    now = objective.network.tokenise(later["points"]).x[0].detach()
    assert torch.allclose(objective.prototypes[0, 0], 0.9 * old[0, 0] + 0.1 * now, atol=1e-5)
    assert torch.equal(objective.prototypes[1:], old[1:]) and torch.equal(objective.prototypes[0, 1], old[0, 1])


def test_masked_tokens_are_in_no_prototype():
    objective = frozen_norms(PointDG(tiny(), 2))
    tokens = objective.network.tokenise(batch()["points"])
    keep = torch.ones(12, 8)
    keep[:, 3] = 0
    keep[0, 5] = 0
    objective._remember(tokens._replace(keep=keep), batch()["target"], batch()["domain"])
    objective.after_step(1, 1)
    assert not objective.seen[:, :, 3].any() and bool(objective.seen[:, :, [0, 1, 2, 4, 5, 6, 7]].all())
    # clouds 0 and 6 are of class 0 and domain 0
    assert torch.allclose(objective.prototypes[0, 0, 5], tokens.x[6, 5].detach(), atol=1e-6)
    assert torch.allclose(objective.prototypes[0, 0, 4], tokens.x[[0, 6], 4].mean(0).detach(), atol=1e-6)


def test_features_come_from_the_same_class_of_other_domains():
    objective, data = taught(), batch()
    torch.nn.init.constant_(objective.gamma, 0.7)
    tokens = objective.network.tokenise(data["points"])
    found = objective.aggregate(tokens, data["target"], data["domain"])
    attend = objective.attend
    for b, g in ((0, 0), (4, 3), (11, 7)):
        c, d = int(data["target"][b]), int(data["domain"][b])
        # one other domain: all attention is on it
        value = attend.kv(objective.prototypes[c, 1 - d, g])[16:]
        assert torch.allclose(found[b, g], tokens.x[b, g] + 0.7 * attend.proj(value), atol=1e-5)
    wiped = objective.prototypes.clone()
    wiped[data["target"], data["domain"]] = torch.randn_like(wiped[data["target"], data["domain"]])
    first = data["domain"] == 0
    objective.prototypes[:, 0] = wiped[:, 0]
    again = objective.aggregate(tokens, data["target"], data["domain"])
    assert torch.equal(again[first], found[first]) and not torch.allclose(again[~first], found[~first], atol=1e-3)


def test_nothing_is_mixed_in_at_the_start_or_without_prototypes():
    objective = taught()
    tokens = objective.network.tokenise(batch()["points"])
    assert torch.equal(objective.aggregate(tokens, batch()["target"], batch()["domain"]), tokens.x)
    fresh = PointDG(tiny(), 2)
    torch.nn.init.constant_(fresh.gamma, 1.0)
    assert torch.equal(fresh.aggregate(tokens, batch()["target"], batch()["domain"]), tokens.x)


def test_gamma_learns_from_the_pairs_alone():
    objective = taught()
    objective(batch())["loss"].backward()
    assert float(objective.gamma.grad.abs()) > 0
    single = frozen_norms(PointDG(tiny(), 2, intra=0, cross=0))
    single(batch())
    single.after_step(1, 2)
    single(batch())["loss"].backward()
    assert single.gamma.grad is None


def test_it_learns():
    """Balls, rods and plates, in two densities."""
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor([[1.0, 1, 1], [1, 0.1, 0.1], [1, 1, 0.1]])
    data = batch(24)
    data["points"] = torch.randn(24, 30, 3, generator=generator) * shape[data["target"]].unsqueeze(1)
    objective = PointDG(tiny(), 2)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        out = objective(data)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        objective.after_step(step + 1, 25)
        losses.append(float(out["loss"].detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_scores_are_by_domain():
    class Fixed(torch.nn.Module):
        def forward(self, points):
            return F.one_hot(points[:, 0, 0].long(), 3).float()

    points = torch.tensor([0.0, 1, 2, 0]).view(4, 1, 1).expand(-1, 5, 3)
    scores = accuracy_by_domain(
        Fixed(), points, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 0, 2]), ("a", "b", "c")
    )
    assert scores == pytest.approx({"a": 2 / 3, "c": 0.0, "mean": 1 / 3})
    with pytest.raises(BadInput, match="no clouds"):
        accuracy_by_domain(Fixed(), points[:0], torch.zeros(0), torch.zeros(0), ("a",))


def test_what_is_refused():
    with pytest.raises(TypeError, match="point_dg_mamba_femto"):
        PointDG(tiny_vit(8))
    with pytest.raises(BadInput, match="momentum"):
        PointDG(tiny(), momentum=1.0)
    with pytest.raises(BadInput, match="num_classes=0"):
        PointDG(tiny(num_classes=0))
    objective = PointDG(tiny(), 2).train()
    for gone, match in (("points", "points"), ("target", "target"), ("domain", "domain")):
        with pytest.raises(BadInput, match=match):
            objective({key: value for key, value in batch().items() if key != gone})
    with pytest.raises(BadInput, match="from 0 to 1"):
        objective({**batch(), "domain": torch.full((12,), 2)})
    with pytest.raises(BadInput, match="12 targets and 5 domains"):
        objective({**batch(), "domain": torch.zeros(5, dtype=torch.long)})
    with pytest.raises(BadInput, match="groups=4"):
        objective({**batch(), "points": torch.randn(12, 4, 3)})

"""Choosing pixels, teaching the scorer, and the schedule of how many there are."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitkit.errors import BadInput
from vitkit.models.pixel_selection import (
    PixelBudget,
    PixelEmbedding,
    PixelScorer,
    PixelSelector,
    choose,
    distillation,
    next_count,
)


def test_the_best_are_chosen_and_ties_go_to_the_first():
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0, 2.0, -1.0]])
    assert choose(scores, 2).tolist() == [[1, 3]]
    assert choose(scores, 4).tolist() == [[1, 2, 3, 4]]
    assert choose(torch.zeros(2, 9), 4).tolist() == [[0, 1, 2, 3]] * 2
    # alone or in a batch, an image gets the same pixels
    many = torch.randn(5, 40).round()
    assert torch.equal(choose(many, 11), torch.cat([choose(row[None], 11) for row in many]))


@settings(deadline=None, max_examples=100)
@given(
    scores=st.lists(st.sampled_from([-float("inf"), -1.0, -0.0, 0.0, 0.5, 2.0, float("nan")]), min_size=1, max_size=12),
    share=st.floats(0, 1),
)
def test_the_choice_is_that_of_a_stable_sort(scores, share):
    scores, count = torch.tensor([scores]), round(share * len(scores))
    expected = scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    assert torch.equal(choose(scores, count), expected)


def test_exploration_keeps_the_best_and_draws_the_rest_by_their_gates():
    torch.manual_seed(0)
    scores = torch.full((4000, 10), -9.0)
    scores[:, :4] = torch.tensor([9.0, 8.0, 7.0, 6.0])
    scores[:, 8] = 0.0
    scores[:, 9] = torch.tensor(0.25 / 0.75).log()
    found = choose(scores, 5, explore=0.2)
    assert found.shape == (4000, 5) and (found.diff(dim=1) > 0).all()
    assert (found[:, :4] == torch.arange(4)).all()
    drawn = torch.bincount(found[:, 4], minlength=10) / 4000
    # σ(0) = 1/2 and σ(log 1/3) = 1/4; the others are 10⁻⁴
    assert float(drawn[8]) == pytest.approx(2 / 3, abs=0.03) and float(drawn[9]) == pytest.approx(1 / 3, abs=0.03)
    assert choose(scores, 10, explore=0.5).tolist()[0] == list(range(10))


def test_a_score_sees_five_by_five_pixels():
    torch.manual_seed(0)
    scorer = PixelScorer(2).double()
    images = torch.randn(1, 2, 11, 11, dtype=torch.float64, requires_grad=True)
    scorer.layers(images)[0, 0, 5, 5].backward()
    seen = images.grad[0].abs().sum(0) > 0
    assert not seen[:3].any() and not seen[8:].any() and not seen[:, :3].any() and not seen[:, 8:].any()
    assert [tuple(p.shape) for n, p in scorer.named_parameters() if n.endswith("weight")] == [
        (8, 2, 3, 3), (16, 8, 3, 3), (1, 16, 1, 1),
    ]  # fmt: skip


def test_distillation_is_the_divergence_and_zero_where_both_agree():
    scores = torch.randn(3, 7)
    assert float(distillation(5 * scores.softmax(1), scores)) == pytest.approx(0, abs=1e-6)
    w = torch.rand(3, 7)
    w[0, 2] = 0
    expected = 0.0
    for row, f in zip(w / w.sum(1, keepdim=True), scores.softmax(1)):
        expected += sum(float(a * (a / b).log()) for a, b in zip(row, f) if a > 0) / 3
    assert float(distillation(w, scores)) == pytest.approx(expected, rel=1e-5)
    assert expected > 0


def test_distillation_teaches_scores_alone_and_in_the_right_direction():
    w = torch.tensor([[0.7, 0.2, 0.1]], requires_grad=True)
    scores = torch.zeros(1, 3, requires_grad=True)
    distillation(w, scores).backward()
    assert w.grad is None
    # ∂KL/∂F = softmax F − w
    assert torch.allclose(scores.grad, torch.full((1, 3), 1 / 3) - w.detach(), atol=1e-6)


def test_tokens_are_the_embedding_of_place_and_value_times_the_gate():
    torch.manual_seed(0)
    selector = PixelSelector(2, 8, PixelBudget((5, 6), 0.2), bands=2).eval()
    images = torch.randn(3, 2, 5, 6)
    chosen = selector.select(images)
    tokens = selector.embed(images, chosen)
    scores = selector.scorer(images)
    for b in range(3):
        for i, pixel in enumerate(chosen.pixels[b].tolist()):
            row, col = divmod(pixel, 6)
            place = torch.tensor([[[(row + 0.5) / 5, (col + 0.5) / 6]]])
            token = selector.embedding(images[b, :, row, col].view(1, 1, 2), place)[0, 0]
            assert torch.allclose(tokens[b, i], token * scores[b, row, col].sigmoid(), atol=1e-6)
            assert chosen.to_map()[b, row, col]
    assert chosen.to_map().sum((1, 2)).tolist() == [6, 6, 6]


def test_places_alone_without_bands():
    plain, waves = PixelEmbedding(3, 8, bands=0), PixelEmbedding(3, 8, bands=4)
    assert plain.fc1.in_features == 5 and waves.fc1.in_features == 5 + 16


def test_the_rule_of_the_schedule():
    bounds = {"least": 10, "most": 60, "tolerance": 0.01}
    assert next_count(50, 1.0, 0.98, **bounds) == 45
    assert next_count(50, 1.0, 0.995, **bounds) == 55
    assert next_count(50, 1.0, 1.2, **bounds) == 55
    assert next_count(11, 1.0, 0.5, **bounds) == 10 and next_count(10, 1.0, 0.5, **bounds) == 10
    assert next_count(58, 1.0, 1.0, **bounds) == 60
    # improvement is relative to the size of a loss, whatever its sign
    assert next_count(50, -1.0, -1.2, **bounds) == 45 and next_count(50, -1.0, -0.9, **bounds) == 55
    for count in range(2, 60):
        assert next_count(count, 1, 0, 1, 100, 0) < count < next_count(count, 1, 1, 1, 100, 0)


def budget(**options):
    return PixelBudget((10, 10), **{"share": 0.3, "least": 0.05, "most": 0.5, **options})


def counts(schedule, losses, total):
    found = []
    for epoch, loss in enumerate(losses):
        schedule.on_epoch(epoch, total, loss)
        found.append(schedule.count)
    return found


def test_falling_losses_shrink_and_even_ones_grow():
    falling = [None, *(0.8**i for i in range(11))]
    assert counts(budget(), falling, 100) == [30, 30, 27, 27, 24, 24, 21, 21, 18, 18, 16, 16]
    even = [None, *[1.0] * 11]
    assert counts(budget(), even, 100) == [30, 30, 33, 33, 37, 37, 41, 41, 46, 46, 50, 50]
    assert counts(budget(every=1), [None, 1.0, 1.0, 1.0], 100) == [30, 30, 33, 37]
    assert counts(budget(adaptive=False), falling, 100) == [30] * 12
    assert counts(budget(), [None] * 6, 100) == [30] * 6


def test_the_moving_average_is_what_is_compared():
    # a single good epoch within a bad window: averages 1, 1.05 | 1.325, 1.1125: not better than 1.05
    assert counts(budget(), [None, 1.0, 1.1, 1.6, 0.9], 100)[-1] > 30


def test_frozen_in_the_last_quarter():
    falling = [None, *(0.8**i for i in range(7))]
    # before epoch 6 of 8 only
    assert counts(budget(), falling, 8) == [30, 30, 27, 27, 24, 24, 24, 24]


def test_the_state_survives_saving_copying_and_averaging():
    one = budget()
    counts(one, [None, 1.0, 0.8, 0.6], 100)
    two = budget()
    two.load_state_dict(one.state_dict())
    three = copy.deepcopy(one)
    for schedule in (one, two, three):
        assert schedule.count == 27
        schedule.on_epoch(4, 100, 0.4)
        assert schedule.count == 24 and int(schedule.k) == 24


def test_other_image_sizes_scale_the_count():
    schedule = budget()
    assert schedule.for_size(10, 10) == 30 and schedule.for_size(20, 10) == 60 and schedule.for_size(1, 1) == 1
    assert schedule.share == 0.3


def test_what_is_refused():
    for wrong in ({"share": 0}, {"share": 1.2}, {"least": 0.4}, {"most": 0.2}, {"every": 0}, {"tolerance": -1}):
        with pytest.raises(BadInput):
            budget(**wrong)
    with pytest.raises(BadInput, match="101 pixels cannot be chosen of 100"):
        budget().set(101)
    with pytest.raises(BadInput, match="explore=1"):
        PixelSelector(1, 8, budget(), explore=1.0)
    with pytest.raises(BadInput, match=r"\(B, 2, H, W\), but got \(1, 3, 10, 10\)"):
        PixelSelector(2, 8, budget()).select(torch.zeros(1, 3, 10, 10))

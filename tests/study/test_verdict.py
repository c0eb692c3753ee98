"""What the verdict claims, and what it refuses to claim."""

from __future__ import annotations

import pytest

from vitkit.study.results import Comparison, Cost, DataReport, Interval, RecipeResult, StudyResult
from vitkit.study.verdict import verdict


def recipe(name, value, *, difference=None, p=None, latency=None, size=None, baseline=False, measure="accuracy"):
    costs = {}
    if latency:
        costs["latency_ms_b1"] = Cost(value=4.0 * latency, ratio=latency, how="measured")
    if size:
        costs["size_bytes"] = Cost(value=1e6 * size, ratio=size, how="counted")
    versus = None
    if difference is not None:
        versus = Comparison(
            measure=measure,
            difference=difference,
            low=difference - 0.02,
            high=difference + 0.02,
            p=p,
            p_holm=p,
            test="mcnemar",
            significant=p < 0.05,
        )
    interval = Interval(value=value, low=value - 0.02, high=value + 0.02)
    return RecipeResult(name=name, baseline=baseline, measures={measure: interval}, versus_baseline=versus, costs=costs)


def study(*recipes, **kwargs) -> StudyResult:
    return StudyResult(name="s", data=DataReport(name="d"), recipes=list(recipes), **kwargs)


VIT = recipe("vit", 0.90, baseline=True, latency=1.0, size=1.0)


def test_a_significant_winner_wins_with_interval_and_costs():
    first, second = verdict(study(VIT, recipe("sharp", 0.95, difference=0.05, p=0.001, latency=1.5, size=0.25)))
    assert first.startswith("sharp wins")
    assert "95.0 % (93.0–97.0 %)" in first and "5.0 points (3.0 to 7.0) above the baseline vit" in first
    assert "p = 0.001" in first and "Holm" in first
    assert "1.50× the time of vit (6 ms per image)" in second and "0.25× the bytes (250 kB on disk)" in second


def test_a_lead_that_may_be_chance_is_not_a_win():
    first, second = verdict(
        study(
            VIT,
            recipe("a", 0.91, difference=0.01, p=0.4, latency=2.0, size=1),
            recipe("b", 0.89, difference=-0.01, p=0.5, latency=0.5, size=1),
        )
    )
    assert "wins" not in first
    assert first.startswith("No recipe is reliably better") and "may be chance" in first
    assert "the fastest is b" in second and "0.50× the time of vit" in second


def test_the_baseline_at_the_top_is_said():
    first, _ = verdict(study(VIT, recipe("a", 0.85, difference=-0.05, p=0.001)))
    assert first.startswith("No recipe beats the baseline vit")
    assert "significantly worse" in first


def test_highest_but_not_significant_beside_a_significant_one():
    first, _ = verdict(
        study(VIT, recipe("noisy", 0.95, difference=0.05, p=0.2), recipe("steady", 0.94, difference=0.04, p=0.01))
    )
    assert "noisy has the best" in first and "without being significantly better" in first
    assert "steady" in first


def test_the_smallest_within_noise_is_named():
    rivals = [
        recipe("best", 0.95, difference=0.05, p=0.001, latency=1.0, size=1.0),
        recipe("small", 0.94, difference=0.04, p=0.001, latency=1.2, size=0.2),
        recipe("quick", 0.935, difference=0.035, p=0.001, latency=0.4, size=1.0),
        recipe("tiny", 0.70, difference=-0.2, p=0.001, latency=0.1, size=0.1),
    ]
    _, second = verdict(study(VIT, *rivals))
    assert "the fastest is quick" in second and "the smallest is small" in second
    assert "tiny" not in second


def test_lower_is_better_for_errors():
    worse = recipe("vit", 2.0, baseline=True, measure="mae")
    first, _ = verdict(study(worse, recipe("a", 1.5, difference=-0.5, p=0.001, measure="mae")))
    assert first.startswith("a wins") and "0.500 (0.480 to 0.520) below the baseline" in first


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([], "No recipe has been measured"),
        ([RecipeResult(name="x", status="failed", error="boom")], "None of the 1 recipes finished"),
        ([VIT], "Only vit was measured"),
        ([recipe("a", 0.9), recipe("b", 0.8)], "no baseline"),
        (
            [RecipeResult(name="vit", baseline=True, status="failed", error="x"), recipe("a", 0.9), recipe("b", 0.8)],
            "the baseline vit failed",
        ),
    ],
)
def test_says_when_there_is_nothing_to_compare(recipes, message):
    sentences = verdict(study(*recipes))
    assert message in sentences[0]
    assert len(sentences) == 2


def test_there_are_two_sentences_each_with_one_full_stop_at_its_end():
    import re

    sentences = verdict(study(VIT, recipe("a", 0.95, difference=0.05, p=0.001, latency=0.4, size=0.3)))
    assert len(sentences) == 2
    for s in sentences:
        assert s.endswith(".") and len(re.findall(r"\.(?=\s|$)", s)) == 1


def test_a_difference_in_another_measure_is_named():
    vit, rival = recipe("vit", 0.8, baseline=True, measure="macro_f1"), recipe("a", 0.9, measure="macro_f1")
    rival.versus_baseline = Comparison(
        measure="subset_accuracy", difference=0.05, p=0.001, p_holm=0.001, test="mcnemar", significant=True
    )
    first, _ = verdict(study(vit, rival, primary="macro_f1"))
    assert "its accuracy is 5.0 points above the baseline" in first

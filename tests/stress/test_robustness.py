from __future__ import annotations

import json
import math

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.stress.attacks import deepfool, et_deepfool, fgsm, pgd
from vitkit.stress.robustness import robust_accuracy, robustness_table


def batches(x, y, n=20):
    return [(x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)]


def test_rows_hold_the_controls(digits_cnn):
    model, x, y = digits_cnn
    clean = float((model(x).argmax(1) == y).double().mean())
    seen = []
    rows = robust_accuracy(
        model,
        iter(batches(x, y)),
        pgd,
        (0.2, 0.0, 0.05),
        data="digits test",
        progress=lambda *a: seen.append(a),
    )
    assert [(r.attack, r.epsilon_255) for r in rows] == [
        ("none", 0),
        ("pgd", 0),
        ("random-noise", 0),
        ("pgd", 12.75),
        ("random-noise", 12.75),
        ("pgd", 51),
        ("random-noise", 51),
    ]
    assert len(seen) == 3 and seen[-1][1] == 3
    by = {(r.attack, r.epsilon_255): r for r in rows}
    # ε = 0 is no attack
    assert by["pgd", 0].robust_accuracy == by["random-noise", 0].robust_accuracy == clean
    assert by["pgd", 0].attack_success == 0 and all(r.clean_accuracy == clean and r.n == len(x) for r in rows)
    # larger ε: to nothing; noise of the same norm does less
    assert by["pgd", 51].robust_accuracy < 0.1 and by["pgd", 51].robust_accuracy <= by["pgd", 12.75].robust_accuracy
    assert by["random-noise", 12.75].robust_accuracy > by["pgd", 12.75].robust_accuracy
    row = by["pgd", 51]
    assert row.goal == "untargeted" and row.knowledge == "white" and row.norm == "linf" and row.data == "digits test"
    assert row.steps == 10 and row.restarts == 1 and row.step_size_255 == pytest.approx(2.5 * 51 / 10)
    assert 0 < row.median_l2 <= 0.2 * 8 + 1e-6 and row.max_linf == pytest.approx(0.2, abs=1e-6)
    assert row.attack_success == pytest.approx(1 - row.robust_accuracy / clean)
    assert row.queries > row.num_iter and row.time_ms > 0 and 0 < row.ssim < 1
    assert math.isnan(row.lpips) and row.row()["attack"] == "pgd"


def test_more_steps_and_restarts_are_at_least_as_strong(digits_cnn):
    model, x, y = digits_cnn
    found = [
        robust_accuracy(model, batches(x, y), pgd, (0.05,), {"steps": s, "restarts": r, "step_size": 0.02})[
            1
        ].robust_accuracy
        for s, r in ((1, 1), (10, 1), (10, 3))
    ]
    assert found[0] >= found[1] >= found[2]


def test_dict_batches_and_the_whole_at_once_agree(digits_cnn):
    model, x, y = digits_cnn
    apart = robust_accuracy(model, [{"images": a, "labels": b} for a, b in batches(x, y)], fgsm, (0.1,))
    whole = robust_accuracy(model, [(x, y)], fgsm, (0.1,))
    assert apart[1].robust_accuracy == whole[1].robust_accuracy


def test_an_attack_with_its_own_size(digits_cnn):
    model, x, y = digits_cnn
    none, row = robust_accuracy(model, batches(x, y), deepfool)
    assert row.goal == "untargeted" and row.norm == "l2" and row.epsilon_255 is None
    assert row.robust_accuracy == 0 and row.attack_success == 1 and none.robust_accuracy > 0.8
    _, row = robust_accuracy(model, batches(x, y), et_deepfool, options={"min_confidence": 0.5})
    assert row.goal == "targeted" and row.steps == 100 and 0 < row.attack_success <= 1


def test_a_target_that_is_the_right_answer_breaks_nothing(digits_cnn):
    model, x, y = digits_cnn
    row = robust_accuracy(model, [(x, y)], fgsm, (0.0,), {"target": int(y[0])})[1]
    assert row.goal == "targeted" and row.robust_accuracy == row.clean_accuracy and row.attack_success == 0


def test_table_for_a_study(digits_cnn):
    model, x, y = digits_cnn
    done = []
    rows = robustness_table(
        model,
        x,
        y,
        attacks=[
            {"name": fgsm, "options": {}},
            {"name": pgd, "options": {"norm": "l2"}},
            {"name": et_deepfool, "options": {"min_confidence": 0.5}},
        ],
        epsilons_255=[16, 4, 8],
        batch_size=20,
        progress=lambda *a: done.append(a),
    )
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [(r["attack"], r["epsilon_255"]) for r in rows] == [
        *(("fgsm", e) for e in (0, 4, 8, 16)),
        *(("pgd", e) for e in (0, 4, 8, 16)),
        ("et-deepfool", None),
        *(("random-noise", e) for e in (0, 4, 8, 16)),
    ]
    assert [(r["attack"], r["epsilon_255"]) for r in rows if r["headline"]] == [("fgsm", 8), ("pgd", 8)]
    clean = (model(x).argmax(1) == y).tolist()
    for r in rows:
        assert len(r["correct"]) == len(x)
        if r["epsilon_255"] == 0:
            assert r["correct"] == clean
    for name in ("fgsm", "pgd", "random-noise"):
        kept = [sum(r["correct"]) for r in rows if r["attack"] == name]
        assert kept == sorted(kept, reverse=True)
    extra = next(r for r in rows if r["attack"] == "et-deepfool")["extra"]
    assert set(extra) == {"attack_success", "median_relative_change", "ssim"} and 0 < extra["attack_success"] <= 1
    assert done[-1] == ("et-deepfool", 48, 48) and ("fgsm", 20, 48) in done
    # a root-mean-square change of 16/255 on 64 pixels is a ball of radius 0.5
    assert "root-mean-square" in next(r for r in rows if r["attack"] == "pgd")["note"]


def test_the_model_is_left_as_found(digits_cnn):
    model, x, y = digits_cnn
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    robustness_table(model, x[:8], y[:8], [{"name": pgd}], [8])
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.eval()


def test_a_model_that_is_never_right_has_no_success_rate(digits_cnn):
    model, x, _ = digits_cnn
    wrong = (model(x).argmax(1) + 1) % 10
    row = robust_accuracy(model, [(x, wrong)], fgsm, (0.1,))[1]
    assert row.robust_accuracy == row.clean_accuracy == 0 and math.isnan(row.attack_success)
    assert math.isnan(row.median_l2) and math.isnan(row.queries)


def test_bad_settings_are_refused(digits_cnn):
    model, x, y = digits_cnn
    with pytest.raises(BadInput, match="at least one batch"):
        robust_accuracy(model, [], fgsm)
    with pytest.raises(BadInput, match="none negative"):
        robust_accuracy(model, [(x, y)], fgsm, (-0.1,))
    with pytest.raises(BadInput, match="takes no option 'stepz'"):
        robust_accuracy(model, [(x, y)], pgd, (0.1,), {"stepz": 3})
    with pytest.raises(BadInput, match="positive strength"):
        robustness_table(model, x, y, [{"name": fgsm}], [0])
    with pytest.raises(LookupError, match="pgdd"):
        robust_accuracy(model, [(x, y)], "pgdd")

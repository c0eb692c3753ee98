from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from vitkit.data import Record, Source, split
from vitkit.data.arrays import ArrayPixels
from vitkit.errors import BadInput


def source_of(labels, task="classify", groups=None, splits=None) -> Source:
    n = len(labels)
    groups, splits = groups or [None] * n, splits or [None] * n
    records = [Record(str(i), label, g, s) for i, (label, g, s) in enumerate(zip(labels, groups, splits))]
    width = len(labels[0]) if task == "multilabel" else max(labels) + 1 if task == "classify" else 1
    return Source(
        name="made up",
        task=task,
        classes=tuple(str(c) for c in range(width)),
        records=records,
        pixels=ArrayPixels([np.zeros((n, 1, 1, 1), np.uint8)]),
        where=np.arange(n),
        fingerprint="",
    )


def covers_once(fold, n) -> bool:
    return np.array_equal(np.sort(np.concatenate([fold.train, fold.val, fold.test])), np.arange(n))


counts = st.lists(st.integers(1, 40), min_size=2, max_size=6)


@given(counts=counts, test=st.floats(0.05, 0.5), val=st.floats(0.0, 0.4), seed=st.integers(0, 99))
def test_stratified_parts_are_within_one_of_ideal(counts, test, val, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(seed).permutation(labels).tolist()
    try:
        [fold] = split(source_of(labels), test=test, val=val, seed=seed)
    except BadInput as error:
        # a few images cannot fill every part
        assert "at least one" in str(error) or "too few" in str(error)
        assume(False)
    assert covers_once(fold, len(labels))
    shares = (1 - test - val, val, test)
    for part, share in zip((fold.train, fold.val, fold.test), shares):
        got = np.bincount(np.array(labels)[part], minlength=len(counts))
        assert (np.abs(got - share * np.array(counts)) < 1 + 1e-9).all()
        assert part.dtype == np.int64 and (np.diff(part) > 0).all()
        # what one class lost by rounding the next one gives back
        assert abs(len(part) - share * len(labels)) <= 2


@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=5), k=st.integers(2, 6), seed=st.integers(0, 9))
def test_every_image_is_tested_once_in_k_folds(counts, k, seed):
    labels = np.repeat(np.arange(len(counts)), counts).tolist()
    assume(len(labels) >= 4 * k)
    folds = split(source_of(labels), folds=k, val=0.2, seed=seed)
    assert len(folds) == k
    assert sorted(np.concatenate([f.test for f in folds]).tolist()) == list(range(len(labels)))
    for fold in folds:
        assert covers_once(fold, len(labels))
        got = np.bincount(np.array(labels)[fold.test], minlength=len(counts))
        assert (np.abs(got - np.array(counts) / k) < 1 + 1e-9).all()


@given(
    groups=st.lists(st.integers(0, 14), min_size=24, max_size=120),
    k=st.sampled_from([None, 2, 4]),
    task=st.sampled_from(["classify", "regress", "multilabel"]),
    seed=st.integers(0, 9),
)
def test_no_group_is_ever_in_two_parts(groups, k, task, seed):
    assume(len(set(groups)) >= 8)
    rng = np.random.default_rng(seed)
    labels = {
        "classify": [0, 1, 2, *rng.integers(0, 3, len(groups) - 3).tolist()],
        "regress": rng.random(len(groups)).tolist(),
        "multilabel": [tuple(row) for row in rng.integers(0, 2, (len(groups), 3)).tolist()],
    }[task]
    source = source_of(labels, task, [f"p{g}" for g in groups])
    for fold in split(source, folds=k, val=0.15, seed=seed):
        assert covers_once(fold, len(groups))
        sets = [{groups[i] for i in part} for part in (fold.train, fold.val, fold.test)]
        assert all(sets)
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])


def test_a_class_of_one_image_is_trained_on():
    for seed in range(10):
        [fold] = split(source_of([0] * 30 + [1] * 30 + [2]), seed=seed)
        assert 60 in fold.train


def test_groups_keep_class_shares_about_right():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 100, 1000)
    labels = (rng.random(1000) < 0.2 + 0.2 * (groups % 2)).astype(int).tolist()
    [fold] = split(source_of(labels, groups=[str(g) for g in groups]), test=0.2, val=0.1)
    overall = np.mean(labels)
    for part, share in zip((fold.train, fold.val, fold.test), (0.7, 0.1, 0.2)):
        assert len(part) == pytest.approx(1000 * share, abs=15)
        assert np.mean(np.array(labels)[part]) == pytest.approx(overall, abs=0.03)


def test_rare_label_sets_reach_every_part():
    labels = [(1.0, 0.0)] * 90 + [(0.0, 1.0)] * 10
    [fold] = split(source_of(labels, "multilabel"), test=0.2, val=0.2)
    assert [int(np.array(labels)[p, 1].sum()) for p in (fold.train, fold.val, fold.test)] == [6, 2, 2]


def test_regression_targets_are_stratified():
    values = np.sort(np.random.default_rng(0).exponential(size=500)).tolist()
    [fold] = split(source_of(values, "regress"))
    tenths = np.quantile(values, np.linspace(0, 1, 11)[1:-1])
    assert set(np.bincount(np.searchsorted(tenths, np.array(values)[fold.test], side="right")).tolist()) <= {9, 10, 11}


@pytest.mark.parametrize("kind", ["classes", "groups", "folds"])
def test_same_seed_same_parts(kind):
    labels = np.random.default_rng(0).integers(0, 3, 90).tolist()
    source = source_of(labels, groups=[str(i // 3) for i in range(90)] if kind == "groups" else None)
    first, again, other = (split(source, folds=3 if kind == "folds" else None, seed=s) for s in (1, 1, 2))
    for a, b in zip(first, again):
        assert all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("train", "val", "test"))
    assert any(not np.array_equal(a.test, b.test) for a, b in zip(first, other))


def test_given_parts_are_respected():
    labels = [0, 1] * 50
    given = ["test" if i < 20 else "train" for i in range(100)]
    [fold] = split(source_of(labels, splits=given), val=0.25)
    assert fold.test.tolist() == list(range(20)) and len(fold.val) == 20 and covers_once(fold, 100)
    given = ["val" if i < 20 else None for i in range(100)]
    [fold] = split(source_of(labels, splits=given), test=0.25)
    assert fold.val.tolist() == list(range(20)) and len(fold.test) == 20
    given = (["train"] * 60 + ["val"] * 20 + ["test"] * 20) * 1
    [fold] = split(source_of(labels, splits=given), test=0.9, val=0.05)
    assert [len(p) for p in (fold.train, fold.val, fold.test)] == [60, 20, 20]
    with pytest.raises(BadInput, match="division of its own"):
        split(source_of(labels, splits=given), folds=5)


def test_val_cut_from_a_given_train_part_keeps_groups():
    given = ["test" if i < 20 else "train" for i in range(100)]
    groups = [str(i // 5) for i in range(100)]
    [fold] = split(source_of([0, 1] * 50, groups=groups, splits=given), val=0.25)
    assert not {groups[i] for i in fold.val} & {groups[i] for i in fold.train}


def test_group_argument():
    source = source_of([0, 1] * 30, groups=[str(i // 2) for i in range(60)])
    [free] = split(source, group=False, test=0.5)
    assert {i // 2 for i in free.test} & {i // 2 for i in free.train}
    with pytest.raises(BadInput, match="has no groups"):
        split(source_of([0, 1] * 30), group=True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"test": 0.0}, "test in"),
        ({"test": 0.6, "val": 0.4}, "below 1"),
        ({"val": -0.1}, "val in"),
        ({"folds": 1}, "at least 2"),
        ({"folds": 50}, "10 images to divide, too few for 50 parts"),
        ({"test": 0.01}, "every part needs at least one"),
    ],
)
def test_impossible_divisions(arguments, says):
    with pytest.raises(BadInput, match=says):
        split(source_of([0, 1] * 5), **arguments)


def test_too_few_groups():
    with pytest.raises(BadInput, match="2 groups to divide, too few for 3 parts"):
        split(source_of([0, 1] * 10, groups=["a", "b"] * 10))

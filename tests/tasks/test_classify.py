from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.tasks import Classify, balanced_weights

CLASSES = ("a", "b", "c")


@given(seed=st.integers(0, 99), smoothing=st.sampled_from([0.0, 0.1, 0.4]), weighted=st.booleans())
def test_loss_is_torchs_cross_entropy(seed, smoothing, weighted):
    g = torch.Generator().manual_seed(seed)
    outputs, labels = torch.randn(7, 3, generator=g), torch.randint(0, 3, (7,), generator=g)
    weights = [0.5, 1.0, 3.0] if weighted else None
    task = Classify(CLASSES, label_smoothing=smoothing, class_weights=weights)
    expected = F.cross_entropy(
        outputs, labels, weight=None if weights is None else torch.tensor(weights), label_smoothing=smoothing
    )
    torch.testing.assert_close(task.loss(outputs, {"labels": labels}), expected)


@given(seed=st.integers(0, 99), smoothing=st.sampled_from([0.0, 0.2]), weighted=st.booleans())
def test_soft_one_hot_labels_equal_class_numbers(seed, smoothing, weighted):
    g = torch.Generator().manual_seed(seed)
    outputs, labels = torch.randn(5, 3, generator=g), torch.randint(0, 3, (5,), generator=g)
    task = Classify(CLASSES, label_smoothing=smoothing, class_weights=[1.0, 2.0, 0.5] if weighted else None)
    hard, soft = task.loss(outputs, {"labels": labels}), task.loss(outputs, {"labels": task.targets(labels)})
    torch.testing.assert_close(hard, soft)


def test_a_sample_weight_of_two_is_the_image_twice():
    outputs, labels = torch.randn(3, 3), torch.tensor([0, 1, 2])
    task = Classify(CLASSES)
    twice = task.loss(outputs[[0, 0, 1, 2]], {"labels": labels[[0, 0, 1, 2]]})
    weighted = task.loss(outputs, {"labels": labels, "weights": torch.tensor([2.0, 1.0, 1.0])})
    torch.testing.assert_close(weighted, twice)
    off = task.loss(outputs, {"labels": labels, "weights": torch.tensor([1.0, 0.0, 1.0])})
    torch.testing.assert_close(off, task.loss(outputs[[0, 2]], {"labels": labels[[0, 2]]}))
    assert float(task.loss(outputs, {"labels": labels, "weights": torch.zeros(3)})) == 0.0


def test_multilabel_loss_scores_and_probabilities():
    task = Classify(CLASSES, multilabel=True)
    outputs, labels = torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float()
    labels[0] = 1
    torch.testing.assert_close(
        task.loss(outputs, {"labels": labels}), F.binary_cross_entropy_with_logits(outputs, labels)
    )
    torch.testing.assert_close(task.predict(outputs), outputs.sigmoid())
    scores = task.score((labels - 0.5) * 10, labels)
    assert scores["accuracy"] == scores["macro_f1"] == scores["map"] == 1.0
    assert task.score((0.5 - labels) * 10, labels)["accuracy"] == 0.0
    with pytest.raises(BadInput, match="do not fit 3 labels"):
        task.loss(outputs, {"labels": torch.zeros(6, dtype=torch.long)})


def test_single_label_scores_and_probabilities():
    task = Classify(CLASSES)
    outputs = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    scores = task.score(outputs, torch.tensor([0, 1, 2, 2]))
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    torch.testing.assert_close(task.predict(outputs).sum(1), torch.ones(4))
    assert task.num_outputs == 3 and task.main_metric in scores


def test_loss_is_float32_for_half_precision_outputs():
    loss = Classify(CLASSES).loss(torch.randn(4, 3).bfloat16(), {"labels": torch.tensor([0, 1, 2, 0])})
    assert loss.dtype == torch.float32


def test_balanced_weights_average_to_one_over_images():
    counts = [30, 10, 60]
    weights = balanced_weights(counts)
    assert sum(w * n for w, n in zip(weights, counts)) == pytest.approx(100)
    assert len({round(w * n, 9) for w, n in zip(weights, counts)}) == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"classes": ["only"]}, "two classes"),
        ({"classes": CLASSES, "label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"classes": CLASSES, "class_weights": [1.0]}, "3 numbers"),
        ({"classes": CLASSES, "class_weights": [1.0, -1.0, 1.0]}, "≥ 0"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(BadInput, match=named):
        Classify(**arguments)


def test_a_class_without_images_has_no_weight():
    with pytest.raises(BadInput, match=r"\[3, 0\]"):
        balanced_weights([3, 0])


@pytest.mark.parametrize("kind", ["single", "mixed", "multilabel"])
def test_batch_weight_puts_the_parts_of_a_batch_together(kind):
    task = Classify("abc", multilabel=kind == "multilabel", class_weights=[1.0, 2.5, 0.3], label_smoothing=0.1)
    outputs = torch.randn(7, 3)
    labels = torch.randint(0, 3, (7,)) if kind == "single" else torch.rand(7, 3).softmax(-1)
    batch = {"labels": labels, "weights": torch.rand(7)}
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 7))]
    losses = [task.loss(outputs[:2], parts[0]), task.loss(outputs[2:], parts[1])]
    shares = [task.batch_weight(part) for part in parts]
    together = (losses[0] * shares[0] + losses[1] * shares[1]) / (shares[0] + shares[1])
    torch.testing.assert_close(together, task.loss(outputs, batch))

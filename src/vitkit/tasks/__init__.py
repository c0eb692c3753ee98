"""What a model is asked: how outputs are scored against labels, in training and after it."""

from __future__ import annotations

from vitkit.tasks.classify import Classify, balanced_weights
from vitkit.tasks.long_tail import group_accuracy
from vitkit.tasks.regress import Regress

__all__ = ["Classify", "Regress", "balanced_weights", "group_accuracy"]

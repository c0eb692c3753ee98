"""Knowing when not to answer: rejection, anomaly scores and how well they work."""

from __future__ import annotations

from vitkit.stress.ood.softmax_rejection import SelectiveReport, SoftmaxRejection, selective_report, softmax_rejection

__all__ = ["SelectiveReport", "SoftmaxRejection", "selective_report", "softmax_rejection"]

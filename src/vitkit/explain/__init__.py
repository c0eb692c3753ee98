"""Explainers of image classifiers, and the scores that tell whether to believe them."""

from vitkit.explain.attention_map import attention_map
from vitkit.explain.base import Explanation, normalize
from vitkit.explain.faithfulness import (
    deletion_curve,
    infidelity,
    insertion_curve,
    max_sensitivity,
    model_randomisation,
    score_explainers,
    sensitivity_n,
)
from vitkit.explain.gmar import gmar
from vitkit.explain.grad_cam import grad_cam
from vitkit.explain.localization import energy_pointing_game, iou_matched_area, pointing_game
from vitkit.explain.rollout import rollout

__all__ = [
    "Explanation",
    "attention_map",
    "deletion_curve",
    "energy_pointing_game",
    "gmar",
    "grad_cam",
    "infidelity",
    "insertion_curve",
    "iou_matched_area",
    "max_sensitivity",
    "model_randomisation",
    "normalize",
    "pointing_game",
    "rollout",
    "score_explainers",
    "sensitivity_n",
]

"""Optimizers that look before they step: the sharpness-aware family."""

from __future__ import annotations

from vitkit.train.optimizers.asam import ASAM
from vitkit.train.optimizers.choose import make_optimizer, param_groups
from vitkit.train.optimizers.friendly_sam import FriendlySAM
from vitkit.train.optimizers.perturbed import PerturbedOptimizer
from vitkit.train.optimizers.sam import SAM
from vitkit.train.optimizers.zsharp import ZSharp

__all__ = ["ASAM", "SAM", "FriendlySAM", "PerturbedOptimizer", "ZSharp", "make_optimizer", "param_groups"]

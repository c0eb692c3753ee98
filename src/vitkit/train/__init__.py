"""Training: one loop, its settings and checkpoints, optimizers, number formats."""

from __future__ import annotations

from vitkit.train.checkpoint import load_checkpoint, load_weights, save_checkpoint
from vitkit.train.fit import History, fit
from vitkit.train.precision import AttentionChoice, autocast, choose_attention, resolve
from vitkit.train.settings import TrainSettings
from vitkit.train.supervised import Supervised

__all__ = [
    "AttentionChoice",
    "History",
    "Supervised",
    "TrainSettings",
    "autocast",
    "choose_attention",
    "fit",
    "load_checkpoint",
    "load_weights",
    "resolve",
    "save_checkpoint",
]

"""Attacks: probes ``f(model, images, labels, target, …) -> AttackResult`` on pixels in [0, 1]."""

from __future__ import annotations

from vitkit.stress.attacks.carlini_wagner import carlini_wagner
from vitkit.stress.attacks.deepfool import deepfool
from vitkit.stress.attacks.et_deepfool import et_deepfool
from vitkit.stress.attacks.fgsm import fgsm
from vitkit.stress.attacks.pgd import pgd
from vitkit.stress.attacks.result import AttackResult

__all__ = ["AttackResult", "carlini_wagner", "deepfool", "et_deepfool", "fgsm", "pgd"]

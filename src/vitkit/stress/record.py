"""The one record of a robustness measurement: what was attacked, how, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from vitkit.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class AttackRecord:
    """Threat model and outcome of one attack at one strength; a row of a robustness table.

    Attributes:
        attack: its name; sanity rows are "none" (ε = 0) and "random-noise".
        goal: what the attacker wants.
        knowledge: "white" knows model and defence, "grey" the model, "transfer" another model, "black" only answers.
        norm: of the bound or of the minimised change, "linf" or "l2".
        epsilon_255: bound in pixel values 0…255 (l2: length in the same unit); None for attacks without a bound.
        steps, step_size_255, restarts: of the attack; None where it has none.
        eot_samples: draws averaged for each gradient; 1 for a deterministic model.
        adaptive: whether the attack differentiates through the defence; None without a defence.
        data: which images, e.g. "digits test".
        n: number of images.
        clean_accuracy: share of images answered right before the attack.
        robust_accuracy: share answered right before and after it.
        attack_success: share of the images answered right before that the attack turned; NaN if there were none.
        mean_l2, median_l2: length of the change of the turned images, pixel units of [0, 1].
        max_linf: largest change of a pixel in them, same unit.
        relative_change: median of ‖r‖₂/√(CHW) over them.
        ssim: mean structural similarity of them to the originals.
        lpips: perceptual distance, where it was computed.
        num_iter, queries: mean gradient steps and forward passes an image attacked.
        time_ms: wall-clock time an image, measured on the device of the model.
    """

    attack: str
    goal: Literal["untargeted", "targeted", "availability", "privacy"] = "untargeted"
    knowledge: Literal["white", "grey", "transfer", "black"] = "white"
    norm: str = "linf"
    epsilon_255: float | None = None
    steps: int | None = None
    step_size_255: float | None = None
    restarts: int | None = None
    eot_samples: int = 1
    adaptive: bool | None = None
    data: str = ""
    n: int
    clean_accuracy: float
    robust_accuracy: float
    attack_success: float
    mean_l2: float = math.nan
    median_l2: float = math.nan
    max_linf: float = math.nan
    relative_change: float = math.nan
    ssim: float = math.nan
    lpips: float = math.nan
    num_iter: float = math.nan
    queries: float = math.nan
    time_ms: float = math.nan

    def __post_init__(self) -> None:
        if self.n < 1:
            raise BadInput("an attack record needs at least one image.")
        if self.robust_accuracy > self.clean_accuracy:
            raise BadInput(
                f"robust accuracy {self.robust_accuracy:.4f} exceeds clean accuracy {self.clean_accuracy:.4f}: an "
                "image counts as robust only if it was answered right to begin with."
            )

    def row(self) -> dict[str, Any]:
        """Plain values by column, in the order of the attributes."""
        return asdict(self)


#: figures of a record that seeds are averaged over
OUTCOMES = tuple(f.name for f in fields(AttackRecord) if f.type == "float" and f.name != "eot_samples")


def over_seeds(records: Sequence[AttackRecord], confidence: float = 0.95) -> dict[str, tuple[float, float, float]]:
    """Mean and t-interval of every outcome over seeds of one threat model: name → (mean, low, high).

    Args:
        records: one a seed, at least three for an interval worth the name; two give a wide one.
        confidence: of the intervals, in (0, 1).

    Returns: NaN bounds for outcomes that a seed lacks.
    Raises: BadInput for fewer than two records, or records of different threat models.
    """
    from scipy.stats import t

    if len(records) < 2:
        raise BadInput(f"{len(records)} record(s): an interval over seeds needs at least two, better three.")
    threats = {tuple((f.name, getattr(r, f.name)) for f in fields(r) if f.name not in OUTCOMES) for r in records}
    if len(threats) > 1:
        one, other = sorted(map(dict, list(threats)[:2]), key=str)
        differ = sorted(name for name in one if one[name] != other[name])
        raise BadInput(f"records of different threat models cannot be averaged; they differ in {', '.join(differ)}.")
    out: dict[str, tuple[float, float, float]] = {}
    for name in OUTCOMES:
        values = np.array([getattr(r, name) for r in records], dtype=np.float64)
        half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * values.std(ddof=1) / math.sqrt(len(values))
        mean = float(values.mean())
        out[name] = (mean, mean - float(half), mean + float(half))
    return out

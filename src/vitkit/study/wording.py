"""How numbers of a study are written for people: names, units, digits. Shared by report, verdict and model card."""

from __future__ import annotations

import math

from vitkit.study.results import Comparison, Cost, Interval, lower_is_better

#: measure -> (title, what it tells)
MEASURES: dict[str, tuple[str, str]] = {
    "accuracy": ("Accuracy", "share of test images answered right"),
    "subset_accuracy": ("Accuracy", "share of test images with every label right"),
    "label_accuracy": ("Label accuracy", "share of right yes/no answers over all labels"),
    "macro_f1": ("Macro-F1", "F1 score averaged over classes, so that rare classes count as much"),
    "auroc": ("AUROC", "chance that an image of a class scores higher for it than one that is not; 0.5 is luck"),
    "nll": ("NLL", "negative log-likelihood of the true class in nats; lower is better"),
    "ece": ("ECE", "expected calibration error: how far confidence is from accuracy; lower is better"),
    "aurc": ("AURC", "mean error when the least confident are rejected first; lower is better"),
    "mae": ("MAE", "mean absolute error, in the unit of the target; lower is better"),
    "rmse": ("RMSE", "root mean squared error, in the unit of the target; lower is better"),
    "r2": ("R²", "share of the target's variance explained"),
}
#: cost -> title
COSTS: dict[str, str] = {
    "params": "Parameters",
    "flops": "FLOPs per image",
    "size_bytes": "Size on\u00a0disk",
    "latency_ms_b1": "Latency, batch\u00a01",
    "latency_ms_b32": "Latency, batch\u00a032",
    "peak_memory_bytes": "Peak memory",
    "train_seconds": "Training time",
}
_SHARES = (
    "accuracy",
    "subset_accuracy",
    "label_accuracy",
    "macro_f1",
    "robust_accuracy",
    "selective_accuracy",
    "coverage",
)
MISSING = "–"


def is_share(measure: str) -> bool:
    """Whether a measure is written in per cent."""
    return measure.split("/", 1)[0] in _SHARES


def title(measure: str) -> str:
    """Name of a measure or cost in a heading: ``robust_accuracy/pgd`` is "Robust accuracy, pgd"."""
    head, _, tail = measure.partition("/")
    if measure in COSTS:
        return COSTS[measure]
    name = MEASURES[head][0] if head in MEASURES else head.replace("_", " ").capitalize()
    return f"{name}, {tail}" if tail else name


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with ``digits`` decimals, or significant digits when it is small or large.

    >>> number(0.0312), number(12345.6), number(None)
    ('0.031', '12,346', '–')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value and (abs(value) < 10.0 ** -(digits - 1) or abs(value) >= 1e7):
        return f"{value:.2g}".replace("-", "−")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.{digits}f}".replace("-", "−")


def shown(measure: str, value: float | None) -> str:
    """A measure's value: shares in per cent, the rest as numbers.

    >>> shown("accuracy", 0.9312), shown("ece", 0.0312)
    ('93.1 %', '0.031')
    """
    if value is None:
        return MISSING
    return f"{100 * value:.1f} %" if is_share(measure) else number(value)


def interval(measure: str, given: Interval | Comparison, signed: bool = False) -> str:
    """The interval's ends: ``92.0–94.1 %``; an empty string where there is none."""
    if given.low is None or given.high is None:
        return ""
    low, high = given.low, given.high
    if signed:
        return f"{difference(measure, low, unit=False)} to {difference(measure, high, unit=False)}"
    if is_share(measure):
        return f"{100 * low:.1f}–{100 * high:.1f} %"
    return f"{number(low)}–{number(high)}"


def difference(measure: str, value: float | None, unit: bool = True) -> str:
    """A signed difference; shares differ in percentage points.

    >>> difference("accuracy", -0.0123)
    '−1.2 points'
    """
    if value is None:
        return MISSING
    if is_share(measure):
        text = f"{100 * value:+.1f}"
        return (text + (" points" if unit else "")).replace("-", "−")
    size = number(abs(value))
    return ("−" if value < 0 else "+") + size


def p_value(p: float | None) -> str:
    """``p = 0.03`` or ``p < 0.001``."""
    if p is None:
        return MISSING
    return "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if p >= 0.095 else f"p = {p:.3f}"


def bytes_(value: float | None) -> str:
    """A number of bytes in the unit that suits it (1 kB = 1000 bytes)."""
    if value is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    raise AssertionError  # the loop always returns at GB


def count(value: float | None) -> str:
    """A large count with its suffix: ``5.72 M``."""
    if value is None:
        return MISSING
    for suffix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or suffix == "T":
            return f"{value:.0f}" if not suffix else f"{value:.3g} {suffix}"
        value /= 1000
    raise AssertionError  # the loop always returns at T


def seconds(value: float | None) -> str:
    """A duration: ``8.1 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if value is None:
        return MISSING
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def cost(name: str, given: Cost | float | None) -> str:
    """A cost in its unit, which its name says (``…_bytes``, ``…_ms…``, ``…_seconds``)."""
    value = given.value if isinstance(given, Cost) else given
    if value is None:
        return MISSING
    if name.endswith("_bytes"):
        return bytes_(value)
    if "_ms" in name:
        return f"{value:.3g} ms" if value < 1000 else f"{value:,.0f} ms"
    if name.endswith("_seconds"):
        return seconds(value)
    if name in ("params", "flops"):
        return count(value)
    return number(value)


def times(ratio: float | None) -> str:
    """``0.55×`` of the baseline."""
    return MISSING if ratio is None else f"{ratio:.2f}×" if ratio < 9.95 else f"{ratio:.0f}×"


def better(measure: str, a: float, b: float) -> bool:
    """Whether value ``a`` of the measure is better than ``b``."""
    return a < b if lower_is_better(measure) else a > b

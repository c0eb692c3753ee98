"""From what people write as labels to class numbers, label vectors or numbers to predict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from vitkit.errors import BadInput

Label = int | float | tuple[float, ...]


def natural(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Sort key that puts ``img2`` before ``img10`` and ignores case; equal ones fall back to the exact text.

    >>> sorted(["10", "2", "b", "A", "a1"], key=natural)
    ['2', '10', 'A', 'a1', 'b']
    """
    pieces = [p for p in re.split(r"(\d+)", text) if p]
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p.casefold()) for p in pieces], text


def class_names(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The distinct class names in natural order.

    Raises: BadInput for fewer than two.
    """
    classes = tuple(sorted(set(names), key=natural))
    if len(classes) < 2:
        raise BadInput(
            f"{where} has only one class ({classes[0]!r}), so there is nothing to tell apart. Add images of a second "
            'class, or give numbers as labels and task="regress".'
            if classes
            else f"{where} has no labelled images."
        )
    return classes


def numbers(values: Sequence[str], rows: Sequence[str], where: str) -> list[float]:
    """Texts as finite numbers.

    Raises: BadInput naming the first rows that are not.
    """
    out = [to_number(v) for v in values]
    bad = [f"{row} ({value!r})" for row, value, number in zip(rows, values, out) if not math.isfinite(number)]
    if bad:
        raise BadInput(f'{where}: task="regress" needs a number as label; it is none in {some(bad)}.')
    return out


def to_number(text: str) -> float:
    """The number a text says, NaN if it says none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def looks_continuous(values: Iterable[str]) -> bool:
    """True if all labels are numbers and some are not whole: a quantity, not a class."""
    parsed = [to_number(v) for v in values]
    return all(math.isfinite(v) for v in parsed) and any(v != round(v) for v in parsed)


def some(items: Sequence[str], limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    rest = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def as_regression(labels: Sequence[Label], classes: Sequence[str], where: str) -> list[float]:
    """Class numbers → the numbers that the class names say (a folder named ``12.5``)."""
    values = numbers(list(classes), [f"class {c!r}" for c in classes], where)
    return [values[int(label)] for label in labels]  # type: ignore[arg-type]

"""From what people write as labels to class numbers, label vectors or numbers to predict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from vitkit.errors import BadInput

Label = int | float | tuple[float, ...]

#: what becomes of images whose label is not known: left out, read as 0 or as 1 (0/1 labels), or −1 as a class
Unknown = Literal["skip", "absent", "present", "class"]

NOT_LABELLED = 'its label is −1, read as "not labelled"; unknown="class" (--unknown class) makes it a class'
_SAY = "(vitkit study: --unknown, or unknown in the data of the study file)"


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


def check_unknown(unknown: str | None) -> None:
    """Raises: BadInput for a word that is none of :data:`Unknown`."""
    if unknown is not None and unknown not in get_args(Unknown):
        raise BadInput(f"unknown={unknown!r} is not known; it is one of {', '.join(get_args(Unknown))}.")


def unlabelled(values: Iterable[float], unknown: Unknown | None, where: str) -> bool:
    """Whether −1 among class numbers says "not labelled": the others are 0 or more, and at least two.

    >>> unlabelled([0, 1, -1], None, "x"), unlabelled([-1, 1], None, "x"), unlabelled([-2, -1, 0, 1], None, "x")
    (True, False, False)

    Raises: BadInput if it does, and is to be read as 0 or 1.
    """
    rest = set(values)
    if unknown == "class" or -1 not in rest:
        return False
    rest.remove(-1)
    found = len(rest) > 1 and all(v >= 0 and v == round(v) for v in rest)
    if found and unknown in ("absent", "present"):
        raise BadInput(
            f'{where}: unknown={unknown!r} is for columns of 0 and 1; these labels are classes, of which −1 is "skip" '
            'or "class".'
        )
    return found


def settle(
    values: np.ndarray, unknown: Unknown | None, where: str, rows: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Labels of 0, 1 and −1 ("uncertain") with the −1 settled.

    Args:
        values: (N, K).
        unknown: "absent": 0, "present": 1, "skip": such images are left out.
        where, rows: what to call them in a message.

    Returns: (N, K), and (N,) True for images to leave out.

    Raises: BadInput if nothing was said about the −1.
    """
    uncertain = values == -1
    touched = uncertain.any(1)
    if not touched.any() or unknown == "skip":
        return values, touched
    if unknown not in ("absent", "present"):
        raise BadInput(
            f"{where}: {int(uncertain.sum())} labels are −1 ({some([rows[i] for i in np.flatnonzero(touched)], 3)}), "
            'where 0 and 1 say no and yes. unknown="absent" reads −1 as 0, unknown="present" as 1, unknown="skip" '
            f'leaves these images out {_SAY}; if they are quantities, use task="regress".'
        )
    return np.where(uncertain, float(unknown == "present"), values), np.zeros(len(values), bool)


def some(items: Sequence[str], limit: int = 5) -> str:
    """The first few of a list, and how many more there are."""
    rest = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest


def as_regression(labels: Sequence[Label], classes: Sequence[str], where: str) -> list[float]:
    """Class numbers → the numbers that the class names say (a folder named ``12.5``)."""
    values = numbers(list(classes), [f"class {c!r}" for c in classes], where)
    return [values[int(label)] for label in labels]  # type: ignore[arg-type]

"""The published shape of ``results.json``: what a study found, typed, so that nobody parses prose.

Every number that a resampling interval belongs to is an :class:`Interval`; every cost says whether it was
measured, counted or modelled. A value that does not exist (AUROC with one class in the test set) is an
explicit ``null`` with the reason in ``note``; ``NaN`` and ``Infinity`` never reach the file. A field that
does not apply to a recipe is absent.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from vitkit.errors import BadInput
from vitkit.files import atomic_write, write_text

#: measures where a smaller value is the better one
LOWER_IS_BETTER = frozenset({"nll", "ece", "aurc", "mae", "rmse"})


def lower_is_better(measure: str) -> bool:
    """Whether a smaller value of ``measure`` is better (``"ece/shifted"`` counts as ``"ece"``)."""
    return measure.split("/", 1)[0] in LOWER_IS_BETTER


def _plain(value: Any) -> Any:
    """Numpy and torch scalars become Python numbers; NaN and infinities become None."""
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _web_link(value: Any) -> Any:
    """A report must not carry ``javascript:`` or file links; only web addresses are links."""
    if value is None or (isinstance(value, str) and re.match(r"https?://[^\s\"'<>]+$", value)):
        return value
    raise ValueError(f"{value!r} is not a web address; it must start with https:// or http://")


def _embedded_image(value: Any) -> Any:
    if isinstance(value, str) and re.match(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=\s]+$", value):
        return value
    raise ValueError(
        f"{str(value)[:40]!r} is not an embedded image; it must start with data:image/png;base64, (or jpeg, webp)"
    )


Number = Annotated[float | None, BeforeValidator(_plain)]
Count = Annotated[int, BeforeValidator(_plain)]
WebLink = Annotated[str | None, BeforeValidator(_web_link)]
EmbeddedImage = Annotated[str, BeforeValidator(_embedded_image)]
How = Literal["measured", "counted", "modelled"]


class _Record(BaseModel):
    """Base of all records: unknown keys are errors, keys whose value is None are left out of the file."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())

    # fields whose null is a statement ("no interval exists"), so they stay in the file
    _stated: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _leave_out_what_does_not_apply(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if v is not None or k in self._stated}


class Interval(_Record):
    """A measured value with its confidence interval.

    Args:
        value: the point estimate (mean over seeds), or None where the measure is not defined.
        low: lower end of the confidence interval, None where resampling cannot give one (see ``note``).
        high: upper end.
        per_seed: the value of every seed (or fold), in order.
        note: why something is missing, or what is unusual about the value.
    """

    _stated = frozenset({"value", "low", "high"})

    value: Number = None
    low: Number = None
    high: Number = None
    per_seed: list[Number] | None = None
    note: str | None = None


class Comparison(_Record):
    """A recipe against the baseline on the same test images; ``difference`` is recipe minus baseline."""

    _stated = frozenset({"difference", "low", "high", "p", "p_holm"})

    measure: str = "accuracy"
    difference: Number = None
    low: Number = None
    high: Number = None
    p: Number = None
    p_holm: Number = None
    test: Literal["mcnemar", "paired bootstrap"]
    significant: bool = False
    note: str | None = None


class Cost(_Record):
    """What a recipe costs, and how that is known.

    Args:
        value: the cost in the unit its name says (median for latencies).
        how: ``measured`` on this machine, ``counted`` exactly, or ``modelled`` for hardware that is not here.
        engine: what ran it, for measured costs, e.g. ``"torch eager fp32"``.
        p95: 95th percentile, for latencies.
        ratio: this recipe divided by the baseline, timed alternately in one run where it is a latency.
    """

    _stated = frozenset({"value"})

    value: Number
    how: How
    engine: str | None = None
    p95: Number = None
    ratio: Number = None
    note: str | None = None


class Paper(_Record):
    """The publication behind a method."""

    name: str
    title: str
    id: str | None = None
    url: WebLink = None

    @model_validator(mode="after")
    def _link_to_arxiv(self) -> Paper:
        if self.url is None and self.id and re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?", self.id):
            # __dict__: assignment would validate again, and so call this function again
            self.__dict__["url"] = f"https://arxiv.org/abs/{self.id}"
        return self


class TrainPoint(_Record):
    """One epoch of one seed."""

    epoch: Annotated[float, BeforeValidator(_plain)]
    seed: Count = 0
    loss: Number = None
    val_loss: Number = None
    val_accuracy: Number = None
    val_measure: Number = None
    lr: Number = None


class ReliabilityBin(_Record):
    """Images whose top probability falls in one of the equal-width bins."""

    _stated = frozenset({"confidence", "accuracy"})

    confidence: Number
    accuracy: Number
    count: Count


class RejectionPoint(_Record):
    """Accuracy on the most confident share ``coverage`` of the images."""

    _stated = frozenset({"selective_accuracy"})

    coverage: Annotated[float, BeforeValidator(_plain)]
    selective_accuracy: Number


class RobustnessPoint(_Record):
    """Accuracy under an attack of strength ``epsilon_255`` (pixel values 0…255)."""

    _stated = frozenset({"accuracy"})

    attack: str
    epsilon_255: Number
    accuracy: Number
    low: Number = None
    high: Number = None


class Curves(_Record):
    """What the charts of a recipe are drawn from."""

    train: list[TrainPoint] | None = None
    reliability: list[ReliabilityBin] | None = None
    confusion: list[list[Count]] | None = None
    rejection: list[RejectionPoint] | None = None
    robustness: list[RobustnessPoint] | None = None

    @model_validator(mode="after")
    def _confusion_is_square(self) -> Curves:
        if self.confusion and any(len(row) != len(self.confusion) for row in self.confusion):
            raise ValueError("confusion must be square: rows are the true class, columns the predicted one")
        return self


class Faithfulness(_Record):
    """How much an explanation says about what the model really uses."""

    _stated = frozenset({"value"})

    explainer: str
    measure: str
    value: Number
    low: Number = None
    high: Number = None


class RecipeResult(_Record):
    """Everything the study found out about one recipe.

    ``same_model_as`` names the recipe whose very model this one uses, with other probes: their predictions are one.
    """

    _stated = frozenset({"versus_baseline"})

    name: str
    title: str | None = None
    baseline: bool = False
    same_model_as: str | None = None
    status: Literal["ok", "failed"] = "ok"
    error: str | None = None
    parts: dict[str, str] = Field(default_factory=dict)
    steps: list[str] = Field(default_factory=list)
    papers: list[Paper] = Field(default_factory=list)
    measures: dict[str, Interval] = Field(default_factory=dict)
    versus_baseline: Comparison | None = None
    costs: dict[str, Cost] = Field(default_factory=dict)
    curves: Curves = Field(default_factory=Curves)
    faithfulness: list[Faithfulness] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    model_dir: str | None = None

    def value(self, measure: str) -> float | None:
        """The point estimate of a measure, None if it was not taken or is not defined."""
        interval = self.measures.get(measure)
        return None if interval is None else interval.value

    def cost(self, name: str) -> float | None:
        """The value of a cost, None if it was not taken."""
        cost = self.costs.get(name)
        return None if cost is None else cost.value


class TeamResult(_Record):
    """Several recipes' predictions as one.

    ``combine`` is how, see :data:`vitkit.study.ensembles.COMBINERS`; ``best_member`` the one with the best accuracy on
    the validation part; ``gain`` the accuracy above it on the same test images.
    """

    members: list[str]
    combine: str
    accuracy: Interval
    best_member: str
    gain: Interval
    latency_ms_b1: Number = None


class Ensembles(_Record):
    """What the recipes answer together, and how differently: ``disagreement`` is the share of test images on which two
    of ``names`` differ, ``oracle`` the share that at least one gets right (mean over seeds)."""

    teams: list[TeamResult] = Field(default_factory=list)
    names: list[str] = Field(default_factory=list)
    disagreement: list[list[Number]] = Field(default_factory=list)
    oracle: Number = None


class EngineResult(_Record):
    """One engine that the winner was tried on.

    ``status`` and ``reason`` as in :class:`vitkit.deploy.tuner.Row`; ``ratio`` is images a second over those of eager
    float32 PyTorch, the two taking turns; ``drop`` are points of accuracy lost (without labels: expected to be).
    """

    engine: str
    precision: str
    merge: float = 0.0
    status: str
    reason: str | None = None
    images_per_s: Number = None
    ratio: Number = None
    ms: Number = None
    p95: Number = None
    batch: Count | None = None
    megabytes: Number = None
    drop: Interval | None = None
    agreement: Number = None


class Deployed(_Record):
    """The winner as an engine runs it.

    ``chosen`` is the place in ``engines``, ``folder`` the artefact beside the report; ``error`` says why there is none.
    """

    recipe: str
    folder: str | None = None
    chosen: Count | None = None
    reason: str | None = None
    error: str | None = None
    engines: list[EngineResult] = Field(default_factory=list)


class Skipped(_Record):
    """A file that could not be used, and why."""

    path: str
    reason: str


class Leak(_Record):
    """Two images in different splits whose perceptual hashes are at most ``distance`` bits apart."""

    first: str
    second: str
    splits: list[str] = Field(default_factory=list)
    distance: Number = None
    exact: bool | None = None


class DataReport(_Record):
    """What the checks before training found in the data; further keys are kept as they are."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    name: str
    fingerprint: str | None = None
    classes: list[str] = Field(default_factory=list)
    counts: dict[str, dict[str, Count]] = Field(default_factory=dict)
    skipped: list[Skipped] = Field(default_factory=list)
    leakage: list[Leak] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)

    def total(self, split: str) -> int | None:
        """Number of images in a split, None if the split does not exist."""
        return sum(self.counts[split].values()) if split in self.counts else None


class GalleryImage(_Record):
    """An image shown for every recipe."""

    key: str
    label: str | None = None
    png: EmbeddedImage


class Explanation(_Record):
    """Heat maps of one recipe by one explainer, in the order of the gallery's images."""

    recipe: str
    explainer: str
    predicted: list[str | None] = Field(default_factory=list)
    probability: list[Number] = Field(default_factory=list)
    heatmaps: list[EmbeddedImage | None] = Field(default_factory=list)


class Gallery(_Record):
    """The same images across recipes, side by side."""

    images: list[GalleryImage] = Field(default_factory=list)
    explanations: list[Explanation] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one_heatmap_per_image(self) -> Gallery:
        for e in self.explanations:
            for what in ("predicted", "probability", "heatmaps"):
                given = len(getattr(e, what))
                if given not in (0, len(self.images)):
                    raise ValueError(f"{e.explainer} of {e.recipe} has {given} {what} for {len(self.images)} images")
        return self


class StudyResult(_Record):
    """The whole study: the content of ``results.json``."""

    name: str
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    format: Literal[1] = 1
    task: str = "classify"
    primary: str | None = None
    data: DataReport
    settings: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    recipes: list[RecipeResult] = Field(default_factory=list)
    ensembles: Ensembles | None = None
    gallery: Gallery | None = None
    deployed: Deployed | None = None
    verdict: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names_are_unique(self) -> StudyResult:
        names = [r.name for r in self.recipes]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"recipe names must differ; given twice: {', '.join(twice)}")
        if sum(r.baseline for r in self.recipes) > 1:
            raise ValueError("only one recipe can be the baseline")
        return self

    @property
    def baseline(self) -> RecipeResult | None:
        """The recipe the others are compared with."""
        return next((r for r in self.recipes if r.baseline), None)

    @property
    def primary_measure(self) -> str:
        """The measure that ranks the recipes: ``primary``, else accuracy, else the first that was taken."""
        if self.primary:
            return self.primary
        taken = [m for r in self.recipes if r.status == "ok" for m in r.measures]
        return next((m for m in ("accuracy", "mae", "rmse") if m in taken), taken[0] if taken else "accuracy")

    def ranked(self) -> list[RecipeResult]:
        """Recipes that finished, best first; those without the primary measure come last."""
        measure = self.primary_measure
        sign = 1.0 if lower_is_better(measure) else -1.0
        done = [r for r in self.recipes if r.status == "ok"]
        return sorted(done, key=lambda r: math.inf if (v := r.value(measure)) is None else sign * v)


def finite(value: Any) -> Any:
    """A copy of plain data in which every NaN and infinity is None, so that the JSON is valid."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return _plain(value)


def to_json(result: StudyResult) -> str:
    """The text of ``results.json``."""
    return json.dumps(finite(result.model_dump(mode="json")), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(result: StudyResult, path: str | os.PathLike[str]) -> None:
    """Write ``results.json`` in one step: a reader never sees half of it."""
    write_text(path, to_json(result))


def read_json(path: str | os.PathLike[str]) -> StudyResult:
    """Read a ``results.json``.

    Raises:
        BadInput: the file is not valid JSON or not of this shape; the message names the first wrong key.
    """
    try:
        return StudyResult.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "the file"
        raise BadInput(f"{path} is not a study result: {where}: {first['msg']}.") from error


def schema() -> dict[str, Any]:
    """JSON Schema of ``results.json``, the same as the published ``docs/results.schema.json``."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **StudyResult.model_json_schema(mode="validation"),
        "title": "vitkit study results",
    }


def csv_rows(result: StudyResult) -> list[dict[str, Any]]:
    """One flat row per recipe, finished ones best first, failed ones last."""
    recipes = result.ranked() + [r for r in result.recipes if r.status != "ok"]
    measures = _in_order(m for r in recipes for m in r.measures)
    costs = _in_order(c for r in recipes for c in r.costs)
    rows = []
    for r in recipes:
        row: dict[str, Any] = {
            "recipe": r.name,
            "title": r.title,
            "baseline": r.baseline,
            "status": r.status,
            "error": r.error,
        }
        for m in measures:
            interval = r.measures.get(m, Interval())
            row |= {m: interval.value, f"{m}_low": interval.low, f"{m}_high": interval.high}
        for field in ("difference", "low", "high", "p", "p_holm", "test", "significant"):
            row[f"versus_baseline_{field}"] = getattr(r.versus_baseline, field, None)
        for c in costs:
            cost = r.costs.get(c)
            row[c] = getattr(cost, "value", None)
            if c.startswith("latency"):
                row |= {f"{c}_p95": getattr(cost, "p95", None), f"{c}_ratio": getattr(cost, "ratio", None)}
            row[f"{c}_how"] = getattr(cost, "how", None)
        row["model_dir"] = r.model_dir
        rows.append(row)
    return rows


def write_csv(result: StudyResult, path: str | os.PathLike[str]) -> None:
    """Write ``results.csv``: one row per recipe, a column per measure with its ``_low`` and ``_high``."""
    rows = csv_rows(result)
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]) if rows else ["recipe"])
        writer.writeheader()
        writer.writerows(rows)


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1, ensure_ascii=False))

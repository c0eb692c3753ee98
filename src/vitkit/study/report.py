"""The report of a study: one HTML file that works offline, on a phone, on paper and for a screen reader."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitkit.files import write_text
from vitkit.study import charts, wording
from vitkit.study.results import (
    Comparison,
    Cost,
    Explanation,
    Gallery,
    Interval,
    RecipeResult,
    StudyResult,
    finite,
    lower_is_better,
)
from vitkit.study.verdict import verdict

_ASSETS = Path(__file__).parent / "report_assets"
#: characters of embedded images above which the gallery is made smaller; the whole page stays under 3 MB
_GALLERY_BUDGET = 1_500_000
#: classes above which a confusion matrix per recipe would be an unreadable square
_MAX_CONFUSION_CLASSES = 200
_SMALL_TEST = 100


@dataclass(frozen=True)
class Cell:
    """A table cell: what is written, what is written small below it, and what it is sorted by."""

    text: str
    sub: Sequence[str] = ()
    sort: float | str | None = None
    kind: str = ""
    range: dict[str, float | None] | None = None


@dataclass(frozen=True)
class Head:
    """A column heading."""

    title: str
    about: str = ""
    how: str = ""


@dataclass(frozen=True)
class Row:
    """A table row of one recipe."""

    name: str
    cells: Sequence[Cell]
    title: str | None = None
    baseline: bool = False


@dataclass(frozen=True)
class Picture:
    """An embedded image of the gallery with what is written under it."""

    png: str | None
    alt: str = ""
    text: str = ""
    wrong: bool = False
    tiny: bool = False


@dataclass(frozen=True)
class GalleryRow:
    """The heat maps of one recipe by one explainer."""

    recipe: str
    explainer: str
    cells: Sequence[Picture] = field(default_factory=list)


def write_report(result: StudyResult, path: str | os.PathLike[str]) -> None:
    """Write ``report.html`` in one step; nothing it needs lies outside of it."""
    write_text(path, render(result))


def render(result: StudyResult) -> str:
    """The report as the text of one HTML page.

    Everything a user or a data set named is escaped; a content security policy in the page forbids every
    script but its own and every request to the network.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**_page(result)).lstrip()


def _page(result: StudyResult) -> dict[str, Any]:
    look = charts.looks(result)
    script = (_ASSETS / "sort.js").read_text(encoding="utf-8")
    css = (_ASSETS / "report.css").read_text(encoding="utf-8")
    css = css.replace("/*LIGHT*/", charts.css_colours(dark=False)).replace("/*DARK*/", charts.css_colours(dark=True))
    ranked, measure = result.ranked(), result.primary_measure
    done = [r for r in result.recipes if r.status == "ok"]
    # what depends on predictions alone is shown once a model
    models = [r for r in ranked if r.same_model_as is None]
    page: dict[str, Any] = {
        "result": result,
        "created": _date(result),
        "css": css,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "verdict": result.verdict or verdict(result),
        "colour": {name: charts.variable(style.colour) for name, style in look.items()},
        "legend_items": [
            {"name": n, "colour": charts.variable(style.colour), "dash": _svg_dash(style.dash)}
            for n, style in ((r.name, look[r.name]) for r in ranked)
        ],
        "primary_title": wording.title(measure) if measure.isupper() else wording.title(measure).lower(),
        "primary_lower": lower_is_better(measure),
        "level": _level(result),
        "board_header": _board_header(result),
        "board": [_board_row(result, r) for r in ranked],
        "failed": [r for r in result.recipes if r.status == "failed"],
        "remarks": _remarks(result),
        "num_seeds": _num_seeds(result),
        "trade_offs": _present(charts.trade_off(result, c, look) for c in ("latency_ms_b1", "size_bytes")),
        "reliability": _present(charts.reliability(r, look) for r in models),
        "rejection": charts.rejection(result, look),
        "confusion": _confusions(result, models, look),
        "robustness": charts.robustness(result, look),
        "training": charts.training(result, look),
        "gallery": _gallery(result),
        "command": str(result.settings.get("command") or "vitkit study study.yaml"),
        "settings_text": _settings_text(result),
        "data_extra": _plain_items(result.data.model_extra or {}),
        "machine": _plain_items(result.machine),
        "method": _method(result),
    }
    page |= _ensemble_tables(result) | _engine_table(result)
    page |= _cost_table(ranked) | _measure_table(ranked) | _faithfulness_table(result) | _class_table(result)
    page["facts"] = _facts(result, done)
    page["sections"] = _sections(page)
    return page


def _sections(page: dict[str, Any]) -> list[tuple[str, str]]:
    wanted = (
        ("leaderboard", "Leaderboard", True),
        ("costs", "Cost", page["trade_offs"] or page["cost_rows"]),
        ("measures", "Measures", page["measure_rows"]),
        ("ensembles", "Ensembles", page["team_rows"]),
        ("deployed", "Exported", page["deployed"]),
        ("calibration", "Calibration", page["reliability"]),
        ("rejection", "Doubtful images", page["rejection"]),
        ("confusion", "Confusion", page["confusion"]),
        ("gallery", "Explanations", page["gallery"]),
        ("faithfulness", "Faithfulness", page["faithfulness_rows"]),
        ("robustness", "Robustness", page["robustness"]),
        ("training", "Training", page["training"]),
        ("recipes", "Recipes", True),
        ("data", "Data", True),
        ("reproduce", "Reproduce", True),
        ("method", "Method", True),
    )
    return [(key, label) for key, label, there in wanted if there]


def _present(found: Iterable[charts.Chart | None]) -> list[charts.Chart]:
    return [c for c in found if c is not None]


def _date(result: StudyResult) -> str:
    when = result.created
    return f"{when.day} {when.strftime('%B %Y, %H:%M')} {when.tzname() or ''}".strip()


def _level(result: StudyResult) -> str:
    given = result.settings.get("level", 0.95)
    return f"{100 * given:g} %" if isinstance(given, (int, float)) else "95 %"


def _num_seeds(result: StudyResult) -> int:
    counts = [
        len(i.per_seed) for r in result.recipes for i in r.measures.values() if i.per_seed and i.value is not None
    ]
    return max(counts, default=1)


def _svg_dash(dash: Any) -> str:
    return "" if isinstance(dash, str) else " ".join(f"{2 * d:g}" for d in dash[1])


def _facts(result: StudyResult, done: Sequence[RecipeResult]) -> list[tuple[str, str]]:
    facts = [("recipes" if len(done) != 1 else "recipe", str(len(done)))]
    if failed := len(result.recipes) - len(done):
        facts.append(("failed", str(failed)))
    if result.data.classes and result.task == "classify":
        facts.append(("classes", str(len(result.data.classes))))
    facts += [(f"{split} images", f"{result.data.total(split):,}") for split in result.data.counts]
    if (seeds := _num_seeds(result)) > 1:
        facts.append(("seeds", str(seeds)))
    return facts


def _remarks(result: StudyResult) -> list[str]:
    """What the study decided by itself, and what the reader must know before trusting a rank."""
    given = result.settings.get("notes") or []
    remarks = [str(n) for n in (given if isinstance(given, list) else [given])]
    total = result.data.total("test")
    if total is not None and total < _SMALL_TEST:
        remarks.append(
            f"The test set has only {total} images: one image more or less is {100 / max(total, 1):.1f} points "
            "of accuracy, and only large differences can be told from chance. Cross-validation (--folds) uses "
            "all images."
        )
    shared: dict[str, list[str]] = {}
    for r in result.ranked():
        if r.same_model_as is not None:
            shared.setdefault(r.same_model_as, []).append(r.name)
    for model, others in shared.items():
        names = " and ".join([", ".join(others[:-1]), others[-1]] if len(others) > 1 else others)
        remarks.append(
            f"{names} {'look' if len(others) > 1 else 'looks'} at the very model of {model}; what depends on its "
            f"predictions alone is shown once, under {model}."
        )
    return remarks


# ---- leaderboard and tables


def _board_columns(result: StudyResult) -> list[str]:
    """Further measures and costs shown next to the primary one."""
    taken = {m for r in result.recipes for m in r.measures} | {c for r in result.recipes for c in r.costs}
    wanted = ["macro_f1", "rmse", "r2", "ece", "latency_ms_b1", "size_bytes"]
    return [c for c in wanted if c in taken and c != result.primary_measure]


def _about(measure: str) -> str:
    text = wording.MEASURES.get(measure.split("/", 1)[0], ("", ""))[1]
    return text[:1].upper() + text[1:]


def _board_header(result: StudyResult) -> list[Head]:
    heads = [Head("Recipe"), Head(wording.title(result.primary_measure), _about(result.primary_measure))]
    if result.baseline is not None:
        heads.append(Head("Against baseline", "Difference from the baseline on the same test images"))
    return heads + [Head(wording.title(c), _about(c)) for c in _board_columns(result)]


def _board_row(result: StudyResult, r: RecipeResult) -> Row:
    measure = result.primary_measure
    value = _measure_cell(measure, r.measures.get(measure))
    cells = [Cell(value.text, value.sub, value.sort, "", _range(result, r))]
    if result.baseline is not None:
        cells.append(_versus_cell(r, measure))
    for column in _board_columns(result):
        if column in wording.COSTS:
            cells.append(_cost_cell(column, r.costs.get(column), short=True))
        else:
            cells.append(_measure_cell(column, r.measures.get(column)))
    return Row(r.name, cells, r.title, r.baseline)


def _measure_cell(measure: str, interval: Interval | None) -> Cell:
    if interval is None or interval.value is None:
        return Cell(wording.MISSING)
    ends = wording.interval(measure, interval)
    return Cell(wording.shown(measure, interval.value), [ends] if ends else ["no interval"], interval.value)


def _versus_cell(r: RecipeResult, measure: str) -> Cell:
    versus: Comparison | None = r.versus_baseline
    if r.baseline or versus is None or versus.difference is None:
        return Cell(wording.MISSING, sort=0.0 if r.baseline else None)
    good = wording.better(versus.measure, versus.difference, 0.0)
    p = versus.p_holm if versus.p_holm is not None else versus.p
    if versus.significant:
        told, kind = ("better", "good") if good else ("worse", "bad")
    else:
        told, kind = "no clear difference", ""
    ends = wording.interval(versus.measure, versus, signed=True)
    sub = [ends] if ends else []
    if versus.measure != measure:
        sub.append(f"of {wording.title(versus.measure).lower()}")
    sub.append(f"{told}, {wording.p_value(p)}" if p is not None else "not tested")
    return Cell(wording.difference(versus.measure, versus.difference), sub, versus.difference, kind)


def _range(result: StudyResult, r: RecipeResult, width: float = 130.0) -> dict[str, float | None] | None:
    """Positions of value and interval in the small plot; all rows share one scale."""
    measure = result.primary_measure
    given = [i for x in result.ranked() if (i := x.measures.get(measure)) and i.value is not None]
    interval = r.measures.get(measure)
    ends = [e for i in given for e in (i.low, i.value, i.high) if e is not None]
    if interval is None or interval.value is None or len(given) < 2 or max(ends) == min(ends):
        return None
    low, span, pad = min(ends), max(ends) - min(ends), 5.0

    def place(value: float | None) -> float | None:
        return None if value is None else round(pad + (width - 2 * pad) * (value - low) / span, 1)

    base = result.baseline.value(measure) if result.baseline else None
    return {
        "value": place(interval.value),
        "low": place(interval.low) if interval.high is not None else None,
        "high": place(interval.high),
        "base": place(base),
    }


def _cost_cell(name: str, cost: Cost | None, told: Collection[str | None] = (), short: bool = False) -> Cell:
    """A cost with its ratio; in full also its 95th percentile, and engine and note unless they are ``told``."""
    if cost is None or cost.value is None:
        return Cell(wording.MISSING)
    sub = []
    if cost.ratio is not None:
        sub.append(wording.times(cost.ratio) + ("" if short else " baseline"))
    if not short:
        if cost.p95 is not None:
            sub.append(f"p95 {wording.cost(name, cost.p95)}")
        sub += [text for text in (cost.engine, cost.note) if text and text not in told]
    return Cell(wording.cost(name, cost), sub, cost.value)


def _in_order(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """Known names in their usual order, then the others as they come."""
    taken = list(dict.fromkeys(names))
    usual = [k for k in known if k in taken]
    return usual + [n for n in taken if n not in usual]


def _cost_table(recipes: Sequence[RecipeResult]) -> dict[str, Any]:
    names = _in_order((c for r in recipes for c in r.costs), wording.COSTS)
    header, notes = [], []
    told: dict[str, list[str | None]] = {}
    for name in names:
        given = [r.costs[name] for r in recipes if name in r.costs]
        # what holds for the whole column is said once, not in every cell
        engine, note = (_only({getattr(c, what) for c in given}) for what in ("engine", "note"))
        told[name] = [engine, note]
        ways = sorted({c.how for c in given})
        header.append(Head(wording.title(name), how=", ".join([*ways, *filter(None, [engine])])))
        if note:
            notes.append(f"{wording.title(name)}: {note}.")
    rows = [Row(r.name, [_cost_cell(c, r.costs.get(c), told[c]) for c in names], baseline=r.baseline) for r in recipes]
    return {"cost_header": header, "cost_rows": rows if names else [], "cost_notes": notes}


def _only(values: set[str | None]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def _measure_table(recipes: Sequence[RecipeResult]) -> dict[str, Any]:
    names = _in_order((m for r in recipes for m in r.measures), wording.MEASURES)
    rows = [Row(r.name, [_measure_cell(m, r.measures.get(m)) for m in names], baseline=r.baseline) for r in recipes]
    told: dict[str, list[str]] = {}
    for r in recipes:
        for m, interval in r.measures.items():
            if interval.note:
                told.setdefault(f"{wording.title(m)}: {interval.note}", []).append(r.name)
    notes = [f"{text}" + ("." if len(who) == len(recipes) else f" ({', '.join(who)}).") for text, who in told.items()]
    return {
        "measure_header": [Head(wording.title(m), _about(m)) for m in names],
        "measure_rows": rows if names else [],
        "measure_notes": notes,
    }


def _ensemble_tables(result: StudyResult) -> dict[str, Any]:
    """Teams of recipes, and how often two recipes answer differently."""
    found = result.ensembles
    if found is None:
        return {"team_rows": [], "apart_header": [], "apart_rows": [], "oracle": ""}
    everybody = len(found.names)
    rows = []
    for team in found.teams:
        name = f"all {everybody}" if len(team.members) == everybody else " + ".join(team.members)
        milliseconds = "–" if team.latency_ms_b1 is None else f"{team.latency_ms_b1:.3g} ms"
        cells = [
            Cell(team.combine),
            _measure_cell("accuracy", team.accuracy),
            _gain_cell(team.gain, team.best_member),
            Cell(milliseconds, sort=team.latency_ms_b1),
        ]
        rows.append(Row(name, cells))
    apart = [
        Row(name, [Cell("" if i == j else f"{100 * (value or 0):.1f} %") for j, value in enumerate(values)])
        for i, (name, values) in enumerate(zip(found.names, found.disagreement))
    ]
    oracle = "" if found.oracle is None else f"{100 * found.oracle:.1f} %"
    return {"team_rows": rows, "apart_header": found.names, "apart_rows": apart, "oracle": oracle}


#: engines in the order of their status, then of their speed
_STATUS = ("ok", "slower", "too much lost", "failed", "not installed", "not tried")


def _engine_table(result: StudyResult) -> dict[str, Any]:
    """The engines that the winner was tried on."""
    found = result.deployed
    if found is None:
        return {"deployed": None, "engine_rows": []}
    chosen = found.engines[found.chosen] if found.chosen is not None else None
    rows = []
    for e in sorted(found.engines, key=lambda e: (_STATUS.index(e.status), -(e.images_per_s or 0))):
        name = f"{e.engine} {e.precision}".strip() + (f", {100 * e.merge:g} % merged" if e.merge else "")
        note = "chosen" if e is chosen else e.status + (f": {e.reason}" if e.reason else "")
        drop, ends = e.drop or Interval(), ""
        if drop.low is not None and drop.high is not None:
            ends = f"{drop.low:+.1f} to {drop.high:+.1f}".replace("-", "−")
        cells = [
            _number_cell(e.images_per_s, "{:.0f}", [f"batch {e.batch}"] if e.batch else []),
            _number_cell(e.ratio, "{:.2f}×"),
            _number_cell(e.ms, "{:.3g} ms", [f"p95 {e.p95:.3g} ms"] if e.p95 is not None else []),
            _number_cell(e.megabytes, "{:.2f} MB"),
            _number_cell(drop.value, "{:+.1f}", [ends] if ends else []),
            _number_cell(None if e.agreement is None else 100 * e.agreement, "{:.1f} %"),
            Cell(note, kind="good" if e is chosen else ""),
        ]
        rows.append(Row(name, cells, baseline=e is chosen))
    return {"deployed": found, "engine_rows": rows}


def _number_cell(value: float | None, form: str, sub: Sequence[str] = ()) -> Cell:
    if value is None:
        return Cell(wording.MISSING)
    return Cell(form.format(value).replace("-", "−"), sub, value)


def _gain_cell(gain: Interval, best: str) -> Cell:
    if gain.value is None:
        return Cell("–")
    sub = []
    if gain.low is not None and gain.high is not None:
        sub.append(f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}".replace("-", "−"))
    return Cell(f"{100 * gain.value:+.1f} points".replace("-", "−"), sub=[*sub, f"over {best}"], sort=gain.value)


def _faithfulness_table(result: StudyResult) -> dict[str, Any]:
    ranked = result.ranked()
    names = list(dict.fromkeys(f.measure for r in ranked for f in r.faithfulness))
    of_model = {r.name: {f.explainer for f in r.faithfulness} for r in ranked}
    rows = []
    for r in ranked:
        told = of_model.get(r.same_model_as or "", set())
        explainers = [e for e in dict.fromkeys(f.explainer for f in r.faithfulness) if e not in told]
        for n, explainer in enumerate(explainers):
            found = {f.measure: f for f in r.faithfulness if f.explainer == explainer}
            cells = []
            for f in map(found.get, names):
                there = f is not None and f.low is not None and f.high is not None
                ends = f"{wording.number(f.low)} to {wording.number(f.high)}" if f and there else ""
                cells.append(Cell(wording.number(f.value if f else None), [ends] if ends else []))
            span = len(explainers) if n == 0 else 0
            rows.append({"recipe": r.name, "explainer": explainer, "cells": cells, "span": span})
    return {"faithfulness_header": [wording.title(n) for n in names], "faithfulness_rows": rows}


def _class_table(result: StudyResult) -> dict[str, Any]:
    counts = result.data.counts
    classes = result.data.classes or list(dict.fromkeys(c for split in counts.values() for c in split))
    rows = [[c, *(f"{counts[s].get(c, 0):,}" for s in counts)] for c in classes]
    totals = [f"{sum(counts[s].values()):,}" for s in counts]
    return {"splits": list(counts), "class_rows": rows if counts else [], "class_totals": totals}


def _confusions(
    result: StudyResult, ranked: Sequence[RecipeResult], look: dict[str, charts.Look]
) -> list[charts.Chart]:
    few = [r for r in ranked if r.curves.confusion and len(r.curves.confusion) <= _MAX_CONFUSION_CLASSES]
    return _present(charts.confusion(r, result.data.classes, look) for r in few)


# ---- settings, machine, method


def _settings_text(result: StudyResult) -> str:
    import yaml

    rest = {k: v for k, v in finite(result.settings).items() if k not in ("command", "notes")}
    return str(yaml.safe_dump(rest, sort_keys=False, allow_unicode=True, width=100)) if rest else ""


def _plain_items(given: dict[str, Any]) -> list[tuple[str, str]]:
    """What can be said in one line; nested tables stay in results.json."""
    items = []
    for k, v in given.items():
        if isinstance(v, (list, tuple)) and v and all(isinstance(x, (str, int, float)) for x in v):
            v = ", ".join(map(str, v[:12])) + (" …" if len(v) > 12 else "")
        if v is None or isinstance(v, (dict, list, tuple)):
            continue
        key = str(k)
        shown = wording.bytes_(float(v)) if key.endswith("_bytes") and isinstance(v, (int, float)) else str(v)
        items.append((key.removesuffix("_bytes").replace("_", " ").capitalize(), shown))
    return items


def _method(result: StudyResult) -> list[tuple[str, str]]:
    seeds = _num_seeds(result)
    tests = {r.versus_baseline.test for r in result.recipes if r.versus_baseline}
    told = [
        (
            "Intervals",
            f"{_level(result)} bootstrap intervals: test images "
            + ("and seeds are" if seeds > 1 else "are")
            + " drawn with replacement, the same images for every recipe. They say how far the value would move with "
            + ("other test images and seeds." if seeds > 1 else "other test images; seeds were not varied.")
            + (" With fewer than five seeds the spread between seeds is only roughly known." if 1 < seeds < 5 else ""),
        )
    ]
    if "mcnemar" in tests:
        told.append(("Difference", "Exact McNemar test on the images that only one of the two recipes answers right."))
    if "paired bootstrap" in tests:
        told.append(("Difference", "Paired bootstrap of the differences over test images and seeds."))
    if tests:
        told.append(
            (
                "Significant",
                "p below 0.05 after Holm's correction for the number of recipes. "
                "“No clear difference” is not proof that two recipes are equal.",
            )
        )
    told += [
        (
            "Measured",
            "Timed or weighed on the machine above, on the engine named. Latencies are medians, timed in turn with "
            "the baseline so that both meet the same disturbances.",
        ),
        ("Counted", "Exact for the model: parameters, floating-point operations, bytes of the weights file."),
        ("Modelled", "Calculated for hardware that was not there; nothing on this page is, unless it says so."),
        (
            "Calibration",
            "Expected calibration error over 15 equal-width bins. It is biased upward on few images, for all "
            "recipes alike.",
        ),
    ]
    return told


# ---- gallery


def _gallery(result: StudyResult) -> dict[str, Any] | None:
    if result.gallery is None or not result.gallery.images:
        return None
    gallery = _fit(result.gallery)
    images = [{"key": i.key, "label": i.label, "png": i.png, "tiny": _is_tiny(i.png)} for i in gallery.images]
    rank = {r.name: n for n, r in enumerate(result.ranked())}
    model = {r.name: r.same_model_as for r in result.recipes}
    given = {(e.recipe, e.explainer) for e in gallery.explanations}
    rows = []
    for e in sorted(gallery.explanations, key=lambda e: rank.get(e.recipe, len(rank))):
        if (model.get(e.recipe), e.explainer) in given:
            continue
        rows.append(GalleryRow(e.recipe, e.explainer, [_picture(gallery, e, k) for k in range(len(images))]))
    known = {r.name for r in result.recipes}
    return {"images": images, "rows": [r for r in rows if r.recipe in known]}


def _picture(gallery: Gallery, e: Explanation, k: int) -> Picture:
    image = gallery.images[k]
    png = e.heatmaps[k] if e.heatmaps else None
    predicted = e.predicted[k] if e.predicted else None
    probability = e.probability[k] if e.probability else None
    wrong = predicted is not None and image.label is not None and predicted != image.label
    text = ""
    if predicted is not None:
        text = ("✗ " if wrong else "") + predicted
        text += f" {100 * probability:.0f} %" if probability is not None else ""
    alt = f"{e.explainer} map of {e.recipe} for test image {image.key}"
    return Picture(png, alt, text, wrong, _is_tiny(png))


def _is_tiny(uri: str | None) -> bool:
    """Images of few pixels are shown with sharp pixels, not smeared."""
    if not uri or not uri.startswith("data:image/png"):
        return False
    try:
        head = base64.b64decode(uri.split(",", 1)[1][:64])
    except binascii.Error:
        return False
    return len(head) >= 24 and int.from_bytes(head[16:20], "big") < 64


def _fit(gallery: Gallery) -> Gallery:
    """The gallery as given if it is small; otherwise with its images scaled down until the page is."""
    maps = [h for e in gallery.explanations for h in e.heatmaps if h]
    if sum(map(len, [*maps, *(i.png for i in gallery.images)])) <= _GALLERY_BUDGET:
        return gallery
    smaller = gallery
    for side, quality in ((208, 80), (160, 75), (112, 70), (80, 60), (48, 50)):
        smaller = gallery.model_copy(
            update={
                "images": [i.model_copy(update={"png": _shrunk(i.png, side, quality)}) for i in gallery.images],
                "explanations": [
                    e.model_copy(update={"heatmaps": [h and _shrunk(h, side, quality) for h in e.heatmaps]})
                    for e in gallery.explanations
                ],
            }
        )
        maps = [h for e in smaller.explanations for h in e.heatmaps if h]
        if sum(map(len, [*maps, *(i.png for i in smaller.images)])) <= _GALLERY_BUDGET:
            break
    return smaller


def _shrunk(uri: str, side: int, quality: int) -> str:
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))) as image:
        image.thumbnail((side, side))
        stream = io.BytesIO()
        image.convert("RGB").save(stream, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()

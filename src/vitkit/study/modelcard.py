"""The model card that lies beside an exported model: what it is, what it was measured on, where it ends."""

from __future__ import annotations

import re

from vitkit.study import wording
from vitkit.study.results import Interval, RecipeResult, StudyResult

_FEW = 30


def model_card(recipe: RecipeResult, result: StudyResult) -> str:
    """Markdown for ``models/<recipe>/README.md``.

    Args:
        recipe: a recipe that finished.
        result: the study it is from.

    Returns: a card with origin, data, measures with intervals, costs, limits, papers and how to use the model.
    """
    parts = [
        _front_matter(recipe, result),
        f"# {_text(recipe.title or recipe.name)}\n",
        f"Recipe `{recipe.name}` of the vitkit study “{_text(result.name)}”, {result.created.date().isoformat()}.\n",
        _what_it_is(recipe),
        _data(result),
        _measures(recipe, result),
        _costs(recipe),
        _limits(recipe, result),
        _use(recipe, result),
        _papers(recipe),
    ]
    return "\n".join(p for p in parts if p).rstrip() + "\n"


def _text(given: str) -> str:
    """Text that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", given.replace("\n", " "))


def _front_matter(recipe: RecipeResult, result: StudyResult) -> str:
    tags = ["vision-transformer", "image-classification" if result.task == "classify" else result.task]
    lines = ["---", "library_name: vitkit", "tags:", *(f"- {t}" for t in tags)]
    papers = [p.id for p in recipe.papers if p.id and p.url and "arxiv.org" in p.url]
    return "\n".join([*lines, *(f"- arxiv:{p}" for p in papers), "---", ""])


def _what_it_is(recipe: RecipeResult) -> str:
    lines = ["## What it is\n"]
    lines += [f"{i}. {_text(step)}" for i, step in enumerate(recipe.steps, start=1)]
    if recipe.parts:
        lines.append("\nParts: " + ", ".join(f"{_text(s)} = {_text(n)}" for s, n in recipe.parts.items()) + ".")
    lines += [f"\n{_text(n)}" for n in recipe.notes]
    return "\n".join(lines) + "\n" if len(lines) > 1 else ""


def _data(result: StudyResult) -> str:
    data = result.data
    lines = ["## Data\n", f"{_text(data.name)}" + (f" (fingerprint `{data.fingerprint}`)" if data.fingerprint else "")]
    if data.counts:
        lines[-1] += ": " + ", ".join(f"{data.total(s):,} {s} images" for s in data.counts)
    lines[-1] += "."
    if data.classes and len(data.classes) <= 50:
        lines.append("\nClasses: " + ", ".join(map(_text, data.classes)) + ".")
    elif data.classes:
        lines.append(f"\n{len(data.classes)} classes; their names are in `config.json`.")
    return "\n".join(lines) + "\n"


def _measures(recipe: RecipeResult, result: StudyResult) -> str:
    if not recipe.measures:
        return ""
    lines = ["## Measured on the test images\n", "| Measure | Value | 95 % interval |", "|---|---|---|"]
    for name, interval in recipe.measures.items():
        ends = wording.interval(name, interval) or _text(interval.note or "–")
        lines.append(f"| {_text(wording.title(name))} | {wording.shown(name, interval.value)} | {ends} |")
    if (versus := recipe.versus_baseline) and result.baseline and versus.difference is not None:
        p = versus.p_holm if versus.p_holm is not None else versus.p
        told = "significant" if versus.significant else "not significant"
        lines.append(
            f"\nAgainst the baseline `{result.baseline.name}`: "
            f"{wording.difference(versus.measure, versus.difference)} of {wording.title(versus.measure)} "
            f"({told}, {wording.p_value(p)}, {versus.test})."
        )
    return "\n".join(lines) + "\n"


def _costs(recipe: RecipeResult) -> str:
    if not recipe.costs:
        return ""
    lines = ["## Costs\n", "| Cost | Value | How |", "|---|---|---|"]
    for name, cost in recipe.costs.items():
        how = cost.how + (f", {_text(cost.engine)}" if cost.engine else "")
        lines.append(f"| {_text(wording.title(name))} | {wording.cost(name, cost)} | {how} |")
    return "\n".join(lines) + "\n"


def _limits(recipe: RecipeResult, result: StudyResult) -> str:
    data = result.data
    lines = [
        "## Limits\n",
        "- The figures hold for images like the test images above. Other cameras, sites, populations or times "
        "were not tested.",
        "- It answers with one of its classes for every image, also for one that shows none of them."
        if result.task == "classify"
        else "- It gives a number for every image, also for one unlike those it was trained on.",
    ]
    tests = data.counts.get("test", {})
    few = [c for c, n in tests.items() if n < _FEW]
    if few:
        named = ", ".join(map(_text, few[:8])) + (" …" if len(few) > 8 else "")
        lines.append(f"- Fewer than {_FEW} test images in {named}: what is said of them is uncertain.")
    if data.leakage:
        lines.append(
            f"- {len(data.leakage)} pairs of identical or near-identical images lie in different splits, so the "
            "figures may be too good."
        )
    lines += [f"- {_text(w)}" for w in data.warnings]
    ece: Interval | None = recipe.measures.get("ece")
    if ece is not None and ece.value is not None and ece.value > 0.05:
        lines.append(
            f"- Its probabilities are off by {100 * ece.value:.0f} points on average (ECE); "
            "calibrate them before acting on them."
        )
    if any(m.startswith("robust_accuracy/") for m in recipe.measures):
        lines.append("- Robustness was measured only under the attacks listed above.")
    else:
        lines.append("- Robustness against manipulated images was not measured.")
    lines.append("- Nothing here replaces a validation for medical, legal or safety-critical use.")
    return "\n".join(lines) + "\n"


def _use(recipe: RecipeResult, result: StudyResult) -> str:
    folder = recipe.model_dir or f"models/{recipe.name}"
    versions = ", ".join(f"{k} {v}" for k, v in result.versions.items())
    lines = ["## Use\n", "```", f"vitkit predict {folder} IMAGES", "```\n"]
    lines.append("Weights are safetensors; `config.json` holds the architecture, the classes and the preprocessing.")
    if versions:
        lines.append(f"\nMade with {versions}.")
    return "\n".join(lines) + "\n"


def _papers(recipe: RecipeResult) -> str:
    if not recipe.papers:
        return ""
    lines = ["## Papers\n"]
    for p in recipe.papers:
        title = f"[{_text(p.title)}]({p.url})" if p.url else _text(p.title)
        lines.append(f"- {_text(p.name)}: {title}")
    return "\n".join(lines) + "\n"

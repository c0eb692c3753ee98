"""Two sentences that say what a study found, no more than its data allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vitkit.study import wording
from vitkit.study.results import Comparison, RecipeResult, StudyResult


def verdict(result: StudyResult) -> list[str]:
    """Who won, by how much and whether that is more than noise; then what it costs.

    A recipe *wins* only if its difference from the baseline is significant after Holm's correction. Otherwise
    the sentence says that no difference can be told from noise. The second sentence names the fastest and the
    smallest recipe among those whose value lies inside the interval of the best.

    Returns: two sentences.
    """
    ranked = [r for r in result.ranked() if r.value(result.primary_measure) is not None]
    if not ranked:
        return _nothing_finished(result)
    return [_who(result, ranked), _at_what_cost(result, ranked)]


def deployed_verdict(result: StudyResult) -> list[str]:
    """How much faster the winner runs on the engine it was exported to; nothing if it was not."""
    found = result.deployed
    if found is None:
        return []
    if found.chosen is None:
        return [f"{found.recipe} was not exported: {(found.error or 'no reason given').rstrip('.')}."]
    row = found.engines[found.chosen]
    merged = f" with {100 * row.merge:g} % of its tokens merged" if row.merge else ""
    drop = row.drop.value if row.drop else None
    lost = "" if drop is None else f", {abs(drop):.1f} points {'lost' if drop >= 0 else 'gained'}"
    engine = f"{row.engine} {row.precision}{merged}"
    return [f"Exported to {engine}, {found.recipe} runs {row.ratio or 1:.1f}× as fast as in eager PyTorch{lost}."]


def _nothing_finished(result: StudyResult) -> list[str]:
    failed = [r for r in result.recipes if r.status == "failed"]
    if failed:
        return [
            f"None of the {len(result.recipes)} recipes finished, so there is nothing to compare.",
            f"The first failure was {failed[0].name}: {(failed[0].error or 'no reason given').rstrip('.')}.",
        ]
    return ["No recipe has been measured yet.", "Run the study to fill this page."]


def _value(result: StudyResult, r: RecipeResult) -> str:
    measure = result.primary_measure
    interval = r.measures[measure]
    ends = wording.interval(measure, interval)
    return wording.shown(measure, interval.value) + (f" ({ends})" if ends else "")


def _noun(result: StudyResult) -> str:
    return _name(result.primary_measure)


def _name(measure: str) -> str:
    name = wording.title(measure)
    return name if name.isupper() or name == "R²" else name[0].lower() + name[1:]


def _who(result: StudyResult, ranked: Sequence[RecipeResult]) -> str:
    noun = _noun(result)
    best, baseline = ranked[0], result.baseline
    if len(ranked) == 1:
        num_failed = len(result.recipes) - 1
        rest = f"; the other {num_failed} failed" if num_failed else ""
        return f"Only {best.name} was measured, with {noun} {_value(result, best)}, so nothing is compared{rest}."
    if baseline is None or baseline not in ranked:
        why = "there is no baseline" if baseline is None else f"the baseline {baseline.name} failed"
        second = ranked[1]
        return (
            f"{best.name} has the best {noun}, {_value(result, best)}, before {second.name} with "
            f"{_value(result, second)}, but {why}, so no difference was tested."
        )
    rivals = [r for r in ranked if not r.baseline]
    worse = _significant(result, rivals, better=False)
    if best.baseline:
        told = _worse_than(worse, len(rivals))
        return f"No recipe beats the baseline {baseline.name}, which has {noun} {_value(result, best)}{told}."
    versus = best.versus_baseline
    if versus is None or versus.p is None:
        return (
            f"{best.name} has the best {noun}, {_value(result, best)}, against {_value(result, baseline)} of the "
            f"baseline {baseline.name}, but the difference was not tested."
        )
    ends = wording.interval(versus.measure, versus, signed=True)
    by = wording.difference(versus.measure, versus.difference) + (f" ({ends})" if ends else "")
    by += "" if versus.measure == result.primary_measure else f" of {_name(versus.measure)}"
    p = wording.p_value(versus.p_holm if versus.p_holm is not None else versus.p)
    if versus.significant:
        winners = _significant(result, rivals, better=True)
        others = [r.name for r in winners if r is not best]
        too = ""
        if others:
            too = f"; {_listed(others)} {'is' if len(others) == 1 else 'are'} significantly better than it too"
        same = versus.measure == result.primary_measure
        told = "is" if same else f"is the best, and its {_name(versus.measure)} is"
        return (
            f"{best.name} wins: its {noun} of {_value(result, best)} {told} {_apart(versus)} the baseline "
            f"{baseline.name}, significant after Holm's correction ({p}){too}."
        )
    if winners := _significant(result, rivals, better=True):
        first = winners[0]
        return (
            f"{best.name} has the best {noun}, {_value(result, best)}, without being significantly better than "
            f"the baseline {baseline.name} ({p} after Holm's correction), while {first.name} with "
            f"{_value(result, first)} is."
        )
    told = _worse_than(worse, len(rivals))
    return (
        f"No recipe is reliably better than the baseline {baseline.name} ({noun} {_value(result, baseline)}): the "
        f"best, {best.name}, differs by {by}, which may be chance ({p} after Holm's correction){told}."
    )


def _apart(versus: Comparison) -> str:
    """``10.7 points (7.3 to 14.0) above``."""
    sign = 1.0 if (versus.difference or 0.0) >= 0 else -1.0
    turned = [None if v is None else sign * v for v in (versus.difference, versus.low, versus.high)]
    size = wording.difference(versus.measure, turned[0]).lstrip("+")
    ends = ""
    if turned[1] is not None and turned[2] is not None:
        low, high = sorted((turned[1], turned[2]))
        ends = " to ".join(wording.difference(versus.measure, v, unit=False).lstrip("+") for v in (low, high))
    return f"{size}{f' ({ends})' if ends else ''} {'above' if sign > 0 else 'below'}"


def _significant(result: StudyResult, recipes: Sequence[RecipeResult], better: bool) -> list[RecipeResult]:
    found = []
    for r in recipes:
        v = r.versus_baseline
        if v is None or not v.significant or v.difference is None:
            continue
        if wording.better(v.measure, v.difference, 0.0) == better:
            found.append(r)
    return found


def _worse_than(worse: Sequence[RecipeResult], num_rivals: int) -> str:
    if not worse:
        return "; none is significantly worse either" if num_rivals > 1 else ""
    if len(worse) == num_rivals:
        return "; the other is significantly worse" if num_rivals == 1 else "; all others are significantly worse"
    if len(worse) <= 3:
        return f"; {_listed([r.name for r in worse])} {'is' if len(worse) == 1 else 'are'} significantly worse"
    return f"; {len(worse)} of the {num_rivals} others are significantly worse"


def _at_what_cost(result: StudyResult, ranked: Sequence[RecipeResult]) -> str:
    best, baseline = ranked[0], result.baseline
    interval = best.measures[result.primary_measure]
    within = [best]
    if interval.low is not None and interval.high is not None:
        within += [r for r in ranked[1:] if interval.low <= (r.value(result.primary_measure) or 0.0) <= interval.high]
    compared = baseline if baseline is not None and baseline in ranked else None
    own = _costs(best, compared)
    if not own:
        return "Latency and size were not measured, so nothing can be said about costs."
    sentence = f"{best.name} {own}"
    if len(within) == 1:
        return sentence + (
            f", and no other recipe's {_noun(result)} lies within its interval." if len(ranked) > 1 else "."
        )
    fastest = _least(within, lambda r: r.cost("latency_ms_b1") or r.cost("latency_ms_b32"))
    smallest = _least(within, lambda r: r.cost("size_bytes"))
    picks = [(w, r) for w, r in (("fastest", fastest), ("smallest", smallest)) if r is not None]
    same = len({r.name for _, r in picks}) == 1
    where = f"of the {len(within)} recipes whose {_noun(result)} lies within its interval"
    if same and picks[0][1] is best:
        return f"{sentence}, and is the {' and '.join(w for w, _ in picks)} {where}."
    if same:
        words, pick = " and ".join(w for w, _ in picks), picks[0][1]
        return f"{sentence}; {where}, the {words} is {pick.name}, which {_costs(pick, compared)}."
    told = []
    for word, r in picks:
        told.append(f"the {word} is {r.name} itself" if r is best else f"the {word} is {_told(r, compared)}")
    return f"{sentence}; {where}, {' and '.join(told)}."


def _told(r: RecipeResult, baseline: RecipeResult | None) -> str:
    return r.name if r is baseline else f"{r.name}, which {_costs(r, baseline)}"


def _least(recipes: Sequence[RecipeResult], cost: Callable[[RecipeResult], float | None]) -> RecipeResult | None:
    known = [(c, i) for i, r in enumerate(recipes) if (c := cost(r)) is not None]
    return recipes[min(known)[1]] if known else None


def _costs(r: RecipeResult, baseline: RecipeResult | None) -> str:
    """``takes 0.55× the time of vit (1.2 ms per image) and 0.25× the bytes (2.1 MB)``."""
    told = []
    other = baseline if r is not baseline else None
    for name, unit in (("latency_ms_b1", "per image"), ("latency_ms_b32", "for 32 images")):
        if (given := r.costs.get(name)) and given.value is not None:
            much = f"{wording.cost(name, given)} {unit}"
            told.append(_relative(much, given.ratio or _ratio(r, other, name), other, "time", "as long"))
            break
    if (size := r.costs.get("size_bytes")) and size.value is not None:
        much = f"{wording.cost('size_bytes', size)} on disk"
        told.append(_relative(much, size.ratio or _ratio(r, other, "size_bytes"), other, "bytes", "as many bytes"))
    if len(told) == 2 and other is not None:
        told[1] = told[1].replace(f" of {other.name} (", " (").replace(f" as {other.name} (", " (")
    return "takes " + " and ".join(told) if told else ""


def _relative(much: str, ratio: float | None, baseline: RecipeResult | None, what: str, same: str) -> str:
    if baseline is None or ratio is None:
        return much
    if 0.97 <= ratio <= 1.03:
        return f"{same} as {baseline.name} ({much})"
    return f"{wording.times(ratio)} the {what} of {baseline.name} ({much})"


def _ratio(r: RecipeResult, baseline: RecipeResult | None, name: str) -> float | None:
    mine, theirs = r.cost(name), baseline.cost(name) if baseline else None
    return mine / theirs if mine is not None and theirs else None


def _listed(names: Sequence[str]) -> str:
    if len(names) > 3:
        return f"{len(names)} others"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]

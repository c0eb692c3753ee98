"""Run a study: plan the stages, run what is missing, summarise, write the report."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import traceback
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import yaml

from vitkit.errors import VitkitError
from vitkit.files import write_text
from vitkit.study.handover import check_engines, deploy_winner
from vitkit.study.live import Live
from vitkit.study.plan import DataFacts, Plan, Stage, data_stage, make_plan
from vitkit.study.recipe import resolve_recipes
from vitkit.study.results import StudyResult, read_json, write_csv, write_json
from vitkit.study.settings import Recipe, StudySettings
from vitkit.study.stages import open_data, read_facts, run_stage
from vitkit.study.store import Store, disk_errors
from vitkit.study.submit import check_place, executor

# the rest of a budget goes to attacks, explanations, timing and the report
TRAIN_SHARE = 0.6


def run_study(
    settings: StudySettings,
    out: str | Path,
    on: str = "here",
    command: str = "",
    live: Live | None = None,
) -> StudyResult:
    """Run (or go on with) a study in the folder ``out`` and write everything it produces there.

    Args:
        settings: what to compare, on what, how.
        out: holds stages, database, results and report; the same folder resumes.
        on: "here" (this process) or "ray".
        command: shown in the report to reproduce the study.
        live: progress display; None is silent.

    Returns: the result also written as ``results.json``.

    Raises:
        VitkitError: bad settings or data, the folder is in use, or no recipe finished.
    """
    check_place(on)
    recipes = resolve_recipes(settings)
    check_engines(settings)
    view = live or Live(None)
    with disk_errors(out), Store(out) as store, view:
        study = {"data": settings.data.model_dump(mode="json"), "protocol": settings.protocol.model_dump(mode="json")}
        facts = _prepare_data(settings, store, study, view)
        notes: list[str] = []
        epochs = _decide_epochs(settings, recipes, store, facts, study, notes, view)
        plan = make_plan(settings, recipes, facts, epochs)
        for entry in plan.recipes:
            entry.chain = [k for k, s in plan.stages.items() if entry.recipe.name in s.recipes and s.kind in _MAKING]
        failures = _run_all(plan, store, study, on, view)
        if len(failures) == len(recipes):
            raise VitkitError("No recipe finished. " + " · ".join(f"{n}: {e}" for n, e in failures.items()))
        view.say("summarising")
        result = summarise_and_write(settings, store, plan, facts, failures, command, notes, view)
    return result


_MAKING = ("pretrain", "train", "transform")
_MADE_FROM = "made_from.txt"


def summarise_and_write(
    settings: StudySettings,
    store: Store,
    plan: Plan,
    facts: DataFacts,
    failures: dict[str, str],
    command: str,
    notes: list[str],
    view: Live,
) -> StudyResult:
    """Write results.json, results.csv, study.yaml, models/ and report.html; each appears whole or not at all.

    Where nothing changed since they were written, they are left and read back.
    """
    root = store.root
    made_from = _made_from(settings, store, plan, failures, command, notes)
    if (known := _already_written(root, made_from)) is not None:
        return known
    from vitkit.study.report import write_report
    from vitkit.study.summary import summarise
    from vitkit.study.verdict import deployed_verdict

    (root / _MADE_FROM).unlink(missing_ok=True)
    result = summarise(settings, store, plan, facts, failures, command, notes)
    _export_models(result, plan, store)
    if settings.deploy is not None:
        result.deployed = deploy_winner(result, settings, store, facts, view)
        result.verdict = [*result.verdict, *deployed_verdict(result)]
    write_json(result, root / "results.json")
    write_csv(result, root / "results.csv")
    resolved = settings.model_dump(mode="json", by_alias=True, exclude_none=True)
    resolved["recipes"] = [
        r.model_dump(mode="json", by_alias=True, exclude_none=True) for r in (e.recipe for e in plan.recipes)
    ]
    write_text(root / "study.yaml", yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    store.save_results([(r.name, m, i.value, i.low, i.high) for r in result.recipes for m, i in r.measures.items()])
    write_report(result, root / "report.html")
    write_text(root / _MADE_FROM, made_from)
    return result


def _made_from(
    settings: StudySettings, store: Store, plan: Plan, failures: dict[str, str], command: str, notes: list[str]
) -> str:
    """Digest of everything the written files depend on: stages, settings, versions, and the code that writes them."""
    from vitkit.study.summary import machine, versions

    package = Path(__file__).parent
    code = sorted(f for f in [*package.rglob("*"), package.parent / "catalogue" / "papers.toml"] if f.is_file())
    parts = [
        settings.model_dump_json(by_alias=True),
        json.dumps([[s.key, store.has(s.key)] for s in plan.stages.values()]),
        json.dumps([plan.epochs, plan.costs, failures, command, notes, versions(), machine()], default=str),
        *(hashlib.sha256(f.read_bytes()).hexdigest() for f in code if f.suffix != ".pyc"),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _already_written(root: Path, made_from: str) -> StudyResult | None:
    """The result of an earlier call with the same digest, if all its files are still there."""
    note = root / _MADE_FROM
    if not note.is_file() or note.read_text(encoding="utf-8") != made_from:
        return None
    if not all((root / name).is_file() for name in ("results.csv", "study.yaml", "report.html")):
        return None
    try:
        result = read_json(root / "results.json")
    except (OSError, VitkitError):
        return None
    models = [r.model_dir for r in result.recipes if r.status == "ok" and r.model_dir]
    needed = [root / m / "model.safetensors" for m in models]
    if result.deployed is not None and result.deployed.folder:
        needed.append(root / result.deployed.folder / "manifest.json")
    return result if all(path.is_file() for path in needed) else None


def _prepare_data(settings: StudySettings, store: Store, study: dict[str, Any], view: Live) -> DataFacts:
    view.say(f"reading {settings.data.path}")
    source = open_data(settings.data, store.root, view.report)
    stage = data_stage(settings, source.fingerprint)
    if not store.has(stage.key):
        with view.stage(stage, 0, 1) as report:
            run_stage(str(store.root), stage, study, report)
        store.finished(stage.key)
    return read_facts(store.folder(stage.key))


def _decide_epochs(
    settings: StudySettings,
    recipes: list[Recipe],
    store: Store,
    facts: DataFacts,
    study: dict[str, Any],
    notes: list[str],
    view: Live,
) -> int:
    """Cut the epochs of all recipes evenly so that the study fits its budget.

    The decision is measured once and kept in the folder, since a resumed study must not decide anew.
    """
    wanted, budget = settings.protocol.epochs, settings.protocol.budget_seconds
    if budget is None:
        return wanted
    plan = make_plan(settings, recipes, facts, wanted)
    path = store.root / "epochs.json"
    names = sorted(r.name for r in recipes)
    question = {"epochs": wanted, "budget": budget, "recipes": names, "data": facts.key}
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    decision = next((d for d in known if d["question"] == question), None)
    if decision is None:
        view.say("measuring the training speed for the budget")
        per_epoch = _seconds_per_epoch(plan, store, study, facts)
        epochs = max(1, min(wanted, int(TRAIN_SHARE * budget / max(per_epoch, 1e-9))))
        decision = {"question": question, "epochs": epochs, "seconds_per_epoch": per_epoch}
        write_text(path, json.dumps([*known, decision], indent=1))
    if decision["epochs"] < wanted:
        notes.append(
            f"The budget of {budget:g} s cut training from {wanted} to {decision['epochs']} epochs, for all alike "
            f"(one epoch of all recipes takes {decision['seconds_per_epoch']:.1f} s here)."
        )
    return decision["epochs"]


def _seconds_per_epoch(plan: Plan, store: Store, study: dict[str, Any], facts: DataFacts) -> float:
    """One epoch of every distinct training stage, extrapolated from a few steps each."""
    from vitkit.study.stages import time_training

    timed: dict[str, float] = {}
    total = 0.0
    for stage in plan.stages.values():
        if stage.kind in ("train", "pretrain"):
            # seeds and folds of one recipe take the same time
            model = json.dumps(
                [
                    stage.settings["config"]["base"],
                    stage.settings["config"]["parts"],
                    stage.settings.get("optimizer"),
                    stage.settings.get("method"),
                ],
                default=str,
            )
            if model not in timed:
                try:
                    timed[model] = time_training(str(store.root), stage, study)
                except Exception:
                    # a recipe that cannot be built fails in its own stage, with its own message
                    timed[model] = 0.0
            total += timed[model]
    return total


def _run_all(plan: Plan, store: Store, study: dict[str, Any], on: str, view: Live) -> dict[str, str]:
    """Run every missing stage; a failure stops the recipes that need it and no others."""
    failures: dict[str, str] = {}
    broken: set[str] = set()
    waiting = {k: s for k, s in plan.stages.items() if not store.has(k)}
    view.plan(plan, sum(store.has(k) for k in plan.stages))
    if not waiting:
        return failures
    pool = executor(on)
    running: dict[Future[Any], Stage] = {}
    try:
        while waiting or running:
            _drop_unreachable(waiting, broken)
            for key, stage in list(waiting.items()):
                if len(running) < pool.parallel and _ready(stage, store, broken):
                    del waiting[key]
                    stage = _without_broken(stage, broken, plan)
                    running[_submit(pool, on, store, stage, study, view)] = stage
            if not running:
                if waiting:
                    raise VitkitError(f"The stages {[s.title for s in waiting.values()]} wait for each other.")
                break
            pool.wait_any(list(running))
            for future in [f for f in running if f.done()]:
                stage = running.pop(future)
                error = future.exception()
                if error is None:
                    store.finished(stage.key)
                    view.finished(stage, store)
                else:
                    broken.add(stage.key)
                    _note_failure(stage, error, store, failures, view)
    finally:
        pool.close()
    return failures


def _drop_unreachable(waiting: dict[str, Stage], broken: set[str]) -> None:
    """Forget the stages that need a broken one; the costs are taken as long as one model is left."""
    changed = True
    while changed:
        lost = [key for key, stage in waiting.items() if _unreachable(stage, broken)]
        for key in lost:
            broken.add(key)
            del waiting[key]
        changed = bool(lost)


def _unreachable(stage: Stage, broken: set[str]) -> bool:
    if stage.kind == "costs":
        # its first need is the data, the others are the models
        return all(need in broken for need in stage.needs[1:])
    return any(need in broken for need in stage.needs)


def _ready(stage: Stage, store: Store, broken: set[str]) -> bool:
    return all(store.has(need) or (stage.kind == "costs" and need in broken) for need in stage.needs)


def _without_broken(stage: Stage, broken: set[str], plan: Plan) -> Stage:
    """The costs of the recipes that did finish."""
    if stage.kind != "costs" or not any(n in broken for n in stage.needs):
        return stage
    models = {n: k for n, k in stage.settings["models"].items() if k not in broken}
    smaller = Stage(
        "costs", stage.title, {**stage.settings, "models": models}, tuple(n for n in stage.needs if n not in broken)
    )
    plan.costs = smaller.key
    return smaller


def _submit(pool: Any, on: str, store: Store, stage: Stage, study: dict[str, Any], view: Live) -> Future[Any]:
    if on == "here":
        with view.stage(stage) as report:
            return pool.submit(run_stage, str(store.root.resolve()), stage, study, report)
    view.started(stage)
    return pool.submit(run_stage, str(store.root.resolve()), stage, study)


def _note_failure(stage: Stage, error: BaseException, store: Store, failures: dict[str, str], view: Live) -> None:
    cause = getattr(error, "cause", None) or error
    text = str(cause) if isinstance(cause, VitkitError) else f"{type(cause).__name__}: {cause}"
    reason = f"{stage.title}: {text}"
    log = store.root / "logs" / f"{stage.key}.txt"
    write_text(log, "".join(traceback.format_exception(error)))
    store.failed(stage.key, stage.kind, stage.title, text)
    # a probe that fails costs its figures, not the recipe
    names = stage.recipes if stage.kind in (*_MAKING, "predict") else []
    for name in names:
        failures.setdefault(name, reason)
    view.failed(stage, reason)


def _export_models(result: StudyResult, plan: Plan, store: Store) -> None:
    """``models/<recipe>/``: weights, config, preprocessing and model card of the first fold and seed."""
    from vitkit.study.modelcard import model_card
    from vitkit.study.summary import folder_name

    entries = {e.recipe.name: e for e in plan.recipes}
    for row in result.recipes:
        if row.status != "ok":
            continue
        entry = entries[row.name]
        target = store.root / "models" / folder_name(row.name)
        source = store.folder(entry.final[min(entry.final)])
        temporary = target.parent / f".{target.name}.{time.time_ns()}"
        temporary.mkdir(parents=True)
        for name in ("model.safetensors", "config.json"):
            shutil.copy2(source / name, temporary / name)
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        preprocessing = {k: config[k] for k in ("image_size", "in_chans", "wide", "value_range", "mean", "std")}
        write_text(temporary / "preprocessing.json", json.dumps({"pixels": "0 to 1", **preprocessing}, indent=1))
        write_text(temporary / "README.md", model_card(row, result))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)

"""``vitkit study``: the main job."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

DEFAULT_RECIPES = "vit,token-graying,loope,sinkhorn,dct-attention,zsharp,tome,gptaq-w4,gmar"

_HELP_RECIPES = (
    "Comma-separated: vit (the baseline), a method, a timm model, slot=method, a+b, method:option=value, gptaq-w4a8."
)


def study(
    data: Annotated[
        str, typer.Argument(help="digits, a folder, zip, table or array file, or a study.yaml.")
    ] = "digits",
    recipes: Annotated[str | None, typer.Option("--recipes", "-r", help=_HELP_RECIPES)] = None,
    base: Annotated[str | None, typer.Option(help="A timm name: the network under the recipes.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the study; the same one resumes.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time for everything, e.g. 6m; cuts epochs evenly.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of training per recipe (default 30).")] = None,
    folds: Annotated[int | None, typer.Option(min=2, help="Cross-validation instead of one split.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Repetitions with other seeds (default 1).")] = None,
    seed: Annotated[int | None, typer.Option(help="First seed, also of the split (default 0).")] = None,
    task: Annotated[str | None, typer.Option(help="classify, multilabel or regress (default: found out).")] = None,
    unknown: Annotated[
        str | None, typer.Option(help="Images whose label is empty or -1: skip, absent, present or class.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side in pixels (default: the images' own).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step (default: 16 to 64).")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate (default 1e-3).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most this many training images.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="GPUs (processes) a training uses (default 1).")] = None,
    ensembles: Annotated[
        str | None, typer.Option(help="Also combine the recipes' predictions: mean, greedy, stacking … (with commas).")
    ] = None,
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Also export the winner to the fastest engine that answers like it.")
    ] = False,
    on: Annotated[str, typer.Option("--on", help="Where stages run: here or ray.")] = "here",
    resume: Annotated[bool, typer.Option("--resume/--restart", help="Go on with --out, or begin it anew.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the final table only.")] = False,
) -> None:
    """Compare recipes on your images under one protocol and write a report.

    Results, models and the report go to --out (default: studies/<name of the data>); running the same command again
    goes on where it stopped and reuses what is done.
    """
    from vitkit.cli.console import console
    from vitkit.errors import BadInput
    from vitkit.study.live import Live
    from vitkit.study.run import run_study
    from vitkit.study.settings import make_settings, read_study
    from vitkit.study.store import Store

    flags: dict[str, Any] = {
        "data": {"task": task, "unknown": unknown, "image_size": image_size, "limit": limit},
        "protocol": {
            "budget": budget,
            "epochs": epochs,
            "folds": folds,
            "seeds": seeds,
            "seed": seed,
            "batch_size": batch_size,
            "lr": lr,
            "devices": devices,
        },
        "measures": {"ensembles": None if ensembles is None else [e.strip() for e in ensembles.split(",")]},
    }
    flags = {room: {k: v for k, v in values.items() if v is not None} for room, values in flags.items()}
    if data.endswith((".yaml", ".yml")):
        raw = read_study(data).model_dump(mode="json", by_alias=True, exclude_unset=True)
        if isinstance(raw.get("data"), str):
            raw["data"] = {"path": raw["data"]}
    else:
        raw = {"name": Path(data).stem or "study", "data": {"path": data}}
        recipes = recipes or DEFAULT_RECIPES
    if base is not None:
        raw["base"] = base
    if deploy:
        raw["deploy"] = raw.get("deploy") or True
    if recipes is not None:
        # a comma inside brackets belongs to a list: kan:grid_range=[-2,2]
        raw["recipes"] = [r.strip() for r in re.split(r",(?![^\[]*\])", recipes) if r.strip()]
    for room, values in flags.items():
        raw[room] = {**raw.get(room, {}), **values}
    settings = make_settings(raw, "the command line" if not data.endswith((".yaml", ".yml")) else data)
    folder = out or Path("studies") / settings.name
    if not resume and folder.exists():
        import shutil

        if not (folder / "study.db").exists():
            raise BadInput(f"{folder} is not a study's folder (it has no study.db), so --restart will not delete it.")
        # the lock tells a study that is running there, whose results must not vanish under it
        with Store(folder):
            shutil.rmtree(folder)
    screen = console()
    command = "vitkit " + shlex.join(sys.argv[1:]) if sys.argv else "vitkit study"
    result = run_study(settings, folder, on=on, command=command, live=Live(None if quiet else screen))
    screen.print(_table(result))
    for sentence in result.verdict:
        screen.print(sentence)
    # what was left out decides what the figures mean
    for warning in (w for w in result.data.warnings if "skipped" in w):
        screen.print(warning)
    failed = [r for r in result.recipes if r.status == "failed"]
    for row in failed:
        screen.print(f"[red]failed[/red] {row.name}: {row.error}")
    screen.print(f"\nreport: {folder / 'report.html'}")
    if result.deployed is not None and result.deployed.folder:
        screen.print(f"serve the winner: vitkit serve {folder / result.deployed.folder}")


def _table(result: Any) -> Any:
    from vitkit.cli.console import table

    columns = {
        "classify": ("accuracy", "nll", "ece"),
        "multilabel": ("macro_f1", "auroc", "ece"),
        "regress": ("mae", "rmse", "r2"),
    }[result.task]
    rows = table(
        "recipe", *columns, "vs baseline", "p (Holm)", "ms (batch 1)", "params", "MB",
        right=(*columns, "vs baseline", "p (Holm)", "ms (batch 1)", "params", "MB"),
    )  # fmt: skip
    for r in result.ranked():
        values = [_interval(r.measures.get(c), first=i == 0) for i, c in enumerate(columns)]
        versus, p = "", ""
        if r.baseline:
            versus = "baseline"
        elif r.versus_baseline is not None and r.versus_baseline.difference is not None:
            versus = f"{r.versus_baseline.difference:+.3f}"
            p = "" if r.versus_baseline.p_holm is None else f"{r.versus_baseline.p_holm:.3f}"
        ms, params, size = r.cost("latency_ms_b1"), r.cost("params"), r.cost("size_bytes")
        rows.add_row(
            r.name,
            *values,
            versus,
            p,
            "" if ms is None else f"{ms:.2f}",
            "" if params is None else f"{params / 1e6:.2f} M",
            "" if size is None else f"{size / 1e6:.2f}",
        )
    return rows


def _interval(value: Any, first: bool) -> str:
    if value is None or value.value is None:
        return "–"
    if first and value.low is not None:
        return f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}]"
    return f"{value.value:.3f}"

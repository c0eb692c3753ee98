"""``vitkit deploy``: from a trained model to the fastest engine that still answers like it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from vitkit.deploy.tuner import Deployment, Row


def deploy(
    model: Annotated[Path, typer.Argument(help="Folder of a model, or of a study (its best model).")],
    data: Annotated[
        str | None, typer.Option(help="Images to calibrate and compare with (default: those of the study).")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write (default: deployed/<model>).")
    ] = None,
    max_drop: Annotated[float, typer.Option(min=0, help="Points of accuracy that may be lost.")] = 1.0,
    budget: Annotated[str, typer.Option(help="Time for everything, e.g. 3m.")] = "3m",
    batch: Annotated[str, typer.Option(help="Images at a time; several with commas, the best is kept.")] = "8",
    engines: Annotated[str | None, typer.Option(help="Only these, with commas; list shows them.")] = None,
    precisions: Annotated[str | None, typer.Option(help="Only these, with commas, e.g. f32,bf16.")] = None,
    merge: Annotated[str, typer.Option(help="Shares of patch tokens to merge away, e.g. 0.2,0.4.")] = "",
    bake: Annotated[
        bool,
        typer.Option("--bake", help="Put resizing into the engine's file, which then takes pixels of any size."),
    ] = False,
    free_size: Annotated[
        bool, typer.Option("--free-size", help="Make an engine that takes images of other sizes, too.")
    ] = False,
    limit: Annotated[int, typer.Option(min=8, help="Most images to compare on.")] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Export a model to the engines of this machine, measure them side by side, keep the fastest faithful one.

    Use the folder it writes with `vitkit serve FOLDER`, or vitkit.deploy.load(FOLDER) in Python. It needs PyTorch only
    if one of PyTorch's own engines won.
    """
    from vitkit.errors import BadInput

    if engines == "list":
        _list_engines(as_json)
        return
    batches = _numbers(batch, int, "--batch")
    shares = _numbers(merge, float, "--merge")
    if not batches or min(batches) < 1:
        raise BadInput(f"--batch {batch} must be positive whole numbers, such as 8 or 1,8,32.")
    if any(not 0 < share < 1 for share in shares):
        raise BadInput(f"--merge {merge} must be shares between 0 and 1, such as 0.3.")
    from vitkit.cli.console import console, print_json
    from vitkit.cli.find_model import find_model
    from vitkit.deploy.images import read_images
    from vitkit.deploy.tuner import deploy as tune
    from vitkit.models.io import load_model
    from vitkit.study.handover import study_images
    from vitkit.study.settings import parse_duration

    seconds = parse_duration(budget)
    folder = find_model(model)
    network, config = load_model(folder)
    target = out or Path("deployed") / folder.name
    with _Progress(quiet=as_json) as progress:
        progress("reading images", 0, 1)
        images = read_images(data, config, limit) if data else study_images(folder.parent.parent, config, limit)
        if images is None:
            raise BadInput(f"{folder} is not the model of a study whose images are still there; give some with --data.")
        result = tune(
            network,
            images.held,
            images.held_labels,
            calibration=images.calibration,
            calibration_labels=images.calibration_labels,
            out=target,
            max_drop=max_drop,
            budget=seconds,
            batches=batches,
            engines=_names(engines),
            precisions=_names(precisions),
            merge=shares,
            bake=bake,
            free_size=free_size,
            config=config,
            name=folder.name,
            progress=progress,
        )
    if as_json:
        print_json(_as_json(result))
        return
    printer = console()
    printer.print(_table(result))
    printer.print(f"\n{result.reason}", markup=False)
    if result.interrupted:
        printer.print("Interrupted: this is the best of what was measured so far.")
    known = ", measured before" if result.cached else ""
    printer.print(
        f"{result.folder} ({result.seconds:.0f} s{known}). Try it: vitkit serve {result.folder}", markup=False
    )


def _numbers(text: str, kind: type, option: str) -> tuple[Any, ...]:
    from vitkit.errors import BadInput

    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise BadInput(f"{option} {text} must be numbers with commas between them.") from error


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


class _Progress:
    """Rich's bar with the time left, on a terminal."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=quiet,
        )

    def __enter__(self) -> _Progress:
        self.bar.start()
        self.task = self.bar.add_task("starting", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self.bar.update(self.task, description=what, completed=done, total=total)


def _list_engines(as_json: bool) -> None:
    from vitkit.cli.console import console, print_json, table
    from vitkit.deploy.engines import ENGINES, engine

    rows = []
    for name in ENGINES:
        module = engine(name)
        missing = module.unavailable()
        rows.append({"engine": name, "precisions": [] if missing else list(module.precisions()), "missing": missing})
    if as_json:
        print_json(rows)
        return
    out = table("engine", "precisions", "missing", wrap="missing")
    for row in rows:
        out.add_row(str(row["engine"]), ", ".join(row["precisions"]), str(row["missing"]))
    console().print(out)


def _table(result: Deployment) -> Any:
    from rich.text import Text

    from vitkit.cli.console import table

    out = table(
        "engine", "img/s", "×eager", "ms", "p95", "MB", "points lost", "same answer", "", wrap="",
        right=("img/s", "×eager", "ms", "p95", "MB", "points lost", "same answer"),
    )  # fmt: skip
    order = {"ok": 0, "slower": 1, "too much lost": 2, "failed": 3, "not installed": 4, "not tried": 5}
    for row in sorted(result.rows, key=lambda r: (order[r.status], -(r.images_per_s or 0))):
        chosen = row.name == result.chosen.name
        note = "chosen" if chosen else row.status if not row.reason else f"{row.status}: {row.reason}"
        if row.pareto and not chosen:
            note = f"{note} · Pareto"
        out.add_row(Text(row.name.strip(), style="bold" if chosen else ""), *_cells(row), Text(note))
    return out


def _cells(row: Row) -> list[str]:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lost = same = ""
    if row.fidelity is not None:
        lost = f"{row.fidelity.drop:+.2f} [{row.fidelity.low:+.2f}, {row.fidelity.high:+.2f}]"
        same = f"{row.fidelity.agreement:.1%}"
    return [
        number(row.images_per_s, 1),
        number(row.ratio, 2),
        number(row.ms, 1),
        number(row.p95, 1),
        number(row.megabytes, 1),
        lost,
        same,
    ]


def _as_json(result: Deployment) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "folder": str(result.folder),
        "chosen": result.chosen.name,
        "reason": result.reason,
        "seconds": round(result.seconds, 1),
        "cached": result.cached,
        "interrupted": result.interrupted,
        "rows": [{**asdict(row), "name": row.name} for row in result.rows],
    }

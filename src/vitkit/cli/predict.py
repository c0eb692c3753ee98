"""``vitkit predict``: use a model that a study exported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def predict(
    model: Annotated[Path, typer.Argument(help="Folder of the model, e.g. studies/digits/models/vit.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Label images with a model that a study exported.

    Files that cannot be read are listed with the reason; it is an error if none can.
    """
    from vitkit.cli.console import console, print_json, table
    from vitkit.errors import BadInput

    rows = predict_files(model, images)
    unread = [row for row in rows if "error" in row]
    if len(unread) == len(rows):
        reason = unread[0]["error"]
        raise BadInput(
            reason if len(rows) == 1 else f"None of the {len(rows)} files could be read, to begin with {reason}"
        )
    if as_json:
        print_json(rows)
        _say_unread(unread, rows)
        return

    out = table("image", "prediction", wrap="prediction")
    for row in rows:
        if "error" in row:
            out.add_row(row["image"], f"not read: {row['error']}")
        elif "values" in row:
            out.add_row(row["image"], ", ".join(f"{v:.4g}" for v in row["values"].values()))
        else:
            best = sorted(row["probabilities"].items(), key=lambda kv: -kv[1])[:top]
            out.add_row(row["image"], ", ".join(f"{name} {p:.1%}" for name, p in best))
    console().print(out)
    _say_unread(unread, rows)


def _say_unread(unread: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    if unread:
        # on stderr, which leaves the output to programs
        print(f"{len(unread)} of {len(rows)} files could not be read.", file=sys.stderr)


def predict_files(folder: Path, images: list[Path]) -> list[dict[str, Any]]:
    """Predictions of a model folder for image files.

    Returns: one row per file: ``{"image", "label", "probabilities"}``, ``{"image", "values"}`` for regression, or
    ``{"image", "error"}`` for a file that could not be read.

    Raises: BadInput when the folder holds no model or a path does not exist.
    """
    import torch

    from vitkit.data import read_image
    from vitkit.deploy.artefact import answer
    from vitkit.errors import BadInput
    from vitkit.models.io import load_model

    model, config = load_model(folder)
    files: list[Path] = []
    for path in images:
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        elif path.exists():
            files.append(path)
        else:
            raise BadInput(f"There is no file or folder {path}.")
    if not files:
        raise BadInput(f"{', '.join(map(str, images))} holds no image file.")
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            pixels = read_image(
                file, config.image_size, config.in_chans, value_range=config.value_range, wide=config.wide
            )
        except BadInput as error:
            rows.append({"image": str(file), "error": str(error)})
            continue
        with torch.inference_mode():
            output = model(pixels.unsqueeze(0)).float()[0]
        if config.task != "regress":
            output = output.sigmoid() if config.task == "multilabel" else output.softmax(-1)
        rows.append({"image": str(file), **answer(output.numpy(), tuple(config.classes), config.task)})
    return rows

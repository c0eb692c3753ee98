"""What a path on the command line means where a model is wanted."""

from __future__ import annotations

from pathlib import Path


def find_model(path: Path) -> Path:
    """The folder of a model: ``path`` itself, or that of the best model of the study at ``path``.

    Raises: BadInput when there is none, saying what is there instead.
    """
    from vitkit.errors import BadInput

    if not path.exists():
        if len(path.parts) == 1 and _is_network(str(path)):
            raise BadInput(
                f"{path} names a network and no folder, so it has no weights yet: `vitkit study DATA --recipes {path}` "
                "trains one, and in Python vitkit.deploy(model, images) takes any that is trained."
            )
        raise BadInput(f"There is no folder {path}.")
    if not path.is_dir():
        raise BadInput(f"{path} is a file; give the folder of a model or of a study.")
    if any((path / name).is_file() for name in ("manifest.json", "config.json")):
        return path
    if not (path / "results.json").is_file():
        found = sorted(p.parent for name in ("config.json", "manifest.json") for p in path.glob(f"*/{name}"))
        found += sorted(p.parent for p in path.glob("models/*/config.json"))
        hint = f" Try {found[0]}." if found else " `vitkit study` makes one, and `vitkit deploy` a faster one of it."
        raise BadInput(f"{path} holds no model: no manifest.json, config.json or results.json.{hint}")
    from vitkit.study.results import read_json

    for recipe in read_json(path / "results.json").ranked():
        if recipe.model_dir and (path / recipe.model_dir / "config.json").is_file():
            return path / recipe.model_dir
    raise BadInput(f"The study {path} has no model that finished; run it again, or give the folder of a model.")


def _is_network(name: str) -> bool:
    # takes seconds, which only a word without slashes is worth
    import timm

    return timm.is_model(name)

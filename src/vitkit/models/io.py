"""Model folders: weights as safetensors, everything else as JSON, loadable without the study that made them."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from vitkit.errors import BadInput, VitkitError
from vitkit.files import atomic_write, write_text
from vitkit.models.build import create
from vitkit.models.normalized import NormalizedModel
from vitkit.models.swap import swap
from vitkit.pickles import PICKLE_ENDINGS, is_pickle

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_LISTS = ("parts", "applied", "image_size", "mean", "std", "classes")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that is needed to build the model again, before its weights are loaded.

    Args:
        base: preset or timm name.
        base_options: constructor options (``num_classes``, ``img_size``, ``in_chans`` …).
        parts: ``[{"slot", "part", "where", "options"}, …]`` in the order they were swapped in.
        applied: ``[{"name", "options"}, …]`` transforms that changed the structure, in order.
        image_size: (H, W) the images are resized to.
        network_size: (H, W) they are enlarged to inside the model, where the network needs more pixels than they have.
        in_chans: channels of the images.
        mean, std: of the pixels in [0, 1], per channel.
        wide: some images it was trained on have more than 8 bits, so all were resized as floats.
        value_range: black and white of images that are neither 8- nor 16-bit; None: it was trained on no such images.
        task: "classify", "multilabel" or "regress".
        classes: names of the outputs.
    """

    base: str
    base_options: dict[str, Any] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    applied: list[dict[str, Any]] = field(default_factory=list)
    image_size: tuple[int, int] = (224, 224)
    network_size: tuple[int, int] | None = None
    in_chans: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    wide: bool = False
    value_range: tuple[float, float] | None = None
    task: str = "classify"
    classes: tuple[str, ...] = ()
    format: int = FORMAT


def construct(config: ModelConfig, pretrained: bool = False) -> NormalizedModel:
    """Build the model of ``config`` with fresh (or timm's pretrained) weights, without applied transforms."""
    # JSON knows lists only, timm wants tuples
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.base_options.items()}
    model = create(config.base, pretrained=pretrained, **options)
    for use in config.parts:
        swap(model, use["slot"], use["part"], where=use.get("where", "all"), **use.get("options", {}))
    return NormalizedModel(model, config.mean, config.std, config.network_size)


def save_model(model: nn.Module, config: ModelConfig, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` into ``folder``, each in one step."""
    target = Path(folder)
    # safetensors refuses shared storage; tied tensors are written once each
    state = {name: tensor.detach().clone().contiguous().cpu() for name, tensor in model.state_dict().items()}
    with atomic_write(target / WEIGHTS) as temporary:
        try:
            save_file(state, str(temporary), metadata={"format": "pt"})
        except SafetensorError as error:
            # safetensors wraps what the system says (a full disk); atomic_write turns it into a sentence
            raise OSError(str(error)) from error
    write_text(target / CONFIG, json.dumps(asdict(config), indent=1, ensure_ascii=False) + "\n")


def read_config(folder: str | Path) -> ModelConfig:
    """Read ``config.json`` of a model folder.

    Raises: BadInput when it is missing, broken, has unknown keys or is of a newer format.
    """
    path = Path(folder) / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(f"{folder} is not a model folder: it has no {CONFIG}.") from error
    except NotADirectoryError as error:
        raise BadInput(f"{folder} is a file; give the model's folder, which holds {CONFIG} and {WEIGHTS}.") from error
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise BadInput(f"{path} is not valid JSON: {error}. Copy the model's folder again.") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path} must be a JSON object with the keys of a model, such as base and base_options.")
    version = raw.get("format", 0)
    if not isinstance(version, int):
        raise BadInput(f"{path}: format = {version!r} must be a whole number; this vitkit writes {FORMAT}.")
    if version > FORMAT:
        raise BadInput(f"{path} has format {version}, newer than this vitkit ({FORMAT}); upgrade vitkit.")
    unknown_keys = sorted(set(raw) - set(ModelConfig.__dataclass_fields__))
    if unknown_keys:
        raise BadInput(
            f"{path} has unknown keys: {', '.join(unknown_keys)}. Remove them; known are "
            f"{', '.join(ModelConfig.__dataclass_fields__)}."
        )
    if not isinstance(raw.get("base"), str):
        raise BadInput(f"{path}: base = {raw.get('base')!r} must be the name of a network, such as 'vit_pico'.")
    for key, kind in (("base_options", dict), *((k, list) for k in _LISTS)):
        if not isinstance(raw.get(key, kind()), kind):
            raise BadInput(f"{path}: {key} = {raw[key]!r} must be a {'mapping' if kind is dict else 'list'}.")
    for key, needed in (("parts", ("slot", "part")), ("applied", ("name",))):
        for i, step in enumerate(raw.get(key, [])):
            missing = [n for n in needed if not isinstance(step, dict) or n not in step]
            if missing:
                raise BadInput(f"{path}: {key}[{i}] = {step!r} lacks {' and '.join(missing)}.")
    size = raw.get("network_size")
    if size is not None and not (isinstance(size, list) and len(size) == 2 and all(type(v) is int for v in size)):
        raise BadInput(f"{path}: network_size = {size!r} must be [height, width] in pixels, or null.")
    values = raw.get("value_range")
    if values is not None:
        numbers = isinstance(values, list) and len(values) == 2 and all(isinstance(v, (int, float)) for v in values)
        if not numbers or not values[0] < values[1]:
            raise BadInput(f"{path}: value_range = {values!r} must be two rising numbers, black and white, or null.")
    for key in ("image_size", "network_size", "mean", "std", "classes", "value_range"):
        if raw.get(key) is not None:
            raw[key] = tuple(raw[key])
    return ModelConfig(**raw)


def load_model(folder: str | Path) -> tuple[NormalizedModel, ModelConfig]:
    """Rebuild the model of a folder, weights loaded, in eval mode.

    Raises: BadInput naming the file and key when something is missing or of another shape.
    """
    config = read_config(folder)
    try:
        model: nn.Module = construct(config)
        for step in config.applied:
            model = _restore(model, step)
    except VitkitError as error:
        raise BadInput(f"The model of {Path(folder) / CONFIG} cannot be built: {error}") from error
    path = Path(folder) / WEIGHTS
    state = _read_weights(path)
    load_state(model, state, str(path))
    return model.eval(), config  # type: ignore[return-value]


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        pickles = sorted(p.name for p in path.parent.iterdir() if p.suffix in PICKLE_ENDINGS)
        instead = f"; {pickles[0]} beside it is a pickle, which can run code and is not read" if pickles else ""
        raise BadInput(f"{path.parent} has no {WEIGHTS}{instead}. Copy the whole folder that the study exported.")
    try:
        if is_pickle(path):
            raise BadInput(
                f"{path} is a pickle, which can run code when it is loaded, so it is refused. Ask for a .safetensors "
                "file."
            )
        return load_file(str(path))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise BadInput(f"{path} is damaged or no safetensors file ({error}); copy it again.") from error


def load_state(model: nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Strict ``load_state_dict`` whose error names the first keys and shapes that disagree."""
    own = model.state_dict()
    problems = [f"{k} is missing" for k in own if k not in state]
    problems += [f"{k} is not part of this model" for k in state if k not in own]
    problems += [
        f"{k} has shape {tuple(state[k].shape)}, the model needs {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise BadInput(f"{where} does not fit the model: {'; '.join(problems[:3])}{more}.")
    model.load_state_dict(state)


def _restore(model: nn.Module, step: dict[str, Any]) -> nn.Module:
    from vitkit.catalogue import methods

    method = methods().get(step["name"])
    if method is None:
        raise BadInput(f"The model was changed by {step['name']!r}, which this vitkit does not have; upgrade vitkit.")
    module = importlib.import_module(method.dotted.split(":")[0])
    return module.restore(model, dict(step.get("options", {})))

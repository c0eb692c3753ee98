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

from vitkit.errors import BadInput
from vitkit.files import atomic_write, write_text
from vitkit.models.build import create
from vitkit.models.normalized import NormalizedModel
from vitkit.models.swap import swap

FORMAT = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that is needed to build the model again, before its weights are loaded.

    Args:
        base: preset or timm name.
        base_options: constructor options (``num_classes``, ``img_size``, ``in_chans`` …).
        parts: ``[{"slot", "part", "where", "options"}, …]`` in the order they were swapped in.
        applied: ``[{"name", "options"}, …]`` transforms that changed the structure, in order.
        image_size: (H, W) the images are resized to.
        in_chans: channels of the images.
        mean, std: of the pixels in [0, 1], per channel.
        task: "classify", "multilabel" or "regress".
        classes: names of the outputs.
    """

    base: str
    base_options: dict[str, Any] = field(default_factory=dict)
    parts: list[dict[str, Any]] = field(default_factory=list)
    applied: list[dict[str, Any]] = field(default_factory=list)
    image_size: tuple[int, int] = (224, 224)
    in_chans: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
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
    return NormalizedModel(model, config.mean, config.std)


def save_model(model: nn.Module, config: ModelConfig, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` into ``folder``, each in one step."""
    target = Path(folder)
    # safetensors refuses shared storage; tied tensors are written once each
    state = {name: tensor.detach().clone().contiguous().cpu() for name, tensor in model.state_dict().items()}
    with atomic_write(target / WEIGHTS) as temporary:
        save_file(state, str(temporary), metadata={"format": "pt"})
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
    except json.JSONDecodeError as error:
        raise BadInput(f"{path} is not valid JSON: {error}.") from error
    if raw.get("format", 0) > FORMAT:
        raise BadInput(f"{path} has format {raw['format']}, newer than this vitkit ({FORMAT}); upgrade vitkit.")
    unknown_keys = sorted(set(raw) - set(ModelConfig.__dataclass_fields__))
    if unknown_keys:
        raise BadInput(f"{path} has unknown keys: {', '.join(unknown_keys)}.")
    for key in ("image_size", "mean", "std", "classes"):
        if key in raw:
            raw[key] = tuple(raw[key])
    return ModelConfig(**raw)


def load_model(folder: str | Path) -> tuple[NormalizedModel, ModelConfig]:
    """Rebuild the model of a folder, weights loaded, in eval mode.

    Raises: BadInput naming the file and key when something is missing or of another shape.
    """
    config = read_config(folder)
    model: nn.Module = construct(config)
    for step in config.applied:
        model = _restore(model, step)
    path = Path(folder) / WEIGHTS
    try:
        state = load_file(str(path))
    except FileNotFoundError as error:
        raise BadInput(f"{folder} has no {WEIGHTS}.") from error
    except SafetensorError as error:
        raise BadInput(f"{path} is not a safetensors file ({error}).") from error
    load_state(model, state, str(path))
    return model.eval(), config  # type: ignore[return-value]


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

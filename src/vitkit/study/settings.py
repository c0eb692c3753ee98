"""What a person may write in a study: YAML or flags, checked key by key."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from vitkit.errors import BadInput
from vitkit.yaml_settings import Strict, line_of, read_mapping

Options = dict[str, Any]


class Use(Strict):
    """One method of the catalogue with its options."""

    name: str
    options: Options = Field(default_factory=dict)


class PartUse(Use):
    """A part in a slot; ``where`` as in :func:`vitkit.swap`."""

    slot: str
    where: str | int | list[int] = "all"


class DataSettings(Strict):
    """Which images, and how they become tensors.

    ``image_size``: side in pixels, (H, W), or None for the images' own size (at most 96 px a side without a GPU).
    ``unknown``: what becomes of images whose label is empty or −1; see :func:`vitkit.data.open_source`.
    """

    path: str = Field(
        "digits", description="`digits`, a folder, zip, table or array file, `torchvision:NAME`, `hf:NAME`"
    )
    task: Literal["auto", "classify", "multilabel", "regress"] = Field("auto", description="auto: told by the labels")
    image_size: int | tuple[int, int] | None = Field(
        None, description="side in pixels or [height, width]; None: the images' own, at most 96 without a GPU"
    )
    limit: int | None = Field(None, ge=1, description="use at most this many training images, stratified")
    cache_mb: int = Field(1024, ge=0, description="memory for decoded images")
    augment: Literal["auto", "none", "light", "strong"] = Field(
        "auto", description="auto: light from 16 pixels a side, none below"
    )
    unknown: Literal["skip", "absent", "present", "class"] | None = Field(
        None, description="what becomes of images whose label is empty or −1"
    )


class Protocol(Strict):
    """The same for every recipe: who is trained on what, how long, how often."""

    test: float = Field(0.2, gt=0, lt=1, description="share of the images, where the data has no test split")
    val: float = Field(0.1, ge=0, lt=1, description="likewise")
    folds: int | None = Field(None, ge=2, description="cross-validation in place of one split")
    seeds: int = Field(1, ge=1, description="repetitions")
    seed: int = Field(0, description="the first, also of the split")
    epochs: int = Field(30, ge=1, description="of training")
    pretrain_epochs: int | None = Field(None, ge=1, description="of every objective; None: as many as epochs")
    batch_size: int | None = Field(None, ge=1, description="None: 16, 32 or 64, so that an epoch has 40 steps")
    lr: float = Field(1e-3, gt=0, description="peak of the cosine schedule")
    weight_decay: float = Field(0.05, ge=0, description="of matrices; not of biases, norms and tokens")
    warmup_epochs: float = Field(2.0, ge=0, description="of linear rise")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0, description="α, 0 is off")
    cutmix: float = Field(0.0, ge=0, description="α, 0 is off")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="keep a moving average of the weights")
    clip_grad: float | None = Field(1.0, gt=0, description="largest norm of the gradient")
    accumulate: int = Field(1, ge=1, description="batches a step")
    class_weights: bool = Field(False, description="weigh classes by their rarity")
    early_stop: int | None = Field(
        None, ge=1, description="epochs without gain on the validation part before stopping; its best weights are kept"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the hardware has it and the network is wide enough to gain"
    )
    devices: int = Field(1, ge=1)
    strategy: Literal["auto", "ddp", "fsdp"] = Field("auto", description="across devices")
    budget_seconds: float | None = Field(
        None, gt=0, alias="budget", description="time for everything, like 30m; cuts the epochs of all recipes alike"
    )
    long_tail: float | None = Field(
        None, ge=1, description="thin out the training classes: this many images of the first for one of the last"
    )
    calibration: int = Field(256, ge=1, description="training images a transform may look at")

    @field_validator("budget_seconds", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        return parse_duration(value) if isinstance(value, str) else value


class Measures(Strict):
    """What is measured of every recipe beyond the test predictions."""

    attacks: list[str] = Field(["fgsm", "pgd"], description="names; options by a probe of the recipe")
    epsilons_255: list[float] = Field([1, 2, 4, 8], description="strengths in pixel values 0…255")
    attack_images: int = Field(128, ge=1, description="test images attacked")
    explainers: list[str] = Field(["rollout", "grad-cam"], description="names; options by a probe of the recipe")
    explain_images: int = Field(64, ge=1, description="test images scored for faithfulness")
    gallery_images: int = Field(6, ge=0, description="test images shown with their maps")
    ensembles: list[str] = Field(
        default_factory=list,
        description="ways to combine the recipes' predictions: mean, geometric, vote, accuracy, temperature, convex, "
        "greedy, stacking",
    )
    latency: bool = Field(True, description="count parameters and FLOPs, time all models alternately")
    bootstrap: int = Field(2000, ge=200, description="resamples of the intervals")

    @field_validator("ensembles")
    @classmethod
    def _combiners(cls, value: list[str]) -> list[str]:
        from vitkit.study.ensembles import COMBINERS

        for name in value:
            if name not in COMBINERS:
                raise ValueError(f"{name!r} is none of {', '.join(COMBINERS)}")
        return value


class DeploySettings(Strict):
    """The winner is exported to the fastest engine of this machine that still answers like it; see `vitkit deploy`."""

    max_drop: float = Field(1.0, ge=0, description="points of accuracy that may be lost")
    budget_seconds: float = Field(180.0, gt=0, alias="budget", description="time for it, like 3m")
    batches: list[int] = Field([8], min_length=1, description="images at a time; the fastest is kept")
    merge: list[float] = Field(default_factory=list, description="shares of patch tokens to try to merge away")
    engines: list[str] | None = Field(None, description="only these; None: all that are here")

    @field_validator("budget_seconds", mode="before")
    @classmethod
    def _duration(cls, value: Any) -> Any:
        return parse_duration(value) if isinstance(value, str) else value

    @field_validator("batches", "merge")
    @classmethod
    def _in_range(cls, value: list[Any]) -> list[Any]:
        for number in value:
            if isinstance(number, int) and number < 1:
                raise ValueError(f"{number} images at a time cannot be run; give 1 or more")
            if isinstance(number, float) and not 0 < number < 1:
                raise ValueError(f"{number} is no share between 0 and 1")
        return value


class Recipe(Strict):
    """A model and everything done to it, in the order of the fields."""

    name: str
    title: str | None = Field(None, description="shown in the report")
    from_: str | None = Field(None, alias="from", description="start from another recipe of the file, or a short form")
    base: str = Field("auto", description="a timm name; auto: the study's own, else a small ViT sized to the images")
    pretrained: bool = Field(False, description="timm's weights, which need a network the first time")
    model_options: Options = Field(default_factory=dict, description="of the timm network, like depth")
    parts: list[PartUse] = Field(
        default_factory=list, description="{slot: name}, {slot: {name, where, options}} or a list of them"
    )
    objectives: list[Use] = Field(
        default_factory=list,
        description="names, or {name, options}: pretraining, one after the other; tscnet: in place of plain training",
    )
    optimizer: Use | None = Field(None, description="a name, or {name, options}; None: AdamW")
    transforms: list[Use] = Field(
        default_factory=list, description="names, or {name, options}, applied in this order after training"
    )
    probes: list[Use] = Field(
        default_factory=list,
        description="attacks or explainers for this recipe alone, like {name: pgd, options: {steps: 100}}",
    )

    @field_validator("parts", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        """Accept ``{mixer: sinkhorn}`` and ``{mixer: {name: …, options: …}}`` beside the list form."""
        if not isinstance(value, dict):
            return value
        out = []
        for slot, part in value.items():
            for item in part if isinstance(part, list) else [part]:
                out.append({"slot": slot, **(item if isinstance(item, dict) else {"name": item})})
        return out

    @field_validator("objectives", "transforms", "probes", mode="before")
    @classmethod
    def _uses(cls, value: Any) -> Any:
        return (
            [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @field_validator("optimizer", mode="before")
    @classmethod
    def _use(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class StudySettings(Strict):
    """A whole study."""

    name: str = "study"
    data: DataSettings = DataSettings()
    protocol: Protocol = Protocol()
    base: str = Field("auto", description="a timm name: the network of every recipe that names none")
    recipes: list[str | Recipe] = ["vit"]
    measures: Measures = Measures()
    deploy: DeploySettings | None = Field(None, description="`true`, or how to export the winner; None: not at all")

    @field_validator("data", mode="before")
    @classmethod
    def _path_only(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("deploy", mode="before")
    @classmethod
    def _yes_or_how(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value


def parse_duration(text: str) -> float:
    """Seconds of ``"90"``, ``"90s"``, ``"6m"``, ``"1.5h"`` or ``"1h30m"``.

    >>> parse_duration("6m"), parse_duration("1h30m")
    (360.0, 5400.0)
    """
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh])", text)
    if not parts or "".join(n + u for n, u in parts) != text:
        raise BadInput(f"{text!r} is not a duration; write for example 90s, 6m or 1h30m.")
    return sum(float(number) * units[unit] for number, unit in parts)


def read_study(path: str | Path) -> StudySettings:
    """Read a study file.

    Raises: BadInput naming the file, line or key, the value, and the nearest allowed name.
    """
    raw, text = read_mapping(path, "study", StudySettings.model_fields)
    return make_settings(raw, str(path), text)


def make_settings(raw: dict[str, Any], where: str = "the settings", text: str | None = None) -> StudySettings:
    """Validate a study; ``where`` and ``text`` make the error point at the line."""
    try:
        return StudySettings.model_validate(raw)
    except ValidationError as error:
        raise BadInput("\n".join(_explain(item, where, text) for item in error.errors()[:5])) from error


def _explain(item: Any, where: str, text: str | None) -> str:
    # a union tries both forms; its branch names are not keys the user wrote
    keys = [k for k in item["loc"] if k not in ("str", "Recipe", "function-before[_path_only(), DataSettings]")]
    key = ".".join(str(k) for k in keys)
    line = line_of(str(keys[-1]), text) if keys else ""
    if item["type"] == "extra_forbidden":
        known = _fields_at(keys[:-1])
        near = difflib.get_close_matches(str(keys[-1]), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{where}{line}: unknown key {key!r}.{hint} Allowed here: {', '.join(known)}."
    return f"{where}{line}: {key} = {item.get('input')!r}: {item['msg'].removeprefix('Value error, ').rstrip('.')}."


def _fields_at(path: list[Any]) -> list[str]:
    tables: dict[str, type[BaseModel]] = {
        "data": DataSettings,
        "protocol": Protocol,
        "measures": Measures,
        "deploy": DeploySettings,
        "recipes": Recipe,
        "parts": PartUse,
        "objectives": Use,
        "transforms": Use,
        "probes": Use,
        "optimizer": Use,
    }
    names = [p for p in path if isinstance(p, str) and p in tables]
    model = tables[names[-1]] if names else StudySettings
    return [field.alias or name for name, field in model.model_fields.items()]

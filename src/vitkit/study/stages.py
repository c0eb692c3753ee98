"""What each kind of stage does. Every function reads finished stages, writes one folder, and can run anywhere that
sees the study's folder: in this process, in a worker, on another machine."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitkit.errors import BadInput, VitkitError
from vitkit.files import write_text
from vitkit.study.plan import DataFacts, Stage
from vitkit.study.settings import DataSettings, Protocol
from vitkit.study.store import StageFolder, disk_errors

Report = Callable[[str, int, int], None]


def run_stage(root: str, stage: Stage, study: dict[str, Any], report: Report | None = None) -> float:
    """Run one stage and put its folder in place; returns the seconds it took.

    Args:
        root: the study's folder.
        stage: what to run; everything it needs is finished.
        study: ``{"data": …, "protocol": …}`` as plain data.
        report: ``(what, done, total)``, called often.
    """
    started = time.perf_counter()
    # the seed of the stage decides initial weights and everything drawn from torch's global generator
    _seed(int(stage.settings.get("seed", 0)), int(stage.settings.get("fold", 0)))
    context = Context(Path(root), study, stage, report or _silent)
    with disk_errors(root), StageFolder(root, stage.key) as folder:
        _KINDS[stage.kind](context, folder.temporary)
        seconds = time.perf_counter() - started
        folder.publish(
            {
                "key": stage.key,
                "kind": stage.kind,
                "title": stage.title,
                "settings": stage.settings,
                "seconds": seconds,
                "finished": time.time(),
            }
        )
    return seconds


def _silent(what: str, done: int, total: int) -> None:
    """Default progress callback."""


def _seed(seed: int, fold: int) -> None:
    import random

    import torch

    torch.manual_seed(1_000_003 * fold + seed)
    random.seed(1_000_003 * fold + seed)


class Context:
    """What a stage may look at: the study's settings, its data, the folders of finished stages."""

    def __init__(self, root: Path, study: dict[str, Any], stage: Stage, report: Report) -> None:
        self.root, self.stage, self.report = root, stage, report
        self.data = DataSettings.model_validate(study["data"])
        self.protocol = Protocol.model_validate(study["protocol"])

    @property
    def settings(self) -> dict[str, Any]:
        return self.stage.settings

    @property
    def fold(self) -> int:
        return int(self.settings.get("fold", 0))

    def folder(self, key: str) -> Path:
        return self.root / "stages" / key

    def facts(self) -> DataFacts:
        return read_facts(self.folder(self.settings["data"]))

    def source(self) -> Any:
        return open_data(self.data, self.root)

    def indices(self, split: str) -> np.ndarray:
        with np.load(self.folder(self.settings["data"]) / "folds.npz") as folds:
            return folds[f"{split}_{self.fold}"]

    def loader(self, split: str, train: bool = False, batch_size: int | None = None, limit: int | None = None) -> Any:
        from vitkit.data import make_loader

        facts, indices = self.facts(), self.indices(split)
        if limit is not None and len(indices) > limit:
            indices = np.sort(np.random.default_rng(0).choice(indices, limit, replace=False))
        augment = self.data.augment
        if augment == "auto":
            # a shift by one pixel is a tenth of a digit of 8×8: it teaches other pictures, not robustness
            augment = "light" if min(facts.image_size) >= 16 else "none"
        return make_loader(
            self.source(),
            indices,
            image_size=facts.image_size,
            in_chans=facts.in_chans,
            batch_size=batch_size or 64,
            train=train,
            augment=augment if train else "none",
            seed=int(self.settings.get("seed", 0)),
            cache_mb=self.data.cache_mb,
        )

    def images(self, split: str, count: int) -> tuple[Any, Any, list[str]]:
        """Up to ``count`` images of a split, the same for every recipe, with labels and file names."""
        import torch

        images, labels, keys = [], [], []
        loader = self.loader(split, limit=count)
        for batch in loader:
            images.append(batch["images"])
            labels.append(batch["labels"])
            keys += loader.keys(batch["indices"])
        return torch.cat(images), torch.cat(labels), keys


def read_facts(folder: Path) -> DataFacts:
    """The facts a data stage wrote."""
    raw = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    pairs = {k: None if raw[k] is None else tuple(raw[k]) for k in ("classes", "image_size", "value_range")}
    return DataFacts(**{**raw, **pairs})


_SOURCES: dict[str, Any] = {}


def open_data(data: DataSettings, root: Path, progress: Report | None = None) -> Any:
    """The source of a study; opened once per process, and what was learnt about its files is kept in the study's
    folder, since listing and verifying a large folder takes time."""
    from vitkit.data import open_source

    name = data.model_dump_json()
    if name not in _SOURCES:
        task = None if data.task == "auto" else data.task
        _SOURCES[name] = open_source(
            data.path, task=task, unknown=data.unknown, memory=root / "data-memory.npz", progress=progress
        )
    return _SOURCES[name]


def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- data ------------------------------------------------------------------------------------------------------------


def _data(context: Context, out: Path) -> None:
    from vitkit.data import check, mean_std, split
    from vitkit.models.presets import default_patch

    data, protocol, source = context.data, context.protocol, context.source()
    folds = split(source, test=protocol.test, val=protocol.val, folds=protocol.folds, seed=protocol.seed)
    if context.protocol.long_tail is not None:
        factor = context.protocol.long_tail
        folds = [replace(f, train=_long_tail(source, f.train, factor, context.protocol.seed)) for f in folds]
    if data.limit is not None:
        folds = [replace(f, train=_limit(source, f.train, data.limit)) for f in folds]
    report = check(source, folds, progress=context.report)
    size = _image_size(data, source, default_patch)
    chans = source.in_chans
    stats = [mean_std(source, f.train, size) for f in folds]
    arrays: dict[str, Any] = {
        f"{name}_{i}": getattr(f, name) for i, f in enumerate(folds) for name in ("train", "val", "test")
    }
    groups = [r.group for r in source.records]
    if any(g is not None for g in groups):
        # a record without a group is a group of its own
        names = [f"group {g}" if g is not None else f"record {i}" for i, g in enumerate(groups)]
        arrays["groups"] = np.unique(names, return_inverse=True)[1]
    np.savez(out / "folds.npz", **arrays)
    facts = DataFacts(
        key=context.stage.key,
        task=source.task,
        classes=tuple(source.classes),
        num_outputs=source.num_outputs,
        in_chans=chans,
        image_size=size,
        num_folds=len(folds),
        mean=[[float(v) for v in mean] for mean, _ in stats],
        # a channel that is constant in the training part would divide by zero
        std=[[max(float(v), 1e-3) for v in std] for _, std in stats],
        num_train=len(folds[0].train),
        wide=source.wide,
        value_range=source.unit_range if source.has_floats else None,
    )
    write_text(out / "facts.json", json.dumps(asdict(facts), indent=1))
    write_text(out / "report.json", json.dumps({"fingerprint": source.fingerprint, **report.to_dict()}, indent=1))


def _long_tail(source: Any, indices: np.ndarray, factor: float, seed: int) -> np.ndarray:
    from vitkit.data import long_tail

    if source.task != "classify":
        raise BadInput(f"long_tail={factor} thins out classes, and this is a {source.task} task; leave it out.")
    labels = np.array([source.records[i].label for i in indices])
    return indices[long_tail(labels, factor, seed=seed)]


def _limit(source: Any, indices: np.ndarray, limit: int) -> np.ndarray:
    from sklearn.model_selection import train_test_split

    if len(indices) <= limit:
        return indices
    labels = [source.records[i].label for i in indices] if source.task == "classify" else None
    kept, _ = train_test_split(indices, train_size=limit, random_state=0, stratify=labels)
    return np.sort(kept)


def _image_size(data: DataSettings, source: Any, default_patch: Callable[[int], int]) -> tuple[int, int]:
    if data.image_size is not None:
        size = data.image_size
        h, w = (size, size) if isinstance(size, int) else size
    else:
        # without a GPU a plain ViT on more than about 150 tokens takes hours on a laptop
        cap = 224 if device().type == "cuda" else 96
        h, w = (min(side, cap) for side in source.image_size)
        if max(source.image_size) > cap:
            h = w = cap
    patch = default_patch(min(h, w))
    if min(h, w) < patch:
        raise BadInput(
            f"The images of {data.path} are {h}×{w} pixels, smaller than one {patch}×{patch} patch; "
            f"enlarge them with --image-size {4 * patch}."
        )
    return (max(patch, round(h / patch) * patch), max(patch, round(w / patch) * patch))


# -- training --------------------------------------------------------------------------------------------------------


def _new_model(context: Context) -> tuple[Any, Any]:
    from vitkit.models.io import ModelConfig, construct

    raw = context.settings["config"]
    names = ("image_size", "network_size", "mean", "std", "classes", "value_range")
    config = ModelConfig(**{**raw, **{k: tuple(raw[k]) for k in names if raw[k] is not None}})
    model = construct(config, pretrained=bool(context.settings.get("pretrained")))
    if context.settings.get("init"):
        from safetensors.torch import load_file

        state = load_file(str(context.folder(context.settings["init"]) / "model.safetensors"))
        own = model.state_dict()
        # pretraining has no labels, so the head stays fresh
        kept = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape and ".head." not in f".{k}"}
        model.load_state_dict({**own, **kept})
    return model.to(device()), config


def _task(context: Context, facts: DataFacts) -> Any:
    from vitkit.tasks import Classify, Regress

    if facts.task == "regress":
        return Regress(facts.num_outputs)
    weights = None
    if context.settings["train"]["class_weights"]:
        source = context.source()
        labels = np.array([source.records[i].label for i in context.indices("train")])
        counts = np.bincount(labels, minlength=facts.num_outputs).clip(min=1)
        weights = (len(labels) / (len(counts) * counts)).tolist()
    return Classify(
        facts.classes,
        multilabel=facts.task == "multilabel",
        label_smoothing=context.settings["train"]["label_smoothing"],
        class_weights=weights,
    )


def _fit(context: Context, objective: Any, optimizer: dict[str, Any] | None, validate: bool) -> Any:
    from vitkit.train import TrainSettings, fit

    train = dict(context.settings["train"])
    name, options = "adamw", {}
    if optimizer is not None:
        name, options = optimizer["name"], optimizer["options"]
    settings = TrainSettings(**train, optimizer=name, optimizer_options=options)
    val = context.loader("val") if validate and len(context.indices("val")) else None
    images = context.loader("train", train=True, batch_size=settings.batch_size)
    if callable(getattr(objective, "hold_out", None)):
        images = objective.hold_out(images)
    return fit(
        objective,
        images,
        val,
        settings=settings,
        out_dir=context.root / "work" / context.stage.key,
        resume=True,
        progress=context.report,
    )


def _train(context: Context, out: Path) -> None:
    from vitkit.models.io import save_model

    model, config = _new_model(context)
    objective = _learning(context, model)
    history = _fit(context, objective, context.settings["optimizer"], validate=True)
    if callable(getattr(objective, "encoder", None)):
        # what the objective has found out beside the weights comes along
        model = objective.encoder()
    save_model(model.cpu(), _with_steps(config, model), out)
    write_text(out / "history.json", json.dumps({"rows": history.rows, "seconds": history.seconds}))


def _learning(context: Context, model: Any) -> Any:
    """What trains from labels: plain supervision, or the recipe's objective that takes its place."""
    from vitkit.catalogue import resolve
    from vitkit.train import Supervised

    task, method = _task(context, context.facts()), context.settings.get("method")
    if method is None:
        return Supervised(model, task)
    return resolve(method["name"])(model, task=task, **method["options"]).to(device())


def _with_steps(config: Any, model: Any) -> Any:
    """The config with the structural changes that the model has had since."""
    from vitkit.anatomy import find_host

    vit = find_host(model)
    applied = list(getattr(vit if vit is not None else model, "applied", []))
    # the steps already in the config were restored when the model was loaded
    fresh = applied[len(config.applied) :] if len(applied) > len(config.applied) else applied
    return replace(config, applied=[*config.applied, *fresh])


def _pretrain(context: Context, out: Path) -> None:
    from vitkit.catalogue import resolve
    from vitkit.models.io import save_model

    model, config = _new_model(context)
    method = context.settings["method"]
    objective = resolve(method["name"])(model, **method["options"]).to(device())
    history = _fit(context, objective, None, validate=False)
    save_model(model.cpu(), config, out)
    write_text(out / "history.json", json.dumps({"rows": history.rows, "seconds": history.seconds}))


def _transform(context: Context, out: Path) -> None:
    from vitkit.catalogue import resolve
    from vitkit.models.io import load_model, save_model

    model, config = load_model(context.folder(context.settings["model"]))
    model = model.to(device())
    method = context.settings["method"]
    images, labels, _ = context.images("train", context.settings["calibration"])
    context.report(method["name"], 0, 1)
    transform = resolve(method["name"])
    # most look at the images alone
    given = {"labels": labels.to(device())} if "labels" in inspect.signature(transform).parameters else {}
    new, change = transform(model, images.to(device()), **given, **method["options"])
    save_model(new.cpu(), _with_steps(config, new), out)
    write_text(out / "change.json", json.dumps(asdict(change), indent=1, default=str))


# -- measuring -------------------------------------------------------------------------------------------------------


def predict_all(
    model: Any, loader: Any, task: Any, report: Report = _silent
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions (N, K), labels and indices over a loader."""
    import torch

    where = next(model.parameters()).device
    outputs, labels, indices = [], [], []
    with torch.inference_mode():
        for i, batch in enumerate(loader):
            outputs.append(task.predict(model(batch["images"].to(where)).float()).cpu())
            labels.append(batch["labels"])
            indices.append(batch["indices"])
            report("predict", i + 1, len(loader))
    return torch.cat(outputs).numpy(), torch.cat(labels).numpy(), torch.cat(indices).numpy()


def _predict(context: Context, out: Path) -> None:
    from vitkit.models.io import load_model
    from vitkit.tasks import Classify, Regress

    facts = context.facts()
    model, _ = load_model(context.folder(context.settings["model"]))
    task = (
        Regress(facts.num_outputs)
        if facts.task == "regress"
        else Classify(facts.classes, multilabel=facts.task == "multilabel")
    )
    arrays: dict[str, np.ndarray] = {}
    for split in ("test", "val"):
        if len(context.indices(split)):
            values = predict_all(model.to(device()), context.loader(split), task, context.report)
            arrays |= {f"{split}_{name}": v for name, v in zip(("predictions", "labels", "indices"), values)}
    np.savez(out / "predictions.npz", **arrays)  # type: ignore[arg-type]


def _explain(context: Context, out: Path) -> None:
    import torch

    from vitkit.catalogue import resolve
    from vitkit.explain.base import at_places
    from vitkit.explain.faithfulness import score_explainers
    from vitkit.models.io import load_model

    model, _ = load_model(context.folder(context.settings["model"]))
    model = model.to(device())
    count, shown = context.settings["images"], context.settings["gallery"]
    images, labels, keys = context.images("test", max(count, shown))
    images = images.to(device())
    with torch.no_grad():
        probs = model(images).float().softmax(-1)
    target = probs.argmax(-1)
    maps: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for i, use in enumerate(context.settings["explainers"]):
        context.report(use["name"], i, len(context.settings["explainers"]))
        try:
            maps[use["name"]] = at_places(resolve(use["name"])(model, images, target, **use["options"]).map.float())
        except (TypeError, ValueError, LookupError, VitkitError) as error:
            # a network without attention has no rollout: that is a fact about the recipe, not a failure of the study
            notes[use["name"]] = str(error)
    scores = score_explainers(model, images[:count], {n: m[:count] for n, m in maps.items()}, target[:count])
    write_text(
        out / "faithfulness.json",
        json.dumps(
            {
                "scores": {e: {m: v.cpu().tolist() for m, v in row.items()} for e, row in scores.items()},
                "notes": notes,
            }
        ),
    )
    # spread over all of them: folders come class by class, and the first few would be of one class
    at = np.linspace(0, len(images) - 1, min(shown, len(images))).round().astype(int)
    np.savez(
        out / "gallery.npz",
        images=(images[at].cpu().numpy() * 255).round().astype(np.uint8),
        labels=labels[at].numpy(),
        predicted=target[at].cpu().numpy(),
        probability=probs.max(-1).values[at].cpu().numpy(),
        keys=np.array(keys)[at],
        **{f"map_{n}": m[at].cpu().numpy() for n, m in maps.items()},
    )


def _attack(context: Context, out: Path) -> None:
    from vitkit.models.io import load_model
    from vitkit.stress.robustness import robustness_table

    model, _ = load_model(context.folder(context.settings["model"]))
    model = model.to(device())
    images, labels, _ = context.images("test", context.settings["images"])
    rows = robustness_table(
        model,
        images.to(device()),
        labels.to(device()),
        attacks=context.settings["attacks"],
        epsilons_255=context.settings["epsilons_255"],
        progress=context.report,
    )
    write_text(out / "robustness.json", json.dumps(rows))


def _costs(context: Context, out: Path) -> None:
    import torch

    from vitkit.compress.cost import count_flops, count_params, measure_latency, peak_memory, size_bytes
    from vitkit.models.io import load_model

    facts = context.facts()
    folders = {name: context.folder(key) for name, key in context.settings["models"].items()}
    models = {name: load_model(folder)[0].to(device()) for name, folder in folders.items()}
    # recipes that differ only in probes share one model; timing it once is enough
    distinct = {str(folder): name for name, folder in reversed(folders.items())}
    rows: dict[str, dict[str, Any]] = {}
    sample = torch.rand(32, facts.in_chans, *facts.image_size, device=device())
    for i, (name, model) in enumerate(models.items()):
        context.report("counting", i, len(models))
        rows[name] = {
            "params": count_params(model),
            "flops": count_flops(model, sample[:1]),
            "size_bytes": size_bytes(model),
            "peak_memory_bytes": peak_memory(model, sample),
        }
    for batch, repeats in ((1, 60), (32, 30)):
        context.report(f"latency at batch {batch}", 0, 1)
        timed = measure_latency({n: models[n] for n in distinct.values()}, sample[:batch], repeats=repeats)
        for name, folder in folders.items():
            median, p95, ratio = timed[distinct[str(folder)]]
            rows[name][f"latency_ms_b{batch}"] = {"value": median, "p95": p95, "ratio": ratio}
    write_text(out / "costs.json", json.dumps({"rows": rows, "engine": f"torch eager fp32, {device().type}"}))


_KINDS: dict[str, Callable[[Context, Path], None]] = {
    "data": _data,
    "pretrain": _pretrain,
    "train": _train,
    "transform": _transform,
    "predict": _predict,
    "explain": _explain,
    "attack": _attack,
    "costs": _costs,
}


def time_training(root: str, stage: Stage, study: dict[str, Any], steps: int = 4) -> float:
    """Seconds one training stage would take an epoch here, from a few steps of it; nothing is written."""
    from vitkit.train import TrainSettings, fit

    _seed(0, 0)
    # the weights play no role for the time, and the pretrained ones do not exist yet
    stage = replace(stage, settings={**stage.settings, "init": None, "pretrained": False})
    context = Context(Path(root), study, stage, _silent)
    model, _ = _new_model(context)
    batches = []
    loader = context.loader("train", train=True, batch_size=stage.settings["train"]["batch_size"])
    for batch in loader:
        batches.append(batch)
        if len(batches) == steps:
            break
    if stage.kind == "pretrain":
        from vitkit.catalogue import resolve

        method = stage.settings["method"]
        objective = resolve(method["name"])(model, **method["options"])
    else:
        objective = _learning(context, model)
    optimizer = stage.settings.get("optimizer") or {"name": "adamw", "options": {}}
    settings = TrainSettings(
        **{**stage.settings["train"], "epochs": 2, "early_stop": None},
        optimizer=optimizer["name"],
        optimizer_options=optimizer["options"],
    )
    history = fit(objective, batches, None, settings=settings)
    # the first epoch warms up, and what a fit costs before its first step is paid once
    return max(history.rows[1]["seconds"] / len(batches), 1e-4) * len(loader)

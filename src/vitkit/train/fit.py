"""The one training loop. Lightning Fabric places it on devices; methods see plain modules and dict batches."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from vitkit.errors import BadInput, VitkitError
from vitkit.train import launch, precision
from vitkit.train.checkpoint import clear_checkpoints, load_checkpoint, only_run, save_checkpoint
from vitkit.train.mix import mix
from vitkit.train.optimizers.choose import make_optimizer
from vitkit.train.optimizers.perturbed import PerturbedOptimizer
from vitkit.train.schedule import lr_scale
from vitkit.train.settings import TrainSettings

Batch = dict[str, Any]
Progress = Callable[[str, int, int], None]
Evaluate = Callable[[Any], Mapping[str, float]]
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
_SAVING_SHARE = 0.05
_NO_SUMS = {"loss": 0.0, "steps": 0.0, "seconds": 0.0}


@dataclass
class History:
    """What happened in a run.

    Attributes:
        rows: one an epoch: ``epoch`` (from 1), ``step``, ``loss``, ``lr``, ``seconds``, means of the objective's logs,
            and, with validation, ``val_loss`` and the task's scores as ``val_<name>``.
        stopped_early: validation stopped improving before the last epoch.
        best_epoch: epoch (from 1) with the best validation score; None without validation.
        seconds: wall clock, over all parts of a run that was resumed.
        attention: attention path that was used: fused, explicit or unchanged.
        precision: number format that was used.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    stopped_early: bool = False
    best_epoch: int | None = None
    seconds: float = 0.0
    attention: str = "unchanged"
    precision: str = "fp32"


def fit(
    objective: nn.Module,
    train_loader: Iterable[Batch],
    val_loader: Iterable[Batch] | None = None,
    *,
    settings: TrainSettings | None = None,
    out_dir: str | Path | None = None,
    resume: bool = True,
    evaluate: Evaluate | None = None,
    progress: Progress | None = None,
) -> History:
    """Train an objective in place.

    Afterwards it holds, in this order of preference, the best epoch's weights (``early_stop``), the moving average
    (``ema_decay``), the last weights. It trains on the device its parameters are on, and stays there; with
    ``devices`` above 1 (or under ``torchrun``) on that many devices, each computing its share of every batch, so that
    the gradient is that of one device, short last batches included; a mean the model takes over the batch by itself
    (batch norm, a balance loss) is one over the share. ``batch_size`` is that of all devices together. A loader with
    ``shard`` reads the share only, of any other every process reads whole batches. Every process validates on all
    validation images; the first one's scores count.

    Args:
        objective: ``objective(batch)`` returns a dict with a scalar ``loss``, and optionally ``logs``. Offered and
            called: ``on_epoch(epoch, total)`` of it and of every submodule, before each epoch (from 0), with ``loss``
            as well if it has a parameter of that name: the mean training loss of the epoch before, None in the first;
            ``after_step(step, total)``; ``soft_labels(batch)`` (mixup and CutMix need it and are left out without);
            ``batch_weight(batch)``, by how much a batch counts where its loss is a weighted mean (the number of images
            without); ``evaluate(loader)``; ``task.main_metric``, the validation score that early stopping watches
            (higher is better; the loss without one).
        train_loader: dict batches with ``images`` (B, C, H, W) in [0, 1] and whatever the objective reads; its length
            is the number of batches. ``set_epoch(e)``, ``start_at(batch)``, ``keys(indices)`` and
            ``shard(rank, world, before)`` (see :meth:`vitkit.data.loader.Loader.shard`) are used if offered. A list of
            batches will do.
        val_loader: likewise, for validation after each epoch.
        settings: see :class:`TrainSettings`.
        out_dir: folder for checkpoints; None keeps none.
        resume: go on from the newest checkpoint in ``out_dir``; on a CPU the result is bit for bit that of a run
            without interruption. False starts anew and removes the checkpoints there.
        evaluate: ``f(val_loader) -> {name: value}`` in place of the objective's own.
        progress: called as ``progress(what, steps done, steps in all)`` after each step.

    Raises:
        BadInput: empty loader, nothing to train, settings that do not fit the task or the checkpoint.
        VitkitError: the loss is NaN or infinite (step, file names, what to try), or a checkpoint cannot be written.
    """
    settings = settings or TrainSettings()
    _check(objective, train_loader, val_loader, settings, evaluate)
    rest: dict[str, Any] = {
        "train_loader": train_loader,
        "val_loader": val_loader,
        "settings": settings,
        "out_dir": None if out_dir is None else Path(out_dir),
        "resume": resume,
        "evaluate": evaluate,
    }
    if settings.devices > 1 and not launch.launched():
        return History(**launch.spawn(_worker, objective, settings.devices, progress, **rest))
    with _random_state_kept():
        return _Run(objective, progress=progress, **rest).run()


def _worker(objective: nn.Module, **rest: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One process of several; whole weights and plain data out, so that they can cross a process border."""
    run = _Run(objective, **rest)
    history = run.run()
    return run.weights(), asdict(history)


class _Run:
    def __init__(
        self,
        objective: nn.Module,
        train_loader: Any,
        val_loader: Any,
        settings: TrainSettings,
        out_dir: Path | None,
        resume: bool,
        evaluate: Evaluate | None,
        progress: Progress | None,
    ) -> None:
        self.objective, self.train_loader, self.val_loader = objective, train_loader, val_loader
        self.settings, self.out_dir, self.resume = settings, out_dir, resume
        self.evaluate, self.progress = evaluate, progress
        self.fabric = _fabric(objective, settings)
        self.rank, self.world = self.fabric.global_rank, self.fabric.world_size
        # far apart, or the second process of seed 0 would draw what the first of seed 1 draws
        self.seed = settings.seed + 1_000_003 * self.rank
        soft = getattr(objective, "soft_labels", None)
        self.soft_labels = soft if (settings.mixup or settings.cutmix) and callable(soft) else None
        self.sharded = settings.strategy == "fsdp" and self.world > 1
        self.batches = len(train_loader)
        self.steps_per_epoch = math.ceil(self.batches / settings.accumulate)
        self.total = self.steps_per_epoch * settings.epochs
        self.warmup = min(self.total, round(settings.warmup_epochs * self.steps_per_epoch))
        self.history = History()
        self.epoch, self.batch, self.step = 0, 0, 0
        self.sums: dict[str, float] = dict(_NO_SUMS)
        self.logs: dict[str, float] = {}
        self.best: dict[str, Any] = {"score": -math.inf, "epoch": None, "weights": None, "stale": 0}
        self.rng_at_epoch: dict[str, Any] = {}
        # when the last checkpoint was written, and how long that took
        self.saved = (time.perf_counter(), 0.0)

    # -- the run -----------------------------------------------------------------------------------------------

    def run(self) -> History:
        lock = only_run(self.out_dir) if self.out_dir is not None and self.rank == 0 else nullcontext()
        with lock, _flags_kept(self.objective), self._loader_sharded():
            found = self._find_checkpoint()
            self._prepare(found)
            self.objective.train()
            while self.epoch < self.settings.epochs and not self.history.stopped_early:
                self._run_epoch()
            self._finish()
        return self.history

    def _prepare(self, found: tuple[dict[str, Tensor], Any] | None) -> None:
        settings = self.settings
        _seed(self.seed)
        device = self.fabric.device
        self.objective.to(device)
        self.format = precision.resolve(settings.precision, device, self.objective)
        state = None if found is None else found[1]
        if state is not None:
            self._set_attention(state["attention"])
            self.format = state["precision"]
        elif settings.precision == "auto" and device.type == "cpu":
            self._choose_path()
        self.history.precision = self.format
        self.ema = None
        if settings.ema_decay is not None:
            self.ema = ModelEmaV3(self.objective, decay=settings.ema_decay, use_warmup=True)
        inner: Any = torch.compile(self.objective) if settings.compile else self.objective
        self.module = self.fabric.setup_module(inner, move_to_device=True)
        self.optimizer = make_optimizer(
            settings.optimizer, self.objective, settings.lr, settings.weight_decay, settings.options()
        )
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        if isinstance(self.optimizer, PerturbedOptimizer):
            self.optimizer.before_base_step = self._clip
        if found is not None:
            self._restore(*found)
        else:
            _seed(self.seed)

    def _run_epoch(self) -> None:
        epoch, resumed_inside = self.epoch, self.batch > 0
        if not resumed_inside:
            self._call_on_epoch()
            self.rng_at_epoch = _random_state()
            self.sums, self.logs = dict(_NO_SUMS), {}
        batches = self._open_loader(resumed_inside)
        started = time.perf_counter()
        while self.batch < self.batches:
            micro = list(itertools.islice(batches, self.settings.accumulate))
            if not micro:
                raise BadInput(
                    f"The training loader ended after {self.batch} of {self.batches} batches in epoch {epoch + 1}."
                )
            self._one_step(micro)
            self.batch += len(micro)
            self.step += 1
            now = time.perf_counter()
            self.sums["seconds"] += now - started
            started = now
            if self.progress is not None:
                loss = self.sums["loss"] / self.sums["steps"]
                what = f"epoch {epoch + 1}/{self.settings.epochs}, loss {loss:.3f}"
                self.progress(what, self.step, self.total)
            if self.step % self.settings.checkpoint_steps == 0 and self.batch < self.batches:
                self._save()
        self._end_epoch()

    def _one_step(self, micro: list[Batch]) -> None:
        scale = lr_scale(self.step, self.total, self.warmup, self.settings.min_lr_ratio)
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * scale
        ready = [self._make_ready(batch, self.batch + i) for i, batch in enumerate(micro)]
        shares = self._shares(ready)
        seen: list[tuple[float, dict[str, float]]] = []

        def closure() -> Tensor:
            self.optimizer.zero_grad(set_to_none=True)
            total = torch.zeros((), device=self.fabric.device)
            logs: dict[str, float] = {}
            for i, ((batch, _), share) in enumerate(zip(ready, shares)):
                last = i == len(ready) - 1
                with self.fabric.no_backward_sync(self.module, enabled=not last):
                    with precision.autocast(self.format, self.fabric.device):
                        out = self.module(batch)
                    loss = out["loss"].float()
                    if not bool(loss.detach().isfinite()):
                        self._stop_at(float(loss.detach()), batch, i)
                    self.fabric.backward(loss * share)
                total += loss.detach() * share
                for name, value in (out.get("logs") or {}).items():
                    logs[name] = logs.get(name, 0.0) + float(value) * share
            seen.append((float(total), logs))
            return total

        if isinstance(self.optimizer, PerturbedOptimizer):
            self.optimizer.step(closure)
        else:
            closure()
            self._clip()
            self.optimizer.step()
        if self.ema is not None:
            # the average counts its steps from 1
            self.ema.update(self.objective, step=self.step + 1)
        if callable(getattr(self.objective, "after_step", None)):
            self.objective.after_step(self.step, self.total)
        # a two-step optimizer's second loss is that of perturbed weights; the first one is reported
        loss, logs = seen[0]
        self.sums["loss"] += loss
        self.sums["steps"] += 1
        for name, value in logs.items():
            self.logs[name] = self.logs.get(name, 0.0) + value

    def _clip(self) -> None:
        if self.settings.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(
                [p for p in self.objective.parameters() if p.grad is not None], self.settings.clip_grad
            )

    def _end_epoch(self) -> None:
        steps, seconds = self.sums["steps"], self.sums["seconds"]
        means = self._over_processes({**self.logs, "loss": self.sums["loss"]}, steps)
        row: dict[str, float] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "loss": means.pop("loss"),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": seconds,
        }
        row = {**means, **row}
        started = time.perf_counter()
        if self.val_loader is not None or self.evaluate is not None:
            scores = self._validate()
            row |= {name if name.startswith("val_") else f"val_{name}": float(v) for name, v in scores.items()}
            self._rank_epoch(row)
        self.history.seconds += seconds + time.perf_counter() - started
        self.history.rows.append(row)
        self.epoch, self.batch = self.epoch + 1, 0
        last = self.epoch == self.settings.epochs or self.history.stopped_early
        since, cost = time.perf_counter() - self.saved[0], self.saved[1]
        # epochs of a small study take less time than syncing a disk; processes must agree, so several always save
        if last or self.world > 1 or cost <= _SAVING_SHARE * since:
            self._save()

    def _over_processes(self, sums: dict[str, float], steps: float) -> dict[str, float]:
        """Means per step; over the processes too, where there are several."""
        if self.world == 1:
            return {name: value / steps for name, value in sums.items()}
        values = torch.tensor(list(sums.values()), device=self.fabric.device, dtype=torch.float64) / steps
        return dict(zip(sums, self.fabric.all_reduce(values, reduce_op="mean").tolist()))  # type: ignore[union-attr]

    def _validate(self) -> dict[str, float]:
        own = self.evaluate or getattr(self.objective, "evaluate", None) or self._mean_loss
        # a seed of its own: masks of a validation loss are the same each epoch, and training's draws go on
        with _random_state_kept(), self._averaged_weights():
            _seed(self.settings.seed)
            self.objective.eval()
            with torch.no_grad(), precision.autocast(self.format, self.fabric.device):
                scores = dict(own(self.val_loader))
            self.objective.train()
        # devices round differently, and a process that alone stops early leaves the others waiting
        return scores if self.world == 1 else self.fabric.broadcast(scores)

    def _mean_loss(self, loader: Iterable[Batch]) -> dict[str, float]:
        total, count = 0.0, 0
        for batch in loader:
            ready = _to(batch, self.fabric.device)
            total += float(self.objective(ready)["loss"]) * _size(batch)
            count += _size(batch)
        if not count:
            raise BadInput("The validation loader gave no batch.")
        return {"loss": total / count}

    def _rank_epoch(self, row: dict[str, float]) -> None:
        metric = getattr(getattr(self.objective, "task", None), "main_metric", None)
        score = row.get(f"val_{metric}") if metric else None
        if score is None:
            score = -row["val_loss"] if "val_loss" in row else math.nan
        # NaN compares false, so an undefined score never counts as better
        if score > self.best["score"]:
            self.best |= {"score": score, "epoch": self.epoch + 1, "stale": 0}
            if self.settings.early_stop is not None:
                with self._averaged_weights():
                    self.best["weights"] = self.weights()
        else:
            self.best["stale"] += 1
        self.history.best_epoch = self.best["epoch"]
        patience = self.settings.early_stop
        if patience is not None and self.best["stale"] >= patience and self.epoch + 1 < self.settings.epochs:
            self.history.stopped_early = True

    def _finish(self) -> None:
        if self.best["weights"] is not None:
            self._load(self.best["weights"])
        elif self.ema is not None:
            self.objective.load_state_dict(self.ema.module.state_dict())
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Any]:
        """A copy of all weights of the objective; of a sharded one, whole in the first process and empty elsewhere."""
        if self.sharded:
            return get_model_state_dict(self.objective, options=_WHOLE)
        return _clone(self.objective.state_dict())

    def _load(self, weights: dict[str, Any]) -> None:
        if self.sharded:
            set_model_state_dict(self.objective, weights, options=_SPREAD)
        else:
            self.objective.load_state_dict(weights)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self.ema is None:
            yield
            return
        current = _clone(self.objective.state_dict())
        self.objective.load_state_dict(self.ema.module.state_dict())
        try:
            yield
        finally:
            self.objective.load_state_dict(current)

    # -- batches -----------------------------------------------------------------------------------------------

    @contextmanager
    def _loader_sharded(self) -> Iterator[None]:
        """Let a loader that can do so read this process's share of each batch only."""
        shard = getattr(self.train_loader, "shard", None)
        self.reads_share = self.world > 1 and callable(shard)
        if not self.reads_share:
            yield
            return
        # mixing blends each image with the one ahead of it in the batch
        shard(self.rank, self.world, before=int(self.soft_labels is not None))  # type: ignore[misc]
        try:
            yield
        finally:
            shard(0, 1)  # type: ignore[misc]

    def _open_loader(self, resumed_inside: bool) -> Iterator[Batch]:
        loader = self.train_loader
        if callable(getattr(loader, "set_epoch", None)):
            loader.set_epoch(self.epoch)
        if self.world > 1 and not self.reads_share:
            batches = self._same_everywhere(loader)
            for _ in range(self.batch):
                next(batches)
            return batches
        if not resumed_inside:
            return iter(loader)
        # loaders that draw their order from the global generator draw the same one again
        now = _random_state()
        _set_random_state(self.rng_at_epoch)
        if callable(getattr(loader, "start_at", None)):
            loader.start_at(self.batch)
            batches = iter(loader)
        else:
            batches = iter(loader)
            for _ in range(self.batch):
                next(batches)
        _set_random_state(now)
        return batches

    def _same_everywhere(self, loader: Any) -> Iterator[Batch]:
        """A loader's batches, drawn from one random stream in all processes: they must cut shares of the same ones."""
        with _random_state_kept():
            _seed(self.settings.seed + self.epoch)
            batches = iter(loader)
            theirs = _random_state()
        while True:
            with _random_state_kept():
                _set_random_state(theirs)
                batch = next(batches, None)
                theirs = _random_state()
            if batch is None:
                return
            yield batch

    def _make_ready(self, batch: Batch, position: int) -> tuple[Batch, int]:
        """This process's share of a batch, mixed, on the device; with the number of its images."""
        settings, n = self.settings, _size(batch)
        if self.soft_labels is not None and n:
            number = self.epoch * self.batches + position
            batch = mix(batch, self.soft_labels(batch), settings.mixup, settings.cutmix, settings.seed, number)
        own = range(n)
        if self.reads_share:
            own = own[int(self.soft_labels is not None) :]
        elif self.world > 1:
            own = range(n * self.rank // self.world, n * (self.rank + 1) // self.world)
        if len(own) < n:
            batch = _rows(batch, n, own)
        if not own:
            # without images a process still takes part in the exchange of gradients, with weight 0
            batch = {k: v.new_zeros(1, *v.shape[1:]) if _one_each(v, 0) else v for k, v in batch.items()}
        return _to(batch, self.fabric.device), len(own)

    def _shares(self, ready: list[tuple[Batch, int]]) -> list[float]:
        """By how much each micro-batch's loss counts here, so that the processes' mean is the loss of one device.

        A micro-batch counts by its images; within it, a process counts by what its mean was divided by.
        """
        counts = [float(own) for _, own in ready]
        if self.world == 1:
            return [n / sum(counts) for n in counts]
        weigh = getattr(self.objective, "batch_weight", None)
        weights = [float(weigh(batch)) if callable(weigh) and own else float(own) for batch, own in ready]
        mine = torch.tensor([counts, weights], dtype=torch.float64, device=self.fabric.device)
        total_counts, total_weights = self.fabric.all_reduce(mine, reduce_op="sum").tolist()  # type: ignore[union-attr]
        shares = [w / total if total else 0.0 for w, total in zip(weights, total_weights)]
        # the processes' gradients are averaged, not added
        return [self.world * share * n / sum(total_counts) for share, n in zip(shares, total_counts)]

    def _stop_at(self, loss: float, batch: Batch, number: int) -> None:
        names = self._names(batch) or [f"batch {self.batch + number} of the epoch, whose images have no names"]
        images = batch.get("images")
        causes = []
        if isinstance(images, Tensor):
            broken = [i for i, ok in enumerate(images.flatten(1).isfinite().all(1).tolist()) if not ok]
            if broken and len(names) == len(images):
                names = [names[i] for i in broken]
                causes.append("these images contain NaN or infinite pixels: remove them")
        labels = batch.get("labels")
        if isinstance(labels, Tensor) and labels.is_floating_point() and not bool(labels.isfinite().all()):
            causes.append("the labels contain NaN or infinite values")
        if not causes:
            hints = [f"a lower lr than {self.settings.lr:g}"]
            if self.step < self.warmup or not self.warmup:
                hints.append("a longer warmup_epochs")
            if self.settings.clip_grad is None:
                hints.append("clip_grad=1.0")
            if self.format == "bf16":
                hints.append("precision='fp32'")
            causes.append(f"try {', '.join(hints)}")
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise VitkitError(
            f"The loss became {loss} at step {self.step} (epoch {self.epoch + 1}) on {shown}; {'; '.join(causes)}."
        )

    def _names(self, batch: Batch) -> list[str]:
        indices = batch.get("indices")
        if indices is None:
            return []
        keys = getattr(self.train_loader, "keys", None)
        if callable(keys):
            return [str(key) for key in keys(indices.cpu())]
        return [f"image {int(i)}" for i in indices]

    def _call_on_epoch(self) -> None:
        loss = self.history.rows[-1]["loss"] if self.history.rows else None
        for module in self.objective.modules():
            on_epoch = getattr(module, "on_epoch", None)
            if callable(on_epoch):
                wants = "loss" in inspect.signature(on_epoch).parameters
                on_epoch(self.epoch, self.settings.epochs, **({"loss": loss} if wants else {}))

    # -- number format and attention path ----------------------------------------------------------------------------

    def _choose_path(self) -> None:
        if self.world > 1:
            return
        with _random_state_kept():
            batch = next(iter(self.train_loader))
            few = _to(_rows(batch, _size(batch), range(min(16, _size(batch)))), self.fabric.device)
            if self.format == "bf16" and precision.needs_fp32(self.objective, few):
                self.format = "fp32"
            choice = precision.choose_attention(self.objective, few, self.format)
        self.history.attention = choice.path

    def _set_attention(self, path: str) -> None:
        # timing it again could choose otherwise, and the run would not end in the same weights
        self.history.attention = path
        if path == "unchanged":
            return
        for module in self.objective.modules():
            if isinstance(getattr(module, "fused_attn", None), bool):
                module.fused_attn = path == "fused"  # type: ignore[assignment]

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> tuple[dict[str, Tensor], Any] | None:
        if self.out_dir is None:
            return None
        if not self.resume:
            if self.rank == 0:
                clear_checkpoints(self.out_dir)
            return None
        found = load_checkpoint(self.out_dir)
        if found is not None:
            self._recognise(found[1])
        return found

    def _recognise(self, state: dict[str, Any]) -> None:
        mine = {**self.settings.to_dict(), "batches": self.batches, "processes": self.world}
        # how often checkpoints are written does not change the result
        differing = [k for k, v in mine.items() if k != "checkpoint_steps" and state["run"].get(k) != v]
        if differing:
            key = differing[0]
            raise BadInput(
                f"The checkpoint in {self.out_dir} belongs to another run: {key} was {state['run'].get(key)!r}, now it "
                f"is {mine[key]!r}. Use the same settings and data, another folder, or resume=False to start anew."
            )

    def _prefix(self) -> str:
        """What the file with the weights leaves out of their names: ``model.`` if there is nothing beside the model."""
        keys = self.objective.state_dict().keys()
        return "model." if keys and all(key.startswith("model.") for key in keys) else ""

    def _save(self) -> None:
        if self.out_dir is None:
            return
        started = time.perf_counter()
        rng: list[Any] = [_random_state()]
        if self.world > 1:
            rng = [None] * self.world
            torch.distributed.all_gather_object(rng, _random_state())
        if self.sharded:
            optimizer = get_optimizer_state_dict(self.objective, self.optimizer, options=_WHOLE)
        else:
            optimizer = self.optimizer.state_dict()
        weights = self.weights()
        if self.rank:
            return
        state = {
            "run": {**self.settings.to_dict(), "batches": self.batches, "processes": self.world},
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "sums": self.sums,
            "logs": self.logs,
            "history": asdict(self.history),
            "best": self.best,
            "optimizer": optimizer,
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "rng": rng,
            "rng_at_epoch": self.rng_at_epoch,
            "attention": self.history.attention,
            "precision": self.format,
        }
        prefix = self._prefix()
        model = {name.removeprefix(prefix): value for name, value in weights.items()}
        save_checkpoint(self.out_dir, self.step, model, state)
        ended = time.perf_counter()
        self.saved = (ended, ended - started)

    def _restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        if self.batch:
            # before the weights: a schedule may write buffers, and the saved ones are newer
            self._call_on_epoch()
        prefix = self._prefix()
        self._load({prefix + name: value for name, value in weights.items()})
        if self.sharded:
            # a parameter that no step has reached yet has no state
            loose = replace(_SPREAD, strict=False)
            set_optimizer_state_dict(self.objective, self.optimizer, state["optimizer"], options=loose)
        else:
            self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.sums, self.logs, self.best = state["sums"], state["logs"], state["best"]
        self.history = History(**state["history"])
        self.rng_at_epoch = state["rng_at_epoch"]
        _set_random_state(state["rng"][self.rank])


# -- around the run ----------------------------------------------------------------------------------------------


def _fabric(objective: nn.Module, settings: TrainSettings) -> Fabric:
    parameter = next(objective.parameters())
    kind = parameter.device.type
    if settings.devices == 1 and not launch.launched():
        index: Any = 1
        if kind == "cuda":
            index = [parameter.device.index or 0]
        fabric = Fabric(accelerator=kind, devices=index, precision="32-true")
    else:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", settings.devices))
        world = int(os.environ["WORLD_SIZE"])
        strategy: Any = "ddp_find_unused_parameters_true"
        if settings.strategy == "fsdp":
            strategy = ModelParallelStrategy(_shard, data_parallel_size=world, tensor_parallel_size=1)
        fabric = Fabric(
            accelerator="cuda" if torch.cuda.is_available() else "cpu",
            devices=here,
            num_nodes=world // here,
            strategy=strategy,
            precision="32-true",
        )
        fabric.launch()
    return fabric


def _shard(objective: nn.Module, mesh: Any) -> nn.Module:
    """Shard block by block, so that one block's weights are whole at a time; then the model, then the rest."""
    mesh = mesh["data_parallel"]
    for name, module in objective.named_modules():
        if name.rpartition(".")[2] == "blocks":
            for block in module.children():
                fully_shard(block, mesh=mesh)
    model = getattr(objective, "model", None)
    if isinstance(model, nn.Module):
        # validation calls the model by itself, so it must be able to gather its own weights
        fully_shard(model, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


def _check(
    objective: nn.Module, train_loader: Any, val_loader: Any, settings: TrainSettings, evaluate: Evaluate | None
) -> None:
    if not hasattr(train_loader, "__len__"):
        raise BadInput("The training loader has no length; the schedule needs to know how many batches an epoch has.")
    if not len(train_loader):
        raise BadInput("The training loader is empty; there is nothing to learn from.")
    if settings.early_stop is not None and val_loader is None and evaluate is None:
        raise BadInput(
            f"early_stop={settings.early_stop} needs validation images to watch; set a part of the data aside for "
            "validation, or early_stop=None."
        )
    if not any(p.requires_grad for p in objective.parameters()):
        raise BadInput("No parameter of the objective is trainable; set requires_grad on those that should learn.")
    if settings.strategy == "fsdp" and settings.ema_decay is not None:
        raise BadInput("ema_decay keeps a whole copy of the weights, which fsdp is there to avoid; choose one.")
    if settings.strategy == "fsdp" and settings.optimizer not in ("adamw", "sgd"):
        raise BadInput(
            f"The optimizer {settings.optimizer} needs statistics of whole tensors, which fsdp shards; use "
            "strategy='ddp', or adamw or sgd."
        )
    if torch.cuda.is_available() and settings.devices > torch.cuda.device_count() and not launch.launched():
        raise BadInput(
            f"devices={settings.devices}, but this machine has {torch.cuda.device_count()} GPU"
            f"{'s' if torch.cuda.device_count() > 1 else ''}; use at most that many."
        )
    task = getattr(objective, "task", None)
    if task is None:
        return
    if settings.label_smoothing != getattr(task, "label_smoothing", settings.label_smoothing):
        raise BadInput(
            f"The settings ask for label_smoothing={settings.label_smoothing}, the task was built with "
            f"{task.label_smoothing}; give both the same value."
        )
    if settings.class_weights and getattr(task, "class_weights", ()) is None:
        raise BadInput(
            "The settings ask for class_weights, but the task was built without; build it with "
            "Classify(…, class_weights=balanced_weights(counts))."
        )


def _size(batch: Batch) -> int:
    for name in ("images", "labels", "indices"):
        if isinstance(batch.get(name), Tensor):
            return len(batch[name])
    raise BadInput(f"A batch needs a tensor 'images'; this one has {', '.join(map(str, batch))}.")


def _one_each(value: Any, n: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == n


def _rows(batch: Batch, n: int, rows: range) -> Batch:
    """Some images of a batch of n, with what belongs to them."""
    return {k: v[rows.start : rows.stop] if _one_each(v, n) else v for k, v in batch.items()}


def _to(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _clone(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in state.items()}


@contextmanager
def _flags_kept(objective: nn.Module) -> Iterator[None]:
    """The attention path that trains fastest is not the caller's choice for everything after."""
    before = [(m, m.fused_attn) for m in objective.modules() if isinstance(getattr(m, "fused_attn", None), bool)]
    try:
        yield
    finally:
        for module, flag in before:
            module.fused_attn = flag  # type: ignore[assignment]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    # transforms of other packages draw from NumPy's global generator
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


def _random_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


@contextmanager
def _random_state_kept() -> Iterator[None]:
    state = _random_state()
    try:
        yield
    finally:
        _set_random_state(state)

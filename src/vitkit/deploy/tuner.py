"""Tries the engines of this machine on one model, and keeps the fastest that still answers like it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitkit.deploy.artefact import Artefact, load, run_in_batches, to_pixels
from vitkit.deploy.engines import ENGINES, Runner, Setting, engine
from vitkit.deploy.faithful import Fidelity, compare, fit_temperature
from vitkit.deploy.machine import cores, fingerprint, machine, versions
from vitkit.deploy.manifest import MANIFEST, Manifest, list_files, read_manifest, write_manifest
from vitkit.deploy.measure import take_turns
from vitkit.deploy.source import Source
from vitkit.errors import BadInput, VitkitError, unknown
from vitkit.files import write_text
from vitkit.models.io import ModelConfig

Report = Callable[[str, int, int], None]

#: what is tried first, so that a budget that ends early has seen what usually wins
_FIRST = (
    ("openvino", "int8+bf16"),
    ("openvino", "bf16"),
    ("openvino", "f32"),
    ("openvino", "int8"),
    ("onnxruntime", "f32"),
    ("onnxruntime", "int8-static"),
    ("onnxruntime", "int8-dynamic"),
    ("onnxruntime", "int4-weights"),
    ("torch-compile", "bf16"),
    ("aotinductor", "bf16"),
)
# no row may have this name
_REFERENCE = "the model itself"


@dataclass
class Row:
    """One way to run the model.

    Attributes:
        engine, precision, merge: which; ``merge`` is the share of patch tokens that are merged away.
        status: "ok", "too much lost", "slower" (a quick probe found it far behind), "failed", "not installed",
            "not tried".
        reason: why it is not "ok".
        setting: batch, threads and streams it is fastest with.
        ms, p95: of a batch. images_per_s. ratio: to the model in eager float32 PyTorch. noise: see
            :class:`vitkit.deploy.measure.Timing`.
        rounds: timed calls; 0: probed only.
        megabytes: of its files. memory_mb: that the process grew by when it was loaded and first run.
        fidelity: see :class:`vitkit.deploy.faithful.Fidelity`.
        pareto: no other is both faster and more faithful.
    """

    engine: str
    precision: str
    merge: float = 0.0
    status: str = "not tried"
    reason: str = ""
    setting: Setting | None = None
    ms: float | None = None
    p95: float | None = None
    images_per_s: float | None = None
    ratio: float | None = None
    noise: float | None = None
    rounds: int = 0
    megabytes: float | None = None
    memory_mb: float | None = None
    fidelity: Fidelity | None = None
    pareto: bool = False

    @property
    def name(self) -> str:
        merged = f" merge {self.merge:g}" if self.merge else ""
        return f"{self.engine} {self.precision}{merged}"


@dataclass
class Deployment:
    """What :func:`deploy` found.

    Attributes:
        folder: of the artefact. rows: everything that was considered. chosen: the row that was kept.
        reason: why, in a sentence.
        seconds: that tuning took. cached: nothing was measured, as the same was measured before.
        interrupted: stopped by the user; the best so far was kept.
    """

    folder: Path
    rows: list[Row]
    chosen: Row
    reason: str
    seconds: float
    cached: bool = False
    interrupted: bool = False

    def load(self) -> Artefact:
        """The deployed model."""
        return load(self.folder)


@dataclass
class _Tuning:
    """Work in progress: sources per merge ratio, loaded engines, the clock."""

    images: np.ndarray
    labels: np.ndarray | None
    task: str
    reference: np.ndarray
    max_drop: float
    batches: tuple[int, ...]
    scratch: Path
    budget: float
    until: float
    sources: dict[float, Source] = field(default_factory=dict)
    runners: dict[str, Runner] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)


def deploy(
    model: nn.Module,
    images: np.ndarray | torch.Tensor,
    labels: np.ndarray | torch.Tensor | None = None,
    *,
    out: str | Path,
    max_drop: float = 1.0,
    budget: float = 180.0,
    batches: Sequence[int] = (8,),
    engines: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    merge: Sequence[float] = (),
    bake: bool = False,
    free_size: bool = False,
    calibration: np.ndarray | torch.Tensor | None = None,
    calibration_labels: np.ndarray | torch.Tensor | None = None,
    config: ModelConfig | None = None,
    name: str = "model",
    progress: Report | None = None,
) -> Deployment:
    """Export a model to the engines of this machine, measure them side by side, keep the fastest faithful one.

    An engine is faithful if, on images that chose nothing, it loses at most ``max_drop`` points
    (:class:`vitkit.deploy.faithful.Fidelity`, from the engine's own outputs). Times are those of engines taking turns
    with the model in eager float32 PyTorch.

    Args:
        model: pixels in [0, 1] (B, C, H, W) → logits (B, K); it is not changed.
        images: (N, C, H, W) in [0, 1].
        labels: class indices (N,), 0/1 (N, K) or values (N, K); None: unknown.
        out: folder of the artefact; an older artefact there is replaced once the new one is whole.
        max_drop: points (percent) of accuracy that may be lost.
        budget: seconds for everything; candidates that do not fit are listed as "not tried".
        batches: images handed over at a time; each is tried, the one with most images a second is kept.
        engines: names out of :data:`vitkit.deploy.engines.ENGINES`; None: all.
        precisions: of those the engines offer; None: all.
        merge: shares of patch tokens in [0, 1) that token merging (ToMe) may take away, tried on top of the two
            fastest faithful engines; plain ViTs only.
        bake: put cutting and resizing into the engine's own file, which then takes 8-bit pixels (B, H, W, C) of any
            size (:class:`vitkit.deploy.pixels.FromPixels`); engines whose files cannot be changed are not tried.
        free_size: the engine takes images of other heights and widths too; a plain ViT's positions are resized inside
            its graph. Times and accuracy are those at the given size.
        calibration: images that choose quantization steps; None: a third of ``images``, at most 300, which are then
            not used to compare.
        calibration_labels: with labels also the temperature of the probabilities is fitted on them.
        config: of a model folder: image size, classes and task.
        name: shown to users.
        progress: called with (what, done, total).

    Returns: :class:`Deployment`.

    Raises:
        BadInput: images the model does not take, fewer than 8 of them, an ``out`` that holds something else, ``bake``
            for images of more than 8 bits or with ``free_size``.
        UnknownName: an engine.
        VitkitError: no engine is faithful; the message says which came nearest.
    """
    started = time.perf_counter()
    tell = progress or (lambda what, done, total: None)
    target = Path(out)
    _check_target(target)
    held, held_labels, chosen_for, chosen_labels = _share_out(images, labels, calibration, calibration_labels)
    task = config.task if config else "classify"
    if bake and config is not None and (config.wide or config.value_range is not None):
        raise BadInput("bake is for 8-bit images, and this model reads images with more bits; deploy it without.")
    if bake and free_size:
        raise BadInput("bake resizes every image to one size, and free_size keeps their sizes; choose one.")
    rows = _candidates(engines, precisions, bake)
    options = (max_drop, budget, tuple(batches), tuple(merge), bake, free_size, name, config)
    key = _key(model, held, held_labels, chosen_for, rows, options)
    done = _finished(target, key)
    if done is not None:
        return replace(done, seconds=time.perf_counter() - started)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        source = Source(model, chosen_for, Path(scratch), started + budget, free_size)
        tell("the model's own answers", 0, 1)
        tuning = _Tuning(
            images=held,
            labels=held_labels,
            task=task,
            reference=source.logits(held),
            max_drop=max_drop,
            batches=tuple(batches),
            scratch=Path(scratch),
            budget=budget,
            until=started + budget,
            sources={0.0: source},
        )
        interrupted = False
        known = _read_cache(key)
        try:
            if known is not None:
                rows = known
            else:
                _tune(tuning, rows, tuple(merge), tell)
        except KeyboardInterrupt:
            interrupted = True
            if not any(row.status == "ok" for row in rows):
                raise
        _mark_pareto(rows)
        best, reason = _choose(rows, max_drop)
        if known is None and not interrupted:
            _write_cache(key, rows)
        tell("writing", 0, 1)
        temperature = _temperature(tuning, best, chosen_for, chosen_labels)
        manifest = _manifest(tuning, best, config, name, key, temperature, len(chosen_for), chosen_labels is not None)
        if free_size:
            manifest = _check_other_size(tuning, best, manifest)
        if bake:
            manifest = _bake(tuning, best, manifest)
        seconds = time.perf_counter() - started
        result = Deployment(target, rows, best, reason, seconds, known is not None, interrupted)
        _write(tuning, result, manifest)
    return result


# -- trying -----------------------------------------------------------------------------------------------------------


def _candidates(engines: Sequence[str] | None, precisions: Sequence[str] | None, bake: bool) -> list[Row]:
    for given in engines or ():
        if given not in ENGINES:
            raise unknown("engine", given, ENGINES, "vitkit deploy --engines list")
    rows: list[Row] = []
    for name in engines or ENGINES:
        module = engine(name)
        missing = module.unavailable()
        if missing:
            rows.append(Row(name, "", status="not installed", reason=missing))
            continue
        if bake and not hasattr(module, "bake"):
            rows.append(Row(name, "", reason="its files cannot take the preparation of images in"))
            continue
        offered = module.precisions()
        rows += [Row(name, p) for p in offered if precisions is None or p in precisions]
    if not any(row.precision for row in rows):
        said = "; ".join(row.reason for row in rows) or f"they offer no {', '.join(precisions or ())}"
        raise BadInput(f"None of the engines can be used here: {said}")
    rank = {pair: i for i, pair in enumerate(_FIRST)}
    return sorted(rows, key=lambda r: rank.get((r.engine, r.precision), len(rank)))


def _tune(tuning: _Tuning, rows: list[Row], merge: tuple[float, ...], tell: Report) -> None:
    probe = tuning.images[np.arange(max(tuning.batches)) % len(tuning.images)]
    reference = _reference(tuning)
    tuning.runners[_REFERENCE] = reference
    todo = [row for row in rows if row.precision]
    for i, row in enumerate(todo):
        tell(row.name, i, len(todo) + len(merge) * 2)
        # a third of the time is for the measurement that decides
        if time.perf_counter() > tuning.until - 0.3 * tuning.budget and any(r.status == "ok" for r in rows):
            row.reason = "the budget was spent"
            continue
        _try(tuning, row, probe)
    fastest = sorted((r for r in rows if r.status == "ok" and r.images_per_s), key=lambda r: -(r.images_per_s or 0))[:2]
    for ratio in merge:
        for row in fastest:
            merged = Row(row.engine, row.precision, ratio)
            rows.append(merged)
            if time.perf_counter() > tuning.until:
                merged.reason = "the budget was spent"
                continue
            tell(merged.name, len(todo), len(todo) + len(merge) * 2)
            _try(tuning, merged, probe)
    _decide(tuning, rows, probe, tell)


def _reference(tuning: _Tuning) -> Runner:
    from vitkit.deploy.engines.torch_eager import TorchRunner

    return TorchRunner(tuning.sources[0.0].model, Setting(tuning.batches[0], cores()))


def _try(tuning: _Tuning, row: Row, probe: np.ndarray) -> None:
    """Make the engine's files, compare its answers, find its best setting by a quick probe."""
    module = engine(row.engine)
    folder = tuning.scratch / hashlib.sha256(row.name.encode()).hexdigest()[:12]
    try:
        source = _source(tuning, row.merge)
        folder.mkdir()
        module.make(source, row.precision, folder)
        before = _resident()
        settings = [s for batch in tuning.batches for s in module.settings(batch, cores())]
        runner = module.load(folder, row.precision, settings[0])
        sizes = _batch_sizes(source)
        outputs = _all(runner, tuning.images, sizes, max(tuning.batches))
        row.memory_mb = round(max(0.0, _resident() - before) / 2**20, 1)
        row.fidelity = compare(tuning.reference, outputs, tuning.labels, tuning.task)
        row.megabytes = round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 2**20, 2)
        if row.fidelity.drop > tuning.max_drop:
            row.status = "too much lost"
            row.reason = f"{row.fidelity.drop:.2f} points, more than {tuning.max_drop:g}"
        _probe(row, module, folder, runner, settings, probe, sizes)
        tuning.runners[row.name], tuning.folders[row.name] = _best_runner(row, module, folder, runner, settings), folder
    except KeyboardInterrupt:
        raise
    except VitkitError as error:
        row.status, row.reason = "failed", str(error)
        return
    except Exception as error:
        # engines raise whatever they like; the others go on
        row.status, row.reason = "failed", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        return
    if row.status != "too much lost":
        row.status = "ok"


def _best_runner(row: Row, module: Any, folder: Path, runner: Runner, settings: list[Setting]) -> Runner:
    """The runner with the setting that was fastest; the first one is used again where that is its setting."""
    return runner if row.setting == settings[0] else module.load(folder, row.precision, row.setting)


def _probe(
    row: Row, module: Any, folder: Path, first: Runner, settings: list[Setting], probe: np.ndarray, sizes: str | int
) -> None:
    for setting in settings:
        runner = first if setting == settings[0] else module.load(folder, row.precision, setting)
        batch = probe[: setting.batch]
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            run_in_batches(runner, batch, sizes)
            times.append(time.perf_counter() - begun)
        speed = setting.batch / min(times[1:])
        if row.images_per_s is None or speed > row.images_per_s:
            row.setting, row.images_per_s, row.ms = setting, speed, 1000 * min(times[1:])


def _decide(tuning: _Tuning, rows: list[Row], probe: np.ndarray, tell: Report) -> None:
    """Measure what the probes left, taking turns with the model itself."""
    finalists = [r for r in rows if r.status == "ok"]
    left = max(3.0, tuning.until - time.perf_counter())
    # ten rounds of everything in half of the time, else only what may still win
    if sum(r.ms or 0 for r in finalists) / 1000 * 10 > left / 2:
        best = max(r.images_per_s or 0 for r in finalists)
        for row in finalists:
            behind = best / (row.images_per_s or 1)
            if behind > 2:
                row.status, row.reason = "slower", f"{behind:.1f}× slower than the fastest in a probe"
        finalists = [r for r in finalists if r.status == "ok"]
    if not finalists:
        return
    tell(f"measuring {len(finalists)} in turns", 0, 1)
    calls: dict[str, tuple[Runner, np.ndarray]] = {
        _REFERENCE: (tuning.runners[_REFERENCE], probe[: tuning.batches[0]]),
        **{
            r.name: (
                _Batched(tuning.runners[r.name], _batch_sizes(tuning.sources[r.merge])),
                probe[: r.setting.batch if r.setting else 1],
            )
            for r in finalists
        },
    }
    found = take_turns(calls, rounds=30, seconds=left)
    for row in finalists:
        timing = found[row.name]
        batch = len(calls[row.name][1])
        row.ms, row.p95, row.noise, row.rounds = timing.ms, timing.p95, timing.noise, timing.rounds
        row.images_per_s, row.ratio = batch / timing.ms * 1000, timing.ratio


class _Batched:
    def __init__(self, runner: Runner, sizes: str | int) -> None:
        self.runner, self.sizes = runner, sizes

    def run(self, images: np.ndarray) -> np.ndarray:
        return run_in_batches(self.runner, images, self.sizes)

    def describe(self) -> dict[str, Any]:
        return self.runner.describe()


def _source(tuning: _Tuning, merge: float) -> Source:
    if merge not in tuning.sources:
        from vitkit.compress.merge.tome import tome

        plain = tuning.sources[0.0]
        try:
            merged, _ = tome(plain.model, ratio=merge)
        except TypeError as error:
            raise BadInput(f"tokens cannot be merged: {error}") from error
        folder = tuning.scratch / f"merged-{merge:g}"
        folder.mkdir()
        tuning.sources[merge] = Source(merged, plain.calibration, folder, plain.until, plain.side_step > 0)
    return tuning.sources[merge]


def _batch_sizes(source: Source) -> str | int:
    return source.fixed_batch or "any"


def _all(runner: Runner, images: np.ndarray, sizes: str | int, batch: int) -> np.ndarray:
    parts = [
        run_in_batches(runner, np.ascontiguousarray(images[i : i + batch]), sizes) for i in range(0, len(images), batch)
    ]
    return np.concatenate(parts)


def _resident() -> int:
    """Bytes of memory this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


# -- choosing and writing ---------------------------------------------------------------------------------------------


def _mark_pareto(rows: list[Row]) -> None:
    measured = [r for r in rows if r.fidelity is not None and r.images_per_s]
    for row in measured:
        row.pareto = not any(
            o.fidelity.drop <= row.fidelity.drop
            and o.images_per_s >= row.images_per_s
            and (o.fidelity.drop, o.images_per_s) != (row.fidelity.drop, row.images_per_s)
            for o in measured
        )


def _choose(rows: list[Row], max_drop: float) -> tuple[Row, str]:
    good = [r for r in rows if r.status == "ok"]
    if not good:
        nearest = min((r for r in rows if r.fidelity), key=lambda r: r.fidelity.drop, default=None)
        said = "; ".join(f"{r.name}: {r.reason}" for r in rows if r.reason)
        near = f" {nearest.name} came nearest, losing {nearest.fidelity.drop:.2f} points." if nearest else ""
        raise VitkitError(f"No engine loses at most {max_drop:g} points.{near} ({said})")
    best = max(good, key=lambda r: r.images_per_s or 0)
    assert best.fidelity is not None
    kind = "accuracy" if best.fidelity.labelled else "expected accuracy"
    faster = f"{best.ratio:.2f}× the images a second of eager float32" if best.ratio else "fastest in a probe"
    reason = (
        f"{best.name} is the fastest of {len(good)} that lose at most {max_drop:g} points: {faster}, "
        f"{best.fidelity.drop:+.2f} points of {kind} lost [{best.fidelity.low:+.2f}, {best.fidelity.high:+.2f}]"
    )
    if best.fidelity.high > max_drop:
        reason += f"; the interval reaches beyond {max_drop:g}: give more than {best.fidelity.images} images to be sure"
    return best, reason + "."


def _temperature(tuning: _Tuning, best: Row, images: np.ndarray, labels: np.ndarray | None) -> float:
    if labels is None or tuning.task != "classify" or len(images) < 50:
        return 1.0
    _ensure_made(tuning, best)
    sizes = _batch_sizes(tuning.sources[best.merge])
    return fit_temperature(_all(tuning.runners[best.name], images, sizes, max(tuning.batches)), labels)


def _ensure_made(tuning: _Tuning, row: Row) -> None:
    """Make and load what a cached result chose."""
    if row.name in tuning.folders:
        return
    folder = tuning.scratch / "chosen"
    folder.mkdir()
    module = engine(row.engine)
    module.make(_source(tuning, row.merge), row.precision, folder)
    tuning.folders[row.name] = folder
    tuning.runners[row.name] = module.load(folder, row.precision, row.setting or Setting())


def _manifest(
    tuning: _Tuning,
    best: Row,
    config: ModelConfig | None,
    name: str,
    key: str,
    temperature: float,
    count: int,
    fitted: bool,
) -> Manifest:
    channels, height, width = tuning.images.shape[1:]
    return Manifest(
        name=name,
        engine=best.engine,
        precision=best.precision,
        setting=asdict(best.setting or Setting()),
        image_size=(height, width),
        in_chans=channels,
        wide=config.wide if config else False,
        value_range=config.value_range if config else None,
        batch_sizes=_batch_sizes(_source(tuning, best.merge)),
        task=tuning.task,
        labels=config.classes if config else (),
        temperature=temperature,
        calibration=f"{count} images" + (" and their labels" if fitted else ""),
        evidence=_as_json(best),
        versions=versions(),
        machine=machine(),
        key=key,
    )


def _check_other_size(tuning: _Tuning, best: Row, manifest: Manifest) -> Manifest:
    """Compare the chosen engine with the model on images of another size.

    Raises: VitkitError if it loses more than may be lost.
    """
    _ensure_made(tuning, best)
    source = tuning.sources[0.0]
    others = source.other_size(tuning.images[:64])
    labels = None if tuning.labels is None else tuning.labels[:64]
    outputs = _all(tuning.runners[best.name], others, _batch_sizes(_source(tuning, best.merge)), max(tuning.batches))
    found = compare(source.logits(others), outputs, labels, tuning.task)
    height, width = others.shape[2:]
    if found.drop > tuning.max_drop:
        raise VitkitError(
            f"At {height}×{width} pixels {best.name} loses {found.drop:.2f} points, more than {tuning.max_drop:g}; "
            "deploy it for one size."
        )
    return replace(
        manifest, side_step=source.side_step, evidence={**manifest.evidence, f"at {height}×{width}": asdict(found)}
    )


def _bake(tuning: _Tuning, best: Row, manifest: Manifest) -> Manifest:
    """Put the preparation of images into the chosen engine's files, and compare again.

    Raises: VitkitError if the answers changed by more than may be lost.
    """
    from vitkit.deploy.pixels import export_preparation

    _ensure_made(tuning, best)
    folder, module = tuning.folders[best.name], engine(best.engine)
    source = _source(tuning, best.merge)
    module.bake(folder, export_preparation(manifest.image_size, manifest.in_chans), source.fixed_batch)
    runner = module.load(folder, best.precision, best.setting)
    outputs = _all(runner, to_pixels(tuning.images), _batch_sizes(source), max(tuning.batches))
    found = compare(tuning.reference, outputs, tuning.labels, tuning.task)
    if found.drop > tuning.max_drop:
        raise VitkitError(
            f"With the preparation of images inside, {best.name} loses {found.drop:.2f} points, more than "
            f"{tuning.max_drop:g}; deploy without bake."
        )
    return replace(manifest, takes="pixels", evidence={**manifest.evidence, "baked": asdict(found)})


def _write(tuning: _Tuning, result: Deployment, manifest: Manifest) -> None:
    from vitkit.deploy.chart import draw

    _ensure_made(tuning, result.chosen)
    folder = tuning.folders[result.chosen.name]
    summary = {
        "chosen": result.chosen.name,
        "reason": result.reason,
        "seconds": round(result.seconds, 1),
        "interrupted": result.interrupted,
        "rows": [_as_json(row) for row in result.rows],
    }
    write_text(folder / "tuning.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "tuning.svg", draw(result.rows, result.chosen, tuning.max_drop))
    write_manifest(replace(manifest, files=list_files(folder)), folder)
    # the loaded engine may have its files mapped; renaming leaves them be
    old = result.folder.with_name(f".{result.folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if result.folder.exists():
        result.folder.rename(old)
    folder.rename(result.folder)
    shutil.rmtree(old, ignore_errors=True)


def _as_json(row: Row) -> dict[str, Any]:
    found = asdict(row)
    found["name"] = row.name
    return found


def _row_from_json(raw: dict[str, Any]) -> Row:
    raw = {k: v for k, v in raw.items() if k != "name"}
    raw["setting"] = None if raw["setting"] is None else Setting(**raw["setting"])
    raw["fidelity"] = None if raw["fidelity"] is None else Fidelity(**raw["fidelity"])
    return Row(**raw)


# -- given and known --------------------------------------------------------------------------------------------------


def _check_target(target: Path) -> None:
    if target.is_file():
        raise BadInput(f"--out {target} is a file; give a folder.")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise BadInput(f"--out {target} holds other things and would be replaced; give an empty or new folder.")


def _share_out(
    images: Any, labels: Any, calibration: Any, calibration_labels: Any
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray | None]:
    """Images and labels to compare on, and to choose quantization steps on; no image is in both."""
    held, known = _array(images), None if labels is None else np.asarray(labels)
    if held.ndim != 4:
        raise BadInput(f"images must be (N, C, H, W); their shape is {held.shape}.")
    if known is not None and len(known) != len(held):
        raise BadInput(f"there are {len(held)} images and {len(known)} labels.")
    if calibration is not None:
        chosen = _array(calibration)
        if chosen.shape[1:] != held.shape[1:]:
            raise BadInput(
                f"calibration images have the shape {chosen.shape[1:]}, the others {held.shape[1:]}; resize them."
            )
        return held, known, chosen, None if calibration_labels is None else np.asarray(calibration_labels)
    if len(held) < 8:
        raise BadInput(f"{len(held)} images are too few to calibrate and compare engines; give at least 8, better 500.")
    order = np.random.default_rng(0).permutation(len(held))
    count = min(300, len(held) // 3)
    first, rest = np.sort(order[:count]), np.sort(order[count:])
    if known is None:
        return held[rest], None, held[first], None
    return held[rest], known[rest], held[first], known[first]


def _array(images: Any) -> np.ndarray:
    found = images.detach().cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    return np.ascontiguousarray(found, dtype=np.float32)


def _key(
    model: nn.Module, held: np.ndarray, labels: np.ndarray | None, chosen: np.ndarray, rows: list[Row], options: Any
) -> str:
    made = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        made.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        made.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    for array in (held, chosen, labels):
        made.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    made.update(repr((str(model), [(r.engine, r.precision) for r in rows], options, fingerprint())).encode())
    return made.hexdigest()


def _cache(key: str) -> Path:
    root = Path(os.environ.get("VITKIT_CACHE", Path.home() / ".cache" / "vitkit"))
    return root / "deploy" / f"{key}.json"


def _read_cache(key: str) -> list[Row] | None:
    path = _cache(key)
    if not path.is_file():
        return None
    try:
        return [_row_from_json(raw) for raw in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError):
        # a cache is never worth an error
        return None


def _write_cache(key: str, rows: list[Row]) -> None:
    write_text(_cache(key), json.dumps([_as_json(r) for r in rows], ensure_ascii=False))


def _finished(target: Path, key: str) -> Deployment | None:
    """The artefact that is there already, made from the same model, images, machine and settings."""
    if not (target / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(target)
        summary = json.loads((target / "tuning.json").read_text(encoding="utf-8"))
    except (VitkitError, OSError, ValueError):
        return None
    if manifest.key != key:
        return None
    rows = [_row_from_json(raw) for raw in summary["rows"]]
    chosen = next(r for r in rows if r.name == summary["chosen"])
    return Deployment(target, rows, chosen, summary["reason"], 0.0, cached=True)

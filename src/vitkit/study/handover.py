"""From a study to an engine: the winner, exported, on the images that the study set aside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitkit.errors import VitkitError, unknown
from vitkit.study.live import Live
from vitkit.study.plan import DataFacts, Stage, data_stage
from vitkit.study.results import Deployed, EngineResult, Interval, StudyResult
from vitkit.study.settings import StudySettings, read_study
from vitkit.study.stages import open_data
from vitkit.study.store import Store

if TYPE_CHECKING:
    from vitkit.deploy.images import Images
    from vitkit.deploy.tuner import Deployment
    from vitkit.models.io import ModelConfig

FOLDER = "deployed"
#: images that choose quantization steps, and most images that engines are compared on
CALIBRATION, COMPARED = 300, 1000


def check_engines(settings: StudySettings) -> None:
    """Raises: UnknownName for an engine that does not exist, before anything is trained."""
    from vitkit.deploy.engines import ENGINES

    for name in (settings.deploy and settings.deploy.engines) or ():
        if name not in ENGINES:
            raise unknown("engine (in deploy.engines)", name, ENGINES, "vitkit deploy --engines list")


def deploy_winner(
    result: StudyResult, settings: StudySettings, store: Store, facts: DataFacts, view: Live
) -> Deployed | None:
    """Export the best model of a study into its folder ``deployed``; a failure is told, not raised.

    Engines are calibrated on training images and compared on the test images of the model's own fold.
    """
    from vitkit.deploy.tuner import deploy
    from vitkit.models.io import load_model

    assert settings.deploy is not None
    best = next((r for r in result.ranked() if r.model_dir), None)
    if best is None or best.model_dir is None:
        return None
    how = settings.deploy
    stage = Stage("deploy", "export to engines", {}, recipes=[best.name])
    with view.stage(stage) as report:
        try:
            model, config = load_model(store.root / best.model_dir)
            images = _images(store.folder(facts.key), open_data(settings.data, store.root), config)
            found = deploy(
                model,
                images.held,
                images.held_labels,
                calibration=images.calibration,
                calibration_labels=images.calibration_labels,
                out=store.root / FOLDER,
                max_drop=how.max_drop,
                budget=how.budget_seconds,
                batches=how.batches,
                engines=how.engines,
                merge=how.merge,
                config=config,
                name=best.name,
                progress=report,
            )
        except VitkitError as error:
            view.failed(stage, str(error))
            return Deployed(recipe=best.name, error=str(error))
    return _record(best.name, found)


def study_images(root: Path, config: ModelConfig, limit: int = COMPARED) -> Images | None:
    """Training and test images of the study in ``root``, as it split them; None if it is no study.

    Where its stages were deleted or its data changed, they are split anew (:func:`vitkit.deploy.images.read_images`).

    Raises: BadInput if the data cannot be read any more.
    """
    if not (root / "study.yaml").is_file():
        return None
    settings = read_study(root / "study.yaml")
    source = open_data(settings.data, root)
    folder = root / "stages" / data_stage(settings, source.fingerprint).key
    if (folder / "folds.npz").is_file():
        return _images(folder, source, config, limit)
    from vitkit.deploy.images import read_images

    return read_images(settings.data.path, config, limit)


def _images(folder: Path, source: object, config: ModelConfig, limit: int = COMPARED) -> Images:
    from vitkit.deploy.images import images_at

    # exported models are those of the first fold
    with np.load(folder / "folds.npz") as folds:
        train, test = folds["train_0"], folds["test_0"]
    draw = np.random.default_rng(0).permutation
    return images_at(source, draw(train)[:CALIBRATION], draw(test)[:limit], config)  # type: ignore[arg-type]


def _record(recipe: str, found: Deployment) -> Deployed:
    engines = []
    for row in found.rows:
        fidelity = row.fidelity
        engines.append(
            EngineResult(
                engine=row.engine,
                precision=row.precision,
                merge=row.merge,
                status=row.status,
                reason=row.reason or None,
                images_per_s=row.images_per_s,
                ratio=row.ratio,
                ms=row.ms,
                p95=row.p95,
                batch=row.setting.batch if row.setting else None,
                megabytes=row.megabytes,
                drop=Interval(value=fidelity.drop, low=fidelity.low, high=fidelity.high) if fidelity else None,
                agreement=fidelity.agreement if fidelity else None,
            )
        )
    place = next(i for i, row in enumerate(found.rows) if row.name == found.chosen.name)
    return Deployed(recipe=recipe, folder=FOLDER, chosen=place, reason=found.reason, engines=engines)

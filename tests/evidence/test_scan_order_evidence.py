from __future__ import annotations

from vitkit.evidence import vision_mamba_remote_sensing as experiment
from vitkit.testing.worlds import digits


def test_runs_at_toy_size_and_reports_every_arm(monkeypatch):
    world = digits()
    small = type(world)(**{**world.__dict__, "x_train": world.x_train[:32], "y_train": world.y_train[:32]})
    monkeypatch.setattr(experiment, "fashion_mnist", lambda *args, seed: small)
    monkeypatch.setattr(experiment, "EPOCHS", 1)
    monkeypatch.setattr(experiment, "SIDES", (2, 3, 4))
    monkeypatch.setattr(experiment, "REPEATS", 1)
    found = experiment.run(seeds=(0,))
    rows = {row["mixer"]: row for row in found.rows}
    assert list(rows) == list(experiment._arms()) and len(rows) == len(experiment.PATHS) + 4
    timed = {name for name, row in rows.items() if row["slope"] is not None}
    assert timed == {f"ss2d: {experiment.FIRST}", "vim", "softmax"}


def test_all_sets_of_four_paths_have_the_same_size():
    sizes = {sum(p.numel() for p in experiment.SS2D(16, orders).parameters()) for orders in experiment.PATHS.values()}
    assert len(sizes) == 1

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitkit.errors import BadInput, VitkitError
from vitkit.study import run as run_module
from vitkit.study.results import read_json
from vitkit.study.run import run_study
from vitkit.study.settings import make_settings

QUIET = {"attacks": [], "explainers": [], "latency": False, "bootstrap": 200}


def write_data(path: Path, n: int = 60, seed: int = 0) -> Path:
    """Two classes of 8×8 images that differ by a bright half; easy, so one epoch is enough to see an effect."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    images = rng.integers(0, 90, (n, 8, 8))
    images[labels == 1, :, 4:] += 140
    np.savez(path, x=images.astype(np.uint8), y=labels)
    return path


def settings(path: Path, recipes, **rooms):
    base = {
        "name": "tiny",
        "data": {"path": str(path)},
        "protocol": {"epochs": 1, "batch_size": 16, "precision": "fp32", "calibration": 16},
        "recipes": recipes,
        "measures": QUIET,
    }
    for room, values in rooms.items():
        base[room] = {**base[room], **values}
    return make_settings(base)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One study with parts, transforms, probes, an optimizer and a foreign network."""
    root = tmp_path_factory.mktemp("study")
    data = write_data(root / "halves.npz")
    made = settings(
        data,
        ["vit", "sinkhorn", "tome:r=2", "gptq-w4", "gmar", "zsharp", "softmax-rejection"],
        measures={
            "ensembles": ["mean", "greedy"],
            "attacks": ["fgsm"],
            "epsilons_255": [4],
            "attack_images": 8,
            "explainers": ["rollout"],
            "explain_images": 4,
            "gallery_images": 2,
            "latency": True,
        },
    )
    out = root / "out"
    return run_study(made, out, command="vitkit study halves.npz"), out, made


def test_everything_that_is_promised_is_written(finished):
    result, out, _ = finished
    assert [r.status for r in result.recipes] == ["ok"] * 7, [r.error for r in result.recipes]
    for name in ("report.html", "results.json", "results.csv", "study.yaml", "study.db"):
        assert (out / name).stat().st_size > 0
    assert read_json(out / "results.json").recipes[0].measures["accuracy"].value is not None
    row = {r.name: r for r in result.recipes}
    assert row["vit"].baseline
    assert row["sinkhorn"].versus_baseline is not None
    assert {"accuracy", "macro_f1", "auroc", "nll", "ece", "robust_accuracy/fgsm"} <= set(row["vit"].measures)
    assert {"params", "flops", "size_bytes", "latency_ms_b1", "latency_ms_b32"} <= set(row["vit"].costs)
    assert row["gptq-w4"].costs["size_bytes"].value < row["vit"].costs["size_bytes"].value
    assert {f.explainer for f in row["gmar"].faithfulness} >= {"rollout", "gmar", "random"}
    assert "coverage/softmax-rejection" in row["softmax-rejection"].measures
    assert [p.id for p in row["sinkhorn"].papers] == ["2504.16275"]
    assert result.gallery is not None
    # the first and the last of the four explained test images
    numbers = [int("".join(filter(str.isdigit, i.key.rpartition("[")[2]))) for i in result.gallery.images]
    assert len(numbers) == 2 and numbers[1] - numbers[0] >= 3
    assert len(result.verdict) == 2
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "vitkit study halves.npz" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_recipes_with_one_model_show_it_once(finished):
    result, out, _ = finished
    row = {r.name: r for r in result.recipes}
    assert row["gmar"].same_model_as == row["softmax-rejection"].same_model_as == "vit"
    assert row["vit"].same_model_as is row["gptq-w4"].same_model_as is row["sinkhorn"].same_model_as is None
    assert row["gmar"].versus_baseline is None
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "gmar and softmax-rejection look at the very model of vit" in page
    assert "Reliability of vit" in page
    assert "Reliability of gmar" not in page


def test_ensembles_are_of_different_models_and_scored_on_the_test_part(finished):
    result, out, _ = finished
    models = ["vit", "sinkhorn", "tome:r=2", "gptq-w4", "zsharp"]
    found = result.ensembles
    assert found.names == models
    assert [(len(t.members), t.combine) for t in found.teams] == [(5, "mean"), (5, "greedy"), *[(2, "mean")] * 5]
    apart = np.array(found.disagreement)
    assert (apart == apart.T).all() and (np.diag(apart) == 0).all()
    assert found.oracle >= max(r.measures["accuracy"].value for r in result.recipes)
    row = {r.name: r for r in result.recipes}
    for team in found.teams:
        best = row[team.best_member].measures["accuracy"].value
        assert team.accuracy.value == pytest.approx(best + team.gain.value)
        assert team.latency_ms_b1 == pytest.approx(sum(row[n].costs["latency_ms_b1"].value for n in team.members))
    assert read_json(out / "results.json").ensembles == found
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="ensembles"' in page and "all 5" in page


def test_recipes_that_share_a_prefix_share_the_work(finished):
    _, out, _ = finished
    rows = sqlite3.connect(out / "study.db").execute("SELECT kind, count(*) FROM stages GROUP BY kind").fetchall()
    # vit, tome, gptq, gmar and softmax-rejection train once together; sinkhorn and zsharp on their own
    assert dict(rows)["train"] == 3
    assert dict(rows)["transform"] == 2


def test_the_second_run_does_nothing_again(finished, monkeypatch):
    result, out, made = finished

    def refuse(*_):
        raise AssertionError("a finished stage was run again")

    monkeypatch.setattr(run_module, "run_stage", refuse)
    again = run_study(made, out)
    assert [r.measures for r in again.recipes] == [r.measures for r in result.recipes]


def test_the_same_command_leaves_the_files_and_anything_missing_is_written_again(finished):
    result, out, made = finished
    report, model = out / "report.html", out / result.recipes[0].model_dir / "model.safetensors"
    run_study(made, out, command="again")
    written = report.stat().st_mtime_ns
    again = run_study(made, out, command="again")
    assert report.stat().st_mtime_ns == written
    assert again == read_json(out / "results.json")
    model.unlink()
    run_study(made, out, command="again")
    assert model.stat().st_size > 0
    assert report.stat().st_mtime_ns > written
    run_study(made, out, command="another")
    assert "another" in report.read_text(encoding="utf-8")


def test_exported_models_answer_like_the_study(finished, tmp_path):
    from vitkit.cli.predict import predict_files

    result, out, _ = finished
    with np.load(out.parent / "halves.npz") as data:
        for i in (0, 1):
            Image.fromarray(data["x"][i]).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"not an image")
    for row in result.recipes:
        rows = predict_files(out / row.model_dir, [tmp_path])
        assert [Path(r["image"]).name for r in rows] == ["0.png", "1.png", "broken.png"]
        assert set(rows[0]["probabilities"]) == {"0", "1"}
        assert abs(sum(rows[0]["probabilities"].values()) - 1) < 1e-5
        assert "error" in rows[2]
    card = (out / "models" / "vit" / "README.md").read_text()
    assert "vitkit predict" in card
    with pytest.raises(BadInput, match="not a model folder"):
        predict_files(tmp_path, [tmp_path])


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_float_images_are_predicted_from_files_as_in_the_study(tmp_path, kind):
    """Hounsfield-like values: each image has another range, black and white are those of the whole set."""
    from vitkit.cli.predict import predict_files

    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = (
        rng.normal(-200, 250, (40, 10, 10)).astype(np.float32)
        + 60 * np.arange(40)[:, None, None] * (labels == 1)[:, None, None]
    )
    folder = tmp_path / "files"
    for i, image in enumerate(images):
        target = folder / str(labels[i]) / f"{i:02d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind == "folder" and i % 4 > 1:
            # beside floats, 8-bit files are resized as floats too
            Image.fromarray(rng.integers(0, 255, (10, 10), np.uint8)).save(target.with_suffix(".png"))
        elif i % 8 > 3:
            Image.fromarray(image).save(target.with_suffix(".tif"))
        else:
            np.save(target.with_suffix(".npy"), image)
    data = folder
    if kind == "npz":
        data = tmp_path / "d.npz"
        np.savez(data, x=images, y=labels)
    out = tmp_path / "out"
    result = run_study(settings(data, ["vit"], data={"image_size": 8}), out)
    (found,) = out.glob("stages/predict-*/predictions.npz")
    with np.load(found) as stage:
        expected = dict(zip(stage["test_indices"].tolist(), stage["test_predictions"]))
    files = sorted(folder.rglob("*.*"), key=lambda f: f.stem if kind == "npz" else str(f))
    model = out / result.recipes[0].model_dir
    rows = predict_files(model, files)
    assert len(expected) >= 8
    for i, probabilities in expected.items():
        np.testing.assert_allclose(list(rows[i]["probabilities"].values()), probabilities, atol=1e-6)
    told = json.loads((model / "preprocessing.json").read_text())
    used = images if kind == "npz" else images[np.arange(40) % 4 < 2]
    assert told["wide"] and told["value_range"] == pytest.approx([used.min(), used.max()])


def test_a_failing_recipe_leaves_the_others_alone(tmp_path):
    data = write_data(tmp_path / "d.npz")
    made = settings(data, ["vit", "qontot", "sinkhorn"])
    result = run_study(made, tmp_path / "out")
    status = {r.name: r.status for r in result.recipes}
    assert status == {"vit": "ok", "qontot": "failed", "sinkhorn": "ok"}
    failed = next(r for r in result.recipes if r.name == "qontot")
    assert "power of two" in failed.error
    assert any((tmp_path / "out" / "logs").iterdir())
    with pytest.raises(VitkitError, match="No recipe finished"):
        run_study(settings(data, ["qontot"]), tmp_path / "none")


def test_seeds_folds_and_their_intervals(tmp_path):
    made = settings(write_data(tmp_path / "d.npz"), ["vit", "sinkhorn"], protocol={"seeds": 2, "folds": 2})
    result = run_study(made, tmp_path / "out")
    accuracy = result.recipes[0].measures["accuracy"]
    assert len(accuracy.per_seed) == 2
    assert result.recipes[1].versus_baseline.test == "paired bootstrap"
    with sqlite3.connect(tmp_path / "out" / "study.db") as db:
        assert db.execute("SELECT count(*) FROM stages WHERE kind = 'train'").fetchone()[0] == 8


def test_budget_cuts_epochs_evenly_says_so_and_stays(tmp_path):
    data = write_data(tmp_path / "d.npz")
    made = settings(data, ["vit", "sinkhorn"], protocol={"epochs": 5000, "budget": "1s"})
    result = run_study(made, tmp_path / "out")
    epochs = result.settings["epochs"]
    assert 1 <= epochs < 5000
    assert any("budget" in note for note in result.settings["notes"])
    again = run_study(made, tmp_path / "out")
    assert again.settings["epochs"] == epochs


@pytest.mark.parametrize("task", ["regress", "multilabel"])
def test_other_tasks(tmp_path, task):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (48, 8, 8)).astype(np.uint8)
    y = images.mean((1, 2)) / 255 if task == "regress" else (images.reshape(48, 2, 4, 8).mean((2, 3)) > 127).astype(int)
    np.savez(tmp_path / "d.npz", x=images, y=y)
    result = run_study(settings(tmp_path / "d.npz", ["vit", "sinkhorn"], data={"task": task}), tmp_path / "out")
    wanted = {"mae", "rmse", "r2"} if task == "regress" else {"macro_f1", "auroc"}
    assert wanted <= set(result.recipes[0].measures)
    assert (tmp_path / "out" / "report.html").exists()


def test_image_smaller_than_a_patch(tmp_path):
    np.savez(
        tmp_path / "d.npz",
        x=np.zeros((20, 1, 40), np.uint8) + np.arange(20, dtype=np.uint8)[:, None, None],
        y=np.arange(20) % 2,
    )
    with pytest.raises(BadInput, match=r"smaller than one 2×2 patch.*--image-size"):
        run_study(settings(tmp_path / "d.npz", ["vit"]), tmp_path / "out")


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_run import settings
from vitkit.study.run import run_study
made = settings(Path({data!r}), ["vit", "sinkhorn", "tome:r=2"], protocol={{"epochs": 6}})
run_study(made, {out!r})
"""


def test_kill_at_any_moment_then_the_same_result(tmp_path):
    """Kill -9 at three moments, start again each time, compare with an undisturbed run."""
    data = write_data(tmp_path / "d.npz", 120)
    made = settings(data, ["vit", "sinkhorn", "tome:r=2"], protocol={"epochs": 6})
    whole = run_study(made, tmp_path / "whole")
    out = tmp_path / "killed"
    code = KILLED.format(tests=str(Path(__file__).parent), data=str(data), out=str(out))
    stages = out / "stages"
    for wanted in (1, 3, 5):
        process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            done = len([p for p in stages.iterdir() if not p.name.startswith("tmp-")]) if stages.exists() else 0
            if done >= wanted:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = run_study(made, out)
    for a, b in zip(whole.recipes, resumed.recipes):
        assert a.name == b.name
        assert {k: v.value for k, v in a.measures.items()} == pytest.approx(
            {k: v.value for k, v in b.measures.items()}, abs=1e-6
        )
    assert json.loads((out / "results.json").read_text())["recipes"][0]["status"] == "ok"


@pytest.mark.slow
def test_two_devices_predict_what_one_predicts(tmp_path):
    """Class weights and sizes that leave a short last batch; the budget's timing starts processes too."""
    data = write_data(tmp_path / "d.npz")
    found = []
    for devices in (1, 2):
        protocol = {"devices": devices, "class_weights": True, "mixup": 0.2, "budget": "1h"}
        run_study(settings(data, ["vit"], protocol=protocol), tmp_path / str(devices))
        (stage,) = (tmp_path / str(devices)).glob("stages/predict-*/predictions.npz")
        with np.load(stage) as arrays:
            found.append(arrays["test_predictions"])
    np.testing.assert_allclose(found[1], found[0], atol=1e-3)


@pytest.mark.slow
def test_on_ray_gives_the_same_table(tmp_path):
    data = write_data(tmp_path / "d.npz")
    made = settings(data, ["vit", "sinkhorn", "tome:r=2"])
    here = run_study(made, tmp_path / "here")
    there = run_study(made, tmp_path / "there", on="ray")
    for a, b in zip(here.recipes, there.recipes):
        assert {k: v.value for k, v in a.measures.items()} == pytest.approx(
            {k: v.value for k, v in b.measures.items()}, abs=1e-5
        )


def test_patients_never_cross_and_are_resampled_whole(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["path,label,group"]
    for i in range(48):
        patient, label = i // 4, (i // 4) % 2
        pixels = (rng.integers(0, 90, (8, 8)) + 140 * label).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{label},p{patient}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    result = run_study(settings(tmp_path / "labels.csv", ["vit", "sinkhorn"]), tmp_path / "out")
    folder = next((tmp_path / "out" / "stages").glob("data-*"))
    with np.load(folder / "folds.npz") as data:
        parts = [set(data["groups"][data[f"{p}_0"]]) for p in ("train", "val", "test")]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    # McNemar's test takes images as independent; with groups the paired bootstrap over groups is used
    assert result.recipes[1].versus_baseline.test == "paired bootstrap"

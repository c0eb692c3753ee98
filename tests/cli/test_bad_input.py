"""What a person can get wrong, end to end: one clear paragraph and exit code 2, or a counted skip in the report."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from vitkit.cli import shell
from vitkit.models.io import ModelConfig, construct, save_model
from vitkit.study import stages
from vitkit.study.results import read_json
from vitkit.study.store import Store
from vitkit.train import checkpoint

runner = CliRunner()

QUICK = {
    "protocol": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
    "recipes": ["vit"],
    "measures": {"attacks": [], "explainers": [], "latency": False, "bootstrap": 200, "gallery_images": 0},
}


def picture(rng, label: int, size: int = 16) -> np.ndarray:
    image = rng.integers(0, 90, (size, size, 3))
    image[:, size // 2 :] += 140 * label
    return image.astype(np.uint8)


def class_folders(root: Path, per_class: int = 20, classes=("cat", "dog"), size: int = 16) -> Path:
    rng = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            Image.fromarray(picture(rng, label, size)).save(root / name / f"{i}.png")
    return root


def arrays(path: Path, **changed) -> Path:
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 2
    images = np.stack([picture(rng, int(y), 8) for y in labels])
    np.savez(path, **{"x": images, "y": labels, **changed})
    return path


def study_file(folder: Path, data: Path | str, **changed) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "data": {"path": str(data)}, **QUICK, **changed}))
    return path


def run_quick(folder: Path, data: Path | str, *flags: str, **changed):
    file = study_file(folder, data, **changed)
    return runner.invoke(shell.app, ["study", str(file), "--out", str(folder / "out"), *flags])


def paragraph(done) -> str:
    """The error, which must be one paragraph on stderr, with exit code 2."""
    assert done.exit_code == shell.EXIT_USER, f"{done.exit_code}: {done.exception!r}\n{done.output}"
    assert isinstance(done.exception, SystemExit), repr(done.exception)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
    assert "Traceback" not in done.output and len(lines[0]) < 900, done.output
    assert lines[0].endswith(".") and ".." not in lines[0].replace("...", ""), lines[0]
    return lines[0]


def says(done, *words: str) -> None:
    text = paragraph(done)
    missing = [w for w in words if w not in text]
    assert not missing, f"{missing} not in: {text}"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        base="vit_pico",
        base_options={"num_classes": 2, "img_size": 8, "patch_size": 4, "in_chans": 3},
        image_size=(8, 8),
        classes=("cat", "dog"),
    )
    save_model(construct(config), config, folder)
    return folder


@pytest.fixture
def model(model_folder, tmp_path) -> Path:
    """A copy to spoil."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(picture(np.random.default_rng(0), 1, 8)).save(path)
    return path


def edit_config(model: Path, **changes) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def bomb() -> bytes:
    """A PNG of a hundred bytes that claims 60000×60000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 8)) + chunk(b"IEND", b"")


def bad_files(folder: Path) -> dict[str, str]:
    """Write one of each; name → a word of the reason."""
    whole = folder / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    (folder / "half.jpg").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    whole.unlink()
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is no image\n")
    (folder / "bomb.png").write_bytes(bomb())
    return {"half.jpg": "truncated", "empty.png": "0 bytes", "text.png": "text", "bomb.png": "decompression bomb"}


# -- image files: counted skips --------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_skipped_counted_and_named_in_the_report(tmp_path):
    data = class_folders(tmp_path / "data")
    reasons = bad_files(data / "cat")
    done = run_quick(tmp_path, data)
    assert done.exit_code == 0, done.output
    result = read_json(tmp_path / "out" / "results.json")
    skipped = {Path(s.path).name: s.reason for s in result.data.skipped}
    assert set(skipped) == set(reasons)
    for name, word in reasons.items():
        assert word in skipped[name]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "4 of 44 images could not be used and were skipped" in page
    assert all(name in page for name in reasons)


def test_predict_names_the_file_that_cannot_be_read_and_goes_on(model, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    reasons = bad_files(folder)
    done = runner.invoke(shell.app, ["predict", str(model), str(folder), str(photo), "--json"])
    assert done.exit_code == 0, done.output
    rows = {Path(r["image"]).name: r for r in json.loads(done.stdout)}
    assert rows["photo.png"]["label"] in ("cat", "dog")
    for name, word in reasons.items():
        assert word in rows[name]["error"]
    assert f"{len(reasons)} of {len(reasons) + 1} files could not be read." in done.stderr
    done = runner.invoke(shell.app, ["predict", str(model), str(folder), str(photo)])
    assert done.exit_code == 0 and all(name in done.stdout for name in reasons)
    assert f"{len(reasons)} of {len(reasons) + 1} files" in done.stderr


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_predict_of_files_of_which_none_can_be_read(model, tmp_path, form):
    folder = tmp_path / "photos"
    folder.mkdir()
    reasons = bad_files(folder)
    done = runner.invoke(shell.app, ["predict", str(model), str(folder), *form])
    first = sorted(reasons)[0]
    says(done, f"None of the {len(reasons)} files could be read", first, reasons[first])
    assert done.stdout == ""
    text = paragraph(runner.invoke(shell.app, ["predict", str(model), str(folder / "text.png"), *form]))
    assert "text.png" in text and "None of" not in text


# -- folders ---------------------------------------------------------------------------------------------------------


def test_an_empty_class_folder(tmp_path):
    data = class_folders(tmp_path / "data")
    (data / "horse").mkdir()
    says(run_quick(tmp_path, data), "'horse'", "Put images in, or remove it")


def test_one_class_only(tmp_path):
    says(run_quick(tmp_path, class_folders(tmp_path / "data", classes=("cat",))), "cat", "class")


def test_a_class_of_which_no_image_can_be_read(tmp_path):
    data = class_folders(tmp_path / "data")
    (data / "horse").mkdir()
    (data / "horse" / "1.png").write_text("no image")
    says(run_quick(tmp_path, data), "'horse'", "Add images, or remove the class")


def test_a_folder_without_class_folders(tmp_path):
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "1.png")
    says(run_quick(tmp_path, tmp_path / "data"), "no class folders", "path and label")


def test_a_folder_that_is_not_there(tmp_path):
    class_folders(tmp_path / "flowers", per_class=1)
    says(run_quick(tmp_path, tmp_path / "flowerz"), "There is no file or folder", "Did you mean", "flowers")


def test_a_folder_without_read_permission(tmp_path, monkeypatch):
    data = class_folders(tmp_path / "data")
    locked = data / "dog"
    real = {"scandir": os.scandir, "listdir": os.listdir}

    def refuse(name):
        def look(path=".", *args):
            if Path(os.fspath(path)) == locked:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real[name](path, *args)

        return look

    # a test that runs as root is let in everywhere, so the refusal is played
    monkeypatch.setattr(os, "scandir", refuse("scandir"))
    monkeypatch.setattr(os, "listdir", refuse("listdir"))
    says(run_quick(tmp_path, data), "dog", "ermission")


def test_images_smaller_than_a_patch(tmp_path):
    data = class_folders(tmp_path / "data", size=1)
    says(run_quick(tmp_path, data), "1×1 pixels, smaller than one", "--image-size")


def test_too_few_images_to_split(tmp_path):
    says(run_quick(tmp_path, class_folders(tmp_path / "data", per_class=1)), "2 images", "more images")


# -- tables ----------------------------------------------------------------------------------------------------------


def table(folder: Path, rows: list[str]) -> Path:
    class_folders(folder / "data")
    path = folder / "data" / "labels.csv"
    path.write_text("\n".join(["path,label", *rows]) + "\n")
    return path


ROWS = [f"{c}/{i}.png,{c}" for c in ("cat", "dog") for i in range(20)]


def test_missing_labels_in_a_table(tmp_path):
    data = table(tmp_path, [*ROWS[:5], "cat/5.png,", *ROWS[6:]])
    says(run_quick(tmp_path, data), "labels.csv", "line 7", "column label", "--unknown skip")


def test_images_without_a_label_are_counted_and_said(tmp_path):
    data = table(tmp_path, [f"{row.split(',')[0]},{-1 if i % 8 == 0 else i % 2}" for i, row in enumerate(ROWS)])
    done = run_quick(tmp_path, data)
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "5 of 40 images could not be used and were skipped (5 of them: its label is −1" in text
    assert "--unknown class" in text
    assert "5 of 40 images" in (tmp_path / "out" / "report.html").read_text()


def test_several_devices_from_the_command_line(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("vitkit.study.run.run_study", lambda made, *_, **__: asked.append(made) or 1 / 0)
    run_quick(tmp_path, arrays(tmp_path / "a.npz"), "--devices", "3", "--unknown", "skip")
    assert (asked[0].protocol.devices, asked[0].data.unknown) == (3, "skip")


def test_a_table_that_names_absent_files_skips_and_counts_them(tmp_path):
    data = table(tmp_path, [*ROWS, "cat/gone.png,cat"])
    done = run_quick(tmp_path, data)
    assert done.exit_code == 0, done.output
    (skip,) = read_json(tmp_path / "out" / "results.json").data.skipped
    assert "gone.png" in skip.path and "line 42 of labels.csv" in skip.reason
    assert "gone.png" in (tmp_path / "out" / "report.html").read_text()


def test_a_table_of_absent_files_only(tmp_path):
    data = table(tmp_path, [r.replace("/", "/no") for r in ROWS])
    says(run_quick(tmp_path, data), "40 of 40 files do not exist", "relative to the table's folder")


def test_a_table_without_a_label_column(tmp_path):
    data = table(tmp_path, [])
    data.write_text("path,kind\ncat/1.png,cat\n")
    says(run_quick(tmp_path, data), "labels.csv", "no column 'label'", "path, kind")


# -- arrays ----------------------------------------------------------------------------------------------------------


def test_nan_in_arrays(tmp_path):
    images = np.random.default_rng(0).random((40, 8, 8), dtype=np.float32)
    images[7, 2, 3] = np.nan
    says(run_quick(tmp_path, arrays(tmp_path / "a.npz", x=images)), "a.npz", "'x'", "image 7", "nan_to_num")


def test_arrays_with_objects_are_refused_and_no_code_is_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    data = arrays(tmp_path / "a.npz", y=np.array([Trap()] * 40, dtype=object))
    says(run_quick(tmp_path, data), "a.npz", "'y'", "pickle", "dtype=")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_called_npz(tmp_path):
    (tmp_path / "a.npz").write_bytes(pickle.dumps({"x": 1}))
    says(run_quick(tmp_path, tmp_path / "a.npz"), "a.npz", "np.savez")


def test_arrays_that_do_not_fit_together(tmp_path):
    says(run_quick(tmp_path, arrays(tmp_path / "a.npz", y=np.arange(39) % 2)), "40 images", "(39,)")


# -- names and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("sinkhornn", ("'sinkhornn'", "Did you mean 'sinkhorn'", "vitkit methods")),
        ("normalizer=sinkhornn", ("'sinkhornn'", "Did you mean 'sinkhorn'")),
        ("sinkhorn:stpes=3", ("'sinkhorn'", "'stpes'", "Did you mean 'steps'", "vitkit show sinkhorn")),
        ("sinkhorn:steps", ("'steps'", "name:key=value")),
        ("sinkhorn:steps=[", ("steps=[", "'steps'")),
        ("mixer=tome", ("tome", "transform")),
        ("vit_pico:depht=2", ("vit_pico", "'depht'", "Did you mean 'depth'")),
        ("vit:depht=2", ("vit_pico", "'depht'", "Did you mean 'depth'")),
    ],
)
def test_an_unknown_recipe_or_option(tmp_path, recipe, words):
    data = arrays(tmp_path / "a.npz")
    says(run_quick(tmp_path, data, "--recipes", f"vit,{recipe}"), *words)
    # found before anything is trained
    assert not list((tmp_path / "out").glob("stages/train*"))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"protocoll": {}}, ("study.yaml line", "'protocoll'", "Did you mean 'protocol'")),
        ({"protocol": {"epoch": 3}}, ("study.yaml line", "'protocol.epoch'", "Did you mean 'epochs'")),
        ({"protocol": {"epochs": 0}}, ("study.yaml line", "protocol.epochs = 0")),
        ({"protocol": {"budget": "soon"}}, ("'soon'", "6m or 1h30m")),
        ({"recipes": [{"name": "a", "part": {}}]}, ("'recipes.0.part'", "Did you mean 'parts'")),
        ({"recipes": [{"name": "a", "parts": {"mixer": "dct-attentoin"}}]}, ("dct-attentoin", "'dct-attention'")),
        ({"recipes": [{"name": "a", "parts": {"normalizer": {"name": "sinkhorn", "options": {"no": 1}}}}]}, ("'no'",)),
        ({"recipes": []}, ("at least one recipe",)),
        ({"measures": {"attacks": ["fgms"]}}, ("fgms", "fgsm")),
        ({"measures": {"explainers": ["rolout"]}}, ("rolout", "rollout")),
    ],
)
def test_a_wrong_study_file(tmp_path, changed, words):
    says(run_quick(tmp_path, arrays(tmp_path / "a.npz"), **changed), *words)
    assert not list((tmp_path / "out").glob("stages/train*"))


@pytest.mark.parametrize("text", ["", "just words", "a: [1", "- 1", "\tname: x", b"\xff\xfe\x00\x01"])
def test_a_study_file_that_is_no_yaml_mapping(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    says(runner.invoke(shell.app, ["study", str(path), "--out", str(tmp_path / "out")]), "study.yaml")


def test_a_study_file_that_is_a_folder_or_absent(tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for name in ("folder.yaml", "absent.yaml"):
        says(runner.invoke(shell.app, ["study", str(tmp_path / name), "--out", str(tmp_path / "out")]), name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--budget", "soon"), ("'soon'", "6m or 1h30m")),
        (("--task", "sort"), ("task", "'sort'", "classify")),
        (("--on", "mars"), ("'mars'", "here")),
        (("--lr", "-1"), ("lr", "-1")),
        (("--unknown", "maybe"), ("unknown", "'maybe'", "skip", "class")),
    ],
)
def test_a_wrong_value_of_a_flag(tmp_path, flags, words):
    says(run_quick(tmp_path, arrays(tmp_path / "a.npz"), *flags), *words)
    assert not list((tmp_path / "out").glob("stages/train*"))


@pytest.mark.parametrize("flags", [("--epocs", "3"), ("--epochs", "many"), ("--epochs", "0"), ("--devices", "0")])
def test_a_wrong_flag_is_a_usage_error(tmp_path, flags):
    done = run_quick(tmp_path, arrays(tmp_path / "a.npz"), *flags)
    assert done.exit_code == 2 and flags[0] in done.stderr and "Traceback" not in done.output


def test_restart_leaves_a_folder_that_is_no_study_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("three years")
    says(run_quick(tmp_path, arrays(tmp_path / "a.npz"), "--restart"), "out", "will not delete")
    assert (tmp_path / "out" / "thesis.txt").exists()


# -- the folder of the study -----------------------------------------------------------------------------------------


def test_two_studies_in_one_folder(tmp_path):
    with Store(tmp_path / "out"):
        says(run_quick(tmp_path, arrays(tmp_path / "a.npz")), "Another study is running", str(os.getpid()), "--out")
        says(run_quick(tmp_path, arrays(tmp_path / "a.npz"), "--restart"), "Another study is running")
        assert (tmp_path / "out" / "study.db").exists()


def test_an_out_that_is_a_file(tmp_path):
    (tmp_path / "out").write_text("not a folder")
    says(run_quick(tmp_path, arrays(tmp_path / "a.npz")), "out", "--out")
    assert (tmp_path / "out").read_text() == "not a folder"


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_writing_a_checkpoint_and_going_on_after_it(tmp_path, monkeypatch):
    data = arrays(tmp_path / "a.npz")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", full)
        says(run_quick(tmp_path, data), "No space left on device", "checkpoint", "free some space")
    assert not list((tmp_path / "out").glob("work/*/ckpt-*")) and not list((tmp_path / "out").glob("stages/tmp-*"))
    assert run_quick(tmp_path, data).exit_code == 0


@pytest.mark.parametrize("where", ["savez", "write_text"])
def test_a_full_disk_while_the_data_are_written_down(tmp_path, monkeypatch, where):
    target, name = (np, "savez") if where == "savez" else (stages, "write_text")
    data = arrays(tmp_path / "a.npz")
    monkeypatch.setattr(target, name, full)
    says(run_quick(tmp_path, data), "No space left on device", str(tmp_path / "out"), "ree some space")
    assert not list((tmp_path / "out").glob("stages/*"))


def test_a_full_disk_while_a_model_is_saved(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from vitkit.models import io

    def refuse(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(io, "save_file", refuse)
    says(run_quick(tmp_path, arrays(tmp_path / "a.npz")), "No space left", "model.safetensors", "ree some space")


# -- models ----------------------------------------------------------------------------------------------------------


def predict(model: Path, *images: Path):
    return runner.invoke(shell.app, ["predict", str(model), *map(str, images)])


def test_a_model_folder_works(model, photo):
    done = predict(model, photo)
    assert done.exit_code == 0 and "cat" in done.stdout


def test_predict_of_what_is_not_there(model, photo, tmp_path):
    says(predict(tmp_path / "nowhere", photo), "nowhere", "config.json")
    says(predict(model, tmp_path / "absent.png"), "absent.png")
    says(predict(photo, photo), "photo.png")


def test_predict_of_a_folder_without_images(model, tmp_path):
    (tmp_path / "none").mkdir()
    says(predict(model, tmp_path / "none"), "none", "image")


def test_a_pickle_offered_as_weights(model, photo, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Trap()}, model / "model.safetensors")
    says(predict(model, photo), "model.safetensors", "pickle", "run code", ".safetensors")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    says(predict(model, photo), "no model.safetensors", "pytorch_model.bin", "pickle")
    assert not (tmp_path / "ran").exists()


def test_damaged_weights(model, photo):
    whole = (model / "model.safetensors").read_bytes()
    for spoilt in (b"", whole[:5], whole[: len(whole) // 2]):
        (model / "model.safetensors").write_bytes(spoilt)
        says(predict(model, photo), "model.safetensors", "damaged")


def test_a_checkpoint_of_another_shape(model, photo):
    edit_config(model, base_options={"num_classes": 5, "img_size": 8, "patch_size": 4, "in_chans": 3})
    says(predict(model, photo), "model.safetensors", "head", "(2,", "(5,")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 99}, ("config.json", "format 99", "upgrade vitkit")),
        ({"format": "new"}, ("config.json", "format", "'new'")),
        ({"colour": "blue"}, ("config.json", "unknown keys: colour")),
        ({"base": "vit_picco"}, ("config.json", "vit_picco", "vit_pico")),
        ({"base": None}, ("config.json", "base")),
        ({"base_options": {"no_such": 1}}, ("config.json", "no_such")),
        ({"parts": [{"slot": "mixer", "part": "no-such", "options": {}}]}, ("config.json", "no-such")),
        ({"parts": [{"slot": "mixer"}]}, ("config.json", "part")),
        ({"applied": [{"name": "no-such"}]}, ("no-such", "upgrade vitkit")),
        ({"mean": 3}, ("config.json", "mean", "list")),
        ({"value_range": [3]}, ("config.json", "value_range", "[3]", "two rising numbers")),
        ({"value_range": [1, 0]}, ("config.json", "value_range", "two rising numbers")),
    ],
)
def test_a_config_that_was_edited(model, photo, changes, words):
    edit_config(model, **changes)
    says(predict(model, photo), *words)


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", b"\xff\xfe"])
def test_a_config_that_is_no_config(model, photo, text):
    (model / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    says(predict(model, photo), "config.json")


# -- --debug ---------------------------------------------------------------------------------------------------------


def test_debug_shows_where_it_happened(tmp_path, monkeypatch):
    file = study_file(tmp_path, tmp_path / "absent")
    monkeypatch.setattr(sys, "argv", ["vitkit", "study", str(file), "--debug"])
    with pytest.raises(ValueError, match="There is no file or folder"):
        shell.main()

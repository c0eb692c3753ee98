"""Every kind of source, read right; every kind of bad input, answered in one paragraph or skipped and counted."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitkit.data import check, open_source, split
from vitkit.data.tree import FolderTree
from vitkit.errors import BadInput, MissingExtra, VitkitError


def picture(seed: int, size: tuple[int, int] = (12, 10), chans: int = 3) -> Image.Image:
    data = np.random.default_rng(seed).integers(0, 256, (*size, chans), dtype=np.uint8)
    return Image.fromarray(data[..., 0] if chans == 1 else data)


def make_folder(root: Path, layout: dict[str, int], ending: str = "png") -> Path:
    for n, (folder, count) in enumerate(layout.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(100 * n + i).save(root / folder / f"im{i}.{ending}")
    return root


def zipped(folder: Path, target: Path, below: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path(below) / path.relative_to(folder))
    return target


def one_paragraph(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text and "Traceback" not in text
    return text


def keys(source) -> list[str]:
    return [r.key for r in source.records]


# -- what works ------------------------------------------------------------------------------------------------------


def test_digits():
    source = open_source("digits")
    assert (len(source), source.task, source.num_outputs) == (1797, "classify", 10)
    assert source.classes == tuple("0123456789") and not source.mirror
    image = source.read(0)
    assert image.shape == (8, 8, 1) and image.dtype == np.uint8
    assert max(source.read(i).max() for i in range(50)) == 255
    assert (source.in_chans, source.image_size, source.wide) == (1, (8, 8), False)


def test_class_folders_in_natural_order(tmp_path):
    source = open_source(make_folder(tmp_path, {"img10": 2, "img9": 3, "Img1": 1}))
    assert source.classes == ("Img1", "img9", "img10")
    assert source.labels().tolist() == [0, 1, 1, 1, 2, 2]
    assert {r.split for r in source.records} == {None}
    np.testing.assert_array_equal(source.read(1), np.asarray(picture(100)))
    assert (source.in_chans, source.image_size, len(source)) == (3, (12, 10), 6)


def test_given_splits_and_a_folder_around(tmp_path):
    make_folder(tmp_path / "nested" / "set", {"train/a": 2, "train/b": 2, "Test/a": 1, "Test/b": 1, "valid/b": 1})
    (tmp_path / "nested" / "README.txt").write_text("hello")
    source = open_source(tmp_path)
    assert [r.split for r in source.records] == ["test", "test", "train", "train", "train", "train", "val"]
    assert source.classes == ("a", "b")


def test_a_class_may_be_called_test(tmp_path):
    source = open_source(make_folder(tmp_path, {"test": 2, "control": 2}))
    assert source.classes == ("control", "test") and source.records[0].split is None


def test_zip_reads_as_the_folder_does(tmp_path):
    folder = make_folder(tmp_path / "f", {"a": 2, "b/deeper": 2})
    plain = open_source(folder)
    archived = open_source(zipped(folder, tmp_path / "x.zip", below="top/inner"))
    assert archived.classes == plain.classes and len(archived) == 4
    for i in range(4):
        np.testing.assert_array_equal(archived.read(i), plain.read(i))


def test_sources_survive_pickling_for_worker_processes(tmp_path):
    folder = make_folder(tmp_path / "f", {"a": 2, "b": 2})
    for target in (folder, zipped(folder, tmp_path / "x.zip"), "digits"):
        source = open_source(target)
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(copy.read(3), source.read(3))
        assert copy.fingerprint == source.fingerprint


def test_table_with_everything(tmp_path):
    make_folder(tmp_path, {"pictures": 4})
    rows = ["path,label,patient_id,split,weight"]
    rows += [f"pictures/im{i}.png,{'ab'[i % 2]},p{i // 2},{'train' if i < 3 else 'TEST'},{i + 0.5}" for i in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    source = open_source(tmp_path / "t.csv")
    assert keys(source) == [f"pictures/im{i}.png" for i in range(4)]
    assert source.labels().tolist() == [0, 1, 0, 1]
    last = source.records[-1]
    assert (last.group, last.split, last.weight) == ("p1", "test", 3.5)


def test_table_inside_a_zip_finds_files_by_name(tmp_path):
    make_folder(tmp_path / "f", {"images": 4})
    (tmp_path / "f" / "metadata.csv").write_text("file,label\n" + "\n".join(f"im{i}.png,{i % 2}" for i in range(4)))
    source = open_source(zipped(tmp_path / "f", tmp_path / "x.zip", below="top"))
    assert len(source) == 4 and source.classes == ("0", "1")
    assert keys(open_source(tmp_path / "f")) == keys(source)


@pytest.mark.parametrize("ending", ["tsv", "csv;", "parquet"])
def test_other_tables(tmp_path, ending):
    make_folder(tmp_path, {"i": 4})
    columns = {"image": [f"i/im{i}.png" for i in range(4)], "target": ["x", "y", "x", "y"]}
    if ending == "parquet":
        pandas = pytest.importorskip("pandas")
        path = tmp_path / "t.parquet"
        pandas.DataFrame(columns).to_parquet(path)
    else:
        path = tmp_path / f"t.{ending.rstrip(';')}"
        mark = ";" if ending.endswith(";") else "\t"
        path.write_text("\n".join(mark.join(r) for r in [tuple(columns), *zip(*columns.values())]))
    assert open_source(path).labels().tolist() == [0, 1, 0, 1]


def table(tmp_path: Path, header: str, labels: list[str]) -> Path:
    make_folder(tmp_path, {"i": len(labels)})
    (tmp_path / "t.csv").write_text("\n".join([header, *(f"i/im{i}.png,{v}" for i, v in enumerate(labels))]))
    return tmp_path / "t.csv"


def test_multilabel_by_semicolons(tmp_path):
    source = open_source(table(tmp_path, "path,label", ["a;b", "c", "none", "b ; a"]))
    assert (source.task, source.classes) == ("multilabel", ("a", "b", "c"))
    assert source.labels().tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert source.label_names(0) == "a;b"


def test_multilabel_by_columns(tmp_path):
    source = open_source(table(tmp_path, "path,label_cat,label_dog", ["1,0", "1,1", "0,0"]))
    assert (source.task, source.classes, source.labels()[1].tolist()) == ("multilabel", ("cat", "dog"), [1, 1])


def test_regression(tmp_path):
    path = table(tmp_path, "path,label", ["1", "2", "10"])
    assert open_source(path).task == "classify"
    source = open_source(path, task="regress")
    assert (source.task, source.num_outputs, source.labels().tolist()) == ("regress", 1, [1, 2, 10])
    assert source.labels().dtype == np.float32
    path.write_text("path,x,y\n" + "\n".join(f"i/im{i}.png,{i}.5,-{i}" for i in range(3)))
    several = open_source(path, label_column="x,y")
    assert (several.task, several.classes, several.labels().shape) == ("regress", ("x", "y"), (3, 2))


def test_class_folders_named_by_numbers_can_be_regressed(tmp_path):
    source = open_source(make_folder(tmp_path, {"1.5": 1, "20": 2}), task="regress")
    assert source.labels().tolist() == [1.5, 20, 20] and source.classes == ("target",)
    with pytest.raises(BadInput, match="class 'b'"):
        open_source(make_folder(tmp_path / "x", {"1": 1, "b": 1}), task="regress")


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


X = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)
Y = np.array([0, 1, 0, 1, 0, 1])


def test_npz_layouts(tmp_path):
    source = open_source(
        npz(tmp_path / "a.npz", x_train=X, y_train=Y, x_test=X[:2], y_test=Y[:2], classes=["cat", "dog"])
    )
    assert source.classes == ("cat", "dog") and [r.split for r in source.records] == ["train"] * 6 + ["test"] * 2
    np.testing.assert_array_equal(source.read(7), X[1])
    first = npz(tmp_path / "b.npz", images=np.random.default_rng(0).integers(0, 255, (6, 5, 9, 8), np.uint8), labels=Y)
    assert open_source(first).in_chans == 5
    medmnist = npz(
        tmp_path / "c.npz", train_images=X[..., 0], train_labels=Y[:, None], val_images=X[..., 0], val_labels=Y[:, None]
    )
    assert open_source(medmnist).labels().tolist() == [*Y, *Y]


@pytest.mark.parametrize(
    ("labels", "task", "classes"),
    [
        (np.array([5, 9, 5, 9, 7, 5]), "classify", ("5", "7", "9")),
        (np.array(["b", "a10", "a9", "b", "b", "a9"]), "classify", ("a9", "a10", "b")),
        (np.eye(3)[[0, 1, 2, 0, 1, 2]], "classify", ("0", "1", "2")),
        (np.array([[1, 1], [0, 1], [1, 0], [0, 0], [1, 1], [1, 0]]), "multilabel", ("0", "1")),
        (np.linspace(0, 1, 6), "regress", ("target",)),
        (np.random.default_rng(0).random((6, 2)), "regress", ("0", "1")),
    ],
)
def test_npz_labels(tmp_path, labels, task, classes):
    source = open_source(npz(tmp_path / "a.npz", x=X, y=labels))
    assert (source.task, source.classes) == (task, classes)
    if labels.ndim == 1 and labels.dtype.kind in "iU":
        assert [source.label_names(i) for i in range(6)] == [str(v) for v in labels]


def test_float_and_16_bit_arrays_keep_their_precision(tmp_path):
    wide = open_source(npz(tmp_path / "a.npz", x=(X.astype(np.uint16) * 200)[..., 0], y=Y))
    assert wide.wide and wide.read(0).dtype == np.uint16
    floats = open_source(npz(tmp_path / "b.npz", x=X[..., 0].astype(float) * 20 - 1000, y=Y))
    assert floats.wide and floats.unit_range == (int(X[..., 0].min()) * 20 - 1000, int(X[..., 0].max()) * 20 - 1000)


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def test_idx_files(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(X[..., 0]))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(Y))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(X[:2, ..., 0])))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(Y[:2])))
    source = open_source(tmp_path)
    assert sorted({r.split for r in source.records}) == ["test", "train"] and len(source) == 8
    train = [i for i, r in enumerate(source.records) if r.split == "train"]
    np.testing.assert_array_equal(source.read(train[3])[..., 0], X[3, ..., 0])
    assert not source.mirror
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(Y)[:-1])
    with pytest.raises(BadInput, match=r"train-labels-idx1-ubyte has 5 bytes of content where its header says 6"):
        open_source(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(BadInput, match="no labels beside it"):
        open_source(tmp_path)


def test_n_channel_images(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "1.npy", np.random.default_rng(1).random((13, 20, 30)).astype(np.float32))
    source = open_source(tmp_path)
    assert (source.in_chans, source.image_size, source.wide, source.unit_range) == (13, (20, 30), True, (0, 1))


def test_fingerprint_is_stable_and_follows_the_content(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2})
    first = open_source(tmp_path).fingerprint
    assert open_source(tmp_path).fingerprint == first
    copied = Path(shutil.copytree(tmp_path, tmp_path.parent / "copied"))  # copytree keeps the times
    assert open_source(copied).fingerprint == first
    picture(99, (13, 10)).save(tmp_path / "a" / "im0.png")
    changed = open_source(tmp_path).fingerprint
    assert changed != first
    (tmp_path / "a" / "im1.png").unlink()
    assert open_source(tmp_path).fingerprint not in (first, changed)
    assert open_source("digits").fingerprint == open_source("digits").fingerprint


def test_the_check_of_all_images_is_remembered(tmp_path, monkeypatch):
    make_folder(tmp_path / "d", {"a": 2, "b": 2})
    (tmp_path / "d" / "a" / "bad.png").write_bytes(b"")
    seen: list[tuple[str, int, int]] = []
    first = open_source(tmp_path / "d", memory=tmp_path / "seen.npz", progress=lambda *p: seen.append(p))
    assert seen[-1] == ("check images", 5, 5)
    monkeypatch.setattr("vitkit.data.open.look", lambda *a: pytest.fail("looked again"))
    again = open_source(tmp_path / "d", memory=tmp_path / "seen.npz")
    assert again.skipped == first.skipped and len(again.skipped) == 1
    assert keys(again) == keys(first)
    np.testing.assert_array_equal(again.looks().hashes, first.looks().hashes)
    content = (tmp_path / "seen.npz").read_bytes()
    (tmp_path / "seen.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(VitkitError, match="seen.npz is damaged.*delete it"):
        open_source(tmp_path / "d", memory=tmp_path / "seen.npz")


# -- bad input -------------------------------------------------------------------------------------------------------


def test_unreadable_files_are_skipped_and_counted(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a": 3, "b": 3})
    jpeg = io.BytesIO()
    picture(1, (200, 200)).save(jpeg, "JPEG")
    bad = {
        "a/empty.png": b"",
        "a/half.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "b/text.png": b"this is a shopping list\n",
        "b/bomb.png": None,
        "b/locked.png": jpeg.getvalue(),
        "a/photo.heic": b"....",
    }
    for name, data in bad.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "b" / "bomb.png")
    read = FolderTree.read

    def locked(self, path):
        if path.endswith("locked.png"):
            raise PermissionError(13, "Permission denied", path)
        return read(self, path)

    monkeypatch.setattr(FolderTree, "read", locked)
    source = open_source(tmp_path)
    assert len(source) == 6
    reasons = {s.key: s.reason for s in source.skipped}
    assert reasons.keys() == bad.keys()
    for key, word in [
        ("a/empty.png", "0 bytes"),
        ("a/half.jpg", "too early"),
        ("b/text.png", "text"),
        ("b/bomb.png", "bomb"),
        ("b/locked.png", "Permission denied"),
        ("a/photo.heic", ".heic"),
    ]:
        assert word in reasons[key], (key, reasons[key])


def test_a_damaged_zip_entry_is_skipped(tmp_path):
    folder = make_folder(tmp_path / "f", {"a": 2, "b": 2})
    path = zipped(folder, tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    start = data.index((folder / "a" / "im0.png").read_bytes()[:64])
    data[start + 70] ^= 0xFF
    path.write_bytes(bytes(data))
    source = open_source(path)
    assert [s.key for s in source.skipped] == ["a/im0.png"] and "damaged" in source.skipped[0].reason
    path.write_bytes(bytes(data[:100]))
    with pytest.raises(BadInput, match="zip archive"):
        open_source(path)


def test_an_image_of_other_channels_is_skipped(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 3})
    np.save(tmp_path / "a" / "tile.npy", np.zeros((20, 20, 13), np.uint8))
    assert [(s.key, s.reason) for s in open_source(tmp_path).skipped] == [
        ("a/tile.npy", "it has 13 channels where the others have 3")
    ]


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"a": 2, "b": 0}, r"without images: 'b'\. Put images in, or remove it"),
        ({"train/a": 2, "train/b": 2, "train/c": 0}, "'c'"),
        ({"a": 2}, "only one class \\('a'\\)"),
        ({"train/a": 2, "test/a": 2}, "only one class"),
        ({}, "holds no images"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, layout, says):
    make_folder(tmp_path, layout)
    with pytest.raises(BadInput, match=says) as caught:
        open_source(tmp_path)
    assert str(tmp_path) in one_paragraph(caught.value)


def test_images_without_class_folders(tmp_path):
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="1 images but no class folders"):
        open_source(tmp_path)


def test_a_class_of_unreadable_images_only(tmp_path):
    make_folder(tmp_path, {"a": 2, "b": 2, "c": 0})
    (tmp_path / "c" / "x.jpg").write_bytes(b"")
    with pytest.raises(BadInput, match="no usable image of class 'c'"):
        open_source(tmp_path)


def test_a_folder_without_read_permission(tmp_path, monkeypatch):
    make_folder(tmp_path, {"a": 2, "b": 2})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInput, match=r"b cannot be read: Permission denied.*chmod") as caught:
        open_source(tmp_path)
    one_paragraph(caught.value)


def test_names_that_do_not_exist(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="Did you mean 'digits'"):
        open_source("digts")
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="Did you mean 'photos'"):
        open_source("photo")
    (tmp_path / "model.pkl").write_bytes(b"x")
    with pytest.raises(BadInput, match="holds no labelled images"):
        open_source("model.pkl")
    with pytest.raises(BadInput, match="task='segment' is unknown"):
        open_source("digits", task="segment")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "task", "says"),
    [
        (
            "path,label\ni/im0.png,a\ni/im1.png,\ni/im2.png,\n",
            None,
            r"label is missing in line 3, line 4 \(2 of 3 rows\)",
        ),
        ("file,label\n", None, "no rows"),
        ("", None, "empty"),
        ("name,kind\ni/im0.png,a\n", None, "no column 'path'; its columns are name, kind"),
        ("path,kind\ni/im0.png,a\n", None, "no column 'label'"),
        ("path,label\ni/im0.png,a,b\n", None, "another number of cells is in line 2"),
        ("path,label\ni/im0.png,a\ni/im1.png,a\n", None, "only one class"),
        ("path,label\ni/im0.png,1.5\ni/im1.png,big\n", "regress", r"none in line 3 \('big'\)"),
        ("path,label\ni/im0.png,1\ni/im1.png,nan\n", "regress", "line 3"),
        ("path,label\ni/im0.png,a\ni/im0.png,b\n", None, "different labels in line 2 and line 3"),
        ("path,label,split\ni/im0.png,a,train\ni/im1.png,b,holdout\n", None, r"line 3 \('holdout'\)"),
        ("path,label,weight\ni/im0.png,a,1\ni/im1.png,b,-2\n", None, "line 3"),
        ("path,label,group\ni/im0.png,a,1\ni/im1.png,b,\n", None, "'group' is empty in line 3"),
        ("path,label\n,a\ni/im1.png,b\n", None, "path is missing in line 2"),
        ("path,label_a,label_b\ni/im0.png,1,0\ni/im1.png,2,x\n", "multilabel", "0 or 1; something else is in line 3"),
        ("path,label_a,label_b\ni/im0.png,1,0\n", "classify", "takes one"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, task, says):
    make_folder(tmp_path, {"i": 3})
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BadInput, match=says) as caught:
        open_source(tmp_path / "t.csv", task=task)
    assert "t.csv" in one_paragraph(caught.value)


def test_tables_that_are_not_text(tmp_path):
    (tmp_path / "t.csv").write_bytes("path,label\nKäse.png,1".encode("latin-1"))
    with pytest.raises(BadInput, match="not UTF-8"):
        open_source(tmp_path / "t.csv")
    (tmp_path / "t.parquet").write_bytes(b"path,label\n")
    with pytest.raises(BadInput, match="no readable Parquet"):
        open_source(tmp_path / "t.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r'pip install "vitkit\[tables\]"'):
        open_source(tmp_path / "t.parquet")


def test_absent_files_are_counted_or_too_many(tmp_path):
    path = table(tmp_path, "path,label", ["a", "b", "a", "b", "a"])
    (tmp_path / "i" / "im4.png").unlink()
    source = open_source(path)
    assert len(source) == 4
    assert [(s.key, s.reason) for s in source.skipped] == [("i/im4.png", "there is no such file (line 6 of t.csv)")]
    for i in (2, 3):
        (tmp_path / "i" / f"im{i}.png").unlink()
    with pytest.raises(BadInput, match="3 of 5 files do not exist, such as i/im2.png") as caught:
        open_source(path)
    assert str(tmp_path) in one_paragraph(caught.value)


def test_a_row_said_twice_is_skipped(tmp_path):
    path = table(tmp_path, "path,label", ["a", "b"])
    path.write_text(path.read_text() + "\ni/im0.png,a\n")
    assert "listed again" in open_source(path).skipped[0].reason


# -- labels that are not known ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["-1", "-1.0", " -1"])
def test_minus_one_among_class_numbers_is_no_class(tmp_path, word):
    path = table(tmp_path, "path,label", ["0", "1", word, "1", "0", word])
    source = open_source(path)
    assert source.classes == ("0", "1") and source.labels().tolist() == [0, 1, 1, 0]
    assert keys(source) == [f"i/im{i}.png" for i in (0, 1, 3, 4)]
    assert [s.key for s in source.skipped] == ["i/im2.png", "i/im5.png"]
    assert "not labelled" in source.skipped[0].reason
    (warning,) = [w for w in check(source, split(source, val=0, test=0.5)).warnings if "skipped" in w]
    assert "2 of 6 images" in warning and "2 of them: its label is −1" in warning
    three = open_source(path, unknown="class")
    assert len(three.classes) == 3 and not three.skipped
    assert open_source(path, task="regress").labels().tolist() == [0, 1, -1, 1, 0, -1]


@pytest.mark.parametrize("cells", [["-1", "1", "-1", "1"], ["-2", "-1", "0", "1"], ["-1", "0", "a", "b"]])
def test_minus_one_may_be_a_class_like_others(tmp_path, cells):
    source = open_source(table(tmp_path, "path,label", cells))
    assert set(source.classes) == set(cells) and not source.skipped


def test_empty_labels_can_be_left_out(tmp_path):
    path = table(tmp_path, "path,label", ["a", "", "b", "NaN", "a", "b"])
    with pytest.raises(BadInput, match=r'line 3, line 5 \(2 of 6 rows\).*unknown="skip"'):
        open_source(path)
    source = open_source(path, unknown="skip")
    assert source.classes == ("a", "b") and len(source) == 4
    assert [(s.key, s.reason) for s in source.skipped] == [
        ("i/im1.png", "its label is empty"),
        ("i/im3.png", "its label is empty"),
    ]


def test_uncertain_findings_are_refused_until_something_is_said(tmp_path):
    """The coding of CheXpert: 1 present, 0 absent, −1 uncertain, empty not mentioned."""
    path = table(tmp_path, "path,label_edema,label_fracture", ["1,0", "-1,1", "0,", "0,1"])
    with pytest.raises(BadInput, match='label is missing in line 4.*unknown="absent"'):
        open_source(path)
    absent, present = open_source(path, unknown="absent"), open_source(path, unknown="present")
    assert absent.task == present.task == "multilabel" and absent.classes == ("edema", "fracture")
    assert absent.labels().tolist() == [[1, 0], [0, 1], [0, 0], [0, 1]]
    assert present.labels().tolist() == [[1, 0], [1, 1], [0, 0], [0, 1]]
    skip = open_source(path, unknown="skip")
    assert keys(skip) == ["i/im0.png", "i/im3.png"] and len(skip.skipped) == 2
    full = table(tmp_path, "path,label_edema,label_fracture", ["1,0", "-1,1", "0,-1"])
    for unknown in (None, "class"):
        with pytest.raises(BadInput, match=r"2 labels are −1 \(line 3, line 4\).*unknown=\"present\"") as caught:
            open_source(full, unknown=unknown)
        assert "t.csv" in one_paragraph(caught.value)
    assert open_source(full, task="regress").labels().tolist() == [[1, 0], [-1, 1], [0, -1]]


def test_words_for_unknown_labels_must_suit(tmp_path):
    path = table(tmp_path, "path,label", ["0", "1", "-1"])
    with pytest.raises(BadInput, match="unknown='absent' is for columns of 0 and 1"):
        open_source(path, unknown="absent")
    with pytest.raises(BadInput, match="unknown='drop' is not known; it is one of skip, absent, present, class"):
        open_source(path, unknown="drop")  # type: ignore[arg-type]
    assert open_source(table(tmp_path, "path,label", ["a;b", "", "b"]), unknown="absent").labels()[1].tolist() == [0, 0]


def test_unknown_labels_in_arrays(tmp_path):
    y = np.array([0, 1, -1, 1, 0, -1])
    source = open_source(npz(tmp_path / "a.npz", x=X, y=y, group=np.arange(6)))
    assert source.classes == ("0", "1") and keys(source) == ["x[0]", "x[1]", "x[3]", "x[4]"]
    np.testing.assert_array_equal(source.read(2), X[3])
    assert source.records[3].group == "4" and len(source.skipped) == 2
    named = open_source(npz(tmp_path / "n.npz", x=X, y=y, classes=["no", "yes"]))
    assert named.classes == ("no", "yes") and len(named) == 4
    gaps = open_source(npz(tmp_path / "g.npz", x=X, y=np.array([0, 1, np.nan, 1, 0, 1.0])), unknown="skip")
    assert len(gaps) == 5 and "missing" in gaps.skipped[0].reason
    matrix = npz(tmp_path / "m.npz", x=X, y=np.array([[1, 0], [-1, 1], [0, 1], [1, 1], [0, 0], [1, -1]]))
    with pytest.raises(BadInput, match=r"2 labels are −1 \(x\[1\], x\[5\]\)"):
        open_source(matrix)
    assert open_source(matrix, unknown="present").labels()[[1, 5]].tolist() == [[1, 1], [1, 1]]
    assert len(open_source(matrix, unknown="skip")) == 4
    assert open_source(matrix, task="regress").task == "regress"


def test_x_rays_of_which_some_are_not_labelled(shared_data):
    source = open_source(shared_data / "chest_xray.zip")
    assert (source.classes, len(source), len(source.skipped)) == (("0", "1"), 188, 31)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        (
            {"x": np.where(np.arange(6)[:, None, None] == 3, np.nan, np.ones((6, 5, 5))), "y": Y},
            r"'x' has NaN.* image 3",
        ),
        ({"x": X, "y": np.array([0, 1, np.nan, 1, 0, 1.0])}, r"missing \(NaN or infinite\) for x\[2\]"),
        ({"x": X, "y": np.array(["a", "", "b", "a", "b", "a"])}, r"label is missing for x\[1\]"),
        ({"x": X, "y": Y[:4]}, "6 images, its labels have the shape \\(4,\\)"),
        ({"x": X, "y": np.zeros(6, int)}, "only one class \\('0'\\)"),
        ({"x_train": X}, "'x_train' but not its labels 'y_train'"),
        ({"a": X, "b": Y}, "has the keys a, b"),
        ({"x": X.reshape(6, -1), "y": Y}, "shape \\(6, 60\\)"),
        ({"x": X, "y": Y * 7, "classes": ["cat", "dog"]}, r"labels go from 0 to 1 .*x\[1\] \(7\)"),
        ({"x": X, "y": Y, "classes": ["cat", "dog", "cow"]}, "no usable image of class 'cow'"),
        ({"x": X.astype("U"), "y": Y}, "not pixel values"),
        ({"x": X[:0], "y": Y[:0]}, "no images"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, arrays, says):
    with pytest.raises(BadInput, match=says) as caught:
        open_source(npz(tmp_path / "a.npz", **arrays))
    assert "a.npz" in one_paragraph(caught.value)


def test_pickles_are_refused(tmp_path):
    with pytest.raises(BadInput, match="'y' holds Python objects"):
        open_source(npz(tmp_path / "a.npz", x=X, y=np.array([{"a": 1}] * 6, dtype=object)))
    (tmp_path / "b.npz").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(BadInput, match="b.npz is no .npz"):
        open_source(tmp_path / "b.npz")
    data = npz(tmp_path / "c.npz", x=X, y=Y).read_bytes()
    (tmp_path / "c.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="c.npz"):
        open_source(tmp_path / "c.npz")


def test_a_file_that_vanishes_later_is_named(tmp_path):
    source = open_source(make_folder(tmp_path, {"a": 2, "b": 2}))
    (tmp_path / "a" / "im0.png").unlink()
    with pytest.raises(BadInput, match="a/im0.png of .* cannot be opened any more"):
        source.read(0)


def test_natural_photographs(shared_data):
    source = open_source(shared_data / "clothing.zip")
    assert (len(source), source.num_outputs, source.in_chans, source.skipped) == (744, 10, 3, [])
    xray = open_source(shared_data / "chest_xray.zip", unknown="class")
    assert len(xray) == 219 and len({r.group for r in xray.records}) == 129

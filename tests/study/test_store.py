from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys

import pytest

from vitkit.errors import VitkitError
from vitkit.study.plan import Stage
from vitkit.study.store import StageFolder, Store


def finish(root, key="train-1", text="weights"):
    with StageFolder(root, key) as folder:
        (folder.temporary / "out.txt").write_text(text)
        folder.publish({"key": key, "kind": "train", "title": "t", "settings": {}, "seconds": 1.0, "finished": 2.0})


def test_a_stage_is_finished_or_absent(tmp_path):
    with Store(tmp_path) as store:
        assert not store.has("train-1")
        with pytest.raises(RuntimeError), StageFolder(tmp_path, "train-1") as folder:
            (folder.temporary / "half.txt").write_text("half")
            raise RuntimeError
        assert list((tmp_path / "stages").iterdir()) == []
        finish(tmp_path)
        store.finished("train-1")
        assert store.has("train-1")
        assert store.note("train-1")["seconds"] == 1.0
        finish(tmp_path, text="the same again")
        assert (store.folder("train-1") / "out.txt").read_text() == "weights"


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    with Store(tmp_path):
        pass
    (tmp_path / "stages" / "tmp-train-1-abc").mkdir()
    with Store(tmp_path):
        assert list((tmp_path / "stages").iterdir()) == []


def test_a_broken_index_is_rebuilt_from_the_folders(tmp_path):
    with Store(tmp_path) as store:
        finish(tmp_path)
        store.finished("train-1")
    (tmp_path / "study.db").write_bytes(b"this is no database" * 100)
    with Store(tmp_path) as store:
        assert store.has("train-1")
    rows = sqlite3.connect(tmp_path / "study.db").execute("SELECT key, kind FROM stages").fetchall()
    assert rows == [("train-1", "train")]
    assert (tmp_path / "study.broken").exists()


def test_two_studies_in_one_folder(tmp_path):
    with Store(tmp_path):
        code = f"from vitkit.study.store import Store; Store({str(tmp_path)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode != 0
    assert f"Another study is running in {tmp_path} (process {os.getpid()})" in other.stderr
    with Store(tmp_path):
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(VitkitError, match="Cannot write in"):
        Store(blocked)


def test_keys_depend_on_everything_that_decides_the_result():
    a = Stage("train", "t", {"seed": 0, "lr": 1e-3})
    assert a.key == Stage("train", "another title", {"lr": 1e-3, "seed": 0}, recipes=["x"]).key
    assert a.key != Stage("train", "t", {"seed": 1, "lr": 1e-3}).key
    assert a.key != Stage("pretrain", "t", {"seed": 0, "lr": 1e-3}).key
    assert json.dumps(a.settings)


def test_results_are_replaced_as_a_whole(tmp_path):
    with Store(tmp_path) as store:
        store.save_results([("vit", "accuracy", 0.5, 0.4, 0.6)])
        with pytest.raises(sqlite3.IntegrityError):
            store.save_results([("a", "accuracy", 1.0, 0, 0), ("a", "accuracy", 1.0, 0, 0)])
        rows = sqlite3.connect(tmp_path / "study.db").execute("SELECT recipe FROM results").fetchall()
    assert rows == [("vit",)]

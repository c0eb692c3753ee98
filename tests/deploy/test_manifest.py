from __future__ import annotations

import json

import pytest

from vitkit.deploy.manifest import FORMAT, Manifest, list_files, read_manifest, write_manifest
from vitkit.errors import BadInput


def made(folder, **more):
    (folder / "sub").mkdir()
    (folder / "model.xml").write_text("graph")
    (folder / "sub" / "model.bin").write_bytes(b"\0\1")
    values = {"name": "m", "engine": "openvino", "precision": "f32", "files": list_files(folder)} | more
    write_manifest(Manifest(**values), folder)
    return folder


def test_round_trip(tmp_path):
    folder = made(tmp_path, labels=("a", "b"), value_range=(0.0, 4.0), image_size=(8, 6), setting={"batch": 4})
    found = read_manifest(folder)
    assert found.labels == ("a", "b") and found.value_range == (0.0, 4.0) and found.image_size == (8, 6)
    assert set(found.files) == {"model.xml", "sub/model.bin"}
    write_manifest(found, folder)
    assert read_manifest(folder) == found


def test_a_changed_or_absent_file_is_named(tmp_path):
    folder = made(tmp_path)
    (folder / "model.xml").write_text("another graph")
    with pytest.raises(BadInput, match=r"model\.xml was changed"):
        read_manifest(folder)
    assert read_manifest(folder, verify=False).engine == "openvino"
    (folder / "model.xml").unlink()
    with pytest.raises(BadInput, match=r"lacks model\.xml"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": FORMAT + 1}, "newer than this vitkit"),
        ({"colour": 1}, "unknown keys: colour"),
        ({"files": {"../other": "0" * 64}}, "outside of its folder"),
    ],
)
def test_bad_manifests(tmp_path, change, said):
    folder = made(tmp_path)
    raw = json.loads((folder / "manifest.json").read_text()) | change
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match=said):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("text", "said"), [("{", "cannot be read"), ("[]", "JSON object"), ('{"name": "x"}', "lacks engine")]
)
def test_broken_json(tmp_path, text, said):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=said):
        read_manifest(tmp_path)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(BadInput, match=r"no manifest\.json"):
        read_manifest(tmp_path)

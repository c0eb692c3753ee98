from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from vitkit.pickles import PICKLE_ENDINGS, is_pickle


@pytest.mark.parametrize("new", [True, False])
def test_torch_files_under_any_name(tmp_path, new):
    file = tmp_path / "weights.safetensors"
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=new)
    assert is_pickle(file)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_bare_pickles(tmp_path, protocol):
    (tmp_path / "weights").write_bytes(pickle.dumps({"a": 1}, protocol))
    assert is_pickle(tmp_path / "weights")


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "model.bin"])
def test_safetensors_are_none_whatever_they_are_called(tmp_path, name):
    save_file({"a": torch.zeros(2)}, str(tmp_path / name))
    assert not is_pickle(tmp_path / name)


def test_a_length_that_looks_like_a_pickle(tmp_path):
    """The header's length comes first, little-endian: 0x80 is also how pickles begin, 0x50 0x4B zips."""
    for length in (0x80, 0x4B50):
        (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{" + b" " * 8)
        assert not is_pickle(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content", [b"", b"\x00", b"0123456789"])
def test_other_content_goes_by_its_name(tmp_path, content):
    for name, expected in (
        ("a.safetensors", False),
        ("a.txt", False),
        *((f"a{e.upper()}", True) for e in PICKLE_ENDINGS),
    ):
        (tmp_path / name).write_bytes(content)
        assert is_pickle(tmp_path / name) is expected

from __future__ import annotations

import errno
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from vitkit.errors import BadInput, VitkitError
from vitkit.train import checkpoint
from vitkit.train.checkpoint import clear_checkpoints, latest_checkpoint, load_checkpoint, load_weights, save_checkpoint


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return a == b and type(a) is type(b)


def test_everything_a_trainer_holds_comes_back(tmp_path):
    state = {
        "numbers": [1, 2.5, float("inf"), True, None, "text", 1e-300, 0.1],
        "nested": {3: (torch.arange(3), {"x": torch.zeros(())}), "tensor": {"dict": [1]}, "empty": torch.zeros(0, 2)},
        "rng": torch.get_rng_state(),
        "numpy": np.random.default_rng(0).integers(2**32, size=5, dtype=np.uint32),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
    }
    save_checkpoint(tmp_path, 7, {"w": torch.ones(2)}, state)
    model, found = load_checkpoint(tmp_path)
    assert _same(found, state) and _same(model, {"w": torch.ones(2)})


def test_shared_storage_is_saved(tmp_path):
    w = torch.randn(4, 4)
    save_checkpoint(tmp_path, 0, {"a": w, "b": w, "c": w.t()}, {})
    model, _ = load_checkpoint(tmp_path)
    assert torch.equal(model["a"], model["b"]) and torch.equal(model["c"], w.t())


def test_only_the_newest_is_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {"w": torch.full((1,), float(step))}, {"step": step})
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["ckpt-00000003", "latest"]
    assert load_checkpoint(tmp_path)[1] == {"step": 3}
    clear_checkpoints(tmp_path)
    assert load_checkpoint(tmp_path) is None and not list(tmp_path.iterdir())


def test_no_file_is_a_pickle(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": torch.ones(1)}, {"t": torch.ones(1)})
    assert sorted(p.name for p in path.iterdir()) == ["model.safetensors", "trainer.json", "trainer.safetensors"]
    json.loads((path / "trainer.json").read_text())


def test_what_cannot_be_kept_is_refused_before_the_old_one_goes(tmp_path):
    save_checkpoint(tmp_path, 1, {"w": torch.ones(1)}, {})
    with pytest.raises(VitkitError, match="cannot hold a object"):
        save_checkpoint(tmp_path, 2, {"w": torch.ones(1)}, {"x": object()})
    assert latest_checkpoint(tmp_path).name == "ckpt-00000001"


@pytest.mark.parametrize("where", ["save_file", "write_text", "_sync"])
def test_a_full_disk_is_said_and_the_old_checkpoint_stays(tmp_path, monkeypatch, where):
    save_checkpoint(tmp_path, 1, {"w": torch.ones(1)}, {"step": 1})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(VitkitError, match=r"No space left on device.*previous checkpoint"):
        save_checkpoint(tmp_path, 2, {"w": torch.zeros(1)}, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)[1] == {"step": 1}
    assert not list(tmp_path.glob(".ckpt-*"))
    save_checkpoint(tmp_path, 2, {"w": torch.zeros(1)}, {"step": 2})
    assert load_checkpoint(tmp_path)[1] == {"step": 2}


@pytest.mark.skipif(sys.platform == "win32", reason="no file-size limits")
def test_a_really_full_disk(tmp_path):
    """A file-size limit makes the system itself refuse the write, whatever library does it."""
    import resource

    save_checkpoint(tmp_path, 1, {"w": torch.ones(1)}, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(VitkitError, match="Could not write the checkpoint of step 2"):
            save_checkpoint(tmp_path, 2, {"w": torch.ones(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert load_checkpoint(tmp_path)[1] == {"step": 1} and not list(tmp_path.glob(".ckpt-*"))


def test_killed_between_rename_and_pointer(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"w": torch.ones(1)}, {"step": 1})
    monkeypatch.setattr(checkpoint, "write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {"w": torch.zeros(1)}, {"step": 2})
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)[1] == {"step": 1}
    save_checkpoint(tmp_path, 2, {"w": torch.zeros(1)}, {"step": "2 again"})
    assert load_checkpoint(tmp_path)[1] == {"step": "2 again"}


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, name):
    path = save_checkpoint(tmp_path, 1, {"w": torch.ones(1)}, {"t": torch.ones(3)})
    (path / name).write_bytes((path / name).read_bytes()[:9])
    with pytest.raises(BadInput, match="ckpt-00000001 is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_two_runs_in_one_folder(tmp_path):
    first, second = checkpoint.only_run(tmp_path), checkpoint.only_run(tmp_path)
    with first, pytest.raises(VitkitError, match="Another run is training"), second:
        pass
    with checkpoint.only_run(tmp_path):
        pass


class TestLoadWeights:
    def test_file_or_checkpoint_folder(self, tmp_path):
        source, target = nn.Linear(3, 2), nn.Linear(3, 2)
        path = save_checkpoint(tmp_path, 1, source.state_dict(), {})
        assert load_weights(target, path) == ([], [])
        assert torch.equal(source.weight, target.weight)
        load_weights(nn.Linear(3, 2), path / "model.safetensors")

    def test_shapes_are_named(self, tmp_path):
        path = save_checkpoint(tmp_path, 1, nn.Linear(3, 2).state_dict(), {})
        target = nn.Linear(4, 2)
        before = target.weight.clone()
        for strict in (True, False):
            with pytest.raises(BadInput, match=r"weight has shape \(2, 3\).*needs \(2, 4\)"):
                load_weights(target, path, strict=strict)
        assert torch.equal(target.weight, before)

    def test_strict_and_not(self, tmp_path):
        path = save_checkpoint(tmp_path, 1, nn.Linear(3, 2, bias=False).state_dict() | {"extra": torch.ones(1)}, {})
        with pytest.raises(BadInput, match=r"bias is missing.*extra is not part"):
            load_weights(nn.Linear(3, 2), path)
        assert load_weights(nn.Linear(3, 2), path, strict=False) == (["bias"], ["extra"])
        other = nn.Sequential(nn.Linear(3, 2))
        with pytest.raises(BadInput, match="shares no key"):
            load_weights(other, path, strict=False)

    @pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.bin", "w.safetensors"])
    def test_a_pickle_is_refused_by_content_or_name(self, tmp_path, name):
        source = nn.Linear(3, 2)
        torch.save({"state_dict": source.state_dict()}, tmp_path / name)
        target = nn.Linear(3, 2)
        with pytest.raises(BadInput, match="allow_pickle=True"):
            load_weights(target, tmp_path / name)
        load_weights(target, tmp_path / name, allow_pickle=True)
        assert torch.equal(source.weight, target.weight)

    def test_code_in_a_pickle_is_never_run(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "boom"), "w"))

        torch.save({"weight": Bomb()}, tmp_path / "w.pt")
        with pytest.raises(BadInput, match="plain tensors"):
            load_weights(nn.Linear(3, 2), tmp_path / "w.pt", allow_pickle=True)
        assert not (tmp_path / "boom").exists()

    def test_absent_and_broken_files(self, tmp_path):
        with pytest.raises(BadInput, match="no weights at"):
            load_weights(nn.Linear(3, 2), tmp_path / "none.safetensors")
        (tmp_path / "broken.safetensors").write_bytes(b"hello")
        with pytest.raises(BadInput, match="not a safetensors file"):
            load_weights(nn.Linear(3, 2), tmp_path / "broken.safetensors")
        (tmp_path / "empty.safetensors").write_bytes(b"")
        with pytest.raises(BadInput, match="not a safetensors file"):
            load_weights(nn.Linear(3, 2), tmp_path / "empty.safetensors")

"""Checkpoints without pickles that survive a kill at any moment, and loading weights with errors one can act on.

A checkpoint is a folder ``ckpt-<step>`` with ``model.safetensors`` (the model alone, for anyone to load),
``trainer.safetensors`` (tensors of the optimizer, the weight average, the random states) and ``trainer.json`` (all
else). It is written under another name, synced, and renamed; then the file ``latest`` is replaced, and older
checkpoints go.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitkit.errors import BadInput, VitkitError
from vitkit.files import write_text
from vitkit.models.io import load_state
from vitkit.pickles import is_pickle

MODEL, TENSORS, STATE, LATEST = "model.safetensors", "trainer.safetensors", "trainer.json", "latest"
FORMAT = 1


def save_checkpoint(folder: str | os.PathLike[str], step: int, model: dict[str, Tensor], state: Any) -> Path:
    """Write the checkpoint of a step and remove the older ones.

    Args:
        folder: where the checkpoints of one run live.
        step: names the checkpoint.
        model: ``state_dict`` of the model.
        state: everything else: nested dicts, lists, tuples, tensors, NumPy arrays, numbers, strings, None.

    Raises: VitkitError if it cannot be written (full disk); the previous checkpoint is intact then.
    """
    root = Path(folder)
    target = root / f"ckpt-{step:08d}"
    temporary = root / f".{target.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        tensors: dict[str, Tensor] = {}
        tree = _pack(state, tensors)
        save_file(_plain(model), str(temporary / MODEL), metadata={"format": "pt"})
        save_file(_plain(tensors), str(temporary / TENSORS))
        (temporary / STATE).write_text(json.dumps({"format": FORMAT, "state": tree}), encoding="utf-8")
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        # left by a run that was killed between rename and `latest`: nothing points to it
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
        _sync(root)
        write_text(root / LATEST, target.name)
    except (OSError, SafetensorError, VitkitError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise VitkitError(
            f"Could not write the checkpoint of step {step} in {root}: {getattr(error, 'strerror', None) or error}. "
            "The previous checkpoint, if any, is unchanged; free some space or choose another folder, then run the "
            "same command again: it goes on from there."
        ) from error
    _remove(root, keep=target.name)
    return target


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], Any] | None:
    """Model weights and trainer state of the newest checkpoint; None if there is none.

    Raises: BadInput if the checkpoint is damaged or of a newer format.
    """
    path = latest_checkpoint(folder)
    if path is None:
        return None
    try:
        raw = json.loads((path / STATE).read_text(encoding="utf-8"))
        model, tensors = load_file(str(path / MODEL)), load_file(str(path / TENSORS))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise BadInput(f"The checkpoint {path} is damaged ({error}); remove {path.parent} to start anew.") from error
    if raw["format"] > FORMAT:
        raise BadInput(f"{path} has format {raw['format']}, newer than this vitkit ({FORMAT}); upgrade vitkit.")
    return model, _unpack(raw["state"], tensors)


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Folder of the newest complete checkpoint, or None."""
    pointer = Path(folder) / LATEST
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    return path if path.is_dir() else None


def clear_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Remove every checkpoint of a run."""
    root = Path(folder)
    (root / LATEST).unlink(missing_ok=True)
    _remove(root, keep=None)


@contextmanager
def only_run(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder for one run; the system lets go of it when the process ends, however it ends.

    Raises: VitkitError if another process trains there.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        # no flock there; two runs in one folder are then the user's to avoid
        yield
        return
    import fcntl

    with (root / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise VitkitError(
                f"Another run is training in {root}; wait for it to end, or give this one another folder."
            ) from error
        yield


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], strict: bool = True, allow_pickle: bool = False
) -> tuple[list[str], list[str]]:
    """Load weights into ``model``.

    Args:
        model: changed in place; only if everything fits.
        path: a safetensors file, or a folder that holds ``model.safetensors``.
        strict: every key must match; otherwise keys of one side only are left out. Shapes must match always.
        allow_pickle: also read files of ``torch.save``, without running code in them.

    Returns: keys of the model that the file has not, and keys of the file that the model has not.

    Raises: BadInput if the file is missing, damaged, a pickle not allowed, or does not fit; the message names the
        first keys and both shapes.
    """
    file = Path(path)
    if file.is_dir():
        file = file / MODEL
    if not file.is_file():
        raise BadInput(f"There are no weights at {path}.")
    state = _read_pickle(file, allow_pickle) if is_pickle(file) else _read_safetensors(file)
    own = model.state_dict()
    missing, unexpected = [k for k in own if k not in state], [k for k in state if k not in own]
    if not strict:
        if len(missing) == len(own):
            raise BadInput(f"{file} shares no key with the model; it has {', '.join(list(state)[:3])} …")
        state = {**own, **{k: v for k, v in state.items() if k in own}}
    load_state(model, state, str(file))
    return missing, unexpected


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(str(file))
    except SafetensorError as error:
        raise BadInput(f"{file} is not a safetensors file ({error}).") from error


def _read_pickle(file: Path, allowed: bool) -> dict[str, Tensor]:
    if not allowed:
        raise BadInput(
            f"{file} is a pickle, which can run code when it is loaded. Ask for a .safetensors file, or, if you trust "
            "its source, load it with allow_pickle=True: only tensors are read then, and code in it is refused."
        )
    import pickle

    try:
        # an open file, because torch goes by the name of a path
        with file.open("rb") as stream:
            found = torch.load(stream, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise BadInput(f"{file} cannot be read as plain tensors: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise BadInput(f"{file} holds no state_dict; it must map names to tensors.")
    return found


def _plain(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Copies without shared storage, which safetensors refuses; tied tensors are written once each."""
    odd = [name for name, value in tensors.items() if not isinstance(value, Tensor)]
    if odd:
        raise VitkitError(f"{odd[0]} of the state_dict is a {type(tensors[odd[0]]).__name__}, not a tensor.")
    return {name: value.detach().clone().contiguous().cpu() for name, value in tensors.items()}


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold; tensors go to ``tensors`` and leave their key. Tagged forms are one-key dicts."""
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value
        return {"tensor": key}
    if isinstance(value, np.ndarray):
        return {"array": [value.dtype.str, value.tolist()]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"dict": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_pack(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_pack(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise VitkitError(f"A checkpoint cannot hold a {type(value).__name__}.")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "array":
        return np.array(content[1], dtype=np.dtype(content[0]))
    if tag == "tuple":
        return tuple(_unpack(v, tensors) for v in content)
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in content}


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(root: Path, keep: str | None) -> None:
    for old in [*root.glob("ckpt-*"), *root.glob(".ckpt-*.tmp")]:
        if old.name != keep:
            shutil.rmtree(old, ignore_errors=True)

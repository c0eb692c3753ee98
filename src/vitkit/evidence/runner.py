"""Run an experiment by name and keep what it found, with everything needed to believe or repeat it."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vitkit.catalogue import Entry, find, load
from vitkit.errors import BadInput, VitkitError
from vitkit.evidence.record import Evidence
from vitkit.files import write_text

_PACKAGES = ("vitkit", "torch", "torchvision", "timm", "numpy", "scikit-learn")
_PACKAGED = Path(__file__).with_name("results")


def run_evidence(
    name: str,
    seeds: tuple[int, ...] = (0, 1, 2),
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Run the experiment of an entry and write its evidence file.

    Args:
        name: a method, an entry or an arXiv id.
        seeds: given to the experiment.
        out: folder of the file; the project's ``evidence/`` in a checkout, else ``./evidence``.
        progress: called as ``progress(what, done, total)`` while the experiment runs.

    Returns: the record as written, and its path.

    Raises:
        UnknownName: nothing is called so. VitkitError: the entry has no experiment.
        BadInput: the experiment returned something else than an :class:`Evidence`.
    """
    entry, _ = find(name)
    experiment = _experiment(entry)
    started = time.perf_counter()
    found = experiment.run(seeds=tuple(seeds), progress=progress)
    duration = time.perf_counter() - started
    if not isinstance(found, Evidence):
        raise BadInput(f"{experiment.__name__}.run returned a {type(found).__name__}; it must return an Evidence.")
    record = {
        "name": entry.name,
        "id": entry.id,
        "title": entry.title,
        "claim": found.claim,
        "shown": found.shown,
        "rows": _plain(found.rows),
        "notes": found.notes,
        "settings": _plain(found.settings),
        "seeds": list(seeds),
        "versions": _versions(),
        "machine": _machine(),
        **_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_s": round(duration, 1),
    }
    folder = Path(out) if out is not None else (_project_folder() or Path("evidence"))
    path = folder / file_name(entry)
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return record, path


def read_evidence(entry: Entry) -> dict[str, Any] | None:
    """The evidence file of an entry, from the project's ``evidence/`` or from the installed package; None if absent.

    A baseline without an experiment of its own has that of the entry it is compared in; the record's ``name`` says
    whose it is.

    Raises: BadInput if the file is damaged.
    """
    for folder in (_project_folder(), _PACKAGED):
        path = folder / (Path(entry.evidence).name or file_name(entry)) if folder else None
        if path and path.is_file():
            try:
                return json.loads(path.read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise BadInput(
                    f"{path} is damaged ({error}); `vitkit evidence {entry.name}` writes it anew."
                ) from error
    return None


def file_name(entry: Entry) -> str:
    """``<arxiv-id>.json``; the entry's name where there is no paper."""
    return f"{entry.id or entry.name}.json"


def has_experiment(entry: Entry) -> bool:
    """Whether ``vitkit evidence`` can run something for the entry."""
    return (Path(__file__).parent / f"{entry.name.replace('-', '_')}.py").is_file()


def module_name(entry: Entry) -> str:
    """The module of an entry's experiment."""
    return f"vitkit.evidence.{entry.name.replace('-', '_')}"


def _experiment(entry: Entry) -> Any:
    name = module_name(entry)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        known = [e.name for e in load().values() if has_experiment(e)]
        raise VitkitError(
            f"{entry.name!r} has no experiment yet. These have one: {', '.join(sorted(known)) or 'none'}."
        ) from error


def _project_folder() -> Path | None:
    """``evidence/`` beside ``pyproject.toml`` when this runs from a checkout."""
    root = Path(__file__).resolve().parents[3]
    return root / "evidence" if (root / "pyproject.toml").is_file() else None


def _plain(value: Any) -> Any:
    """What JSON can hold: numpy and torch scalars and arrays become numbers and lists, NaN and infinity null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return str(value)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


@lru_cache(maxsize=1)
def _machine() -> dict[str, Any]:
    return {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.system(), "accelerator": _accelerator()}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    # /proc exists on Linux only, and ARM kernels leave the model out
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return model or platform.processor() or platform.machine()


def _accelerator() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _commit() -> dict[str, Any]:
    """The checkout's commit, and whether files differ from it; nothing outside a checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return {"commit": None}
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "src")
    except (OSError, subprocess.SubprocessError):
        # no git program, or a repository without a commit: the record says that the commit is not known
        return {"commit": None}
    return {"commit": head, "changed_since_commit": bool(changed)}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "--no-optional-locks", "-C", str(root), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return done.stdout.strip()

"""torch.compile: Inductor's code, made in the process that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vitkit.deploy.engines import Setting
from vitkit.deploy.engines.torch_eager import TorchRunner, load_program, make, precisions, settings
from vitkit.deploy.engines.torch_eager import unavailable as _no_torch

if TYPE_CHECKING:
    from vitkit.deploy.source import Source  # noqa: F401

__all__ = ["load", "make", "precisions", "settings", "unavailable"]

NEEDS = {"torch": "torch"}


def unavailable() -> str:
    return _no_torch() or no_compiler()


def no_compiler() -> str:
    """What Inductor lacks on this machine."""
    import os
    import shutil

    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if any(shutil.which(name) for name in wanted):
        return ""
    return f"Inductor needs a C++ compiler ({', '.join(wanted)}): apt-get install g++"


def load(folder: Path, precision: str, setting: Setting) -> TorchRunner:
    import torch

    return TorchRunner(torch.compile(load_program(folder)), setting)

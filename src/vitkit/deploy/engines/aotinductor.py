"""AOTInductor: Inductor's code compiled beforehand into one package, which loads without tracing anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vitkit.deploy.engines import Setting
from vitkit.deploy.engines.torch_compile import unavailable
from vitkit.deploy.engines.torch_eager import TorchRunner, precisions, settings

if TYPE_CHECKING:
    from vitkit.deploy.source import Source

__all__ = ["load", "make", "precisions", "settings", "unavailable"]

NEEDS = {"torch": "torch"}


def make(source: Source, precision: str, folder: Path) -> None:
    from vitkit.deploy.compile_program import compile_program

    compile_program(source.program(precision), folder / "model.pt2", source.seconds_left())


def load(folder: Path, precision: str, setting: Setting) -> TorchRunner:
    import torch

    return TorchRunner(torch._inductor.aoti_load_package(str(folder / "model.pt2")), setting)

"""Programs that run a model: one small file each, listed here, imported when used.

Every engine is a module with

- ``NEEDS``: the packages it imports, each with the extra of vitkit that brings it;
- ``unavailable() -> str``: why it cannot run here, with the command that mends it; empty if it can;
- ``precisions() -> tuple[str, ...]``: those worth trying on this machine, the exact one first;
- ``settings(batch, cores) -> list[Setting]``: threads and streams worth trying;
- ``make(source, precision, folder)``: write the files of a model, which needs torch;
- ``load(folder, precision, setting) -> Runner``: from those files alone;
- ``bake(folder, preparation, batch)``, where its files can be changed: put an exported program in front of them, whose
  output is their input; ``batch`` is the number of images they take at a time, None for any.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from vitkit.errors import MissingExtra, unknown

#: name → module
ENGINES = {
    "torch-eager": "vitkit.deploy.engines.torch_eager",
    "torch-compile": "vitkit.deploy.engines.torch_compile",
    "aotinductor": "vitkit.deploy.engines.aotinductor",
    "onnxruntime": "vitkit.deploy.engines.onnxruntime",
    "openvino": "vitkit.deploy.engines.openvino",
    "torchao": "vitkit.deploy.engines.torchao",
    "cuda-graphs": "vitkit.deploy.engines.cuda_graphs",
}


@dataclass(frozen=True)
class Setting:
    """How an engine uses the machine.

    Args:
        batch: images handed to it at a time.
        threads: of the processor; 0: all cores.
        streams: shares of a batch that run side by side, on ``threads / streams`` threads each.
    """

    batch: int = 1
    threads: int = 0
    streams: int = 1


class Runner(Protocol):
    """A loaded model. Not for several threads at once."""

    def run(self, images: np.ndarray) -> np.ndarray:
        """Images (B, C, H, W) float32 in [0, 1] → logits (B, K) float32."""
        ...

    def describe(self) -> dict[str, Any]:
        """What runs, in words and numbers: threads, streams, the precision in force."""
        ...


def engine(name: str) -> Any:
    """The module of an engine.

    Raises: UnknownName.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES, "vitkit deploy --engines list")
    return import_module(ENGINES[name])


def lacking(needs: dict[str, str], who: str) -> str:
    """The command that installs the first absent package of ``needs`` (package → extra); empty if all are there."""
    for package, extra in needs.items():
        try:
            found = find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return str(MissingExtra(who, package, extra))
    return ""

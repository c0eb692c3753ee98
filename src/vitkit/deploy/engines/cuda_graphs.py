"""torch.compile on an NVIDIA GPU with CUDA graphs: bfloat16, and float8 matrix products where the card has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitkit.deploy.engines import Setting
from vitkit.deploy.engines.torch_eager import load_program
from vitkit.deploy.engines.torch_eager import make as _make_program
from vitkit.deploy.engines.torch_eager import unavailable as _no_torch

if TYPE_CHECKING:
    from vitkit.deploy.source import Source

NEEDS = {"torch": "torch"}


def unavailable() -> str:
    missing = _no_torch()
    if missing:
        return missing
    import torch

    return "" if torch.cuda.is_available() else "there is no CUDA device"


def precisions() -> tuple[str, ...]:
    return ("bf16",)


def settings(batch: int, cores: int) -> list[Setting]:
    return [Setting(batch)]


def make(source: Source, precision: str, folder: Path) -> None:
    """``model.pt2``, and ``model.onnx`` beside it, which TensorRT reads."""
    _make_program(source, "f32", folder)
    (folder / "model.onnx").write_bytes(source.onnx().read_bytes())


def load(folder: Path, precision: str, setting: Setting) -> _Runner:
    return _Runner(folder)


class _Runner:
    def __init__(self, folder: Path) -> None:
        import torch

        network: Any = load_program(folder)
        self.call = torch.compile(network.to("cuda", torch.bfloat16), mode="max-autotune")

    def run(self, images: np.ndarray) -> np.ndarray:
        import torch

        with torch.no_grad():
            return self.call(torch.from_numpy(images).to("cuda", torch.bfloat16)).float().cpu().numpy()

    def describe(self) -> dict[str, Any]:
        import torch

        return {"device": torch.cuda.get_device_name()}

"""PyTorch as it stands; the precision is fixed when the program is exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitkit.deploy.engines import Setting, lacking

if TYPE_CHECKING:
    import torch

    from vitkit.deploy.source import Source

NEEDS = {"torch": "torch"}


def unavailable() -> str:
    return lacking(NEEDS, "PyTorch")


def precisions() -> tuple[str, ...]:
    from vitkit.train.precision import native_bf16

    return ("f32", "bf16") if native_bf16("cpu") else ("f32",)


def settings(batch: int, cores: int) -> list[Setting]:
    return [Setting(batch, cores)]


def make(source: Source, precision: str, folder: Path) -> None:
    import torch

    torch.export.save(source.program(precision), folder / "model.pt2")


def load(folder: Path, precision: str, setting: Setting) -> TorchRunner:
    return TorchRunner(load_program(folder), setting)


def load_program(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network of ``model.pt2`` as a function of a batch."""
    import torch

    import vitkit.models.scan_engine  # noqa: F401  (programs may hold operators of ours)

    return torch.export.load(folder / "model.pt2").module()


class TorchRunner:
    """Calls a function of tensors with arrays.

    Args:
        call: images (B, C, H, W) → logits.
        setting: its ``threads`` are PyTorch's own, set for each call as they belong to the whole process.
    """

    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor], setting: Setting) -> None:
        self.call, self.threads = call, setting.threads

    def run(self, images: np.ndarray) -> np.ndarray:
        import torch

        before = torch.get_num_threads()
        if self.threads and self.threads != before:
            torch.set_num_threads(self.threads)
        try:
            # not inference_mode: what torch.compile made under no_grad is used again
            with torch.no_grad():
                return self.call(torch.from_numpy(images)).float().numpy()
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)

    def describe(self) -> dict[str, Any]:
        import torch

        return {"threads": self.threads or torch.get_num_threads()}

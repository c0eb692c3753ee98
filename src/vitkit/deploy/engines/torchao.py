"""torchao: int8 weights, and activations quantized in each call, compiled by AOTInductor."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from vitkit.deploy.engines import lacking
from vitkit.deploy.engines.aotinductor import load, settings
from vitkit.deploy.engines.torch_compile import no_compiler

if TYPE_CHECKING:
    from vitkit.deploy.source import Source

__all__ = ["load", "make", "precisions", "settings", "unavailable"]

NEEDS = {"torchao": "deploy"}


def unavailable() -> str:
    return lacking(NEEDS, "torchao") or no_compiler()


def precisions() -> tuple[str, ...]:
    return ("int8-dynamic", "int8-weights")


def make(source: Source, precision: str, folder: Path) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    from vitkit.deploy.compile_program import compile_program

    source.refuse_codes()
    model = deepcopy(source.model)
    quantize_(model, Int8WeightOnlyConfig() if precision == "int8-weights" else Int8DynamicActivationInt8WeightConfig())
    compile_program(source.export(model), folder / "model.pt2", source.seconds_left())

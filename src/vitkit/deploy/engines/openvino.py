"""OpenVINO: float32, bfloat16, and int8 weights and activations with the rest in float32 or bfloat16."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitkit.deploy.engines import Setting, lacking
from vitkit.deploy.signal_stack import kept_signal_stack

if TYPE_CHECKING:
    import torch

    from vitkit.deploy.source import Source

NEEDS = {"openvino": "deploy", "nncf": "deploy"}

_HINT = {"f32": "f32", "bf16": "bf16", "int8": "f32", "int8+bf16": "bf16"}


def unavailable() -> str:
    return lacking({"openvino": "deploy"}, "OpenVINO")


def precisions() -> tuple[str, ...]:
    quantized = () if lacking(NEEDS, "int8 by NNCF") else ("int8", "int8+bf16")
    found = ("f32", "bf16", *quantized)
    return found if _has_bf16() else tuple(p for p in found if "bf16" not in p)


def settings(batch: int, cores: int) -> list[Setting]:
    streams = [s for s in (1, 2, cores) if s <= min(cores, batch)]
    return [Setting(batch, cores, s) for s in sorted(set(streams))]


def make(source: Source, precision: str, folder: Path) -> None:
    _silence()
    import openvino as ov

    model = source.openvino(quantized=precision.startswith("int8"))
    # the default would store float32 weights as float16
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)


def bake(folder: Path, preparation: torch.export.ExportedProgram, batch: int | None) -> None:
    """Join a program to ``model.xml``, which then takes what the program takes."""
    import openvino as ov

    from vitkit.deploy.source import quiet

    with kept_signal_stack(), quiet():
        network = ov.Core().read_model(folder / "model.xml")
        front = ov.convert_model(preparation)
    prepared = front.outputs[0].get_node().input_value(0)
    for consumer in network.inputs[0].get_target_inputs():
        consumer.replace_source_output(prepared)
    whole = ov.Model(network.get_results(), front.get_parameters(), network.get_friendly_name())
    whole.reshape([batch or -1, -1, -1, front.inputs[0].get_partial_shape()[3]])
    whole.inputs[0].set_names({"pixels"})
    # a loaded engine may have the old files mapped: new ones take their names
    ov.save_model(whole, folder / "baked.xml", compress_to_fp16=False)
    for ending in ("xml", "bin"):
        (folder / f"baked.{ending}").replace(folder / f"model.{ending}")


def load(folder: Path, precision: str, setting: Setting) -> _Runner:
    with kept_signal_stack():
        return _Runner(folder, precision, setting)


class _Runner:
    def __init__(self, folder: Path, precision: str, setting: Setting) -> None:
        _silence()
        import openvino as ov
        import openvino.properties as props
        import openvino.properties.hint as hints

        self.streams = setting.streams
        self.compiled = ov.Core().compile_model(
            str(folder / "model.xml"),
            "CPU",
            {
                hints.inference_precision: _HINT[precision],
                hints.performance_mode: hints.PerformanceMode.LATENCY
                if setting.streams == 1
                else hints.PerformanceMode.THROUGHPUT,
                props.num_streams: setting.streams,
                props.inference_num_threads: setting.threads or os.cpu_count() or 1,
                # pinned threads of two engines measured in turns would share a core
                hints.enable_cpu_pinning: False,
            },
        )
        self.requests = [self.compiled.create_infer_request() for _ in range(setting.streams)]

    def run(self, images: np.ndarray) -> np.ndarray:
        shares = np.array_split(images, min(self.streams, len(images)))
        if len(shares) == 1:
            # the result is a view of memory that the next call overwrites
            return np.array(self.requests[0].infer([images], share_inputs=True, share_outputs=True)[0])
        for request, share in zip(self.requests, shares):
            request.start_async([np.ascontiguousarray(share)], share_inputs=True)
        for request, _ in zip(self.requests, shares):
            request.wait()
        return np.concatenate([request.get_output_tensor(0).data for request, _ in zip(self.requests, shares)])

    def describe(self) -> dict[str, Any]:
        get = self.compiled.get_property
        return {
            "threads": int(get("INFERENCE_NUM_THREADS")),
            "streams": int(get("NUM_STREAMS")),
            "precision of the rest": str(get("INFERENCE_PRECISION_HINT").get_type_name()),
        }


def _has_bf16() -> bool:
    import openvino as ov

    _silence()
    with kept_signal_stack():
        return "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _silence() -> None:
    # neither package may report to its makers
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    os.environ.setdefault("NNCF_TELEMETRY_DISABLED", "1")

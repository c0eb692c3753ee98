"""ONNX Runtime: float32, int8 with ranges measured in each call or beforehand, and 4-bit weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitkit.deploy.engines import Setting, lacking
from vitkit.files import atomic_write

if TYPE_CHECKING:
    import torch

    from vitkit.deploy.source import Source

NEEDS = {"onnxruntime": "deploy"}
_TO_MAKE = {"onnx": "deploy", "onnxscript": "deploy"}


def unavailable() -> str:
    return lacking(NEEDS, "ONNX Runtime")


def precisions() -> tuple[str, ...]:
    return () if lacking(_TO_MAKE, "export to ONNX") else ("f32", "int8-dynamic", "int8-static", "int4-weights")


def settings(batch: int, cores: int) -> list[Setting]:
    return [Setting(batch, cores)]


def make(source: Source, precision: str, folder: Path) -> None:
    """One ``model.onnx``; weights above 2 GB would need a second file, which no ViT here reaches."""
    from vitkit.deploy.source import quiet

    target = folder / "model.onnx"
    if precision != "f32":
        source.refuse_codes()
    plain = source.onnx()
    with quiet():
        _write(source, precision, plain, target)


def _write(source: Source, precision: str, plain: Path, target: Path) -> None:
    if precision == "f32":
        target.write_bytes(plain.read_bytes())
    elif precision == "int8-dynamic":
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            plain, target, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"]
        )
    elif precision == "int8-static":
        _static(source, plain, target)
    else:
        _four_bits(plain, target)


def _static(source: Source, plain: Path, target: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            size = source.fixed_batch or 8
            self.batches = iter(np.split(source.calibration, range(size, len(source.calibration), size)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    quantize_static(
        plain,
        target,
        Images(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"],
        # products of two activations (attention) lose most and save least
        extra_options={"MatMulConstBOnly": True},
    )


def _four_bits(plain: Path, target: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(plain), bits=4, block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


def bake(folder: Path, preparation: torch.export.ExportedProgram, batch: int | None) -> None:
    """Join a program to ``model.onnx``, which then takes what the program takes."""
    import onnx
    from onnx import compose, version_converter

    from vitkit.deploy.source import write_onnx

    path, front_path = folder / "model.onnx", folder / "front.onnx"
    try:
        write_onnx(preparation, front_path, "pixels", "prepared")
        network, front = onnx.load(path), onnx.load(front_path)
    finally:
        front_path.unlink(missing_ok=True)
    version = {opset.domain: opset.version for opset in network.opset_import}[""]
    if version != {opset.domain: opset.version for opset in front.opset_import}[""]:
        front = version_converter.convert_version(front, version)
    front.ir_version = network.ir_version
    whole = compose.merge_models(
        compose.add_prefix(front, "preparation/", rename_inputs=False), network, [("preparation/prepared", "images")]
    )
    with atomic_write(path) as new:
        onnx.save(whole, new)


def load(folder: Path, precision: str, setting: Setting) -> _Runner:
    return _Runner(folder, setting)


class _Runner:
    def __init__(self, folder: Path, setting: Setting) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = setting.threads or os.cpu_count() or 1
        options.log_severity_level = 3
        # threads that spin between calls take the cores from whatever is measured next
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.threads = options.intra_op_num_threads
        self.session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0].name

    def run(self, images: np.ndarray) -> np.ndarray:
        return self.session.run(None, {self.input: images})[0]

    def describe(self) -> dict[str, Any]:
        return {"threads": self.threads, "provider": self.session.get_providers()[0]}

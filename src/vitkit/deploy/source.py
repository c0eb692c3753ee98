"""A trained model as the engines want it: exported program, ONNX file, OpenVINO model; each made once."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.anatomy.untouched import untouched
from vitkit.deploy.adapters import folded
from vitkit.deploy.any_size import any_size
from vitkit.deploy.merging import dense_merges
from vitkit.deploy.onnx_translations import onnx_translations
from vitkit.deploy.signal_stack import kept_signal_stack
from vitkit.errors import BadInput


class Source:
    """A model in eval mode on the CPU, and the images that choose quantization steps.

    Args:
        model: pixels in [0, 1], (B, C, H, W), to logits (B, K). It is copied, not changed; adapters of PEFT are added
            to the copy's weights.
        calibration: (N, C, H, W) float32 in [0, 1].
        scratch: folder for files that several engines start from; its owner removes it.
        until: of ``time.perf_counter()``, when compilers that are still at work are stopped.
        free_size: export graphs that take images of other sizes too.

    Raises: BadInput if the images are not (N, C, H, W) or the model does not take them.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: np.ndarray,
        scratch: Path,
        until: float = math.inf,
        free_size: bool = False,
    ) -> None:
        if calibration.ndim != 4 or not len(calibration):
            raise BadInput(f"calibration images must be (N, C, H, W); their shape is {calibration.shape}.")
        self.model = folded(deepcopy(model).to("cpu", torch.float32)).eval().requires_grad_(False)
        self.calibration = np.ascontiguousarray(calibration, dtype=np.float32)
        self.scratch, self.until = scratch, until
        #: what height and width must be multiples of; 0: they are those of the calibration images
        self.side_step = 0
        if free_size:
            self.model, self.side_step = any_size(self.model)
        #: images the exported graph takes at a time; None: any number
        self.fixed_batch: int | None = None
        self._programs: dict[str, torch.export.ExportedProgram] = {}
        self._openvino: dict[bool, Any] = {}
        try:
            with torch.no_grad():
                self.model(torch.from_numpy(self.calibration[:1]))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise BadInput(
                f"the model does not take the calibration images of {calibration.shape[1]} channels and "
                f"{calibration.shape[2]}×{calibration.shape[3]} pixels: {error}"
            ) from error

    def seconds_left(self) -> float:
        """Time a compiler may still take; at least a second, so that it fails by its own words."""
        return min(max(1.0, self.until - time.perf_counter()), 24 * 3600)

    def logits(self, images: np.ndarray, batch: int = 32) -> np.ndarray:
        """The model's own answers, in eager PyTorch."""
        with torch.no_grad():
            parts = [self.model(torch.from_numpy(part)) for part in np.split(images, range(batch, len(images), batch))]
        return torch.cat(parts).float().numpy()

    def refuse_codes(self) -> None:
        """Raises: BadInput if layers hold integer codes that a method chose, which a quantizer would choose anew."""
        for name, module in self.model.named_modules():
            if isinstance(getattr(module, "codes", None), Tensor):
                raise BadInput(f"{name} holds integer codes already, which are exported as they are")

    def export(self, model: nn.Module) -> torch.export.ExportedProgram:
        """``torch.export`` with any number of images, or with a fixed one where the graph depends on it.

        Raises: BadInput with the exporter's own reason.
        """
        example = torch.from_numpy(self.other_size(self.calibration[:1])).repeat(2, 1, 1, 1)
        sides = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} if self.side_step else {}
        free = {0: torch.export.Dim("batch", min=1, max=65536), **sides}
        with quiet(), untouched(model), torch.no_grad():
            try:
                program = torch.export.export(model, (example,), dynamic_shapes=(free,))
            except Exception as first:
                # the exporter raises a dozen kinds; all mean that this graph cannot be had with a free batch
                self.fixed_batch = 1
                try:
                    program = torch.export.export(model, (example[:1],), dynamic_shapes=(sides,) if sides else None)
                except Exception as error:
                    raise BadInput(f"the model cannot be exported: {_reason(error)}") from first
        if self.side_step and not _has_free_sides(program):
            raise BadInput("the model's graph depends on the image size; deploy it for one size")
        return program

    def other_size(self, images: np.ndarray) -> np.ndarray:
        """Images resized to another height and width that the graph should take; as they are if it takes one size."""
        if not self.side_step:
            return images
        height, width = (math.ceil(n / self.side_step) * self.side_step for n in images.shape[2:])
        size = (height + self.side_step, width + 2 * self.side_step)
        return F.interpolate(torch.from_numpy(images), size, mode="bilinear", antialias=True).numpy()

    def program(self, precision: str = "f32") -> torch.export.ExportedProgram:
        """The exported program; with "bf16" matrix products are computed in bfloat16."""
        if precision not in self._programs:
            network = dense_merges(self.model, self.calibration)
            self._programs[precision] = self.export(network if precision == "f32" else _Autocast(network))
        return self._programs[precision]

    def onnx(self) -> Path:
        """Path of the ONNX file, with input ``images`` and output ``logits``.

        Raises: BadInput naming the operator that has no ONNX form.
        """
        path = self.scratch / "plain.onnx"
        if not path.exists():
            program = self.program()
            try:
                write_onnx(program, path, "images", "logits")
            except Exception as error:
                path.unlink(missing_ok=True)
                raise BadInput(f"the model has no ONNX form: {_reason(error)}") from error
        return path

    def openvino(self, quantized: bool = False) -> Any:
        """The OpenVINO model; ``quantized``: int8 weights and activations of its matrix products, by NNCF.

        Raises: BadInput naming the operator that OpenVINO does not know.
        """
        if quantized not in self._openvino:
            self._openvino[quantized] = self._quantize() if quantized else self._convert()
        return self._openvino[quantized]

    def _convert(self) -> Any:
        import openvino as ov

        try:
            with quiet():
                model = ov.convert_model(self.program())
        except BadInput:
            raise
        except Exception as error:
            raise BadInput(f"OpenVINO cannot convert the model: {_reason(error)}") from error
        channels, height, width = self.calibration.shape[1:]
        sides = [-1, -1] if self.side_step else [height, width]
        model.reshape([self.fixed_batch or -1, channels, *sides])
        model.inputs[0].set_names({"images"})
        model.outputs[0].set_names({"logits"})
        return model

    def _quantize(self) -> Any:
        import nncf

        self.refuse_codes()
        model = self.openvino()
        # products of two activations other than attention's, such as those that merge tokens, gain nothing
        free = [op.get_friendly_name() for op in model.get_ops() if op.get_type_name() == "MatMul" and _no_weight(op)]
        batches = np.split(self.calibration, range(1, len(self.calibration)))
        try:
            with quiet(), kept_signal_stack():
                return nncf.quantize(
                    model,
                    nncf.Dataset(batches),
                    ignored_scope=nncf.IgnoredScope(names=free),
                    preset=nncf.QuantizationPreset.MIXED,
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=len(batches),
                )
        except Exception as error:
            raise BadInput(f"NNCF cannot quantize the model: {_reason(error)}") from error


def _has_free_sides(program: torch.export.ExportedProgram) -> bool:
    name = program.graph_signature.user_inputs[0]
    images = next(node for node in program.graph.nodes if node.name == name)
    return all(isinstance(n, torch.SymInt) for n in images.meta["val"].shape[2:])


def write_onnx(program: torch.export.ExportedProgram, path: Path, name: str, output: str) -> None:
    """Write a program as an ONNX file with these names of its input and its output."""
    with quiet():
        torch.onnx.export(
            program,
            (),
            str(path),
            dynamo=True,
            input_names=[name],
            output_names=[output],
            external_data=False,
            verbose=False,
            custom_translation_table=onnx_translations(),
        )
    _forget_shapes(path)


def _forget_shapes(path: Path) -> None:
    """Remove the shapes noted inside the graph: ONNX Runtime's quantizers change layers and then find them wrong."""
    import onnx

    model = onnx.load(path)
    del model.graph.value_info[:]
    onnx.save(model, path)


def _no_weight(product: Any) -> bool:
    """Whether neither factor of an OpenVINO product is made of constants alone."""

    def made_of_constants(node: Any, depth: int = 8) -> bool:
        if node.get_type_name() == "Constant" or not depth:
            # from a weight's codes to its values it is a handful of steps
            return bool(depth)
        inputs = [value.get_source_output().get_node() for value in node.inputs()]
        return bool(inputs) and all(made_of_constants(i, depth - 1) for i in inputs)

    return not any(made_of_constants(value.get_source_output().get_node()) for value in product.inputs())


class _Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


def _reason(error: BaseException) -> str:
    """The line of an exporter's long message that names the operator; else the first one."""
    lines = [line.strip() for e in (error, error.__cause__) if e is not None for line in str(e).splitlines()]
    named = [line for line in lines if "No conversion rule" in line or "Conversion is failed for" in line]
    named += [line for line in lines if "No ONNX function found for" in line or "operator" in line]
    found = (named or [line for line in lines if line] or [type(error).__name__])[0]
    return found.lstrip("- ")


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters print progress, advice and warnings to both streams; failures are raised all the same."""
    names = ("torch.onnx", "torch.export", "onnxscript", "nncf", "openvino", "root")
    levels = {name: logging.getLogger(name).level for name in names}
    _no_telemetry()
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@lru_cache(maxsize=1)
def _no_telemetry() -> None:
    os.environ.setdefault("NNCF_TELEMETRY_DISABLED", "1")
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")

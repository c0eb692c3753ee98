"""A model as an ONNX graph, and how far ONNX Runtime's answers are from PyTorch's.

>>> from vitkit.models.vit import ViT
>>> from vitkit.testing.onnx import onnx_program
>>> model = ViT(img_size=8, patch_size=4, num_classes=5, embed_dim=16, depth=1, num_heads=2)
>>> program = onnx_program(model, torch.zeros(1, 3, 8, 8))  # program.save("model.onnx") writes the file
>>> [list(output.shape) for output in program.model.graph.outputs]
[[1, 5]]
"""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitkit.anatomy import untouched
from vitkit.catalogue import methods
from vitkit.deploy.onnx_translations import onnx_translations
from vitkit.errors import BadInput, MissingExtra, unknown
from vitkit.models.swap import swap
from vitkit.testing.checks import PLACES, NotConforming


def onnx_program(module: nn.Module, example: Tensor | tuple[Tensor, ...]) -> torch.onnx.ONNXProgram:
    """Export a module in eval mode to ONNX, by ``torch.export``; the shapes of the example are those of the program.

    ``torch.onnx.export`` alone does not take every part: it has no translation for stable sorts, and where a bias of
    the attention is learned it plans memory for one kernel and exports another (PyTorch 2.15). So sorts get a
    translation here, and what is exported is a frozen float32 copy on the CPU; ``module`` stays as it is.

    Args:
        module: any module whose outputs are tensors.
        example: its input, or a tuple of them.

    Returns: a ``torch.onnx.ONNXProgram``; its ``save(path)`` writes the file.

    Raises: MissingExtra; NotConforming with the exporter's reason.
    """
    translations = onnx_translations()
    with untouched(_plain(module)) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                model,
                _inputs(example),
                dynamo=True,
                verbose=False,
                custom_translation_table=translations,
            )
        except Exception as error:
            raise NotConforming(f"exports to ONNX: {_reason(error)}") from error
    assert program is not None
    return program


def onnx_gap(
    module: nn.Module, example: Tensor | tuple[Tensor, ...], other: Tensor | tuple[Tensor, ...] | None = None
) -> float:
    """The largest absolute difference between a module in PyTorch and its ONNX export in ONNX Runtime, on the CPU.

    Both in eval mode and float32; ``module`` stays as it is, as does torch's random state.

    >>> from torch import nn
    >>> from vitkit.testing.onnx import onnx_gap
    >>> onnx_gap(nn.Linear(4, 2), torch.ones(3, 4)) < 1e-5
    True

    Args:
        module: any module whose outputs are tensors.
        example: its input, or a tuple of them, with which it is exported and compared.
        other: further input of the same shapes, to compare with too: it shows what the export took from the example
            for good.

    Returns: the difference over all outputs; infinity if shapes differ, or an answer is NaN in one of the two only.

    Raises: MissingExtra; BadInput if ``other`` has other shapes; NotConforming with the reason, if the exporter or
        ONNX Runtime does not take the module.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("Comparing ONNX exports", "onnxruntime", "deploy") from error
    program = onnx_program(module, example)
    tried = [_inputs(example)] + ([] if other is None else [_inputs(other)])
    shapes = [[tuple(x.shape) for x in inputs] for inputs in tried]
    if shapes[-1] != shapes[0]:
        raise BadInput(f"onnx_gap: other has the shapes {shapes[-1]} and example {shapes[0]}; they must be the same.")
    with tempfile.TemporaryDirectory() as folder, untouched(_plain(module)) as model, torch.no_grad():
        path = Path(folder) / "model.onnx"
        program.save(path)
        expected = [[leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)] for inputs in tried]
        try:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            names = [entry.name for entry in session.get_inputs()]
            answers = [session.run(None, {name: x.numpy() for name, x in zip(names, inputs)}) for inputs in tried]
        except Exception as error:
            raise NotConforming(f"runs in ONNX Runtime: {_reason(error)}") from error
    return max(
        _difference(torch.from_numpy(a), b)
        for found, wanted in zip(answers, expected)
        for a, b in zip(found, wanted, strict=True)
    )


def onnx_names() -> list[str]:
    """What of our catalogue has a forward pass to export: all parts, and the smallest network of every file."""
    own = [method for method in methods().values() if method.entry.source == "vitkit"]
    networks: dict[str, str] = {}
    for method in own:
        if method.kind == "backbone":
            networks.setdefault(method.dotted.partition(":")[0], method.name)
    return [method.name for method in own if method.kind == "part"] + list(networks.values())


def onnx_case(name: str) -> tuple[nn.Module, Tensor, str]:
    """A small model with a method of the catalogue in it, images for it, and the method's reason not to export.

    A part sits in the first of :data:`~vitkit.testing.PLACES` that it takes. Parameters that start as zeros get
    small values: behind a gate of zero nothing could be seen.

    Args:
        name: of a part or a network, see :func:`onnx_names`.

    Returns: model, images (B, C, H, W), and ``onnx_note`` or ``export_note`` of the class, "" without.
    Raises: UnknownName for a name that is no part or network; NotConforming if no place takes the part.
    """
    import timm

    known = {n: m for n, m in methods().items() if m.kind in ("part", "backbone")}
    if name not in known:
        raise unknown("part or network", name, known, "vitkit methods")
    method = known[name]
    if method.kind == "part":
        owner: Any = method.load()
        model, images = _hosted(name, method.slot)
    else:
        torch.manual_seed(0)
        owner = model = timm.create_model(method.dotted.partition(":")[2], num_classes=5, img_size=32)
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.1)
    return model.eval(), images, getattr(owner, "onnx_note", "") or getattr(owner, "export_note", "")


def _hosted(name: str, slot: str) -> tuple[nn.Module, Tensor]:
    for place in PLACES:
        model, images = place.host(), place.images()
        try:
            swap(model, slot, name)
            with torch.no_grad():
                model.eval()(images)
        except ValueError:
            # a refusal; whether its words are good ones is what check_part looks at
            continue
        return model, images
    raise NotConforming(f"runs somewhere: {name} refused every place.")


def _plain(module: nn.Module) -> nn.Module:
    # a copy: the exporter runs the module with tensors without values, which must not stay in a cache of it
    return copy.deepcopy(module).cpu().float()


def _inputs(example: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    inputs = example if isinstance(example, tuple) else (example,)
    return tuple(x.detach().cpu().float() if x.is_floating_point() else x.cpu() for x in inputs)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    a, b = a.double(), b.double()
    # infinities of one sign, and NaN in both, are the same answer
    gap = (a - b).abs().masked_fill((a == b) | (a.isnan() & b.isnan()), 0).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(gap.max()) if gap.numel() else 0.0


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first: the exporter wraps errors in errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

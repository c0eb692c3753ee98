"""Quantize the linear layers of a network one after another: what RTN, GPTQ and GPTAQ share around their solvers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.anatomy import check, find_host, untouched
from vitkit.compress.change import Change
from vitkit.compress.cost import count_params, size_bytes
from vitkit.compress.quantize.grid import Grid
from vitkit.compress.quantize.linear import ActLinear, QuantLinear, TokenQuantizer
from vitkit.compress.quantize.solver import Solution, round_to_nearest
from vitkit.compress.statistics import CrossGram, Gram
from vitkit.compress.walker import BlockWalker, Images, Site, default_layers
from vitkit.errors import BadInput

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How many bits, and on which grid.

    Args:
        w_bits: of the weights, 2 to 8; 16 leaves them off any grid.
        a_bits: of every layer's input, per token, asymmetric, dynamic; None or 16 leaves inputs alone.
        sym: symmetric weight grid.
        group_size: inputs of a row that share a step; −1 for one step per output channel.
        w_clip: search the clipping range of each step (exponent 2.4).
        head_bits: round the classifier's weights to nearest as well; None or 16 leaves it alone.

    Raises: BadInput for values out of range.
    """

    w_bits: int = 4
    a_bits: int | None = None
    sym: bool = False
    group_size: int = -1
    w_clip: bool = True
    head_bits: int | None = None

    def __post_init__(self) -> None:
        for name, bits in (("w_bits", self.w_bits), ("a_bits", self.a_bits), ("head_bits", self.head_bits)):
            if bits is not None and bits != 16 and not 2 <= bits <= 8:
                raise BadInput(f"{name}={bits}: use 2 to 8 bits, or 16 for no quantization.")
        if self.group_size != -1 and self.group_size < 1:
            raise BadInput(f"group_size={self.group_size}: use a number of inputs, or -1 for one step per channel.")

    @property
    def input_bits(self) -> int | None:
        return None if self.a_bits == 16 else self.a_bits

    def grid(self, bits: int | None = None) -> Grid | None:
        """The weight grid; None at 16 bits."""
        bits = self.w_bits if bits is None else bits
        if bits == 16:
            return None
        return Grid(
            bits=bits,
            symmetric=self.sym,
            granularity="channel" if self.group_size == -1 else "group",
            group_size=self.group_size,
            clip_search=self.w_clip,
        )


class LayerStatistics:
    """What the inputs X of the compressed and X̃ of the full-precision layer tell about it.

    Means over m images of ``H = 2 X Xᵀ``, ``D = 2 (X̃ − X) Xᵀ`` and ``Δ = 2 (X̃ − X)(X̃ − X)ᵀ``.
    """

    def __init__(self, num_features: int, dtype: torch.dtype = torch.float32) -> None:
        self.gram = Gram(num_features, dtype, factor=2.0)
        self.cross = CrossGram(num_features, dtype, factor=2.0)
        self.drift = Gram(num_features, dtype, factor=2.0)

    def update(self, x: Tensor, x_full: Tensor) -> None:
        x, x_full = x.to(self.gram.dtype), x_full.to(self.gram.dtype)
        difference = x_full - x
        self.gram.update(x)
        self.cross.update(difference, x)
        self.drift.update(difference)

    def error(self, quantized: Tensor, weight: Tensor) -> float:
        """``‖Q X − W X̃‖² / ‖W X̃‖²``."""
        h, d, drift = (s.value.double() for s in (self.gram, self.cross, self.drift))
        w = weight.double()
        e = quantized.double() - w
        # in terms of the differences: subtracting the two large squared norms would leave nothing but rounding
        wrong = ((e @ h) * e).sum() - 2 * ((e @ d.T) * w).sum() + ((w @ drift) * w).sum()
        target = ((w @ (h + d + d.T + drift)) * w).sum()
        return float(wrong.clamp(min=0) / target.clamp(min=torch.finfo(torch.float64).tiny))


Solver = Callable[[Tensor, LayerStatistics, "Grid | None"], Solution]


def quantize_layers(
    model: nn.Module,
    images: Images | None,
    name: str,
    precision: Precision,
    solver: Solver | None,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[nn.Module, Change]:
    """Quantize every linear layer that :func:`~vitkit.compress.walker.default_layers` names, in forward order.

    Args:
        model: any network; not changed.
        images: (N, C, H, W) in [0, 1] or batches of them (see :func:`~vitkit.compress.walker.images_of`); labels are
            not read; None only without a solver.
        name: of the method, for records and progress.
        precision: bits and grid.
        solver: ``(W, statistics, grid) -> Solution``; None rounds to nearest.
        batch_size: images pushed through at once.
        progress: called as ``progress(name, layers done, layers)``.

    Returns: the quantized copy, in the mode of ``model``, and the account of the change.

    Raises: BadInput if there is no layer to quantize, or ``group_size`` does not divide a layer's inputs.
    """
    new = copy.deepcopy(model)
    keep = default_layers(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and keep(n, m)}
    _check_layers(model, linears, precision)
    job = _Job(new, precision, name, solver, progress, total=len(linears))
    modes = [(n, m.training) for n, m in new.named_modules()]
    new.eval()
    with untouched(model):
        if solver is not None:
            if images is None:
                raise BadInput(f"{name} needs calibration images.")
            job.walk(BlockWalker(model, new, images, batch_size, keep=keep))
        else:
            for layer in linears:
                job.replace(layer, None)
            if images is not None:
                job.measure(BlockWalker(model, new, images, batch_size, keep=keep, sequential=False))
    job.finish(model, list(linears))
    for path, training in modes:
        # parents come first, so what a replaced layer holds follows the layer
        new.get_submodule(path).train(training)
    return new, job.change(model)


class _Job:
    """One run over one network: replaces layers of ``new`` and remembers what was done."""

    def __init__(
        self,
        new: nn.Module,
        precision: Precision,
        name: str,
        solver: Solver | None,
        progress: Progress | None,
        total: int,
    ) -> None:
        self.new, self.precision, self.name, self.solver = new, precision, name, solver
        self.progress, self.total = progress, total
        self.rows: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.has_perm = False
        self.head: str | None = None

    def walk(self, walker: BlockWalker) -> None:
        hooks = {}
        if self.precision.input_bits is not None:
            act = TokenQuantizer(self.precision.input_bits)
            for name, module in self.new.named_modules():
                if isinstance(module, nn.Linear) and walker.keep(name, walker.reference.get_submodule(name)):
                    # a hook leaves the walk's names alone; the replaced layer brings its own quantizer
                    hooks[name] = module.register_forward_pre_hook(partial(_quantize_input, act))
        try:
            for site in walker:
                statistics = _gather(site)
                for name in site.names:
                    if name not in statistics:
                        self.skipped[name] = "its forward was never called on the calibration images"
                        continue
                    if name in hooks:
                        hooks.pop(name).remove()
                    self.replace(name, statistics[name], site)
        finally:
            for handle in hooks.values():
                handle.remove()

    @torch.no_grad()
    def measure(self, walker: BlockWalker) -> None:
        """Fill in the errors of layers that were replaced without data, in one pass."""
        rows = {row["name"]: row for row in self.rows}
        for site in walker:
            sums: dict[str, list[float]] = {}
            for batch in site.batches():
                for name, (x, x_full) in batch.items():
                    layer, weight = self.new.get_submodule(name), _linear(walker.reference, name).weight
                    act = getattr(layer, "act", nn.Identity())
                    ours = F.linear(act(x).float(), layer.weight.float())  # type: ignore[arg-type]
                    target = F.linear(x_full.float(), weight.float())
                    total = sums.setdefault(name, [0.0, 0.0])
                    total[0] += float((ours - target).double().square().sum())
                    total[1] += float(target.double().square().sum())
            for name, (wrong, size) in sums.items():
                rows[name]["error"] = wrong / max(size, torch.finfo(torch.float64).tiny)
                rows[name]["block"] = site.block

    def replace(self, name: str, statistics: LayerStatistics | None, site: Site | None = None) -> None:
        linear = _linear(self.new, name)
        weight = linear.weight.detach().float()
        grid = self.precision.grid()
        layer, solution = self._layer(linear, weight, statistics, grid)
        _set(self.new, name, layer)
        row: dict[str, Any] = {
            "name": name,
            "block": None if site is None else site.block,
            "bits": self.precision.w_bits,
            "weight_error": float((layer.weight.detach() - weight).double().square().sum() / _square(weight)),
            "error": None if statistics is None else statistics.error(layer.weight.detach().float(), weight),
            "packed_bytes": size_bytes(layer),
            "damp": solution.damp,
        }
        self.rows.append(row)
        if self.progress:
            self.progress(self.name, len(self.rows), self.total)

    def _layer(
        self, linear: nn.Linear, weight: Tensor, statistics: LayerStatistics | None, grid: Grid | None
    ) -> tuple[QuantLinear | nn.Linear, Solution]:
        if self.solver is not None and statistics is not None:
            solution = self.solver(weight, statistics, grid)
        elif grid is not None:
            solution = round_to_nearest(weight, grid)
        else:
            solution = Solution(weight, None, None, None)
        a_bits = self.precision.input_bits
        if grid is not None:
            self.has_perm = self.has_perm or solution.perm is not None
            return QuantLinear.from_solution(linear, solution, grid, a_bits), solution
        with torch.no_grad():
            linear.weight.copy_(solution.weight)
        return (linear if a_bits is None else ActLinear.from_linear(linear, a_bits)), solution

    def finish(self, model: nn.Module, names: list[str]) -> None:
        """Quantize the head, write the record that rebuilds the structure, and check the result."""
        precision, head = self.precision, None
        if precision.head_bits not in (None, 16):
            head = _head_name(model)
            linear = _linear(self.new, head)
            grid = Grid(bits=precision.head_bits, symmetric=precision.sym, clip_search=precision.w_clip)
            weight = linear.weight.detach().float()
            _set(self.new, head, QuantLinear.from_solution(linear, round_to_nearest(weight, grid), grid))
        host = find_host(self.new)
        owner = self.new if host is None else host
        prefix = "" if host is None else next(n for n, m in self.new.named_modules() if m is host)
        done = [row["name"] for row in self.rows]
        options = {
            "layers": [_below(prefix, n) for n in names if n in done],
            "w_bits": precision.w_bits,
            "a_bits": precision.input_bits,
            "sym": precision.sym,
            "group_size": precision.group_size,
            "has_perm": self.has_perm,
            "head": None if head is None else _below(prefix, head),
            "head_bits": None if head is None else precision.head_bits,
        }
        _record(owner, self.name, options)
        self.head = head
        if host is not None:
            check(self.new)

    def change(self, model: nn.Module) -> Change:
        precision = self.precision
        errors = [row["error"] for row in self.rows if row["error"] is not None]
        what = f"{len(self.rows)} linear layers to {precision.w_bits}-bit weights"
        if precision.input_bits is not None:
            what += f" and {precision.input_bits}-bit inputs"
        if self.head is not None:
            what += f", the classifier to {precision.head_bits}-bit weights"
        return Change(
            what=what,
            params_before=count_params(model),
            params_after=count_params(self.new),
            touched=tuple(row["name"] for row in self.rows) + (() if self.head is None else (self.head,)),
            lost="" if precision.w_bits == 16 else "the quantized weights are integers and cannot be trained further",
            details={
                "method": self.name,
                "w_bits": precision.w_bits,
                "a_bits": precision.input_bits,
                "bytes_before": size_bytes(model),
                "packed_bytes": size_bytes(self.new),
                "mean_error": sum(errors) / len(errors) if errors else None,
                "layers": self.rows,
                "skipped": self.skipped,
                "realised": "memory-only" if precision.w_bits != 16 else "no",
            },
        )


def restore_layers(model: nn.Module, name: str, options: dict[str, Any]) -> nn.Module:
    """Put empty quantized layers where ``options`` says, so that the saved weights fit; ``model`` is changed.

    Raises: BadInput if a layer is missing or is no ``nn.Linear``.
    """
    host = find_host(model)
    owner = model if host is None else host
    wanted = dict.fromkeys(options["layers"], (options["w_bits"], options["a_bits"], options["group_size"]))
    if options["head"] is not None:
        wanted[options["head"]] = (options["head_bits"], None, -1)
    modules = dict(owner.named_modules())
    for layer, (bits, a_bits, group_size) in wanted.items():
        linear = modules.get(layer)
        if type(linear) is not nn.Linear:
            kind = "missing" if linear is None else f"a {type(linear).__name__}"
            raise BadInput(f"{name} quantized {layer!r}, which is {kind} in this model instead of a Linear layer.")
        if bits == 16:
            if a_bits is not None:
                _set(owner, layer, ActLinear.from_linear(linear, a_bits))
            continue
        quantized = QuantLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            bits=bits,
            symmetric=options["sym"],
            group_size=group_size,
            has_perm=options["has_perm"] and group_size != -1,
            a_bits=a_bits,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        _set(owner, layer, quantized.train(linear.training))
    _record(owner, name, options)
    return model


def _gather(site: Site) -> dict[str, LayerStatistics]:
    """Statistics of each layer of a site; layers with one input share them."""
    found: dict[str, LayerStatistics] = {}
    for batch in site.batches():
        seen: dict[int, LayerStatistics] = {}
        for name, (x, x_full) in batch.items():
            if id(x) not in seen:
                seen[id(x)] = found.get(name) or LayerStatistics(x.shape[-1])
                seen[id(x)].update(x, x_full)
            found[name] = seen[id(x)]
    return found


def _quantize_input(act: TokenQuantizer, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (act(args[0]), *args[1:])


def _check_layers(model: nn.Module, linears: dict[str, nn.Linear], precision: Precision) -> None:
    if not linears:
        done = any(isinstance(m, (QuantLinear, ActLinear)) for m in model.modules())
        why = (
            "its linear layers are quantized already; start from the full-precision model."
            if done
            else "it has none besides its classifier, and convolutions, adapters and other subclasses are left alone."
        )
        raise BadInput(f"There is no plain linear layer to quantize in {type(model).__name__}: {why}")
    group = precision.group_size
    wrong = sorted({m.in_features for m in linears.values() if group != -1 and m.in_features % group})
    if wrong:
        raise BadInput(f"group_size={group} does not divide the widths {wrong} of this model's linear layers.")
    if precision.head_bits not in (None, 16):
        _head_name(model)


def _head_name(model: nn.Module) -> str:
    """The classifier's linear layer: the last one outside the layers that are quantized anyway."""
    keep = default_layers(model)
    host = find_host(model)
    head = None if host is None else host.head
    for name, module in model.named_modules():
        if type(module) is nn.Linear and (module is head if host is not None else not keep(name, module)):
            return name
    raise BadInput("head_bits was given, but the model has no linear classifier; leave it out.")


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found = model.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


def _record(owner: nn.Module, name: str, options: dict[str, Any]) -> None:
    # a new list: a shallow copy of the model must not see this entry
    owner.applied = [*getattr(owner, "applied", []), {"name": name, "options": options}]  # type: ignore[assignment]


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _below(prefix: str, name: str) -> str:
    return name[len(prefix) + 1 :] if prefix else name


def _square(x: Tensor) -> Tensor:
    return x.double().square().sum().clamp(min=torch.finfo(torch.float64).tiny)

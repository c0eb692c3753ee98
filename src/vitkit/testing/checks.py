"""Conformance checks, one per kind of method; run over the whole catalogue by our tests and open to yours.

>>> from vitkit.testing import check_part
>>> from vitkit.models.parts.normalizers.sinkhorn import Sinkhorn
>>> report = check_part(Sinkhorn)
>>> "gradients" in report.passed
True

Each check raises :class:`NotConforming` with the name of the rule, the place it was tried in and what was seen.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.models.normalized import NormalizedModel
from vitkit.models.swap import SwapRecord, swap
from vitkit.models.vit import ViT, collect_aux


class NotConforming(AssertionError):
    """A method breaks a rule of its kind."""


@dataclass
class Conformance:
    """What was checked.

    Attributes: passed: names of the rules; refused: place → the method's own words, where it said by a named error
    that it does not fit.
    """

    passed: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """A tiny host to try a method in."""

    grid: tuple[int, int]
    class_token: bool = True
    registers: int = 0
    in_chans: int = 3

    def host(self, seed: int = 0) -> ViT:
        """Width 32, two blocks, four heads, patch 4, five classes."""
        torch.manual_seed(seed)
        model = ViT(
            img_size=(4 * self.grid[0], 4 * self.grid[1]),
            patch_size=4,
            in_chans=self.in_chans,
            num_classes=5,
            embed_dim=32,
            depth=2,
            num_heads=4,
            mlp_ratio=2.0,
            class_token=self.class_token,
            global_pool="token" if self.class_token else "avg",
            reg_tokens=self.registers,
            weight_init="jax",
        )
        # this initialisation zeroes the head, and equal zero logits would prove nothing
        nn.init.normal_(model.get_parameter("head.weight"), std=0.3)
        return model

    def images(self, batch: int = 3, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, self.in_chans, 4 * self.grid[0], 4 * self.grid[1], generator=generator)

    def __str__(self) -> str:
        prefix = int(self.class_token) + self.registers
        return f"grid {self.grid[0]}×{self.grid[1]}, {prefix} prefix tokens, {self.in_chans} channels"


# odd grids; 0, 1 and 5 prefix tokens; 1, 3 and 5 channels; 3×5 + 1 is a power of two, 4×4 a square
PLACES = (
    Place((5, 7)),
    Place((5, 7), class_token=False),
    Place((5, 7), registers=4, in_chans=1),
    Place((3, 5), in_chans=5),
    Place((4, 4), class_token=False),
)


def _require(condition: bool, rule: str, place: object, seen: str) -> None:
    if not condition:
        raise NotConforming(f"{rule}: {seen} ({place}).")


def _close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a.float(), b.float(), atol=tolerance, rtol=tolerance))


def _eval(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(images)


# -- parts -----------------------------------------------------------------------------------------------------------


def check_part(
    part: type[nn.Module] | str,
    slot: str | None = None,
    places: Iterable[Place] = PLACES,
    dynamo: bool = True,
    **options: Any,
) -> Conformance:
    """Try a part in tiny hosts.

    Rules: runs (or refuses by a ValueError that says what it needs) on odd grids, with 0, 1 and 5 prefix tokens and
    1, 3 and 5 channels; finite; float32 and bfloat16; train and eval; input not changed; same seed, same result;
    every new parameter gets a finite, non-zero gradient within two optimizer steps (``no_gradient`` lists exceptions
    by name); an image alone has the input gradient it has in a batch; ``deepcopy`` and ``state_dict`` round trips;
    activation checkpointing; ``preserves = "exact"`` keeps the
    logits; undo puts the old modules back; no graph breaks under ``torch.compile`` (unless ``compile_note`` says why);
    ``torch.export`` (unless ``export_note`` says why not).

    Args:
        part: a class with ``from_standard(old, spec, **options)``, or its catalogue name.
        slot: default: the part's own ``slot``.
        places: where to try it.
        dynamo: check graph breaks and export, which takes seconds.
        options: given to the part.

    Raises: NotConforming.
    """
    from vitkit.models.swap import canonical_slot, part_class

    wanted = slot or getattr(part, "slot", None)
    if isinstance(part, str):
        from vitkit.catalogue import methods

        wanted = slot or methods()[part].slot
    cls = part_class(canonical_slot(str(wanted)), part)
    report, tried = Conformance(), 0
    for place in places:
        try:
            model, record = _swapped(place, cls, str(wanted), options)
            _eval(model, place.images())
        except ValueError as error:
            _require(len(str(error)) > 20, "refuses with a reason", place, f"the error says only {str(error)!r}")
            report.refused[str(place)] = str(error)
            continue
        tried += 1
        _part_in_place(place, cls, str(wanted), options, model, record, report)
    _require(tried > 0, "runs somewhere", cls.__name__, f"it refused every place: {report.refused}")
    if dynamo and not getattr(cls, "compile_note", ""):
        place = next(p for p in places if str(p) not in report.refused)
        model, _ = _swapped(place, cls, str(wanted), options)
        torch._dynamo.reset()
        breaks = torch._dynamo.explain(model.eval())(place.images()).graph_break_count
        _require(breaks == 0, "compiles", place, f"{breaks} graph breaks; document the reason in compile_note")
        report.passed.add("compiles")
    if dynamo and not getattr(cls, "export_note", ""):
        place = next(p for p in places if str(p) not in report.refused)
        _check_export(place, _swapped(place, cls, str(wanted), options)[0], place.images(), report)
    return report


def _check_export(where: object, model: nn.Module, images: Tensor, report: Conformance) -> None:
    """``torch.export`` takes the model for any number of images, and the exported program answers as it does."""
    model.eval()
    batch = torch.export.Dim("batch", min=1, max=65536)
    several = torch.cat([images, images.flip(-1)])
    try:
        program = torch.export.export(model, (several,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as error:
        # whatever the tracer raises, its first line says what it stumbled over
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise NotConforming(
            f"exports: {reason}; take the number of images from x.shape[0], since len(x) binds it, or document the "
            f"reason in export_note ({where})."
        ) from error
    with torch.no_grad():
        same = _close(program.module()(several), model(several), 1e-4)
        same = same and _close(program.module()(images), model(images), 1e-4)
    _require(same, "exports", where, "the exported program answers differently")
    report.passed.add("exports")


def _swapped(place: Place, cls: type, slot: str, options: dict[str, Any], seed: int = 0) -> tuple[ViT, SwapRecord]:
    model = place.host(seed)
    record = swap(model, slot, cls, **options)
    return model, record


def _part_in_place(
    place: Place,
    cls: type,
    slot: str,
    options: dict[str, Any],
    model: ViT,
    record: SwapRecord,
    report: Conformance,
) -> None:
    images = place.images()
    kept = images.clone()
    out = _eval(model, images)
    _require(tuple(out.shape) == (3, 5), "shape", place, f"logits have shape {tuple(out.shape)}, not (3, 5)")
    _require(bool(torch.isfinite(out).all()), "finite", place, "logits are not finite")
    _require(torch.equal(images, kept), "input not changed", place, "the images were changed in place")
    _require(torch.equal(out, _eval(model, images)), "deterministic in eval", place, "two runs differ")
    again, _ = _swapped(place, cls, slot, options)
    _require(_close(_eval(again, images), out, 1e-6), "same seed, same result", place, "a second build differs")
    _require(_close(_eval(copy.deepcopy(model), images), out, 1e-6), "deepcopy", place, "the copy answers differently")
    other, _ = _swapped(place, cls, slot, options, seed=9)
    other.load_state_dict(model.state_dict())
    _require(_close(_eval(other, images), out, 1e-5), "state_dict", place, "loaded weights answer differently")
    if record.preserves == "exact":
        gap = float((_eval(place.host(), images) - out).abs().max())
        _require(gap <= 1e-4, 'preserves "exact"', place, f"logits moved by {gap:.1e}")
    half = copy.deepcopy(model).to(torch.bfloat16)
    low = _eval(half, images.to(torch.bfloat16))
    _require(low.dtype == torch.bfloat16 and bool(torch.isfinite(low).all()), "bfloat16", place, f"{low.dtype} or NaN")
    report.passed |= {"shape", "finite", "input not changed", "deterministic in eval", "same seed, same result"}
    _check_alone(place, model, images, report)
    report.passed |= {"deepcopy", "state_dict", "bfloat16"} | ({"preserves"} if record.preserves == "exact" else set())
    _check_gradients(place, cls, model, report)
    _check_checkpointing(place, again, report)
    _check_undo(place, cls, slot, options, report)


def _check_alone(place: object, model: nn.Module, images: Tensor, report: Conformance) -> None:
    """An image alone has the logits and the input gradient that it has in a batch: explanations stand on both.

    A batch norm in eval mode on a CPU (PyTorch 2.15) reads the gradient of a single image wrongly if it comes back
    through ``flatten(2).transpose(1, 2)``; :func:`vitkit.models.cells.as_tokens` avoids it.
    """
    model.eval()

    def gradient(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        logits = model(x)
        (found,) = torch.autograd.grad((logits * torch.linspace(-1, 1, logits.shape[-1])).sum(), x)
        return found

    together, alone = gradient(images), torch.cat([gradient(image[None]) for image in images])
    gap = float((together - alone).abs().max() / together.abs().max().clamp(min=1e-12))
    _require(gap < 1e-2, "an image alone", place, f"its input gradient differs by {gap:.2g} from that in a batch")
    report.passed.add("an image alone")


def _check_gradients(place: Place, cls: type, model: ViT, report: Conformance) -> None:
    exempt = tuple(getattr(cls, "no_gradient", ()))
    model.train()
    images = place.images(batch=6)
    labels = torch.arange(6) % 5
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    reached: dict[str, bool] = {}
    for _ in range(2):
        optimizer.zero_grad()
        with collect_aux(model) as aux:
            loss = nn.functional.cross_entropy(model(images), labels)
            if model.read_out is None:
                # a class token reads nothing of the last block's patches, whose parameters count too
                tokens = model.forward_features(images)
                loss = loss + (tokens * torch.linspace(-1, 1, tokens.shape[-1])).mean()
        (loss + sum(aux.values())).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                finite = bool(torch.isfinite(p.grad).all())
                _require(finite, "gradients", place, f"the gradient of {name} is not finite")
                reached[name] = reached.get(name, False) or bool((p.grad != 0).any())
        optimizer.step()
    missed = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not reached.get(name, False) and not any(e in name for e in exempt)
    ]
    _require(not missed, "gradients", place, f"no gradient reaches {missed[:4]}")
    report.passed.add("gradients")


def _check_checkpointing(place: Place, model: ViT, report: Conformance) -> None:
    images = place.images()
    grads = []
    for flag in (False, True):
        model.train()
        model.set_grad_checkpointing(flag)
        model.zero_grad()
        torch.manual_seed(3)
        model(images).sum().backward()
        grads.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    same = all((a is None) == (b is None) and (a is None or b is None or _close(a, b, 1e-4)) for a, b in zip(*grads))
    _require(same, "activation checkpointing", place, "gradients differ with recomputation")
    report.passed.add("activation checkpointing")


def _check_undo(place: Place, cls: type, slot: str, options: dict[str, Any], report: Conformance) -> None:
    model = place.host()
    before = {name: id(m) for name, m in model.named_modules()}
    keys, images = list(model.state_dict()), place.images()
    plain = _eval(model, images)
    swap(model, slot, cls, **options).undo()
    _require(list(model.state_dict()) == keys, "undo", place, "state_dict keys are not the old ones")
    after = {name: id(m) for name, m in model.named_modules() if not name.endswith("attn.position")}
    _require(all(before[n] == i for n, i in after.items()), "undo", place, "other module objects are in place")
    _require(torch.equal(_eval(model, images), plain), "undo", place, "the output is not bitwise the old one")
    report.passed.add("undo")


# -- objectives, transforms, probes, backbones -----------------------------------------------------------------------


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
        "taps": [m.taps for m in model.modules() if isinstance(m, ViT)],
        "fused": [m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")],
        "modules": [id(m) for m in model.modules()],
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    return a == b


def _left_as_found(before: dict[str, Any], model: nn.Module, place: object) -> None:
    after = _snapshot(model)
    changed = [name for name in before if not _same(before[name], after[name])]
    _require(not changed, "leaves the model as found", place, f"it changed {', '.join(changed)}")


def _classifier(place: Place) -> NormalizedModel:
    chans = place.in_chans
    return NormalizedModel(place.host(), [0.5] * chans, [0.25] * chans)


def check_probe(
    probe: Callable[..., Any], places: Iterable[Place] = PLACES[:3], model: nn.Module | None = None, **options: Any
) -> Conformance:
    """Call ``probe(model, images, …)`` and see that nothing is left behind.

    Rules: weights, modes, hooks, ``requires_grad``, grads, taps, attention kernel and torch's random state are as
    before, in train and in eval mode; the images are not changed; a second call with the same seed gives the same
    result. Probes that take ``labels`` get them.

    Raises: NotConforming.
    """
    report = Conformance()
    wants_labels = "labels" in inspect.signature(probe).parameters
    for place in places:
        for training in (True, False):
            net = model if model is not None else _classifier(place)
            net.train(training)
            next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
            images = place.images()
            arguments: dict[str, Any] = dict(options)
            if wants_labels:
                arguments.setdefault("labels", torch.tensor([0, 1, 2]))
            before, kept = _snapshot(net), images.clone()
            torch.manual_seed(5)
            state = torch.get_rng_state()
            first = probe(net, images, **arguments)
            _require(torch.equal(torch.get_rng_state(), state), "random state", place, "torch's generator moved on")
            _left_as_found(before, net, place)
            _require(torch.equal(images, kept), "input not changed", place, "the images were changed in place")
            second = probe(net, images, **arguments)
            _require(_equal_results(first, second), "same seed, same result", place, "two calls differ")
    report.passed |= {"leaves the model as found", "input not changed", "same seed, same result", "random state"}
    return report


def _equal_results(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and bool(torch.allclose(a.float(), b.float(), equal_nan=True))
    if hasattr(a, "__dataclass_fields__"):
        return all(_equal_results(getattr(a, f), getattr(b, f)) for f in a.__dataclass_fields__)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal_results(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal_results(x, y) for x, y in zip(a, b))
    # timings and other plain values may differ from call to call
    return type(a) is type(b)


def check_transform(transform: Callable[..., Any], places: Iterable[Place] = PLACES[:3], **options: Any) -> Conformance:
    """Call ``transform(model, images, …) -> (model, change)``.

    Rules: the input model is as before and shares nothing that was changed; the new one answers with finite logits
    in float32 and bfloat16; ``change`` has what, params_before, params_after, touched; ``deepcopy`` and
    ``state_dict`` round trips; the module's ``restore(model, options)`` rebuilds the structure so that the weights
    fit; ``anatomy.check`` is content; same seed, same result. Transforms that take ``labels`` get them.

    Raises: NotConforming.
    """
    import importlib

    from vitkit.anatomy import check, find_host

    report = Conformance()
    for place in places:
        model = _classifier(place).eval()
        images = place.images(batch=8)
        if "labels" in inspect.signature(transform).parameters:
            options = {"labels": torch.arange(8) % 5, **options}
        before, plain = _snapshot(model), _eval(model, images)
        torch.manual_seed(5)
        new, change = transform(model, images, **options)
        _left_as_found(before, model, place)
        _require(torch.equal(_eval(model, images), plain), "input model not changed", place, "it answers differently")
        out = _eval(new, images)
        _require(tuple(out.shape) == (8, 5) and bool(torch.isfinite(out).all()), "runs", place, "bad logits")
        for name in ("what", "params_before", "params_after", "touched"):
            _require(hasattr(change, name), "account of the change", place, f"change has no {name}")
        _require(_close(_eval(copy.deepcopy(new), images), out, 1e-6), "deepcopy", place, "the copy differs")
        low = _eval(copy.deepcopy(new).to(torch.bfloat16), images.to(torch.bfloat16))
        _require(bool(torch.isfinite(low).all()), "bfloat16", place, "NaN or infinite logits")
        check(new)
        vit = find_host(new)
        restore = getattr(importlib.import_module(transform.__module__), "restore", None)
        applied = list(getattr(vit, "applied", []))
        if restore is not None and applied:
            fresh: nn.Module = _classifier(place)
            for step in applied:
                fresh = restore(fresh, dict(step["options"]))
            fresh.load_state_dict(new.state_dict())
            _require(_close(_eval(fresh, images), out, 1e-5), "restore", place, "the restored model differs")
            report.passed.add("restore")
        torch.manual_seed(5)
        again, _ = transform(model, images, **options)
        _require(_close(_eval(again, images), out, 1e-6), "same seed, same result", place, "two calls differ")
    report.passed |= {"input model not changed", "runs", "account of the change", "deepcopy", "bfloat16"}
    return report


def check_objective(objective: type[nn.Module], places: Iterable[Place] = PLACES[:3], **options: Any) -> Conformance:
    """Train ``objective(model, **options)`` for two steps.

    Rules: returns a dict with a finite scalar ``loss``, ``output`` and ``logs``; gradients reach the encoder; the
    batch is not changed; ``encoder()`` returns the model with its own parameter objects and without
    pretraining-only parts; a state_dict round trip continues with the same loss.

    Raises: NotConforming.
    """
    report = Conformance()
    for place in places:
        model = _classifier(place)
        torch.manual_seed(2)
        loss_of = objective(model, **options)
        batch = {"images": place.images(batch=4), "labels": torch.tensor([0, 1, 2, 3]), "indices": torch.arange(4)}
        kept = batch["images"].clone()
        optimizer = torch.optim.SGD(loss_of.parameters(), lr=0.01)
        for step in range(2):
            torch.manual_seed(7)
            out = loss_of(batch)
            keys = {"loss", "output", "logs"}
            _require(keys <= set(out), "returns loss, output and logs", place, f"returned {sorted(out)}")
            good = out["loss"].ndim == 0 and bool(torch.isfinite(out["loss"]))
            _require(good, "finite scalar loss", place, f"loss is {out['loss']}")
            optimizer.zero_grad()
            out["loss"].backward()
            reached = sum(bool(p.grad is not None and (p.grad != 0).any()) for p in model.parameters())
            _require(reached > 4, "gradients reach the encoder", place, f"only {reached} tensors")
            optimizer.step()
            if hasattr(loss_of, "after_step"):
                loss_of.after_step(step + 1, 2)
        _require(torch.equal(batch["images"], kept), "batch not changed", place, "the images were changed")
        torch.manual_seed(11)
        expected = loss_of(batch)["loss"].detach()
        torch.manual_seed(3)
        twin = objective(_classifier(place), **options)
        twin.load_state_dict(loss_of.state_dict())
        torch.manual_seed(11)
        _require(
            _close(twin(batch)["loss"].detach(), expected, 1e-5), "state_dict", place, "another loss after loading"
        )
        if hasattr(loss_of, "encoder"):
            own = {id(p) for p in loss_of.encoder().parameters()}
            _require(own <= {id(p) for p in model.parameters()}, "encoder()", place, "it holds foreign parameters")
    report.passed |= {
        "returns loss, output and logs",
        "finite scalar loss",
        "gradients reach the encoder",
        "state_dict",
    }
    return report


def check_backbone(name: str, image_size: int = 64, in_chans: int = 3, **options: Any) -> Conformance:
    """Create a network by its timm name and try timm's contract.

    Rules: ``forward_features``, ``forward_head`` and ``forward`` agree; ``reset_classifier``; ``head_hidden_size``;
    ``features_only`` gives maps of the declared widths, or refuses by a ValueError; an image alone has the input
    gradient it has in a batch; gradient checkpointing; ``state_dict`` and ``deepcopy``; ``torch.export`` (unless
    ``export_note`` of the class says why not).

    Raises: NotConforming.
    """
    import timm

    report = Conformance()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, in_chans=in_chans, **options).eval()
    images = torch.rand(2, in_chans, image_size, image_size, generator=torch.Generator().manual_seed(1))
    out = _eval(model, images)
    _require(tuple(out.shape) == (2, 5) and bool(torch.isfinite(out).all()), "forward", name, f"{tuple(out.shape)}")
    with torch.no_grad():
        features = model.forward_features(images)
        _require(_close(model.forward_head(features), out), "features then head", name, "differs from forward")
        pooled = model.forward_head(features, pre_logits=True)
    _require(pooled.shape[-1] == model.head_hidden_size, "head_hidden_size", name, f"{tuple(pooled.shape)}")
    _require(_close(_eval(copy.deepcopy(model), images), out, 1e-6), "deepcopy", name, "the copy differs")
    _check_alone(name, model, images, report)
    if not getattr(model, "export_note", ""):
        _check_export(name, copy.deepcopy(model), images, report)
    try:
        extractor = timm.create_model(name, features_only=True, in_chans=in_chans, **options).eval()
        with torch.no_grad():
            widths = [m.shape[1] for m in extractor(images)]
        _require(widths == extractor.feature_info.channels(), "features_only", name, f"maps have {widths} channels")
        report.passed.add("features_only")
    except ValueError as error:
        report.refused["features_only"] = str(error)
    twin = timm.create_model(name, num_classes=5, in_chans=in_chans, **options)
    twin.load_state_dict(model.state_dict())
    _require(_close(_eval(twin, images), out, 1e-5), "state_dict", name, "loaded weights differ")
    twin.set_grad_checkpointing(True)
    twin.train()
    twin(images).sum().backward()
    report.passed |= {"forward", "features then head", "deepcopy", "state_dict", "gradient checkpointing"}
    twin.reset_classifier(3)
    _require(tuple(_eval(twin, images).shape) == (2, 3), "reset_classifier", name, "three classes were asked for")
    report.passed.add("reset_classifier")
    return report

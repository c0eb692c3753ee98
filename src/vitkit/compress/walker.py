"""Visit the linear layers of two copies of a network in order, with the inputs each copy gives them.

One copy is the network as it was (the reference), the other is being compressed while the walk goes on. Both see the
same images, and the inputs of a layer are matched token by token. The walker knows nothing of quantizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitkit.anatomy import find_host, linear_groups, linear_inputs, role_of
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout

# a tensor of images, or batches of them as loaders give them (see images_of)
Images = Tensor | Iterable[Any]


@dataclass(frozen=True)
class Site:
    """A sub-group of linear layers of one block, ready to be looked at and replaced.

    Attributes:
        block: index of the block; 0 for a network without a host, which is walked as one block.
        group: index of the sub-group inside the block.
        names: qualified names of the layers, the same in both copies.
    """

    block: int
    group: int
    names: tuple[str, ...]
    _batches: Callable[[], Iterator[dict[str, tuple[Tensor, Tensor]]]] = field(repr=False)

    def batches(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """For each batch: name → (X, X̃), inputs (B, …, n) of the compressed and of the reference layer.

        Computed anew at every call, on the compressed block as it is at that moment. A token that is padding is zero in
        both. Layers that got the very same tensor (q, k, v) get the same objects here. A layer that was not called is
        missing from the dict.
        """
        return self._batches()


class BlockWalker:
    """Iterate over ``Site``s: blocks in order; inside a block qkv (or q, k, v), proj, fc1 (and gate), fc2, the rest.

    >>> import copy
    >>> from vitkit.models.build import build
    >>> model = build("vit_femto", img_size=8, in_chans=1, num_classes=3).eval()
    >>> walker = BlockWalker(model, copy.deepcopy(model), torch.rand(4, 1, 8, 8), batch_size=2)
    >>> [(site.block, site.names) for site in walker][:2]
    [(0, ('blocks.0.attn.qkv',)), (0, ('blocks.0.attn.proj',))]
    >>> site = next(iter(walker))
    >>> [x.shape for batch in site.batches() for x, _ in batch.values()]
    [torch.Size([2, 17, 64]), torch.Size([2, 17, 64])]

    Between two sites the caller may put other modules at the names it was given, or change their weights; what comes
    later sees the change. Blocks are advanced when the next one is asked for, so memory holds one activation of each
    copy per image, wherever ``store`` says; a site of a block that was left cannot be computed any more.

    Where the compressed copy merges tokens, the reference merges the very same tokens: its values pass through the
    compressed copy's reducer, with that copy's keys.

    A network without a host, or whose blocks know no layout (Swin, ConvNeXt), is walked layer by layer in the order of
    its calls; each layer then costs one forward of both copies over the images, as far as that layer.

    Args:
        reference: the network as it was; not changed. Eval mode.
        compressed: a copy of it, with the same names (replaced layers may have children of their own). Eval mode.
        images: (N, C, H, W) or batches of them (see :func:`images_of`); those of an iterator are kept in memory.
        batch_size: images pushed through at once.
        store: device of the waiting activations; None keeps them where the network is.
        keep: layers to visit, by name and module; None visits all plain ``nn.Linear`` except the classifier.
        sequential: False gives one site per block (one in all without a host) with all its layers, in one forward: for
            callers that change nothing during the walk.

    Raises:
        BadInput: no images; the copies' names differ; the copies split into different tokens.
    """

    def __init__(
        self,
        reference: nn.Module,
        compressed: nn.Module,
        images: Images,
        batch_size: int = 32,
        store: torch.device | str | None = None,
        keep: Callable[[str, nn.Module], bool] | None = None,
        sequential: bool = True,
    ) -> None:
        if batch_size < 1:
            raise BadInput(f"batch_size={batch_size} must be at least 1.")
        self.reference, self.compressed = reference, compressed
        # a network without a host is run once for every layer, and an iterator gives its images only once
        self.images = list(images) if isinstance(images, Iterator) else images
        self.batch_size, self.store = batch_size, store
        self.sequential = sequential
        self._current = 0
        self.keep = keep if keep is not None else default_layers(reference)
        gone = {name for name, _ in reference.named_modules()} - {name for name, _ in compressed.named_modules()}
        if gone:
            raise BadInput(f"the two copies have different modules, e.g. {sorted(gone)[:3]}; compress a deepcopy.")

    def __iter__(self) -> Iterator[Site]:
        host = find_host(self.reference)
        by_blocks = host is not None and all(getattr(b, "takes_layout", False) for b in host.blocks)
        return self._walk_blocks() if by_blocks else self._walk_whole()

    # -- networks with a host --------------------------------------------------------------------------------------

    def _walk_blocks(self) -> Iterator[Site]:
        ours, theirs = find_host(self.compressed), find_host(self.reference)
        assert ours is not None and theirs is not None
        prefix = next(name for name, module in self.reference.named_modules() if module is theirs)
        streams = [self._embed(images) for images in self._batches_of_images()]
        for index, block in enumerate(theirs.blocks):
            path = ".".join(filter(None, (prefix, f"blocks.{index}")))
            groups = [
                [n for n in names if self.keep(f"{path}.{n}", block.get_submodule(n))] for names in linear_groups(block)
            ]
            groups = [group for group in groups if group]
            if not self.sequential:
                groups = [[name for group in groups for name in group]] if groups else []
            pair = (ours.blocks, theirs.blocks, index)
            self._current = index
            for number, group in enumerate(groups):

                def batches(pair: Any = pair, group: list[str] = group, path: str = path) -> Iterator[dict]:
                    if self._current != pair[2]:
                        raise BadInput(f"The walk has left block {pair[2]}; look at a site before asking for the next.")
                    for stream in streams:
                        yield {f"{path}.{n}": xs for n, xs in self._capture(pair, group, stream).items()}

                yield Site(index, number, tuple(f"{path}.{n}" for n in group), batches)
            if index + 1 < len(theirs.blocks):
                for number, stream in enumerate(streams):
                    streams[number] = self._advance(pair, stream)

    @torch.no_grad()
    def _embed(self, images: Tensor) -> tuple[_Stream, _Stream]:
        with _exact():
            pair = tuple(_entry_of_first_block(model, images) for model in (self.compressed, self.reference))
        _same_tokens(pair[0], pair[1], "the embedding")
        return self._parked(pair[0]), self._parked(pair[1])

    @torch.no_grad()
    def _capture(
        self, pair: Any, group: list[str], stream: tuple[_Stream, _Stream]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        ours, theirs, index = pair
        x: dict[str, list[Tensor]] = {}
        y: dict[str, list[Tensor]] = {}
        masks: dict[str, list[Tensor | None]] = {}
        with (
            _token_masks(ours[index], group, stream[0].layout, masks),
            _inputs_into(ours[index], group, x),
            _inputs_into(theirs[index], group, y),
        ):
            self._run_both(pair, stream)
        return _matched(group, x, y, masks)

    @torch.no_grad()
    def _advance(self, pair: Any, stream: tuple[_Stream, _Stream]) -> tuple[_Stream, _Stream]:
        ours, theirs = self._run_both(pair, stream)
        return self._parked(ours), self._parked(theirs)

    def _run_both(self, pair: Any, stream: tuple[_Stream, _Stream]) -> tuple[_Stream, _Stream]:
        ours, theirs, index = pair
        device = next(self.reference.parameters()).device
        with _exact(), _followed(ours[index], theirs[index]):
            results = tuple(
                _Stream(*blocks[index](one.x.to(device), one.layout)) for blocks, one in zip((ours, theirs), stream)
            )
        _same_tokens(results[0], results[1], f"block {index}")
        return results[0], results[1]

    def _parked(self, stream: _Stream) -> _Stream:
        return stream if self.store is None else _Stream(stream.x.to(self.store), stream.layout)

    # -- networks without one --------------------------------------------------------------------------------------

    def _walk_whole(self) -> Iterator[Site]:
        calls = self._calls(
            [n for n, m in self.reference.named_modules() if isinstance(m, nn.Linear) and self.keep(n, m)]
        )
        groups = [[name] for name in calls] if self.sequential else [list(calls)]
        for number, group in enumerate(groups):

            def batches(group: list[str] = group) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
                for images in self._batches_of_images():
                    yield self._capture_whole({name: calls[name] for name in group}, images)

            yield Site(0, number, tuple(group), batches)

    @torch.no_grad()
    def _calls(self, names: list[str]) -> dict[str, int]:
        """How often each layer is called in one forward, in the order of the first calls."""
        called: dict[str, int] = {}

        def count(name: str, _: Tensor) -> None:
            called[name] = called.get(name, 0) + 1

        first = next(iter(self._batches_of_images()))
        with linear_inputs(self.reference, names, count):
            self.reference(first[:1])
        # a layer that is never called still gets its turn, so that nothing is left out silently
        return called | {name: 0 for name in names if name not in called}

    @torch.no_grad()
    def _capture_whole(self, calls: dict[str, int], images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        found: list[dict[str, list[Tensor]]] = []
        for model in (self.compressed, self.reference):
            into: dict[str, list[Tensor]] = {}
            left = dict(calls)

            def take(name: str, x: Tensor, into: dict = into, left: dict = left) -> None:
                into.setdefault(name, []).append(x)
                left[name] -= 1
                if not any(left.values()):
                    raise _AllSeen

            if any(left.values()):
                with _exact(), linear_inputs(model, list(calls), take), suppress(_AllSeen):
                    model(images)
            found.append(into)
        return _matched(list(calls), found[0], found[1], {})

    def _batches_of_images(self) -> Iterator[Tensor]:
        parameter = next(self.reference.parameters())
        empty = True
        for part in [self.images] if isinstance(self.images, Tensor) else self.images:
            for batch in images_of(part).split(self.batch_size):
                if len(batch):
                    empty = False
                    yield batch.to(parameter.device, parameter.dtype)
        if empty:
            raise BadInput("no calibration images were given.")


def images_of(batch: Any) -> Tensor:
    """The images of a calibration batch: the batch itself, the first of a tuple or list, or what a dict calls "images".

    Raises: BadInput if they are no float tensor (N, C, H, W).
    """
    found = batch.get("images") if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(found, Tensor) or found.ndim != 4:
        raise BadInput(
            f"A calibration batch must be images (N, C, H, W), a tuple that begins with them or a dict with 'images'; "
            f"got {type(found).__name__}{tuple(getattr(found, 'shape', ()))}."
        )
    if not found.is_floating_point():
        raise BadInput(f"Calibration images are {found.dtype}; give floats in the model's own range, usually [0, 1].")
    return found


def default_layers(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """Which layers a compressor visits by default: plain ``nn.Linear``, not the classifier, in a host only the blocks'.

    Subclasses of ``nn.Linear`` and layers whose weight is computed (weight norm, adapters) mean something else by their
    weight and are left alone.
    """
    host = find_host(model)
    inside = {id(m) for m in (host.blocks if host is not None else model).modules()}
    classifier = {id(m) for m in _classifier_modules(model)}
    # only a network that does not say which layer classifies has to be judged by names
    by_name = host is None and not classifier

    def keep(name: str, module: nn.Module) -> bool:
        if type(module) is not nn.Linear or id(module) not in inside or id(module) in classifier:
            return False
        return not (by_name and role_of(name) == "head")

    return keep


def _classifier_modules(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        get = getattr(module, "get_classifier", None)
        if callable(get):
            found = get()
            for head in found if isinstance(found, tuple) else (found,):
                if isinstance(head, nn.Module):
                    yield from head.modules()


@dataclass(frozen=True)
class _Stream:
    x: Tensor
    layout: TokenLayout


class _Reached(Exception):
    """Carries what reached the first block out of the forward."""

    def __init__(self, stream: _Stream) -> None:
        super().__init__()
        self.stream = stream


class _AllSeen(Exception):
    """Ends a forward whose rest nobody needs."""


def _entry_of_first_block(model: nn.Module, images: Tensor) -> _Stream:
    """Run ``model`` until its first block, through whatever wraps the host, and take what that block is given."""
    host = find_host(model)
    assert host is not None

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(_Stream(args[0], args[1]))

    handle = host.blocks[0].register_forward_pre_hook(stop)
    try:
        model(images)
    except _Reached as reached:
        return reached.stream
    finally:
        handle.remove()
    raise BadInput(f"{type(model).__name__} never called the first block of its host.")


@contextmanager
def _exact() -> Iterator[None]:
    """Full float32 products and no autocast: second-order statistics do not survive TF32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _inputs_into(model: nn.Module, names: list[str], into: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collect the inputs of the named layers; one that was replaced by something else is hooked just the same."""
    with linear_inputs(model, names, lambda name, x: into.setdefault(name, []).append(x)):
        yield


@contextmanager
def _token_masks(
    block: nn.Module, names: list[str], layout: TokenLayout, into: dict[str, list[Tensor | None]]
) -> Iterator[None]:
    """Collect, for every call of a named layer, which tokens are no padding at that moment (None: all)."""
    current = [layout.key_mask()]

    def merged(_: nn.Module, __: Any, out: tuple[Tensor, TokenLayout]) -> None:
        current[0] = out[1].key_mask()

    reduce = getattr(block, "reduce", None)
    handle = None if reduce is None else reduce.register_forward_hook(merged)
    try:
        with linear_inputs(block, names, lambda name, _: into.setdefault(name, []).append(current[0])):
            yield
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _followed(ours: nn.Module, theirs: nn.Module) -> Iterator[None]:
    """Let the reference block merge the tokens that the compressed block merged; ours must run before theirs.

    A reducer decides from keys and layout and moves values channel by channel. So the compressed block's reducer,
    called with its own keys on both streams' values side by side, gives both results; the first half must be what it
    gave alone.
    """
    reduce, other = getattr(ours, "reduce", None), getattr(theirs, "reduce", None)
    if (reduce is None) != (other is None):
        raise BadInput("only one of the two copies merges tokens; add token merging before or after both.")
    if reduce is None or other is None:
        yield
        return
    seen: dict[str, Any] = {}

    def remember(_: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, TokenLayout]) -> None:
        seen["args"], seen["out"] = args, out

    def follow(_: nn.Module, args: tuple[Any, ...], __: Any) -> tuple[Tensor, TokenLayout]:
        (x, keys, layout), (expected, _layout) = seen["args"], seen["out"]
        own.remove()
        width = x.shape[-1]
        both, new_layout = reduce(torch.cat([x, args[0]], dim=-1), keys, layout)
        if both.shape[:-1] != expected.shape[:-1] or not torch.allclose(
            both[..., :width], expected, rtol=1e-4, atol=1e-5
        ):
            raise BadInput(
                f"{type(reduce).__name__} does not merge by keys alone, so the full-precision stream cannot follow it; "
                "quantize before merging tokens."
            )
        return both[..., width:], new_layout

    with ExitStack() as stack:
        own = reduce.register_forward_hook(remember)
        stack.callback(own.remove)
        stack.callback(other.register_forward_hook(follow).remove)
        yield


def _same_tokens(ours: _Stream, theirs: _Stream, where: str) -> None:
    same = ours.x.shape == theirs.x.shape
    for name in ("source", "valid"):
        a, b = getattr(ours.layout, name), getattr(theirs.layout, name)
        same = same and ((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)))
    if not same:
        raise BadInput(
            f"After {where} the compressed and the full-precision network hold different tokens, so their activations "
            "cannot be compared. Compress before tokens are dropped, or merge them in the blocks' `reduce` slot."
        )


def _matched(
    names: list[str],
    ours: dict[str, list[Tensor]],
    theirs: dict[str, list[Tensor]],
    masks: dict[str, list[Tensor | None]],
) -> dict[str, tuple[Tensor, Tensor]]:
    result: dict[str, tuple[Tensor, Tensor]] = {}
    known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    for name in names:
        if name not in ours or name not in theirs:
            continue
        a, b = ours[name], theirs[name]
        if [t.shape for t in a] != [t.shape for t in b]:
            raise BadInput(
                f"{name} got inputs of shapes {[tuple(t.shape) for t in a]} in the compressed network and "
                f"{[tuple(t.shape) for t in b]} in the full-precision one; their tokens cannot be matched."
            )
        key = tuple((t.data_ptr(), t.shape, t.stride()) for t in (*a, *b))
        if key not in known:
            # both copies hold the same tokens, so one mask serves both
            mask = masks.get(name, [None] * len(a))
            known[key] = (_joined(a, mask), _joined(b, mask))
        result[name] = known[key]
    return result


def _joined(calls: list[Tensor], masks: list[Tensor | None]) -> Tensor:
    """The inputs of all calls of a layer as one (B, …, n), padding set to zero."""
    cleaned = [
        torch.where(mask.to(x.device).unsqueeze(-1), x, 0.0)
        if mask is not None and x.ndim == 3 and x.shape[:2] == mask.shape
        else x
        for x, mask in zip(calls, masks)
    ]
    if len(cleaned) == 1:
        return cleaned[0]
    if len({x.shape[0] for x in cleaned}) > 1:
        raise BadInput(
            "A layer is called several times with different batch sizes; its inputs cannot be matched to images."
        )
    return torch.cat([x.reshape(x.shape[0], -1, x.shape[-1]) for x in cleaned], dim=1)

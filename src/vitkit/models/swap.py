"""Put a part into a slot of a host, and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vitkit.errors import BadInput, unknown
from vitkit.models.parts.positions.rope import Rotary
from vitkit.models.spec import PartSpec
from vitkit.models.vit import Attention, Block, ViT

SLOTS = ("tokenizer", "position", "mixer", "normalizer", "mlp", "norm", "block", "readout", "head")
_ALIASES = {"pre_token": "tokenizer", "pre-token": "tokenizer", "attention": "mixer", "positions": "position"}
# one per block; `position` is per block only if the part says so
_PER_BLOCK = ("mixer", "normalizer", "mlp", "norm", "block")

Where = str | int | Iterable[int] | Callable[[int, int], bool]


@dataclass
class SwapRecord:
    """What a swap did; :meth:`undo` puts the very same old modules back.

    Attributes: slot; part (name); preserves ("exact", "approx" or "none"): whether the host computes the same
    function right after the swap; params_added; touched module names.
    """

    slot: str
    part: str
    preserves: str
    params_added: int
    touched: tuple[str, ...]
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        for action in reversed(self._undo):
            action()
        self._undo.clear()


def spec_of(vit: ViT, depth: int | None = None) -> PartSpec:
    """The :class:`PartSpec` of block ``depth`` (None: of the model-level slots)."""
    embed = vit.patch_embed
    grid = tuple(embed.grid_size)
    patch = tuple(embed.patch_size)
    attn = getattr(vit.blocks[depth or 0], "attn", None)
    mlp = getattr(vit.blocks[depth or 0], "mlp", None)
    dim = vit.embed_dim
    # what fc2 takes: a gated MLP's fc1 gives twice as much
    hidden = mlp.fc2.in_features if hasattr(getattr(mlp, "fc2", None), "in_features") else 4 * dim
    num_heads = getattr(attn, "num_heads", 1)
    return PartSpec(
        dim=dim,
        num_heads=num_heads,
        head_dim=getattr(attn, "head_dim", dim // num_heads),
        mlp_ratio=hidden / dim,
        grid=(grid[0], grid[1]),
        num_prefix=vit.num_prefix_tokens,
        depth=depth,
        num_blocks=len(vit.blocks),
        image_size=tuple(getattr(embed, "img_size", None) or (grid[0] * patch[0], grid[1] * patch[1])),
        patch_size=(patch[0], patch[1]),
        in_chans=vit.in_chans,
        num_classes=vit.num_classes,
    )


def canonical_slot(slot: str) -> str:
    """The slot's own name (aliases resolved); an unknown one is an error that lists all."""
    name = _ALIASES.get(slot, slot)
    if name not in SLOTS:
        raise unknown("slot", slot, SLOTS, "vitkit methods --kind part")
    return name


def part_class(slot: str, part: str | type[nn.Module]) -> type[nn.Module]:
    """Resolve a part by name in the catalogue and make sure that it fits ``slot``."""
    if isinstance(part, str):
        from vitkit.catalogue import resolve

        found = resolve(part)
        if not isinstance(found, type):
            raise BadInput(
                f"{part!r} is not a part but a {getattr(found, '__name__', found)!r}; see `vitkit show {part}`."
            )
        part = found
    own = getattr(part, "slot", None)
    if own is not None and canonical_slot(own) != slot and not (slot == "head" and own == "mlp"):
        raise BadInput(
            f"{part.__name__} is a part for the slot {own!r}, not for {slot!r}; write {own}={part.__name__}."
        )
    return part


def swap(
    model: nn.Module,
    slot: str,
    part: str | type[nn.Module],
    where: Where = "all",
    warm: bool = True,
    **options: Any,
) -> SwapRecord:
    """Put ``part`` into ``slot`` of the host inside ``model``, in place.

    Args:
        model: a :class:`ViT` or a wrapper around one.
        slot: tokenizer, position, mixer, normalizer, mlp, norm, block, readout or head.
        part: a name of the catalogue, or a class with ``from_standard(old, spec, **options)``.
        where: for per-block slots: "all", "last:3", "first:2", "even", an index, several, or ``f(index, depth)``.
        warm: keep what the part can take over from the old module's weights; False starts it fresh.
        options: given to the part.

    Returns: a :class:`SwapRecord` whose ``undo()`` restores the old modules themselves.

    Raises:
        UnknownName: no such slot or part. BadInput: the part belongs to another slot, or an option is unknown.
    """
    from vitkit.anatomy import host

    vit = host(model)
    slot = canonical_slot(slot)
    cls = part_class(slot, part)
    if not hasattr(cls, "from_standard"):
        raise BadInput(
            f"{cls.__name__} has no from_standard(old, spec, **options); see `check_part` in vitkit.testing."
        )
    before = {id(p): p.numel() for p in vit.parameters()}
    record = SwapRecord(slot, getattr(cls, "__name__", str(part)), getattr(cls, "preserves", "none"), 0, ())
    touched: list[str] = []
    if slot in _PER_BLOCK or (slot == "position" and getattr(cls, "per_block", False)):
        for depth in pick_blocks(where, len(vit.blocks)):
            touched += _swap_in_block(vit, slot, cls, depth, warm, options, record)
    else:
        touched += _swap_in_model(vit, slot, cls, warm, options, record)
    _maybe_drop_rope(vit, record)
    record.touched = tuple(touched)
    record.params_added = sum(p.numel() for p in vit.parameters() if id(p) not in before)
    return record


def pick_blocks(where: Where, num_blocks: int) -> list[int]:
    """Block indices that ``where`` selects; an empty or impossible choice is an error."""
    if isinstance(where, int):
        chosen = [where % num_blocks if -num_blocks <= where < num_blocks else where]
    elif isinstance(where, str):
        kind, _, count = where.partition(":")
        table = {
            "all": range(num_blocks),
            "even": range(0, num_blocks, 2),
            "odd": range(1, num_blocks, 2),
            "first": range(min(num_blocks, int(count or 1))),
            "last": range(max(0, num_blocks - int(count or 1)), num_blocks),
        }
        if kind not in table:
            raise unknown("choice of blocks", where, ["all", "even", "odd", "first:k", "last:k"], "vitkit show ViT")
        chosen = list(table[kind])
    elif callable(where):
        chosen = [i for i in range(num_blocks) if where(i, num_blocks)]
    else:
        chosen = [int(i) for i in where]
    wrong = [i for i in chosen if not 0 <= i < num_blocks]
    if wrong or not chosen:
        raise BadInput(f"where={where!r} selects blocks {chosen}, but the model has blocks 0 to {num_blocks - 1}.")
    return chosen


def _make(cls: Any, old: nn.Module | None, spec: PartSpec, warm: bool, options: dict[str, Any], like: nn.Module):
    try:
        new = cls.from_standard(old, spec, **({} if warm else {"warm": False}), **options)
    except TypeError as error:
        if "unexpected keyword argument" in str(error):
            raise BadInput(f"{cls.__name__} has no such option: {error}. See `vitkit show` for its options.") from error
        raise
    reference = next(like.parameters(), None)
    if reference is not None:
        new = new.to(device=reference.device)
        if reference.dtype in (torch.float16, torch.bfloat16, torch.float64):
            new = new.to(dtype=reference.dtype)
    return new.train(like.training)


def _replace(owner: nn.Module, name: str, new: nn.Module | None, record: SwapRecord) -> None:
    old = getattr(owner, name)
    setattr(owner, name, new)
    record._undo.append(lambda: setattr(owner, name, old))


def _swap_in_block(
    vit: ViT, slot: str, cls: Any, depth: int, warm: bool, options: dict, record: SwapRecord
) -> list[str]:
    block, spec = vit.blocks[depth], spec_of(vit, depth)
    prefix = f"blocks.{depth}"
    if slot == "block":
        new = _make(cls, block, spec, warm, options, vit)
        old = vit.blocks[depth]
        vit.blocks[depth] = new
        record._undo.append(lambda: vit.blocks.__setitem__(depth, old))
        return [prefix]
    if not isinstance(block, Block):
        raise BadInput(
            f"{prefix} is a {type(block).__name__}, which has no slot {slot!r}; choose other blocks with where=."
        )
    if slot in ("mixer", "mlp"):
        name = "attn" if slot == "mixer" else "mlp"
        old = getattr(block, name)
        new = _make(cls, old.standard() if isinstance(old, Attention) else old, spec, warm, options, vit)
        if isinstance(new, Attention):
            _keep_turning(old, new, f"{prefix}.attn")
        if hasattr(new, "depth_index") or getattr(new, "wants_depth", False):
            new.depth_index = depth
        _replace(block, name, new, record)
        return [f"{prefix}.{name}"]
    if slot == "norm":
        for name in ("norm1", "norm2"):
            _replace(block, name, _make(cls, getattr(block, name), spec, warm, options, vit), record)
        return [f"{prefix}.norm1", f"{prefix}.norm2"]
    attn = block.attn
    if not isinstance(attn, Attention):
        raise BadInput(
            f"{prefix}.attn is {type(attn).__name__}, which has no softmax attention, so the slot {slot!r} does not "
            "exist there; keep the standard mixer in these blocks or choose others with where=."
        )
    if slot == "normalizer":
        _replace(attn, "normalizer", _make(cls, attn.normalizer, spec, warm, options, vit), record)
        return [f"{prefix}.attn.normalizer"]
    part, before = _make(cls, None, spec, warm, options, vit), list(attn.position)
    # two rotations would add their angles, so a part that turns takes the place of the host's own
    kept = [p for p in before if not (isinstance(p, Rotary) and hasattr(part, "rotate"))]
    attn.position = nn.ModuleList([*kept, part])
    if depth == 0 or not record.touched:
        _maybe_drop_absolute(vit, part, record)

    def remove() -> None:
        attn.position = nn.ModuleList(before)

    record._undo.append(remove)
    return [f"{prefix}.attn.position.{len(kept)}"]


def _keep_turning(old: nn.Module, new: Attention, where: str) -> None:
    """A mixer on rotary tables keeps them, whether or not it took over the old one's positions itself."""
    turning = [p for p in getattr(old, "position", ()) if isinstance(p, Rotary)]
    if turning and not any(hasattr(p, "rotate") for p in new.position):
        new.position = nn.ModuleList([*turning, *new.position])
    for part in new.position:
        if isinstance(part, Rotary) and part.dim != new.head_dim:
            raise BadInput(
                f"{where}: the model's rotary positions turn {part.dim} channels per head, and {type(new).__name__} "
                f"has {new.head_dim}; choose options that keep the width of the heads."
            )


def _swap_in_model(vit: ViT, slot: str, cls: Any, warm: bool, options: dict, record: SwapRecord) -> list[str]:
    spec = spec_of(vit)
    name = {"tokenizer": "patch_embed", "position": "position", "readout": "read_out", "head": "head"}[slot]
    if slot == "position" and vit.position is not None:
        raise BadInput(
            f"The model already has the position part {type(vit.position).__name__}; undo that swap before another."
        )
    new = _make(cls, getattr(vit, name), spec, warm, options, vit)
    _replace(vit, name, new, record)
    if slot == "position":
        _maybe_drop_absolute(vit, new, record)
    return [name]


def _maybe_drop_rope(vit: ViT, record: SwapRecord) -> None:
    """Tables that no block reads any more leave the parameters; undo puts them back."""
    attentions = [getattr(block, "attn", None) for block in vit.blocks]
    turned = any(isinstance(p, Rotary) for attn in attentions for p in getattr(attn, "position", ()))
    if getattr(vit, "rope", None) is not None and not turned:
        _replace(vit, "rope", None, record)


def _maybe_drop_absolute(vit: ViT, part: nn.Module, record: SwapRecord) -> None:
    """A part with ``keep_absolute = False`` replaces the host's table: it leaves the parameters, undo keeps it."""
    if getattr(part, "keep_absolute", True) or vit.pos_embed is None:
        return
    table = vit.pos_embed
    vit.pos_embed = None

    def restore() -> None:
        vit.pos_embed = table

    record._undo.append(restore)

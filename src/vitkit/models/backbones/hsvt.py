"""HsVT: a recurrent pyramid over windows of events, whose memory is spiking neurons early and ConvLSTMs late."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn

from vitkit.errors import BadInput
from vitkit.models.backbones.contract import Backbone, cfg, create, init_weights
from vitkit.models.backbones.pyramid import Halve
from vitkit.models.layout import TokenLayout
from vitkit.models.partition import cut, join
from vitkit.models.spiking import LIF
from vitkit.models.vit import Attention, Block, Mlp

__all__ = ["HsVT", "detach_memory", "reset_memory"]

# T windows · B sequences · c channels of a window · C channels of a stage · H×W map

#: what one stage remembers: () nothing, (u, s) of the neurons or (h, c) of the ConvLSTM, each (B, C, H, W)
StageMemory = tuple[Tensor, ...]
#: one entry a stage; None is the zero state at the start of a sequence
Memory = tuple[StageMemory, ...]


class Flow(NamedTuple):
    """What walks through the stages.

    Attributes:
        map: (T·B, C, H, W), the sequences of a window side by side, windows one after another.
        windows: T.
        old: memory before the first window, or None.
        new: memory behind the last one, of the stages done so far.
    """

    map: Tensor
    windows: int
    old: Memory | None
    new: Memory


class NoMemory(nn.Module):
    """Every window by itself; for ablations."""

    def forward(self, x: Tensor, memory: StageMemory | None) -> tuple[Tensor, StageMemory]:
        return x, ()


class STFE(nn.Module):
    """Spiking spatio-temporal extraction: ``x_t + BN(conv(LIF(BN(conv(x_t)))))`` with 3×3 convolutions.

    The neurons keep their potential from window to window; the second convolution gets nothing but zeros and ones.

    Args:
        dim: C. tau, threshold, alpha: of the :class:`~vitkit.models.spiking.LIF` neurons.

    Shape: x (T, B, C, H, W), memory (u, s) or None → (T, B, C, H, W), memory.
    """

    spike_fed = {"conv2": "lif"}

    def __init__(self, dim: int, tau: float = 2.0, threshold: float = 1.0, alpha: float = 2.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(dim)
        self.lif = LIF(tau, threshold, alpha)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor, memory: StageMemory | None) -> tuple[Tensor, StageMemory]:
        current = self.norm1(self.conv1(x.flatten(0, 1))).view_as(x)
        spikes, state = self.lif(current, None if memory is None else (memory[0], memory[1]))
        return x + self.norm2(self.conv2(spikes.flatten(0, 1))).view_as(x), state


class ConvLSTM(nn.Module):
    """ConvLSTM whose state is mixed in space by a depthwise 3×3 convolution and whose gates are 1×1 convolutions.

    ``i, f, o, g = W_x x_t + W_h (K ∗ h_{t−1}) + b``; ``c_t = σ(f) c_{t−1} + σ(i) tanh(g)``; ``h_t = σ(o) tanh(c_t)``.

    Args:
        dim: C.

    Shape: x (T, B, C, H, W), memory (h, c) or None → h (T, B, C, H, W), memory.
    Raises: BadInput if the memory is of another batch or map.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.gates_x = nn.Conv2d(dim, 4 * dim, 1)
        self.gates_h = nn.Conv2d(dim, 4 * dim, 1, bias=False)

    def forward(self, x: Tensor, memory: StageMemory | None) -> tuple[Tensor, StageMemory]:
        if memory is not None and memory[0].shape != x.shape[1:]:
            raise BadInput(
                f"ConvLSTM: the memory is of {tuple(memory[0].shape)}, a window of {tuple(x.shape[1:])}; start a new "
                "batch or image size from memory=None."
            )
        h, c = (torch.zeros_like(x[0]), torch.zeros_like(x[0])) if memory is None else memory
        # what depends on the input alone is done for all windows at once
        given = self.gates_x(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        out = []
        for gates in given.unbind(0):
            i, f, o, g = (gates + self.gates_h(self.mix(h.to(x.dtype)))).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            out.append(h)
        return torch.stack(out).to(x.dtype), (h, c)


TEMPORAL = ("stfe", "lstm", "none")


class PartitionBlock(nn.Module):
    """Attention, then MLP, within groups of cells: P×P neighbours, or a P×P grid dilated over the whole map.

    Args:
        block: the host's block on tokens. size: P. dilated: the grid in place of neighbours.

    Shape: (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, block: nn.Module, size: int, dilated: bool) -> None:
        super().__init__()
        self.block, self.size, self.dilated = block, size, dilated

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        tokens, real = cut(x, self.size, self.dilated)
        layout = TokenLayout(grid=(min(self.size, height), min(self.size, width)), valid=real)
        tokens, _ = self.block(tokens, layout)
        return join(tokens, height, width, self.size, self.dilated)

    def extra_repr(self) -> str:
        return f"size={self.size}, dilated={self.dilated}"


@register_notrace_module  # reason: asks for the sizes of maps and memories
class TemporalStage(nn.Module):
    """Downsampling, attention in every window of events by itself, then the memory across windows.

    Args:
        down: module on maps, or None. blocks: modules on maps.
        temporal: :class:`STFE`, :class:`ConvLSTM` or :class:`NoMemory`.
    """

    def __init__(self, down: nn.Module | None, blocks: Sequence[nn.Module], temporal: nn.Module) -> None:
        super().__init__()
        self.down = down if down is not None else nn.Identity()
        self.blocks = nn.Sequential(*blocks)
        self.temporal = temporal

    def forward(self, flow: Flow) -> Flow:
        x = self.blocks(self.down(flow.map))
        memory = None if flow.old is None else flow.old[len(flow.new)]
        x, memory = self.temporal(x.unflatten(0, (flow.windows, -1)), memory)
        return flow._replace(map=x.flatten(0, 1), new=(*flow.new, memory))


class HsVT(Backbone):
    """Hybrid Spiking Vision Transformer: four stages of attention in space, each followed by a memory in time.

    Each stage: convolution of stride 2 (the stem: of ``stem_stride``) and LayerNorm, attention and MLP in blocks of P×P
    cells, attention and MLP over a dilated P×P grid, then spiking neurons (``"stfe"``), a ConvLSTM (``"lstm"``) or
    nothing (``"none"``). The input are windows of events as maps, see :func:`vitkit.data.events.voxel_windows`.

    ``forward(images)`` runs all windows from the zero state and classifies the last one. :meth:`stream` goes on from a
    state, window by window; in eval mode both give the same. Space is computed for all windows at once, only the
    memories follow them one by one.

    >>> net = HsVT(in_chans=6, windows=3, num_classes=4, dims=(8, 8, 16, 16), head_dim=8, partition_size=2).eval()
    >>> clip = torch.rand(2, 3, 2, 16, 16)
    >>> memory = None
    >>> for window in clip.unbind(1):
    ...     maps, memory = net.stream(window, memory)
    >>> torch.allclose(net.forward_head(net.norm(maps[-1])), net(clip.flatten(1, 2)), atol=1e-5)
    True

    Args:
        img_size: accepted as timm gives it; maps of any size work.
        in_chans: C of the images, T·c. num_classes, global_pool ("avg", ""), drop_rate: as in timm.
        windows: T; the channel axis holds T windows of in_chans/T channels, the oldest first. Default 1.
        dims: C of the stages. head_dim: width of an attention head. mlp_ratio: of the MLPs.
        partition_size: P.
        temporal: one of "stfe", "lstm", "none" a stage.
        stem_stride: pixels per cell of the first stage; its kernel is 2·stride − 1.
        tau, threshold, alpha: of the spiking neurons.
        layer_scale: initial weight of the attention and MLP branches.
        drop_path_rate: stochastic depth of the last block, growing linearly.

    Shape: (B, T·c, H, W) or (B, T', c, H, W) with any T' → (B, num_classes).
    Raises: BadInput if T does not divide the channels, the images have others, or an option is out of range.
    Paper: Hybrid Spiking Vision Transformer for Object Detection with Event Cameras, arXiv:2505.07715.
    Departs from the paper: known by its abstract and public descriptions; which stages spike, the neurons' constants,
        P and the widths are ours, as is padding of maps that P does not divide. Its detector has a YOLOX head; see
        :func:`vitkit.models.detect.detector`. The STFE's 3×3 convolutions are full ones, so it has more parameters than
        the depthwise-separable ConvLSTM of the same width.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        windows: int = 1,
        dims: tuple[int, ...] = (32, 64, 128, 256),
        head_dim: int = 32,
        mlp_ratio: float = 4.0,
        partition_size: int = 8,
        temporal: Sequence[str] = ("stfe", "stfe", "lstm", "lstm"),
        stem_stride: int = 4,
        tau: float = 2.0,
        threshold: float = 1.0,
        alpha: float = 2.0,
        layer_scale: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if windows < 1 or in_chans % windows:
            fits = max(d for d in range(1, max(1, windows) + 1) if in_chans % d == 0)
            raise BadInput(
                f"windows={windows} does not divide the {in_chans} channels of the images into windows of equal size; "
                f"windows={fits} would."
            )
        if isinstance(temporal, str) or len(temporal) != len(dims) or not set(temporal) <= set(TEMPORAL):
            raise BadInput(
                f"temporal={temporal!r} must name one of {TEMPORAL} for each of the {len(dims)} stages, such as "
                f"{('stfe', 'stfe', 'lstm', 'lstm', *['lstm'] * len(dims))[: len(dims)]}."
            )
        if any(dim % head_dim for dim in dims) or partition_size < 1 or stem_stride < 1:
            raise BadInput(
                f"HsVT: head_dim={head_dim} must divide every width of dims={tuple(dims)}; partition_size="
                f"{partition_size} and stem_stride={stem_stride} must be at least 1."
            )
        del img_size
        make = {
            "stfe": partial(STFE, tau=tau, threshold=threshold, alpha=alpha),
            "lstm": ConvLSTM,
            "none": lambda _: NoMemory(),
        }
        rates = calculate_drop_path_rates(drop_path_rate, [2] * len(dims), stagewise=True)
        self.windows = windows
        kernel = 2 * stem_stride - 1
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans // windows, dims[0], kernel, stride=stem_stride, padding=stem_stride - 1),
            LayerNorm2d(dims[0]),
        )
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                PartitionBlock(
                    Block(
                        dim,
                        dim // head_dim,
                        mlp_ratio=mlp_ratio,
                        qkv_bias=True,
                        init_values=layer_scale,
                        drop_path=rates[i][j],
                        norm_layer=partial(nn.LayerNorm, eps=1e-6),
                        attn_layer=Attention,
                        mlp_layer=Mlp,
                        depth=2 * i + j,
                    ),
                    partition_size,
                    dilated=j == 1,
                )
                for j in range(2)
            ]
            down = nn.Sequential(Halve(dims[i - 1], dim), LayerNorm2d(dim)) if i else None
            stages.append(TemporalStage(down, blocks, make[temporal[i]](dim)))
        self.stages = nn.ModuleList(stages)
        self.norm = LayerNorm2d(dims[-1])
        self.finish_init(
            list(dims), [stem_stride * 2**i for i in range(len(dims))], num_classes, in_chans, global_pool, drop_rate
        )
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, ConvLSTM):
                # its fan-out is 9, not 9·C: the general rule would all but cut h off from the gates
                module.mix.reset_parameters()

    # -- timm's way: all windows from the zero state --------------------------------------------------------------

    def begin(self, images: Tensor) -> Flow:
        return self._start(_as_clip(images, self.in_chans, self.windows), None)

    def as_map(self, state: Flow) -> Tensor:
        """(B, C, H, W) of the last window."""
        return state.map.unflatten(0, (state.windows, -1))[-1]

    def features(self, state: Flow) -> Tensor:
        return self.norm(self.as_map(state))

    # -- streaming ------------------------------------------------------------------------------------------------

    def stream(
        self, x: Tensor, memory: Memory | None = None, starts: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Memory]:
        """Go on with the next window, or the next few.

        For truncated backpropagation through time, call it with T windows, backward, and hand on
        :func:`detach_memory` of the memory.

        Args:
            x: one window (B, c, H, W) or several (B, T, c, H, W).
            memory: what the last call returned; None at the start.
            starts: (B,) bool, True for sequences that begin with this call: their memory is set to zero first.

        Returns: the maps of all stages, (B, C, H, W) each, or (B, T, C, H, W) for several windows, and the new memory.
            ``forward_head(norm(maps[-1]))`` gives logits of a window.

        Raises: BadInput if channels, batch or image size do not fit the network or the memory.
        """
        clip = x.unsqueeze(1) if x.ndim == 4 else x
        if starts is not None and memory is not None:
            memory = reset_memory(memory, starts)
        flow = self._start(clip, memory)
        maps = []
        for stage in self.stages:
            flow = self.step(stage, flow)
            maps.append(flow.map.unflatten(0, (flow.windows, -1)).transpose(0, 1))
        return tuple(m[:, 0] if x.ndim == 4 else m for m in maps), flow.new

    def _start(self, clip: Tensor, memory: Memory | None) -> Flow:
        clip = _of_channels(clip, self.in_chans // self.windows)
        windows = clip.shape[1]
        return Flow(self.stem(clip.transpose(0, 1).flatten(0, 1)), windows, memory, ())


@torch.fx.wrap
def _as_clip(images: Tensor, in_chans: int, windows: int) -> Tensor:
    """(B, T·c, H, W) or (B, T, c, H, W) → (B, T, c, H, W)."""
    if images.ndim == 5:
        return images
    if images.ndim != 4 or images.shape[1] != in_chans:
        raise BadInput(
            f"This HsVT takes images (B, {in_chans}, H, W), or (B, T, {in_chans // windows}, H, W), not "
            f"{tuple(images.shape)}; make one with in_chans=… and windows=… of your data."
        )
    return images.unflatten(1, (windows, -1))


@torch.fx.wrap
def _of_channels(clip: Tensor, wanted: int) -> Tensor:
    """The windows (B, T, c, H, W) as they are, or an error if c is not ``wanted``."""
    if clip.ndim != 5 or clip.shape[2] != wanted or not clip.shape[1]:
        raise BadInput(
            f"This HsVT takes windows of {wanted} channels, (B, T, {wanted}, H, W) with T of at least 1, not "
            f"{tuple(clip.shape)}."
        )
    return clip


def detach_memory(memory: Memory) -> Memory:
    """The same values without their history: where backpropagation through time is cut."""
    return tuple(tuple(m.detach() for m in stage) for stage in memory)


def reset_memory(memory: Memory, starts: Tensor) -> Memory:
    """Zero state for the sequences that start anew; the others keep theirs.

    Args:
        memory: of B sequences. starts: (B,) bool.

    Raises: BadInput if there are more or fewer flags than sequences.
    """
    sizes = {len(m) for stage in memory for m in stage}
    if starts.ndim != 1 or sizes - {len(starts)}:
        wanted = sizes.pop() if sizes else "B"
        raise BadInput(f"starts must have one flag a sequence, ({wanted},), not {tuple(starts.shape)}.")
    return tuple(tuple(m.masked_fill(starts.to(m.device).view(-1, 1, 1, 1), 0) for m in stage) for stage in memory)


default_cfgs = generate_default_cfgs(
    {
        "hsvt_femto": cfg(input_size=(3, 32, 32), pool_size=(2, 2), first_conv="stem.0"),
        "hsvt_tiny": cfg(first_conv="stem.0"),
        "hsvt_small": cfg(first_conv="stem.0"),
        "hsvt_base": cfg(first_conv="stem.0"),
    }
)


@register_model
def hsvt_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For 28 to 64 pixels: dims 16/32/64/128, groups of 4×4 cells, 2-pixel cells first."""
    sizes = {"dims": (16, 32, 64, 128), "head_dim": 16, "partition_size": 4, "stem_stride": 2, "mlp_ratio": 2.0}
    return create(HsVT, "hsvt_femto", pretrained, sizes, kwargs)


@register_model
def hsvt_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """dims 32/64/128/256, for event cameras of about 240×304 pixels; give in_chans=20 for the paper's windows."""
    return create(HsVT, "hsvt_tiny", pretrained, {}, kwargs)


@register_model
def hsvt_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """dims 48/96/192/384."""
    return create(HsVT, "hsvt_small", pretrained, {"dims": (48, 96, 192, 384), "head_dim": 24}, kwargs)


@register_model
def hsvt_base(pretrained: bool = False, **kwargs: Any) -> Any:
    """dims 64/128/256/512."""
    return create(HsVT, "hsvt_base", pretrained, {"dims": (64, 128, 256, 512)}, kwargs)

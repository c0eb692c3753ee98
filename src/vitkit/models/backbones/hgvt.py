"""HgVT: the host with hypergraph blocks and voting hyperedges."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

from vitkit.models.backbones.contract import cfg, create
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.blocks.hgvt_block import HgVTBlock
from vitkit.models.parts.readouts.expert_pool import ExpertPool
from vitkit.models.parts.tokenizers.conv_stem import ConvStem
from vitkit.models.presets import default_patch
from vitkit.models.swap import swap
from vitkit.models.vit import ViT

__all__ = ["HgVT"]


class HgVT(ViT):
    """Hypergraph Vision Transformer: convolutional stem, hypergraph blocks, expert edge pooling, no class token.

    The host with ``conv-stem``, ``hgvt-block`` in all blocks and ``expert-pool``; see there for what they compute and
    for the auxiliary losses. Its virtual vertices and hyperedges are prefix tokens.

    Args:
        img_size, patch_size, in_chans, num_classes, embed_dim, depth, num_heads, mlp_ratio, drop_path_rate: as in timm;
            the patch is made by 3×3 convolutions of stride 2.
        vertices, edges, virtual_edges, features, diversity, population: of the blocks.
        experts: hyperedges of an image that vote.
        others: for the host (``dynamic_img_size`` …).

    Attributes: ``num_prefix_tokens`` counts virtual vertices and hyperedges; ``head_hidden_size`` is 2·embed_dim.
    Shape: (B, C, H, W) → (B, num_classes).
    Raises: BadInput for impossible counts.
    Paper: Hypergraph Vision Transformers: Images are More than Nodes, More than Edges, arXiv:2504.08710.
    Departs from the paper: known by a detailed summary. Width and counts are ours, near its parameters: tiny 7.7 M,
        small 22.9 M.
    """

    read_out: ExpertPool

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 144,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        vertices: int = 16,
        edges: int = 32,
        virtual_edges: int = 8,
        features: int = 64,
        diversity: float = 0.1,
        population: float = 0.1,
        experts: int = 4,
        drop_path_rate: float = 0.0,
        **others: Any,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            class_token=False,
            no_embed_class=True,
            global_pool="avg",
            **others,
        )
        swap(self, "tokenizer", ConvStem, warm=False)
        swap(
            self,
            "block",
            HgVTBlock,
            warm=False,
            vertices=vertices,
            edges=edges,
            virtual_edges=virtual_edges,
            features=features,
            diversity=diversity,
            population=population,
        )
        swap(self, "readout", ExpertPool, warm=False, experts=experts)
        # the read-out has a norm and a classifier of its own
        self.norm, self.fc_norm, self.head = nn.Identity(), nn.Identity(), nn.Identity()
        # whoever splits features into prefix and patches must know about the rows that the first block adds
        self.num_prefix_tokens = vertices + edges + virtual_edges
        self.head_hidden_size = 2 * embed_dim

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of :meth:`forward_features` → logits, or the vector (B, 2D) that the classifier gets."""
        pooled = torch.cat(self.read_out.pool(x, self._final_layout()), 1)
        return pooled if pre_logits else self.read_out.fc(pooled)

    def retrieval(self, images: Tensor, concat: bool = False) -> Tensor:
        """Unit vectors to compare images by: z_E (B, D), or with ``concat`` [z_E; z_I] (B, 2D)."""
        tokens = self.forward_features(images)
        pooled = self.read_out.pool(tokens, self._final_layout())
        return F.normalize(torch.cat(pooled, 1) if concat else pooled[0], dim=-1)

    def get_classifier(self) -> nn.Module:
        return self.read_out.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for ``num_classes`` classes, 0 for none; pooling stays the read-out's."""
        self.num_classes = num_classes
        self.read_out.reset(num_classes)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"blocks.0.states"}

    def _final_layout(self) -> TokenLayout:
        grid = self.patch_embed.grid_size
        block = self.blocks[0]
        return TokenLayout(grid=tuple(grid), prefix=tuple(block.counts.items()))  # type: ignore[union-attr, operator, arg-type]


default_cfgs = generate_default_cfgs(
    {
        "hgvt_femto": cfg(
            input_size=(3, 32, 32), first_conv="patch_embed.stem.0", classifier="read_out.fc", fixed_input_size=True
        ),
        "hgvt_tiny": cfg(first_conv="patch_embed.stem.0", classifier="read_out.fc", fixed_input_size=True),
        "hgvt_small": cfg(first_conv="patch_embed.stem.0", classifier="read_out.fc", fixed_input_size=True),
    }
)


@register_model
def hgvt_femto(pretrained: bool = False, **kwargs: Any) -> Any:
    """For images of 8 to 64 pixels: 64 wide, 3 blocks, 4 virtual vertices, 8 + 2 hyperedges."""
    size = to_2tuple(kwargs.get("img_size") or 32)
    sizes = {"img_size": 32, "patch_size": default_patch(size), "embed_dim": 64, "depth": 3, "num_heads": 4}
    counts = {"vertices": 4, "edges": 8, "virtual_edges": 2, "features": 32, "mlp_ratio": 2.0}
    # Xavier matrices: the usual normal(0, 0.02) start learns several times slower at this width
    return _create("hgvt_femto", pretrained, {**sizes, **counts, "weight_init": "jax"}, kwargs)


@register_model
def hgvt_tiny(pretrained: bool = False, **kwargs: Any) -> Any:
    """7.7 M parameters: 144 wide, 12 blocks, 16 virtual vertices, 32 + 8 hyperedges."""
    return _create("hgvt_tiny", pretrained, {}, kwargs)


@register_model
def hgvt_small(pretrained: bool = False, **kwargs: Any) -> Any:
    """22.9 M parameters: 252 wide, 12 blocks, 16 virtual vertices, 32 + 8 hyperedges."""
    return _create("hgvt_small", pretrained, {"embed_dim": 252, "num_heads": 6}, kwargs)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> Any:
    return create(HgVT, variant, pretrained, defaults, kwargs, out_indices=3)

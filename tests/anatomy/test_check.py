from __future__ import annotations

import pytest
import torch
from torch import nn

import vitkit
from vitkit.anatomy import check
from vitkit.models.layout import TokenLayout


class Columns(nn.Module):
    """One token for each column of pixels; takes the mean of the host's position rows for every one."""

    slot = "tokenizer"
    preserves = "none"

    def __init__(self, height: int, width: int, chans: int, dim: int) -> None:
        super().__init__()
        self.img_size, self.patch_size, self.grid_size, self.num_patches = (
            (height, width),
            (height, 1),
            (1, width),
            width,
        )
        self.proj = nn.Conv2d(chans, dim, (height, 1))

    @classmethod
    def from_standard(cls, old, spec, warm=True):
        return cls(*spec.image_size, spec.in_chans, spec.dim)

    def forward(self, images):
        x = self.proj(images).flatten(2).transpose(1, 2)
        return x, TokenLayout(grid=(1, x.shape[1]))

    def pick_positions(self, table, grid, layout):
        return table.mean(1, keepdim=True).expand(-1, layout.grid[1], -1)


@pytest.mark.parametrize("tokenizer", [Columns, "row-stripes", "charm"])
@pytest.mark.parametrize("class_token", [True, False])
def test_tokenizers_that_pick_positions_keep_the_hosts_table(tokenizer, class_token):
    shape = {"img_size": (16, 24), "patch_size": 4, "num_classes": 3}
    pool = {} if class_token else {"class_token": False, "global_pool": "avg"}
    model = vitkit.build("vit_femto", tokenizer=tokenizer, **shape, **pool)
    assert model.pos_embed.shape[1] == 24 + class_token
    check(model)
    assert model(torch.rand(2, 3, 16, 24)).shape == (2, 3)


@pytest.mark.parametrize("tokenizer", [None, "row-stripes"])
def test_a_table_of_another_length_is_noticed(tokenizer):
    model = vitkit.build("vit_femto", tokenizer=tokenizer, img_size=16, patch_size=4)
    check(model)
    model.pos_embed = nn.Parameter(model.pos_embed[:, :-1])
    with pytest.raises(ValueError, match="pos_embed has 16 rows, the grid needs 17"):
        check(model)

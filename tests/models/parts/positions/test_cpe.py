"""A zero kernel changes nothing; a kernel is a depthwise convolution with zeros around the grid."""

import pytest
import torch
from torch.nn import functional as F

import vitkit
from vitkit.errors import BadInput
from vitkit.models.layout import TokenLayout
from vitkit.models.parts.positions.cpe import CPE


def test_starts_as_nothing_and_equals_a_convolution():
    part, layout = CPE(4), TokenLayout(grid=(3, 5), prefix=(("class", 2),))
    x = torch.randn(2, 17, 4)
    torch.testing.assert_close(part.embed(x, layout), x)
    torch.nn.init.normal_(part.conv.weight)
    out = part.embed(x, layout)
    torch.testing.assert_close(out[:, :2], x[:, :2])
    cells = x[:, 2:].reshape(2, 3, 5, 4).permute(0, 3, 1, 2)
    wanted = cells + F.conv2d(cells, part.conv.weight, part.conv.bias, padding=1, groups=4)
    torch.testing.assert_close(out[:, 2:], wanted.flatten(2).transpose(1, 2))


def test_host_keeps_its_function_with_its_table():
    vit = vitkit.build("vit_femto", img_size=8, in_chans=1, num_classes=3).eval()
    torch.nn.init.normal_(vit.head.weight)
    x = torch.rand(2, 1, 8, 8)
    before = vit(x)
    record = vitkit.swap(vit, "position", "cpe", keep_absolute=True)
    torch.testing.assert_close(vit(x), before)
    record.undo()
    vitkit.swap(vit, "position", "cpe")
    assert vit.pos_embed is None and (vit(x) - before).abs().max() > 1e-4


def test_errors():
    with pytest.raises(BadInput, match="odd, such as 5"):
        CPE(4, kernel_size=4)
    merged = TokenLayout(grid=(2, 2)).regroup(torch.tensor([[0, 0, 1, 2]]), 3)
    with pytest.raises(ValueError, match="full grid|every cell"):
        CPE(4).embed(torch.zeros(1, 3, 4), merged, None)

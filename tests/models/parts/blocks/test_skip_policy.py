from __future__ import annotations

import pytest
import torch

from vitkit import swap
from vitkit.models.build import build


def test_both_skips_leave_the_model_untouched():
    model = build("vit_femto", img_size=16, in_chans=1, num_classes=3).eval()
    x = torch.rand(2, 1, 16, 16)
    before = model(x)
    swap(model, "block", "skip-policy")
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("attn", "mlp"), [(False, True), (True, False), (False, False)])
def test_the_flags_remove_the_stream(attn, mlp):
    model = build("vit_femto", img_size=16, in_chans=1, num_classes=3).eval()
    x, layout = model.embed(torch.rand(2, 1, 16, 16))
    block = model.blocks[1]
    update = block.attn(block.norm1(x), layout)
    mid = update + (x if attn else 0)
    expected = block.mlp(block.norm2(mid), layout) + (mid if mlp else 0)
    record = swap(model, "block", "skip-policy", where=1, attn=attn, mlp=mlp)
    torch.testing.assert_close(model.blocks[1](x, layout)[0], expected)
    assert model.blocks[1].attn is block.attn
    record.undo()
    assert model.blocks[1] is block

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitkit.evidence.zsharp import top_eigenvalue
from vitkit.testing.worlds import tiny_vit


def test_lanczos_finds_the_top_of_the_whole_hessian():
    model = tiny_vit(4, 2, 1, 3, embed_dim=4, depth=1, num_heads=2, weight_init="").double()
    torch.nn.init.normal_(model.head.weight)
    images, labels = torch.rand(6, 1, 4, 4).double(), torch.arange(6) % 3
    params = list(model.parameters())
    flags = [b.attn.fused_attn for b in model.blocks]
    for block in model.blocks:
        block.attn.fused_attn = False
    grads = torch.autograd.grad(F.cross_entropy(model(images), labels), params, create_graph=True)
    rows = [torch.autograd.grad(g, params, retain_graph=True) for g in torch.cat([g.flatten() for g in grads])]
    hessian = torch.stack([torch.cat([r.flatten() for r in row]) for row in rows])
    for block, flag in zip(model.blocks, flags):
        block.attn.fused_attn = flag
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    assert top_eigenvalue(model, images, labels, steps=60) == pytest.approx(top, rel=1e-6)
    # few products never overshoot, and the top comes first
    assert 0.9 * top < top_eigenvalue(model, images, labels, steps=15) <= top * (1 + 1e-9)
    assert [b.attn.fused_attn for b in model.blocks] == flags
    assert all(p.grad is None for p in model.parameters())

"""The cosine codebook: nearest by direction, straight-through gradients, codes that follow their members."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vitkit.errors import BadInput
from vitkit.models.cosine_codebook import CosineCodebook


def book(codes=5, decay=0.8) -> CosineCodebook:
    torch.manual_seed(0)
    return CosineCodebook(3, codes, decay)


def x(seed=1):
    return 4 * torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(seed))


def test_every_cell_becomes_the_code_of_the_smallest_angle():
    made, image = book().eval(), x()
    found, codes, loss = made(image)
    cosines = torch.einsum("bchw,kc->bkhw", image, made.codebook) / image.norm(dim=1, keepdim=True)
    assert torch.equal(codes, cosines.argmax(1))
    torch.testing.assert_close(found, made.codebook[codes].permute(0, 3, 1, 2))
    torch.testing.assert_close(made(image * 7)[0], found)
    torch.testing.assert_close(loss, (F.normalize(image, dim=1) - found).square().mean())


def test_gradients_pass_to_the_direction():
    made, image, weight = book().eval(), x().requires_grad_(), torch.randn(2, 3, 2, 4)
    (grad,) = torch.autograd.grad((made(image)[0] * weight).sum(), image)
    (expected,) = torch.autograd.grad((F.normalize(image, dim=1) * weight).sum(), image)
    torch.testing.assert_close(grad, expected)


def test_codes_follow_their_members_in_training_only():
    made, image = book(codes=40), x()
    before = made.codebook.clone()
    made.eval()(image)
    assert torch.equal(made.codebook, before)
    _, codes, _ = made.train()(image)
    rows = F.normalize(image, dim=1).permute(0, 2, 3, 1).reshape(-1, 3)
    for k in range(40):
        mine = rows[codes.flatten() == k]
        if len(mine):
            moved = F.normalize(0.8 * before[k] + 0.2 * F.normalize(mine.sum(0), dim=0), dim=0)
            torch.testing.assert_close(made.codebook[k], moved)
            assert not torch.allclose(made.codebook[k], before[k])
        else:
            torch.testing.assert_close(made.codebook[k], before[k])
    assert len(codes.unique()) < 40


def test_impossible_books_are_refused():
    with pytest.raises(BadInput, match="codes=1"):
        book(codes=1)
    with pytest.raises(BadInput, match="decay=2"):
        book(decay=2)

"""The scan along the bands of a patch: what meets what, one band, and warm starts."""

from __future__ import annotations

import pytest
import torch

import vitkit
from vitkit.errors import BadInput
from vitkit.models.parts.tokenizers.spectral_scan import SpectralScan
from vitkit.testing import check_part
from vitkit.testing.checks import PLACES


def host(in_chans=6, **options):
    torch.manual_seed(0)
    return vitkit.build(
        "vit_pico", img_size=12, patch_size=4, in_chans=in_chans, num_classes=3,
        tokenizer=("spectral-scan", {"width": 8, "d_state": 4, **options}),
    ).patch_embed  # fmt: skip


@pytest.mark.parametrize("bands", [1, 2, 6])
def test_every_patch_is_a_sequence_of_its_own(bands):
    part, images = host(bands=bands), torch.randn(2, 6, 12, 12)
    with torch.no_grad():
        seen, grid = part.spectra(images)
        assert grid == (3, 3) and seen.shape == (2, 9, 6 // bands, 8)
        patch = images[:, :, 4:8, 8:12]
        kernel = part.embed.weight
        x = torch.stack([
            torch.einsum("bcij,dcij->bd", patch[:, c * bands : (c + 1) * bands], kernel) + part.band_embed[c]
            for c in range(6 // bands)
        ], 1)  # fmt: skip
        layout = vitkit.models.layout.TokenLayout(grid=(1, 6 // bands))
        assert torch.allclose(seen[:, 5], x + part.scan(part.norm(x), layout), atol=1e-5)


def test_bands_meet_and_places_do_not():
    part = host()
    images = torch.randn(1, 6, 12, 12, requires_grad=True)
    seen, _ = part.spectra(images)
    seen[0, 4, 2].sum().backward()
    inside = images.grad[0, :, 4:8, 4:8].abs().amax((1, 2))
    assert bool((inside > 0).all()), "in both directions every band is heard"
    images.grad[0, :, 4:8, 4:8] = 0
    assert float(images.grad.abs().max()) == 0


def test_one_band_makes_it_trivial():
    one, many = host(in_chans=1), host(in_chans=4)
    for part, moves in ((one, False), (many, True)):
        images = torch.randn(2, part.steps, 12, 12)
        with torch.no_grad():
            before, _ = part.spectra(images)
            part.scan.ssm.A_log.add_(1.0)
            after, _ = part.spectra(images)
        # without a past there is no state that could decay
        assert torch.equal(before, after) != moves
    # and all places of a constant image are told the same
    with torch.no_grad():
        seen, _ = one.spectra(torch.full((1, 1, 12, 12), 0.3))
    assert torch.allclose(seen, seen[:, :1].expand_as(seen), atol=1e-6)


def test_the_order_of_bands_counts():
    part, images = host(), torch.randn(1, 6, 12, 12)
    with torch.no_grad():
        part.band_embed.zero_()
        seen, _ = part.spectra(images)
        turned, _ = part.spectra(images.flip(1))
    assert not torch.allclose(seen.mean(2), turned.mean(2), atol=1e-4)


def test_the_model_is_the_same_at_first_and_learns():
    model = vitkit.build("vit_pico", img_size=12, patch_size=4, in_chans=5, num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    images = torch.randn(2, 5, 12, 12)
    before = model(images)
    vitkit.swap(model, "tokenizer", "spectral-scan")
    assert torch.equal(model(images), before)
    model(images).square().sum().backward()
    assert float(model.patch_embed.proj.weight.grad.abs().max()) > 0


def test_behind_a_stem_and_errors():
    model = vitkit.build("vit_pico", img_size=16, patch_size=4, in_chans=4, num_classes=3,
                         tokenizer=["conv-stem", "spectral-scan"])  # fmt: skip
    assert model(torch.randn(2, 4, 16, 16)).shape == (2, 3)
    with pytest.raises(BadInput, match="bands=3 and width"):
        host(bands=4)
    with pytest.raises(BadInput, match="in_chans=5"):
        host()(torch.randn(1, 5, 12, 12))


@pytest.mark.parametrize("places, options", [(PLACES[:2], {"bands": 3}), (PLACES[3:4], {"bands": 5, "width": 5})])
def test_conforms(places, options):
    assert not check_part(SpectralScan, places=places, dynamo=False, **options).refused

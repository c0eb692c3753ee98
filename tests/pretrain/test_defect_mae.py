from __future__ import annotations

import torch

from vitkit.models.build import build
from vitkit.pretrain.defect_mae import DefectMAE, otsu, prepare_scan, scale_percentiles
from vitkit.pretrain.mae import MAE


def test_it_is_the_shared_autoencoder_with_optional_scaling():
    images = 0.2 + 0.3 * torch.rand(3, 1, 16, 16)
    losses = []
    for make in (lambda m: MAE(m), lambda m: DefectMAE(m), lambda m: DefectMAE(m, scale=True)):
        torch.manual_seed(0)
        objective = make(build("vit_femto", img_size=16, in_chans=1, num_classes=2))
        torch.manual_seed(1)
        losses.append(float(objective({"images": images})["loss"].detach()))
    assert losses[0] == losses[1] != losses[2]


def test_percentile_scaling():
    images = torch.linspace(0.2, 0.6, 101).repeat(2, 1).view(2, 1, 1, 101)
    images[1] = 0.5
    out = scale_percentiles(images)
    assert out.min() == 0
    assert out.max() <= 1
    torch.testing.assert_close(out[0, 0, 0, 50], torch.tensor(0.5), atol=1e-3, rtol=0)
    assert (out[1] == 0).all()


def test_otsu_separates_chip_from_background():
    images = torch.full((1, 1, 20, 20), 0.1)
    images[..., 5:15, 5:15] = 0.8
    images += 0.02 * torch.randn(images.shape)
    assert 0.15 < otsu(images.clamp(0, 1))[0] < 0.8
    prepared = prepare_scan(images.clamp(0, 1))
    assert (prepared[..., :4, :4] == 0).all()
    assert (prepared[..., 6:14, 6:14] > 0).all()


def test_otsu_is_the_best_of_all_thresholds():
    images = torch.rand(4, 1, 15, 11, generator=torch.Generator().manual_seed(0))
    images[1:] = torch.where(images[1:] > 0.6, images[1:], 0.3 * images[1:])
    for image, found in zip(images, otsu(images, bins=32)):
        levels = (image.flatten() * 31).round()
        spreads = []
        for t in range(1, 32):
            dark, bright = levels[levels < t], levels[levels >= t]
            parts = len(dark) * len(bright)
            spreads.append(parts * float(dark.mean() - bright.mean()) ** 2 if parts else 0.0)
        best = 1 + max(range(31), key=spreads.__getitem__)
        # every pixel falls on the side of the level it was counted at
        assert torch.equal(image.flatten() >= found, levels >= best)


def test_preparation_keeps_the_precision_of_the_scan():
    scan = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert scale_percentiles(scan).dtype == prepare_scan(scan).dtype == torch.bfloat16

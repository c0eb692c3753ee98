"""A detector on a pyramid: it learns where things are, keeps a recurrent memory, and takes any network with stages."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.ops import box_iou

from vitkit.errors import BadInput
from vitkit.models.detect import PAFPN, detector


def squares(batch, windows, seed):
    """A bright square that moves right; the box is where it is in the last window."""
    rng = torch.Generator().manual_seed(seed)
    clips, targets = torch.zeros(batch, windows, 2, 32, 32), []
    for b in range(batch):
        x, y, size = (int(torch.randint(*span, (), generator=rng)) for span in ((0, 12), (0, 20), (8, 12)))
        for t in range(windows):
            clips[b, t, 0, y : y + size, x + 2 * t : x + 2 * t + size] = 1
        end = x + 2 * (windows - 1)
        targets.append({"boxes": torch.tensor([[end, y, end + size, y + size]]).float(), "labels": torch.tensor([1])})
    return clips, targets


def femto(**options):
    torch.manual_seed(0)
    net = timm.create_model("hsvt_femto", in_chans=2, num_classes=0, layer_scale=0.1, dims=(16, 16, 32, 32), **options)
    return detector(net, num_classes=2, channels=32, score_thresh=0.05)


def test_it_learns_to_find_a_moving_square():
    model = femto().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(60):
        clips, targets = squares(8, 2, seed=step)
        losses, memory = model(clips, targets)
        assert set(losses) == {"classification", "bbox_regression", "bbox_ctrness"} and len(memory) == 4
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert sum(history[-5:]) < 0.7 * sum(history[:5])
    clips, targets = squares(16, 2, seed=1000)
    with torch.no_grad():
        found, _ = model.eval()(clips)
    best = [float(box_iou(f["boxes"][:1], t["boxes"]).max()) if len(f["boxes"]) else 0 for f, t in zip(found, targets)]
    assert sum(best) / len(best) > 0.4
    assert all((f["labels"][:1] == 1).all() for f in found)


def test_windows_with_memory_are_windows_at_once():
    model = femto().eval()
    clips, _ = squares(2, 3, seed=0)
    with torch.no_grad():
        whole, end = model(clips)
        memory = None
        for window in clips.unbind(1):
            found, memory = model(window, memory=memory)
    for a, b in zip(whole, found):
        assert torch.allclose(a["boxes"], b["boxes"], atol=1e-3) and torch.allclose(a["scores"], b["scores"], atol=1e-4)
    assert torch.allclose(end[3][0], memory[3][0], atol=1e-5)
    # nothing of a stream stays in the detector
    assert model.fcos.backbone.memory is None


def test_boxes_are_in_pixels_of_the_image_as_given():
    model = femto().eval()
    with torch.no_grad():
        found, _ = model(torch.rand(2, 2, 28, 40))
    for f in found:
        assert f["boxes"].numel() == 0 or (f["boxes"][:, [0, 2]].max() <= 40 and f["boxes"][:, [1, 3]].max() <= 28)


def test_any_network_with_stages_will_do():
    torch.manual_seed(0)
    model = detector(timm.create_model("ecvit_femto", img_size=32, num_classes=0), 3, stages=(0, 1, 2), channels=32)
    losses, memory = model.train()(
        torch.rand(2, 3, 32, 32), [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}] * 2
    )
    assert memory is None and all(v.isfinite() for v in losses.values())
    with pytest.raises(BadInput, match="without memory"):
        model(torch.rand(1, 3, 32, 32), memory=())


def test_the_neck_passes_information_both_ways():
    torch.manual_seed(0)
    neck = PAFPN([4, 8, 16], 8)
    maps = [torch.randn(1, c, s, s, requires_grad=True) for c, s in ((4, 9), (8, 5), (16, 3))]
    out = neck(maps)
    assert [tuple(m.shape) for m in out.values()] == [(1, 8, 9, 9), (1, 8, 5, 5), (1, 8, 3, 3)]
    for name in out:
        grads = torch.autograd.grad(out[name].sum(), maps, retain_graph=True)
        assert all((g != 0).any() for g in grads)


def test_errors_name_what_works():
    net = timm.create_model("hsvt_femto", in_chans=2)
    with pytest.raises(BadInput, match="between 0 and 3"):
        detector(net, 2, stages=(1, 4))
    with pytest.raises(BadInput, match="multiple of 32"):
        detector(net, 2, channels=40)
    with pytest.raises(BadInput, match="gives no maps"):
        detector(torch.nn.Linear(2, 2), 2)

"""Reslim's encoder: timm's contract, named variables, resolution, positions."""

from __future__ import annotations

import pytest
import timm
import torch

import vitkit  # noqa: F401 - registers the networks
from vitkit.anatomy import host
from vitkit.errors import BadInput, UnknownName
from vitkit.explain.rollout import rollout
from vitkit.models.backbones.reslim import ReslimEncoder
from vitkit.testing import check_backbone

NAMES = ("t2m", "precipitation", "orography")


def make(**options):
    torch.manual_seed(0)
    shape = {"img_size": (8, 12), "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "weight_init": "jax"}
    model = ReslimEncoder(variables=NAMES, **shape | options)
    if model.num_classes:
        torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.parametrize(("chans", "size"), [(1, 28), (5, 8), (3, 64)])
def test_timms_contract(chans, size):
    found = check_backbone("reslim_femto", image_size=size, in_chans=chans, img_size=size)
    assert "reset_classifier" in found.passed


def test_the_papers_sizes():
    with torch.device("meta"):
        shapes = {}
        for name in ("tiny", "small", "base", "large"):
            # the table of positions is computed, which has no meaning without memory
            model = timm.create_model(f"reslim_{name}", pos_embed="none", num_classes=0)
            shapes[name] = (model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads)
            assert model.patch_embed.patch_size == (2, 2) and model.patch_embed.grid_size == (16, 32)
    assert shapes == {"tiny": (256, 6, 4), "small": (1024, 8, 16), "base": (3072, 8, 24), "large": (8192, 11, 32)}


def test_variables_go_by_name():
    model = make()
    fields = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        whole = model(fields)
        torch.testing.assert_close(model(fields[:, [2, 0, 1]], variables=["orography", "t2m", "precipitation"]), whole)
        two = model(fields[:, :2], variables=NAMES[:2])
        assert not torch.allclose(two, whole, atol=1e-3)
        # what is absent has no influence, and what is called otherwise has another meaning
        assert not torch.allclose(model(fields[:, :2], variables=["precipitation", "t2m"]), two, atol=1e-3)
    with pytest.raises(UnknownName, match="Did you mean 'orography'"):
        model(fields[:, :1], variables=["orografy"])
    with pytest.raises(BadInput, match="none twice"):
        model(fields[:, :2], variables=["t2m", "t2m"])
    with pytest.raises(BadInput, match="3 channels, but 2 variables"):
        model(fields, variables=NAMES[:2])
    with pytest.raises(BadInput, match="in_chans=3"):
        ReslimEncoder(variables=["a", "b"], embed_dim=32)


def test_a_subset_passes_every_station_of_the_host():
    """The embedding of a subset in another order, with taps, prefix and dropout of patches, is that of the host."""
    model = make(class_token=True, reg_tokens=2)
    fields, seen = torch.randn(2, 3, 8, 12), []

    class Tap:
        def wants(self, site, depth):
            return True

        def __call__(self, site, value, depth, layout):
            seen.append(site)
            return value

    model.taps = (Tap(),)
    with torch.no_grad():
        x, layout = model.embed(fields)
        y, other = model.embed(fields[:, [1, 0, 2]], variables=("precipitation", "t2m", "orography"))
    assert seen == ["embed", "embed"] and layout.prefix == other.prefix and layout.grid == other.grid == (4, 6)
    assert y.shape == (2, 3 + 24, 32)
    torch.testing.assert_close(x, y)


def test_resolution_moves_all_tokens_by_one_vector():
    model = make()
    fields = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        none, _ = model.embed(fields)
        zero, _ = model.embed(fields, resolution=0)
        coarse, _ = model.embed(fields, resolution=torch.tensor([0.0, 111.0]))
    torch.testing.assert_close(none, zero)
    torch.testing.assert_close(coarse[0], none[0])
    step = 111 * model.resolution_embed.weight[:, 0]
    torch.testing.assert_close(coarse[1] - none[1], step.expand(24, -1), atol=1e-4, rtol=1e-4)
    with pytest.raises(BadInput, match="3 values for 2 fields"):
        model(fields, resolution=torch.zeros(3))


def test_positions_are_fixed_sines_resampled_for_other_grids():
    model = make()
    table = model.pos_embed[0].reshape(4, 6, 32)
    assert not model.pos_embed.requires_grad and make(learn_positions=True).pos_embed.requires_grad
    place = torch.arange(4.0)
    torch.testing.assert_close(table[:, 2, 0], place.sin())
    torch.testing.assert_close(table[1, :, 8], torch.arange(6.0).sin())
    with torch.no_grad():
        assert model.embed(torch.randn(1, 3, 4, 20))[0].shape == (1, 20, 32)


def test_it_is_a_host_for_methods():
    model = make()
    assert host(model) is model
    found = rollout(model, torch.rand(2, 3, 8, 12), torch.tensor([0, 1]))
    assert found.map.shape == (2, 4, 6)


def test_every_parameter_learns_and_nothing_breaks_the_graph():
    model = make().train()
    (model(torch.randn(4, 3, 8, 12), resolution=3.0) * torch.randn(4, 5)).sum().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and not bool((p.grad != 0).any())]
    assert silent == []
    torch._dynamo.reset()
    fields = torch.randn(1, 2, 8, 12)
    assert torch._dynamo.explain(model.eval())(fields, variables=NAMES[1:], resolution=2.0).graph_break_count == 0

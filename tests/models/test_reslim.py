"""Reslim: two paths that add up, named targets, missing variables."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitkit.errors import BadInput, UnknownName
from vitkit.models.reslim import Reslim, reslim
from vitkit.models.tiles import tiles

NAMES = ("wind", "t2m", "orography", "humidity", "precipitation")


def make(**options):
    torch.manual_seed(0)
    return reslim(NAMES, ("precipitation", "t2m"), size="femto", img_size=(8, 12), **options).eval()


@pytest.mark.parametrize(("scale", "patch"), [(4, 2), (2, 4), (3, 1), (1, 2)])
def test_output_is_the_targets_at_m_times_the_resolution(scale, patch):
    model = make(scale=scale, patch_size=patch)
    for size in ((8, 12), (4, 16)):
        assert model(torch.randn(2, 5, *size), resolution=25.0).shape == (2, 2, scale * size[0], scale * size[1])


def test_a_zeroed_vit_leaves_the_residual_path_alone():
    model = make()
    fields = torch.randn(2, 5, 8, 12)
    nn.init.zeros_(model.decoder[-1].weight)
    with torch.no_grad():
        # precipitation, t2m, then the static field
        expected = model.residual(fields[:, [4, 1, 2]])
        assert torch.equal(model(fields, resolution=3.0), expected) and bool(expected.any())
    assert model.static == ("orography",) and model.residual[0].in_channels == 3


def test_without_residual_path_the_vit_is_alone():
    model, plain = make(), make(residual=False)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("residual")})
    fields = torch.randn(1, 5, 8, 12)
    with torch.no_grad():
        torch.testing.assert_close(plain(fields) + model.residual(fields[:, [4, 1, 2]]), model(fields))


def test_patches_land_where_they_belong():
    """A decoder that paints each token in one value gives blocks of m·p cells in raster order."""
    model = make(residual=False, decoder_depth=0, scale=2, patch_size=2)
    with torch.no_grad():
        model.decoder[-1].weight.copy_(torch.randn(2, 1, 64).expand(-1, 16, -1).flatten(0, 1))
        model.conv_out.weight.zero_()
        for k in range(2):
            model.conv_out.weight[k, k, 1, 1] = 1
        fields = torch.randn(1, 5, 8, 12)
        x, _ = model.encoder.run(*model.encoder.embed(fields))
        values = model.decoder(model.encoder.norm(x)).reshape(1, 4, 6, 2, 16)
        found = model(fields)
    for row in range(4):
        for col in range(6):
            block = found[0, :, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
            torch.testing.assert_close(block, values[0, row, col].reshape(2, 4, 4))


def test_variables_may_be_missing_but_not_those_of_the_residual_path():
    model = make()
    fields = torch.randn(2, 5, 8, 12)
    with torch.no_grad():
        some = model(fields[:, [4, 2, 1]], variables=["precipitation", "orography", "t2m"])
        changed = fields.clone()
        changed[:, [0, 3]] = 7.0
        torch.testing.assert_close(model(changed[:, [1, 2, 4]], variables=["t2m", "orography", "precipitation"]), some)
        assert not torch.allclose(model(changed), model(fields), atol=1e-4)
    with pytest.raises(BadInput, match="t2m are not among the fields"):
        model(fields[:, [4, 2]], variables=["precipitation", "orography"])
    with pytest.raises(BadInput, match="do not fit the 5 variables"):
        model(fields[:, :4])
    alone = make(residual=False)
    assert alone(fields[:, :1], variables=["wind"]).shape == (2, 2, 32, 48)


def test_names_are_checked():
    with pytest.raises(UnknownName, match="Did you mean 't2m'"):
        Reslim(NAMES, ["t2n"])
    with pytest.raises(UnknownName, match="land_cover"):
        Reslim(NAMES, ["t2m"], static=["land_cover"])
    with pytest.raises(BadInput, match="none twice"):
        Reslim(NAMES, ["t2m", "t2m"])
    with pytest.raises(UnknownName, match="size of Reslim"):
        reslim(NAMES, ["t2m"], size="9m")
    with pytest.raises(BadInput, match="8×12"):
        make()(torch.zeros(1, 5, 9, 13))


def test_the_published_configuration():
    model = reslim([str(i) for i in range(23)], ["21", "5", "6"], static=["0", "1", "2", "3"], img_size=(32, 64))
    assert len(model.encoder.blocks) == 6 and model.encoder.embed_dim == 256
    assert [type(m) for m in model.decoder] == [nn.Linear, nn.GELU] * 4 + [nn.Linear]
    assert model.decoder[-1].out_features == 3 * 64 and model.residual[0].weight.shape == (64, 7, 3, 3)
    assert model.encoder.pos_drop.p == model.encoder.blocks[0].attn.proj_drop.p == 0.1


def test_every_parameter_learns_also_with_recomputation_and_in_bfloat16():
    model = make().train()
    fields = torch.randn(2, 5, 8, 12)
    model(fields, resolution=3.0).square().mean().backward()
    # with a zero query the projection of the query would stand still; here it starts small
    silent = [n for n, p in model.named_parameters() if p.requires_grad and not bool((p.grad != 0).any())]
    assert silent == []
    twin = copy.deepcopy(model)
    twin.zero_grad()
    twin.set_grad_checkpointing()
    twin(fields, resolution=3.0).square().mean().backward()
    for a, b in zip(model.parameters(), twin.parameters()):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)
    low = copy.deepcopy(model).to(torch.bfloat16).eval()(fields.bfloat16(), resolution=torch.tensor([3.0, 4.0]))
    assert low.dtype == torch.bfloat16 and bool(torch.isfinite(low).all())


def test_tiles_hand_on_names_and_resolutions():
    model = make()
    fields, names = torch.randn(2, 3, 16, 24), ("t2m", "orography", "precipitation")
    tiled = tiles(model, div=2, halo=2)
    assert tiled.multiple == (2, 2)
    with torch.no_grad():
        found = tiled(fields, variables=names, resolution=torch.tensor([1.0, 9.0]))
        for i, km in enumerate((1.0, 9.0)):
            one = tiled(fields[i : i + 1], variables=names, resolution=km)
            torch.testing.assert_close(found[i : i + 1], one, atol=1e-5, rtol=1e-4)

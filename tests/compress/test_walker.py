from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from vitkit.anatomy import linear_inputs
from vitkit.compress.walker import BlockWalker, default_layers
from vitkit.errors import BadInput
from vitkit.models.build import build
from vitkit.models.layout import TokenLayout
from vitkit.models.normalized import NormalizedModel


class MergeNeighbours(nn.Module):
    """Merge the pair of neighbouring patches with the most similar keys of each image, sizes as weights."""

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        p = layout.num_prefix
        metric = nn.functional.normalize(keys.mean(1)[:, p:], dim=-1)
        best = (metric[:, :-1] * metric[:, 1:]).sum(-1).argmax(1)
        batch, n = metric.shape[:2]
        assign = torch.arange(n).expand(batch, -1) - (torch.arange(n) > best[:, None]).long()
        sizes = layout.sizes if layout.sizes is not None else torch.ones(batch, n)
        weighted = x[:, p:] * sizes.unsqueeze(-1)
        merged = torch.zeros(batch, n - 1, x.shape[-1]).scatter_add_(
            1, assign.unsqueeze(-1).expand_as(weighted), weighted
        )
        after = layout.regroup(assign, n - 1)
        return torch.cat([x[:, :p], merged / after.sizes.unsqueeze(-1)], 1), after


class MergeByValue(MergeNeighbours):
    """Decides from the values, so nothing else can follow it."""

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        return super().forward(x, x[:, None, :, -4:], layout)


class Pad(nn.Module):
    """Marks the last patch of the first image as padding."""

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        valid = torch.ones(x.shape[0], x.shape[1] - layout.num_prefix, dtype=torch.bool)
        valid[0, -1] = False
        return x, layout.replace(valid=valid)


def _vit(seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    return build("vit_femto", img_size=8, in_chans=1, num_classes=3, depth=3, embed_dim=16, **options).eval()


def _images(n: int = 6) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _noisy(model: nn.Module, amount: float = 0.05) -> nn.Module:
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, nn.Linear):
                module.weight += amount * torch.randn(module.weight.shape, generator=g)
    return other


def _inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What every layer gets in one ordinary forward of the whole model."""
    found: dict[str, Tensor] = {}
    keep = default_layers(model)
    names = [n for n, m in model.named_modules() if keep(n, m)]
    with torch.no_grad(), linear_inputs(model, names, lambda n, x: found.__setitem__(n, x)):
        model(images)
    return found


def _collect(walker: BlockWalker) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for site in walker:
        for batch in site.batches():
            for name, pair in batch.items():
                found.setdefault(name, []).append(pair)
    return {n: (torch.cat([a for a, _ in ps]), torch.cat([b for _, b in ps])) for n, ps in found.items()}


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}])
def test_both_streams_are_what_a_whole_forward_gives(prefix):
    model = _vit(**prefix)
    other, images = _noisy(model), _images()
    found = _collect(BlockWalker(model, other, images, batch_size=4))
    ours, theirs = _inputs(other, images), _inputs(model, images)
    assert list(found) == [f"blocks.{i}.{n}" for i in range(3) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    for name, (x, x_full) in found.items():
        torch.testing.assert_close(x, ours[name])
        torch.testing.assert_close(x_full, theirs[name])
    assert found["blocks.1.attn.qkv"][0].shape == (6, 16 + model.num_prefix_tokens, 16)
    assert not torch.equal(*found["blocks.1.attn.qkv"])


def test_identity_keeps_the_streams_equal_and_the_models_unchanged():
    model = _vit()
    other = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    for x, x_full in _collect(BlockWalker(model, other, _images(), batch_size=3)).values():
        assert torch.equal(x, x_full)
    for now in (model, other):
        assert all(torch.equal(v, before[k]) for k, v in now.state_dict().items())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in now.modules())


def test_input_rounding_makes_the_streams_differ_and_leaves_weights_alone():
    model = _vit()
    other = copy.deepcopy(model)
    handles = [
        other.get_submodule(n).register_forward_pre_hook(lambda _, a: ((a[0] * 8).round() / 8,))
        for n in _inputs(model, _images())
    ]
    found = _collect(BlockWalker(model, other, _images()))
    # the layer's own rounded input is what counts, and it is on the rounding grid
    for x, x_full in found.values():
        assert torch.equal(x, (x * 8).round() / 8) and not torch.equal(x, x_full)
    for handle in handles:
        handle.remove()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())


def test_later_groups_see_a_replaced_layer_and_earlier_ones_do_not():
    model = _vit()
    plain = _collect(BlockWalker(model, copy.deepcopy(model), _images()))
    other = copy.deepcopy(model)
    changed: dict[str, Tensor] = {}
    for site in BlockWalker(model, other, _images()):
        for batch in site.batches():
            changed.update({name: x for name, (x, _) in batch.items()})
        if site.names == ("blocks.1.attn.proj",):
            bigger = nn.Linear(16, 16)
            other.blocks[1].attn.proj = bigger
    names = list(plain)
    at = names.index("blocks.1.attn.proj")
    assert all(torch.equal(changed[n], plain[n][0]) for n in names[: at + 1])
    assert not any(torch.equal(changed[n], plain[n][0]) for n in names[at + 1 :])
    torch.testing.assert_close(changed["blocks.2.mlp.fc2"], _inputs_after(other, "blocks.2.mlp.fc2"))


def _inputs_after(model: nn.Module, name: str) -> Tensor:
    found: list[Tensor] = []
    with torch.no_grad(), linear_inputs(model, [name], lambda _, x: found.append(x)):
        model(_images())
    return found[0]


def test_a_site_can_be_computed_again_but_not_after_the_walk_has_left_its_block():
    model = _vit()
    other = copy.deepcopy(model)
    walk = iter(BlockWalker(model, other, _images()))
    first = next(walk)
    one = next(first.batches())["blocks.0.attn.qkv"][0]
    two = next(first.batches())["blocks.0.attn.qkv"][0]
    assert torch.equal(one, two)
    for site in walk:
        if site.block == 1:
            break
    with pytest.raises(BadInput, match="left block 0"):
        next(first.batches())


@pytest.mark.parametrize("split", [[6], [1, 5], [2, 2, 2]])
def test_images_may_come_in_several_tensors(split):
    model = _vit()
    other = _noisy(model)
    whole = _collect(BlockWalker(model, other, _images(), batch_size=4))
    parts = _collect(BlockWalker(model, other, list(_images().split(split)), batch_size=4))
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_the_normalisation_around_the_host_is_applied():
    model = NormalizedModel(_vit(), [0.3], [0.2])
    found = _collect(BlockWalker(model, copy.deepcopy(model), _images()))
    expected = _inputs(model, _images())
    assert set(found) == set(expected) and all(n.startswith("model.blocks.") for n in found)
    for name in expected:
        torch.testing.assert_close(found[name][1], expected[name])


def test_activations_can_wait_elsewhere():
    model = _vit()
    other = _noisy(model)
    near, far = (_collect(BlockWalker(model, other, _images(), store=s)) for s in (None, "cpu"))
    assert all(torch.equal(near[n][0], far[n][0]) for n in near)


def test_the_reference_merges_what_the_compressed_copy_merges():
    model = _vit()
    for block in model.blocks[:2]:
        block.reduce = MergeNeighbours()
    other, images = _noisy(model, 0.3), _images()
    found = _collect(BlockWalker(model, other, images, batch_size=4))
    ours = _inputs(other, images)
    for name, (x, x_full) in found.items():
        torch.testing.assert_close(x, ours[name])
        assert x.shape == x_full.shape
    assert found["blocks.2.mlp.fc1"][0].shape[1] == 15

    # left alone, the reference would have merged other tokens: replay its forward with the compressed copy's choices
    chosen: list[tuple[Tensor, TokenLayout]] = []
    hooks = [b.reduce.register_forward_hook(lambda m, a, o: chosen.append(a[1:])) for b in other.blocks[:2]]
    with torch.no_grad():
        other(images)
    for hook in hooks:
        hook.remove()
    replay = copy.deepcopy(model)
    for block, (keys, layout) in zip(replay.blocks, chosen):
        block.reduce = _Replay(keys, layout)
    expected = _inputs(replay, images)
    alone = _inputs(model, images)
    for name, (_, x_full) in found.items():
        torch.testing.assert_close(x_full, expected[name])
    assert not torch.allclose(alone["blocks.2.mlp.fc2"], expected["blocks.2.mlp.fc2"])
    assert not any(b.reduce._forward_hooks for m in (model, other) for b in m.blocks[:2])


class _Replay(nn.Module):
    def __init__(self, keys: Tensor, layout: TokenLayout) -> None:
        super().__init__()
        self.keys, self.layout = keys, layout

    def forward(self, x: Tensor, keys: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        return MergeNeighbours()(x, self.keys, self.layout)


def test_a_merger_nobody_can_follow_is_an_error():
    model = _vit()
    model.blocks[0].reduce = MergeByValue()
    walk = BlockWalker(model, _noisy(model, 0.3), _images())
    with pytest.raises(BadInput, match="quantize before merging"):
        _collect(walk)
    other = _noisy(model)
    other.blocks[0].reduce = None
    with pytest.raises(BadInput, match="different modules"):
        BlockWalker(model, other, _images())


def test_padding_counts_for_nothing():
    model = _vit()
    model.blocks[0].reduce = Pad()
    found = _collect(BlockWalker(model, copy.deepcopy(model), _images(), batch_size=6))
    for name, pair in found.items():
        padded = "blocks.0.attn" not in name
        for x in pair:
            assert bool((x[0, -1] == 0).all()) is padded, name
            assert bool((x[1, -1] == 0).all()) is False


def test_layers_that_share_an_input_get_the_same_tensor():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.q_proj(x) * self.k_proj(x))

    model = _vit()
    model.blocks[1].mlp = Twins()
    sites = [(s.names, next(s.batches())) for s in BlockWalker(model, copy.deepcopy(model), _images()) if s.block == 1]
    names, batch = next(pair for pair in sites if any("k_proj" in n for n in pair[0]))
    shared = [batch[n] for n in names if "_proj" in n]
    assert len(shared) == 2 and shared[0][0] is shared[1][0] and shared[0][1] is shared[1][1]


@pytest.mark.parametrize("name", ["swin", "mlp_mixer"])
def test_networks_without_a_host_are_walked_in_the_order_of_their_calls(name):
    torch.manual_seed(0)
    if name == "swin":
        from timm.models.swin_transformer import SwinTransformer

        model = SwinTransformer(
            img_size=16, patch_size=2, window_size=4, in_chans=1, num_classes=3, embed_dim=8, depths=(1, 1),
            num_heads=(2, 2),
        ).eval()  # fmt: skip
        images = torch.rand(3, 1, 16, 16)
    else:
        from timm.models.mlp_mixer import MlpMixer

        model = MlpMixer(img_size=8, patch_size=2, in_chans=1, num_classes=3, embed_dim=8, num_blocks=2).eval()
        images = torch.rand(3, 1, 8, 8)
    other = _noisy(model)
    found = _collect(BlockWalker(model, other, images, batch_size=2))
    theirs = _inputs(model, images)
    assert set(found) == set(theirs) and not any("head" in n for n in found)
    assert list(found) == list(theirs)
    wide = _inputs(other, images)
    for key, (x, x_full) in found.items():
        torch.testing.assert_close(x.reshape(-1, x.shape[-1]), wide[key].reshape(-1, x.shape[-1]))
        torch.testing.assert_close(x_full.reshape(-1, x.shape[-1]), theirs[key].reshape(-1, x.shape[-1]))


def test_blocks_without_a_layout_are_walked_like_any_network():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    model = _vit()
    model.blocks[0] = Plain()
    other = _noisy(model)
    found = _collect(BlockWalker(model, other, _images()))
    theirs, ours = _inputs(model, _images()), _inputs(other, _images())
    assert list(found) == list(theirs) and next(iter(found)) == "blocks.0.mlp.0" and "head" not in found
    for name, (x, x_full) in found.items():
        torch.testing.assert_close(x, ours[name])
        torch.testing.assert_close(x_full, theirs[name])


@pytest.mark.parametrize("host", [True, False])
def test_a_walk_that_changes_nothing_needs_one_forward(host):
    model = _vit()
    if not host:
        model.blocks[0] = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    other = _noisy(model)
    slow = _collect(BlockWalker(model, other, _images()))
    calls = []
    handle = model.blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
    walker = BlockWalker(model, other, _images(), sequential=False)
    assert len(list(walker)) == (3 if host else 1)
    calls.clear()
    fast = _collect(walker)
    handle.remove()
    # a host's block is run once to look inside and once to go on, another network once more to see who calls whom
    assert len(calls) == 2
    assert set(fast) == set(slow)
    for name in slow:
        torch.testing.assert_close(fast[name], slow[name])


def test_a_layer_that_is_called_twice_is_seen_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            x = self.one(images.flatten(1))
            return self.two(self.one(x))

    torch.manual_seed(0)
    model, images = Twice(), torch.rand(3, 1, 2, 2)
    site = next(iter(BlockWalker(model, copy.deepcopy(model), images)))
    x, _ = next(site.batches())["one"]
    flat = images.flatten(1)
    torch.testing.assert_close(x, torch.stack([flat, model.one(flat)], 1))


def test_misuse_says_what_to_do():
    model = _vit()
    with pytest.raises(BadInput, match="no calibration images"):
        list(BlockWalker(model, copy.deepcopy(model), []))
    with pytest.raises(BadInput, match=r"\(N, C, H, W\)"):
        list(BlockWalker(model, copy.deepcopy(model), torch.rand(1, 8, 8)))
    with pytest.raises(BadInput, match="got str"):
        list(BlockWalker(model, copy.deepcopy(model), ["images"]))
    with pytest.raises(BadInput, match=r"torch\.uint8; give floats"):
        list(BlockWalker(model, copy.deepcopy(model), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)))
    with pytest.raises(BadInput, match="batch_size"):
        BlockWalker(model, copy.deepcopy(model), _images(), batch_size=0)


def test_images_of_an_iterator_serve_every_layer():
    from timm.models.mlp_mixer import MlpMixer

    torch.manual_seed(0)
    plain = MlpMixer(img_size=8, patch_size=4, in_chans=1, num_classes=3, embed_dim=8, num_blocks=1).eval()
    for model in (plain, _vit()):
        other = _noisy(model)
        whole = _collect(BlockWalker(model, other, _images(), batch_size=3))
        once = _collect(BlockWalker(model, other, (part for part in _images().split(3)), batch_size=3))
        assert set(once) == set(whole)
        for name in whole:
            torch.testing.assert_close(once[name], whole[name])


def test_a_name_is_no_classifier_where_the_network_says_which_layer_is():
    class Named(nn.Module):
        def __init__(self, says: bool) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            if says:
                self.get_classifier = lambda: self.head

    for says, expected in ((True, ["fc"]), (False, [])):
        model = Named(says)
        keep = default_layers(model)
        assert [n for n, m in model.named_modules() if keep(n, m)] == expected

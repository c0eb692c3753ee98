from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitkit.data import Source, make_loader, mean_std, open_source, split
from vitkit.data import loader as loader_module
from vitkit.errors import BadInput, UnknownName


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in "ab":
        (root / name).mkdir()
        for i in range(12):
            coarse = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
            size = (150 + 10 * (i % 3), 110 + 20 * (i % 2))
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(root / name / f"{i}.jpg", quality=90)
    return open_source(root)


def batches(loader) -> list[dict]:
    return list(loader)


def same(first: list[dict], second: list[dict]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(first, second)
    )


FILES = {"image_size": (80, 96), "in_chans": 3, "batch_size": 5, "train": True, "seed": 7}


def test_batch(photos):
    loader = make_loader(photos, np.arange(4, 20), **FILES, workers=0)
    batch = next(iter(loader))
    assert batch["images"].shape == (5, 3, 80, 96) and batch["images"].dtype == torch.float32
    assert batch["images"].is_contiguous() and batch["images"].min() >= 0 and batch["images"].max() <= 1
    assert batch["labels"].tolist() == photos.labels(batch["indices"].numpy()).tolist()
    assert batch["indices"].dtype == torch.int64 and batch["weights"].tolist() == [1.0] * 5
    assert loader.keys(batch["indices"]) == [photos.records[i].key for i in batch["indices"].tolist()]
    assert len(loader) == 4 and len(batches(loader)) == 4
    assert len(make_loader(photos, np.arange(4, 20), **FILES, drop_last=True)) == 3


def test_every_image_once_an_epoch_in_another_order(photos):
    loader = make_loader(photos, np.arange(24), **FILES)
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        orders.append(torch.cat([b["indices"] for b in loader]).tolist())
        assert sorted(orders[-1]) == list(range(24))
    assert orders[0] != orders[1]
    evaluation = make_loader(photos, [9, 3, 5], (80, 96), 3, batch_size=2)
    assert torch.cat([b["indices"] for b in evaluation]).tolist() == [9, 3, 5]


@pytest.mark.parametrize("augment", ["none", "light", "strong", ["color", "erase", "vflip"]])
@pytest.mark.parametrize("cache_mb", [0, 512])
def test_same_seed_same_batches_and_resuming_changes_nothing(photos, augment, cache_mb):
    def loader(seed=7):
        return make_loader(
            photos, np.arange(24), **{**FILES, "seed": seed}, augment=augment, cache_mb=cache_mb, workers=0
        )

    first = loader()
    assert first.in_memory == (cache_mb > 0)
    first.set_epoch(3)
    whole = batches(first)
    again = loader()
    again.set_epoch(3)
    again.start_at(2)
    assert same(batches(again), whole[2:])
    # the start counts for one pass only
    assert same(batches(again), whole)
    assert not same(batches(loader(seed=8)), whole)
    if augment != "none":
        again.set_epoch(4)
        other = {int(i): x for b in again for i, x in zip(b["indices"], b["images"])}
        assert any(not torch.equal(x, other[int(i)]) for b in whole for i, x in zip(b["indices"], b["images"]))


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_workers_deliver_the_same_pixels(photos, augment):
    plain = make_loader(photos, np.arange(24), **FILES, augment=augment, cache_mb=0, workers=0)
    parallel = make_loader(photos, np.arange(24), **FILES, augment=augment, cache_mb=0, workers=1)
    for epoch in range(2):
        for loader in (plain, parallel):
            loader.set_epoch(epoch)
        assert same(batches(parallel), batches(plain))
    # an abandoned pass leaves nothing behind
    next(iter(parallel))
    parallel.set_epoch(5)
    plain.set_epoch(5)
    parallel.start_at(3)
    plain.start_at(3)
    assert same(batches(parallel), batches(plain))


def test_workers_without_shared_memory(photos, monkeypatch):
    plain = make_loader(photos, np.arange(24), **FILES, cache_mb=0, workers=0)
    expected = batches(plain)
    monkeypatch.setattr(loader_module, "_free_shared_memory", lambda: 0.0)
    assert same(batches(make_loader(photos, np.arange(24), **FILES, cache_mb=0, workers=1)), expected)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache_mb", [0, 512])
def test_the_global_random_state_is_left_alone(photos, workers, cache_mb):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    threads = torch.get_num_threads()
    batches(make_loader(photos, np.arange(24), **FILES, augment="strong", workers=workers, cache_mb=cache_mb))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert torch.get_num_threads() == threads


def test_memory_and_streaming_show_the_same_pixels_without_crops(photos):
    for augment in ("none", ["flip", "vflip", "shift"]):
        kept = make_loader(photos, np.arange(24), **FILES, augment=augment, cache_mb=512)
        streamed = make_loader(photos, np.arange(24), **FILES, augment=augment, cache_mb=0, workers=0)
        assert kept.in_memory and not streamed.in_memory
        assert same(batches(kept), batches(streamed))


def test_crops_from_memory_resemble_crops_from_the_file(photos):
    options = {**FILES, "image_size": (80, 80), "augment": ["crop"]}
    kept = next(iter(make_loader(photos, np.arange(24), **options, cache_mb=512)))["images"]
    streamed = next(iter(make_loader(photos, np.arange(24), **options, cache_mb=0, workers=0)))["images"]
    assert float((kept - streamed).abs().mean()) < 0.02


def test_budget_is_kept(photos):
    bytes_at_size = 24 * 80 * 96 * 3
    assert make_loader(photos, np.arange(4), **FILES, cache_mb=bytes_at_size / 2**20).in_memory
    assert not make_loader(photos, np.arange(4), **FILES, cache_mb=(bytes_at_size - 1) / 2**20).in_memory


def test_decoded_images_are_shared_by_loaders_and_not_sent_to_workers(photos):
    first = make_loader(photos, np.arange(12), (40, 40), 3)
    batches(first)
    calls = []
    spy = SimpleNamespace(decodes=True, load=lambda *a: calls.append(a))
    kept, photos.pixels = photos.pixels, spy
    try:
        batches(make_loader(photos, np.arange(12), (40, 40), 3))
    finally:
        photos.pixels = kept
    assert not calls
    # what a freshly started worker process is sent: no decoded images, and it works there
    sent = pickle.dumps(loader_module._Work(first))
    assert len(sent) < 100_000
    assert torch.equal(pickle.loads(sent)[0, 0], loader_module._Work(first)[0, 0])


def test_arrays_come_exact(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (8, 6, 5, 4), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(8) % 2)
    source = open_source(tmp_path / "a.npz")
    for cache_mb in (0, 1):
        batch = next(iter(make_loader(source, np.arange(8), (6, 5), 4, batch_size=8, workers=0, cache_mb=cache_mb)))
        np.testing.assert_array_equal(batch["images"].numpy(), (x / np.float32(255)).transpose(0, 3, 1, 2))


def test_16_bit_images_are_not_reduced_to_8(tmp_path):
    x = np.random.default_rng(0).integers(0, 65536, (4, 6, 6), dtype=np.uint16)
    for i, image in enumerate(x):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    source = open_source(tmp_path)
    for cache_mb in (0, 1):
        for augment in ("none", "strong"):
            loader = make_loader(source, np.arange(4), (6, 6), 1, workers=0, cache_mb=cache_mb, augment=augment)
            batch = next(iter(loader))
            assert batch["images"].dtype == torch.float32 and batch["images"].max() <= 1
            if augment == "none":
                np.testing.assert_allclose(batch["images"][:, 0].numpy(), x[[0, 2, 1, 3]] / 65535, atol=1e-7)


def test_labels_and_weights_by_task(tmp_path):
    rows = ["path,label,weight"]
    for i in range(4):
        Image.new("L", (4, 4), i).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,{'a;b' if i else 'c'},{i}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    batch = next(iter(make_loader(open_source(tmp_path / "t.csv"), [2, 0], (4, 4), 1)))
    assert batch["labels"].tolist() == [[1, 1, 0], [0, 0, 1]] and batch["labels"].dtype == torch.float32
    assert batch["weights"].tolist() == [2, 0]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *(f"{i}.png,{i}.5" for i in range(4))]))
    batch = next(iter(make_loader(open_source(tmp_path / "t.csv"), [2, 0], (4, 4), 1)))
    assert batch["labels"].tolist() == [2.5, 0.5]


def test_digits_are_never_mirrored():
    source = open_source("digits")
    loader = make_loader(source, np.arange(64), (8, 8), 1, augment="light")
    assert loader.names == ("shift",)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_is_named_without_a_traceback(tmp_path, workers):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    source = open_source(tmp_path)
    (tmp_path / "b" / "1.png").unlink()
    with pytest.raises(BadInput, match=r"b/1\.png of .* cannot be opened any more") as caught:
        batches(make_loader(source, np.arange(6), (9, 9), 3, workers=workers, cache_mb=0))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("options", [{"cache_mb": 512}, {"cache_mb": 0, "workers": 0}, {"cache_mb": 0, "workers": 1}])
@pytest.mark.parametrize("world", [2, 5])
def test_shards_make_up_the_batches_of_one(photos, world, options):
    """24 = 10 + 10 + 4: with five processes the last batch leaves one without an image."""
    options = {**FILES, **options, "batch_size": 10, "augment": "strong", "train": True}
    whole = batches(make_loader(photos, np.arange(24), **options))
    pieces = []
    for rank in range(world):
        part = make_loader(photos, np.arange(24), **options)
        part.shard(rank, world)
        assert len(part) == len(whole) == 3
        pieces.append(batches(part))
    assert [len(p[2]["images"]) for p in pieces] == ([2, 2] if world == 2 else [0, 1, 1, 1, 1])
    for step, together in enumerate(whole):
        for name in ("images", "labels", "indices", "weights"):
            torch.testing.assert_close(torch.cat([p[step][name] for p in pieces]), together[name], atol=0, rtol=0)


def test_a_share_with_the_image_ahead_of_it(photos):
    options = {**FILES, "batch_size": 10, "augment": "light"}
    whole = [b["indices"].tolist() for b in make_loader(photos, np.arange(24), **options)]
    part = make_loader(photos, np.arange(24), **options)
    part.shard(1, 2, before=1)
    assert [b["indices"].tolist() for b in part] == [w[len(w) // 2 - 1 :] for w in whole]
    part.shard(0, 2, before=1)
    assert [b["indices"].tolist() for b in part] == [[w[-1], *w[: len(w) // 2]] for w in whole]
    part.shard(0, 1)
    assert [b["indices"].tolist() for b in part] == whole
    with pytest.raises(BadInput, match="rank"):
        part.shard(2, 2)


@pytest.mark.parametrize("cache_mb", [0, 512])
def test_a_share_decodes_its_own_images_only(tmp_path, cache_mb, monkeypatch):
    for i in range(8):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    source = open_source(tmp_path)
    loader = make_loader(source, np.arange(8), (9, 9), 3, batch_size=4, workers=0, cache_mb=cache_mb)
    loader.shard(1, 2)
    read = []
    load = source.load
    monkeypatch.setattr(source, "load", lambda i, at_least=None: (read.append(i), load(i, at_least))[1])
    batches(loader)
    assert sorted(read) == [2, 3, 6, 7]


def test_mean_std_is_that_of_the_given_images(photos):
    fold = split(photos)[0]
    mean, std = mean_std(photos, fold.train, (80, 96))
    images = torch.cat([b["images"] for b in make_loader(photos, fold.train, (80, 96), 3)])
    np.testing.assert_allclose(mean, images.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(std, images.std((0, 2, 3), unbiased=False), atol=1e-5)
    assert mean.shape == std.shape == (3,)
    assert not np.allclose(mean, mean_std(photos, fold.test, (80, 96))[0])
    few, again = mean_std(photos, fold.train, (80, 96), limit=4), mean_std(photos, fold.train, (80, 96), limit=4)
    np.testing.assert_array_equal(few[0], again[0])
    with pytest.raises(BadInput, match="no images"):
        mean_std(photos, [], (8, 8))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"indices": [24]}, BadInput, r"lie in 0…23; got 24…24"),
        ({"indices": [-1]}, BadInput, "lie in"),
        ({"batch_size": 0}, BadInput, "must be positive"),
        ({"augment": "heavy"}, UnknownName, "heavy"),
        ({"workers": "many"}, BadInput, "workers='many'"),
        ({"fit": "stretch"}, BadInput, "'crop' or 'squash'"),
    ],
)
def test_bad_arguments(photos, arguments, error, says):
    with pytest.raises(error, match=says):
        make_loader(photos, **{"indices": [0], "image_size": (8, 8), "in_chans": 3, **arguments})
    with pytest.raises(BadInput, match=r"start_at\(9\)"):
        make_loader(photos, [0], (8, 8), 3).start_at(9)


def test_nothing_to_load_is_no_batch(photos):
    empty = make_loader(photos, [], (8, 8), 3)
    assert len(empty) == 0 and batches(empty) == []
    assert isinstance(photos, Source)

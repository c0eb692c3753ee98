from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from vitkit.data import Fold, check, open_source, perceptual_hash, split
from vitkit.errors import BadInput


def scene(seed: int, size: int = 96) -> Image.Image:
    """A smooth random picture, the way photographs are smooth."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def fold(train, val, test) -> Fold:
    return Fold(*(np.array(p, np.int64) for p in (train, val, test)))


@pytest.fixture
def folder(tmp_path):
    for n, name in enumerate(["cat", "dog"]):
        (tmp_path / name).mkdir()
        for i in range(20):
            scene(100 * n + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_nothing_to_say_about_clean_data(folder):
    source = open_source(folder)
    report = check(source, split(source))
    assert report.leakage == () and report.warnings == () and report.constant == ()
    assert report.counts == {
        "train": {"cat": 14, "dog": 14},
        "val": {"cat": 2, "dog": 2},
        "test": {"cat": 4, "dog": 4},
    }
    assert (report.num_images, report.channels, report.sizes["median"]) == (40, {3: 40}, (96, 96))
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["image_sizes"] == "smallest 96×96, median 96×96, largest 96×96"
    assert plain["image_channels"] == "3 (40 images)"


@pytest.mark.parametrize("how", ["copy", "jpeg", "smaller", "brighter"])
def test_the_same_picture_in_two_parts_is_found(folder, how):
    picture = Image.open(folder / "cat" / "3.png")
    if how == "copy":
        (folder / "cat" / "3b.png").write_bytes((folder / "cat" / "3.png").read_bytes())
    elif how == "jpeg":
        picture.save(folder / "cat" / "3b.jpg", quality=60)
    elif how == "smaller":
        picture.resize((70, 64)).save(folder / "cat" / "3b.png")
    else:
        ImageEnhance.Brightness(picture).enhance(0.8).save(folder / "cat" / "3b.png")
    source = open_source(folder)
    names = [r.key for r in source.records]
    original = names.index("cat/3.png")
    copy = next(i for i, n in enumerate(names) if n.startswith("cat/3b"))
    rest = [i for i in range(41) if i not in (original, copy)]
    report = check(source, [fold([original, *rest[:-5]], rest[-5:], [copy])])
    [leak] = report.leakage
    assert (leak.first, leak.second, leak.splits) == ("cat/3.png", names[copy], ("train", "test"))
    assert leak.exact == (how == "copy") and leak.distance <= 6
    assert report.to_dict()["leakage"][0]["first"] == "cat/3.png"
    assert any("1 pair of images in different parts" in w for w in report.warnings)
    # in the same part it is no leak
    assert not check(source, [fold([original, copy, *rest[:-5]], rest[-5:-2], rest[-2:])]).leakage
    # nothing is moved or removed
    assert len(source) == 41


def test_leaks_between_any_two_folds_are_found(folder):
    (folder / "dog" / "x.png").write_bytes((folder / "dog" / "1.png").read_bytes())
    source = open_source(folder)
    folds = split(source, folds=5)
    first, second = (i for i, r in enumerate(source.records) if r.key in ("dog/1.png", "dog/x.png"))
    tested = [[i in f.test for f in folds].index(True) for i in (first, second)]
    val = [[i in f.val for i in (first, second)] for f in folds]
    apart = tested[0] != tested[1] or any(a != b for a, b in val)
    assert bool(check(source, folds).leakage) == apart


def test_tiny_simple_images_are_not_called_the_same():
    source = open_source("digits")
    assert check(source, split(source)).leakage == ()


def test_hash_of_random_pictures_differs_in_half_the_bits():
    pictures = np.stack([np.asarray(scene(i, 32).convert("L"), float) for i in range(60)])
    hashes = perceptual_hash(pictures)
    bits = np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1).astype(int)
    distance = np.abs(bits[:, None] - bits[None]).sum(-1)[np.triu_indices(60, 1)]
    assert 24 < distance.mean() < 40 and distance.min() > 6
    # brightness and contrast are not content
    np.testing.assert_array_equal(perceptual_hash(pictures * 0.5 + 40), hashes)


def test_blocks_find_what_a_plain_loop_finds(monkeypatch):
    from vitkit.data import checks
    from vitkit.data.look import Looks

    rng = np.random.default_rng(0)
    n = 50
    base = rng.integers(0, 2**63, 5).astype(np.uint64)
    hashes = base[rng.integers(0, 5, n)] ^ (np.uint64(1) << rng.integers(0, 63, n).astype(np.uint64))
    thumbs = np.broadcast_to(rng.integers(0, 255, (16, 16), dtype=np.uint8), (n, 16, 16))
    flat = np.zeros(n)
    looks = Looks(np.full((n, 2), 99), flat, flat, flat, flat + 1, np.zeros((n, 16), np.uint8), hashes, thumbs)
    parts = rng.integers(0, 3, (1, n)).astype(np.int8)
    monkeypatch.setattr(checks, "_BLOCK", 7)
    found = {(i, j): d for i, j, d in checks._near(looks, np.arange(n), parts, None)}
    expected = {
        (i, j): (int(hashes[i]) ^ int(hashes[j])).bit_count()
        for i in range(n)
        for j in range(i + 1, n)
        if parts[0, i] != parts[0, j] and (int(hashes[i]) ^ int(hashes[j])).bit_count() <= 6
    }
    assert found == expected and found


def test_constant_images_and_mixed_kinds_are_named(folder):
    Image.new("RGB", (50, 50), (255, 0, 0)).save(folder / "cat" / "red.png")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(folder / "cat" / "red2.png")
    scene(999).convert("L").save(folder / "dog" / "grey.png")
    (folder / "dog" / "empty.png").write_bytes(b"")
    source = open_source(folder)
    report = check(source, split(source))
    assert sorted(report.constant) == ["cat/red.png", "cat/red2.png"]
    assert not report.leakage  # plain areas resemble each other and mean nothing
    text = " ".join(report.warnings)
    assert "single colour" in text and "Grey and colour" in text and "1 of 44 images could not be used" in text
    assert report.to_dict()["skipped"] == [{"path": "dog/empty.png", "reason": "the file is empty (0 bytes)"}]


def test_a_training_part_of_one_class_is_an_error(folder):
    source = open_source(folder)
    with pytest.raises(BadInput, match="training part of the split has only the class 'cat'"):
        check(source, [fold(range(20), [], range(20, 40))])
    with pytest.raises(BadInput, match="fold 2 of 2"):
        check(source, [fold(range(30), [], range(30, 40)), fold(range(20), [], range(20, 40))])


def test_warnings_about_classes_and_groups(folder):
    source = open_source(folder)
    report = check(source, [fold([*range(20), 20], [21], range(22, 40))])
    text = " ".join(report.warnings)
    assert "test part has no image of 'cat'" in text and "Classes are unequal" in text and "single class" in text
    rows = "\n".join(f"{n}/{i}.png,{n},p{i}" for n in ("cat", "dog") for i in range(20))
    (folder / "t.csv").write_text("path,label,group\n" + rows)
    grouped = open_source(folder / "t.csv")
    assert not any("groups" in w for w in check(grouped, split(grouped)).warnings)
    report = check(grouped, split(grouped, group=False))
    assert any("groups lie in more than one part" in w for w in report.warnings)


def test_identical_images_with_different_labels(folder):
    (folder / "dog" / "1.png").write_bytes((folder / "cat" / "1.png").read_bytes())
    source = open_source(folder)
    report = check(source, split(source))
    assert any("different labels: cat/1.png and dog/1.png" in w for w in report.warnings)

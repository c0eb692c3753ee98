from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vitkit.deploy.images import read_images
from vitkit.errors import BadInput
from vitkit.models.io import ModelConfig


@pytest.fixture
def config():
    return ModelConfig(base="vit_femto", image_size=(8, 8), in_chans=3, classes=("red", "green", "blue"))


def folder(root, names, count, splits=("",)):
    """Images of one colour a class; the brightness tells them apart."""
    for split in splits:
        for name in names:
            place = root / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixel = [0, 0, 0]
                pixel[("red", "green", "blue").index(name)] = 100 + (60 if split == "test" else 0) + i
                Image.new("RGB", (10, 12), tuple(pixel)).save(place / f"{i}.png")
    return str(root)


def test_no_image_is_in_both_sets(tmp_path, config):
    found = read_images(folder(tmp_path, ["red", "green", "blue"], 9), config)
    assert found.calibration.shape == (9, 3, 8, 8) and found.held.shape == (18, 3, 8, 8)
    assert found.held.dtype == np.float32 and found.held.min() >= 0 and found.held.max() <= 1
    both = np.concatenate([found.calibration, found.held]).reshape(27, -1)
    assert len(np.unique(both.round(4), axis=0)) == 27
    again = read_images(str(tmp_path), config)
    np.testing.assert_array_equal(found.held, again.held)


def test_classes_have_the_models_numbers(tmp_path, config):
    # the data list two classes, alphabetically; the model knows three in an order of its own
    found = read_images(folder(tmp_path, ["blue", "red"], 6), config)
    for images, labels in ((found.held, found.held_labels), (found.calibration, found.calibration_labels)):
        np.testing.assert_array_equal(labels, images.mean((2, 3)).argmax(1))
    with pytest.raises(BadInput, match="'green'.*does not know"):
        read_images(
            folder(tmp_path / "more", ["green", "red"], 6),
            ModelConfig(base="vit_femto", image_size=(8, 8), classes=("red",)),
        )


def test_the_datas_own_test_part_compares(tmp_path, config):
    root = folder(tmp_path, ["red", "green"], 10, splits=("train", "test"))
    found = read_images(root, config, limit=7, calibration=5)
    assert len(found.held) == 7 and len(found.calibration) == 5
    assert (found.held.max((1, 2, 3)) > 155 / 255).all() and (found.calibration.max((1, 2, 3)) < 155 / 255).all()


def test_few_images_are_refused(tmp_path, config):
    with pytest.raises(BadInput, match="holds 6 images"):
        read_images(folder(tmp_path, ["red", "green"], 3), config)

from __future__ import annotations

import json

import pytest
import torch

from vitkit.errors import BadInput
from vitkit.models.io import ModelConfig, construct, load_model, save_model

CONFIG = ModelConfig(
    base="vit_femto",
    base_options={"img_size": [8, 8], "in_chans": 1, "num_classes": 3},
    parts=[{"slot": "normalizer", "part": "sinkhorn", "where": "all", "options": {}}],
    image_size=(8, 8),
    in_chans=1,
    mean=(0.3,),
    std=(0.2,),
    classes=("a", "b", "c"),
)


def test_round_trip(tmp_path):
    model = construct(CONFIG).eval()
    save_model(model, CONFIG, tmp_path)
    again, config = load_model(tmp_path)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(again(x), model(x))
    assert config.classes == CONFIG.classes


@pytest.mark.parametrize("low_byte", [0x80, 0x50])
def test_a_header_length_that_begins_like_a_pickle_is_still_safetensors(tmp_path, low_byte):
    """The file begins with its header's length, little-endian: 0x80 is also how pickles begin, 0x50 0x4B zips."""
    save_model(construct(CONFIG), CONFIG, tmp_path)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    wanted = (length // 256 + 1) * 256 + low_byte if low_byte == 0x80 else 0x4B50
    padded = raw[8 : 8 + length] + b" " * (wanted - length)
    path.write_bytes(wanted.to_bytes(8, "little") + padded + raw[8 + length :])
    load_model(tmp_path)


def test_real_pickles_and_wrong_shapes_are_refused(tmp_path):
    model = construct(CONFIG)
    save_model(model, CONFIG, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["base_options"]["num_classes"] = 4
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(BadInput, match=r"head\.weight has shape \(3, 64\), the model needs \(4, 64\)"):
        load_model(tmp_path)
    torch.save(model.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="pickle"):
        load_model(tmp_path)

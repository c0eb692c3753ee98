"""Names to objects, third parties, and errors that say what to do."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from vitkit.catalogue import clear_cache, find, load, methods, reader, resolve
from vitkit.errors import BadInput, UnknownName, VitkitError


class Point:
    """An installed package's entry point."""

    def __init__(self, value, name="theirs"):
        self.name, self.value, self._value = name, "their_package:catalogue", value

    def load(self):
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


@pytest.fixture
def third_party(monkeypatch):
    def install(*values):
        points = [Point(v, f"theirs{i or ''}") for i, v in enumerate(values)]

        def entry_points(group):
            return points if group == "vitkit.catalogue" else []

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        clear_cache()

    yield install
    monkeypatch.undo()
    clear_cache()


def entry(**fields):
    return {"title": "T", "kind": "transform", "summary": "does it", **fields}


def test_a_third_party_dict_becomes_methods(third_party):
    third_party({"halver": entry(provides=["collections:OrderedDict", "collections:defaultdict"], id="2601.00001")})
    found = load()["halver"]
    assert found.source.startswith("entry point 'theirs'")
    # the first takes the module's stem, the second its own attribute
    assert methods()["collections"].entry is found
    assert methods()["defaultdict"].kind == "transform"
    import collections

    assert resolve("collections") is collections.OrderedDict
    assert resolve("halver") is collections.OrderedDict
    assert [m.name for m in find("arXiv:2601.00001v4")[1]] == ["collections", "defaultdict"]


def test_a_third_party_may_give_a_path(third_party, tmp_path):
    path = tmp_path / "theirs.toml"
    path.write_text('[halver]\ntitle = "T"\nkind = "part"\nslot = "mlp"\nsummary = "s"\nprovides = ["json:loads"]\n')
    third_party(path)
    assert methods()["json"].slot == "mlp"
    third_party(str(path))
    assert load()["halver"].slot == "mlp"


def test_two_entries_of_one_name_are_an_error_naming_both(third_party):
    third_party({"gptaq": entry()})
    with pytest.raises(BadInput, match=r"'gptaq': vitkit and entry point 'theirs'"):
        load()
    third_party({"halver": entry()}, {"halver": entry()})
    with pytest.raises(BadInput, match=r"theirs'.*theirs1'"):
        load()


def test_two_methods_of_one_name_are_an_error_naming_both(third_party):
    third_party({"a": entry(provides=["json:loads"]), "b": entry(provides=["other.json:loads"])})
    with pytest.raises(BadInput, match=r"'json': json:loads .* other\.json:loads"):
        methods()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": entry(knid="part")}, "Did you mean 'kind'"),
        ({"x": entry(kind="prat")}, "Did you mean 'part'"),
        ({"x": entry(provides="json:loads")}, "provides of .* must be a list of strings"),
        ({"x": entry(provides=["json.loads"])}, "'json.loads'; the form is"),
        ({"x": entry(title=3)}, "title of .* must be a string"),
        ({"x": {"title": "T"}}, "lacks kind, summary"),
        ({"x": 3}, "must be a table"),
        (3, "must be a dict or a path; it is a int"),
        ("/nowhere/theirs.toml", "cannot be read"),
        (RuntimeError("boom"), "theirs.* could not be loaded: RuntimeError: boom"),
    ],
)
def test_a_bad_third_party_catalogue_is_named(third_party, value, message):
    third_party(value)
    with pytest.raises(VitkitError, match=message) as caught:
        load()
    assert "theirs" in str(caught.value)


def test_a_broken_toml_names_the_file(third_party, tmp_path):
    path = tmp_path / "theirs.toml"
    path.write_text("[halver\n")
    third_party(path)
    with pytest.raises(BadInput, match=r"theirs\.toml is not valid TOML"):
        load()


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownName, match="Did you mean 'gptaq'"):
        find("gptak")
    with pytest.raises(UnknownName, match=r"No paper is called '2504.99999'"):
        find("2504.99999")


def test_find_takes_arxiv_ids_with_and_without_version():
    assert find("2504.02692")[0] is find("2504.02692v2")[0] is find("arXiv:2504.02692")[0] is load()["gptaq"]


def test_a_paper_without_code_says_so(third_party):
    third_party({"someday": entry(title="Some Day")})
    with pytest.raises(VitkitError, match=r"'someday' is in the catalogue \(Some Day\), but no code"):
        resolve("someday")


def test_wrong_provides_say_what_is_wrong(third_party):
    third_party({"a": entry(provides=["json:laods"]), "b": entry(provides=["no_such_package.tool:f"])})
    with pytest.raises(VitkitError, match="json has no 'laods'"):
        resolve("json")
    with pytest.raises(VitkitError, match=r"tool .* could not be imported: No module named 'no_such_package'"):
        resolve("tool")


@pytest.mark.parametrize(
    ("module", "kind", "slot"),
    [
        ("vitkit.models.parts.tokenizers.a", "part", "tokenizer"),
        ("vitkit.models.parts.positions.a", "part", "position"),
        ("vitkit.models.parts.mixers.a", "part", "mixer"),
        ("vitkit.models.parts.normalizers.a", "part", "normalizer"),
        ("vitkit.models.parts.mlps.a", "part", "mlp"),
        ("vitkit.models.parts.norms.a", "part", "norm"),
        ("vitkit.models.parts.blocks.a", "part", "block"),
        ("vitkit.models.parts.readouts.a", "part", "readout"),
        ("vitkit.models.backbones.a", "backbone", ""),
        ("vitkit.pretrain.a", "objective", ""),
        ("vitkit.compress.a", "transform", ""),
        ("vitkit.adapt.a", "transform", ""),
        ("vitkit.explain.a", "probe", ""),
        ("vitkit.stress.a", "probe", ""),
        ("vitkit.federate.a", "strategy", ""),
        ("vitkit.train.optimizers.a", "optimizer", ""),
    ],
)
def test_our_rooms_say_the_kind(third_party, module, kind, slot):
    third_party({"zz": entry(kind="recipe", provides=[f"{module}:A"])})
    assert (methods()["a"].kind, methods()["a"].slot) == (kind, slot)


@pytest.mark.parametrize(
    ("attribute", "name"),
    [("DCTAttention", "dct-attention"), ("dct_init", "dct-init"), ("Hybrid", "hybrid"), ("KAN2d", "kan2d")],
)
def test_kebab(attribute, name):
    assert reader._kebab(attribute) == name


def test_reading_imports_no_torch_and_no_method():
    code = (
        "import sys, vitkit.catalogue as c; c.load(); c.methods(); "
        "bad = [m for m in sys.modules if m in ('torch', 'timm', 'numpy') or m.startswith('vitkit.models')]; "
        "sys.exit(', '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

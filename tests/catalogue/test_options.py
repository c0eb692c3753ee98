"""Options are read from what a method really accepts."""

from __future__ import annotations

from vitkit.catalogue.options import options, required


class Part:
    """A part.

    Args:
        tau: temperature; below 0.01
            it is one-hot.
        scale, shift: of the output.
    """

    def __init__(self, dim: int, num_heads: int = 8, tau: float = 0.1, scale: float = 1.0, shift: float = 0.0) -> None:
        del dim, num_heads, tau, scale, shift

    @classmethod
    def from_standard(cls, old, spec, *, warm: bool = True, **options):
        return cls(spec.dim, **options)


def transform(model, images=None, w_bits: int = 4, *, budget: float | None, callback=len, _private=0):
    """Args in another order are fine.

    Args:
        budget: share of
            the bytes.

    Returns: nothing.
    """


def test_a_part_shows_from_standard_and_constructor_options():
    rows = {o.name: o for o in options(Part)}
    assert list(rows) == ["warm", "tau", "scale", "shift"]
    assert rows["tau"].meaning == "temperature; below 0.01 it is one-hot."
    assert rows["scale"].meaning == rows["shift"].meaning == "of the output."
    assert (rows["warm"].type, rows["warm"].default) == ("bool", "True")


def test_a_function_shows_what_the_user_sets():
    rows = options(transform)
    assert [(o.name, o.type, o.default) for o in rows] == [
        ("w_bits", "int", "4"),
        ("budget", "float | None", "required"),
        ("callback", "", "len"),
    ]
    assert rows[1].meaning == "share of the bytes."


def test_a_class_without_from_standard_shows_its_constructor():
    class Objective:
        def __init__(self, model, mask_ratio: float = 0.75):
            """Hides patches.

            Args:
                mask_ratio: share of hidden patches.
            """

    assert [(o.name, o.meaning) for o in options(Objective)] == [("mask_ratio", "share of hidden patches.")]


def test_long_decimals_are_readable():
    def attack(model, images, labels, epsilon: float = 8 / 255, rate: float = 1 / 7, plain: float = 0.25):
        pass

    assert [o.default for o in options(attack)] == ["8/255", "0.142857", "0.25"]
    assert required(attack) == ["model", "images", "labels"]
    assert required(transform) == ["model", "images", "budget=…"]


def test_warm_is_explained_even_if_the_docstring_does_not():
    assert options(Part)[0].meaning.startswith("start from what fits")


def test_a_networks_options_are_those_of_its_class():
    from vitkit.catalogue import methods
    from vitkit.catalogue.options import network_of

    found = methods()["hgvt"].load()
    rows = {o.name: o for o in options(found)}
    assert network_of(found).__name__ == "HgVT"
    assert rows["edges"].default == "32" and rows["edges"].meaning and "depth" in rows
    # what a study gives, and what only timm explains
    assert not {"img_size", "num_classes", "pretrained", "qk_norm"} & set(rows)
    for method in methods().values():
        if method.kind == "backbone" and method.entry.source == "vitkit":
            assert options(method.load()), method.name

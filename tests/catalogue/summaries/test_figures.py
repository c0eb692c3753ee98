"""The check that a summary's figures are the abstract's: spellings, names, the mark, and two properties."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitkit.catalogue.digests import read_file
from vitkit.catalogue.summaries.figures import check, mark, marked
from vitkit.catalogue.summaries.sentences import sentences

SAME = """
82.4% = 82.4 %            82.4% = 82.4\\%          82.4 % = $82.4\\%$        82.4 percent = 82.40%
1,000 = 1000              1000 = 1{,}000           1000 = 1\\,000           1000 = 1\u202f000
0.5 = .5                  2x = 2×                  2× = 2 times             2× = $2\\times$
2× = 2-fold               two-fold = 2x            twice = 2×               2x = by a factor of about two
×4 = 4×                   x4 = ×4                  doubles = 2×             threefold = 3x
10k = 10,000              10,000 = 10K             7B = 7 billion           86M = 86 M
three million = 3M        300 = three hundred      a thousand = 1,000       twenty-five = 25
$94.2\\%$ = 94.2%         0.001 = $10^{-3}$        1e-3 = 10⁻³              200,000 = $2 \\times 10^{5}$
two stages = 2-stage      4-bit = four bits        5 ms = 5 milliseconds    30 FPS = 30 frames per second
4.5 GFLOPs = 4.5G FLOPs   360° = $360^\\circ$      12.5 = 12.5%             94% = ٩٤%
10% = 10–20%              10% = 10 to 20 percent   10% = 5, 10 and 20%      10k = 10-20k
4x = 2x-4x                80.1% = 80.1/82.3%       94.3 = $94.3\\pm0.2$     −3.2 = 3.2
16x16 = 16 × 16           1/4 = $\\frac{1}{4}$     10 ms = sub-10 ms        1.0.31 = v 1.0.31
ViT-B/16 = a ViT-B/16-based  ResNet50 = ResNet-50.    ResNet 50 = ResNet-50    Swin-V2 = SwinV2
DINO v2 = DINOv2          CIFAR-100 = CIFAR-10/100  R² = $R^2$               Top-1 = top 1
A100s = A100              GPT 4o = GPT-4o          8 A100s = 8xA100         ImageNet-1k = ImageNet1K
one = no figure           zero-shot = no figure    thousands = no figure    both halves = no figure
"""
OTHER = """
82% = 82.4%               82.40 = 82.41            12.5% = 12.5             2× = two datasets
10 = 10k                  10k = 10 images          5 s = 5 ms               1000 ms = 1 s
4.5 GFLOPs = 4.5 MFLOPs   16×16 = 16 heads         1/4 = 1 of 4             two = none
doubles = better          50 images = ResNet-50    ViT-B/32 = ViT-B/16      DINOv3 = DINOv2
GPT-4 = GPT-4o            top-5 = top-1            ResNet-101 = ResNet-18/50  ImageNet-22K = ImageNet-1K
10 000 = 10,000 images    0.3% = 3%                1e-4 = 10^{-3}           seven = 6
"""


def pairs(block):
    cells = [cell for line in block.strip().splitlines() for cell in line.split("  ") if cell.strip()]
    return [tuple(part.strip() for part in cell.split(" = ")) for cell in cells]


@pytest.mark.parametrize(("said", "written"), pairs(SAME))
def test_spellings_of_the_same(said, written):
    assert check(f"It has {said} here.", f"We report {written} there.") == []


@pytest.mark.parametrize(("said", "written"), pairs(OTHER))
def test_what_is_not_the_same(said, written):
    assert len(check(f"It has {said} here.", f"We report {written} there.")) >= 1


def test_the_title_counts_too():
    assert check("A 4-bit ViT-S/8.", "It is small.", title="4-bit ViT-S/8") == []


def test_what_is_told_and_how_it_is_marked():
    abstract = "A ViT-B/16 reaches 93.9% at 10 ms."
    summary = "A ViT-L/16 reaches 94.3 % in 10 ms, 12× faster on 1,000 images; 94.3 % again."
    assert check(summary, abstract) == ["ViT-L/16", "94.3 %", "12×", "1,000"]
    text = mark(summary, abstract)
    assert text == f"{summary} [not in the abstract: ViT-L/16, 94.3 %, 12×, 1,000]"
    assert marked(text) == check(text, abstract) == check(summary, abstract)
    assert mark(text, abstract) == text
    # a mark is the check's alone: one that a writer made up goes
    assert mark("It is good. [not in the abstract: 5]", abstract) == "It is good."
    assert mark("It has 10. [not in the abstract: 5] [not in the abstract: 6]", abstract) == "It has 10."
    assert marked("It is good.") == []


TEXT = "the model gains about more on images ResNet of fold times percent to and million x"
WORDS = st.sampled_from(TEXT.split(" "))
FIGURES = st.sampled_from(
    [
        *("82.4%", "1,000", "2x", "ViT-B/16", "DINOv2", "ResNet-50", "10k", "16×16", "$94.2\\%$", "$10^{-3}$", "two"),
        *("twenty-five", "3-fold", ".5", "10-20%", "4-bit", "5 ms", "1/4", "R²", "7B", "GPT-4o", "94.3±0.2", "x4", "5"),
        *(
            "CIFAR-10/100",
            "GFLOPs",
            "4.5G",
            "twice",
            "thousand",
            "2\u202f000",
            "v1.0.31",
            "1e-3",
            "3D",
            "1st",
            "8xA100",
        ),
        *("LLaMA-3.2-11B-Vision-Instruct-v1-INT4", "2.1 × 10^5", "ten percent", "1:10", "360°", "a factor of 3"),
    ]
)
SENTENCES = st.lists(WORDS | FIGURES, min_size=1, max_size=12).map(lambda words: " ".join(words) + ".")


@given(st.lists(SENTENCES, min_size=1, max_size=8), st.data())
def test_the_abstracts_own_sentences_are_never_marked(abstract, data):
    taken = data.draw(st.lists(st.sampled_from(abstract), max_size=6))
    assert check(" ".join(taken), " ".join(abstract)) == []


@given(
    st.lists(SENTENCES, min_size=1, max_size=4),
    st.sampled_from(
        ["37", "37.46%", "37x", "37,123", "37k", "3.7", "thirty-seven", "ResNet-37", "ViT-X/37", "DINOv37"]
    ),
    st.data(),
)
def test_a_figure_that_is_not_there_is_always_marked(abstract, figure, data):
    words = " ".join(abstract).split(" ")
    place = data.draw(st.integers(0, len(words)))
    summary = " ".join([*words[:place], figure, *words[place:]])
    found = check(summary, " ".join(abstract))
    assert any(figure in each for each in found)
    assert mark(mark(summary, " ".join(abstract)), " ".join(abstract)) == mark(summary, " ".join(abstract))


@given(st.text(max_size=80), st.text(max_size=80))
def test_any_text(summary, abstract):
    check(summary, abstract)
    assert check(abstract, abstract) == []
    once = mark(summary, abstract)
    assert mark(once, abstract) == once


def test_hostile_lengths():
    pieces = [
        "1,",
        "1/",
        "1e9999 ",
        "a1",
        "a-",
        "-",
        " ",
        "one hundred ",
        "1",
        "1 x ",
        "2.",
        "\\frac{",
        "[not in the abstract: 1]",
    ]
    for piece in pieces:
        text = piece * (4_000 // len(piece))
        assert check(text, text) == []


def test_real_abstracts(shared_data):
    path = shared_data.parent / "digests" / "vision-transformers.md"
    if not path.is_file():
        pytest.skip("the digest is not here")
    chance = random.Random(0)
    for row in read_file(path).rows[::9]:
        assert check(row.abstract, row.abstract) == []
        taken = [sentence for sentence in sentences(row.abstract) if chance.random() < 0.5]
        assert check(" ".join(taken), row.abstract) == []
        words = row.abstract.split(" ")
        words.insert(chance.randrange(len(words)), "7654.3")
        assert [figure[:6] for figure in check(" ".join(words), row.abstract)] == ["7654.3"]

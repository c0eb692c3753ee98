"""The report: complete, self-contained, escaped, small, quick, and right when things are missing."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vitkit.study import charts, statistics
from vitkit.study.report import render, write_report
from vitkit.study.results import (
    Cost,
    Curves,
    DataReport,
    Explanation,
    Faithfulness,
    Gallery,
    GalleryImage,
    Interval,
    Paper,
    RecipeResult,
    RobustnessPoint,
    StudyResult,
    TrainPoint,
)
from vitkit.study.verdict import verdict

RECIPES = {
    # name: (skill, latency, megabytes, title)
    "vit": (3.0, 4.1, 1.35, "ViT-pico, patch 2"),
    "sinkhorn": (3.12, 5.9, 1.35, "Doubly stochastic attention"),
    "dct-attention": (3.3, 3.4, 1.1, "Attention in the cosine basis"),
    "hyb-kan": (2.7, 9.6, 2.2, "Hybrid KAN feed-forward"),
    "token-graying": (3.05, 4.3, 1.35, "Token graying"),
    "zsharp": (3.6, 4.1, 1.35, "ViT trained with ZSharp"),
    "tome": (2.9, 2.6, 1.35, "Token merging, r = 4"),
    "gptaq-w4": (2.95, 4.0, 0.24, "GPTAQ, 4-bit weights"),
    "resnet18": (2.2, 7.7, 44.8, "timm ResNet-18"),
    "mae": (3.25, 4.1, 1.35, "Masked autoencoding, then fine-tuned"),
}
CLASSES = ["0 zero", "1", "2", "3", "4", "5", "6", "<b>seven</b>", "8", "9 & up"]


def picture(seed: int, size: int = 32) -> str:
    rng = np.random.default_rng(seed)
    grid = np.linspace(-2, 2, size)
    x, y = rng.uniform(-1, 1, 2)
    blob = np.exp(-((grid[:, None] - y) ** 2 + (grid[None] - x) ** 2) * 2)
    rgb = np.stack([blob, blob**2, 1 - blob], -1) * 255
    stream = io.BytesIO()
    Image.fromarray(rgb.astype(np.uint8)).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def study(
    num_recipes: int = 10, num_test: int = 360, seeds: int = 2, image_size: int = 32, failed: bool = True
) -> StudyResult:
    """A study as it could have come out, from simulated predictions that go through the real statistics."""
    rng = np.random.default_rng(0)
    k = len(CLASSES)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, num_test - k)])
    shared = rng.normal(size=(1, num_test, k))
    names = list(RECIPES)[:num_recipes]
    probs = {}
    for name in names:
        logits = 0.8 * shared + 0.6 * rng.normal(size=(seeds, num_test, k))
        logits[:, np.arange(num_test), labels] += RECIPES[name][0] - 0.4
        p = np.exp(1.5 * logits)
        probs[name] = p / p.sum(2, keepdims=True)
    right = {n: probs[n].argmax(2) == labels for n in names}
    versus = statistics.correct_family({n: statistics.compare(right[n], right["vit"]) for n in names if n != "vit"})
    shown = range(8)
    recipes, explanations = [], []
    for name in names:
        skill, latency, megabytes, title = RECIPES[name]
        curve, _ = statistics.rejection(probs[name].max(2), right[name])
        train = [
            TrainPoint(
                epoch=e,
                seed=s,
                loss=2.3 * np.exp(-e * skill / 25) + 0.05 + 0.02 * rng.random(),
                val_loss=2.3 * np.exp(-e * skill / 30) + 0.2 + 0.03 * rng.random(),
                val_accuracy=0.95 - 0.85 * np.exp(-e * skill / 14) + 0.01 * rng.random(),
                lr=1e-3,
            )
            for s in range(seeds)
            for e in range(1, 31)
        ]
        robust = [
            RobustnessPoint(attack=a, epsilon_255=e, accuracy=0.95 * np.exp(-e * f / skill))
            for a, f in (("FGSM", 0.4), ("PGD-10", 0.6))
            for e in (0, 1, 2, 4, 8)
        ]
        measures = statistics.measure_classify(probs[name], labels, resamples=300)
        measures["robust_accuracy/PGD-10"] = Interval(value=robust[-2].accuracy, low=0.3, high=0.5)
        recipes.append(
            RecipeResult(
                name=name,
                title=title,
                baseline=name == "vit",
                parts={"mixer": name} if name in ("sinkhorn", "dct-attention") else {},
                steps=["vit_pico, patch 2, 6 blocks of 96 channels", "trained 30 epochs with AdamW"],
                papers=[Paper(name=name, title=f"A paper about {title} & more", id="2504.02692")],
                measures=measures,
                versus_baseline=versus.get(name),
                costs={
                    "params": Cost(value=megabytes * 250_000, how="counted"),
                    "flops": Cost(value=latency * 5.1e6, how="counted"),
                    "size_bytes": Cost(value=megabytes * 1e6, how="counted", ratio=megabytes / 1.35),
                    "latency_ms_b1": Cost(
                        value=latency,
                        p95=latency * 1.3,
                        ratio=latency / 4.1,
                        how="measured",
                        engine="torch eager fp32",
                    ),
                    "latency_ms_b32": Cost(
                        value=latency * 9,
                        p95=latency * 10,
                        ratio=latency / 4.1,
                        how="measured",
                        engine="torch eager fp32",
                    ),
                    "peak_memory_bytes": Cost(value=latency * 3e7, how="measured"),
                    "train_seconds": Cost(value=latency * 11, how="measured"),
                },
                curves=Curves(
                    train=train,
                    reliability=statistics.reliability(probs[name], labels),
                    confusion=statistics.confusion(probs[name], labels),
                    rejection=curve,
                    robustness=robust,
                ),
                faithfulness=[
                    Faithfulness(explainer=e, measure=m, value=v * skill / 3, low=v * 0.9, high=v * 1.2)
                    for e, f in (("gmar", 1.0), ("random", 0.6))
                    for m, v in (("deletion", 0.31 * f), ("insertion", 0.62 * f))
                ],
                notes=["Starts from the weights of vit."] if name == "tome" else [],
                model_dir=f"models/{name}",
            )
        )
        answers = probs[name][0].argmax(1)
        explanations.append(
            Explanation(
                recipe=name,
                explainer="gmar",
                predicted=[CLASSES[answers[i]] for i in shown],
                probability=[float(probs[name][0, i].max()) for i in shown],
                heatmaps=[picture(100 * len(recipes) + i, image_size) for i in shown],
            )
        )
    if failed:
        recipes.append(
            RecipeResult(
                name="loope",
                status="failed",
                error="The loss became NaN in step 120; try a lower learning rate.",
            )
        )
    counts = {s: {c: int(n) for c in CLASSES} for s, n in (("train", 110), ("val", 33), ("test", num_test / k))}
    result = StudyResult(
        name="digits",
        data=DataReport(
            name="digits",
            fingerprint="sha256:4be1d2c0",
            classes=CLASSES,
            counts=counts,
            skipped=[{"path": "img/broken.jpg", "reason": "truncated: 120 of 3,400 bytes"}],
            leakage=[{"first": "train/0/a.png", "second": "test/0/b.png", "splits": ["train", "test"]}],
            warnings=["Class 3 has only 9 images in the test split."],
        ),
        settings={
            "command": "vitkit study digits --recipes " + ",".join(names),
            "protocol": {"epochs": 30, "seeds": seeds, "split": "70/15/15"},
            "optimizer": {"name": "adamw", "lr": 1e-3},
        },
        versions={"vitkit": "0.1.0", "torch": "2.15.0", "timm": "1.0.31", "python": "3.11.9"},
        machine={"cpu": "2 cores", "memory_bytes": 8e9, "gpu": None},
        recipes=recipes,
        gallery=Gallery(
            images=[GalleryImage(key=f"test/{i}", label=CLASSES[labels[i]], png=picture(i, image_size)) for i in shown],
            explanations=explanations,
        ),
    )
    return result.model_copy(update={"verdict": verdict(result)})


@pytest.fixture(scope="module")
def result() -> StudyResult:
    return study()


@pytest.fixture(scope="module")
def page(result) -> str:
    return render(result)


class Reader(HTMLParser):
    """Collects what a browser would fetch, link, run and show, and checks that tags close."""

    VOID = frozenset({"meta", "img", "link", "br", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.handlers: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._attributes(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._attributes(tag, attrs)

    def _attributes(self, tag, attrs):
        given = dict(attrs)
        if "id" in given:
            self.ids.append(given["id"])
        self.handlers += [k for k in given if k.startswith("on")]
        if tag == "a":
            self.links.append(given.get("href", ""))
        else:
            self.fetched += [v or "" for k, v in given.items() if k in ("src", "href", "xlink:href", "data")]
        if given.get("role") == "img":
            self.alts.append(given.get("aria-label", ""))
        if tag == "img":
            self.alts.append(given.get("alt", ""))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_has_every_section_on_a_full_study(page):
    reader = read(page)
    sections = (
        "leaderboard costs measures calibration rejection confusion gallery faithfulness robustness training "
        "recipes data reproduce method"
    )
    for key in sections.split():
        assert key in reader.ids, key
        assert f"#{key}" in reader.links
    assert len(reader.ids) == len(set(reader.ids))


def test_says_verdict_leaderboard_reasons_settings_versions_and_papers(result, page):
    text = " ".join(" ".join(read(page).text).split())
    for sentence in result.verdict:
        assert sentence in text
    for recipe in result.recipes:
        assert recipe.name in text
    assert "The loss became NaN in step 120" in text
    assert result.settings["command"] in text
    assert "torch" in text and "2.15.0" in text
    assert "truncated: 120 of 3,400 bytes" in text
    assert "Class 3 has only 9 images" in text
    assert "https://arxiv.org/abs/2504.02692" in page
    best = result.ranked()[0].measures["accuracy"]
    assert f"{100 * best.value:.1f} %" in text
    assert f"{100 * best.low:.1f}–{100 * best.high:.1f} %" in text


def test_fetches_nothing(page):
    reader = read(page)
    outside = [u for u in reader.fetched if not u.startswith(("data:image/", "#"))]
    assert outside == []
    assert not re.search(r"@import|url\((?!#)", page)
    assert "link" not in reader.tags
    assert all(u.startswith(("#", "https://arxiv.org/")) for u in reader.links)
    assert "default-src 'none'" in page


def test_every_picture_has_a_text_alternative_and_every_chart_a_table(page):
    reader = read(page)
    assert len(reader.alts) > 100
    assert all(reader.alts)
    assert reader.tags.count("figure") <= reader.tags.count("details")


def test_user_text_is_never_markup(result):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
    hostile = study(num_recipes=3, num_test=60)
    hostile.name = evil
    hostile.data.classes = [evil, *CLASSES[1:]]
    hostile.data.warnings = [evil]
    hostile.settings = {"command": evil, evil: evil}
    hostile.machine = {evil: evil}
    hostile.verdict = [evil, evil]
    for r in hostile.recipes:
        r.title = r.error = evil
        r.name += evil
        r.notes = r.steps = [evil]
        r.parts = {evil: evil}
    for e in hostile.gallery.explanations:
        e.recipe += evil
        e.predicted = [evil] * 8
    reader = read(render(hostile))
    assert reader.tags.count("script") == 1
    assert reader.handlers == []
    assert not any(u == "x" for u in reader.fetched)


def test_is_small(result, tmp_path):
    write_report(result, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


def test_large_gallery_pictures_are_scaled_down():
    rng = np.random.default_rng(0)
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (224, 224, 3), dtype=np.uint8)).save(stream, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    large = study(num_recipes=3, num_test=60)
    for i in large.gallery.images:
        i.png = uri
    for e in large.gallery.explanations:
        e.heatmaps = [uri] * 8
    assert 32 * len(uri) > 3_000_000
    assert len(render(large).encode()) < 3_000_000


def test_same_result_same_page(result, page):
    assert render(result) == page


def test_colours_are_the_same_in_every_chart(result):
    look = charts.looks(result)
    assert len({(s.colour, str(s.dash)) for s in look.values()}) == len(result.recipes)
    pair = charts.trade_off(result, "latency_ms_b1", look), charts.reliability(result.recipes[1], look)
    variable = charts.variable(look[result.recipes[1].name].colour)
    assert all(variable in c.svg for c in pair)
    assert "#" + look["vit"].colour.strip("#") not in pair[0].svg


def test_many_recipes_stay_apart():
    many = StudyResult(name="n", data=DataReport(name="d"), recipes=[RecipeResult(name=f"r{i}") for i in range(30)])
    assert len({(s.colour, str(s.dash)) for s in charts.looks(many).values()}) == 30


def test_charts_are_valid_xml_that_takes_the_page_colours(result):
    import xml.etree.ElementTree as ElementTree

    look = charts.looks(result)
    made = [
        charts.trade_off(result, "size_bytes", look),
        charts.confusion(result.recipes[0], CLASSES, look),
        charts.rejection(result, look),
        *charts.training(result, look),
        *charts.robustness(result, look),
    ]
    for chart in made:
        ElementTree.fromstring(chart.svg)
        assert "currentColor" in chart.svg
        assert "font-family" not in chart.svg and "DejaVu" not in chart.svg
        assert chart.rows and all(len(row) == len(chart.header) for row in chart.rows)


def test_formulas_and_foreign_scripts_in_names_are_drawn_as_text():
    counts = Curves(confusion=[[3, 1], [0, 4]])
    r = RecipeResult(name="$\\frac{a$ 名前", curves=counts)
    result = StudyResult(name="n", data=DataReport(name="d", classes=["$x_1$", "猫"]), recipes=[r])
    page = render(result)
    assert "$x_1$" in page and "猫" in page


def test_training_curves_that_are_the_same_are_drawn_once():
    points = [TrainPoint(epoch=e, loss=1 / e) for e in (1, 2, 3)]
    recipes = [RecipeResult(name=n, curves=Curves(train=points)) for n in ("vit", "tome")]
    result = StudyResult(name="n", data=DataReport(name="d"), recipes=recipes)
    (chart,) = charts.training(result, charts.looks(result))
    assert chart.header == ["Epoch", "vit"]


@pytest.mark.parametrize(
    "recipes",
    [
        [],
        [RecipeResult(name="vit", baseline=True, status="failed", error="out of memory")],
        [RecipeResult(name="vit", baseline=True)],
        [RecipeResult(name="vit", measures={"accuracy": Interval(note="no test images")})],
        [RecipeResult(name="vit", baseline=True, measures={"accuracy": Interval(value=1.0)})],
        [
            RecipeResult(name="vit", baseline=True, measures={"mae": Interval(value=1.0, low=0.9, high=1.1)}),
            RecipeResult(name="b", measures={"mae": Interval(value=0.5, low=0.4, high=0.6)}),
        ],
    ],
    ids=["empty", "all failed", "nothing measured", "undefined", "one", "regress"],
)
def test_a_thin_study_still_gives_a_page(recipes):
    page = render(StudyResult(name="thin", data=DataReport(name="d"), recipes=recipes))
    text = " ".join(read(page).text)
    assert "nan" not in re.findall(r"[a-z]+", text.lower())
    assert "None" not in text.replace("None:", "").replace("None found", "").replace("None of the", "")


def test_a_hundred_classes_give_a_readable_page():
    k = 120
    rng = np.random.default_rng(0)
    counts = (np.eye(k) * 9 + (rng.random((k, k)) < 0.01)).astype(int).tolist()
    names = [f"species number {i}" for i in range(k)]
    data = DataReport(name="d", classes=names, counts={"test": dict.fromkeys(names, 10)})
    page = render(StudyResult(name="n", data=data, recipes=[RecipeResult(name="a", curves=Curves(confusion=counts))]))
    assert "120 classes" in page
    assert len(page) < 200_000


def test_what_the_study_decided_by_itself_and_a_small_test_set_are_said():
    few = study(num_recipes=2, num_test=40)
    few.settings = {**few.settings, "notes": ["The budget cut 30 epochs to 12."]}
    for r in few.recipes[:2]:
        r.costs["train_seconds"] = Cost(value=9.0, how="measured", note="all seeds together")
    text = " ".join(" ".join(read(render(few)).text).split())
    assert text.count("The budget cut 30 epochs to 12.") == 1
    assert "The test set has only 40 images" in text
    assert text.count("all seeds together") == 1

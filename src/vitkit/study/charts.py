"""Charts of the report as small inline SVGs that follow the page's colours, fonts and width.

Drawn with matplotlib without its global state. Text and lines of the axes take the page's colour
(``currentColor``), so the same SVG is right on light, dark and printed pages. Ids are dropped or made unique
per chart, since many SVGs share one page.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vitkit.study import wording
from vitkit.study.results import RecipeResult, StudyResult
from vitkit.study.statistics import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of P. Tol's schemes, which colour-blind readers can tell apart, in an order where neighbours differ
# most, each with a lighter twin for dark pages; the baseline has a grey of its own. Past the ninth recipe
# colours repeat with another dash and marker.
_PALETTE = (
    ("#0077bb", "#4aa8e0"),
    ("#cc6677", "#e58b99"),
    ("#117733", "#4fb873"),
    ("#d98200", "#efa53a"),
    ("#aa4499", "#cf7cc2"),
    ("#2f9c8c", "#5cc7b8"),
    ("#882255", "#c96f9d"),
    ("#8a8420", "#bdb751"),
    ("#5577c2", "#8fa8e6"),
)
_BASELINE = ("#6b7076", "#a4abb3")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
_MARKERS = ("o", "s", "^", "D")

# matplotlib writes these; the page replaces them by its own colours
_INK, _FAINT = "#010203", "#040506"


@dataclass(frozen=True)
class Look:
    """How a recipe is drawn in every chart."""

    colour: str
    dash: Any
    marker: str


@dataclass(frozen=True)
class Chart:
    """A drawing with what a reader who cannot see it needs.

    Args:
        title: heading over the chart.
        svg: the drawing.
        alt: what it shows, in a sentence.
        header: column names of the data table.
        rows: the data table.
    """

    title: str
    svg: str
    alt: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def looks(result: StudyResult) -> dict[str, Look]:
    """A colour, dash and marker per recipe, the same in every chart."""
    out = {}
    # failed recipes last: they appear in no chart and must not use up a colour
    ordered = sorted(result.recipes, key=lambda r: r.status == "failed")
    others = [r.name for r in ordered if not r.baseline]
    for i, name in enumerate(others):
        cycle = i // len(_PALETTE) % len(_DASHES)
        out[name] = Look(_PALETTE[i % len(_PALETTE)][0], _DASHES[cycle], _MARKERS[cycle])
    if result.baseline is not None:
        out[result.baseline.name] = Look(_BASELINE[0], (0, (4, 2)), "D")
    return out


def variable(colour: str) -> str:
    """The page's CSS variable for a recipe's colour: ``#0077bb`` is ``var(--r0)``."""
    return f"var({_variables()[colour]})"


def css_colours(dark: bool) -> str:
    """CSS declarations of the recipes' colours for a light or a dark page."""
    return " ".join(f"{v}: {pair[dark]};" for v, pair in zip(_variables().values(), (*_PALETTE, _BASELINE)))


def _variables() -> dict[str, str]:
    names = {light: f"--r{i}" for i, (light, _) in enumerate(_PALETTE)}
    return {**names, _BASELINE[0]: "--baseline"}


# ---- drawing


@contextmanager
def _figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of ``width`` × ``height`` CSS pixels, one point being one pixel."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "vitkit",
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
        "font.size": 12,
        "axes.titlesize": 12,
        "axes.labelsize": 12,
        "xtick.labelsize": 11.5,
        "ytick.labelsize": 11.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "axes.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": _FAINT,
        "grid.linewidth": 0.6,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "text.color": _INK,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
    }
    with rc_context(style), warnings.catch_warnings():
        # a class name in a script that DejaVu lacks is still right: the browser draws the text
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield Figure(figsize=(width / 72, height / 72), layout="constrained")


def _svg(figure: Figure, key: str, tight: bool = False) -> str:
    """The figure as an SVG element that scales with the page and inherits its font and colours."""
    stream = io.StringIO()
    box: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.03} if tight else {}
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", metadata=nothing, transparent=True, **box)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    width = size[1] if size else "400"
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", text)
    # matplotlib names its font in one of two ways; without it, the page's own font is inherited
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = text.replace(_INK, "currentColor").replace(_FAINT, "var(--line)")
    for colour, name in _variables().items():
        text = text.replace(colour, f"var({name})")
    text = re.sub(
        r"<svg [^>]*?viewBox",
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true" style="max-width:{width}px" viewBox',
        text,
        count=1,
    )
    # a tenth of a pixel is enough, and halves the size of curves
    text = re.sub(r"(\d+\.\d)\d+(?=[ \"\n,)])", r"\1", text)
    return re.sub(r">\s+<", "><", text).strip()


def _direct_labels(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each label beside its point, at the first place around it that touches no other label or point."""
    axes.figure.canvas.draw_idle()
    axes.figure.draw_without_rendering()
    place = axes.transData.transform
    frame = axes.get_window_extent()
    points = [place((x, y)) for x, y, _, _ in labels]
    scale = axes.figure.dpi / 72
    taken = [(px - 5 * scale, py - 5 * scale, px + 5 * scale, py + 5 * scale) for px, py in points]
    offsets = [(8, -3.5, 0), (-8, -3.5, 1), (0, 8, 0.5), (0, -15, 0.5)]
    offsets += [(9, s * d, a) for d in (11, 19, 27, 35) for s in (1, -1) for a in (0,)]
    offsets += [(-9, s * d, 1) for d in (11, 19, 27, 35) for s in (1, -1)]
    for (px, py), (x, y, text, colour) in zip(points, labels):
        width, height = 6.8 * len(text) * scale, 12 * scale
        chosen = None
        for dx, dy, align in offsets:
            left, bottom = px + dx * scale - align * width, py + dy * scale
            box = (left, bottom, left + width, bottom + height)
            inside = box[0] >= frame.x0 and box[2] <= frame.x1 and box[1] >= frame.y0 and box[3] <= frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                chosen = (dx, dy, align, box)
                break
        if chosen is None:
            continue  # the legend and the table under the chart name it all the same
        dx, dy, align, box = chosen
        taken.append(box)
        axes.annotate(
            text,
            (x, y),
            (dx, dy),
            textcoords="offset points",
            ha={0: "left", 1: "right", 0.5: "center"}[align],
            color=colour,
            fontsize=11.5,
            annotation_clip=False,
        )


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _percent(axes: Axes, which: str = "y") -> None:
    from matplotlib.ticker import FuncFormatter

    getattr(axes, f"{which}axis").set_major_formatter(FuncFormatter(lambda v, _: f"{round(100 * v, 3):g} %"))


# ---- the charts


def trade_off(result: StudyResult, cost: str, look: Mapping[str, Look]) -> Chart | None:
    """The primary measure against a cost; the line joins the recipes that no other beats in both."""
    measure = result.primary_measure
    recipes = [r for r in result.ranked() if r.value(measure) is not None and (r.cost(cost) or 0) > 0]
    if len(recipes) < 2:
        return None
    unit, label = _unit(cost)
    xs = np.array([r.cost(cost) for r in recipes], float) / unit
    ys = np.array([r.value(measure) for r in recipes], float)
    lower = wording.lower_is_better(measure)
    front = pareto_front(np.stack([xs, ys], 1), [True, lower])
    with _figure(480, 330) as figure:
        axes = figure.subplots()
        on = sorted((x, y) for x, y, f in zip(xs, ys, front) if f)
        axes.plot(*zip(*on), color=_FAINT, linewidth=5, zorder=1, solid_joinstyle="round")
        for r, x, y in zip(recipes, xs, ys):
            style, interval = look[r.name], r.measures[measure]
            if interval.low is not None and interval.high is not None:
                axes.plot([x, x], [interval.low, interval.high], color=style.colour, linewidth=1, alpha=0.55)
            axes.plot(x, y, style.marker, color=style.colour, markersize=7, zorder=3)
        if xs.max() / xs.min() > 4:
            axes.set_xscale("log")
            _plain_log_ticks(axes.xaxis, xs)
        axes.margins(x=0.14, y=0.1)
        axes.set_xlabel(label)
        if wording.is_share(measure):
            _percent(axes)
        _direct_labels(axes, [(x, y, r.name, look[r.name].colour) for r, x, y in zip(recipes, xs, ys)])
        svg = _svg(figure, f"trade-{cost}")
    names = [r.name for r, f in zip(recipes, front) if f]
    what = wording.title(cost).lower()
    return Chart(
        title=f"{wording.title(measure)} against {what}",
        svg=svg,
        alt=f"{wording.title(measure)} of {len(recipes)} recipes against {what}. "
        f"Not beaten in both: {', '.join(names)}.",
        header=["Recipe", wording.title(measure), "Interval", wording.title(cost), "Pareto front"],
        rows=[
            [
                r.name,
                wording.shown(measure, r.value(measure)),
                wording.interval(measure, r.measures[measure]),
                wording.cost(cost, r.cost(cost)),
                "yes" if f else "no",
            ]
            for r, f in zip(recipes, front)
        ],
    )


def _unit(cost: str) -> tuple[float, str]:
    if cost.endswith("_bytes"):
        return 1e6, f"{wording.title(cost)} (MB)"
    if "_ms" in cost:
        return 1.0, f"{wording.title(cost)} (ms, median)"
    if cost == "params":
        return 1e6, "Parameters (million)"
    if cost == "flops":
        return 1e9, "FLOPs per image (billion)"
    return 1.0, wording.title(cost)


def _plain_log_ticks(axis: Any, values: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    least, most = float(np.min(values)), float(np.max(values))
    low, high = math.floor(math.log10(least)) - 1, math.ceil(math.log10(most)) + 1
    steps = (1,) if most / least > 300 else (1, 2, 5)
    axis.set_major_locator(FixedLocator([m * 10.0**e for e in range(low, high + 1) for m in steps]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def reliability(recipe: RecipeResult, look: Mapping[str, Look]) -> Chart | None:
    """Accuracy against confidence; on the diagonal a model means what it says."""
    bins = [b for b in recipe.curves.reliability or [] if b.confidence is not None and b.accuracy is not None]
    if not bins:
        return None
    colour = look[recipe.name].colour
    total = sum(b.count for b in bins)
    with _figure(220, 220) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=1.5)
        x, y = [b.confidence or 0.0 for b in bins], [b.accuracy or 0.0 for b in bins]
        axes.plot(x, y, color=colour, linewidth=1.2, alpha=0.5)
        axes.scatter(x, y, s=[14 + 110 * b.count / total for b in bins], color=colour, linewidths=0)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axes.set_xlabel("confidence")
        axes.set_ylabel("accuracy")
        _percent(axes, "x")
        _percent(axes, "y")
        svg = _svg(figure, f"rel-{_key(recipe.name)}")
    ece = recipe.value("ece")
    mean_gap = sum(b.count * ((b.confidence or 0) - (b.accuracy or 0)) for b in bins) / total
    tendency = (
        "overconfident" if mean_gap > 0.01 else "underconfident" if mean_gap < -0.01 else "well calibrated on average"
    )
    return Chart(
        title=recipe.name,
        svg=svg,
        alt=f"Reliability of {recipe.name}: {tendency}"
        + (f", calibration error {wording.number(ece)}." if ece is not None else "."),
        header=["Confidence", "Accuracy", "Images"],
        rows=[
            [wording.shown("accuracy", b.confidence), wording.shown("accuracy", b.accuracy), f"{b.count:,}"]
            for b in bins
        ],
    )


def confusion(recipe: RecipeResult, classes: Sequence[str], look: Mapping[str, Look]) -> Chart | None:
    """Which classes are taken for which: rows the true class, shades the share of it."""
    if not recipe.curves.confusion:
        return None
    counts = np.array(recipe.curves.confusion, dtype=float)
    k = len(counts)
    names = [*classes, *map(str, range(len(classes), k))][:k]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with _figure(300, 300) as figure:
        from matplotlib.colors import LinearSegmentedColormap

        # a square root opens the low end, where the mistakes are
        ramp = LinearSegmentedColormap.from_list("share", ["#f4f5f7", "#9fb9d0", "#1f4e79"])
        axes = figure.subplots()
        axes.grid(False)
        axes.imshow(np.sqrt(shares), cmap=ramp, vmin=0, vmax=1, interpolation="none")
        for spine in axes.spines.values():
            spine.set_visible(False)
        if k <= 25:
            short = [n if len(n) <= 12 else n[:11] + "…" for n in names]
            size = 11 if k <= 12 else 7
            axes.set_xticks(range(k), short, rotation=0 if max(map(len, short)) < 3 else 90, fontsize=size)
            axes.set_yticks(range(k), short, fontsize=size)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        axes.tick_params(length=0)
        if k <= 12:
            for i, j in zip(*np.nonzero(counts)):
                axes.text(
                    j,
                    i,
                    _short(counts[i, j]),
                    ha="center",
                    va="center_baseline",
                    fontsize=9.5 if k > 6 else 11,
                    color="#ffffff" if math.sqrt(shares[i, j]) > 0.6 else "#1b2733",
                )
        svg = _svg(figure, f"conf-{_key(recipe.name)}", tight=True)
    off = counts * (1 - np.eye(k))
    order = np.argsort(-off, axis=None, kind="stable")[:12]
    worst = [(int(i // k), int(i % k), off.flat[i], shares.flat[i]) for i in order if off.flat[i] > 0]
    alt = f"Confusion matrix of {recipe.name} over {k} classes. "
    if worst:
        i, j, c, _ = worst[0]
        alt += f"Most frequent mistake: {names[i]} taken for {names[j]}, {c:.0f} times."
    else:
        alt += "No mistakes."
    return Chart(
        title=recipe.name,
        svg=svg,
        alt=alt,
        header=["True", "Predicted", "Times", "Share of the class"],
        rows=[[names[i], names[j], f"{c:,.0f}", wording.shown("accuracy", s)] for i, j, c, s in worst],
    )


def _short(count: float) -> str:
    return f"{count:.0f}" if count < 1000 else f"{count / 1000:.1f}k"


def training(result: StudyResult, look: Mapping[str, Look]) -> list[Chart]:
    """Loss and validation curves over epochs, mean over seeds with their range."""
    wanted = (
        ("loss", "Training loss", "loss"),
        ("val_loss", "Validation loss", "val_loss"),
        ("val_accuracy", "Validation accuracy", "accuracy"),
        ("val_measure", f"Validation {wording.title(result.primary_measure)}", result.primary_measure),
    )
    charts = []
    for field, heading, measure in wanted:
        curves: dict[str, list[tuple[float, list[float]]]] = {}
        for r in result.recipes:
            by_epoch: dict[float, list[float]] = {}
            for point in r.curves.train or []:
                if (value := getattr(point, field)) is not None:
                    by_epoch.setdefault(point.epoch, []).append(value)
            curve = sorted(by_epoch.items())
            # a transform trains nothing: its recipe carries the curve of the model it starts from
            if curve and curve not in curves.values():
                curves[r.name] = curve
        if curves:
            charts.append(_lines(f"train-{field}", heading, "epoch", measure, curves, look))
    return charts


def _lines(
    key: str,
    heading: str,
    x_label: str,
    measure: str,
    curves: Mapping[str, Sequence[tuple[float, list[float]]]],
    look: Mapping[str, Look],
    x_percent: bool = False,
    marker: bool = False,
) -> Chart:
    """Curves of several recipes in one chart; each point is the mean of its values, the band their range."""
    with _figure(480, 300) as figure:
        axes = figure.subplots()
        for name, points in curves.items():
            style = look[name]
            x = [p for p, _ in points]
            y = [float(np.mean(v)) for _, v in points]
            if any(len(v) > 1 for _, v in points):
                low, high = [min(v) for _, v in points], [max(v) for _, v in points]
                axes.fill_between(x, low, high, color=style.colour, alpha=0.12, linewidth=0)
            axes.plot(
                x,
                y,
                color=style.colour,
                linestyle=style.dash,
                marker=style.marker if marker or len(x) == 1 else None,
                markersize=4,
            )
        if wording.is_share(measure):
            _percent(axes)
        if x_percent:
            _percent(axes, "x")
        values = [float(np.mean(v)) for points in curves.values() for _, v in points]
        if "loss" in measure and min(values) > 0 and max(values) / min(values) > 10:
            axes.set_yscale("log")
            _plain_log_ticks(axes.yaxis, values)
        axes.margins(x=0.02)
        axes.set_xlabel(x_label)
        svg = _svg(figure, key)
    xs = sorted({p for points in curves.values() for p, _ in points})
    shown_at = [xs[i] for i in np.unique(np.linspace(0, len(xs) - 1, min(len(xs), 10)).round().astype(int))]
    table = []
    for x in shown_at:
        row = [wording.shown("accuracy", x) if x_percent else f"{x:g}"]
        for points in curves.values():
            value = next((float(np.mean(v)) for p, v in points if p == x), None)
            row.append(wording.shown(measure, value))
        table.append(row)
    ends = [f"{n} {wording.shown(measure, float(np.mean(points[-1][1])))}" for n, points in curves.items()]
    return Chart(
        title=heading,
        svg=svg,
        alt=f"{heading} over {x_label}. At the end: {', '.join(ends)}.",
        header=[x_label.capitalize(), *curves],
        rows=table,
    )


def robustness(result: StudyResult, look: Mapping[str, Look]) -> list[Chart]:
    """Accuracy under each attack, over its strength."""
    attacks: dict[str, dict[str, list[tuple[float, list[float]]]]] = {}
    for r in result.recipes:
        for point in r.curves.robustness or []:
            if point.accuracy is not None and point.epsilon_255 is not None:
                curve = attacks.setdefault(point.attack, {}).setdefault(r.name, [])
                curve.append((point.epsilon_255, [point.accuracy]))
    return [
        _lines(
            f"rob-{_key(attack)}",
            f"Accuracy under {attack}",
            "strength ε (pixel values of 255)",
            "accuracy",
            {name: sorted(points) for name, points in curves.items()},
            look,
            marker=True,
        )
        for attack, curves in attacks.items()
    ]


def rejection(result: StudyResult, look: Mapping[str, Look]) -> Chart | None:
    """Accuracy when the least confident images are left to a person."""
    curves = {
        r.name: [(p.coverage, [p.selective_accuracy]) for p in r.curves.rejection if p.selective_accuracy is not None]
        for r in result.recipes
        if r.curves.rejection and r.same_model_as is None
    }
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return None
    return _lines(
        "rejection",
        "Accuracy on the most confident share of images",
        "share of images the model answers",
        "accuracy",
        curves,
        look,
        x_percent=True,
    )


def _key(name: str) -> str:
    """A name as part of an XML id; the hex code keeps different names apart."""
    return "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):x}" for c in name)

"""One part changed at a time, on several data sets: the page ``docs/parts-study`` out of finished studies.

    vitkit study recipes/parts_study.yaml --out fashion     # with data.path changed
    vitkit study recipes/parts_study.yaml --out cifar
    python benchmarks/parts_study.py Fashion-MNIST=fashion CIFAR-10=cifar [--control Fashion-MNIST=again …]

Several studies of one data set (CIFAR-10=first,second) are read as one, with Holm's correction over all their parts.
Writes ``index.md``, ``parts.svg``, and each study's report, table and JSON, which may be given in place of its folder.
A control is a study of the baseline alone with other seeds: how far it lies from itself is what differences mean
nothing below.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from vitkit.catalogue import methods
from vitkit.errors import BadInput
from vitkit.files import write_text
from vitkit.study.statistics import holm

Recipe = dict[str, Any]
#: slot → its heading, in the order of the data through a ViT
SLOTS = {
    "tokenizer": "Tokenizers",
    "position": "Positions",
    "normalizer": "From scores to weights",
    "mixer": "Mixers in place of attention",
    "mlp": "MLPs",
    "block": "Whole blocks",
    "readout": "Read-outs and heads",
}
#: what a reader who wonders about the far ends of the table should know
REASONS = """\
## Likely reasons

- What gains most has convolutions, recurrences that forget, or weights tied to places (`iia`, `ninformer`, `s4d`,
  `decomposed-conv`, `dcformer-block`, `ss2d`, `wavelet-ssm`, `global-filter`): what is near need not be found out, for
  which 700 steps are few. Rotary positions and LOOPE's order may gain for the same reason.
- `sparse-pixels` makes a token of each of the few pixels it picks, and first has to learn which.
- `neurn` keeps local contrast and drops intensity and colour, for the sake of images from elsewhere, which are not in
  this comparison: it costs little on Fashion-MNIST and much on CIFAR-10.
- `charm` and `row-stripes` work with fewer tokens, as their FLOPs show.
- `additive-attention` and `hypergraph` put cheaper summaries in place of all-to-all attention; the matrices
  of `qr` are doubly stochastic by the square of an orthogonal one, and their gradients are clipped.
- `conv-share-mlp` writes a linear layer as a convolution: in exact arithmetic it is the plain ViT.
- `stga` attends across times; on single images it is plain attention.
"""
GAIN, LOSS, OPEN = "#0b6e4f", "#b23a48", "#8a8a8a"
_MARKERS = "os^Dv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--control", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, default=Path("docs/parts-study"))
    options = parser.parse_args()
    studies = {
        name: [Path(f) for f in folders.split(",")] for name, folders in (s.split("=", 1) for s in options.studies)
    }
    found = {name: joined([_read(folder) for folder in folders]) for name, folders in studies.items()}
    controls = {name: _read(Path(folder)) for name, folder in (s.split("=", 1) for s in options.control)}
    options.out.mkdir(parents=True, exist_ok=True)
    draw(found, options.out / "parts.svg")
    for name, folders in studies.items():
        for folder, file in zip(folders, _files(name, folders)):
            if folder.is_dir():
                results = _read(folder)
                where = results["settings"]["study"]["data"]["path"]
                written = {
                    "html": (folder / "report.html").read_text(encoding="utf-8"),
                    "csv": (folder / "results.csv").read_text(encoding="utf-8"),
                    "json": json.dumps(results, ensure_ascii=False) + "\n",
                }
                for ending, text in written.items():
                    # the names of the data and of the folder, not where they lie on one machine
                    text = text.replace(where, Path(where).name).replace(f"{folder.resolve().parent}/", "")
                    write_text(options.out / f"{file}.{ending}", text)
    write_text(options.out / "index.md", page(found, controls, studies))


def _read(study: Path) -> dict[str, Any]:
    """What a study's folder, or a file written from one, says of its recipes."""
    path = study / "results.json" if study.is_dir() else study
    results = json.loads(path.read_text(encoding="utf-8"))
    for recipe in results["recipes"]:
        # most of the file, and not shown
        recipe.pop("curves", None)
    return results


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Studies of the same data, settings and baseline as one."""
    first = parts[0]
    for other in parts[1:]:
        for key in ("data", "protocol", "base"):
            if _setting(other, key) != _setting(first, key):
                raise BadInput(f"{first['name']} and {other['name']} differ in {key} and cannot be one study.")
        known = {r["name"] for r in first["recipes"]}
        first["recipes"] += [r for r in other["recipes"] if r["name"] not in known]
    rows = [r["versus_baseline"] for r in first["recipes"] if r["versus_baseline"]]
    for row, p in zip(rows, holm([row["p"] for row in rows])):
        row["p_holm"], row["significant"] = p, p is not None and p < 0.05
    return first


def _setting(results: dict[str, Any], key: str) -> Any:
    found = results["settings"]["study"][key]
    # a published study names its data without their folder
    return {**found, "path": Path(found["path"]).name} if key == "data" else found


def page(found: dict[str, dict[str, Any]], controls: dict[str, dict[str, Any]], studies: dict[str, list[Path]]) -> str:
    """The Markdown of the page; ``studies``: where they were read from."""
    out = ["# Parts side by side", "", *_lead(found), "", "![](parts.svg)", "", *_reading(found, controls), ""]
    head = ["part", *(f"{name}, points" for name in found), "parameters", "FLOPs", "1 image", "32 images"]
    for slot, names in _by_slot(found).items():
        out += [f"## {SLOTS[slot]}", "", _line(head), _line(["---", *["--:"] * (len(head) - 1)])]
        out += [_line(_cells(name, found)) for name in names] + [""]
    return "\n".join([*out, REASONS, *_whole(found, studies), ""])


def _lead(found: dict[str, dict[str, Any]]) -> list[str]:
    first = next(iter(found.values()))
    protocol, plain = first["settings"]["study"]["protocol"], _plain(first)
    count = sum(len(names) for names in _by_slot(found).values())
    data = " and ".join(_facts(name, results) for name, results in found.items())
    costs = plain["costs"]
    base = first["settings"]["study"]["base"]
    scores = " and ".join(
        f"{100 * _plain(r)['measures']['accuracy']['value']:.1f} % on {name}" for name, r in found.items()
    )
    return [
        f"{count} parts of vitkit, each alone in the same small ViT (`{base}`, {costs['params']['value'] / 1e6:.2f} M "
        f"parameters), trained from scratch {protocol['seeds']} times with batches of {protocol['batch_size']} on "
        f"{data}, all with the same images, number of steps, seeds, learning rate and schedule. The "
        f"plain ViT reaches {scores}.",
    ]


def _facts(name: str, results: dict[str, Any]) -> str:
    protocol, counts = results["settings"]["study"]["protocol"], results["data"]["counts"]
    train, test = (sum(counts[split].values()) for split in ("train", "test"))
    steps = protocol["epochs"] * -(-train // protocol["batch_size"])
    parts = sum(not r["baseline"] for r in results["recipes"])
    return f"{name} ({parts} parts, {steps} steps, {train:,} training and {test:,} test images)"


def _reading(found: dict[str, dict[str, Any]], controls: dict[str, dict[str, Any]]) -> list[str]:
    out = []
    for name, results in found.items():
        rows = [r for r in results["recipes"] if r["versus_baseline"]]
        sure = [r for r in rows if r["versus_baseline"]["significant"]]
        up = sorted(
            (r for r in sure if r["versus_baseline"]["difference"] > 0),
            key=lambda r: -r["versus_baseline"]["difference"],
        )
        best = ", ".join(f"{r['name']} ({_points(r['versus_baseline']['difference'])})" for r in up[:5])
        out.append(
            f"- **{name}:** {len(up)} of {len(rows)} parts are above the plain ViT, {len(sure) - len(up)} below, "
            f"{len(rows) - len(sure)} undecided" + (f". The largest gains: {best}." if best else ".")
        )
    for name, control in controls.items():
        ours, again = _plain(found[name])["measures"]["accuracy"], control["recipes"][0]["measures"]["accuracy"]
        out.append(
            f"- **Control, {name}:** the plain ViT trained again with other seeds differs from itself by "
            f"{_points(again['value'] - ours['value'])} points."
        )
    if len(found) == 2:
        a, b = (_differences(r) for r in found.values())
        both = sorted(set(a) & set(b))
        rho = stats.spearmanr([a[n] for n in both], [b[n] for n in both])
        out.append(
            f"- **From one data set to the other:** the rank correlation of the differences is {rho.statistic:.2f} "
            f"over {len(both)} parts."
        )
    out += [
        "",
        "Points are differences of test accuracy to the plain ViT in percent, with 95 % intervals over test images "
        "and seeds; **bold** is significant after Holm's correction over all parts of the study. With three seeds the "
        "spread between seeds is itself poorly known. Costs are ratios to the plain ViT: parameters and FLOPs are "
        "counted, times are those of eager PyTorch on one CPU thread, the models taking turns; a part with a fused "
        "kernel elsewhere may look slow here.",
        "",
        "What this does and does not say: it shows how fast parts learn from scratch in a small, equal number of "
        "steps, with settings nobody tuned for any of them. Parts that pay off late, with more data, larger images, or "
        "from pretrained weights may rank otherwise, and parts whose purpose is not accuracy (fewer tokens, less "
        "memory, rejection) are judged here by accuracy all the same. Repeat it on your own images with "
        "`vitkit study recipes/parts_study.yaml`.",
    ]
    return out


def _cells(name: str, found: dict[str, dict[str, Any]]) -> list[str]:
    known = methods()
    label = f"[{name}](../_generated/methods/{name}.md)" if name in known else name
    rows = [_row(results, name) for results in found.values()]
    points = []
    for row in rows:
        if row is None or row["status"] != "ok":
            points.append("failed" if row else "not run")
            continue
        v = row["versus_baseline"]
        # there is no interval where all answers are the same
        ends = f" [{_points(v['low'])}, {_points(v['high'])}]" if v["low"] is not None else ", the same answers"
        said = _points(v["difference"]) + ends
        points.append(f"**{said}**" if v["significant"] else said)
    kept = [row for row in rows if row is not None and row["status"] == "ok"]
    costs = [
        _ratio([row["costs"][key]["ratio"] for row in kept if row["costs"].get(key, {}).get("ratio")])
        for key in ("params", "flops", "latency_ms_b1", "latency_ms_b32")
    ]
    return [label, *points, *costs]


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """A line for every part: its difference to the plain ViT with the interval, one column for each data set."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    groups = _by_slot(found)
    order = [(slot, name) for slot, names in groups.items() for name in names]
    places, place, heads = {}, 0.0, []
    for i, (slot, name) in enumerate(order):
        if i == 0 or order[i - 1][0] != slot:
            place += 1.0 if i else 0
            heads.append((place, SLOTS[slot]))
            place += 1
        places[name] = place
        place += 1
    figure = Figure(figsize=(4 + 3.4 * len(found), 0.21 * place + 0.8), layout="constrained")
    columns = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (title, results) in zip(columns, found.items()):
        for name, at in places.items():
            row = _row(results, name)
            if row is None or row["status"] != "ok":
                continue
            v = row["versus_baseline"]
            colour = OPEN if not v["significant"] else GAIN if v["difference"] > 0 else LOSS
            ends = (v["difference"] - v["low"], v["high"] - v["difference"]) if v["low"] is not None else (0, 0)
            low, high = (100 * max(0.0, end) for end in ends)
            axes.errorbar(100 * v["difference"], at, xerr=[[low], [high]], fmt="o", ms=4, lw=1.2, color=colour)
        axes.axvline(0, color="#444444", lw=0.8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("points over the plain ViT", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", lw=0.4, color="#dddddd")
        axes.tick_params(labelsize=8)
    first = columns[0]
    first.set_yticks(list(places.values()), list(places), fontsize=8)
    first.set_ylim(place, -0.7)
    for at, text in heads:
        first.text(
            -0.02, at, text, transform=first.get_yaxis_transform(), ha="right", va="center", fontsize=8.5, weight="bold"
        )
    # without salt and date the same figures give the same file
    with rc_context({"svg.hashsalt": "parts"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _by_slot(found: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Slot → recipes, the best on average first."""
    slots: dict[str, str] = {}
    for results in found.values():
        for row in results["recipes"]:
            if not row["baseline"]:
                slots.setdefault(row["name"], next(iter(row["parts"]), "position"))
    means = {
        name: np.mean([d[name] for d in map(_differences, found.values()) if name in d] or [-1.0]) for name in slots
    }
    grouped = {slot: sorted((n for n, s in slots.items() if s == slot), key=lambda n: -means[n]) for slot in SLOTS}
    return {slot: names for slot, names in grouped.items() if names}


def _differences(results: dict[str, Any]) -> dict[str, float]:
    return {r["name"]: r["versus_baseline"]["difference"] for r in results["recipes"] if r["versus_baseline"]}


def _row(results: dict[str, Any], name: str) -> Recipe | None:
    return next((r for r in results["recipes"] if r["name"] == name), None)


def _plain(results: dict[str, Any]) -> Recipe:
    return next(r for r in results["recipes"] if r["baseline"])


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "−")


def _ratio(values: list[float]) -> str:
    # the two data sets differ in their numbers of tokens only
    return f"{np.exp(np.mean(np.log(values))):.2f}×" if values else ""


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _files(name: str, studies: list[Path]) -> list[str]:
    """Names of the files of a data set's studies, without their endings; what was written before keeps its name."""
    return [
        (_slug(name) + (f"-{i + 1}" if i else "")) if study.is_dir() else study.stem for i, study in enumerate(studies)
    ]


def _whole(found: dict[str, dict[str, Any]], studies: dict[str, list[Path]]) -> list[str]:
    first = next(iter(found.values()))
    versions = ", ".join(f"{k} {first['versions'][k]}" for k in ("vitkit", "torch", "timm"))
    links = "; ".join(
        f"{name}: {{download}}`report <{file}.html>`, {{download}}`table <{file}.csv>`"
        for name in found
        for file in _files(name, studies[name])
    )
    return ["## Whole reports", "", f"{links}. Made with {versions}."]


if __name__ == "__main__":
    main()

"""Sphinx extension: a page for every implemented method, an index of them, the list of papers, the keys of a study.

All of it is read from the catalogue, the signatures and docstrings of the methods, ``evidence/`` and the settings, and
written as Markdown to ``docs/_generated/`` before Sphinx looks for sources. Nothing is fetched.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from vitkit.catalogue import KINDS, Entry, Method, load
from vitkit.catalogue import methods as all_methods
from vitkit.catalogue.describe import NETWORK_DEFAULTS, Description, describe, kinds, purpose
from vitkit.catalogue.options import network_of, plain
from vitkit.errors import VitkitError
from vitkit.evidence import read_evidence
from vitkit.evidence.runner import has_experiment
from vitkit.evidence.text import conditions, numeric, table, verdict
from vitkit.files import write_text
from vitkit.study.settings import DataSettings, DeploySettings, Measures, PartUse, Protocol, Recipe, StudySettings

KIND_TITLES = {
    "part": "Parts of a model",
    "backbone": "Networks",
    "objective": "Pretraining objectives",
    "transform": "Transforms of a trained model",
    "probe": "Explainers, attacks, detectors",
    "optimizer": "Optimizers",
    "strategy": "Strategies",
    "recipe": "Studies",
}
KIND_NOTES = {
    "part": "An `nn.Module` for one slot of the ViT: `vitkit.build(…, slot=name)`, `vitkit.swap`, or a recipe's name.",
    "backbone": "Networks with a data flow of their own, known to timm after `import vitkit`; a recipe's name too.",
    "objective": "Learns from images alone; in a study the model is pretrained with it, then trained like all others.",
    "transform": "`f(model, images, …) -> (model, Change)`, applied to the trained model.",
    "probe": "`f(model, images, …) -> result`; leaves the model as it found it.",
    "optimizer": "A `torch.optim.Optimizer`; in a study it takes the place of AdamW.",
}
FAMILY_TITLES = {
    "parts": "Parts and backbones",
    "dense": "Detection, segmentation, dense prediction",
    "pretrain": "Pretraining",
    "adapt": "Adaptation and training",
    "compress": "Compression",
    "explain": "Explanation",
    "stress": "Attacks, defences, uncertainty",
    "generate": "Generation and restoration",
    "language": "Images and language",
    "video": "Video",
    "control": "Control",
    "federate": "Federated learning",
    "studies": "Studies of an application",
}
_LIMITS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
#: sections of a docstring that the page shows elsewhere
_ELSEWHERE = ("Args", "Arguments", "Attributes", "Paper")
_SECTION = re.compile(r"^(Args|Arguments|Attributes|Shape|Returns|Raises|Paper|Departs from the paper):\s*(.*)$")


def pages() -> dict[str, str]:
    """Path relative to ``docs/_generated`` → Markdown, of everything that is generated."""
    table, entries = all_methods(), load()
    made = {f"methods/{name}.md": method_page(method) for name, method in table.items()}
    made["methods.md"] = index_page(table.values())
    made["papers.md"] = papers_page(entries.values(), table.values())
    made["settings.md"] = settings_page()
    return made


def method_page(method: Method) -> str:
    """What one method is, how it is used, what can be set, and what its evidence says."""
    entry, out = method.entry, [f"# {method.name}", ""]
    try:
        about: Description | None = describe(method)
    except VitkitError as error:
        # an extra that is missing here must not hide what is known about the method
        about, missing = None, str(error)
    else:
        missing = ""
    # a summary is that of the paper; where several methods come from one paper, their own words go first
    lead = [entry.summary, *([about.purpose] if about and about.purpose else [])]
    lead = lead if len(entry.provides) == 1 else lead[::-1]
    out += [line for words in lead for line in (text(words), "")]
    out += _facts(method)
    if about is None:
        out += [f":::{{note}}\nNot usable where this page was made: {text(missing)}\n:::", ""]
    else:
        found = method.load()
        # a network's own words are those of its class
        sections = docstring(network_of(found) or found)
        if sections.get(""):
            out += ["## How it works", "", sections[""], ""]
        out += ["## Use", ""]
        out += ["```python", *(line.replace("…", "...") for line in about.python), "```", ""]
        out += ["```console", *(f"$ {line}" for line in about.study), "```", ""] if about.study else []
        out += ["## Options", ""]
        rows = [[code(o.name), code(o.type), code(o.default), text(o.meaning)] for o in about.options]
        out += grid(["option", "type", "default", "meaning"], rows) if rows else ["None.", ""]
        if method.kind == "backbone":
            out += [NETWORK_DEFAULTS, ""]
        for title, body in sections.items():
            if title and title not in _ELSEWHERE:
                out += [f"**{title}:** {body}", ""]
        out += [f"Source: {code(method.dotted.partition(':')[0])}", ""]
    return "\n".join(out + _evidence(entry))


def _facts(method: Method) -> list[str]:
    entry = method.entry
    paper = link(entry.title, entry.url) + (f" ({entry.date})" if entry.date else "")
    rows = [["kind", kinds(entry, [method])], ["paper", paper]]
    if entry.code:
        rows.append(["authors' code", f"<{entry.code}>"])
    others = [m.name for m in all_methods().values() if m.entry.name == entry.name and m.name != method.name]
    if others:
        rows.append(["from the same paper", ", ".join(link(o, f"{o}.md") for o in others)])
    rows.append(["evidence", glance(entry, "#evidence")])
    return grid(["", ""], rows)


def _evidence(entry: Entry) -> list[str]:
    record = read_evidence(entry)
    out = ["## Evidence", ""]
    if record is None:
        run = f" `vitkit evidence {entry.name}` runs the experiment." if has_experiment(entry) else ""
        return [*out, f"None on file.{run}", ""]
    if record.get("name", entry.name) != entry.name:
        out += [
            f"From the experiment of {_method_link(record['name'], '')}, in which {text(entry.name)} takes part.",
            "",
        ]
    out += [f"**Claim:** {text(record['claim'])}", "", f"**In this experiment:** {verdict(record)}.", ""]
    columns, cells = table(record)
    out += grid([text(c) for c in columns], [[text(c) for c in row] for row in cells], numeric(record))
    if record.get("notes"):
        out += [text(record["notes"]), ""]
    out += [f"{text(conditions(record))} Run it again: `vitkit evidence {record.get('name', entry.name)}`.", ""]
    return out


def glance(entry: Entry, where: str) -> str:
    """The evidence of an entry in two words, linked to ``where``."""
    record = read_evidence(entry)
    if record is None:
        return "none on file"
    if record.get("name", entry.name) != entry.name:
        return link(f"compared in {record['name']}", where)
    return link(verdict(record), where)


def index_page(found: Iterable[Method]) -> str:
    """All methods by kind, with their evidence at a glance."""
    found = list(found)
    counts = {"shown": 0, "not shown": 0, "undecided": 0}
    for entry in {m.entry.name: m.entry for m in found}.values():
        record = read_evidence(entry)
        if record is not None and record.get("name", entry.name) == entry.name:
            counts[verdict(record)] += 1
    out = [
        "# Methods",
        "",
        f"{len(found)} methods can be used today, alone or combined. The claims of {sum(counts.values())} papers were "
        "put to a small experiment, minutes on a laptop: "
        + ", ".join(f"{n} {word}" for word, n in counts.items())
        + ". A claim that does not show there may still hold at the paper's scale; each page has the figures and says "
        "what was scaled down. Methods from one paper share its evidence. `vitkit evidence NAME` runs an experiment "
        "again; those on Fashion-MNIST and CIFAR-10 read `fashion_mnist.npz` and `cifar10_small.npz` (`x_train`, "
        "`y_train`, `x_test`, `y_test`, the latter also `classes`) from the folder `$VITKIT_DATA`.",
        "",
    ]
    for kind in KINDS:
        chosen = sorted((m for m in found if m.kind == kind), key=lambda m: (m.slot, m.name))
        if not chosen:
            continue
        out += [f"## {KIND_TITLES[kind]}", ""]
        out += [KIND_NOTES[kind], ""] if kind in KIND_NOTES else []
        slots = any(m.slot for m in chosen)
        rows = []
        for method in chosen:
            page, entry = f"methods/{method.name}.md", method.entry
            row = [
                link(method.name, page),
                method.slot,
                _purpose(method),
                link(entry.id, entry.url),
                glance(entry, f"{page}#evidence"),
            ]
            rows.append(row if slots else row[:1] + row[2:])
        out += grid(["method", *(["slot"] if slots else []), "what it is for", "arXiv", "evidence"], rows)
    names = "\n".join(f"methods/{m.name}" for m in sorted(found, key=lambda m: m.name))
    out += [f"```{{toctree}}\n:hidden:\n\n{names}\n```", ""]
    return "\n".join(out)


def papers_page(entries: Iterable[Entry], found: Iterable[Method]) -> str:
    """The published systems of the reading list by family, with what is implemented here."""
    by_entry: dict[str, list[Method]] = {}
    for method in found:
        by_entry.setdefault(method.entry.name, []).append(method)
    entries = list(entries)
    listed = [e for e in entries if e.keys]
    others = [e for e in entries if not e.keys]
    done = sum(e.name in by_entry for e in listed)
    out = [
        "# Papers",
        "",
        f"{len(listed)} published systems by family, {done} of them implemented here (✓, with the names to use), and "
        "the baselines they are compared with. `vitkit papers --json` prints the same.",
        "",
    ]
    families = list(dict.fromkeys([*FAMILY_TITLES, *(e.family for e in listed)]))
    groups = [(FAMILY_TITLES.get(f, f.capitalize()), [e for e in listed if e.family == f]) for f in families]
    for title, chosen in [*groups, ("Baselines and additions", others)]:
        if not chosen:
            continue
        chosen = sorted(chosen, key=lambda e: e.name)
        rows = []
        for entry in chosen:
            names = ", ".join(link(m.name, f"methods/{m.name}.md") for m in by_entry.get(entry.name, []))
            paper = link(entry.title, entry.url) + (f" ({entry.date})" if entry.date else "")
            rows.append([f"{paper}<br>{text(entry.summary)}", f"✓ {names}" if names else ""])
        here = sum(e.name in by_entry for e in chosen)
        out += [f"## {title}", "", f"{len(chosen)} systems, {here} implemented.", ""]
        out += grid(["paper, and what it does", "here"], rows)
    return "\n".join(out)


def settings_page() -> str:
    """The keys of a study file with type, default and meaning."""
    out = ["# Keys of a study file", "", "What is left out has its default; an unknown key is an error.", ""]
    out += ["## At the top", "", *_keys(StudySettings)]
    rooms = {
        "data": DataSettings,
        "protocol": Protocol,
        "measures": Measures,
        "deploy": DeploySettings,
        "a recipe": Recipe,
        "a part": PartUse,
    }
    for title, model in rooms.items():
        out += [f"## {title[0].upper()}{title[1:]}", "", text((model.__doc__ or "").partition("\n\n")[0]), ""]
        out += _keys(model)
    return "\n".join(out)


def _keys(model: type[BaseModel]) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        kind = str(model.__annotations__.get(name, "")) or inspect.formatannotation(field.annotation)
        limits = [f"{sign} {getattr(m, word)}" for m in field.metadata for word, sign in _LIMITS if hasattr(m, word)]
        if field.is_required():
            default = "required"
        elif isinstance(field.default, BaseModel):
            default = ""
        else:
            default = yaml.safe_dump(field.get_default(call_default_factory=True), default_flow_style=True)
            default = default.replace("...", "").strip()
        meaning = "; ".join(filter(None, [field.description or "", ", ".join(limits)]))
        # as YAML writes them
        kind = re.sub(r"Literal\[(.*?)\]", lambda m: m[1].replace("'", "").replace(", ", " | "), kind)
        kind, meaning = kind.replace("Options", "dict").replace("None", "null"), meaning.replace("None:", "null:")
        rows.append([code(field.alias or name), code(kind), code(default), text(meaning)])
    return grid(["key", "type", "default", "meaning"], rows)


def _purpose(method: Method) -> str:
    try:
        return text(describe(method).purpose or method.entry.summary)
    except VitkitError:
        return text(method.entry.summary)


def _method_link(name: str, folder: str) -> str:
    return link(name, f"{folder}{name}.md") if name in all_methods() else f"`{name}`"


# -- Markdown --------------------------------------------------------------------------------------------------------


def docstring(found: Any) -> dict[str, str]:
    """The docstring without its purpose as Markdown, by section; the text before any section under ``""``."""
    whole = inspect.getdoc(found) or ""
    rest = whole if not purpose(whole) else whole.partition("\n\n")[2]
    raw: dict[str, list[str]] = {"": []}
    current = ""
    for line in rest.splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = heading[1]
            raw[current] = [heading[2]]
        elif current and line and not line.startswith(" ") and not raw[current][-1]:
            # an unindented paragraph after a blank line is text again
            current = ""
            raw[""] += ["", line]
        else:
            raw[current].append(line)
    return {
        title: _body(lines) if not title else text(" ".join(" ".join(lines).split()))
        for title, lines in raw.items()
        if any(line.strip() for line in lines)
    }


def _body(lines: Sequence[str]) -> str:
    """Paragraphs, lists and doctests of a docstring as Markdown."""
    out: list[str] = []
    for block in "\n".join(lines).strip().split("\n\n"):
        example = block.lstrip().startswith(">>>")
        out.append(f"```pycon\n{block}\n```" if example else text(block))
    return "\n\n".join(out)


def text(line: str) -> str:
    """Prose for Markdown: code stays as it is, and what would be markup outside it is escaped."""
    pieces = re.split(r"(`[^`]+`)", plain(line))
    for i in range(0, len(pieces), 2):
        pieces[i] = re.sub(r"([\\$<>\[\]|{}_~])", r"\\\1", pieces[i])
    return "".join(pieces)


def code(value: str) -> str:
    """Code for a cell; an empty value stays empty."""
    return f"`{value}`" if value else ""


def link(words: str, where: str) -> str:
    """A link, or the words alone where there is no address."""
    return f"[{text(words)}]({where})" if where else text(words)


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """A Markdown table; a bar inside a cell, also in code, is escaped."""
    line = ["--:" if i < len(right) and right[i] else "---" for i in range(len(columns))]
    cells = [[re.sub(r"(?<!\\)\|", r"\\|", c.replace("\n", " ")) for c in row] for row in (columns, line, *rows)]
    return [*("| " + " | ".join(row) + " |" for row in cells), ""]


# -- Sphinx ----------------------------------------------------------------------------------------------------------


def write_pages(folder: Path) -> None:
    """Write what changed, so that an unchanged page is not built again, and drop pages of methods that are gone."""
    wanted = pages()
    for path in folder.rglob("*.md"):
        if path.relative_to(folder).as_posix() not in wanted:
            path.unlink()
    for name, page in wanted.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != page:
            write_text(path, page)


def setup(app: Any) -> dict[str, Any]:
    """Sphinx's entry point."""
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / "_generated"))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

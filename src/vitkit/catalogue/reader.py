"""Read ``papers.toml`` and resolve names lazily; nothing is imported until a method is used.

Third parties add entries through an entry point of the group ``vitkit.catalogue`` that resolves to a dict or to
the path of a TOML file, both shaped like ``papers.toml``.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from vitkit.errors import BadInput, VitkitError, unknown

GROUP = "vitkit.catalogue"
KINDS = ("part", "objective", "transform", "probe", "strategy", "recipe", "optimizer", "backbone")
SLOTS = ("tokenizer", "position", "mixer", "normalizer", "mlp", "norm", "block", "readout")

_OWN_TABLE = Path(__file__).with_name("papers.toml")
_PARTS = "vitkit.models.parts."
_SLOT_OF_FOLDER = {f"{slot}s": slot for slot in SLOTS}
_KIND_OF_ROOM = {
    "vitkit.models.backbones.": "backbone",
    "vitkit.train.optimizers.": "optimizer",
    "vitkit.pretrain.": "objective",
    "vitkit.compress.": "transform",
    "vitkit.adapt.": "transform",
    "vitkit.explain.": "probe",
    "vitkit.stress.": "probe",
    "vitkit.federate.": "strategy",
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One published system.

    Attributes:
        name: slug in the table, unique.
        keys: numbers of the system in the reading lists it came from.
        id: arXiv id without version; empty if there is no paper.
        version: newest version read, e.g. ``"v2"``.
        title: of the paper.
        date: ``"YYYY-MM"`` of its first version.
        code: address of the authors' code; empty if none was named.
        family: wing of the toolkit it belongs to.
        kind: one of :data:`KINDS`.
        slot: for parts, the slot of the host.
        summary: one line: what it does and for what.
        provides: ``"module:attribute"`` of each method; empty until implemented.
        evidence: path of its evidence file, relative to the project.
        source: who listed it: ``"vitkit"`` or the name of a third party's entry point.
    """

    name: str
    title: str
    kind: str
    summary: str
    keys: tuple[str, ...] = ()
    id: str = ""
    version: str = ""
    date: str = ""
    code: str = ""
    family: str = ""
    slot: str = ""
    provides: tuple[str, ...] = ()
    evidence: str = ""
    source: str = "vitkit"

    @property
    def url(self) -> str:
        """Address of the abstract page, or the empty string."""
        return f"https://arxiv.org/abs/{self.id}" if self.id else ""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Something with a name that a study can use.

    Attributes:
        name: what users write, e.g. ``"gptaq"``.
        dotted: ``"module:attribute"`` of the object.
        kind: its calling convention, one of :data:`KINDS`.
        slot: for parts, the slot of the host; else empty.
        entry: the paper it comes from.
    """

    name: str
    dotted: str
    kind: str
    slot: str
    entry: Entry

    def load(self) -> Any:
        """Import the module and return the object.

        Raises: VitkitError if the module or the attribute is not there, or something it needs is missing.
        """
        module_name, _, attribute = self.dotted.partition(":")
        try:
            found: Any = import_module(module_name)
        except VitkitError:
            raise
        except ImportError as error:
            raise VitkitError(f"{self.name} ({self.dotted}) could not be imported: {error}.") from error
        for step in attribute.split("."):
            if not hasattr(found, step):
                raise VitkitError(
                    f"The catalogue says that {self.entry.name!r} provides {self.dotted!r}, but {module_name} has "
                    f"no {attribute!r}. Correct `provides` (listed by {self.entry.source})."
                )
            found = getattr(found, step)
        return found


@lru_cache(maxsize=1)
def load() -> dict[str, Entry]:
    """All entries by name: ours, then those of installed third parties.

    Raises:
        BadInput: a table is malformed, or two tables use one name; the message names both.
    """
    entries = _entries(_table(_OWN_TABLE), "vitkit")
    for source, table in _third_parties():
        for name, entry in _entries(table, source).items():
            if name in entries:
                raise BadInput(
                    f"Two catalogues list an entry {name!r}: {entries[name].source} and {source}. "
                    "Rename one, or uninstall one of the packages."
                )
            entries[name] = entry
    return entries


@lru_cache(maxsize=1)
def methods() -> dict[str, Method]:
    """All implemented methods by public name, in the order of the catalogue.

    The name is the stem of the module's file with ``_`` as ``-``; where one module provides several, the first takes
    the stem and each other one its own attribute in kebab case.

    Raises: BadInput if two methods would get one name; the message names both.
    """
    found: dict[str, Method] = {}
    seen_modules: set[str] = set()
    for entry in load().values():
        for dotted in entry.provides:
            module, _, attribute = dotted.partition(":")
            stem = module.rpartition(".")[2].replace("_", "-")
            name = _kebab(attribute.rpartition(".")[2]) if module in seen_modules else stem
            seen_modules.add(module)
            if name in found:
                raise BadInput(
                    f"Two methods would be called {name!r}: {found[name].dotted} (listed by "
                    f"{found[name].entry.source}) and {dotted} (listed by {entry.source}). Rename one of the files."
                )
            kind, slot = _kind(module, entry)
            found[name] = Method(name=name, dotted=dotted, kind=kind, slot=slot, entry=entry)
    return found


def find(name: str) -> tuple[Entry, list[Method]]:
    """The entry behind a method name, an entry name or an arXiv id, and the methods that are meant.

    A method's name gives that method alone; an entry's name or an arXiv id (with or without version) gives all
    that it provides.

    Raises: UnknownName with the nearest known name.
    """
    wanted = name.strip()
    table, entries = methods(), load()
    if wanted in table:
        return table[wanted].entry, [table[wanted]]
    by_id = {e.id: e for e in entries.values() if e.id}
    entry = entries.get(wanted) or by_id.get(_bare_id(wanted))
    if entry is None:
        if re.fullmatch(r"(arxiv:)?\d{4}\.\d{4,5}(v\d+)?", wanted, flags=re.IGNORECASE):
            raise unknown("paper", wanted, by_id, "vitkit papers")
        raise unknown("method or paper", wanted, {**table, **entries}, "vitkit methods` and `vitkit papers")
    return entry, [m for m in table.values() if m.entry.name == entry.name]


def resolve(name: str) -> Any:
    """Import and return the object behind a method name (or behind an entry's name: its first method).

    Raises:
        UnknownName: nothing is called so. VitkitError: it is known, but not implemented or not importable.
    """
    entry, meant = find(name)
    if not meant:
        raise VitkitError(
            f"{name!r} is in the catalogue ({entry.title}), but no code comes with it yet; "
            "`vitkit methods` lists what can be used."
        )
    return meant[0].load()


def clear_cache() -> None:
    """Forget what was read, e.g. after a package with an entry point was installed in this process."""
    load.cache_clear()
    methods.cache_clear()


def _third_parties() -> list[tuple[str, Mapping[str, Any]]]:
    from importlib.metadata import entry_points

    tables = []
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        source = f"entry point {point.name!r} ({point.value})"
        try:
            value = point.load()
        except Exception as error:
            # code of strangers: any failure must say whose it is
            raise VitkitError(
                f"The catalogue of {source} could not be loaded: {type(error).__name__}: {error}. "
                "Repair or uninstall that package."
            ) from error
        if isinstance(value, (str, os.PathLike)):
            value = _table(Path(value))
        if not isinstance(value, Mapping):
            raise BadInput(f"The catalogue of {source} must be a dict or a path; it is a {type(value).__name__}.")
        tables.append((source, value))
    return tables


def _table(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise VitkitError(f"The catalogue {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"The catalogue {path} is not valid TOML: {error}.") from error


_FIELDS = tuple(f.name for f in fields(Entry) if f.name not in ("name", "source"))


def _entries(table: Mapping[str, Any], source: str) -> dict[str, Entry]:
    entries = {}
    for name, row in table.items():
        where = f"entry {name!r} of the catalogue of {source}"
        if not isinstance(row, Mapping):
            raise BadInput(f"{where} must be a table of fields; it is a {type(row).__name__}.")
        for key, value in row.items():
            if key not in _FIELDS:
                raise unknown(f"field of {where}", key, _FIELDS, "vitkit.catalogue.Entry")
            many = key in ("keys", "provides")
            items = value if many and isinstance(value, (list, tuple)) else [value]
            if (many and items is not value) or not all(isinstance(item, str) for item in items):
                raise BadInput(f"{key} of {where} must be {'a list of strings' if many else 'a string'}: {value!r}.")
        missing = [key for key in ("title", "kind", "summary") if not row.get(key)]
        if missing:
            raise BadInput(f"{where} lacks {', '.join(missing)}.")
        if row["kind"] not in KINDS:
            raise unknown(f"kind (in {where})", row["kind"], KINDS, "vitkit methods --help")
        bad = [d for d in row.get("provides", ()) if not re.fullmatch(r"[\w.]+:[\w.]+", d)]
        if bad:
            raise BadInput(f"{where} provides {bad[0]!r}; the form is 'package.module:attribute'.")
        entry = Entry(name=name, source=source, **{k: v for k, v in row.items() if k not in ("keys", "provides")})
        entries[name] = replace(entry, keys=tuple(row.get("keys", ())), provides=tuple(row.get("provides", ())))
    return entries


def _kind(module: str, entry: Entry) -> tuple[str, str]:
    """Kind and slot of what a module provides: our rooms say it, elsewhere the entry does."""
    if module.startswith(_PARTS):
        folder = module.removeprefix(_PARTS).split(".")[0]
        if folder in _SLOT_OF_FOLDER:
            return "part", _SLOT_OF_FOLDER[folder]
    for room, kind in _KIND_OF_ROOM.items():
        if module.startswith(room):
            return kind, ""
    return entry.kind, entry.slot if entry.kind == "part" else ""


def _kebab(name: str) -> str:
    """``DCTAttention`` and ``dct_attention`` both become ``dct-attention``."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return spaced.replace("_", "-").lower().strip("-")


def _bare_id(text: str) -> str:
    return re.sub(r"v\d+$", "", text.lower().removeprefix("arxiv:"))

"""Which options a method takes, read from its own signature and docstring."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

#: parameters that the toolkit fills in itself: the model, the data, and the place of a part in its host
_GIVEN = {
    "self",
    "cls",
    "old",
    "old_module",
    "spec",
    "model",
    "images",
    "labels",
    "targets",
    "probs_cal",
    "labels_cal",
    "params",
    "task",
    "generator",
    "progress",
    "device",
    "dtype",
    "dim",
    "num_heads",
    "head_dim",
    "grid",
    "num_prefix",
    "depth",
    "num_blocks",
    "seq_len",
}

#: options that mean the same wherever they occur, so not every docstring repeats them
_EVERYWHERE = {"warm": "start from what fits of the weights that stood in the slot before"}


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of a method.

    Attributes: name; type as the signature writes it; default as Python writes it ("required" if there is none);
    meaning: the line of the docstring's Args, or the empty string.
    """

    name: str
    type: str
    default: str
    meaning: str


# of a network a study gives these
_GIVEN_TO_NETWORKS = {"self", "pretrained", "img_size", "in_chans", "num_classes"}


def network_of(found: Any) -> type | None:
    """The class behind a network registered with timm: the one among its module's public names that is a network."""
    if inspect.isclass(found) or not _passes_on(found):
        return None
    module = inspect.getmodule(found)
    public = [getattr(module, name, None) for name in getattr(module, "__all__", ())]
    return next((c for c in public if inspect.isclass(c) and hasattr(c, "forward_features")), None)


def options(found: Any) -> list[Option]:
    """The options of a part, transform, probe, objective, optimizer or network, in the order of its signature.

    What the toolkit gives itself (model, images, the place in the host) is left out. For a part the options are those
    of ``from_standard``; where that passes on ``**options``, those of the constructor follow.

    Args:
        found: the function or class behind a method.
    """
    sources: list[Any] = [found]
    inherited: list[Any] = []
    given, network = _GIVEN, network_of(found)
    if network is not None:
        given, found = _GIVEN_TO_NETWORKS, network
        own, *bases_of_it = _constructors(network)
        # the rest of timm's arguments are in its documentation
        sources, inherited = [own], [c for c in bases_of_it if c.__module__.partition(".")[0] != "timm"]
    elif inspect.isclass(found):
        starter = getattr(found, "from_standard", None)
        sources = [] if starter is None else [starter]
        if starter is None or _passes_on(starter):
            own, *inherited = _constructors(found)
            sources.append(own)
    # what the class says of a name goes before what its constructor and its bases say
    meanings = _meanings(found)
    bases = [b for b in found.__mro__[1:] if inherited and not _outside(b)] if inspect.isclass(found) else []
    for text in [*sources, *bases]:
        meanings = {**_meanings(text), **meanings}
    rows: dict[str, Option] = {}
    for source in [*sources, *inherited]:
        for p in _parameters(source):
            hidden = p.name in given or p.name.startswith("_") or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            # what a base class demands, the class itself gives
            hidden = hidden or (source in inherited and p.default is p.empty)
            if not hidden and p.name not in rows:
                meaning = meanings.get(p.name) or _EVERYWHERE.get(p.name, "")
                rows[p.name] = Option(name=p.name, type=_type(p), default=_default(p), meaning=meaning)
    return list(rows.values())


def required(found: Any) -> list[str]:
    """What must be given to call ``found``: names the toolkit knows as they are, others as ``name=…``."""
    return [
        p.name if p.name in _GIVEN else f"{p.name}=…"
        for p in _parameters(found)
        # optional for transforms that can do without calibration, but mostly wanted
        if (p.default is p.empty or p.name in ("images", "labels")) and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]


def plain(text: str) -> str:
    """Markup of a docstring as it is read: references become names, double backticks single ones.

    >>> plain("see :func:`~vitkit.explain.gmar.gmar`; ``log size`` is added")
    'see `gmar`; `log size` is added'
    """
    text = re.sub(r":\w+:`~(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return re.sub(r":\w+:(`[^`]+`)", r"\1", text).replace("``", "`")


def _passes_on(source: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in _parameters(source))


def _outside(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("torch", "builtins")


def _constructors(found: type) -> list[Any]:
    """The constructor of a class, then those of its bases that it passes unknown names on to."""
    chain: list[Any] = [found.__init__]  # type: ignore[misc]
    for base in found.__mro__[1:]:
        # the bases of torch take what a method has already worked out
        if _outside(base) or not _passes_on(chain[-1]):
            break
        own = vars(base).get("__init__")
        if own is not None and own is not chain[-1]:
            chain.append(own)
    return chain


def _parameters(source: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(source).parameters.values())


def _type(parameter: inspect.Parameter) -> str:
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    value = parameter.default
    if isinstance(value, float) and len(repr(value)) > 8:
        # strengths of attacks are multiples of 1/255, and unreadable as decimals
        whole = round(value * 255, 6)
        return f"{whole:.0f}/255" if whole == int(whole) else f"{value:.6g}"
    return getattr(value, "__name__", None) or repr(value)


def _meanings(found: Any) -> dict[str, str]:
    """Lines of the Google-style ``Args`` section: name -> meaning on one line."""
    lines = (inspect.getdoc(found) or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip() in ("Args:", "Arguments:")), None)
    if start is None:
        return {}
    meanings: dict[str, str] = {}
    current = ""
    indent: int | None = None
    for line in lines[start + 1 :]:
        if not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            break
        indent = depth if indent is None else indent
        named = re.match(r"\s*([\w, *]+?)\s*(?:\([^)]*\))?:\s+(.*)", line)
        if depth == indent and named:
            current = named.group(1)
            meanings[current] = named.group(2)
        elif current:
            meanings[current] += f" {line.strip()}"
    # "height, width: sides in pixels" explains both
    return {n.strip(" *"): plain(text) for names, text in meanings.items() for n in names.split(",")}

"""What a user must know before using a method: what it is for, lines to copy, its options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitkit.catalogue.options import Option, options, plain, required
from vitkit.catalogue.reader import Entry, Method

#: what a recipe of a study may name; other kinds are used from Python
IN_RECIPES = ("part", "backbone", "objective", "transform", "probe", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Description:
    """How to use one method.

    Attributes:
        purpose: first paragraph of its docstring, on one line; empty where that is missing or an equation.
        python: lines of Python to copy; what the user must choose is an ellipsis.
        study: commands to copy; empty for kinds that no recipe takes.
        options: what can be set, in the order of the signature.
    """

    purpose: str
    python: tuple[str, ...]
    study: tuple[str, ...]
    options: tuple[Option, ...]


#: said below the options of a network
NETWORK_DEFAULTS = "Defaults are those of the network's class; a size has widths and depths of its own."


def describe(method: Method) -> Description:
    """Load a method and read from its signature and docstring how it is used.

    >>> from vitkit.catalogue import methods
    >>> print(*describe(methods()["sinkhorn"]).python, sep="\\n")
    import vitkit
    model = vitkit.build("vit_pico", num_classes=10, normalizer="sinkhorn")

    Raises: VitkitError if it cannot be imported here.
    """
    found = method.load()
    rows = options(found)
    return Description(
        purpose=purpose(inspect.getdoc(found) or ""),
        python=tuple(_python(method, found, rows)),
        study=tuple(_study(method, rows)),
        options=tuple(rows),
    )


def purpose(docstring: str) -> str:
    """The first paragraph of a docstring on one line; empty if it is an equation.

    >>> purpose("Softmax with a learned\\ntemperature.\\n\\nMore."), purpose("``s / τ``")
    ('Softmax with a learned temperature.', '')
    """
    first = plain(" ".join(docstring.partition("\n\n")[0].split()))
    return "" if first.startswith("`") else first


def kinds(entry: Entry, meant: Sequence[Method] = ()) -> str:
    """Kind and slot in words: of the methods if there are some, else of the entry.

    >>> kinds(Entry(name="x", title="x", kind="part", slot="mixer", summary="x"))
    'part (mixer)'
    """
    things: Sequence[Entry | Method] = meant or [entry]
    return ", ".join(dict.fromkeys(f"{t.kind} ({t.slot})" if t.slot else t.kind for t in things))


def study_command(method: Method) -> str:
    """The command that compares a method with a plain ViT; empty for kinds that no recipe takes. Nothing is loaded."""
    return f"vitkit study ./my-images --recipes vit,{method.name}" if method.kind in IN_RECIPES else ""


def _python(method: Method, found: Any, rows: list[Option]) -> list[str]:
    module, _, attribute = method.dotted.partition(":")
    if method.kind == "part":
        pairs = ", ".join(f'"{o.name}": …' for o in rows if o.default == "required")
        part = f'("{method.name}", {{{pairs}}})' if pairs else f'"{method.name}"'
        return ["import vitkit", f'model = vitkit.build("vit_pico", num_classes=10, {method.slot}={part})']
    if method.kind == "backbone":
        # what a backbone provides are timm's entry points
        return ["import timm", "import vitkit", f'model = timm.create_model("{attribute}", num_classes=10)']
    needs = required(found)
    call = f"{attribute}({', '.join('model.parameters()' if n == 'params' else n for n in needs)})"
    lines = {
        "transform": f"smaller, change = {call}",
        "probe": f"result = {call}",
        "objective": f'loss = {call}({{"images": images, "labels": labels}})["loss"]',
        "optimizer": f"optimizer = {call}",
        "strategy": f"strategy = {call}",
    }
    return [f"from {module} import {attribute}", lines.get(method.kind, call)]


def _study(method: Method, rows: list[Option]) -> list[str]:
    command = study_command(method)
    if not command or method.kind == "backbone":
        return [command] if command else []
    lines = [command]
    # classes and functions have no name in a recipe
    values = [o for o in rows if o.default not in ("required", "None") and not re.search(r"type\[|Callable", o.type)]
    settable = next((o for o in values if o.name != "warm"), None)
    if settable:
        value = settable.default.strip("'\"")
        if not set(value) & set(" ,+:()[]{}/"):
            lines.append(f"{command}:{settable.name}={value}")
    return lines

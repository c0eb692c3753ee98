"""Files that people write: YAML, checked key by key, with errors that name the line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from vitkit.errors import BadInput


class Strict(BaseModel):
    """Unknown keys are errors, answered with the nearest known one."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, frozen=True)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-6 is a number, which version 1.1 takes for text unless there is a dot and a sign."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_yaml(text: str) -> Any:
    """Plain data of a YAML text.

    >>> load_yaml("{eps: 1e-06, steps: 3, name: e6}")
    {'eps': 1e-06, 'steps': 3, 'name': 'e6'}

    Raises: yaml.YAMLError.
    """
    return yaml.load(text, Loader=_Loader)


def read_mapping(path: str | Path, what: str, keys: Iterable[str]) -> tuple[dict[Any, Any], str]:
    """The mapping a YAML file holds, and its text.

    Args:
        what: kind of file, for messages, like ``"study"``.
        keys: it may have at the top, for messages.

    Raises: BadInput naming the file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        raw = load_yaml(text)
    except FileNotFoundError as error:
        raise BadInput(f"There is no {what} file {path}.") from error
    except OSError as error:
        raise BadInput(f"The {what} file {path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise BadInput(f"{path}{line} is not valid YAML: {getattr(error, 'problem', error)}.") from error
    if not isinstance(raw, dict):
        raise BadInput(f"{path} must be a mapping with the keys {', '.join(keys)}.")
    return raw, text


def line_of(key: str, text: str | None) -> str:
    """``" line N"`` of the first line that sets a key; empty if there is none."""
    for number, line in enumerate((text or "").splitlines(), start=1):
        if re.match(rf"\s*(- )?{re.escape(key)}\s*:", line):
            return f" line {number}"
    return ""

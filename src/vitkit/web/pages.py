"""Pages with their own style and script, allowed by hash and nothing else; and an API in words, made offline."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

#: policy of every answer that is no page
NOTHING = "default-src 'none'; frame-ancestors 'none'; base-uri 'none'"
#: stands in a page's style for what all pages have
BASE = "/* base.css */"

_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { border-bottom: 1px solid; padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: top; }
code { font-size: 1em; }
"""


@dataclass(frozen=True)
class Page:
    """HTML and the Content-Security-Policy that lets run what it holds and nothing else."""

    html: str
    policy: str


def read(package: str, name: str = "page.html") -> Page:
    """A page that lies beside a package's modules."""
    html = files(package).joinpath(name).read_text(encoding="utf-8")
    return page(html.replace(BASE, files(__package__).joinpath("base.css").read_text(encoding="utf-8").strip()))


def page(html: str) -> Page:
    """A page of complete HTML; only whole ``<script>`` and ``<style>`` elements without attributes will work."""
    allowed = {tag: _hashes(html, tag) for tag in ("script", "style")}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html, policy)


def documentation(schema: dict[str, Any], home: str) -> Page:
    """A table of all routes from an OpenAPI schema; needs no script and nothing from elsewhere.

    Args:
        schema: of the API.
        home: words of the link to the page at ``/``.
    """
    info = schema["info"]
    rows = []
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            rows.append(
                f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{_text(operation.get('description', ''))}</p>"
                + _table("Query", [(p["name"], _parameter(p)) for p in operation.get("parameters", ())])
                + _table("Answer", [(s, r["description"]) for s, r in operation.get("responses", {}).items()])
            )
    title = f"{escape(info['title'])}: API"
    return page(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><main><h1>{title}</h1>'
        f"<p>{_text(info.get('description', ''))}</p>{''.join(rows)}"
        f'<p><a href="openapi.json">openapi.json</a> · <a href="./">{escape(home)}</a></p></main></body></html>'
    )


def _hashes(html: str, tag: str) -> str:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"


def _parameter(parameter: dict[str, Any]) -> str:
    default = parameter.get("schema", {}).get("default")
    text = str(default).lower() if isinstance(default, bool) else str(default)
    shown = "" if default in (None, "") else f" (default {text})"
    return f"{parameter.get('description', '')}{shown}"


def _table(head: str, rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = "".join(f"<tr><th scope=row><code>{escape(a)}</code></th><td>{_text(b)}</td></tr>" for a, b in rows)
    return f"<table><thead><tr><th scope=col>{head}</th><th scope=col>Meaning</th></tr></thead>{lines}</table>"


def _text(text: str) -> str:
    """Escaped, with ``code`` between backquotes."""
    return re.sub(r"`+([^`]+)`+", r"<code>\1</code>", escape(text)).replace("\n\n", "</p><p>")

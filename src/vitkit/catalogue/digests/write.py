"""Write rows as a digest in either form, or for other programs.

Markdown: of a text only what would be taken for something else is escaped, mostly by entities, so that common rows look
as they always do: pipes (``\\|``), the beginning of a tag, of an entity, of an image, and of a link to anything but the
web. CSV: a cell that a spreadsheet would run as a formula gets an apostrophe in front; CSV is not read back, so nothing
is lost by it. BibTeX: letters with a meaning in TeX are escaped, inside formulas too, for a bibliography must not run
commands out of a stranger's title.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import groupby

from vitkit.catalogue.digests.row import Row, tidy
from vitkit.errors import unknown

#: titles of daily digests are wrapped as arXiv's own listings wrap them
TITLE_WIDTH = 72
#: comments longer than this are folded away behind their first letters
LONG_COMMENT, FOLDED = 20, 5

_ENTITY_LIKE = re.compile(r"&(?=#\w{1,8};|[A-Za-z][A-Za-z0-9]{1,31};)")
# what CommonMark takes for a tag or an autolink, and anything else that looks closed
_TAG_LIKE = re.compile(r"<(?=[!?]|/?[A-Za-z][A-Za-z0-9.+-]*(?:[\s/>:@]|$)|/?[A-Za-z][^<>]*>)")
_LINK_LIKE = re.compile(r"\]\((?!https?://)", re.IGNORECASE)
_WEB = re.compile(r"https?://", re.IGNORECASE)
_PAIRED = re.compile(r"(?:[^\s()<>]|\([^\s()<>]*\))*")

_TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # BibTeX counts braces without a look at the backslash before them
    "{": r"\textbraceleft{}",
    "}": r"\textbraceright{}",
    **{letter: "\\" + letter for letter in "&%$#_"},
}


def write(rows: Iterable[Row], form: str) -> str:
    """The rows in one of :data:`FORMS`.

    - ``table``: a table ``Title | Date | Abstract | Comment | CodeRepository`` under each section's heading. A paper
      without abstract has its summary there, folded away under that word, so that it is read back as a summary.
    - ``daily``: a table ``Title | Authors | Summary`` under each section's heading; rows of the other form stand under
      their days. A paper without summary has its abstract there in the same way.
    - ``json``: a list of objects with the fields of :class:`Row` and ``url``.
    - ``csv``: one line a row.
    - ``bibtex``: one entry a paper, of the newest version given.

    Returns: text that ends with a newline.

    Raises: UnknownName for another form.
    """
    if form not in FORMS:
        raise unknown("form of a digest", form, FORMS, "vitkit papers export --help")
    return FORMS[form](list(rows))


def _table(rows: list[Row]) -> str:
    header = (
        "| **Title** | **Date** | **Abstract** | **Comment** | **CodeRepository** |\n| --- | --- | --- | --- | --- |\n"
    )
    return _sections(rows, lambda row: row.section, header, _table_row)


def _table_row(row: Row) -> str:
    title = f"**[{_title(row.title)}](http://arxiv.org/abs/{row.versioned_id})**"
    comment = _text(row.comment)
    if len(comment) > LONG_COMMENT:
        comment = _folded(f"{tidy(row.comment)[:FOLDED]}...", row.comment)
    abstract = _folded("Show", row.abstract) or _folded("Summary", row.summary)
    return f"| {title} | {_text(row.date)} | {abstract} | {comment} | {_code(row.code)} |\n"


def _daily(rows: list[Row]) -> str:
    header = "| Title | Authors | Summary |\n|-------|---------|---------|\n"
    return _sections(rows, _day, header, _daily_row)


def _day(row: Row) -> str:
    return row.section if row.form == "daily" else f"Papers for {row.date}" if row.date else "Papers"


def _daily_row(row: Row) -> str:
    lines = [""]
    for word in _title(row.title).split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > TITLE_WIDTH:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip(" ")
    # a line that begins with it would be a heading
    title = "\n  ".join(re.sub(r"^#", "&#35;", line) for line in lines)
    links = (
        f"(Read more on [arXiv](https://arxiv.org/abs/{row.versioned_id}) or "
        f"[HuggingFace](https://huggingface.co/papers/{row.arxiv_id}))"
    )
    summary = _text(row.summary) or _folded("Abstract", row.abstract)
    return f"| {title} {links}| {_text(', '.join(row.authors))} | {summary} |\n"


def _sections(rows: list[Row], section_of: Callable[[Row], str], header: str, line_of: Callable[[Row], str]) -> str:
    # rows without a heading come first: below one they would belong to it
    ordered = sorted(rows, key=lambda row: bool(section_of(row)))
    parts = []
    for section, members in groupby(ordered, key=section_of):
        heading = f"## {_heading(section)}\n\n" if section else ""
        parts.append(heading + header + "".join(map(line_of, members)))
    return "\n".join(parts)


def _heading(text: str) -> str:
    # hashes at the end would be taken for decoration, and so would two stars or underscores
    return re.sub(r"#(?=#*$)|(?<=\*)\*|(?<=_)_", lambda m: f"&#{ord(m[0])};", _text(text))


def _title(text: str) -> str:
    text = tidy(text)
    depth, paired = 0, True
    for bracket in re.findall(r"[\[\]]", text):
        depth += 1 if bracket == "[" else -1
        paired = paired and depth >= 0
    brackets = not paired or depth or "](" in text or "![" in text
    text = _text(text, re.compile(r"\\(?=[\[\]_*`|]|$)"))
    if brackets:
        text = text.replace("[", "&#91;").replace("]", "&#93;")
    if text.startswith(("**", "__")):
        text = f"&#{ord(text[0])};{text[1:]}"
    return text.replace("(Read more on", "&#40;Read more on")


def _text(text: str, backslash: re.Pattern[str] | None = None) -> str:
    """A plain text as part of a cell; ``backslash`` finds those that would be taken for an escape."""
    text = _ENTITY_LIKE.sub("&amp;", tidy(text))
    if backslash:
        text = backslash.sub("&#92;", text)
    text = _TAG_LIKE.sub("&lt;", text)
    return _LINK_LIKE.sub("]&#40;", text).replace("![", "!&#91;").replace("|", "\\|")


def _folded(label: str, text: str) -> str:
    body = _text(text)
    return f"<details><summary>{_text(label)}</summary><p>{body}</p></details>" if body else ""


def _code(code: str) -> str:
    if not _WEB.match(code):
        return _text(code) or "None"
    return " ".join(f"[Code Link]({_address(word)})" if _WEB.match(word) else _text(word) for word in code.split())


def _address(url: str) -> str:
    url = _ENTITY_LIKE.sub("&amp;", url)
    strange = r"[<>\[\]|\"`\\]" if _PAIRED.fullmatch(url) else r"[<>\[\]|\"`\\()]"
    return re.sub(strange, lambda m: f"%{ord(m[0]):02X}", url)


def _json(rows: list[Row]) -> str:
    return json.dumps([{**asdict(row), "url": row.url} for row in rows], indent=2, ensure_ascii=False) + "\n"


def _csv(rows: list[Row]) -> str:
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(
        ["arxiv_id", "version", "title", "date", "authors", "abstract", "summary", "comment", "code", "section", "url"]
    )
    for row in rows:
        texts = [row.arxiv_id, str(row.version or ""), row.title, row.date, ", ".join(row.authors)]
        texts += [row.abstract, row.summary, row.comment, row.code, row.section, row.url]
        lines.writerow([f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text for text in texts])
    return out.getvalue()


def _bibtex(rows: list[Row]) -> str:
    newest: dict[str, Row] = {}
    for row in rows:
        if row.arxiv_id not in newest or row.version > newest[row.arxiv_id].version:
            newest[row.arxiv_id] = row
    return "\n".join(map(_bibtex_entry, newest.values()))


def _bibtex_entry(row: Row) -> str:
    fields = {
        "title": f"{{{_tex(row.title)}}}",
        # braces keep an `and` or a comma of a name inside the name
        "author": " and ".join(
            f"{{{_tex(name)}}}" if re.search(r",|\band\b", name) else _tex(name) for name in row.authors
        ),
        "year": _year(row.arxiv_id),
        "eprint": _tex(row.arxiv_id),
        "archiveprefix": "arXiv",
        "url": row.url,
        "note": _tex(row.comment),
        "abstract": _tex(row.abstract),
    }
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    return f"@misc{{arxiv{row.arxiv_id.replace('/', '-')},\n" + ",\n".join(lines) + "\n}\n"


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in tidy(text))


def _year(arxiv_id: str) -> str:
    """Year of the first version: an id begins with it, an old one behind its archive."""
    digits = arxiv_id.rpartition("/")[2][:2]
    return ("19" if digits > "90" else "20") + digits


#: form -> its writer
FORMS: dict[str, Callable[[list[Row]], str]] = {
    "table": _table,
    "daily": _daily,
    "bibtex": _bibtex,
    "json": _json,
    "csv": _csv,
}

"""Read the two common forms of paper digests.

A Markdown library does not help here: GFM ends a row at the end of its line and splits cells at every pipe, so titles
over two lines and ``$|x|$`` come out torn, and its inline rules eat the backslashes of LaTeX. This reader knows how
many cells a row must have and where its arXiv link stands, and takes the cut that fits.

As in GFM, ``\\|`` is a pipe of the text. All cells become plain text: tags go and their text stays, entities are
decoded. Whoever shows a row must escape it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import unescape
from html.entities import html5
from pathlib import Path

from vitkit.catalogue.digests.row import Digest, Note, Row, Unreadable, tidy
from vitkit.errors import BadInput

#: a larger file is no digest, and would be held in memory several times
LIMIT_BYTES = 64 * 2**20
#: a row that goes on for longer lacks its end; without a bound it would swallow the rest of the file
ROW_LINES, ROW_CHARS = 50, 100_000
#: a file with more unreadable rows than this is something else; the others are only counted
MOST_UNREADABLE = 10_000

# UTF-32 first: its mark begins like that of UTF-16
_MARKS = (
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_COLUMNS = {
    "title": ("title", "paper", "papertitle", "titel"),
    "date": ("date", "published", "updated", "publishdate", "updatedate", "publicationdate", "day"),
    "abstract": ("abstract",),
    "summary": ("summary", "tldr"),
    "comment": ("comment", "comments", "note", "notes", "remark"),
    "code": ("coderepository", "code", "coderepo", "codelink", "repository", "repo", "github"),
    "authors": ("authors", "author"),
    "link": ("link", "links", "url", "arxiv", "arxivid", "arxivlink", "pdf", "id"),
}
_COLUMN_OF = {name: column for column, names in _COLUMNS.items() for name in names}
#: what digests write where there is no code
_NO_CODE = ("", "none", "null", "n/a", "na", "-", "--", "–", "—", "no", "no code", "[]")
#: link texts that name the target and are no title
_LABELS = {"arxiv", "huggingface", "hugging face", "hf", "abs", "abstract", "pdf", "html", "paper", "link", "code"}

_HEADING = re.compile(r" {0,3}#{1,6}(?=[ \t]|$)")
_ID = re.compile(
    r"(?:\barxiv\.org/(?:abs|pdf|html|format|ps|src)/|\barxiv:\s*|\bhuggingface\.co/papers/|"
    r"\balphaxiv\.org/(?:abs|overview)/)"
    r"(\d{4}\.\d{4,5}|[a-z-]+(?:\.[a-z]{2})?/\d{7})(?:v(\d{1,4}))?(?!\d)",
    re.IGNORECASE,
)
_DATE = re.compile(r"(?<!\d)(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?!\d)")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DATE_IN_WORDS = re.compile(
    r"(?:(\d{1,2})\.? +)?([a-z]{3,9})\.? +(?:(\d{1,2})(?:st|nd|rd|th)?,? +)?(\d{4})", re.IGNORECASE
)

# the rule of pandoc keeps prices apart from math: no space inside the dollars, no digit after them
_MATH = r"\$\$[^$]+\$\$|\$(?!\s)(?:\\.|[^$\\])*+(?<!\s)\$(?!\d)"
_PIECES = re.compile(
    rf"(?P<escaped>\\[|$])|(?P<open><details\b[^<>]*>)|(?P<close></details\s*>)|(?P<math>{_MATH})"
    r"|(?P<span>`[^`]+`)|(?P<pipe>\|)",
    re.IGNORECASE | re.DOTALL,
)
#: the first letters of these: finding them before anything is matched makes reading four times as fast
_SPECIAL = re.compile(r"[\\<$`|]")
#: what a pipe is safe in, from the strictest reading of a row to the plainest
_READINGS = (("open", "math", "span"), ("open", "math"), ("open",), ("math",), ())
_RULE = frozenset("|-: \t")
_DETAILS = re.compile(r"<(/?)details\b", re.IGNORECASE)

_LINK_END = re.compile(r"\]\(\s*<?((?:[^\s()<>]|\([^\s()<>]*\))++)>?(?:\s+\"[^\"]*\")?\s*\)")
_WEB = re.compile(r"(?:https?:)?//|www\.|arxiv\.org/", re.IGNORECASE)
_URL = re.compile(r"https?://[^\s<>|\"']+", re.IGNORECASE)
_LABELLED = re.compile(
    r"\s*<details\b[^<>]*>\s*<summary\b[^<>]*>((?:(?!</?summary\b).)*)</summary\s*>", re.I | re.DOTALL
)

_COMMENT = re.compile(r"<!--(?:(?!<!--|-->).)*-->", re.DOTALL)
_TAG = re.compile(
    r"</?([a-z][a-z0-9]*)((?:\s+[a-z_:@][\w:.@-]*+(?:\s*=\s*(?:\"[^\"<]*\"|'[^'<]*'|[^\s\"'=<>`]+))?)*+)\s*/?>",
    re.IGNORECASE,
)
#: tags inside a word, so to say; any other known one parts words
_INLINE = re.compile(
    r"a|abbr|b|bdi|bdo|big|cite|code|del|em|font|i|img|ins|kbd|mark|math|nobr|q|s|samp|small|span|strike|strong|sub|sup|"
    r"svg|time|tt|u|var|wbr"
)
_BLOCK = re.compile(
    r"article|aside|audio|base|blockquote|body|br|button|caption|center|dd|details|div|dl|dt|embed|fieldset|figcaption|"
    r"figure|footer|form|frame|frameset|h[1-6]|head|header|hr|html|iframe|input|label|li|link|main|meta|nav|noscript|"
    r"object|ol|option|p|param|path|picture|pre|script|section|select|source|style|summary|table|tbody|td|template|"
    r"textarea|tfoot|th|thead|title|tr|track|ul|video"
)
#: attributes without a value; other lone words show that what looks like a tag is none
_FLAGS = re.compile(
    r"async|autofocus|autoplay|checked|controls|defer|disabled|hidden|loop|muted|open|readonly|required"
)
_HTML = re.compile(
    r"\ufeff?(?:\s|<\?xml[^>]*>|<!--(?:(?!-->).)*-->)*+<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
_HTML_TABLE = re.compile(r"\s*<table\b", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")


def read_file(path: str | os.PathLike[str]) -> Digest:
    """Read a digest file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Raises: BadInput if there is no such file, it is larger than 64 MiB, is no text, or holds no digest; the message
        names the file and what to do. A file with rows that cannot be read raises nothing: see ``Digest.unreadable``.
    """
    source = os.fspath(path)
    try:
        with Path(path).open("rb") as stream:
            # not by the size on file: a pipe has none
            content = stream.read(LIMIT_BYTES + 1)
    except IsADirectoryError as error:
        raise BadInput(f"{source} is a folder; name the digest files in it.") from error
    except FileNotFoundError as error:
        raise BadInput(f"There is no file {source}.") from error
    except OSError as error:
        raise BadInput(f"{source} cannot be read: {error.strerror}.") from error
    if len(content) > LIMIT_BYTES:
        raise BadInput(
            f"{source} is larger than {LIMIT_BYTES // 2**20} MiB, which no digest is; if it really is one, split it "
            "at its headings and import the pieces."
        )
    digest = read(_decode(content, source), source)
    if not digest.rows and not digest.unreadable:
        raise BadInput(
            f"{source} holds no digest: nothing in it is a Markdown table with a header such as "
            "`| Title | Date | Abstract | Comment | CodeRepository |` or `| Title | Authors | Summary |`."
        )
    return digest


def read(text: str, source: str = "") -> Digest:
    """Read a digest.

    Args:
        text: Markdown with tables in either form, under headings. Columns are known by their names, in any order.
        source: name of the file, for messages.

    Returns: what was read, and what was not, with line numbers; nothing is left out without a word.

    Raises: BadInput if the text is an HTML page, or has thousands of rows and none that can be read.
    """
    if _HTML.match(text):
        raise BadInput(
            f"{source or 'The text'} is an HTML page, not Markdown: save the raw file instead "
            "(on a code host, the button Raw)."
        )
    reading = _Reading(source)
    lines = re.split(r"\r\n|\n|\r", text.removeprefix("\ufeff"))
    for number, line in enumerate(lines, 1):
        reading.line(number, line, lines[number] if number < len(lines) else "")
    return reading.end()


@dataclass
class _Reading:
    """The state between two lines."""

    source: str
    section: str = ""
    #: fields of the current table; None before the first header, empty in a table of something else
    columns: tuple[str, ...] | None = None
    closed: bool = True  # rows of the current table end with a pipe
    touching: bool = False  # the line before was of the table
    start: int = 0
    open: list[str] = field(default_factory=list)
    chars: int = 0
    foreign: tuple[int, str] | None = None
    foreign_rows: int = 0
    rows: list[Row] = field(default_factory=list)
    unreadable: list[Unreadable] = field(default_factory=list)
    not_listed: int = 0
    notes: list[Note] = field(default_factory=list)

    def line(self, number: int, line: str, following: str) -> None:
        if self.open:
            if self._goes_on(line):
                self._take(line)
                return
            self._close(cut=not line.lstrip().startswith("|"))
        heading = _HEADING.match(line)
        if heading:
            self._end_foreign()
            name = re.sub(r"(?:^|[ \t])#+$", "", line[heading.end() :].strip(" \t"))
            self.section, self.columns, self.touching = plain(re.sub(r"\*\*|__", "", name)), None, False
            return
        frameless = "|" in line and (self.touching or _is_rule(following, line))
        if not frameless and not line.lstrip().startswith("|"):
            self.touching = False
            if _HTML_TABLE.match(line):
                self._refuse(number, line, "an HTML table; only Markdown tables are read")
            return
        self.touching = True
        if self.columns is not None and _is_rule(line):
            return
        if _is_header(line):
            self._header(number, line)
        elif _is_rule(following, line):
            self._end_foreign()
            self.columns, self.foreign, self.foreign_rows = (), (number, line), 0
        elif self.columns is None:
            self._refuse(number, line, "no header above this row, such as | Title | Authors | Summary |")
        elif not self.columns:
            self.foreign_rows += 1
        else:
            self.start, self.chars = number, 0
            self._take(line)

    def end(self) -> Digest:
        if self.open:
            self._close(cut=True)
        self._end_foreign()
        self.unreadable.sort(key=lambda u: u.line)
        if self.not_listed:
            reason = f"{self.not_listed:,} more rows in this file could not be read"
            last = self.unreadable[-1].line
            self.unreadable.append(Unreadable(source=self.source, line=last, reason=reason))
        return Digest(
            rows=tuple(self.rows), unreadable=tuple(self.unreadable), notes=tuple(self.notes), source=self.source
        )

    def _header(self, number: int, line: str) -> None:
        self._end_foreign()
        columns: list[str] = []
        strange = []
        for name in _split(line, ()):
            column = _column(name)
            if not column or column in columns:
                strange.append(repr(plain(name)))
                column = ""
            columns.append(column)
        if strange:
            self._note(number, f"not kept of this table: column {', '.join(strange)}")
        self.columns, self.closed = tuple(columns), _ends(line)

    def _goes_on(self, line: str) -> bool:
        """Does the line belong to the row that is open?"""
        if _HEADING.match(line):
            return False
        if len(self.open) >= ROW_LINES or self.chars > ROW_CHARS:
            return False
        if not line.strip(" \t\f\v"):
            return _depth("\n".join(self.open)) > 0
        if not line.lstrip().startswith("|"):
            return True
        # a cell may have been broken just before a pipe; but a row of its own has its link in the first cell
        cells = _split(line, _READINGS[0])
        if not cells or _is_rule(line) or not _ends(line) or _ID.search(cells[0]):
            return False
        return len(_split("\n".join(self.open), _READINGS[0])) + len(cells) == len(self.columns or ())

    def _take(self, line: str) -> None:
        self.open.append(line)
        self.chars += len(line) + 1
        if self.chars > ROW_CHARS or (self.closed and not _ends(line)):
            return
        text = "\n".join(self.open)
        cells = _split(text, _READINGS[0])
        if _depth(text) <= 0 and len(cells) >= len(self.columns or ()):
            self._close(cut=False, strict=cells)

    def _close(self, cut: bool, strict: list[str] | None = None) -> None:
        text, self.open = "\n".join(self.open), []
        columns = self.columns or ()
        if self.chars > ROW_CHARS:
            self._refuse(self.start, text, f"the row is longer than {ROW_CHARS:,} characters; is its end missing?")
            return
        ended = _ends(text)
        # where rows end with a pipe, one without it at the end of its table was cut off
        strict = strict or _split(text, _READINGS[0])
        cells = None if cut and self.closed and not ended else _cells(text, columns, strict)
        if cells is None or (len(cells) < len(columns) and not ended):
            found = len(strict)
            if found > len(columns):
                reason = rf"{found} cells where the header has {len(columns)}; a | inside a cell is written \|"
            else:
                reason = f"the row stops in its {_nth(found)} cell of {len(columns)}, without a | at the end"
            self._refuse(self.start, text, reason)
            return
        self._read(dict(zip(columns, cells)), text)

    def _read(self, cells: dict[str, str], text: str) -> None:
        title, arxiv_id, version = _title(cells.get("title", ""))
        if not arxiv_id:
            _, arxiv_id, version = _title(cells.get("link", ""))
        if not arxiv_id:
            self._refuse(self.start, text, "no arXiv address beside the title")
            return
        if not title:
            self._refuse(self.start, text, "no title")
            return
        columns = self.columns or ()
        daily = "abstract" not in columns and ("summary" in columns or "authors" in columns)
        date = _date(cells.get("date", ""))
        if plain(cells.get("date", "")) and not date:
            self._note(self.start, f"date {plain(cells['date'])!r} is not kept: it is not like 2025-03-27")
        if "date" not in cells:
            date = _date(self.section)
        texts = {"abstract": "", "summary": ""}
        for column in texts:
            label, body = _labelled(cells.get(column, ""))
            # a digest written in the other form says in its label what it puts here
            if body:
                texts[label if label in texts else column] = body
        self.rows.append(
            Row(
                arxiv_id=arxiv_id,
                version=version,
                title=title,
                date=date,
                **texts,
                comment=_labelled(cells.get("comment", ""))[1],
                code=_code(cells.get("code", "")),
                authors=tuple(filter(None, (name.strip(" ") for name in plain(cells.get("authors", "")).split(",")))),
                section=self.section,
                form="daily" if daily else "table",
                source=self.source,
                line=self.start,
            )
        )

    def _end_foreign(self) -> None:
        if self.foreign is not None:
            number, line = self.foreign
            self._refuse(number, line, f"a table of {self.foreign_rows} rows without a column Title")
            self.foreign = None

    def _refuse(self, number: int, text: str, reason: str) -> None:
        if len(self.unreadable) < MOST_UNREADABLE:
            self.unreadable.append(Unreadable(source=self.source, line=number, reason=reason, text=text))
        elif self.rows:
            self.not_listed += 1
        else:
            raise BadInput(
                f"{self.source or 'The text'} is no digest: of more than {MOST_UNREADABLE:,} rows of tables none could "
                f"be read, to begin with line {self.unreadable[0].line}: {self.unreadable[0].reason}."
            )

    def _note(self, number: int, reason: str) -> None:
        self.notes.append(Note(source=self.source, line=number, reason=reason))


def plain(text: str) -> str:
    r"""The text of a cell on one line: tags gone, their text kept, entities decoded, ``\|`` a pipe.

    Only what is clearly a tag of HTML goes; ``a<b and c>d`` stays as it is.

    >>> plain("x<sup>2</sup> &amp; <script>alert(1)</script> for CNN<ViT")
    'x2 & alert(1) for CNN<ViT'
    """
    return _text(text.replace("\\|", "|"))


def _text(text: str) -> str:
    if "<" in text:
        text = _TAG.sub(_without_tag, _COMMENT.sub("", text))
    if "&" in text:
        text = _ENTITY.sub(_decoded, text)
    return tidy(text)


def _without_tag(match: re.Match[str]) -> str:
    name = match[1].lower()
    bare = re.sub(r"\s*=\s*(?:\"[^\"]*\"|'[^']*'|\S+)", "=", match[2]).split()
    if any(not word.endswith("=") and not _FLAGS.fullmatch(word.lower()) for word in bare):
        return match[0]
    return " " if _BLOCK.fullmatch(name) else "" if _INLINE.fullmatch(name) else match[0]


def _decoded(match: re.Match[str]) -> str:
    entity = match[0]
    return unescape(entity) if entity[1] == "#" or entity[1:] in html5 else entity


def _depth(text: str) -> int:
    """How many ``<details>`` are open at the end."""
    return sum(-1 if end else 1 for end in _DETAILS.findall(text)) if "<" in text else 0


def _ends(text: str) -> bool:
    """Does the text end with a pipe that is not escaped?"""
    end = text.rstrip()
    return end.endswith("|") and not end.endswith("\\|")


def _is_rule(line: str, header: str = "") -> bool:
    """Is the line the rule of dashes under a header, with as many cells as ``header`` where one is given?"""
    # a line of dashes alone would be the underline of a heading
    if "-" not in line[:80] or "|" not in line or (header and "|" not in header):
        return False
    # the beginning first, for most lines are long rows
    if not set(line[:80]) <= _RULE or not set(line) <= _RULE:
        return False
    return not header or len(_split(line, ())) == len(_split(header, ()))


def _column(name: str) -> str:
    return _COLUMN_OF.get(re.sub(r"[\W_]+", "", plain(name)).lower(), "")


def _is_header(line: str) -> bool:
    return len(line) <= 500 and not _ID.search(line) and "title" in map(_column, _split(line, ()))


def _split(text: str, safe: tuple[str, ...]) -> list[str]:
    """Cut a row at its pipes, except those in the named places."""
    cells, start, depth = [], 0, 0
    for piece in _pieces(text, safe):
        if piece.lastgroup == "pipe":
            if depth <= 0:
                cells.append(text[start : piece.start()])
                start = piece.end()
        elif "open" in safe and piece.lastgroup in ("open", "close"):
            depth += 1 if piece.lastgroup == "open" else -1
    last = text[start:]
    # the pipes at either end are a frame and no cells
    if cells and not cells[0].strip():
        del cells[0]
    return cells if not last.strip() and start else [*cells, last]


def _pieces(text: str, safe: tuple[str, ...]) -> Iterator[re.Match[str]]:
    position = 0
    while special := _SPECIAL.search(text, position):
        piece = _PIECES.match(text, special.start())
        if piece is None:
            position = special.end()
            continue
        skipped = piece.lastgroup in ("math", "span") and piece.lastgroup not in safe
        # a span that is not to be believed in counts for one character, and what it covers is looked at again
        position = piece.start() + 1 if skipped else piece.end()
        if not skipped:
            yield piece


def _cells(text: str, columns: tuple[str, ...], strict: list[str]) -> list[str] | None:
    """The cells of a row, by the strictest reading that fits; None if there are too many in all of them.

    A row that ends early by design has fewer cells than columns. ``strict`` is the first of the readings.
    """
    readings: list[list[str]] = []
    for safe in _READINGS:
        cells = _split(text, safe) if readings else strict
        if len(cells) == len(columns) and _plausible(cells, columns):
            return cells
        readings.append(cells)
    fitting = [cells for cells in readings if len(cells) == len(columns)]
    for cells in readings:
        joined = _joined(cells, columns) if len(cells) > len(columns) else None
        if joined is not None:
            return joined
    if fitting:
        return fitting[0]
    return next((cells for cells in reversed(readings) if len(cells) < len(columns)), None)


def _joined(cells: list[str], columns: tuple[str, ...]) -> list[str] | None:
    """Put cells together that belong to one column but were torn at pipes of its text."""
    first = columns.index("title")
    linked = [i for i, cell in enumerate(cells) if _ID.search(cell)] or [first]
    # pipes in an abstract that is folded away cut nothing, so the comment has them; else the abstract is longer
    folded = any(_LABELLED.match(cell) for cell in cells)
    texts = ("comment", "abstract", "summary", "authors") if folded else ("abstract", "summary", "comment", "authors")
    # the title goes as far as its link, or as the last of its links
    for end in (linked[0], linked[-1]):
        if not 0 <= end - first <= len(cells) - len(columns):
            continue
        titled = _join(cells, first, end - first)
        for column in texts if len(titled) > len(columns) else ("title",):
            if column in columns:
                whole = _join(titled, columns.index(column), len(titled) - len(columns))
                if _plausible(whole, columns):
                    return whole
    return None


def _join(cells: list[str], at: int, extra: int) -> list[str]:
    return [*cells[:at], "|".join(cells[at : at + extra + 1]), *cells[at + extra + 1 :]]


def _plausible(cells: list[str], columns: tuple[str, ...]) -> bool:
    """Does every cell look like what its column is for?"""
    for column, cell in zip(columns, cells):
        if column == "title" and "link" not in columns and not _ID.search(cell):
            return False
        if column == "date" and cell.strip() and not _date(cell):
            return False
        if column == "code" and not (_links(cell) or _URL.search(cell) or plain(cell).lower() in _NO_CODE):
            return False
        if _depth(cell) != 0:
            return False
    return True


@dataclass(frozen=True)
class _Link:
    start: int
    end: int
    text: str
    url: str


def _links(cell: str) -> list[_Link]:
    """Markdown links to the web, whose texts may hold brackets."""
    found: list[_Link] = []
    floor = 0
    for match in _LINK_END.finditer(cell):
        if not _WEB.match(match[1]):
            # what looks like a link inside a title is part of it
            continue
        depth, start = 1, -1
        brackets = list(re.finditer(r"(?<!\\)[\[\]]", cell[floor : match.start()]))
        for bracket in reversed(brackets):
            depth += 1 if bracket[0] == "]" else -1
            if depth == 0:
                start = floor + bracket.start()
                break
        else:
            # brackets that do not pair: the link's own is the first
            start = next((floor + b.start() for b in brackets if b[0] == "["), -1)
        if start >= 0:
            found.append(_Link(start, match.end(), cell[start + 1 : match.start()], plain(match[1])))
        floor = match.end()
    return found


def _title(cell: str) -> tuple[str, str, int]:
    """Title, arXiv id and version of a title's cell."""
    links = _links(cell)
    ids = [(link, m) for link in links if (m := _ID.search(link.url))]
    if ids:
        # a title may cite another paper: its own link is the first if the cell begins with it, else the last
        own = ids[0] if cell.lstrip(" *_").startswith("[") else ids[-1]
        arxiv_id = own[1][1]
        version = max(int(m[2] or 0) for _, m in ids if m[1] == arxiv_id)
    else:
        bare = _ID.search(cell)
        arxiv_id, version = (bare[1], int(bare[2] or 0)) if bare else ("", 0)
    more = cell.rfind("(Read more on")
    text, start = "", 0
    for link in links:
        if 0 <= more < link.start:
            break
        label = tidy(link.text).lower()
        is_label = label in _LABELS or bool(re.fullmatch(r"(?:arxiv:)?[\d.]+(?:v\d+)?", label))
        text += cell[start : link.start] + ("" if is_label else link.text)
        start = link.end
    text += cell[start : more if more >= 0 else len(cell)]
    if not ids and arxiv_id:
        text = re.sub(r"\(?(?:https?://(?:www\.)?)?" + _ID.pattern + r"(?:\.pdf)?\)?", "", text, flags=re.IGNORECASE)
    title = _title_text(text)
    if not title and ids:
        title = _title_text(ids[0][0].text)
    return title, arxiv_id, version


def _title_text(text: str) -> str:
    bold = re.fullmatch(r"\s*(\*\*|__)(.*)\1\s*", text, re.DOTALL)
    return _text(re.sub(r"\\([\[\]*_`|])", r"\1", bold[2] if bold else text))


def _labelled(cell: str) -> tuple[str, str]:
    """The label of a cell that folds its text away, in small letters, and the text."""
    match = _LABELLED.match(cell)
    if not match:
        return "", plain(cell)
    label, body = plain(match[1]), plain(cell[match.end() :])
    begins = re.sub(r"\s*(?:\.\.\.|…)$", "", label)
    if label.lower() in ("show", "abstract", "summary", "more", "details", "comment", "show more", "read more"):
        return label.lower(), body
    # the label is the beginning of the text, or it says something of its own
    return "", body if begins != label and body.startswith(begins) else tidy(f"{label} {body}")


def _code(cell: str) -> str:
    urls = [link.url for link in _links(cell)] or [plain(url) for url in _URL.findall(cell)]
    urls = [url for url in urls if _URL.match(url)]
    if urls:
        return " ".join(dict.fromkeys(urls))
    text = plain(cell)
    return "" if text.lower() in _NO_CODE else text


def _date(cell: str) -> str:
    """The first date in a text as ``YYYY-MM-DD``, or the empty string."""
    if match := _DATE.search(cell):
        year, month, day = (int(part) for part in match.groups())
    elif (match := _DATE_IN_WORDS.search(cell)) and match[2][:3].lower() in _MONTHS and (match[1] or match[3]):
        year, month, day = int(match[4]), _MONTHS.index(match[2][:3].lower()) + 1, int(match[1] or match[3])
    else:
        return ""
    return f"{year:04}-{month:02}-{day:02}" if 1 <= month <= 12 and 1 <= day <= 31 else ""


def _decode(content: bytes, source: str) -> str:
    marked = (encoding for mark, encoding in _MARKS if content.startswith(mark))
    encoding = next(marked, "utf-8")
    # UTF-16 without its mark has a zero in every second byte
    if encoding == "utf-8" and (b"\x00" in content[:4096] or content.startswith((b"%PDF", b"PK\x03\x04", b"\x1f\x8b"))):
        raise BadInput(
            f"{source} is no text file, or one in UTF-16 without a byte order mark; name a Markdown file in UTF-8."
        )
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start
        line = content.count(b"\n", 0, at) + 1
        raise BadInput(
            f"{source} is not valid {encoding.upper()}: byte {at} (0x{content[at]:02X}, line "
            f"{line}) does not fit. Save it as UTF-8 and import it again; a Windows file becomes that by "
            "`iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`."
        ) from error


def _nth(number: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(number, f"{number}th")

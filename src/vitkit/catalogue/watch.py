"""A digest of several queries, made anew every day.

What a watch has listed it remembers in a file beside its own, ``NAME.state.json``, so that a digest has only what no
earlier one had: by the day of submission alone papers would be missed, for arXiv shows them days later.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from vitkit.catalogue.arxiv_feed import Feed, Range, build_query, parse_since
from vitkit.catalogue.digests import Digest, Row, read_file, write
from vitkit.catalogue.digests.row import tidy
from vitkit.catalogue.fetches import FIRST, LAG
from vitkit.catalogue.library import Library, Merged
from vitkit.errors import BadInput, VitkitError
from vitkit.files import write_text
from vitkit.yaml_settings import Strict, line_of, read_mapping

if TYPE_CHECKING:
    from vitkit.catalogue.summaries import Writer

_FORMAT = 1


class SectionSettings(Strict):
    """A heading and what is looked for under it."""

    name: str = Field(description="the heading")
    query: str = Field("", description="as for `vitkit papers fetch --query`")
    category: list[str] = Field(default_factory=list, description="a name or a list: the paper is in one of them")
    limit: int | None = Field(None, ge=1, description="papers in one digest at most, the newest")

    @field_validator("name")
    @classmethod
    def _one_line(cls, value: str) -> str:
        if not tidy(value):
            raise ValueError("a heading must have words")
        return tidy(value)

    @field_validator("category", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _asks_for_something(self) -> SectionSettings:
        build_query(self.query, self.category)
        return self


class WatchSettings(Strict):
    """A watch file."""

    title: str = Field("Papers", description="the digest's")
    out: str = Field(description="the digest, relative to this file; {date} becomes the day")
    form: Literal["table", "daily"] = Field("table", description="of the digest")
    since: str | None = Field(
        None, description="papers submitted from then on, like 7d or 2025-05-01; null: those that no digest has had"
    )
    sections: list[SectionSettings] = Field(min_length=1)
    import_: bool = Field(True, alias="import", description="take the papers into the library as well")

    @field_validator("since", mode="before")
    @classmethod
    def _moment(cls, value: Any) -> Any:
        # a day without quotes is a date to YAML
        value = value.isoformat() if isinstance(value, date) else value
        if isinstance(value, str):
            parse_since(value, datetime.now(UTC))
        return value

    @field_validator("sections")
    @classmethod
    def _named_once(cls, value: list[SectionSettings]) -> list[SectionSettings]:
        names = [section.name.casefold() for section in value]
        for section in value:
            if names.count(section.name.casefold()) > 1:
                raise ValueError(f"two sections are called {section.name!r}")
        return value


@dataclass(frozen=True, kw_only=True)
class Part:
    """What became of one section.

    Attributes:
        name: its heading.
        found: papers that arXiv has.
        listed: papers in the digest that were in none before.
        left_out: papers beyond the section's limit.
        error: why it could not be fetched; empty if it was.
    """

    name: str
    found: int = 0
    listed: tuple[Row, ...] = ()
    left_out: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a watch did.

    Attributes:
        parts: one a section.
        out: the digest; None if nothing was to be written.
        merged: what became of the papers in the library; None if they do not go there.
        unsummarised: of papers that should have got a summary and did not, the id and the reason.
    """

    parts: tuple[Part, ...]
    out: Path | None
    merged: Merged | None
    unsummarised: tuple[str, ...] = ()


@dataclass(kw_only=True)
class _State:
    """``until``: query -> when it was last asked; ``listed``: arXiv id -> day of its digest; ``written``: last day."""

    until: dict[str, datetime] = field(default_factory=dict)
    listed: dict[str, str] = field(default_factory=dict)
    written: str = ""


def read_watch(path: Path) -> WatchSettings:
    """Read a watch file.

    Raises: BadInput naming the file, line or key, the value, and the nearest allowed name.
    """
    raw, text = read_mapping(path, "watch", _keys(WatchSettings))
    try:
        return WatchSettings.model_validate(raw)
    except ValidationError as error:
        raise BadInput("\n".join(_explain(item, path, text) for item in error.errors()[:5])) from error


def queries(settings: WatchSettings) -> dict[str, str]:
    """Section -> its query in arXiv's words."""
    return {section.name: build_query(section.query, section.category) for section in settings.sections}


def watch(
    file: Path,
    settings: WatchSettings,
    feed: Feed,
    now: datetime,
    progress: Callable[[str, int, int], None] | None = None,
    writer: Writer | None = None,
) -> Watched:
    """Fetch all sections and write their digest; a section that fails does not hold up the others.

    A paper stands under the first section that finds it, and under all of them in the library. Without ``since`` it
    stands in one digest only, and a second one on the same day has the papers of the first as well.

    Args:
        file: that the settings were read from; the digest's path is relative to it.
        now: UTC.
        progress: called with a section, its papers that have arrived, and how many it has.
        writer: of summaries of what is listed (:func:`vitkit.catalogue.summaries.summarise`); they stand in a digest of
            the daily form, and in the library. A digest is written without those that it cannot give.

    Raises: BadInput if the state beside the file or the digest of the same day cannot be read; VitkitError if the
        digest or the library cannot be written.
    """
    state_file, today = file.with_suffix(".state.json"), f"{now:%Y-%m-%d}"
    out = file.parent / settings.out.replace("{date}", today)
    rolling = settings.since is not None
    state = _State() if rolling else _read_state(state_file)
    again = state.written == today and out.exists()
    earlier = list(read_file(out).rows) if again else []
    taken = {row.arxiv_id for row in earlier}
    parts, found = [], []
    asked = queries(settings)
    for section in settings.sections:
        query = asked[section.name]
        if settings.since is not None:
            first = parse_since(settings.since, now)
        else:
            first = state.until[query] - LAG if query in state.until else now - FIRST
        wanted = Range(first=first.replace(second=0, microsecond=0), last=now.replace(second=0, microsecond=0))
        rows: list[Row] = []
        left = 0
        try:
            # of what was listed before nobody knows how much there is
            for page in feed.pages(query, wanted, section.limit if rolling else None):
                rows += page.rows
                left = page.left
                if progress:
                    progress(section.name, len(rows), len(rows) + left)
        except VitkitError as error:
            parts.append(Part(name=section.name, error=str(error)))
            continue
        rows = [replace(row, section=section.name) for row in rows]
        found += rows
        fresh = [row for row in rows if row.arxiv_id not in taken and row.arxiv_id not in state.listed]
        listed = fresh[: section.limit]
        taken |= {row.arxiv_id for row in listed}
        parts.append(
            Part(name=section.name, found=len(rows), listed=tuple(listed), left_out=len(fresh) - len(listed) + left)
        )
        state.until[query] = now
    merged = None
    if settings.import_ and found:
        with Library() as library:
            merged = library.merge(Digest(rows=tuple(found), source="arXiv"))
    listed_now = [row for part in parts for row in part.listed]
    reasons: list[str] = []
    if writer is not None and listed_now:
        listed_now = _summarised(listed_now, writer, merged is not None, reasons)
    new = [_headed(row, settings.form, today) for row in listed_now]
    if new:
        text = write(_ordered(settings, today, [*new, *earlier]), settings.form)
        write_text(out, f"# {tidy(settings.title)}, {today}\n\n{text}")
    if not rolling and not all(part.error for part in parts):
        state.listed |= {row.arxiv_id: today for row in new}
        state.written = today if new else state.written
        state.until = {query: moment for query, moment in state.until.items() if query in asked.values()}
        _write_state(state_file, state)
    return Watched(parts=tuple(parts), out=out if new else None, merged=merged, unsummarised=tuple(reasons))


def _summarised(rows: list[Row], writer: Writer, keep: bool, reasons: list[str]) -> list[Row]:
    from vitkit.catalogue.summaries import summarise

    made: dict[str, Row] = {}
    try:
        summarise(
            rows,
            writer,
            keep=lambda row: made.update({row.arxiv_id: row}),
            failed=lambda row, reason: reasons.append(f"{row.arxiv_id}: {reason}"),
        )
    except VitkitError as error:
        reasons.append(str(error))
    if keep:
        with Library() as library:
            for row in made.values():
                library.set_summary(row.arxiv_id, row.summary)
    return [made.get(row.arxiv_id, row) for row in rows]


def _heading(name: str, form: str, today: str) -> str:
    # the reader of digests takes the first date of a heading for that of its papers
    return name if form == "table" else f"Papers for {today}: {name}"


def _headed(row: Row, form: str, today: str) -> Row:
    if form == "table":
        return row
    return replace(row, form=form, section=_heading(row.section, form, today), date=today)


def _ordered(settings: WatchSettings, today: str, rows: list[Row]) -> list[Row]:
    """By section, in the order of the settings; what is of none of them comes last."""
    headings = [_heading(section.name, settings.form, today) for section in settings.sections]
    headings += dict.fromkeys(row.section for row in rows if row.section not in headings)
    under = [[row for row in rows if row.section == heading] for heading in headings]
    return [replace(row, form=settings.form) for row in chain.from_iterable(under)]


def _read_state(file: Path) -> _State:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            raise ValueError(f"its format is {found['format']}, this vitkit knows {_FORMAT}")
        until = {query: datetime.fromisoformat(moment).astimezone(UTC) for query, moment in found["until"].items()}
        return _State(until=until, listed=dict(found["listed"]), written=found["written"])
    except FileNotFoundError:
        return _State()
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BadInput(
            f"What was listed before, {file}, cannot be read ({error}). Remove the file: the next digest then has the "
            f"papers of {FIRST.days} days."
        ) from error


def _write_state(file: Path, state: _State) -> None:
    # what was listed before the earliest time that is asked for again cannot come back
    horizon = f"{min(state.until.values(), default=datetime.now(UTC)) - LAG - timedelta(days=1):%Y-%m-%d}"
    kept = {
        "format": _FORMAT,
        "written": state.written,
        "until": {query: f"{moment:%Y-%m-%dT%H:%MZ}" for query, moment in state.until.items()},
        "listed": {arxiv_id: day for arxiv_id, day in state.listed.items() if day >= horizon},
    }
    write_text(file, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")


def _keys(model: type[Strict]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _explain(item: Any, path: Path, text: str) -> str:
    keys = [str(key) for key in item["loc"]]
    key = ".".join(keys)
    line = line_of(keys[-1], text) if keys else ""
    if item["type"] == "extra_forbidden":
        known = _keys(SectionSettings if keys[0] == "sections" else WatchSettings)
        near = difflib.get_close_matches(keys[-1], known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{path}{line}: unknown key {key!r}.{hint} Allowed here: {', '.join(known)}."
    if item["type"] == "missing":
        return f"{path}: {key} is missing."
    given = item.get("input")
    shown = "" if isinstance(given, dict | list) else f" = {given!r}"
    return f"{path}{line}: {key}{shown}: {item['msg'].removeprefix('Value error, ').rstrip('.')}."

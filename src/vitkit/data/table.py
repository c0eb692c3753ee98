"""A CSV or Parquet table of paths and labels."""

from __future__ import annotations

import csv
import io
import math
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vitkit.data.decode import EXTENSIONS
from vitkit.data.folder import SPLIT_NAMES, Listing
from vitkit.data.labels import (
    NOT_LABELLED,
    Unknown,
    class_names,
    looks_continuous,
    natural,
    numbers,
    settle,
    some,
    to_number,
    unlabelled,
)
from vitkit.data.source import Record, Skipped, Split, Task
from vitkit.data.tree import Tree
from vitkit.errors import BadInput, MissingExtra

TABLE_ENDINGS = (".csv", ".tsv", ".parquet")

_NAMES = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path"),
    "label": ("label", "labels", "class", "target"),
    "group": ("group", "patient", "patient_id", "patientid", "subject", "subject_id", "subjectid"),
    "split": ("split", "set", "subset"),
    "weight": ("weight", "sample_weight"),
}

# the word for "no class applies" in a multilabel table; an empty cell could also be a forgotten one
_NONE = "none"


@dataclass(frozen=True)
class Columns:
    """Which columns to use; None: the usual names (``path``, ``label``, ``group``, ``split``, ``weight``)."""

    path: str | None = None
    label: str | Sequence[str] | None = None
    group: str | None = None
    split: str | None = None
    weight: str | None = None


@dataclass(frozen=True)
class Table:
    """Cells as text, missing ones empty, with what to call each row in a message."""

    name: str
    columns: list[str]
    rows: list[dict[str, str]]
    row_names: list[str]


def read_table(data: bytes, name: str) -> Table:
    """Read CSV, TSV or Parquet.

    Raises: BadInput for a table that is empty, not UTF-8, or has rows of another length. MissingExtra for Parquet
        without pyarrow.
    """
    if name.lower().endswith(".parquet"):
        return _parquet(data, name)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error
    if "\0" in text[:4096]:
        raise BadInput(f"{name} holds binary data, not a table; save it as CSV text.")
    head = text.split("\n", 1)[0]
    # ";" is last: it also separates the labels of one image
    delimiter = max(",\t;", key=head.count)
    lines = csv.reader(io.StringIO(text), delimiter=delimiter)
    try:
        header = [c.strip() for c in next(lines)]
        body, numbers_of = [], []
        for cells in lines:
            if any(c.strip() for c in cells):
                body.append(cells)
                numbers_of.append(lines.line_num)
    except StopIteration:
        raise BadInput(f"{name} is empty; its first line must name the columns, such as path,label.") from None
    except csv.Error as error:
        raise BadInput(f"{name} is no readable table (line {lines.line_num}: {error}).") from error
    wrong = [n for cells, n in zip(body, numbers_of) if len(cells) != len(header)]
    if wrong:
        raise BadInput(
            f"{name}: the header has {len(header)} columns, but another number of cells is in line "
            f"{some([str(n) for n in wrong])}. Quote cells that contain {delimiter!r}."
        )
    rows = [dict(zip(header, (c.strip() for c in cells))) for cells in body]
    return Table(name, header, rows, [f"line {n}" for n in numbers_of])


def _parquet(data: bytes, name: str) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("Reading Parquet tables", "pyarrow", "tables") from error
    try:
        content = pyarrow.parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{name} is no readable Parquet file ({str(error).splitlines()[0]}).") from error
    rows = [{k: _cell(v) for k, v in row.items()} for row in content.to_pylist()]
    return Table(name, list(content.column_names), rows, [f"row {i}" for i in range(len(rows))])


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, (list, tuple)):
        return ";".join(_cell(v) for v in value) or _NONE
    return str(value).strip()


def usable(table: Table) -> bool:
    """True if the table has a column of paths and one of labels under the usual names."""
    return _find(table, "path") is not None and bool(_label_columns(table, Columns()))


def list_table(
    table: Table, tree: Tree, base: str, task: Task | None, columns: Columns, unknown: Unknown | None = None
) -> tuple[Listing, Task]:
    """Records of a table, in its own order.

    Args:
        table: what :func:`read_table` gave.
        tree: where the files are.
        base: folder of the table in the tree; paths are relative to it.
        task: None: several label columns or ``a;b`` are multilabel, numbers with decimals are regression, else classes.
        columns: which columns to use.
        unknown: what becomes of empty labels and of −1; see :func:`vitkit.data.open_source`.

    Raises: BadInput for missing columns or labels, labels that do not suit the task, unknown splits, and when half or
        more of the files are absent.
    """
    if not table.rows:
        raise BadInput(f"{table.name} has no rows.")
    path_column = _column(table, "path", columns.path)
    if path_column is None:
        raise _no_column(table, "path")
    label_columns = _label_columns(table, columns)
    if not label_columns:
        raise _no_column(table, "label")
    task = task or _guess(table, label_columns)
    table, left_out = _labelled(table, label_columns, task, unknown)
    labels, classes = _labels(table, label_columns, task)
    listing = Listing([], [], classes, [Skipped(row[path_column], reason) for row, reason in left_out])
    splits = _splits(table, _column(table, "split", columns.split))
    weights = _weights(table, _column(table, "weight", columns.weight))
    group_column = _column(table, "group", columns.group)
    groups = [row[group_column] if group_column else "" for row in table.rows]
    if any(groups) and not all(groups):
        missing = [n for n, g in zip(table.row_names, groups) if not g]
        raise BadInput(f"{table.name}: column {group_column!r} is empty in {some(missing)}; every image needs a group.")
    known: dict[str, tuple[object, str]] = {}
    by_name = _basenames(tree)
    absent = 0
    for i, row in enumerate(table.rows):
        written = row[path_column]
        if not written:
            raise BadInput(f"{table.name}: the path is missing in {table.row_names[i]}.")
        path = _resolve(tree, base, written, by_name)
        if path is None:
            absent += 1
            listing.skipped.append(Skipped(written, f"there is no such file ({table.row_names[i]} of {table.name})"))
            continue
        if path in known:
            if known[path][0] != labels[i]:
                raise BadInput(
                    f"{table.name}: {written} has different labels in {known[path][1]} and {table.row_names[i]}. "
                    "Correct one; several labels of an image go into one cell as a;b."
                )
            listing.skipped.append(Skipped(written, f"listed again in {table.row_names[i]} of {table.name}"))
            continue
        known[path] = (labels[i], table.row_names[i])
        listing.records.append(Record(written, labels[i], groups[i] or None, splits[i], weights[i]))  # type: ignore[arg-type]
        listing.paths.append(path)
    if absent * 2 >= len(table.rows):
        names = [s.key for s in listing.skipped if s.reason.startswith("there is no such")]
        raise BadInput(
            f"{table.name}: {absent} of {len(table.rows)} files do not exist, such as {some(names, 3)}. Paths are "
            f"relative to the table's folder ({posixpath.join(tree.root, base)})."
        )
    return listing, task


def _no_column(table: Table, role: str) -> BadInput:
    return BadInput(
        f"{table.name} has no column {role!r}; its columns are {', '.join(table.columns)}. Rename one, or say which it "
        f"is with {role}_column=…."
    )


def _find(table: Table, role: str) -> str | None:
    lower = {c.lower(): c for c in reversed(table.columns)}
    return next((lower[n] for n in _NAMES[role] if n in lower), None)


def _column(table: Table, role: str, given: str | None) -> str | None:
    if given is None:
        return _find(table, role)
    if given not in table.columns:
        raise BadInput(f"{table.name} has no column {given!r}; its columns are {', '.join(table.columns)}.")
    return given


def _label_columns(table: Table, columns: Columns) -> list[str]:
    if columns.label is not None:
        given = columns.label.split(",") if isinstance(columns.label, str) else list(columns.label)
        return [str(_column(table, "label", c.strip())) for c in given]
    one = _find(table, "label")
    if one is not None:
        return [one]
    return [c for c in table.columns if c.lower().startswith(("label_", "label:"))]


def _empty(cell: str) -> bool:
    return cell.lower() in ("", "nan")


def _labelled(
    table: Table, label_columns: list[str], task: Task, unknown: Unknown | None
) -> tuple[Table, list[tuple[dict[str, str], str]]]:
    """The rows whose labels are known, perhaps by ``unknown``, and the others with the reason why they are left out."""
    reasons: dict[int, str] = {}
    missing = [i for i, row in enumerate(table.rows) if any(_empty(row[c]) for c in label_columns)]
    rows = list(table.rows)
    if missing and unknown == "skip":
        reasons = dict.fromkeys(missing, "its label is empty")
    elif missing and task == "multilabel" and unknown in ("absent", "present"):
        # what nobody mentioned is absent; only −1 is doubt
        word = "0" if len(label_columns) > 1 else _NONE
        for i in missing:
            rows[i] = {**rows[i], **{c: word for c in label_columns if _empty(rows[i][c])}}
    elif missing:
        names = some([table.row_names[i] for i in missing])
        hint = f', or "{_NONE}" says that no class applies' if task == "multilabel" and len(label_columns) == 1 else ""
        hint += ', or unknown="absent" says that empty cells are 0' if len(label_columns) > 1 else ""
        raise BadInput(
            f"{table.name}: the label is missing in {names} ({len(missing)} of {len(rows)} rows). Fill in column "
            f'{", ".join(label_columns)}, or leave these images out with unknown="skip" (--unknown skip){hint}.'
        )
    if task == "classify" and len(label_columns) == 1:
        values = [math.nan if i in reasons else to_number(row[label_columns[0]]) for i, row in enumerate(rows)]
        if unlabelled([v for i, v in enumerate(values) if i not in reasons], unknown, table.name):
            reasons |= {i: NOT_LABELLED for i, v in enumerate(values) if v == -1}
    elif task == "multilabel" and len(label_columns) > 1:
        cells = np.array([[to_number(row[c]) for c in label_columns] for row in rows])
        settled, out = settle(cells, unknown, table.name, table.row_names)
        reasons |= {int(i): "some of its labels are −1" for i in np.flatnonzero(out)}
        for i, j in np.argwhere(cells == -1):
            rows[i] = {**rows[i], label_columns[j]: f"{settled[i, j]:g}"}
    kept = [i for i in range(len(rows)) if i not in reasons]
    left = [(table.rows[i], reason) for i, reason in sorted(reasons.items())]
    return replace(table, rows=[rows[i] for i in kept], row_names=[table.row_names[i] for i in kept]), left


def _guess(table: Table, label_columns: list[str]) -> Task:
    if len(label_columns) > 1:
        cells = {to_number(row[c]) for row in table.rows for c in label_columns if not _empty(row[c])}
        return "multilabel" if cells <= {0.0, 1.0, -1.0} else "regress"
    values = [row[label_columns[0]] for row in table.rows if not _empty(row[label_columns[0]])]
    if any(";" in v for v in values):
        return "multilabel"
    return "regress" if looks_continuous(values) else "classify"


def _labels(table: Table, label_columns: list[str], task: Task) -> tuple[Sequence[object], tuple[str, ...]]:
    if task == "regress":
        per_column = [numbers([r[c] for r in table.rows], table.row_names, table.name) for c in label_columns]
        if len(per_column) == 1:
            return per_column[0], (label_columns[0],)
        return list(zip(*per_column)), tuple(label_columns)
    if len(label_columns) > 1:
        if task == "classify":
            raise BadInput(
                f'{table.name} has {len(label_columns)} label columns ({", ".join(label_columns)}); task="classify" '
                'takes one. Name it with label_column=…, or use task="multilabel".'
            )
        values = [[to_number(row[c]) for c in label_columns] for row in table.rows]
        wrong = [name for name, row in zip(table.row_names, values) if not set(row) <= {0.0, 1.0}]
        if wrong:
            raise BadInput(f"{table.name}: multilabel columns hold 0 or 1; something else is in {some(wrong)}.")
        return [tuple(row) for row in values], tuple(c.split("_", 1)[-1].split(":", 1)[-1] for c in label_columns)
    cells = [row[label_columns[0]] for row in table.rows]
    if task == "multilabel":
        sets = [{p.strip() for p in cell.split(";")} - {"", _NONE} for cell in cells]
        classes = tuple(sorted(set().union(*sets), key=natural))
        if not classes:
            raise BadInput(f"{table.name}: no row has a label other than {_NONE!r}.")
        return [tuple(float(c in s) for c in classes) for s in sets], classes
    classes = class_names(cells, table.name)
    number = {c: i for i, c in enumerate(classes)}
    return [number[c] for c in cells], classes


def _splits(table: Table, column: str | None) -> list[Split | None]:
    if column is None:
        return [None] * len(table.rows)
    values = [row[column].lower() for row in table.rows]
    wrong = [f"{n} ({v!r})" for n, v in zip(table.row_names, values) if v and v not in SPLIT_NAMES]
    if wrong:
        raise BadInput(
            f"{table.name}: column {column!r} takes train, val or test; it has something else in {some(wrong)}."
        )
    return [SPLIT_NAMES[v] if v else None for v in values]


def _weights(table: Table, column: str | None) -> list[float]:
    if column is None:
        return [1.0] * len(table.rows)
    values = [to_number(row[column]) for row in table.rows]
    wrong = [n for n, v in zip(table.row_names, values) if not (math.isfinite(v) and v >= 0)]
    if wrong:
        raise BadInput(
            f"{table.name}: column {column!r} takes numbers of at least 0; it has something else in {some(wrong)}."
        )
    return values


def _basenames(tree: Tree) -> dict[str, str | None]:
    """File name → its only path in the tree (None if there are several); empty for trees that are not to be walked."""
    found: dict[str, str | None] = {}
    if not tree.walkable:
        return found
    for path in tree.files():
        name = posixpath.basename(path)
        if posixpath.splitext(name)[1].lower() in EXTENSIONS:
            found[name] = None if name in found else path
    return found


def _resolve(tree: Tree, base: str, written: str, by_name: dict[str, str | None]) -> str | None:
    path = posixpath.normpath(posixpath.join(base, written.replace("\\", "/")))
    if tree.exists(path):
        return path
    # many archives keep the images in a folder the table does not mention
    name = posixpath.basename(path)
    return by_name.get(name) if "/" not in written.replace("\\", "/") else None

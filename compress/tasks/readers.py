"""One file of data as users have it -> a `Table`: CSV, TSV, JSON, JSON lines, Parquet, text, arrays.

Every fault of a file is one `CompressError` that names the file, the line and the remedy.
"""

import csv
import difflib
import gzip
import io
import itertools
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from compress.errors import CompressError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt", ".npz")
PACKED = (".gz", ".xz")
SPLITS = {
    "calibration": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Table:
    """Rows of one file, column by column; `lines` says where each row stands in it.

    `plain` marks running text (a .txt file, one row per line), `ordered` a label column whose names
    may stand for 0, 1, ... in sorted order (the class directories of an image folder).
    """

    place: str
    columns: Mapping[str, Sequence[object]]
    lines: Sequence[int]
    unit: str = "row"
    plain: bool = False
    ordered: bool = False

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """How a message names one row, such as `train.csv line 7`."""
        return f"{self.place} {self.unit} {self.lines[row]}"

    def take(self, rows: Iterable[int]) -> "Table":
        """The same columns with these rows, in this order."""
        kept = list(rows)
        columns = {name: [cells[row] for row in kept] for name, cells in self.columns.items()}
        lines = [self.lines[row] for row in kept]
        return Table(self.place, columns, lines, self.unit, self.plain, self.ordered)

    def column(self, name: str) -> Sequence[object]:
        """The cells of one column; a name that is not there is answered with the nearest."""
        if name not in self.columns:
            near = difflib.get_close_matches(name, self.columns, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise CompressError(
                f"{self.place} has no column {name!r}{hint} Columns: {', '.join(self.columns)}"
            )
        return self.columns[name]


def suffix_of(path: Path) -> str:
    """The suffix that says what is inside, `.csv` for `a.csv.gz`."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _text(path: Path) -> str:
    """A text file's content, unpacked and without its byte-order mark."""
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
        elif path.suffix.lower() == ".xz":
            data = lzma.decompress(data)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise CompressError(f"{path} is a damaged archive ({error}); copy it again") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CompressError(
            f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from error


def _quoted(text: str, delimiter: str, place: str) -> list[tuple[int, list[str]]]:
    """Rows of delimited text with quoted fields, each with the line it starts on."""
    csv.field_size_limit(2**30)  # a long document is one field
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, line = [], 1
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = reader.line_num + 1
    except csv.Error as error:
        raise CompressError(
            f'{place} line {line}: {error}; a quote inside a quoted field is written ""'
        ) from error
    return rows


def _unquoted(text: str) -> list[tuple[int, list[str]]]:
    """Rows of tab-separated text as GLUE writes it, where a quote is a quote."""
    lines = enumerate(text.split("\n"), 1)
    return [(at, line.rstrip("\r").split("\t")) for at, line in lines if line.strip("\r")]


def _delimiter(text: str, place: str) -> str:
    """The separator under which most of the first rows are as wide as the header."""
    sample = "\n".join(text.split("\n", 50)[:50])

    def agreement(delimiter: str) -> tuple[int, int]:
        try:
            rows = [row for _, row in _quoted(sample, delimiter, place)]
        except CompressError:  # the sample may end inside a quoted field
            rows = [line.split(delimiter) for line in sample.split("\n") if line]
        width = len(rows[0]) if rows else 1
        return (sum(len(row) == width for row in rows) if width > 1 else 0, width)

    return max(",\t;|", key=agreement)


def _delimited(path: Path, text: str) -> Table:
    """A table from CSV or TSV text; a first row that holds a number is data, not a header."""
    tab = suffix_of(path) == ".tsv"
    delimiter = "\t" if tab else _delimiter(text, path.name)
    rows = _unquoted(text) if delimiter == "\t" else _quoted(text, delimiter, path.name)
    if delimiter == "\t" and len({len(row) for _, row in rows}) > 1:
        try:
            quoted = _quoted(text, delimiter, path.name)
        except CompressError:
            quoted = rows
        rows = quoted if len({len(row) for _, row in quoted}) == 1 else rows
    if not rows:
        raise CompressError(f"{path} is empty; give a file with a header and rows")
    first = rows[0][1]
    headed = not any(re.fullmatch(r"-?\d+(\.\d+)?", cell.strip()) for cell in first)
    names = [(cell.strip() if headed else "") or f"column {number}" for number, cell in enumerate(first, 1)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CompressError(f"{path.name} has two columns named {twice!r}; rename one")
    rows = rows[1:] if headed else rows
    for line, row in rows:
        if len(row) != len(names):
            raise CompressError(
                f"{path.name} line {line} has {len(row)} fields, but the first line has "
                f"{len(names)} ({', '.join(names)}); quote a field that holds {delimiter!r}"
            )
    columns = {name: [row[at] for _, row in rows] for at, name in enumerate(names)}
    return Table(path.name, columns, [line for line, _ in rows], "line")


def _records(place: str, rows: Sequence[object], lines: Sequence[int], unit: str) -> Table:
    """A table from JSON values: objects, lists of cells, or plain strings."""
    if not rows:
        raise CompressError(f"{place} is empty; give a file with rows")
    named: list[dict[str, object]] = []
    for row in rows:
        if isinstance(row, dict):
            named.append(row)
        elif isinstance(row, list):
            named.append({f"column {at}": cell for at, cell in enumerate(row, 1)})
        else:
            named.append({"text": row})
    for line, row in zip(lines, named, strict=True):
        lacking = [name for name in named[0] if name not in row]
        if lacking:
            raise CompressError(
                f"{place} {unit} {line} lacks {', '.join(map(repr, lacking))}, which the first "
                f"{unit} has; every {unit} needs the same keys"
            )
    columns = {name: [row[name] for row in named] for name in named[0]}
    return Table(place, columns, list(lines), unit)


def _json_lines(path: Path, text: str) -> Table:
    rows, lines = [], []
    for line, words in enumerate(text.split("\n"), 1):
        if not words.strip():
            continue
        try:
            rows.append(json.loads(words))
        except json.JSONDecodeError as error:
            raise CompressError(
                f"{path.name} line {line} is not JSON ({error.msg} at column {error.colno})"
            ) from error
        lines.append(line)
    return _records(path.name, rows, lines, "line")


def _json(path: Path, text: str) -> dict[str, Table]:
    """A JSON file: a list of rows, an object of columns, or one list of rows per split."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise CompressError(
            f"{path.name} line {error.lineno} is not JSON ({error.msg}); "
            "one object per line belongs into a .jsonl file"
        ) from error
    if isinstance(document, dict) and isinstance(document.get("data"), list):
        document = document["data"]
    if isinstance(document, list):
        return {"": _records(path.name, document, range(1, len(document) + 1), "row")}
    if not isinstance(document, dict) or not all(isinstance(v, list) for v in document.values()):
        raise CompressError(f"{path.name} is neither a list of rows nor an object of columns")
    parts = {split: key for key in document for split, names in SPLITS.items() if key in names}
    if parts:
        return {
            split: _records(f"{path.name}:{key}", document[key], range(1, len(document[key]) + 1), "row")
            for split, key in parts.items()
        }
    return {"": _columns(path.name, document)}


def _columns(place: str, columns: Mapping[str, Sequence[object]]) -> Table:
    """A table from whole columns, which must be equally long."""
    lengths = {name: len(cells) for name, cells in columns.items()}
    if len(set(lengths.values())) > 1:
        raise CompressError(f"{place} has columns of different lengths: {lengths}; pad or cut them")
    return Table(place, columns, range(1, next(iter(lengths.values()), 0) + 1))


def _parquet(path: Path) -> Table:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise CompressError(f"{path} is not a readable Parquet file ({error})") from error
    return _columns(path.name, {name: table[name].to_pylist() for name in table.column_names})


def _arrays(path: Path) -> dict[str, Table]:
    """Images and labels of an .npz: `x` or `images`, `y` or `labels`, or one such pair per split."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name.lower(): archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CompressError(f"{path} is not a readable .npz of plain arrays ({error})") from error
    roles = {"image": ("x", "images", "image", "data"), "label": ("y", "labels", "label", "targets")}
    found: dict[str, dict[str, list[Any]]] = {}
    for split, words in {"": ("",), **SPLITS}.items():
        for word, (role, names) in itertools.product(words, roles.items()):
            for name in names:
                for key in (f"{name}_{word}", f"{word}_{name}") if word else (name,):
                    if key in arrays:
                        found.setdefault(split, {}).setdefault(role, list(arrays[key]))
    if not any("image" in part for part in found.values()):
        raise CompressError(f"{path} has arrays {', '.join(arrays)}; name them x and y")
    for part in found.values():
        for row, pixels in enumerate(part["image"], 1):
            if not np.isfinite(pixels).all():
                raise CompressError(f"{path.name} row {row}: an image holds NaN or infinity")
        if "label" in part:
            part["label"] = np.asarray(part["label"]).reshape(-1).tolist()
    return {split: _columns(path.name, part) for split, part in found.items()}


def read(path: Path) -> dict[str, Table]:
    """The tables in one file, by split; a file that is not divided is under the empty name.

    Raises:
        CompressError: the file is missing, empty, damaged, ragged, or of no known kind.
    """
    if not path.exists():
        near = difflib.get_close_matches(
            path.name, [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else [], 1
        )
        raise CompressError(f"{path} does not exist" + (f"; did you mean {near[0]}?" if near else ""))
    suffix = suffix_of(path)
    if suffix not in SUFFIXES:
        raise CompressError(f"{path} is of no known kind; give one of {' '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return {"": _parquet(path)}
    if suffix == ".npz":
        return _arrays(path)
    try:
        text = _text(path)
    except OSError as error:
        raise CompressError(f"{path} cannot be read ({error.strerror})") from error
    if not text.strip():
        raise CompressError(f"{path} is empty; give a file with rows")
    if suffix == ".json":
        return _json(path, text)
    if suffix == ".txt":
        lines = [line + "\n" for line in text.removesuffix("\n").split("\n")]
        return {"": Table(path.name, {"text": lines}, range(1, len(lines) + 1), "line", plain=True)}
    return {"": _delimited(path, text) if suffix in (".csv", ".tsv") else _json_lines(path, text)}

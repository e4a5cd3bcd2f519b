"""Files and directories -> calibration, validation and test rows; which column is text, which label.

Nothing is guessed in silence: `Splits.origin` says where each split came from, and the test split is
never a row that the compression has seen.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from compress.errors import CompressError
from compress.task_specs import LABELS, PAIRS, SCORES, TEXTS
from compress.tasks.readers import PACKED, SPLITS, SUFFIXES, Table, read, suffix_of

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff")
SHARD = re.compile(r"-\d+-of-\d+$")
FEWEST_ROWS = 10  # below this, a tenth of the rows is no row
LOOK = 1000  # rows that the search for a column looks at


@dataclass(frozen=True)
class Splits:
    """The three parts of the data, and in words where each came from."""

    tables: dict[str, Table]
    origin: dict[str, str]


def read_splits(data: str, test: str | None = None, *, seed: int = 0, shuffle: bool = True) -> Splits:
    """Calibration, validation and test rows from a file or a directory, the same every time.

    Splits that have files of their own are used as they are; a missing one is cut from the training
    rows: a tenth to validate, a fifth to test. Rows are in a random order fixed by `seed`, because
    files are often sorted by label; with `sampler` False (running text) they stay in theirs.

    Raises:
        CompressError: a file is missing or faulty, or there are too few rows to cut from.
    """
    found = _find(Path(data))
    if test is not None:
        parts = read(Path(test)) if not Path(test).is_dir() else _find(Path(test))
        found["test"] = parts["test"] if "test" in parts else next(iter(parts.values()))
    for table in found.values():
        if not len(table):
            raise CompressError(f"{table.place} has a header and no rows; give rows")
    origin = {split: f"{table.place}, whole" for split, table in found.items()}
    if "test" not in found and "validation" in found and ("" in found or "calibration" in found):
        found["test"], origin["test"] = found.pop("validation"), origin["validation"]
    name = next(name for name in ("calibration", "", "validation", "test") if name in found)
    if test is not None and name == "test":
        raise CompressError(f"{data} has no training rows; give --data a file to calibrate on")
    source = found.pop(name)
    generator = np.random.default_rng(seed)
    tables = {split: _order(table, generator, shuffle=shuffle) for split, table in found.items()}
    source = _order(source, generator, shuffle=shuffle)
    cuts = [("test", 5), ("validation", 10)]
    missing = [(split, part) for split, part in cuts if split not in tables]
    rows = len(source)
    if missing and rows < FEWEST_ROWS:
        raise CompressError(
            f"{source.place} has {rows} rows, too few to cut a {missing[0][0]} split from; give at "
            f"least {FEWEST_ROWS} rows, or a directory with train, validation and test files"
        )
    end = rows
    for split, part in missing:
        start = end - rows // part
        tables[split] = source.take(range(start, end))
        origin[split] = f"{source.place}, {'a random' if shuffle else 'the last'} 1/{part}, held out"
        end = start
    tables["calibration"] = source.take(range(end))
    origin["calibration"] = f"{source.place}, {end} of {rows} rows"
    return Splits({split: tables[split] for split in SPLITS}, {split: origin[split] for split in SPLITS})


def _order(table: Table, generator: np.random.Generator, *, shuffle: bool) -> Table:
    return table.take(generator.permutation(len(table)).tolist()) if shuffle else table


def _split_of(name: str) -> str | None:
    """The split that a file or directory name stands for, `train-00000-of-00002` included."""
    for split, words in SPLITS.items():
        if SHARD.sub("", name.lower()) in words:
            return split
    return None


def _one_table(path: Path, split: str, items: Sequence[Path]) -> None:
    """Refuse two files or folders of one split, unless they are parts of one table.

    Raises:
        CompressError: which they are.
    """
    tables = {SHARD.sub("", _stem(item)) if SHARD.search(_stem(item)) else item.name for item in items}
    if len(tables) > 1:
        raise CompressError(
            f"{path} holds {' and '.join(item.name for item in items)}, and each says {split}; leave one of "
            "them, or name the parts of one table alike (train-00000-of-00002)"
        )


def _stem(path: Path) -> str:
    name = path.name
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).stem


def _find(path: Path) -> dict[str, Table]:
    """The tables at a path, by split; undivided data is under the empty name."""
    if not path.is_dir():
        return read(path)
    files = [item for item in sorted(path.iterdir()) if item.is_file()]
    files = [item for item in files if suffix_of(item) in SUFFIXES]
    shards: dict[str, list[Path]] = {}
    for item in files:
        split = _split_of(_stem(item))
        if split is not None:
            _one_table(path, split, [*shards.get(split, []), item])
            shards.setdefault(split, []).append(item)
    if shards:
        return {split: _join([_whole(item) for item in items]) for split, items in shards.items()}
    folders: dict[str | None, Path] = {}
    for item in sorted(path.iterdir()):
        if item.is_dir():
            split = _split_of(item.name)
            if split is not None and split in folders:
                _one_table(path, split, [folders[split], item])
            folders[split] = item
    divided = {split: item for split, item in folders.items() if split is not None}
    if divided:
        return {split: _image_folder(item) for split, item in divided.items()}
    if folders:
        return {"": _image_folder(path)}
    if len(files) == 1:
        return read(files[0])
    names = ", ".join(item.name for item in files[:8]) or "no data file"
    raise CompressError(
        f"{path} holds {names}; name the files train, validation and test, give --data one file, "
        "or a directory with one sub-directory of images per class"
    )


def _whole(path: Path) -> Table:
    parts = read(path)
    if list(parts) != [""]:
        raise CompressError(f"{path} is divided into {', '.join(parts)}; give --data this file alone")
    return parts[""]


def _join(tables: list[Table]) -> Table:
    """Shards of one split as one table."""
    first = tables[0]
    columns = {name: [cell for table in tables for cell in table.column(name)] for name in first.columns}
    lines = [line for table in tables for line in table.lines]
    place = first.place if len(tables) == 1 else f"{first.place} and {len(tables) - 1} more"
    return replace(first, place=place, columns=columns, lines=lines)


def _image_folder(path: Path) -> Table:
    """One class per sub-directory; the cells are paths, opened when they are needed."""
    images: list[Path] = []
    labels: list[str] = []
    for folder in sorted(item for item in path.iterdir() if item.is_dir()):
        inside = [item for item in sorted(folder.rglob("*")) if item.suffix.lower() in IMAGES]
        images += inside
        labels += [folder.name] * len(inside)
    if not images:
        raise CompressError(
            f"{path} has no sub-directory with images; put {' '.join(IMAGES[:3])} files into one "
            "sub-directory per class"
        )
    columns: dict[str, Sequence[object]] = {"image": images, "label": labels}
    return Table(path.name, columns, range(1, len(images) + 1), "image", ordered=True)


def _known(table: Table, names: Sequence[str]) -> str | None:
    """The first of some usual column names that the table has, in the table's own spelling."""
    spelled = {name.lower(): name for name in table.columns}
    return next((spelled[name] for name in names if name in spelled), None)


def text_columns(table: Table, named: str | None = None) -> tuple[str, ...]:
    """The column that holds the text, or the two of a text pair.

    `by_name` is the user's word, two names joined by a comma for a pair. Without it: a usual pair, a
    usual name, else the column with the longest strings.
    """
    if named is not None:
        names = (named,) if named in table.columns else tuple(named.split(","))
        for name in names:
            table.column(name)
        if len(names) > 2:
            raise CompressError(f"--text names {len(names)} columns; a text is one, a pair is two")
        return names
    for pair in PAIRS:
        found = [_known(table, (name,)) for name in pair]
        if found[0] is not None and found[1] is not None:
            return (found[0], found[1])
    usual = _known(table, TEXTS)
    if usual is not None:
        return (usual,)
    lengths = {
        name: sum(len(str(cell)) for cell in cells[:LOOK])
        for name, cells in table.columns.items()
        if all(isinstance(cell, str) for cell in cells[:LOOK])
    }
    if not lengths:
        raise CompressError(
            f"{table.place} has no column of text among {', '.join(table.columns)}; name it, --text NAME"
        )
    return (max(lengths, key=lambda name: lengths[name]),)


def label_column(
    table: Table, taken: Sequence[str], labels: Mapping[int, str], named: str | None = None
) -> str:
    """The column that holds the label: the user's word, a usual name, else the one that fits.

    A column fits when all it holds are labels of the model; if there is none, the one with the
    fewest different values is taken, and its first value explains what is wrong.
    """
    if named is not None:
        table.column(named)
        return named
    usual = _known(table, LABELS)
    if usual is not None and usual not in taken:
        return usual
    index = {word: number for number, word in labels.items()}
    rest = {
        name: {str(cell): cell for cell in cells[:LOOK]}
        for name, cells in table.columns.items()
        if name not in taken
    }
    fitting = [
        name
        for name, cells in rest.items()
        if all(_label(cell, index, labels) is not None for cell in cells.values())
    ]
    few = {name: len(rest[name]) for name in fitting or rest}
    few = {name: count for name, count in few.items() if fitting or count <= max(2, len(labels))}
    if not few:
        raise CompressError(
            f"{table.place} has no column of labels among {', '.join(table.columns)}; name it, --label NAME"
        )
    return min(few, key=lambda name: (few[name] == 1, few[name]))


def score_column(table: Table, taken: Sequence[str], named: str | None = None) -> str | None:
    """The column of similarity scores of text pairs, None when there is none."""
    if named is not None:
        table.column(named)
        return named
    usual = _known(table, SCORES)
    return usual if usual not in taken else None


def _absent(cell: object) -> bool:
    """Whether a cell is empty: null, NaN or a blank string."""
    if isinstance(cell, float):
        return math.isnan(cell)
    return cell is None or (isinstance(cell, str) and not cell.strip())


def texts(table: Table, name: str) -> list[str]:
    """The texts of one column; a row without one is named."""
    cells = table.column(name)
    for row, cell in enumerate(cells):
        if not isinstance(cell, str) or not (cell.strip() or table.plain):
            what = "no text" if _absent(cell) else f"{cell!r}, not text,"
            raise CompressError(f"{table.where(row)} has {what} in column {name!r}; remove the row")
    return [str(cell) for cell in cells]


def numbers(table: Table, name: str) -> list[float]:
    """The finite numbers of one column."""
    found = []
    for row, cell in enumerate(table.column(name)):
        try:
            value = float(str(cell))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise CompressError(
                f"{table.where(row)} has {cell!r} in column {name!r}, not a finite number; mend the row"
            )
        found.append(value)
    return found


def _label(cell: object, index: Mapping[str, int], labels: Mapping[int, str]) -> int | None:
    """The model's number for one cell: by name, by name in another case, else by number."""
    word = str(int(cell) if isinstance(cell, bool) else cell).strip()
    if word in index:
        return index[word]
    try:
        value = float(word)
    except ValueError:
        folded = {name.lower(): number for name, number in index.items()}
        return folded.get(word.lower())
    return int(value) if value in labels else None


def label_numbers(table: Table, name: str, labels: Mapping[int, str]) -> list[int]:
    """The labels of one column as the model's integers.

    Names are matched to the model's own. A model without names (`LABEL_0`, ...) takes integers, and
    the sub-directories of an image folder in sorted order when there are as many as labels.

    Raises:
        CompressError: a row has no label, or one that the model does not know.
    """
    cells = table.column(name)
    index = {word: number for number, word in labels.items()}
    unnamed = all(re.fullmatch(r"LABEL_\d+", word) for word in index)
    if table.ordered and unnamed:
        folders = sorted({str(cell) for cell in cells})
        if len(folders) == len(labels) and not all(word.isdecimal() for word in folders):
            index = {word: number for number, word in enumerate(folders)}
    known: dict[str, int] = {}
    for row, cell in enumerate(cells):
        if str(cell) in known:
            continue
        if _absent(cell):
            raise CompressError(f"{table.where(row)} has no label in column {name!r}; remove the row")
        number = _label(cell, index, labels)
        if number is None:
            raise CompressError(_unknown_label(table, row, name, cell, labels, unnamed=unnamed))
        known[str(cell)] = number
    return [known[str(cell)] for cell in cells]


def _unknown_label(
    table: Table, row: int, name: str, cell: object, labels: Mapping[int, str], *, unnamed: bool
) -> str:
    allowed = f"integers 0 to {len(labels) - 1}"
    mend = "name another column with --label, or set id2label in config.json"
    if not unnamed:
        shown = list(labels.values())
        near = difflib.get_close_matches(str(cell), shown, 1)
        allowed += f" or names such as {', '.join(shown[:4])}"
        mend = f"did you mean {near[0]!r}?" if near else "name another column with --label"
    return (
        f"{table.where(row)} has label {cell!r} in column {name!r}, but the model knows {len(labels)} "
        f"labels: {allowed}; {mend}"
    )

"""The terminal of the command line: documents as text, and streams that libraries cannot write to."""

import contextlib
import faulthandler
import locale
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

WIDE = 80  # columns of a terminal, the gap behind a table's last column in place of the indent before it
LEAST_WIDE = 16  # columns that a cell of words needs to be read
GAP = 2
COLORS = {"met": 32, "missed": 31, "not_measured": 33}  # green, red, yellow


def plain(document: Mapping[str, Any]) -> str:
    """A document as text: plain facts first, then what has parts; rows of a list become a table.

    >>> print(plain({"sites": [{"name": "a", "units": 12}, {"name": "b.c", "units": 3}], "model": "x"}))
    model: x
    <BLANKLINE>
    sites
      name  units
      a        12
      b.c       3
    """
    parts = {key: value for key, value in document.items() if _has_parts(value)}
    lines = [f"{key}: {_cell(value)}" for key, value in document.items() if key not in parts]
    for key, value in parts.items():
        lines += ["", key] if lines else [key]
        lines += [f"  {line}" for line in _part(value)]
    return "\n".join(lines)


def _has_parts(value: object) -> bool:
    """Whether a value needs lines of its own: anything with names in it, and text in several items."""
    if isinstance(value, dict):
        return bool(value)
    return isinstance(value, list) and any(isinstance(item, dict) or " " in str(item) for item in value)


def _part(value: list[Any] | dict[str, Any]) -> list[str]:
    if isinstance(value, list):
        if all(isinstance(row, dict) for row in value):
            return _table(value)
        return [_cell(item) for item in value]
    if all(isinstance(row, dict) for row in value.values()):
        return _table([{"": name, **row} for name, row in value.items()])
    return _table([{"": name, " ": item} for name, item in value.items()])


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Aligned columns with their names: numbers flush right, words flush left.

    Where it would be wider than a terminal, names stand on several lines, then the last column does.
    """
    rows = [{str(key): value for key, value in row.items()} for row in rows]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    numeric = [all(_is_number(row.get(key)) for row in rows) for key in keys]
    body = [[_cell(row[key]) if key in row else "" for key in keys] for row in rows]
    cells = [keys, *body]
    if sum(_widths(cells)) > WIDE:
        names = [key.split("_") for key in keys]
        deep = max(map(len, names))
        stacked = [[""] * (deep - len(parts)) + parts for parts in names]
        cells = [[parts[line] for parts in stacked] for line in range(deep)] + body
        room = WIDE - sum(_widths(cells)[:-1])
        if room >= LEAST_WIDE and not numeric[-1]:
            cells = [line for cell in cells for line in _folded(cell, room)]
    widths = _widths(cells)
    lines = [
        "  ".join(
            cell.rjust(width - GAP) if right else cell.ljust(width - GAP)
            for right, cell, width in zip(numeric, line, widths, strict=True)
        ).rstrip()
        for line in cells
    ]
    return lines if lines[0] else lines[1:]


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    """Of every column, with the gap that follows."""
    return [max(map(len, column)) + GAP for column in zip(*cells, strict=True)]


def _folded(cells: Sequence[str], room: int) -> list[list[str]]:
    """A row of a table as several, its last cell in lines of at most `room`."""
    *first, last = cells
    parts = textwrap.wrap(last, room, break_long_words=False) or [""]
    return [[*first, parts[0]], *([""] * len(first) + [part] for part in parts[1:])]


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _cell(value: object) -> str:
    """One value: whole numbers with their thousands apart, others with four digits, lists in a row."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value)) or "none"
    return str(value)


def verdict_text(line: str, status: str, stream: TextIO) -> str:
    """The verdict for a stream: in color and broken between words on a terminal, one plain line elsewhere.

    NO_COLOR in the environment and a terminal without control sequences turn the color off.

    Args:
        line: the verdict line.
        status: met, missed or not_measured, whose words in capitals get the color.
        stream: where it will be written.
    """
    if not stream.isatty():
        return line
    try:
        columns = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        columns = WIDE
    text = textwrap.fill(line, columns or WIDE, break_long_words=False, break_on_hyphens=False)
    words = status.upper().replace("_", r"\s")
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return re.sub(rf"\b{words}\b", lambda found: f"\x1b[1;{COLORS[status]}m{found[0]}\x1b[0m", text, count=1)


@dataclass(frozen=True)
class Streams:
    """The user's own output streams, and the file that takes what libraries write instead."""

    out: TextIO
    err: TextIO
    log: IO[str]

    def swallowed(self) -> str:
        """What libraries wrote so far."""
        self.log.seek(0)
        return self.log.read()


@contextmanager
def own_streams() -> Iterator[Streams]:
    """Keep the terminal for ourselves: descriptors 1 and 2 lead to a file while libraries work.

    Warnings of Python code could be filtered one by one; what native code prints (onnxruntime, BLAS)
    can only be caught here, and a user's own code that prints must not break `--json`.
    """
    with contextlib.ExitStack() as stack:
        # First, since a file that is opened takes the number of a standard stream that was closed.
        saved = {number: _copy(number) for number in (1, 2)}
        log: IO[str]
        try:
            log = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
        except OSError:  # no room or no right to write anywhere: then nothing is kept
            log = stack.enter_context(Path(os.devnull).open("w+", encoding="utf-8"))
        out, err = (stack.enter_context(_writer(_copy(saved[number]))) for number in (1, 2))
        if not faulthandler.is_enabled():
            faulthandler.enable(err)  # native code that dies says where
            stack.callback(faulthandler.disable)
        try:
            _flush()
            for number in saved:
                os.dup2(log.fileno(), number)
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield Streams(out, err, log)
        finally:
            _flush()
            for number, descriptor in saved.items():
                os.dup2(descriptor, number)
                os.close(descriptor)


def _copy(descriptor: int) -> int:
    """A copy of an open descriptor; where it was closed (`>&-`), one that swallows everything."""
    try:
        return os.dup(descriptor)
    except OSError:
        return os.open(os.devnull, os.O_RDWR)


@contextmanager
def _writer(descriptor: int) -> Iterator[TextIO]:
    """Text on a descriptor; a reader that went away (`| head`) is no error at the end."""
    stream = os.fdopen(descriptor, "w", encoding=locale.getpreferredencoding(False), errors="replace")
    try:
        yield stream
    finally:
        with contextlib.suppress(OSError):
            stream.close()


def _flush() -> None:
    """What Python holds back belongs to where the descriptors point now."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()


def hush() -> None:
    """Ask libraries to be brief: no bars of theirs, no word home."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_TELEMETRY", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)


def use_cores() -> None:
    """Let torch work on every physical core, unless the user has said how many to use."""
    import torch

    from compress.measure.timing import physical_cores

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(physical_cores())

"""Validation errors of documents as one sentence: place, key, and the nearest known key or the reason."""

import difflib
import re

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from compress.ir import Document


def _known(model: type[Document], path: tuple[str | int, ...]) -> list[str]:
    """The keys that the table at `path` may hold."""
    for step in path:
        kind = model.model_fields[str(step)].annotation if step in model.model_fields else None
        if not (isinstance(kind, type) and issubclass(kind, Document)):
            break
        model = kind
    return sorted(model.model_fields)


def _line(text: str, path: tuple[str | int, ...]) -> int:
    """The line of a TOML file that sets the key at `path`, 1 when it cannot be told."""
    table: tuple[str, ...] = ()
    want = tuple(str(step) for step in path)
    for number, line in enumerate(text.splitlines(), 1):
        header = re.fullmatch(r"\s*\[\s*([\w.]+)\s*\]\s*(#.*)?", line)
        if header:
            table = tuple(header[1].split("."))
            if table == want:
                return number
            continue
        key = re.match(r"\s*([\w.]+)\s*=", line)
        if key:
            full = table + tuple(key[1].split("."))
            if full == want or (full == want[: len(full)] and "{" in line):
                return number
    return 1


def explain(error: ValidationError, model: type[Document], where: str, text: str = "") -> str:
    """The first mistake of a document in one sentence: place, key, nearest known key or reason."""
    problem = error.errors()[0]
    path = problem["loc"]
    place = f"{where} line {_line(text, path)}" if text else where
    key = str(path[-1]) if path else "document"
    table = ".".join(str(step) for step in path[:-1])
    inside = f" in [{table}]" if table else ""
    if problem["type"] == "extra_forbidden":
        known = _known(model, path[:-1])
        near = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"{place}: unknown key {key!r}{inside}{hint} Known: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{place}: {key!r}{inside} is missing; it has no default"
    if problem["type"] == "literal_error":
        return f"{place}: {_no_choice(path, problem)}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {key!r}{inside} {message} (found {problem['input']!r})"


def _no_choice(path: tuple[str | int, ...], problem: ErrorDetails) -> str:
    """A word that is none of those that may stand there, and the nearest of them."""
    known = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
    names = [step for step in path if isinstance(step, str)]
    inside = f" in [{'.'.join(names[:-1])}]" if names[1:] else ""
    near = difflib.get_close_matches(str(problem["input"]), known, 1, 0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"{names[-1]!r}{inside} cannot be {problem['input']!r}{hint} Known: {', '.join(known)}"

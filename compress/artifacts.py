"""Results on disk that are trusted only while the hash of what they were made from still matches."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from compress.errors import CompressError
from compress.ir import SCHEMA_VERSION, Document

T = TypeVar("T", bound=Document)
MARKER = "compression"
WORK = "work"


def digest(*parts: object) -> str:
    """A hash of documents, bytes, texts and plain values, equal only for equal contents."""
    total = hashlib.sha256()
    for part in parts:
        total.update(_bytes(part))
        total.update(b"\x00")
    return total.hexdigest()[:24]


def _bytes(part: object) -> bytes:
    if isinstance(part, bytes):
        return part
    if isinstance(part, Document):
        return part.model_dump_json().encode()
    return json.dumps(part, sort_keys=True, default=str).encode()


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing: a killed run never leaves half of it under its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def saved(path: Path, kind: type[T], made_from: str, make: Callable[[], T]) -> T:
    """The stored document when it was made from the same inputs, else a new one, stored.

    A file that is missing, truncated, of another schema or made from something else is rebuilt.
    """
    stored = stored_at(path, kind, made_from)
    if stored is not None:
        return stored
    value = make()
    store(path, made_from, value)
    return value


def store(path: Path, made_from: str, value: Document) -> None:
    """Write one document with the hash of what it was made from."""
    envelope = {
        "schema_version": SCHEMA_VERSION,
        "made_from": made_from,
        "value": value.model_dump(mode="json"),
    }
    write_text(path, json.dumps(envelope, indent=1) + "\n")


def stored_at(path: Path, kind: type[T], made_from: str) -> T | None:
    """The stored document, or None when there is none that was made from `made_from`."""
    try:
        envelope: Any = json.loads(path.read_text(encoding="utf-8"))
        if envelope["schema_version"] != SCHEMA_VERSION or envelope["made_from"] != made_from:
            return None
        return kind.model_validate(envelope["value"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


def folder(directory: Path, made_from: str) -> Path:
    """A directory of artifacts made from `made_from`; what was made from anything else is removed."""
    stamp = directory / "made_from"
    try:
        fresh = stamp.read_text(encoding="utf-8") == made_from
    except (OSError, UnicodeDecodeError):
        fresh = False
    if not fresh:
        if directory.is_dir():
            for path in directory.iterdir():
                path.unlink()
        write_text(stamp, made_from)
    return directory


def claim(out: Path) -> Path:
    """The folder `out/compression`, after making sure that `out` is empty or an output of ours.

    Raises:
        CompressError: `out` holds something else, is a file, or cannot be written.
    """
    marker = out / MARKER
    try:
        if out.exists() and not out.is_dir():
            raise CompressError(f"--out {out} is a file; give a directory")
        if out.is_dir() and not marker.is_dir():
            found = sorted(path.name for path in out.iterdir())
            if found:
                raise CompressError(
                    f"--out {out} is not an output of compress: it holds {len(found)} entries "
                    f"({', '.join(found[:3])}) and no folder {MARKER!r}; give an empty or a new directory"
                )
        marker.mkdir(parents=True, exist_ok=True)
        probe = marker / ".write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CompressError(
            f"--out {out} cannot be written ({error.strerror}); give a directory of yours with --out"
        ) from error
    return marker


def size_mb(directory: Path) -> float:
    """Megabytes of all files below a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()) / 1e6


def remove_work(out: Path) -> None:
    """Remove the working files of a run: statistics, candidates, tables; the next run makes them anew."""
    shutil.rmtree(out / MARKER / WORK, ignore_errors=True)

"""Finished output -> files in the format of a runtime, in a folder or an archive of their own."""

import difflib
import gzip
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from compress.errors import CompressError
from compress.export import edge, ort
from compress.export.finished import Finished, finished, parts

MARK = "compress-export.txt"  # a folder that holds it is ours to replace
Format = Callable[[Finished, Path], list[Path]]


def copy(output: Finished, destination: Path) -> list[Path]:
    """The compressed model as it was proven."""
    return [Path(shutil.copyfile(part, destination / part.name)) for part in parts(output.compressed)]


FORMATS: dict[str, Format] = {
    "onnx": copy,
    "ort": ort.export,
    "edge": edge.export,
    "edge+ort": edge.export_with_ort,
}


def deliver(directory: Path, to: str, place: Path | None = None, *, archive: bool = False) -> list[Path]:
    """Write the output in `directory` as `to`; the files written, or the archive alone.

    Args:
        directory: the `--out` of a finished run.
        to: one of `FORMATS`.
        place: where to; a folder named like the format inside `directory` unless given.
        archive: write one `.tar.gz` instead of a folder, the same bytes from the same output.

    Raises:
        CompressError: there is no such format, no finished run, or the place holds something else.
    """
    if to not in FORMATS:
        near = difflib.get_close_matches(to, FORMATS, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise CompressError(f"--to {to!r} is no format{hint} Known: {', '.join(FORMATS)}")
    output = finished(directory)
    suffix = ".tar.gz" if archive else ""
    place = directory / f"{to}{suffix}" if place is None else place
    _claim(place, archive=archive)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as name:
        folder = Path(name) / (place.name.removesuffix(".tar.gz") or to)
        folder.mkdir()
        written = FORMATS[to](output, folder)
        if archive:
            packed = Path(name) / "packed"
            pack(folder, written, packed)
            packed.replace(place)
            return [place]
        (folder / MARK).write_text(f"{to} of {output.report.model}, written by compress export\n", "utf-8")
        if place.is_dir():
            shutil.rmtree(place)
        folder.rename(place)
    return [place / path.name for path in written]


def _claim(place: Path, *, archive: bool) -> None:
    """Refuse to write over what `deliver` has not written."""
    if archive and (place.is_dir() or not place.name.endswith((".tar.gz", ".tgz"))):
        raise CompressError(f"--out {place} is no name for an archive; name a file that ends in .tar.gz")
    if not archive and place.is_file():
        raise CompressError(f"--out {place} is a file; give a folder, or add --archive")
    if not archive and place.is_dir() and any(place.iterdir()) and not (place / MARK).is_file():
        raise CompressError(f"--out {place} holds something else; give an empty or a new folder")


def pack(folder: Path, files: list[Path], archive: Path) -> None:
    """The files as a `.tar.gz` with one folder in it: no times, owners or order of the disk in it."""
    with (
        archive.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for path in sorted(files):
            entry = tarfile.TarInfo(f"{folder.name}/{path.name}")
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                tar.addfile(entry, file)

"""Finished output -> files in the format of a runtime, in a folder or an archive of their own."""

import difflib
import gzip
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compress import profiles
from compress.cost import latency_table
from compress.errors import CompressError
from compress.export import ort_format
from compress.export.backends import tensorrt
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.backends.tensorrt_engine import EngineOptions, Stamp, stamp_path
from compress.export.delivery import fp16
from compress.export.edge import bundle
from compress.export.output_dir import Finished, finished, parts
from compress.formats import nm_of
from compress.ir import Engine
from compress.measure import verify_on_device
from compress.report import render
from compress.report.schema import Report

MARK = "compress-export.txt"  # a folder that holds it is ours to replace
Format = Callable[[Finished, Path], list[Path]]


def copy(output: Finished, destination: Path) -> list[Path]:
    """The compressed model as it was proven."""
    return [Path(shutil.copyfile(part, destination / part.name)) for part in parts(output.compressed)]


def engine(output: Finished, destination: Path) -> list[Path]:
    """An engine for the GPU at hand with its stamp, beside the ONNX file that it was built from.

    For a target that computes in fp16 that file is in half precision, since engines compute in what is
    written. The report of the output says from then on which layers run 2:4 kernels in it.

    Raises:
        CompressError: no TensorRT or GPU (it says what to install, and which file serves without), the
            builder refuses the file, or the outputs of the engine differ from those of the file.
    """
    tensorrt.load(output.compressed)  # refuses before anything is written
    made = output.report
    if profiles.load(made.target.name).baseline_precision == "fp16":
        written, found = fp16.make(output, destination)
        made = made.model_copy(update={"half": found})
    else:
        written = copy(output, destination)
    built = destination / "model.engine"
    stamp = tensorrt.build(
        written[0], built, engine_options(output), latency_table.cache_folder() / "tensorrt"
    )
    check_agreement(built, output, stamp, written[0])
    render.write(with_engine(made, stamp), output.directory / "compression")
    return [*written, built, stamp_path(built)]


def with_engine(report: Report, stamp: Stamp) -> Report:
    """The report with what the builder made of 2:4 zeros."""
    made = Engine(
        device=stamp.machine.device,
        tensorrt=stamp.machine.tensorrt,
        sparse=stamp.options.sparse,
        eligible=stamp.sparsity.eligible,
        picked=stamp.sparsity.picked,
    )
    return report.model_copy(update={"engine": made})


def engine_options(output: Finished) -> EngineOptions:
    """Ranges around the recipe's shapes, which are made fastest; 2:4 kernels where the plan has zeros."""
    sizes = list(output.report.target.shapes.values())
    batch, tokens = sizes[0], sizes[1] if len(sizes) == 2 else 1
    return EngineOptions(
        batch=(1, batch, max(batch, 3)),
        tokens=(1, tokens, tokens),
        sparse=any(nm_of(site.option.pattern) for site in output.report.sites),
    )


def check_agreement(built: Path, output: Finished, stamp: Stamp, source: Path) -> None:
    """Refuse an engine whose outputs differ from the file by more than the precision of `source` allows."""
    # Float32 products run as TF32 on tensor cores, which keeps ten bits of a number.
    relative = max(
        verify_on_device.TOLERANCES[bundle.precision_of(source)], verify_on_device.TOLERANCES["tf32"]
    )
    with (
        OrtRunner(output.compressed, threads=output.recipe.bench.threads) as reference,
        tensorrt.TensorRTRunner(built) as runner,
    ):
        for inputs in bundle.examples(output.compressed, reference, output.report.target.shapes, reference):
            outputs = runner.infer(inputs)
            for name, expected in reference.infer(inputs).items():
                largest = float(np.abs(expected).max())
                apart = float(np.abs(outputs[name] - expected).max())
                if not apart <= relative * max(largest, 1.0):
                    raise CompressError(
                        f"output {name!r} of the engine differs from {output.compressed} by {apart:.3g} "
                        f"(tolerance {relative:g} of {largest:.3g}; {stamp.machine.device}, TensorRT "
                        f"{stamp.machine.tensorrt}); it is not delivered.\n"
                        "  The ONNX file was verified and can be used; report this model with these versions."
                    )


FORMATS: dict[str, Format] = {
    "onnx": copy,
    "onnx-fp16": fp16.export,
    "ort": ort_format.export,
    "edge": bundle.export,
    "edge+ort": bundle.export_with_ort,
    "tensorrt": engine,
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

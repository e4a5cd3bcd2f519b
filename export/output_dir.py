"""A finished output directory, held against its own report before anything is made from it."""

from dataclasses import dataclass
from pathlib import Path

from compress import artifacts, recipe
from compress.errors import CompressError
from compress.export.backends import onnxruntime
from compress.recipe import Recipe
from compress.report import schema
from compress.report.schema import Report


@dataclass(frozen=True)
class Finished:
    """What a compilation left: its request, its report, and both models as files."""

    directory: Path
    recipe: Recipe
    report: Report

    @property
    def dense(self) -> Path:
        """The dense model, as it was exported.

        Raises:
            CompressError: `compress clean` removed it.
        """
        path = self._dense
        if not path.is_file():
            raise CompressError(
                f"{path} does not exist: `compress clean` removes the dense model as well; "
                f"run compress with --out {self.directory} again"
            )
        return path

    @property
    def _dense(self) -> Path:
        return self.directory / artifacts.MARKER / artifacts.WORK / "dense.onnx"

    @property
    def compressed(self) -> Path:
        """The file that ships."""
        return self.directory / "model.onnx"


def finished(directory: Path) -> Finished:
    """The output in `directory`, whose files are those that its report is about.

    Raises:
        CompressError: it holds no finished run, or a file has changed since.
    """
    folder = directory / "compression"
    found = Finished(directory, recipe.read(folder / "recipe.toml", {}), schema.read(folder))
    expected_files = [(found.compressed, "file_sha256")]
    if found._dense.is_file():
        expected_files.append((found._dense, "dense_sha256"))
    for path, key in expected_files:
        if not path.is_file():
            raise CompressError(f"{path} does not exist; run compress with --out {directory} again")
        expected, now = found.report.inputs.get(key), onnxruntime.sha256(path)
        if now != expected:
            raise CompressError(
                f"{path} is not the file that the report is about: its sha256 is {now[:16]}..., the report "
                f"says {(expected or 'nothing')[:16]}...\n  Run compress with --out {directory} again."
            )
    return found


def parts(path: Path) -> list[Path]:
    """A model file, and the weights beside it where they are too large for one file."""
    beside = path.with_name(f"{path.name}.data")
    return [path, beside] if beside.is_file() else [path]

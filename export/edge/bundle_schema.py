"""The documents of a bundle: `bundle.json`, the request, and `measured.json`, the measurement."""

from pathlib import Path
from typing import Generic, Literal, TypeVar

from pydantic import Field, PositiveFloat, ValidationError, model_validator

from compress.artifacts import digest
from compress.errors import CompressError
from compress.ir import SCHEMA_VERSION, Budget, Document, Latency, Source
from compress.report.schema import MOST_SAMPLES, Fact, Report
from compress.validation import explain

MERGED = "measurement_sha256"
SHA256 = r"^[0-9a-f]{64}$"

T = TypeVar("T")


class Device(Document):
    """The target as the bundle names it; `kind` is "cpu" or "gpu"."""

    name: str
    kind: Literal["cpu", "gpu"]
    runtime: str
    precision: str


class BundledModel(Document):
    """One of the two models: its files in the bundle, their hash, and the precision they compute in."""

    onnx: str
    ort: str | None = None
    sha256: str = Field(pattern=SHA256)
    precision: Literal["fp32", "fp16", "int8"]


class Pair(Document, Generic[T]):
    """One value for the dense model and one for the compressed one."""

    dense: T
    compressed: T


class Bundle(Document):
    """`bundle.json`: what was asked, how it is timed, and what every file must hash to."""

    schema_version: int = SCHEMA_VERSION
    compress: str
    model: str
    asked: Budget
    target: Device
    shapes: dict[str, int]
    protocol: dict[str, Fact]
    examples: str
    models: Pair[BundledModel]
    files: dict[str, str]
    report: str


class Runtime(Document):
    """What ran the files on the device, and on which kind of processor."""

    name: str
    version: str
    provider: str
    kind: Literal["cpu", "gpu"]
    threads: int = Field(ge=1)
    precision: str
    format: Literal["onnx", "ort"]


class Golden(Document):
    """The device's outputs against the stored ones; None when they could not be compared."""

    passed: bool
    max_abs_difference: float | None
    tolerance: float = Field(gt=0)
    agreement: float = Field(ge=0, le=1)
    examples: int = Field(ge=1)


class Span(Document):
    """Dense over compressed time with its 95 % interval."""

    value: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)


class Used(Document):
    """Energy of one run above idle, and power under load, from a meter of the device."""

    energy_mj: float = Field(gt=0)
    power_w: float = Field(gt=0)
    idle_w: float = Field(ge=0)
    runs: int = Field(ge=1)
    seconds: float = Field(gt=0)
    meter: str
    source: Source = "measured"


class Timings(Document):
    """Single runs of one model: all medians of blocks, and some samples for the distribution."""

    latency_ms: Latency
    block_medians_ms: tuple[PositiveFloat, ...]
    samples_ms: tuple[PositiveFloat, ...] = Field(max_length=MOST_SAMPLES)
    settled: bool
    energy: Used | None = None


class Measurement(Document):
    """`measured.json`: what a device answered; without timings when its numbers were wrong."""

    schema_version: int = Field(ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    created: str
    report: str
    models: Pair[str]
    shapes: dict[str, int]
    runtime: Runtime
    device: dict[str, Fact]
    golden: Pair[Golden]
    protocol: dict[str, Fact]
    ratio: Span | None = None
    drift: float | None = None
    timings: Pair[Timings] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Measurement":
        """Timings come with their ratio and drift, and with as many blocks of one as of the other."""
        if not (self.timings is None) == (self.ratio is None) == (self.drift is None):
            raise ValueError("timings, ratio and drift belong together")
        if self.timings is not None:
            counts = {len(side.block_medians_ms) for side in (self.timings.dense, self.timings.compressed)}
            if len(counts) != 1:
                raise ValueError(f"both models need the same number of blocks, not {sorted(counts)}")
            for side in (self.timings.dense, self.timings.compressed):
                if not min(side.block_medians_ms) <= side.latency_ms.p50 <= max(side.block_medians_ms):
                    raise ValueError(f"the median {side.latency_ms.p50} ms lies outside of all its blocks")
        return self


def identity(report: Report) -> str:
    """A hash of what a measurement is for: the request and the files, whatever was measured so far."""
    made_from = {name: value for name, value in report.inputs.items() if name != MERGED}
    target = (report.target.name, report.target.shapes)
    return digest(report.model, report.verdict.asked, report.max_drop, target, made_from)


def read(path: Path) -> Measurement:
    """The measurement in a file.

    Raises:
        CompressError: the file is missing, damaged, or no measurement.
    """
    again = "Copy it from the device again, or run verify.py of the bundle there."
    try:
        return Measurement.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(f"--merge {path} cannot be read ({error.strerror}).\n  {again}") from error
    except UnicodeDecodeError as error:
        raise CompressError(f"--merge {path} is not text.\n  {again}") from error
    except ValidationError as error:
        if error.errors()[0]["type"] == "json_invalid":
            raise CompressError(f"--merge {path} is not JSON, or only a part of it.\n  {again}") from error
        raise CompressError(f"--merge {explain(error, Measurement, str(path))}\n  {again}") from error

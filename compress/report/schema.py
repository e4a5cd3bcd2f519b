"""What a compilation found, as one document, and the verdict that follows from it.

`schema.json` is the contract that other programs read. A figure that was not measured is None, never
a guess: what was only predicted lives under `predicted`, and is printed with the word "estimate". The
status follows from the figures (`judge`); a document that claims another one is refused.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, ValidationError, model_validator

from compress.errors import CompressError
from compress.ir import SCHEMA_VERSION, Budget, Document, Engine, Half, Latency, Offer, Source, Width
from compress.recipe import Phase
from compress.report.formatting import runs_in
from compress.sites.kinds import known
from compress.validation import explain

MOST_SAMPLES = 600
EXIT_CODES = {"met": 0, "missed": 1, "not_measured": 3}

Status = Literal["met", "missed", "not_measured"]
Fact = str | int | float | bool | None


class Target(Document):
    """Where the files run. `shapes` holds the input's sizes in order: batch, then tokens or pixels.

    `phase` is the one of a decoder that was asked for; in decode, `tokens` is the length of the past.
    """

    name: str
    runtime: str
    runtime_version: str | None = None
    provider: str | None = None
    threads: int | None = None
    precision: str = "fp32"
    shapes: dict[str, int]
    phase: Phase | None = None


class Measured(Document):
    """What the timer said: dense over compressed median, and its bootstrap interval."""

    speedup: float = Field(gt=0)
    interval95: tuple[float, float]

    @model_validator(mode="after")
    def _ordered(self) -> "Measured":
        if not 0 < self.interval95[0] <= self.interval95[1]:
            raise ValueError(f"interval95 must be (low, high) above 0, not {self.interval95}")
        return self


class PhaseTimes(Document):
    """What one decoder takes: to the first token of a prompt, and for every token after it."""

    ttft_ms: Latency
    per_token_ms: Latency


class Phases(Document):
    """Both phases of a decoder: a prompt of `tokens`, and one token after a past of `tokens`."""

    asked: Phase
    tokens: int = Field(ge=1)
    dense: PhaseTimes
    compressed: PhaseTimes
    ttft: Measured
    per_token: Measured


class Predicted(Document):
    """What the plan promises: an estimate, from the profile's roofline or from a measured table."""

    speedup: float | None = None
    latency_ms: float | None = None
    baseline_latency_ms: float | None = None
    energy_mj: float | None = None
    power_w: float | None = None
    source: str = "roofline"


class Verdict(Document):
    """What was asked and what came out; `score_drop` is positive when quality was lost.

    Its interval is a bootstrap over the inputs, both models answering the same ones; None where the score
    is not made of what comes of single inputs.
    """

    status: Status
    asked: Budget
    measured: Measured | None = None
    predicted: Predicted = Predicted()
    score_drop: float | None = None
    score_drop_interval95: tuple[float, float] | None = None
    reason: str | None = None


class Figures(Document):
    """Everything known about one artefact; what was not measured is None."""

    precision: str | None = None
    latency_ms: Latency | None = None
    score: float | None = None
    parameters: int = Field(ge=0)
    weight_bytes: int = Field(ge=0)
    file_bytes: int | None = Field(default=None, ge=0)
    energy_mj: float | None = None
    energy_source: Source | None = None
    power_w: float | None = None

    @model_validator(mode="after")
    def _sourced(self) -> "Figures":
        if (self.energy_mj is not None or self.power_w is not None) and self.energy_source is None:
            raise ValueError("energy_mj and power_w need an energy_source")
        return self


class Score(Document):
    """How quality was judged: the metric, on which split, on how many samples."""

    metric: str
    split: str = "test"
    samples: int = Field(ge=0)
    higher_is_better: bool = True


class ClassScore(Document):
    """The accuracy of both models on the test inputs of one class."""

    name: str
    samples: int = Field(ge=1)
    dense: float = Field(ge=0, le=1)
    compressed: float = Field(ge=0, le=1)


class Parity(Document):
    """PyTorch against the file that ships, over `inputs` inputs.

    `products` in low precision were compared one by one, each on what the file's product reads; they are
    at most `product_difference` apart, as a share of the largest value.
    """

    max_abs_difference: float = Field(ge=0)
    tolerance: float = Field(gt=0)
    agreement: float = Field(ge=0, le=1)
    inputs: int = Field(ge=1)
    products: int = Field(default=0, ge=0)
    product_difference: float = Field(default=0.0, ge=0)


class Chosen(Document):
    """The option that a site was given; `units` of `units_total` are kept."""

    units: int = Field(ge=0)
    units_total: int = Field(ge=1)
    pattern: str = "dense"
    rank: int = 0
    precision: str = "fp32"


class SiteReport(Document):
    """One site: what was done to it, what that damaged, what it costs now and did before.

    `methods_table` are all forms that were looked at for it.
    """

    name: str
    kind: Annotated[str, AfterValidator(known)]
    option: Chosen
    error: float = Field(ge=0)
    latency_ms: float = Field(ge=0)
    dense_latency_ms: float = Field(ge=0)
    source: Source
    offers: tuple[Offer, ...] = ()


class Round(Document):
    """One iteration of the closed loop: the budget of the search, the plan's predicted and measured time.

    `shipped` marks the plan that became the result.
    """

    budget_ms: float
    predicted_ms: float
    measured_ms: float | None = None
    measured_speedup: float | None = None
    shipped: bool = False


class Stage(Document):
    """How long one stage of the compilation took; `resumed` when it was read from disk."""

    name: str
    seconds: float = Field(ge=0)
    resumed: bool = False


class FrontPoint(Document):
    """The best plan at one predicted speedup: its summed error and, where it was judged, its loss.

    `energy_mj` is what a run of it is predicted to take above idle, where prices or a power envelope say.
    """

    budget_ms: float
    predicted_speedup: float = Field(gt=0)
    energy_mj: float | None = None
    error: float = Field(ge=0)
    loss: float | None = None
    chosen: bool = False


class Samples(Document):
    """Single latencies in milliseconds, for the distributions; `timing.thin` bounds their number."""

    baseline: tuple[PositiveFloat, ...] = Field(default=(), max_length=MOST_SAMPLES)
    compressed: tuple[PositiveFloat, ...] = Field(default=(), max_length=MOST_SAMPLES)


class Step(Document):
    """One bar of the waterfall: the first and the last are totals, those between are changes."""

    name: str
    ms: float


class Report(Document):
    """The whole result of one compilation.

    `warnings` are for the reader to act on, `notes` are decisions of the compilation. Of the test inputs both
    models give the share `dense_agreement` the same class. `stages` add up to `wall_seconds`.
    """

    schema_version: int = Field(default=SCHEMA_VERSION, ge=SCHEMA_VERSION, le=SCHEMA_VERSION)
    created: str
    model: str
    task: str | None = None
    target: Target
    verdict: Verdict
    max_drop: float | None = None
    reachable_speedup: float | None = None
    baseline: Figures
    compressed: Figures
    score: Score
    parity: Parity | None = None
    sites: tuple[SiteReport, ...] = ()
    widths: tuple[Width, ...] = ()
    rounds: tuple[Round, ...] = ()
    stages: tuple[Stage, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    samples: Samples = Samples()
    waterfall: tuple[Step, ...] = ()
    phases: Phases | None = None
    engine: Engine | None = None
    half: Half | None = None
    fixed_ms: float | None = None
    attribution: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    classes: tuple[ClassScore, ...] = ()
    dense_agreement: float | None = Field(default=None, ge=0, le=1)
    wall_seconds: float | None = Field(default=None, ge=0)
    command: str | None = None
    revision: str | None = None
    environment: dict[str, Fact] = Field(default_factory=dict)
    protocol: dict[str, Fact] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Report":
        """Refuse a verdict that its own figures contradict."""
        verdict = self.verdict
        if (verdict.measured is None) != (self.compressed.latency_ms is None):
            raise ValueError("verdict.measured and compressed.latency_ms are measured together")
        if verdict.measured is not None and self.baseline.latency_ms is None:
            raise ValueError("a measured speedup needs baseline.latency_ms")
        before, after = self.baseline.score, self.compressed.score
        if before is not None and after is not None:
            drop = before - after if self.score.higher_is_better else after - before
            if verdict.score_drop is None or abs(verdict.score_drop - drop) > 1e-6:
                raise ValueError(f"score_drop {verdict.score_drop}, but the scores say {drop:.6g}")
        runs = precision(self.target, self.sites)
        if self.compressed.precision not in (None, runs):
            raise ValueError(f"compressed.precision {self.compressed.precision!r}, but it runs {runs!r}")
        status, _ = judge(verdict.asked, verdict.measured, self.compressed, verdict.score_drop, self.max_drop)
        if status != verdict.status:
            raise ValueError(f"status {verdict.status!r}, but the figures say {status!r}")
        return self


def found(asked: Budget, measured: Measured | None, compressed: Figures) -> float | None:
    """The measured value of what was asked for, None when only an estimate exists."""
    if asked.name == "speedup":
        return None if measured is None else measured.speedup
    if asked.name == "latency_ms":
        return None if compressed.latency_ms is None else compressed.latency_ms.p50
    if asked.name == "size_mb":
        return None if compressed.file_bytes is None else compressed.file_bytes / 1e6
    if compressed.energy_source != "measured":
        return None
    return compressed.energy_mj if asked.name == "energy_mj" else compressed.power_w


def judge(
    asked: Budget,
    measured: Measured | None,
    compressed: Figures,
    score_drop: float | None,
    max_drop: float | None,
) -> tuple[Status, str | None]:
    """The status that the figures support, and the reason when it is not `met`.

    A drop beyond `max_drop` is a miss whatever the speed; without a measurement on the target
    nothing is ever met.
    """
    if max_drop is not None and score_drop is not None and score_drop > max_drop:
        return "missed", f"the score fell by {score_drop:.4g}, at most {max_drop:.4g} was allowed"
    value = found(asked, measured, compressed)
    if value is None:
        return "not_measured", f"{asked.name} was not measured on the target"
    if asked.rate_hz is not None and compressed.latency_ms is not None:
        took_ms, room_ms = compressed.latency_ms.p50, 1e3 / asked.rate_hz
        if took_ms > room_ms:
            return "missed", f"a run takes {took_ms:.3g} ms, {asked.rate_hz:g} a second leave {room_ms:.3g}"
    if value < asked.value if asked.name == "speedup" else value > asked.value:
        side = "short of" if asked.name == "speedup" else "over"
        return "missed", f"{abs(value / asked.value - 1):.2%} {side} what was asked"
    if max_drop is not None and score_drop is None:
        return "not_measured", f"the score was not measured, at most {max_drop:.4g} may be lost"
    return "met", None


def exit_code(report: Report) -> int:
    """0 met, 1 missed, 3 not measured."""
    return EXIT_CODES[report.verdict.status]


def steps(dense_ms: float, compressed_ms: float, sites: Sequence[SiteReport]) -> tuple[Step, ...]:
    """The waterfall from dense to compressed: what each kind of site saved, and what is unexplained."""
    middle = []
    for kind in dict.fromkeys(site.kind for site in sites):
        own = [site for site in sites if site.kind == kind]
        middle.append(Step(name=kind, ms=sum(s.latency_ms - s.dense_latency_ms for s in own)))
    rest = compressed_ms - dense_ms - sum(step.ms for step in middle)
    if abs(rest) > 1e-6 * dense_ms:
        middle.append(Step(name="unexplained", ms=rest))
    return (Step(name="dense", ms=dense_ms), *middle, Step(name="compressed", ms=compressed_ms))


def folder_of(directory: Path) -> Path:
    """The folder that holds report.json: a `compression` folder itself, or the one in an output directory."""
    nested = directory / "compression"
    return nested if (nested / "report.json").is_file() else directory


def read(directory: Path) -> Report:
    """The report in a `compression` folder, or in the output directory around it.

    Raises:
        CompressError: there is none, or it is truncated, malformed or from another version.
    """
    path = folder_of(directory) / "report.json"
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(
            f"{path} cannot be read ({error.strerror}); give the --out directory of a finished run"
        ) from error
    except UnicodeDecodeError as error:
        raise CompressError(f"{path} is not text; delete it and run compress again") from error
    except ValidationError as error:
        raise CompressError(f"{_mistake(error, str(path))}\n  Delete it and run compress again.") from error


def _mistake(error: ValidationError, where: str) -> str:
    """The first mistake in one line; what was found is left out where it is the whole document."""
    problem = error.errors()[0]
    if problem["type"] not in ("value_error", "json_invalid"):
        return explain(error, Report, where)
    place = ".".join(map(str, problem["loc"]))
    return f"{where}: {place and place + ': '}{problem['msg'].removeprefix('Value error, ')}"


def precision(target: Target, sites: Sequence[SiteReport]) -> str:
    """What the compressed file computes in, e.g. `fp32 + int8`."""
    return runs_in(target.precision, (site.option.precision for site in sites if site.option.units))

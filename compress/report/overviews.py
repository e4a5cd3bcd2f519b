"""Results of everything but a compilation, as documents: sites, reachable plans, timings, devices."""

from compress.ir import Document, Latency
from compress.recipe import Shapes

Fact = str | int | float | bool | None


class SiteOverview(Document):
    """One site of a model; shares are of the model's weights and of all sites' multiplications."""

    name: str
    kind: str
    units: int
    parameters: int
    weights_share: float
    multiplications_share: float
    can_be_dropped: bool


class SkippedPlace(Document):
    """A place that was looked at and is not a site."""

    place: str
    reason: str


class Inspection(Document):
    """The sites of a model, found without data; `parameters_in_sites` counts no parameter twice.

    `fallback` says why the model could not be traced, where sites were found by the names of modules.
    """

    model: str
    sites: tuple[SiteOverview, ...]
    parameters: int
    parameters_in_sites: int
    skipped: tuple[SkippedPlace, ...] = ()
    fallback: str = ""


class OptionOverview(Document):
    """A number format, pattern or rank, and how much faster than dense whole sites run in it."""

    form: str
    slowest_site_speedup: float
    fastest_site_speedup: float
    pays: bool


class BlockTiming(Document):
    """One product in blocks, in the fastest layout that was timed here."""

    product: str
    rows: int
    pattern: str
    layout: str
    speedup: float
    offered: bool


class PlanRow(Document):
    """The plan of least layer error at one speedup; `kept` is the share of units left, by kind of site.

    `mean_layer_error` is None where nothing was computed for it.
    """

    speedup_estimate: float
    latency_ms_estimate: float
    mean_layer_error: float | None
    kept: dict[str, float]
    forms: str


class PlanOverview(Document):
    """What is reachable on a target, by which sites and moves; times and speedups are estimates.

    `source` says whether the times of single sites were measured on the target or estimated.
    """

    model: str
    target: str
    source: str
    dense_ms: float
    outside_sites_ms: float
    reachable_speedup_estimate: dict[str, float]
    forms: tuple[OptionOverview, ...] = ()
    blocks: tuple[BlockTiming, ...] = ()
    hidden_width: str | list[dict[str, Fact]]
    plans: tuple[PlanRow, ...] = ()


class TimedArtifact(Latency):
    """Latency of one file in milliseconds, and its speedup over the first one."""

    artifact: str
    speedup: float
    interval95: tuple[float, float]


class BenchResult(Document):
    """Files that were timed in turn on this machine."""

    artifacts: tuple[TimedArtifact, ...]
    shapes: Shapes
    protocol: dict[str, Fact]
    drift: float
    environment: dict[str, Fact]


class Cleaned(Document):
    """What `clean` removed from an output, and how large the output is without it."""

    directory: str
    freed_mb: float
    remaining_mb: float

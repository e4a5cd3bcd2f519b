"""What the sites of a model cost on this machine: chains of them, timed in turn with each other.

All widths of a shape are timed together with the dense one and with the chain without the site, as
ratios to the dense one within each cycle, so that a slow phase of the machine cancels. With one thread
the clock is that thread's own processor time, which stands still while other programs hold the core;
with more it is the wall clock.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from compress.core.fakequant import PRECISIONS
from compress.cost.latency_table import FORM_SEPARATOR, Rows, Table, grid, measure_missing
from compress.errors import CompressError
from compress.export.backends import onnxruntime
from compress.export.microbench.onnx_chain import SiteLayouts, default_layouts
from compress.export.microbench.onnx_chain import chain as chain
from compress.export.onnx import quantized
from compress.ir import Option, Site
from compress.measure import timing
from compress.sites.kinds import kind_of

COPIES = 4
COPIES_MB = 96  # weights of one graph
MOST_COPIES = 32
GROUP_MB = 768  # weights of all graphs that are loaded at once
LARGEST_MB = 1536  # a protobuf file ends at 2 GB
SHAPE_SECONDS = 8.0
CYCLE_LIMITS = (12, 150)
MOST_LEVELS = 24
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class ChainRuntime:
    """How chains are run, where it is not onnxruntime on this processor.

    Attributes:
        make: a call that runs the chain of a site at some units, with so many copies, in a form, once.
        clock: seconds.
        least_mb: float32 weights of a chain of dense sites, at least, so that no cache holds them.
        group_mb: weights of all chains that are loaded at once.
    """

    make: Callable[[Site, int, int, str], timing.Runner]
    clock: timing.Clock = time.perf_counter
    least_mb: float = 0.0
    group_mb: float = 0.0


def open_session(file: bytes, site: Site, threads: int, provider: str = onnxruntime.CPU) -> timing.Runner:
    """A call that runs the file once at the site's own shape, and waits for it.

    Raises:
        CompressError: the rows of the site's products are not its batch times its tokens.
    """
    import onnxruntime as ort

    rows, batch, tokens = site.matmuls[0].rows, site.batch, site.tokens
    if kind_of(site).attends and rows != batch * tokens:
        raise CompressError(f"{site.name}: {rows} rows are not batch {batch} x {tokens} tokens; not timed")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    loaded = ort.InferenceSession(file, options, providers=[provider])
    hidden = next(m.inner for m in site.matmuls if m.out_per_unit)
    random = np.random.default_rng(0)
    feeds = {"x": random.standard_normal((rows, hidden)).astype(np.float32)}
    for value in loaded.get_inputs()[1:]:
        if value.name == "mask":
            feeds["mask"] = np.zeros((batch, 1, tokens, site.past + tokens), dtype=np.float32)
            if site.causal:
                later = np.triu(np.full((tokens, tokens), -1e9, dtype=np.float32), 1)
                feeds["mask"][..., site.past :] += later
        else:
            held = (batch, value.shape[1], site.past, site.head_dim)
            feeds[value.name] = random.standard_normal(held).astype(np.float32)
    if provider != onnxruntime.CPU:
        return onnxruntime.bound(loaded, feeds, provider)
    return lambda: loaded.run(None, feeds)


def weights_mb(site: Site, units: int) -> float:
    """Megabytes of float32 weights of one copy."""
    return 4e-6 * sum(math.prod(matmul.features(units)) for matmul in site.matmuls)


def sample_levels(levels: Iterable[int], most: int = MOST_LEVELS) -> list[int]:
    """At most about `most` levels, ends included and evenly spread; the rest is interpolated."""
    ordered = sorted(set(levels) - {0}, reverse=True)
    if len(ordered) <= most:
        return ordered
    picked = {round(k * (len(ordered) - 1) / (most - 1)) for k in range(most)}
    return [ordered[index] for index in sorted(picked)]


def measure(
    sites: Iterable[Site],
    levels: Mapping[str, Sequence[int]],
    threads: int = 1,
    progress: Tick | None = None,
    *,
    seconds: float = SHAPE_SECONDS,
    clock: timing.Clock | None = None,
    rig: ChainRuntime | None = None,
) -> Rows:
    """Milliseconds that a site adds to the model, by shape and units.

    Shapes that cannot be timed alone are left out: they keep their estimate.

    Args:
        sites: one of every shape is timed.
        levels: units to time by row (`latency_table.row_key`); the dense width is always timed.
        threads: of onnxruntime.
        progress: called with cycles done and cycles in all, of all rows.
        seconds: about how long one row may take.
        clock: seconds; the thread's processor time or the wall clock when None.
        rig: how chains are run; by onnxruntime on this processor unless given.
    """
    timing.check_threads(threads)
    rig = rig or cpu_runtime(threads, clock)
    shapes = {site.shape: site for site in sites}
    wanted = {
        key: units for key, units in levels.items() if units and key.partition(FORM_SEPARATOR)[0] in shapes
    }
    rows: Rows = {}
    for done, (key, units) in enumerate(wanted.items()):
        shape, _, form = key.partition(FORM_SEPARATOR)

        def tick(part: int, whole: int, before: int = done) -> None:
            if progress is not None:
                progress(before * 1000 + 1000 * part // whole, 1000 * len(wanted))

        try:
            rows[key] = measure_site(shapes[shape], units, rig, tick, form=form or "dense", seconds=seconds)
        except CompressError:
            continue
    return rows


def cpu_runtime(
    threads: int, clock: timing.Clock | None = None, written: SiteLayouts = default_layouts
) -> ChainRuntime:
    """ONNX chains in onnxruntime on this processor, blocks in the layouts that `written` chooses."""
    make = onnxruntime_chains(threads, onnxruntime.CPU, written)
    return ChainRuntime(make, clock or clock_for(threads), group_mb=GROUP_MB)


def onnxruntime_chains(
    threads: int, provider: str, written: SiteLayouts = default_layouts
) -> Callable[[Site, int, int, str], timing.Runner]:
    """What makes a call of an ONNX chain with its products in a form."""

    def make(site: Site, units: int, copies: int, form: str) -> timing.Runner:
        return open_session(_formed(site, units, copies, form, written), site, threads, provider)

    return make


def measure_site(
    site: Site,
    levels: Iterable[int],
    rig: ChainRuntime,
    progress: Tick,
    *,
    form: str = "dense",
    seconds: float,
) -> dict[int, float]:
    """The row of one site: every level and the dense width, in groups that fit into memory.

    Whatever the form, all times are relative to the plain site at its dense width.
    """
    wanted = sorted({*levels, *([site.units] if form == "dense" else [])} - {0}, reverse=True)
    dense_mb = weights_mb(site, site.units)
    if dense_mb > LARGEST_MB:
        raise CompressError(f"{site.name}: {dense_mb:.0f} MB of weights are too many to time alone")
    copies = _copies(site, rig.least_mb)
    others = [units for units in wanted if form != "dense" or units != site.units]
    groups = _groups(site, others, copies, rig.group_mb)
    ratios: dict[int, float] = {site.units: 1.0} if form == "dense" else {}
    dense_ms: list[float] = []
    around: list[float] = []
    for number, group in enumerate(groups):
        runners = [rig.make(site, units, copies, "dense") for units in (site.units, 0)]
        runners += [rig.make(site, units, copies, form) for units in group]

        def tick(part: int, whole: int, before: int = number) -> None:
            progress(before * whole + part, len(groups) * whole)

        times = time_cycles(runners, seconds / len(groups), rig.clock, tick)  # [cycles, graphs]
        against = np.median(times / times[:, :1], axis=0)
        dense_ms.append(float(np.median(times[:, 0])))
        around.append(float(against[1]))
        share = (against[2:] - against[1]) / (1 - against[1])
        ratios |= {units: float(part) for units, part in zip(group, share, strict=True)}
    site_ms = (1 - float(np.median(around))) * float(np.median(dense_ms)) / copies
    # Noise can make a tiny site look free or better than free; it never is.
    return {units: max(ratios[units], 1e-4) * site_ms for units in wanted}


def _formed(site: Site, units: int, copies: int, form: str, written: SiteLayouts) -> bytes:
    """A chain whose products run in a form; zeros that onnxruntime multiplies like any number need none."""
    option = Option.of(form, units)
    if form in ("dense", "2:4"):
        return chain(site, units, copies)
    if option.precision == "fp32":
        return chain(site, units, copies, pattern=option.pattern, rank=option.rank, choose=written(site))
    return quantized.lower_chain(chain(site, units, copies), PRECISIONS[option.precision])


def _groups(site: Site, levels: Sequence[int], copies: int, group_mb: float) -> list[list[int]]:
    """Levels split so that the graphs of one group, with the dense one, fit into `group_mb`."""
    groups: list[list[int]] = [[]]
    room = group_mb - copies * weights_mb(site, site.units)
    used = 0.0
    for units in levels:
        size = copies * weights_mb(site, units)
        if groups[-1] and used + size > room:
            groups.append([])
            used = 0.0
        groups[-1].append(units)
        used += size
    return groups


def time_cycles(
    runners: Sequence[timing.Runner], seconds: float, clock: timing.Clock, progress: Tick
) -> NDArray[np.float64]:
    """Milliseconds of every runner in every cycle, [cycles, runners]; the order alternates."""
    for run in runners:
        _visit(run, clock)
    began = time.monotonic()
    times: list[list[float]] = []
    while len(times) < CYCLE_LIMITS[0] or (
        len(times) < CYCLE_LIMITS[1] and time.monotonic() - began < seconds
    ):
        order = range(len(runners)) if len(times) % 2 == 0 else range(len(runners) - 1, -1, -1)
        row = [0.0] * len(runners)
        for index in order:
            row[index] = _visit(runners[index], clock)
        times.append(row)
        spent = (time.monotonic() - began) / max(seconds, 1e-9)
        progress(min(999, int(1000 * max(len(times) / CYCLE_LIMITS[1], min(spent, 1.0)))), 1000)
    progress(1000, 1000)
    return np.array(times)


def _visit(run: timing.Runner, clock: timing.Clock) -> float:
    """The faster of two runs, after one that brings the weights back into the caches."""
    run()
    best = math.inf
    for _ in range(2):
        began = clock()
        run()
        best = min(best, 1e3 * (clock() - began))
    return best


def clock_for(threads: int) -> timing.Clock:
    """The clock that other programs disturb least."""
    return time.thread_time if threads == 1 else time.perf_counter


def _copies(site: Site, least_mb: float) -> int:
    """Copies in one chain: fewer where weights are large, more where caches would hold them all."""
    size = max(weights_mb(site, site.units), 1e-9)
    return int(max(1, min(COPIES, COPIES_MB // size), min(MOST_COPIES, math.ceil(least_mb / size))))


def empty_table(threads: int) -> Table:
    """A table of this machine and runtime without any rows."""
    return Table(
        fingerprint=timing.fingerprint(),
        runtime="onnxruntime",
        versions={"onnxruntime": timing.version("onnxruntime") or "unknown"},
        threads=threads,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def table(sites: Sequence[Site], *, align: int, threads: int = 1, progress: Tick | None = None) -> Table:
    """The measured table of this machine for these sites; what is cached is not timed again."""
    wanted = {site.shape: sample_levels(grid(site, align)) for site in sites}
    return measure_missing(
        empty_table(threads), wanted, lambda missing: measure(sites, missing, threads, progress)
    )

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

import numpy as np
from numpy.typing import NDArray

from compress.cost.latency_table import FORM_SEPARATOR, Rows
from compress.errors import CompressError
from compress.ir import Site
from compress.measure import timing

COPIES = 4
COPIES_MB = 96  # weights of one graph
MAX_COPIES = 32
GROUP_MB = 768  # weights of all graphs that are loaded at once
MAX_SITE_MB = 1536  # a protobuf file ends at 2 GB
SHAPE_SECONDS = 8.0
CYCLE_LIMITS = (12, 150)
MOST_LEVELS = 24
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class ChainRuntime:
    """How a backend runs chains.

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
    rig: ChainRuntime,
    seconds: float = SHAPE_SECONDS,
) -> Rows:
    """Milliseconds that a site adds to the model, by shape and units.

    Shapes that cannot be timed alone are left out: they keep their estimate.

    Args:
        sites: one of every shape is timed.
        levels: units to time by row (`latency_table.row_key`); the dense width is always timed.
        threads: of the runtime.
        progress: called with cycles done and cycles in all, of all rows.
        rig: how chains are run (`Backend.rig`).
        seconds: about how long one row may take.
    """
    timing.check_threads(threads)
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
    if dense_mb > MAX_SITE_MB:
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
        _fastest_of_two(run, clock)
    began = time.monotonic()
    times: list[list[float]] = []
    while len(times) < CYCLE_LIMITS[0] or (
        len(times) < CYCLE_LIMITS[1] and time.monotonic() - began < seconds
    ):
        order = range(len(runners)) if len(times) % 2 == 0 else range(len(runners) - 1, -1, -1)
        row = [0.0] * len(runners)
        for index in order:
            row[index] = _fastest_of_two(runners[index], clock)
        times.append(row)
        spent = (time.monotonic() - began) / max(seconds, 1e-9)
        progress(min(999, int(1000 * max(len(times) / CYCLE_LIMITS[1], min(spent, 1.0)))), 1000)
    progress(1000, 1000)
    return np.array(times)


def _fastest_of_two(run: timing.Runner, clock: timing.Clock) -> float:
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
    return int(max(1, min(COPIES, COPIES_MB // size), min(MAX_COPIES, math.ceil(least_mb / size))))

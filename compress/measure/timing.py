"""Latency of models on this machine, timed in turn so that slow phases of the machine cancel.

One *cycle* holds a block of runs of each model, first in one order and then in the reverse (A B B A): a slow
phase hits both, and a linear drift cancels exactly. Ratios and their intervals are in `intervals`. A ratio of
two medians over all runs would not cancel a slow phase that covers more runs of one model than of the other.
"""

import gc
import hashlib
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic import Field

from compress.errors import CompressError
from compress.ir import Document, Latency
from compress.measure.intervals import Estimate, describe, paired_ratio

MIN_BLOCKS = 30
WARM_UP_SPREAD = 0.02
WINDOW_RUNS = 5
WINDOWS = 3
FINAL_BLOCKS = 2  # the proof is timed this many times as long as a turn of the loop
MAX_DRIFT = 0.03
MAX_OTHER_CORES = 0.15  # cores busy elsewhere, from which on caches and memory are not the runners' own
CPUINFO = Path("/proc/cpuinfo")
# Instruction sets that change which kernels a runtime picks.
FLAGS = (
    *("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "sve", "sve2"),
)
PACKAGES = ("torch", "onnx", "onnxruntime", "transformers")

Runner = Callable[[], object]
Clock = Callable[[], float]
Samples = NDArray[np.float64]


class Protocol(Document):
    """The settings of one comparison, recorded in the report."""

    blocks: int = Field(default=40, ge=MIN_BLOCKS)
    block_ms: float = Field(default=60.0, gt=0)
    threads: int = Field(default=1, ge=1)
    seed: int = 0
    order: str = "interleaved, A B B A"
    interval: str = "95 % bootstrap over A B B A cycles of paired medians"
    warmup: str = f"until {WINDOWS} windows of {WINDOW_RUNS} runs agree within {WARM_UP_SPREAD:.0%}, bounded"
    clock: str = "wall"


@dataclass(frozen=True)
class Comparison:
    """What was measured. `samples_ms[name]` holds one array of single runs per block, in time order.

    Attributes:
        protocol: the settings.
        baseline: the first runner's name.
        samples_ms: single latencies by runner and block.
        drift: how much slower the baseline was at the end than in its first blocks (0.01 is 1 %).
        settled: by runner, whether the warm-up became stable before its bound.
        elsewhere: cores that other programs kept busy meanwhile (0.5 is half of one).
    """

    protocol: Protocol
    baseline: str
    samples_ms: dict[str, tuple[Samples, ...]]
    drift: float
    settled: dict[str, bool]
    elsewhere: float = 0.0

    def samples(self, name: str) -> tuple[float, ...]:
        """Every single latency of one runner, in time order."""
        return tuple(float(value) for value in np.concatenate(self.samples_ms[name]))

    def latency(self, name: str) -> Latency:
        """Percentiles and moments over all runs of one runner."""
        return summarize(np.concatenate(self.samples_ms[name]))

    def ratio(self, other: str, baseline: str | None = None) -> Estimate:
        """How many times faster `other` is than the baseline."""
        return paired_ratio(
            self.samples_ms[baseline or self.baseline], self.samples_ms[other], self.protocol.seed
        )


def compare(
    runners: Mapping[str, Runner],
    *,
    blocks: int = 40,
    block_ms: float = 60.0,
    threads: int = 1,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Time every runner in interleaved blocks; the first one is the baseline.

    Args:
        runners: what to call for one inference each, by name.
        blocks: blocks of every runner, at least 30; an odd number is raised to an even one.
        block_ms: how long a block lasts; it sets the number of runs, at least 3.
        threads: what the runners use; it is checked and recorded, not set.
        seed: of the bootstrap.
        clock: seconds.
        progress: called with blocks done and blocks in all.

    Raises:
        CompressError: no runner, fewer than 30 blocks, or more threads than physical cores.
    """
    if not runners:
        raise CompressError("nothing to time: no runner was given; name at least one artifact")
    if blocks < MIN_BLOCKS:
        raise CompressError(f"{blocks} blocks are too few for an interval; ask for {MIN_BLOCKS} or more")
    check_threads(threads)
    protocol = Protocol(blocks=blocks + blocks % 2, block_ms=block_ms, threads=threads, seed=seed)
    names = list(runners)
    first = names[0]
    others = elsewhere()
    with _no_collection():
        warm = {name: warm_up(runners[name], clock, bound_ms=10 * block_ms) for name in names}
        runs = {name: max(3, round(block_ms / max(warm[name][0], 1e-6))) for name in names}
        taken: dict[str, list[Samples]] = {name: [] for name in names}
        tail = max(3, protocol.blocks // 10)
        work = protocol.blocks * len(names) + tail
        done = 0
        for block in range(protocol.blocks):
            for name in names if block % 2 == 0 else reversed(names):
                taken[name].append(_block(runners[name], runs[name], clock))
                done += 1
                if progress is not None:
                    progress(done, work)
        again = [_block(runners[first], runs[first], clock) for _ in range(tail)]
    if progress is not None:
        progress(work, work)
    return Comparison(
        protocol=protocol,
        baseline=first,
        samples_ms={name: tuple(taken[name]) for name in names},
        drift=float(_median_of(again) / _median_of(taken[first][:tail]) - 1),
        settled={name: warm[name][1] for name in names},
        elsewhere=others(),
    )


def elsewhere() -> Callable[[], float]:
    """A function that gives the cores which other programs have kept busy since this call."""
    began, before = time.perf_counter(), _foreign_seconds()

    def cores() -> float:
        spent = max(time.perf_counter() - began, 1e-9)
        return max(0.0, (_foreign_seconds() - before) / spent)

    return cores


def _foreign_seconds() -> float:
    """Processor seconds since the start of the machine that went to no thread of this process."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    # What guests take is in the user time already.
    guests = getattr(machine, "guest", 0.0) + getattr(machine, "guest_nice", 0.0)
    return float(sum(machine) - idle - guests - own.user - own.system)


def _median_of(blocks: list[Samples]) -> float:
    return float(np.median([np.median(block) for block in blocks]))


def _block(run: Runner, runs: int, clock: Clock) -> Samples:
    """Single latencies of `runs` runs, milliseconds, after one run that is not counted.

    The first run after another artifact finds its weights evicted from the caches.
    """
    run()
    stamps = [clock()]
    for _ in range(runs):
        run()
        stamps.append(clock())
    return np.array([1e3 * (after - before) for before, after in pairwise(stamps)])


def warm_up(run: Runner, clock: Clock, *, bound_ms: float) -> tuple[float, bool]:
    """Run until three windows in a row agree within 2 %, at most about `bound_ms`.

    Returns:
        The median of the last window in milliseconds, and whether the windows agreed.
    """
    began = clock()
    medians: list[float] = []
    while True:
        medians.append(float(np.median(_block(run, WINDOW_RUNS, clock))))
        last = medians[-WINDOWS:]
        if len(last) == WINDOWS and max(last) <= min(last) * (1 + WARM_UP_SPREAD):
            return last[-1], True
        if 1e3 * (clock() - began) >= bound_ms:
            return last[-1], False


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the timings."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def summarize(samples_ms: Samples) -> Latency:
    """Percentiles, mean and standard deviation of single latencies."""
    return Latency.model_validate(describe(samples_ms))


def timing_warnings(drift: float, settled: Mapping[str, bool], elsewhere: float = 0.0) -> list[str]:
    """Warnings about a timing: other programs ran, the baseline drifted, a warm-up did not settle."""
    found = []
    if elsewhere > MAX_OTHER_CORES:
        found.append(
            f"Other programs kept {elsewhere:.1f} cores busy while this was timed. That slows "
            "both models, but not equally: on a quiet machine the speedup may be outside the interval. Time "
            "it again there."
        )
    if abs(drift) > MAX_DRIFT:
        course = "slower" if drift > 0 else "faster"
        found.append(
            f"The dense model was {abs(drift):.1%} {course} at the end than at the start; the "
            "interleaved ratio is not affected, single latencies are."
        )
    return found + [
        f"The {name} model did not settle within {WARM_UP_SPREAD:.0%} while warming up."
        for name, quiet in settled.items()
        if not quiet
    ]


def check_threads(threads: int) -> None:
    """Refuse a thread count that this machine cannot run side by side.

    Raises:
        CompressError: fewer than 1, or more than the physical cores.
    """
    cores = physical_cores()
    if not 1 <= threads <= cores:
        raise CompressError(
            f"{threads} threads cannot be timed: this process may use {cores} physical "
            f"core{'s' if cores > 1 else ''}; use 1 to {cores}"
        )


def physical_cores() -> int:
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, usable))


def processor(cpuinfo: str) -> tuple[str, tuple[str, ...]]:
    """The model name and the flags of interest in the text of `/proc/cpuinfo`."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    part = (
        f"arm {fields['cpu implementer']} {fields.get('cpu part', '')}" if "cpu implementer" in fields else ""
    )
    name = fields.get("model name") or fields.get("model") or part or platform.processor() or "unknown"
    present = set((fields.get("flags") or fields.get("features") or "").split())
    return name, tuple(flag for flag in FLAGS if flag in present)


def environment() -> dict[str, str | int | float | bool | None]:
    """Facts of this machine that a measured number depends on."""
    name, flags = processor(_cpuinfo())
    facts: dict[str, str | int | float | bool | None] = {
        "cpu": name,
        "flags": " ".join(flags),
        "physical_cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "os": platform.platform(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
    return facts | {package: version(package) for package in PACKAGES}


def _cpuinfo() -> str:
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def version(package: str) -> str | None:
    """The installed version of a package, None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def fingerprint() -> str:
    """A short hash of what decides speed here: processor, instruction sets, cores, runtime version."""
    name, flags = processor(_cpuinfo())
    parts = (platform.machine(), name, *flags, str(physical_cores()), version("onnxruntime") or "")
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]


def thin(samples: Sequence[float], most: int) -> tuple[float, ...]:
    """At most `most` samples with the same distribution: evenly spaced ranks, both ends kept.

    >>> thin([5.0, 1.0, 4.0, 2.0, 3.0], most=3)
    (1.0, 3.0, 5.0)
    """
    ordered = sorted(samples)
    if len(ordered) <= most:
        return tuple(ordered)
    return tuple(ordered[round(i * (len(ordered) - 1) / (most - 1))] for i in range(most))

"""Energy of one run: from the processor's own counters, or estimated from a power envelope."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from compress.ir import Document, Source
from compress.profiles import Profile

POWERCAP = Path("/sys/class/powercap")


class Energy(Document):
    """Energy of one run above idle; `estimated` figures never enter a verdict."""

    energy_mj: float
    source: Source
    meter: str
    runs: int | None = None
    seconds: float | None = None
    idle_w: float | None = None


class Meter(Protocol):
    """A counter of energy: of the processor (`Rapl`), or of the GPU (`measure.verify_on_device.Nvml`)."""

    found: bool
    name: str

    def joules(self) -> float:
        """Joules since some moment in the past."""


class Rapl:
    """The processor's own energy counters (Linux powercap), packages and their memory added up."""

    name = "RAPL"

    def __init__(self, root: Path = POWERCAP) -> None:
        """Find the readable counters below `root`; `found` is False when there is none."""
        self._last: dict[Path, int] = {}
        self._range: dict[Path, int] = {}
        self._total_uj = 0
        for path in sorted(root.glob("intel-rapl:*")):
            try:
                label = (path / "name").read_text(encoding="utf-8").strip()
                # core and uncore are inside the package; psys holds it a second time.
                if re.fullmatch(r"package-\d+(-die-\d+)?|dram", label):
                    self._last[path] = int((path / "energy_uj").read_text(encoding="utf-8"))
                    self._range[path] = int((path / "max_energy_range_uj").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                self._last.pop(path, None)
        self.found = bool(self._last)

    def joules(self) -> float:
        """Joules since this object was made; a counter that wrapped once in between is handled."""
        for path, before in self._last.items():
            now = int((path / "energy_uj").read_text(encoding="utf-8"))
            self._total_uj += now - before if now >= before else now - before + self._range[path] + 1
            self._last[path] = now
        return self._total_uj / 1e6


def measure_energy(
    run: Callable[[], object],
    *,
    seconds: float = 5.0,
    meter: Meter | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Energy | None:
    """Energy of one run: the counter over `seconds` of steady load minus `seconds` of idle.

    Returns:
        None when this machine has no readable counter, or when load did not exceed idle.
    """
    meter = Rapl() if meter is None else meter
    if not meter.found:
        return None
    idle_w = _watts(meter, lambda: sleep(min(0.5, seconds)), seconds, clock)[0]
    watts, runs, took = _watts(meter, run, seconds, clock)
    if watts <= idle_w:
        return None
    energy_mj = 1e3 * (watts - idle_w) * took / runs
    return Energy(
        energy_mj=energy_mj, source="measured", meter=meter.name, runs=runs, seconds=took, idle_w=idle_w
    )


def _watts(
    meter: Meter, run: Callable[[], object], seconds: float, clock: Callable[[], float]
) -> tuple[float, int, float]:
    """Mean power, calls and seconds; the counter is read often, since it wraps within minutes."""
    before, began, calls, last = meter.joules(), clock(), 0, clock()
    while clock() - began < seconds:
        run()
        calls += 1
        if clock() - last > 1:
            meter.joules()
            last = clock()
    took = clock() - began
    return (meter.joules() - before) / took, calls, took


def energy_above_idle_mj(latency_ms: float, profile: Profile, threads: int = 1) -> float | None:
    """`(load - idle) * time`; on a CPU only the share of the busy cores counts."""
    if profile.idle_w is None or profile.load_w is None:
        return None
    share = min(1.0, threads / profile.processors) if profile.kind == "cpu" else 1.0
    return (profile.load_w - profile.idle_w) * share * latency_ms

import pytest

from compress import profiles
from compress.cost import energy


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, ms):
        def run():
            self.now += ms / 1e3

        return run


def powercap(root, domains):
    for name, label, energy_uj, span_uj in domains:
        folder = root / name
        folder.mkdir(parents=True)
        (folder / "name").write_text(label + "\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
        (folder / "max_energy_range_uj").write_text(f"{span_uj}\n")


def test_counters_add_packages_and_memory_but_not_parts_of_a_package(tmp_path):
    powercap(
        tmp_path,
        [
            ("intel-rapl:0", "package-0", 1_000_000, 9_999_999),
            ("intel-rapl:0:0", "core", 5, 9_999_999),
            ("intel-rapl:0:1", "dram", 2_000_000, 9_999_999),
            ("intel-rapl:1", "psys", 7, 9_999_999),
        ],
    )
    meter = energy.Rapl(tmp_path)
    assert meter.found
    assert meter.joules() == 0
    for name, value in (("0", 1_500_000), ("0:0", 9_000_000), ("0:1", 2_250_000), ("1", 9_000_000)):
        (tmp_path / f"intel-rapl:{name}" / "energy_uj").write_text(str(value))
    assert meter.joules() == pytest.approx(0.75)
    # The package's counter wraps: 8.5 J to its end (9,999,999 is the last value), then 0.5 J.
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("500000")
    assert meter.joules() == pytest.approx(0.75 + 9.0)


def test_without_a_readable_counter_there_is_no_figure(tmp_path):
    assert not energy.Rapl(tmp_path / "absent").found
    powercap(tmp_path, [("intel-rapl:0", "package-0", "nonsense", 5)])
    assert energy.measure_energy(lambda: None, meter=energy.Rapl(tmp_path)) is None


class Meter:
    """A constant load: 10 W idle, 30 W while anything works."""

    found = True
    name = "a test"

    def __init__(self, clock, load_w=30.0):
        self.clock, self.load_w, self.idle_s = clock, load_w, 0.0

    def joules(self):
        return 10.0 * self.idle_s + self.load_w * (self.clock.now - self.idle_s)


def test_energy_is_load_minus_idle_per_run():
    clock = Clock()
    meter = Meter(clock)

    def sleep(seconds):
        clock.now += seconds
        meter.idle_s += seconds

    found = energy.measure_energy(clock.work(20.0), seconds=5, meter=meter, clock=clock, sleep=sleep)
    assert found.energy_mj == pytest.approx(20.0 * 20.0)  # 20 W above idle for 20 ms
    assert found.idle_w == pytest.approx(10.0)
    assert found.runs == pytest.approx(250, abs=1)
    assert found.source == "measured"
    quiet = Meter(clock, load_w=10.0)
    assert energy.measure_energy(clock.work(20.0), seconds=2, meter=quiet, clock=clock, sleep=sleep) is None


def test_an_estimate_counts_busy_cores_only():
    profile = profiles.load("cpu-avx2")
    assert energy.energy_above_idle_mj(4.0, profile, threads=2) == pytest.approx((95 - 15) * 4.0 * 2 / 8)
    assert energy.energy_above_idle_mj(4.0, profile, threads=99) == pytest.approx(320)
    assert energy.energy_above_idle_mj(2.0, profiles.load("a100")) == pytest.approx(710)
    assert energy.energy_above_idle_mj(2.0, profiles.load("cpu")) is None

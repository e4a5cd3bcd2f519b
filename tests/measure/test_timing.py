import gc
import math
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from compress.errors import CompressError
from compress.measure import timing


class Clock:
    """A clock that only moves when something runs; the machine's speed may vary with its hand."""

    def __init__(self, slowness=lambda now: 1.0):
        self.now = 0.0
        self.slowness = slowness

    def __call__(self):
        return self.now

    def work(self, ms):
        def run():
            self.now += ms / 1e3 * self.slowness(self.now)

        return run


def compare(clock, times_ms, **keywords):
    runners = {name: clock.work(ms) for name, ms in times_ms.items()}
    return timing.compare(runners, clock=clock, **{"blocks": 30, "block_ms": 20, **keywords})


def test_a_steady_machine_gives_the_exact_times_and_ratio():
    found = compare(Clock(), {"dense": 4.0, "small": 1.6})
    assert found.latency("dense").p50 == pytest.approx(4.0)
    assert found.latency("small").mean == pytest.approx(1.6)
    ratio = found.ratio("small")
    assert (ratio.value, ratio.interval.low, ratio.interval.high) == pytest.approx((2.5, 2.5, 2.5))
    assert found.ratio("dense", "small").value == pytest.approx(0.4)
    assert found.drift == pytest.approx(0, abs=1e-9)
    assert found.settled == {"dense": True, "small": True}


def test_a_drifting_machine_does_not_move_the_ratio():
    # The machine slows down linearly to three times its speed while the comparison runs.
    clock = Clock(lambda now: 1 + 2 * now / 1.5)
    found = compare(clock, {"dense": 4.0, "small": 2.0})
    assert found.ratio("small").value == pytest.approx(2.0, rel=5e-3)
    assert found.drift > 0.5


def test_a_slow_phase_cancels_where_medians_over_all_runs_do_not():
    # Every third cycle and a bit the machine halves its speed for a long time.
    clock = Clock(lambda now: 2.0 if math.floor(now / 0.31) % 2 else 1.0)
    found = compare(clock, {"dense": 4.0, "small": 2.0}, blocks=60)
    ratio = found.ratio("small")
    assert ratio.value == pytest.approx(2.0, rel=0.01)
    assert ratio.interval.contains(2.0)


def test_blocks_alternate_their_order_and_the_baseline_ends_the_comparison():
    order = []
    clock = Clock()
    work = clock.work(2.0)

    def runner(name):
        def run():
            order.append(name)
            work()

        return run

    found = timing.compare({"a": runner("a"), "b": runner("b")}, blocks=31, block_ms=8, clock=clock)
    assert found.protocol.blocks == 32
    assert [len(block) for block in found.samples_ms["a"]] == [4] * 32
    per_block = 1 + 4  # one run that is not counted
    warm = 2 * 3 * (1 + timing.WINDOW_RUNS)
    blocks = [order[start] for start in range(warm, len(order), per_block)]
    assert blocks[:8] == list("abbaabba")
    assert blocks[64:] == ["a"] * 3
    assert len(order) == warm + (64 + 3) * per_block


def test_the_first_run_of_a_block_is_not_counted():
    clock = Clock()
    calls = []

    def run():
        calls.append(1)
        clock.now += 0.5 if len(calls) == 1 else 0.001

    found = timing._block(run, 4, clock)
    assert found == pytest.approx([1.0] * 4)


def test_a_faster_runner_gets_more_runs_and_p99_waits_for_a_thousand():
    found = compare(Clock(), {"dense": 10.0, "small": 0.5})
    dense, small = found.latency("dense"), found.latency("small")
    assert (dense.runs, small.runs) == (30 * 3, 30 * 40)
    assert dense.p99 is None
    assert small.p99 == pytest.approx(0.5)
    assert len(found.samples("small")) == small.runs


def test_percentiles_are_those_of_the_samples():
    latency = timing.summarize(np.arange(1001.0))
    assert (latency.p50, latency.p90, latency.p99, latency.runs) == (500, 900, 990, 1001)
    assert latency.std == pytest.approx(math.sqrt((1001**2 - 1) / 12))
    assert timing.summarize(np.arange(999.0)).p99 is None
    assert timing.summarize(np.arange(1000.0)).p99 is not None


def test_warm_up_waits_until_three_windows_agree():
    clock = Clock()
    left = [40]

    def run():
        clock.now += 0.010 if left[0] > 0 else 0.002
        left[0] -= 1

    # Half of the slow runs pass, then the windows must agree three times; slow ones agree at once.
    median, settled = timing.warm_up(run, clock, bound_ms=10_000)
    assert (median, settled) == (pytest.approx(10.0), True)
    left[0] = 8
    median, settled = timing.warm_up(run, clock, bound_ms=10_000)
    assert (median, settled) == (pytest.approx(2.0), True)


def test_warm_up_gives_up_at_its_bound_and_says_so():
    clock = Clock()
    factor = [1.0]

    def run():
        factor[0] *= 1.01
        clock.now += 0.001 * factor[0]

    median, settled = timing.warm_up(run, clock, bound_ms=50)
    assert not settled
    assert clock.now < 0.08
    assert median > 1


def test_progress_reaches_its_end():
    seen = []
    compare(Clock(), {"dense": 2.0}, progress=lambda done, work: seen.append((done, work)))
    assert seen[0] == (1, 33)
    assert seen[-1] == (33, 33)


def test_the_protocol_records_what_was_set():
    protocol = compare(Clock(), {"dense": 2.0}, seed=7, block_ms=9).protocol
    assert (protocol.blocks, protocol.block_ms, protocol.threads, protocol.seed) == (30, 9, 1, 7)
    assert "A B B A" in protocol.order


def test_too_few_blocks_no_runners_and_too_many_threads_are_refused(monkeypatch):
    with pytest.raises(CompressError, match=r"29 blocks are too few.*30"):
        compare(Clock(), {"dense": 1.0}, blocks=29)
    with pytest.raises(CompressError, match=r"no runner"):
        timing.compare({})
    monkeypatch.setattr(timing, "physical_cores", lambda: 2)
    with pytest.raises(CompressError, match=r"3 threads.*2 physical cores"):
        compare(Clock(), {"dense": 1.0}, threads=3)
    with pytest.raises(CompressError, match=r"0 threads"):
        timing.check_threads(0)
    timing.check_threads(2)
    timing.check_threads(1)


def test_the_garbage_collector_is_off_while_timing_and_on_afterwards():
    states = []
    clock = Clock()
    work = clock.work(2.0)

    def run():
        states.append(gc.isenabled())
        work()

    timing.compare({"dense": run}, blocks=30, block_ms=6, clock=clock)
    assert set(states) == {False}
    assert gc.isenabled()


X86 = (
    "processor\t: 0\nmodel name\t: Test CPU @ 2.0GHz\nflags\t\t: fpu avx2 avx512_vnni nonsense\n"
    "\nprocessor\t: 1\nmodel name\t: other\n"
)
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n"


def test_the_processor_is_read_on_x86_and_on_arm():
    assert timing.processor(X86) == ("Test CPU @ 2.0GHz", ("avx2", "avx512_vnni"))
    assert timing.processor(ARM) == ("arm 0x41 0xd0b", ("asimd", "asimddp"))
    assert timing.processor(ARM + "Model\t: Raspberry Pi 5\n")[0] == "Raspberry Pi 5"
    assert timing.processor("")[1] == ()


def test_the_environment_names_machine_and_versions():
    facts = timing.environment()
    assert facts["torch"] == torch.__version__
    assert facts["onnxruntime"]
    assert facts["physical_cores"] == timing.physical_cores() >= 1
    assert facts["memory_gb"] > 0.1
    assert {"cpu", "flags", "os", "python", "onnx", "transformers"} <= facts.keys()


def test_a_missing_package_is_none_and_not_an_error():
    assert timing.version("no-such-package-here") is None


def test_the_fingerprint_follows_processor_cores_and_runtime(monkeypatch):
    monkeypatch.setattr(timing, "_cpuinfo", lambda: X86)
    monkeypatch.setattr(timing, "physical_cores", lambda: 2)
    first = timing.fingerprint()
    assert first == timing.fingerprint()
    assert len(first) == 16
    others = {first}
    monkeypatch.setattr(timing, "physical_cores", lambda: 4)
    others.add(timing.fingerprint())
    monkeypatch.setattr(timing, "_cpuinfo", lambda: X86.replace("avx512_vnni", ""))
    others.add(timing.fingerprint())
    monkeypatch.setattr(timing, "_cpuinfo", lambda: ARM)
    others.add(timing.fingerprint())
    monkeypatch.setattr(timing, "version", lambda package: "9.9")
    others.add(timing.fingerprint())
    assert len(others) == 5


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(timing.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert timing.physical_cores() == 3
    monkeypatch.setattr(timing.psutil, "cpu_count", lambda logical: None)
    assert timing.physical_cores() == 1


def test_what_other_programs_take_is_told_from_what_this_one_takes():
    burn = "import time; end = time.perf_counter() + 0.6\nwhile time.perf_counter() < end: pass"
    others = timing.elsewhere()
    process = subprocess.Popen([sys.executable, "-c", burn])
    process.wait()
    crowded = others()
    others = timing.elsewhere()
    end = time.perf_counter() + 0.6
    while time.perf_counter() < end:
        pass
    # The machine may be busy with other things in both halves; the difference is the program's own.
    assert crowded - others() > 0.2 or crowded > 0.6


def test_a_crowded_machine_is_said_to_be_one():
    assert timing.timing_warnings(0.0, {"dense": True}) == []
    (line,) = timing.timing_warnings(0.0, {"dense": True}, elsewhere=0.84)
    assert "0.8 cores" in line


def test_thinning_keeps_both_ends_and_the_middle():
    samples = [float(i) for i in range(1, 2002)]
    random.Random(0).shuffle(samples)
    kept = timing.thin(samples, 600)
    assert (len(kept), kept[0], kept[-1]) == (600, 1.0, 2001.0)
    assert abs(kept[300] - 1001) <= 4
    assert list(kept) == sorted(kept)
    assert timing.thin([3.0, 1.0], 600) == (1.0, 3.0)

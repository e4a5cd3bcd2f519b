"""Time that does not depend on the machine: a call takes what the operators that it runs are said to take."""

import numpy as np
from torch.utils._python_dispatch import TorchDispatchMode

from compress.export.microbench import site_timing
from compress.measure import timing

PRODUCTS = {
    "mm": 1.0,
    "addmm": 1.0,
    "bmm": 1.0,
    "linear": 1.0,
    "matmul": 1.0,
    "_scaled_mm": 0.25,
    "_int_mm": 0.4,
}
PER_MULTIPLICATION_MS = 1e-5
PER_NUMBER_MS = 1e-6


class Work(TorchDispatchMode):
    """Adds up what every operator takes: multiplications of products, and numbers that are written."""

    def __init__(self):
        super().__init__()
        self.ms = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        first = answer[0] if isinstance(answer, tuple | list) else answer
        numbers = getattr(first, "numel", lambda: 0)()
        if name in PRODUCTS:
            inner = args[1 if name == "addmm" else 0].shape[-1]
            self.ms += PRODUCTS[name] * numbers * inner * PER_MULTIPLICATION_MS
        self.ms += numbers * PER_NUMBER_MS
        return answer


def taken_ms(call):
    """What one call takes; one that runs nothing in torch takes a millisecond."""
    with Work() as work:
        call()
    return work.ms or 1.0


def compare(runners, *, blocks=40, block_ms=60.0, threads=1, seed=0, progress=None):
    """`timing.compare` where every run of a call takes the same."""
    samples = {name: tuple(np.full(3, taken_ms(call)) for _ in range(30)) for name, call in runners.items()}
    return timing.Comparison(
        protocol=timing.Protocol(threads=threads, seed=seed),
        baseline=next(iter(runners)),
        samples_ms=samples,
        drift=0.0,
        settled=dict.fromkeys(runners, True),
    )


def cycles(runners, seconds, clock, progress):
    """`blocks.cycles` where every run of a chain takes the same."""
    return np.array([[taken_ms(run) for run in runners]])


def wind(monkeypatch):
    """Let everything that is timed in torch take what its operators take."""
    monkeypatch.setattr(timing, "compare", compare)
    monkeypatch.setattr(site_timing, "time_cycles", cycles)

"""Calibrate the sum of single-site times against whole models: the model at four sizes, timed alternately.

A site that is timed alone has the caches to itself, and a stored table may come from a time when the machine
was faster. Ratios between the entries of the table are therefore kept, and their scale is fitted to timings
of whole models in which every site keeps the same share of its units.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch

from compress.cost.model_latency import Whole
from compress.export.backends.backend import Backend
from compress.measure import timing
from compress.pipeline import model_files
from compress.pipeline.job import Job
from compress.sites import prune
from compress.sites.prune import Removal

UNIT_SHARES = (1.0, 0.5, 0.25, 0.0)
Prices = Mapping[str, Mapping[int, float]]


def fit(whole_ms: Sequence[float], alone_ms: Sequence[float]) -> tuple[float, Whole]:
    """The factor for times of single sites, and the curve from their scaled sum to the model's time.

    The factor is fitted to the smallest models, where the times of sites add up; the additional time of
    larger models is in the curve.

    Args:
        whole_ms: times of whole models, the dense one first, then in decreasing size.
        alone_ms: sums of the single-site times of the same models, decreasing.

    >>> fit([11.0, 5.0, 1.0], [4.0, 2.0, 0.0])
    (2.0, Whole(inside_ms=(8.0, 4.0, 0.0), whole_ms=(11.0, 5.0, 1.0)))
    """
    factor = 1.0
    if len(whole_ms) > 1:
        factor = (whole_ms[-2] - whole_ms[-1]) / (alone_ms[-2] - alone_ms[-1])
    return factor, Whole(inside_ms=tuple(factor * ms for ms in alone_ms), whole_ms=tuple(whole_ms))


def measure(job: Job, backend: Backend, prices: Prices) -> tuple[float, Whole]:
    """Time the dense model and smaller ones here, and fit the sums of `prices[site][units]` to them.

    For a job with a smaller hidden width, the dense model is wider and has no prices: its sum is that of
    this job's unpruned model times the measured ratio of the two models.
    """
    sizes: list[dict[str, int]] = []
    for share in UNIT_SHARES:
        size = {site.name: _nearest(prices[site.name], share * site.units) for site in job.sites}
        if not sizes or _sum_ms(prices, size) < _sum_ms(prices, sizes[-1]):
            sizes.append(size)
    whole_ms = _time_models(job, backend, sizes)
    alone_ms = [_sum_ms(prices, size) for size in sizes]
    if job.narrowed is not None:
        alone_ms = [alone_ms[0] * max(1.0, whole_ms[0] / whole_ms[1]), *alone_ms]
    falling = [0]
    for number, ms in enumerate(whole_ms):
        if ms < whole_ms[falling[-1]]:
            falling.append(number)
    return fit([whole_ms[k] for k in falling], [alone_ms[k] for k in falling])


def _nearest(row: Mapping[int, float], units: float) -> int:
    return min(row, key=lambda known: (abs(known - units), known))


def _sum_ms(prices: Prices, size: Mapping[str, int]) -> float:
    return sum(prices[name][units] for name, units in size.items())


def _time_models(job: Job, backend: Backend, sizes: Sequence[Mapping[str, int]]) -> list[float]:
    """Milliseconds of the dense model, whose file exists, and of this job's model at every size.

    The first size is unpruned, which is the dense model itself unless the job has a smaller hidden width.
    """
    threads = job.recipe.bench.threads
    uncut = [job] if job.narrowed is None else [job.baseline, job]
    models, written = [one.task.model for one in uncut], [one.dense_file for one in uncut]
    with job.stages("export sizes") as tick:
        for number, size in enumerate(sizes[1:], 1):
            removals = {
                site.name: Removal(kept=torch.arange(size[site.name]))
                for site in job.sites
                if size[site.name] < site.units
            }
            model = prune.shrink(job.task.model, job.sites, removals)
            file = job.work / f"size{number}.onnx"
            models.append(backend.build(model, write=partial(model_files.write, job, model, file)))
            written.append(file)
            tick(number, len(sizes) - 1)
    with ExitStack() as stack:
        calls = {}
        for number, (model, file) in enumerate(zip(models, written, strict=True)):
            calls[str(number)] = model_files.timed(
                job, stack.enter_context(model_files.opened(job, backend, model, file))
            )
        tick = stack.enter_context(job.stages("time sizes"))
        found = timing.compare(
            calls, blocks=30, block_ms=job.recipe.bench.block_ms, threads=threads, progress=tick
        )
    for file in written[len(uncut) :]:
        file.unlink(missing_ok=True)
    dense_ms = found.latency("0").p50
    return [dense_ms, *(dense_ms / found.ratio(str(number)).value for number in range(1, len(written)))]

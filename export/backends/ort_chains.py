"""Chains of sites as ONNX graphs in onnxruntime, and the cost tables of this processor."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import numpy as np
import onnxruntime as ort

from compress.cost.latency_table import Rows, Table, grid, measure_missing
from compress.errors import CompressError
from compress.export.backends import onnxruntime
from compress.export.microbench import site_timing
from compress.export.microbench.onnx_chain import SiteLayouts, chain, default_layouts
from compress.export.microbench.site_timing import GROUP_MB, ChainRuntime, Tick, clock_for
from compress.export.onnx import quantized
from compress.ir import Option, Site
from compress.measure import timing
from compress.sites.kinds import kind_of


def open_session(file: bytes, site: Site, threads: int, provider: str = onnxruntime.CPU) -> timing.Runner:
    """A call that runs the file once at the site's own shape, and waits for it.

    Raises:
        CompressError: the rows of the site's products are not its batch times its tokens.
    """
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
        return onnxruntime.bind_call(loaded, feeds, provider)
    return lambda: loaded.run(None, feeds)


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


def _formed(site: Site, units: int, copies: int, form: str, written: SiteLayouts) -> bytes:
    """A chain whose products run in a form; zeros that onnxruntime multiplies like any number need none."""
    option = Option.of(form, units)
    if option.number_format is None and not (option.blocked or option.rank):
        return chain(site, units, copies)
    if option.number_format is None:
        return chain(site, units, copies, pattern=option.pattern, rank=option.rank, choose=written(site))
    return quantized.lower_chain(chain(site, units, copies), option.precision)


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
    wanted = {site.shape: site_timing.sample_levels(grid(site, align)) for site in sites}

    def measure(missing: dict[str, list[int]]) -> Rows:
        return site_timing.measure(sites, missing, threads, progress, rig=cpu_runtime(threads))

    return measure_missing(empty_table(threads), wanted, measure)

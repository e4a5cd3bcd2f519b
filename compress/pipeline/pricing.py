"""Price every option of every site on the target: costs.json, measured on this machine or estimated."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field
from torch import nn

from compress import artifacts, formats, profiles
from compress.cost import latency_table, roofline
from compress.cost.latency_table import Rows, Table
from compress.cost.model_latency import Whole
from compress.export.backends import onnxruntime
from compress.export.backends.backend import Backend
from compress.export.backends.select import table_origins
from compress.export.microbench import site_timing
from compress.ir import Document, Option, Site, Source
from compress.measure import timing
from compress.methods import apply
from compress.pipeline import block_patterns, model_files, whole_model
from compress.pipeline.block_patterns import Patterns
from compress.pipeline.job import Job
from compress.profiles import Profile

SIZE_BUDGET = "size_mb"
FORM_LEVELS = 6  # numbers of units timed per option; interpolated linearly between them
MAX_COST_SHARE = 0.97  # largest time or size of an option, as a share of the dense site's, to be considered
STORED_PRECISION = "fp32"  # of plain weights in a file


class Costs(Document):
    """Latencies in milliseconds on the target at the recipe's shapes.

    `rows[site][form][units]` is the time that a site adds to a small model; `whole` maps the sum of these
    times to the time of the whole model. `source` says whether both are measured. `rows` has only options
    that are faster or smaller. `gains[site][form]` is the speedup of the unpruned site for every option
    considered. `untimed` lists options that could not be timed at any site.
    """

    whole: Whole
    rows: dict[str, dict[str, dict[int, float]]]
    gains: dict[str, dict[str, float]] = Field(default_factory=dict)
    untimed: tuple[str, ...] = ()
    source: Source

    @property
    def dense_ms(self) -> float:
        """Time of the dense model."""
        return self.whole.dense_ms

    @property
    def fixed_ms(self) -> float:
        """Time outside of all sites."""
        return self.whole.fixed_ms

    def latency_ms(self, site: Site, option: Option) -> float:
        """The time of the site with the option."""
        return self.rows[site.name][option.form][site.units if option.units is None else option.units]

    def options(self, site: Site) -> tuple[Option, ...]:
        """All options of a site, the dense one first."""
        return tuple(
            Option.of(form, None if units == site.units else units)
            for form, row in self.rows[site.name].items()
            for units in sorted(row, reverse=True)
        )


def price(job: Job) -> Costs:
    """The costs of a job, measured on this machine or estimated for another one."""
    export_dense(job)
    found = block_patterns.find_patterns(job)
    levels = wanted_levels(job, found)
    backend = job.backend
    machine = job.profile.name if backend is None else backend.fingerprint
    sized = job.recipe.budget.name == SIZE_BUDGET
    made_from = artifacts.digest(job.model_key, machine, job.recipe.bench.threads, levels, sized, found)
    return artifacts.saved(
        job.work / "costs.json",
        Costs,
        made_from,
        lambda: (
            _estimate_costs(job, levels) if backend is None else _measure_costs(job, backend, levels, found)
        ),
    )


def export_dense(job: Job) -> Path:
    """Export the dense model, the baseline of every comparison; its path."""
    path = job.dense_file
    stamp = job.work / "dense.json"
    if path.is_file() and _identity(path, job.model_key) == _read(stamp):
        return path
    with job.stages("export dense"):
        model_files.write(job, job.task.model, path)
    artifacts.write_text(stamp, json.dumps(_identity(path, job.model_key)))
    return path


def _identity(path: Path, key: str) -> dict[str, str]:
    return {"made_from": key, "sha256": onnxruntime.sha256(path)}


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def wanted_levels(job: Job, found: Patterns) -> dict[str, dict[str, list[int]]]:
    """Units to price by site and option, dense first; `found` gives the offered block patterns."""
    return {site.name: _site_levels(job, site, found.offered(site)) for site in job.sites}


def _site_levels(job: Job, site: Site, offered: Sequence[str] | None) -> dict[str, list[int]]:
    """Levels of one site: the recipe's fractions if given, else the default grid."""
    options = job.recipe.options
    fractions = options.units
    if fractions is None:
        levels = latency_table.grid(site, job.profile.align_units)
    else:
        levels = sorted({site.units, *(round(f * site.units) for f in fractions)}, reverse=True)
    droppable = site.drop is not None and options.drop
    levels = [units for units in levels if units > 0 or droppable]
    if formats.STRUCTURE not in options.moves:
        levels = levels[:1]
    wanted = {"dense": levels}
    for form in apply.offered_forms(site, options.moves, job.runtime, offered):
        wanted[form] = apply.levels(site, form, levels, job.runtime)
    return wanted


def latency_table_of(
    job: Job, backend: Backend, levels: Mapping[str, Mapping[str, list[int]]], found: Patterns
) -> Table:
    """The latency table of this machine; numbers of units between timed ones are interpolated."""
    sites = {site.shape: site for site in job.sites}
    wanted = {
        latency_table.row_key(site, form): site_timing.sample_levels(
            units, site_timing.MOST_LEVELS if form == "dense" else FORM_LEVELS
        )
        for site in job.sites
        for form, units in levels[site.name].items()
    }

    def measure(missing: dict[str, list[int]]) -> Rows:
        with job.stages("time sites") as tick:
            rig = backend.rig(found.written)
            return site_timing.measure(
                list(sites.values()), missing, threads=backend.threads, progress=tick, rig=rig
            )

    return latency_table.measure_missing(backend.empty_table(), wanted, measure)


def _measure_costs(
    job: Job, backend: Backend, levels: Mapping[str, Mapping[str, list[int]]], found: Patterns
) -> Costs:
    """Times on this machine: a table of single sites, scaled to timings of whole models."""
    timing.check_threads(backend.threads)
    table = latency_table_of(job, backend, levels, found)
    alone = {
        site.name: {
            form: {
                units: latency_table.price(
                    site,
                    Option.of(form, units),
                    profile=job.profile,
                    table=table,
                    precision=backend.precision,
                    threads=backend.threads,
                ).latency_ms
                for units in row
            }
            for form, row in levels[site.name].items()
            if form == "dense" or latency_table.row_key(site, form) in table.rows
        }
        for site in job.sites
    }
    factor, whole = whole_model.measure(job, backend, {name: rows["dense"] for name, rows in alone.items()})
    wanted = {form for row in levels.values() for form, units in row.items() if units}
    timed = {form for row in alone.values() for form in row}
    costs = _select_costs(job, alone, factor, whole, "measured")
    return costs.model_copy(update={"untimed": tuple(sorted(wanted - timed))})


def _select_costs(job: Job, alone: Mapping[str, Rows], factor: float, whole: Whole, source: Source) -> Costs:
    """The costs without options that are not faster than the dense site at the same number of units.

    If an option fits only between the levels of structured pruning, the time of the dense site is
    interpolated there. With a size budget, options that are smaller in the file are kept as well.
    """
    sized = job.recipe.budget.name == SIZE_BUDGET
    rows: dict[str, dict[str, dict[int, float]]] = {}
    gains: dict[str, dict[str, float]] = {}
    for site in job.sites:
        plain = alone[site.name]["dense"]
        known, times = zip(*sorted(plain.items()), strict=True)
        kept = {"dense": latency_table.drop_dominated({units: ms * factor for units, ms in plain.items()})}
        gains[site.name] = {}
        for form, row in alone[site.name].items():
            if form == "dense" or not row:
                continue
            against = {units: float(np.interp(units, known, times)) for units in row}
            gains[site.name][form] = against[max(row)] / row[max(row)]
            paying = {
                units: ms * factor
                for units, ms in row.items()
                if ms < MAX_COST_SHARE * against[units] or (sized and _is_smaller(site, form, units))
            }
            if paying:
                kept[form] = latency_table.drop_dominated(paying)
        rows[site.name] = kept
    return Costs(whole=whole, rows=rows, gains=gains, source=source)


def _is_smaller(site: Site, form: str, units: int) -> bool:
    """Whether an option takes fewer bytes in a file; the zeros of 2:4 are stored explicitly."""
    option = Option.of(form, units)
    plain = latency_table.weight_bytes(site, Option(units=units), STORED_PRECISION)
    return (
        option.nm is None
        and latency_table.weight_bytes(site, option, STORED_PRECISION) < MAX_COST_SHARE * plain
    )


def shipped_table(profile: Profile) -> Table | None:
    """The measured latency table that ships with the profile, if any."""
    for origin in table_origins(profile):
        stored = profiles.measured(profile.name, origin)
        if stored is not None:
            return Table.model_validate(stored["table"])
    return None


def _estimate_costs(job: Job, levels: Mapping[str, Mapping[str, list[int]]]) -> Costs:
    """Times for another device: from its shipped table if that has the shape, else from the roofline."""
    profile = job.profile
    # The table has shapes of one hidden width only; two widths must be estimated in the same way.
    table = shipped_table(profile) if job.narrowed is None else None
    threads = 1 if table is None else table.threads
    alone = {
        site.name: {
            form: {
                units: latency_table.price(
                    site, Option.of(form, units), profile=profile, table=table, threads=threads
                ).latency_ms
                for units in row
            }
            for form, row in levels[site.name].items()
        }
        for site in job.sites
    }
    inside = sum(alone[site.name]["dense"][site.units] for site in job.sites)
    whole_ms = inside + _estimate_outside_ms(job)
    whole = Whole(inside_ms=(inside,), whole_ms=(whole_ms,))
    if job.narrowed is not None:
        wide = job.baseline
        dense_ms = sum(roofline.estimate_latency_ms(s, s.units, profile, threads=threads) for s in wide.sites)
        dense_ms += _estimate_outside_ms(wide)
        whole = Whole(inside_ms=(inside,), whole_ms=(dense_ms,))
        if dense_ms > whole_ms:
            slower = inside * dense_ms / whole_ms
            whole = Whole(inside_ms=(slower, inside), whole_ms=(dense_ms, whole_ms))
    return _select_costs(job, alone, 1.0, whole, "estimated")


def _estimate_outside_ms(job: Job) -> float:
    """A rough estimate of the time outside of all sites: norms, additions and other products.

    Two operators are counted per site; embedding lookups are neglected.
    """
    inside = {m.weight for site in job.found.sites for m in site.matmuls}
    tables = {id(m.weight) for m in job.task.model.modules() if isinstance(m, nn.Embedding)}
    rows = max(m.rows for site in job.sites for m in site.matmuls)
    flops = weight_bytes = 0.0
    for name, value in job.task.model.named_parameters():
        if value.ndim == 2 and name not in inside and id(value) not in tables:
            flops += 2 * rows * value.numel()
            weight_bytes += value.numel() * formats.kernel_bytes(job.profile.baseline_precision)
    profile = job.profile
    peak = profile.peak_tflops[profile.baseline_precision]
    busy_ms = max(flops / (peak * 1e9), weight_bytes / (profile.bandwidth_gb_s * 1e6))
    return busy_ms + profile.launch_us * 1e-3 * (2 * len(job.found.sites) + 10)

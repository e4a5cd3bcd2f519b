"""What every option of every site takes on the target: costs.json, measured here or estimated."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from compress import anchor, artifact, bench, cost, profiles, roofline
from compress.cost import Rows, Table
from compress.export import blocks, cuda, onnx, runners
from compress.export.place import Place
from compress.ir import Document, Site, Source, Whole
from compress.job import Job
from compress.profiles import Profile


class Costs(Document):
    """Latencies in milliseconds on the target at the recipe's shapes.

    `rows[site][units]` is the time that a site adds to a small model, `whole` makes of their sum the
    time of the model: both measured when `source` says so.
    """

    whole: Whole
    rows: dict[str, dict[int, float]]
    source: Source

    @property
    def dense_ms(self) -> float:
        """Time of the dense model."""
        return self.whole.dense_ms

    @property
    def fixed_ms(self) -> float:
        """Time that lies outside every site."""
        return self.whole.fixed_ms


def price(job: Job) -> Costs:
    """The costs of a job, measured on this machine or looked up for another one."""
    export_dense(job)
    levels = {site.name: wanted_levels(job, site) for site in job.sites}
    machine = job.profile.name if job.place is None else job.place.fingerprint
    made_from = artifact.digest(job.model_key, machine, job.recipe.bench.threads, levels)
    path, place = job.folder / "costs.json", job.place
    return artifact.saved(
        path,
        Costs,
        made_from,
        lambda: _estimated(job, levels) if place is None else _measured(job, place, levels),
    )


def export_dense(job: Job) -> Path:
    """The dense model as a file: the baseline of every comparison."""
    path = job.folder / "dense.onnx"
    stamp = job.folder / "dense.json"
    if path.is_file() and _stamp(path, job.model_key) == _read(stamp):
        return path
    with job.stages("export dense"):
        example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
        onnx.export(
            job.task.model,
            example,
            path,
            output_name=job.task.output_name,
            logits=job.task.logits,
        )
    artifact.write_text(stamp, json.dumps(_stamp(path, job.model_key)))
    return path


def _stamp(path: Path, key: str) -> dict[str, str]:
    return {"made_from": key, "sha256": runners.sha256(path)}


def _read(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def wanted_levels(job: Job, site: Site) -> list[int]:
    """Units to price for one site, dense first; the recipe's fractions replace the grid."""
    fractions = job.recipe.options.units
    align = job.profile.align_units if site.kind == "ffn" else 1
    if fractions is None:
        levels = cost.grid(site, align)
    else:
        levels = sorted({site.units, *(round(f * site.units) for f in fractions)}, reverse=True)
    droppable = site.drop is not None and job.recipe.options.drop
    return [units for units in levels if units > 0 or droppable]


def table_of(job: Job, place: Place, levels: Mapping[str, list[int]]) -> Table:
    """This machine's table; widths between the timed ones are interpolated."""
    threads = place.threads
    sites = {site.shape: site for site in job.sites}
    wanted = {site.shape: blocks.sample(levels[site.name]) for site in job.sites}

    def measure(missing: dict[str, list[int]]) -> Rows:
        with job.stages("time sites") as tick:
            return blocks.measure(
                list(sites.values()), missing, threads=threads, progress=tick, rig=place.rig()
            )

    return cost.obtain(place.empty_table(), wanted, measure)


def _measured(job: Job, place: Place, levels: Mapping[str, list[int]]) -> Costs:
    """Times on this machine: a table of sites, brought to the level of whole models."""
    bench.check_threads(place.threads)
    table = table_of(job, place, levels)
    alone = {
        site.name: {
            units: cost.price(site, units, profile=job.profile, table=table, threads=place.threads).latency_ms
            for units in levels[site.name]
        }
        for site in job.sites
    }
    factor, whole = anchor.measure(job, place, alone)
    rows = {
        name: cost.thin({units: ms * factor for units, ms in prices.items()})
        for name, prices in alone.items()
    }
    return Costs(whole=whole, rows=rows, source="measured")


def shipped(profile: Profile) -> Table | None:
    """The table of sites that was measured on such a device and ships with its profile."""
    for origin in (profile.runtime, cuda.RUNTIME):
        stored = profiles.measured(profile.name, origin)
        if stored is not None:
            return Table.model_validate(stored["table"])
    return None


def _estimated(job: Job, levels: Mapping[str, list[int]]) -> Costs:
    """Times for a device that is not here: from its shipped table where that knows a shape, else roofline."""
    profile, table = job.profile, shipped(job.profile)
    threads = 1 if table is None else table.threads
    rows = {}
    for site in job.sites:
        prices = {
            units: cost.price(site, units, profile=profile, table=table, threads=threads).latency_ms
            for units in levels[site.name]
        }
        rows[site.name] = cost.thin(prices)
    inside = sum(rows[site.name][site.units] for site in job.sites)
    fixed_ms = _outside_ms(job)
    whole = Whole(inside_ms=(inside,), whole_ms=(inside + fixed_ms,))
    return Costs(whole=whole, rows=rows, source="estimated")


def _outside_ms(job: Job) -> float:
    """A rough estimate of what lies outside every site: norms and sums, and the model's other products.

    Two operators follow every site; embedding tables are looked up and cost next to nothing.
    """
    inside = {m.weight for site in job.found.sites for m in site.matmuls}
    tables = {id(m.weight) for m in job.task.model.modules() if isinstance(m, nn.Embedding)}
    rows = max(m.rows for site in job.sites for m in site.matmuls)
    flops = weight_bytes = 0.0
    for name, value in job.task.model.named_parameters():
        if value.ndim == 2 and name not in inside and id(value) not in tables:
            flops += 2 * rows * value.numel()
            weight_bytes += value.numel() * roofline.BYTES[job.profile.baseline_precision]
    profile = job.profile
    peak = profile.peak_tflops[profile.baseline_precision]
    busy_ms = max(flops / (peak * 1e9), weight_bytes / (profile.bandwidth_gb_s * 1e6))
    return busy_ms + profile.launch_us * 1e-3 * (2 * len(job.found.sites) + 10)

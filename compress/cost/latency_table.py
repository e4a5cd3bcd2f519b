"""What a site costs at a width: from a table measured on the target, else from a roofline.

A table holds what was timed and keeps it raw; between two timed widths the cost is interpolated.
"""

import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import Field

from compress import artifacts, formats
from compress.cost.roofline import DEFAULT, Constants, above_idle_w, estimate_latency_ms
from compress.ir import SCHEMA_VERSION, Candidate, Document, Option, Site
from compress.profiles import Profile
from compress.sites.kinds import kind_of

FORM_SEPARATOR = " in form "  # between a shape and a form in the name of a row

Rows = dict[str, dict[int, float]]


class Table(Document):
    """Measured latencies of sites, with everything needed to know where they are valid.

    `rows[row_key(site, form)][units]` is the time that the site adds to the model, in milliseconds.
    """

    schema_version: int = SCHEMA_VERSION
    fingerprint: str
    runtime: str
    versions: dict[str, str] = Field(default_factory=dict)
    threads: int = Field(default=1, ge=1)
    precision: str = "fp32"
    created: str = ""
    rows: Rows = Field(default_factory=dict)

    def latency_ms(self, site: Site, units: int, form: str = "dense") -> float | None:
        """Time of the site at `units` in a form; None outside what was measured for its shape.

        Between two measured widths the time is interpolated, so it never leaves their range; below the
        narrowest it is the narrowest one's, since launches do not shrink with a site.
        """
        row = self.rows.get(row_key(site, form))
        if not row:
            return None
        if units == 0:
            return 0.0
        known = sorted(row.items())
        at = bisect_left(known, (units, -math.inf))
        if at == len(known):
            return None
        (low, low_ms), (high, high_ms) = known[max(0, at - 1)], known[at]
        if at == 0 or units == high:
            return high_ms
        return low_ms + (high_ms - low_ms) * (units - low) / (high - low)

    def merged(self, rows: Rows) -> "Table":
        """This table with `rows` laid over it."""
        whole = {shape: {**self.rows.get(shape, {}), **row} for shape, row in rows.items()}
        return self.model_copy(update={"rows": {**self.rows, **whole}})


def row_key(site: Site, form: str) -> str:
    """The row of a table that holds the site's times in a form."""
    return site.shape if form == "dense" else f"{site.shape}{FORM_SEPARATOR}{form}"


def cache_folder() -> Path:
    """Where tables are kept: `$COMPRESS_CACHE`, else `compress` in the user's cache folder."""
    given = os.environ.get("COMPRESS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress"


def cache_path(table: Table) -> Path:
    """The file that holds the tables of this machine, runtime, precision and thread count."""
    name = f"{table.fingerprint}-{table.runtime}-{table.precision}-{table.threads}t.json"
    return cache_folder() / "tables" / name


def measure_missing(
    fresh: Table,
    wanted: Mapping[str, Iterable[int]],
    measure: Callable[[dict[str, list[int]]], Rows],
) -> Table:
    """The table of this machine with every wanted level in it; only what is missing is measured.

    A stored table that is damaged, or that another machine or runtime made, is measured again.

    Args:
        fresh: an empty table that states the machine, runtime, versions, threads and precision.
        wanted: levels (units) by row.
        measure: times the missing levels.
    """
    path = cache_path(fresh)
    identity = artifacts.digest(
        fresh.fingerprint, fresh.runtime, fresh.versions, fresh.threads, fresh.precision
    )
    table = artifacts.stored_at(path, Table, identity)
    if table is None or not _is_valid(table.rows):
        table = fresh
    missing = {
        shape: sorted(set(levels) - {0} - table.rows.get(shape, {}).keys(), reverse=True)
        for shape, levels in wanted.items()
    }
    missing = {shape: levels for shape, levels in missing.items() if levels}
    if not missing:
        return table
    table = table.merged(measure(missing)).model_copy(update={"created": fresh.created})
    with suppress(OSError):  # an unwritable home costs the next run its time, not this one its result
        artifacts.store(path, identity, table)
    return table


def _is_valid(rows: Rows) -> bool:
    return all(
        units > 0 and math.isfinite(ms) and ms >= 0 for row in rows.values() for units, ms in row.items()
    )


def price(
    site: Site,
    option: Option,
    *,
    profile: Profile,
    table: Table | None = None,
    precision: str | None = None,
    threads: int = 1,
    error: float = 0.0,
    constants: Constants = DEFAULT,
) -> Candidate:
    """One option of a site with its price: measured where the table has it, else estimated.

    `precision` is that of the dense model, the profile's baseline when None; the energy is always an
    estimate.

    Raises:
        CompressError: the option's form was not timed, and the roofline knows nothing of it.
    """
    precision = precision or profile.baseline_precision
    units = site.units if option.units is None else option.units
    latency_ms = None
    if table is not None and table.precision == precision and table.threads == threads:
        latency_ms = table.latency_ms(site, units, option.form)
    measured = latency_ms is not None
    if latency_ms is None:
        latency_ms = estimate_latency_ms(
            site, units, profile, precision, threads=threads, constants=constants, option=option
        )
    watts = above_idle_w(site, units, profile, precision, threads=threads, constants=constants)
    return Candidate(
        site=site.name,
        option=option if units < site.units else option.model_copy(update={"units": None}),
        error=error,
        latency_ms=latency_ms,
        energy_mj=None if watts is None else latency_ms * watts,
        weight_bytes=weight_bytes(site, option, precision),
        source="measured" if measured else "estimated",
    )


def weight_bytes(site: Site, option: Option, precision: str) -> int:
    """Bytes of the weights that an option leaves: values kept, their scales and indices, thin factors."""
    units = site.units if option.units is None else option.units
    number_format = option.number_format
    plain = formats.kernel_bytes(precision.split()[0])
    width_bytes = plain if number_format is None else number_format.weight_bytes
    total = units * site.parameters_per_unit * option.density * width_bytes
    if option.nm is not None:  # the place of each of the values kept, in its group
        place_bits = math.ceil(math.log2(option.nm[1]))
        total += units * site.parameters_per_unit * option.density * place_bits / 8
    for matmul in site.matmuls:
        out, inner = matmul.features(units)
        total += option.rank * (out + inner) * width_bytes if units else 0
        if number_format is not None and not number_format.floating and units:
            total += 4 * out * math.ceil(inner / (number_format.group or inner))  # float32 scales
    return round(total)


def grid(site: Site, align: int = 1) -> list[int]:
    """Numbers of units to price, from all of them down, as the site's kind gives them.

    Widths are rounded to multiples of `align`; 0 is there when the site can be dropped.

    >>> grid(Site(name="f", kind="ffn", units=20, slices=(), writer="w"), align=4)
    [20, 16, 12, 8, 4]
    """
    levels = kind_of(site).levels(site, align)
    return [*levels, 0] if site.drop is not None else levels


def drop_dominated(latencies: Mapping[int, float]) -> dict[int, float]:
    """The measured staircase: without every width for which a wider one is not slower.

    >>> drop_dominated({8: 4.0, 7: 4.5, 6: 3.0, 5: 3.0, 0: 0.0})
    {8: 4.0, 6: 3.0, 0: 0.0}
    """
    kept: dict[int, float] = {}
    fastest = math.inf
    for units, ms in sorted(latencies.items(), reverse=True):
        if ms < fastest:
            kept[units] = ms
            fastest = ms
    return kept

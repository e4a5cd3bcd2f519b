"""Energy and average power as budgets: what every option takes above idle, and what a bound leaves.

Energy is not time by another name. While a GPU waits for launches it draws a part of its power only, so a
site that became all launches saves less energy than time. Where a counter exists, the dense model is
metered and sets the level; elsewhere the level is the profile's power envelope, and it is an estimate.

Average power is a matter of how often the model is asked: at `rate_hz` runs a second the device draws its
idle power and, above it, the energy of one run `rate_hz` times a second. A device that never rests draws
its full power whatever the model, so a power budget without a rate has no answer.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import nn

from compress import artifacts
from compress.cost import energy, roofline
from compress.cost.energy import Energy
from compress.cost.roofline import WAITING_POWER_SHARE
from compress.errors import CompressError
from compress.ir import Document, Option, Site, Source
from compress.pipeline import model_files
from compress.pipeline.job import Job
from compress.pipeline.pricing import Costs
from compress.profiles import Profile
from compress.search.closed_loop import CandidateTable, Iteration, OutOfReachError
from compress.search.knapsack import OptionCosts

ASKED = ("energy_mj", "power_w")


class Prices(Document):
    """Energy above idle in millijoules: `rows[site][option.key]`, and `fixed_mj` outside every site.

    `idle_w` is what the device draws with nothing to do; None where nobody states it.
    """

    rows: dict[str, dict[str, float]]
    fixed_mj: float
    idle_w: float | None
    source: Source
    meter: str

    @property
    def dense_mj(self) -> float:
        """One run of the dense model."""
        return self.fixed_mj + sum(row[Option().key] for row in self.rows.values())

    def of(self, choices: Mapping[str, Option]) -> float:
        """One run of a plan."""
        return self.fixed_mj + sum(row[choices[name].key] for name, row in self.rows.items())

    def average_w(self, energy_mj: float, rate_hz: float) -> float | None:
        """Power at a rate of runs, None where idle is not known."""
        return None if self.idle_w is None else self.idle_w + energy_mj * rate_hz / 1e3


def metered(job: Job, model: nn.Module, file: Path) -> Energy | None:
    """Energy of one run on this machine, where it was asked for and a counter exists."""
    backend = job.backend
    if backend is None or job.recipe.budget.name not in ASKED:
        return None
    with job.stages(f"energy {file.stem}"), model_files.opened(job, backend, model, file) as runner:
        return energy.measure_energy(model_files.timed(job, runner), meter=backend.meter())


def price(job: Job, costs: Costs) -> Prices:
    """The energy of every option that has a time.

    Raises:
        CompressError: no counter here can be read, and the profile states no power.
    """

    def make() -> Prices:
        used = metered(job, job.task.model, job.dense_file)
        return priced(job, costs, used)

    made_from = artifacts.digest(job.key, costs, job.profile.idle_w, job.profile.load_w)
    return artifacts.saved(job.work / "energy.json", Prices, made_from, make)


def priced(job: Job, costs: Costs, used: Energy | None) -> Prices:
    """Energies from times and modelled power, at the level of what the counter said where there is one."""
    profile, threads = job.profile, job.recipe.bench.threads
    if used is None and (profile.idle_w is None or profile.load_w is None):
        flag = "--" + job.recipe.budget.name.replace("_", "-")
        raise CompressError(
            f"{flag} {job.recipe.budget.value:g}: no energy counter can be read here, and the profile "
            f"{profile.name!r} states no power, so energy can neither be measured nor estimated.\n"
            "  Ask for --latency-ms or --speedup; `compress doctor` says how a counter is opened"
        )
    rows = {
        site.name: {
            option.key: costs.latency_ms(site, option) * _watts(_drawn_w(site, option, profile, threads))
            for option in costs.options(site)
        }
        for site in job.sites
    }
    outside_w = _watts(roofline.max_above_idle_w(profile, threads))
    outside_w *= WAITING_POWER_SHARE if profile.kind == "gpu" else 1.0
    found = Prices(
        rows=rows,
        fixed_mj=costs.fixed_ms * outside_w,
        idle_w=profile.idle_w,
        source="estimated",
        meter=f"power envelope of {profile.name}",
    )
    if used is None:
        return found
    level = used.energy_mj / found.dense_mj
    return Prices(
        rows={name: {key: mj * level for key, mj in row.items()} for name, row in rows.items()},
        fixed_mj=found.fixed_mj * level,
        idle_w=used.idle_w,
        source="measured",
        meter=used.meter,
    )


def _drawn_w(site: Site, option: Option, profile: Profile, threads: int) -> float | None:
    """Modelled power of a site; how a product is formed changes its time, hardly its power."""
    units = site.units if option.units is None else option.units
    return roofline.above_idle_w(site, units, profile, threads=threads)


def _watts(modelled: float | None) -> float:
    """Modelled power; where nothing is known it is the same for all, and the counter sets its level."""
    return 1.0 if modelled is None else modelled


def limit_mj(job: Job, costs: Costs, prices: Prices) -> float:
    """What the budget leaves for one run, above idle.

    Raises:
        CompressError: the dense model keeps the budget already, or no model can.
        OutOfReachError: no plan for this one is fast enough for the rate.
    """
    budget = job.recipe.budget
    if budget.energy_mj is not None:
        limit, dense, unit = budget.energy_mj, prices.dense_mj, "mJ"
    else:
        limit, dense, unit = _power_limit_mj(job, prices), prices.dense_mj, "mJ above idle in each run"
        _keeps_up(job, costs)
    if dense <= limit and job.narrowed is None:
        word = "" if prices.source == "measured" else " (estimate)"
        raise CompressError(
            f"{_flag(job)} is already kept: the dense model takes {dense:.3g} {unit}{word} on "
            f"{job.profile.name}, {limit:.3g} are allowed; there is nothing to compress"
        )
    return limit


def _power_limit_mj(job: Job, prices: Prices) -> float:
    budget = job.recipe.budget
    assert budget.power_w is not None
    assert budget.rate_hz is not None, "recipe.read refuses power without a rate"
    if prices.idle_w is None or budget.power_w <= prices.idle_w:
        drawn = "an unknown power" if prices.idle_w is None else f"{prices.idle_w:.3g} W"
        raise CompressError(
            f"{_flag(job)}: the {job.profile.name} draws {drawn} with nothing to do, which no model changes "
            f"({prices.meter}).\n  Ask for more than that, or for --energy-mj of one run"
        )
    return 1e3 * (budget.power_w - prices.idle_w) / budget.rate_hz


def _keeps_up(job: Job, costs: Costs) -> None:
    """Refuse a rate that the fastest plan there is cannot answer."""
    rate_hz = job.recipe.budget.rate_hz or 0.0
    fastest = (min(costs.latency_ms(site, one) for one in costs.options(site)) for site in job.sites)
    least_ms = costs.whole.latency_ms(sum(fastest))
    if least_ms * rate_hz > 1e3:
        raise OutOfReachError(
            f"--rate-hz {rate_hz:g} leaves {1e3 / rate_hz:.3g} ms for a run; the fastest plan takes "
            f"{least_ms:.3g} ms on {job.profile.name}: ask for {1e3 / least_ms:.0f} a second or less"
        )


def _flag(job: Job) -> str:
    budget = job.recipe.budget
    rate = "" if budget.rate_hz is None else f" --rate-hz {budget.rate_hz:g}"
    return f"--{budget.name.replace('_', '-')} {budget.value:g}{rate}"


def menus(menus: CandidateTable, prices: Prices) -> tuple[OptionCosts, ...]:
    """The options of every site at their energies, with the losses of the model."""
    return tuple(
        OptionCosts(np.array([prices.rows[name][option.key] for option in options]), menu.error)
        for name, options, menu in zip(menus.names, menus.options, menus.scaled, strict=True)
    )


def average_w(used: Energy | None, rate_hz: float | None) -> float | None:
    """Power that a counter's energy makes at a rate of runs, None without either."""
    if used is None or used.idle_w is None or rate_hz is None:
        return None
    return used.idle_w + used.energy_mj * rate_hz / 1e3


def predicted_mj(
    job: Job, predicted_ms: float, choices: Mapping[str, Option], prices: Prices | None
) -> float | None:
    """Energy of one run of a plan, an estimate: by its prices, or by the power envelope alone."""
    if prices is not None:
        return prices.of(choices)
    return energy.energy_above_idle_mj(predicted_ms, job.profile, job.recipe.bench.threads)


def predicted_w(job: Job, turn: Iteration, prices: Prices | None) -> float | None:
    """Average power at the rate that was asked for, an estimate."""
    rate_hz = job.recipe.budget.rate_hz
    if prices is None or rate_hz is None:
        return None
    return prices.average_w(prices.of(turn.choices), rate_hz)

"""Search for the plan from costs and stored candidates, and keep it in rounds.json and plan.json."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from compress import artifacts
from compress.calibration import activation_statistics, block_saliency
from compress.cost import latency_table
from compress.ir import Document, Option, Plan
from compress.methods import candidate_store
from compress.methods.candidate_store import Errors
from compress.pipeline.job import Job
from compress.pipeline.pricing import Costs
from compress.search import closed_loop, knapsack
from compress.search.closed_loop import (
    CandidateTable,
    Iteration,
    OutOfReachError,
    SearchEffort,
    SearchHistory,
    Timing,
)
from compress.search.knapsack import Choices, OptionCosts
from compress.search.objective import ModelObjective
from compress.sites.prune import Removal

TimePlan = Callable[[dict[str, Option]], Timing]
WEIGHT_PRECISION = "fp32"  # of dense weights in a file under a size budget
OBJECTIVE_BATCH = 32  # samples in a batch of the objective


class Losses(Document):
    """The loss of the model with one site compressed: `rows[site][option]`."""

    rows: tuple[tuple[float, ...], ...]


def build_candidates(job: Job, costs: Costs) -> Errors:
    """Build a candidate for every option in the costs; return layer errors by site and option."""
    wanted = job.recipe.calibration
    statistics = artifacts.folder(job.work / "statistics", job.key)
    with job.stages("calibrate") as tick:
        activation_statistics.collect(
            job.task,
            job.sites,
            job.calibration,
            statistics,
            memory_mb=wanted.memory_mb,
            taylor=job.recipe.options.score == "taylor",
            readers=any(len(costs.rows[site.name]) > 1 for site in job.sites),
            spans=_needs_ranges(job, costs),
            progress=tick,
        )
    wanted_options = {
        site.name: [option for option in costs.options(site) if option != Option()] for site in job.sites
    }
    key = artifacts.digest(job.key, wanted_options)
    saliency = _collect_saliency(job, costs)
    with job.stages("candidates") as tick:
        return candidate_store.build(
            job.task.model,
            job.sites,
            statistics,
            wanted_options,
            artifacts.folder(job.work / "candidates", key),
            score=job.recipe.options.score,
            damping=wanted.damping,
            saliency=saliency,
            progress=tick,
        )


def _needs_ranges(job: Job, costs: Costs) -> bool:
    """Whether an option quantizes inputs by ranges that calibration data decide."""
    options = [Option.of(form, None) for site in job.sites for form in costs.rows[site.name]]
    found = [option.number_format for option in options]
    return any(one is not None and one.range == "calibrated" for one in found)


def _collect_saliency(job: Job, costs: Costs) -> Path | None:
    """The directory with the saliency of all tiles, None if no option ranks blocks by it."""
    options = [Option.of(form, None) for site in job.sites for form in costs.rows[site.name]]
    shapes = [one.block for one in options if one.blocked and not one.rank]
    if job.recipe.options.blocks != "fisher" or not shapes:
        return None
    tile = math.gcd(*(rows for rows, _ in shapes)), math.gcd(*(columns for _, columns in shapes))
    directory = artifacts.folder(job.work / "saliency", artifacts.digest(job.key, tile))
    memory_mb = job.recipe.calibration.memory_mb
    with job.stages("saliency") as tick:
        block_saliency.collect(
            job.task, job.sites, job.calibration, directory, tile, memory_mb=memory_mb, progress=tick
        )
    return directory


def build_table(job: Job, costs: Costs, errors: Errors) -> CandidateTable:
    """The options with costs and layer errors; losses equal layer errors until they are measured."""
    options, prior = [], []
    for site in job.sites:
        row = costs.options(site)
        options.append(row)
        lost = [0.0 if option == Option() else errors[site.name][option.key] for option in row]
        prior.append(
            OptionCosts(np.array([costs.latency_ms(site, option) for option in row]), np.array(lost))
        )
    return CandidateTable(
        names=tuple(site.name for site in job.sites),
        kinds=tuple(site.kind for site in job.sites),
        options=tuple(options),
        totals=tuple(site.units for site in job.sites),
        prior=tuple(prior),
        scaled=tuple(prior),
        whole=costs.whole,
    )


def build_objective(job: Job, table: CandidateTable) -> ModelObjective:
    """The objective on validation inputs, or on calibration inputs when there are none."""
    wanted = job.recipe.search
    batches = list(job.task.batches("validation", OBJECTIVE_BATCH, wanted.samples))
    return ModelObjective(
        job.task,
        job.sites,
        job.work / "candidates",
        table.options,
        batches or job.calibration[:8],
        job.baseline.task.model,
    )


def measure_losses(job: Job, table: CandidateTable, objective: ModelObjective) -> CandidateTable:
    """The table with measured losses of the model instead of layer errors."""
    if job.recipe.options.uniform:
        return table
    made_from = artifacts.digest(job.key, table.options, job.recipe.search.samples)

    def measure() -> Losses:
        with job.stages("sensitivities") as tick:
            groups = [[option.form for option in row] for row in table.options]
            scaled = knapsack.measure_sensitivities(
                table.prior, table.dense, objective, groups=groups, progress=tick
            )
        return Losses(rows=tuple(tuple(site_costs.error.tolist()) for site_costs in scaled))

    losses = artifacts.saved(job.work / "losses.json", Losses, made_from, measure)
    scaled = tuple(
        OptionCosts(prior.cost, np.array(row)) for prior, row in zip(table.prior, losses.rows, strict=True)
    )
    return replace(table, scaled=scaled)


def search_effort(job: Job) -> SearchEffort:
    """The size of the search that the recipe asks for."""
    wanted = job.recipe.search
    return SearchEffort(wanted.generations, wanted.offspring, wanted.seed, job.recipe.options.uniform)


def run_closed_loop(
    job: Job,
    costs: Costs,
    table: CandidateTable,
    objective: ModelObjective,
    asked: float,
    time_plan: TimePlan,
    rounds: SearchHistory,
) -> SearchHistory:
    """Search, build and time plans until one meets the budget.

    Continues after `rounds`, or, if empty, after the stored iterations of an interrupted run.
    """
    path = job.work / "rounds.json"
    made_from = artifacts.digest(job.key, costs, job.recipe.search, job.recipe.bench, asked)

    def stage(name: str) -> Callable[[int, int], None]:
        job.stages.progress.say(name)
        return lambda done, total: None

    return closed_loop.search_until_met(
        table,
        asked,
        costs.dense_ms,
        objective,
        search_effort(job),
        time_plan,
        rounds=job.recipe.bench.rounds,
        stored=rounds if rounds.rounds else artifacts.stored_at(path, SearchHistory, made_from) or rounds,
        keep=lambda rounds: artifacts.store(path, made_from, rounds),
        progress=stage,
    )


def search_once(
    job: Job, table: CandidateTable, objective: ModelObjective, limit_ms: float, asked: float
) -> Iteration:
    """The plan within a bound on predicted latency, without timing it."""
    effort = search_effort(job)
    with job.stages("search") as tick:
        try:
            choices, loss = closed_loop.search_plan(table, limit_ms, objective, effort, progress=tick)
        except knapsack.UnreachableError as error:
            raise closed_loop.unreachable(table, asked, table.whole.dense_ms, None) from error
    return Iteration(
        limit_ms=limit_ms,
        predicted_ms=table.latency_ms(choices),
        choices=table.named(choices),
        loss=loss,
    )


def search_by_size(job: Job, costs: Costs, table: CandidateTable, objective: ModelObjective) -> Iteration:
    """The plan whose file meets a size budget; sizes are computed exactly, so nothing is timed.

    Raises:
        OutOfReachError: the smallest plan is larger than the budget.
    """
    choices, loss = search_within(job, *size_costs(job, table), objective)
    return Iteration(
        limit_ms=costs.dense_ms,
        predicted_ms=table.latency_ms(choices),
        choices=table.named(choices),
        loss=loss,
    )


def size_costs(job: Job, table: CandidateTable) -> tuple[tuple[OptionCosts, ...], float]:
    """The options with costs in megabytes, and the megabytes that a size budget leaves for all sites.

    Raises:
        OutOfReachError: the smallest options together exceed that.
    """
    priced = tuple(
        OptionCosts(
            np.array(
                [latency_table.weight_bytes(site, option, WEIGHT_PRECISION) / 1e6 for option in options]
            ),
            site_costs.error,
        )
        for site, options, site_costs in zip(job.sites, table.options, table.scaled, strict=True)
    )
    dense_mb = (job.dense_file).stat().st_size / 1e6
    outside_mb = dense_mb - sum(float(site_costs.cost.max()) for site_costs in priced)
    least_mb = sum(float(site_costs.cost.min()) for site_costs in priced)
    asked_mb = job.recipe.budget.value
    if outside_mb + least_mb > asked_mb:
        raise OutOfReachError(
            f"--size-mb {asked_mb:g} is out of reach: {outside_mb:.1f} MB of {dense_mb:.1f} MB lie outside "
            f"every site (embeddings, head); the smallest plan has {outside_mb + least_mb:.1f} MB.\n"
            f"  Ask for --size-mb {math.ceil(10 * (outside_mb + least_mb) + 0.5) / 10:g} or more"
        )
    return priced, asked_mb - outside_mb


def search_within(
    job: Job, priced: Sequence[OptionCosts], limit: float, objective: Callable[[Choices], float]
) -> tuple[Choices, float]:
    """The best plan whose summed cost is at most `limit`, in the unit of the costs, and its loss.

    Raises:
        UnreachableError: the cheapest options together cost more.
    """
    effort = search_effort(job)
    start = knapsack.solve(priced, limit)
    with job.stages("search") as tick:
        return knapsack.evolve(
            priced,
            start,
            limit,
            objective,
            generations=effort.generations,
            offspring=effort.offspring,
            seed=effort.seed,
            progress=tick,
        )


def load_removals(job: Job, choices: Mapping[str, Option]) -> dict[str, Removal]:
    """Read the stored candidates of a plan, by site name."""
    return {
        site.name: candidate_store.removal(job.work / "candidates", index, choices[site.name])
        for index, site in enumerate(job.sites)
        if choices[site.name] != Option()
    }


def to_plan(job: Job, table: CandidateTable, iteration: Iteration) -> Plan:
    """The plan as a document (plan.json)."""
    less = job.narrowed
    width = {} if less is None else {less.site.name: Option(units=less.units)}
    return Plan(
        target=job.recipe.target,
        budget=job.recipe.budget,
        choices=iteration.choices | width,
        fixed_ms=table.whole.fixed_ms,
        predicted_ms=iteration.predicted_ms,
    )

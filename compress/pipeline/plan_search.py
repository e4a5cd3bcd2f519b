"""From costs and stored candidates to the plan that was built and timed: rounds.json and plan.json."""

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
from compress.methods.apply import STATIC
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
WEIGHT_PRECISION = "fp32"  # of the weights in a file whose size is bounded
OBJECTIVE_BATCH = 32  # inputs of one batch that judges a choice


class Losses(Document):
    """Menus in units of the stitched model's loss: `rows[site][option]`."""

    rows: tuple[tuple[float, ...], ...]


def build_candidates(job: Job, costs: Costs) -> Errors:
    """Build every candidate the costs name, one site at a time; the layer errors by site and option."""
    wanted = job.recipe.calibration
    statistics = artifacts.folder(job.folder / "statistics", job.key)
    with job.stages("calibrate") as tick:
        activation_statistics.collect(
            job.task,
            job.sites,
            job.calibration,
            statistics,
            memory_mb=wanted.memory_mb,
            taylor=job.recipe.options.score == "taylor",
            readers=any(len(costs.rows[site.name]) > 1 for site in job.sites),
            spans=any(form.endswith(STATIC) for site in job.sites for form in costs.rows[site.name]),
            progress=tick,
        )
    wanted_options = {
        site.name: [option for option in costs.options(site) if option != Option()] for site in job.sites
    }
    key = artifacts.digest(job.key, wanted_options)
    felt = _collect_saliency(job, costs)
    with job.stages("candidates") as tick:
        return candidate_store.build(
            job.task.model,
            job.sites,
            statistics,
            wanted_options,
            artifacts.folder(job.folder / "candidates", key),
            score=job.recipe.options.score,
            damping=wanted.damping,
            felt=felt,
            progress=tick,
        )


def _collect_saliency(job: Job, costs: Costs) -> Path | None:
    """Where the effects of all tiles lie, if there are blocks to be ranked by them."""
    options = [Option.of(form, None) for site in job.sites for form in costs.rows[site.name]]
    shapes = [one.block for one in options if one.pattern.startswith("block:") and not one.rank]
    if job.recipe.options.blocks != "fisher" or not shapes:
        return None
    tile = math.gcd(*(rows for rows, _ in shapes)), math.gcd(*(columns for _, columns in shapes))
    directory = artifacts.folder(job.folder / "saliency", artifacts.digest(job.key, tile))
    memory_mb = job.recipe.calibration.memory_mb
    with job.stages("saliency") as tick:
        block_saliency.collect(
            job.task, job.sites, job.calibration, directory, tile, memory_mb=memory_mb, progress=tick
        )
    return directory


def build_table(job: Job, costs: Costs, errors: Errors) -> CandidateTable:
    """The search's view of a job: prior errors, and the same again where losses are not known yet."""
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


def build_objective(job: Job, menus: CandidateTable) -> ModelObjective:
    """The stitched model over inputs that no statistic has seen, when there are such."""
    wanted = job.recipe.search
    batches = list(job.task.batches("validation", OBJECTIVE_BATCH, wanted.samples))
    return ModelObjective(
        job.task,
        job.sites,
        job.folder / "candidates",
        menus.options,
        batches or job.calibration[:8],
        job.baseline.task.model,
    )


def measure_losses(job: Job, menus: CandidateTable, judge: ModelObjective) -> CandidateTable:
    """The menus with losses of the stitched model in the place of layer errors."""
    if job.recipe.options.uniform:
        return menus
    made_from = artifacts.digest(job.key, menus.options, job.recipe.search.samples)

    def measure() -> Losses:
        with job.stages("sensitivities") as tick:
            groups = [[option.form for option in row] for row in menus.options]
            scaled = knapsack.measure_sensitivities(
                menus.prior, menus.dense, judge, groups=groups, progress=tick
            )
        return Losses(rows=tuple(tuple(menu.error.tolist()) for menu in scaled))

    losses = artifacts.saved(job.folder / "losses.json", Losses, made_from, measure)
    scaled = tuple(
        OptionCosts(menu.cost, np.array(row)) for menu, row in zip(menus.prior, losses.rows, strict=True)
    )
    return replace(menus, scaled=scaled)


def search_effort(job: Job) -> SearchEffort:
    """How hard the recipe says to search."""
    wanted = job.recipe.search
    return SearchEffort(wanted.generations, wanted.offspring, wanted.seed, job.recipe.options.uniform)


def run_closed_loop(
    job: Job,
    costs: Costs,
    menus: CandidateTable,
    judge: ModelObjective,
    asked: float,
    time_plan: TimePlan,
    rounds: SearchHistory,
) -> SearchHistory:
    """Choose, build and time plans until one keeps the promise.

    It goes on from `rounds`, or, when there are none, from where a killed run stopped.
    """
    path = job.folder / "rounds.json"
    made_from = artifacts.digest(job.key, costs, job.recipe.search, job.recipe.bench, asked)

    def stage(name: str) -> Callable[[int, int], None]:
        job.stages.progress.say(name)
        return lambda done, total: None

    return closed_loop.search_until_met(
        menus,
        asked,
        costs.dense_ms,
        judge,
        search_effort(job),
        time_plan,
        rounds=job.recipe.bench.rounds,
        stored=rounds if rounds.rounds else artifacts.stored_at(path, SearchHistory, made_from) or rounds,
        keep=lambda rounds: artifacts.store(path, made_from, rounds),
        progress=stage,
    )


def search_once(
    job: Job, menus: CandidateTable, judge: ModelObjective, limit_ms: float, asked: float
) -> Iteration:
    """The plan for a budget that cannot be timed here, or needs no timing; nothing is measured."""
    with job.stages("search") as tick:
        try:
            choices, loss = closed_loop.search_plan(menus, limit_ms, judge, search_effort(job), progress=tick)
        except knapsack.UnreachableError as error:
            raise closed_loop.unreachable(menus, asked, menus.whole.dense_ms, None) from error
    return Iteration(
        limit_ms=limit_ms,
        predicted_ms=menus.latency_ms(choices),
        choices=menus.named(choices),
        loss=loss,
    )


def search_by_size(job: Job, costs: Costs, menus: CandidateTable, judge: ModelObjective) -> Iteration:
    """The plan whose file keeps a size budget; bytes are known exactly, so nothing is timed.

    Raises:
        OutOfReachError: even the smallest plan is larger.
    """
    choices, loss = search_within(job, *size_costs(job, menus), judge)
    return Iteration(
        limit_ms=costs.dense_ms,
        predicted_ms=menus.latency_ms(choices),
        choices=menus.named(choices),
        loss=loss,
    )


def size_costs(job: Job, menus: CandidateTable) -> tuple[tuple[OptionCosts, ...], float]:
    """The menus priced in megabytes, and what all sites together may take of a size budget.

    Raises:
        OutOfReachError: even the smallest options together take more.
    """
    priced = tuple(
        OptionCosts(
            np.array(
                [latency_table.weight_bytes(site, option, WEIGHT_PRECISION) / 1e6 for option in options]
            ),
            menu.error,
        )
        for site, options, menu in zip(job.sites, menus.options, menus.scaled, strict=True)
    )
    dense_mb = (job.folder / "dense.onnx").stat().st_size / 1e6
    outside_mb = dense_mb - sum(float(menu.cost.max()) for menu in priced)
    least_mb = sum(float(menu.cost.min()) for menu in priced)
    asked_mb = job.recipe.budget.value
    if outside_mb + least_mb > asked_mb:
        raise OutOfReachError(
            f"--size-mb {asked_mb:g} is out of reach: {outside_mb:.1f} MB of {dense_mb:.1f} MB lie outside "
            f"every site (embeddings, head); the smallest plan has {outside_mb + least_mb:.1f} MB.\n"
            f"  Ask for --size-mb {math.ceil(10 * (outside_mb + least_mb) + 0.5) / 10:g} or more"
        )
    return priced, asked_mb - outside_mb


def search_within(
    job: Job, priced: Sequence[OptionCosts], limit: float, judge: Callable[[Choices], float]
) -> tuple[Choices, float]:
    """The best plan whose summed price is within `limit`, in whatever unit the menus are priced; its loss.

    Raises:
        UnreachableError: even the cheapest options together cost more.
    """
    effort = search_effort(job)
    start = knapsack.solve(priced, limit)
    with job.stages("search") as tick:
        return knapsack.evolve(
            priced,
            start,
            limit,
            judge,
            generations=effort.generations,
            offspring=effort.offspring,
            seed=effort.seed,
            progress=tick,
        )


def load_removals(job: Job, choices: Mapping[str, Option]) -> dict[str, Removal]:
    """The stored candidates of a plan, by site name."""
    return {
        site.name: candidate_store.removal(job.folder / "candidates", index, choices[site.name])
        for index, site in enumerate(job.sites)
        if choices[site.name] != Option()
    }


def to_plan(job: Job, menus: CandidateTable, turn: Iteration) -> Plan:
    """The decision as a document to read, edit and commit."""
    less = job.narrowed
    width = {} if less is None else {less.site.name: Option(units=less.units)}
    return Plan(
        target=job.recipe.target,
        budget=job.recipe.budget,
        choices=turn.choices | width,
        fixed_ms=menus.whole.fixed_ms,
        predicted_ms=turn.predicted_ms,
    )

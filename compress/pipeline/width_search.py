"""Search over the hidden width: a few narrower models, and in each a search for the rest of the budget.

The residual stream contains every other site, so it cannot be one more row of options: the cost and the
damage of removing a head depend on the width. Widths are therefore an outer loop. Each width is pruned in
one shot along the principal components of the residual stream (`hidden_width`) and evaluated with all heads
and neurons in place. Removing heads and neurons as well only adds to that loss, so a width whose own loss
exceeds that of the best plan so far is not searched. The remaining widths are searched in the order of their
estimated loss; the best plan that meets the budget is kept.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from compress import artifacts, formats
from compress.core.rotation import Narrowing, narrowing, principal
from compress.cost import latency_table
from compress.distributed import collectives
from compress.errors import CompressError
from compress.ir import Option, Site, Width
from compress.methods import hidden_width
from compress.pipeline.energy_budget import Prices
from compress.pipeline.job import Job, Narrowed, fingerprint
from compress.pipeline.pricing import Costs
from compress.report import schema
from compress.report.schema import Chosen, Report, SiteReport
from compress.search import knapsack
from compress.search.closed_loop import CandidateTable, Iteration, OutOfReachError, SearchHistory
from compress.search.objective import ModelObjective
from compress.sites.residual_stream import Stream

MOVE = "width"
REASON_BEST = "no other width loses less within the budget"
REASON_WORSE = "another width loses less within the budget"
REASON_MISSED = "its plans miss the budget"
REASON_FASTEST = "no width meets the budget, and this one is the fastest"
REASON_TOO_SLOW = "the budget is out of reach at this width"


@dataclass(frozen=True)
class SearchSpace:
    """A model at one width with the costs, options and objective of its search."""

    job: Job
    costs: Costs
    table: CandidateTable
    objective: ModelObjective
    prices: Prices | None


@dataclass(frozen=True)
class SearchResult:
    """The best plan of a search space, and the iterations that led to it."""

    space: SearchSpace
    rounds: SearchHistory
    iteration: Iteration

    def rank(self, asked: float) -> tuple[bool, float]:
        """Sort key, smaller is better: plans that meet the budget by loss, then the others by speed."""
        missed = self.iteration.timing is not None and self.iteration.speedup < asked
        return missed, -self.iteration.speedup if missed else self.iteration.loss

    @property
    def speedup(self) -> float:
        """Measured, or predicted where nothing was timed."""
        return self.iteration.speedup or self.space.costs.dense_ms / self.iteration.predicted_ms


def requested_stream(job: Job) -> Stream | None:
    """The residual stream of the job's model, None if `width` is not among the moves.

    Raises:
        CompressError: the width of this model cannot be pruned, with the reason.
    """
    if MOVE not in job.recipe.options.moves:
        return None
    if collectives.size() > 1:
        raise CompressError(
            f"--moves {MOVE} runs in one process, but {collectives.size()} were started; "
            "start one process, or leave the move out"
        )
    try:
        return find_stream(job)
    except CompressError as error:
        rest = [move for move in job.recipe.options.moves if move != MOVE] or [formats.STRUCTURE]
        raise CompressError(
            f"--moves {MOVE} does not support this model: {error}.\n  Use --moves {','.join(rest)}"
        ) from error


def find_stream(job: Job) -> Stream:
    """The residual stream of the job's model; raises CompressError if its width cannot be pruned."""
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    with job.stages("find residual stream"):
        return artifacts.saved(
            job.work / "stream.json",
            Stream,
            job.model_key,
            lambda: hidden_width.find_stream(job.task.model, example),
        )


def candidate_widths(job: Job, stream: Stream) -> list[int]:
    """The widths to try, widest first: the recipe's fractions at multiples of the target's alignment.

    Fractions refer to the width of the original model; for a job that is narrow already the result may be
    empty.

    Raises:
        CompressError: no multiple of the step lies below the width.
    """
    step, fractions = job.profile.align_units, job.recipe.options.widths
    whole = stream.width if job.narrowed is None else job.narrowed.site.units
    near = {step * round(share * whole / step) for share in fractions}
    found = sorted((units for units in near if 1 < units < stream.width), reverse=True)
    if not found and job.narrowed is None:
        raise CompressError(
            f"--moves {MOVE}: the hidden width is {stream.width}, {job.profile.name} runs well at multiples "
            f"of {step}, and none of them is near the fractions {', '.join(map(str, fractions))} of it; "
            "set widths under [options] in a recipe, or leave the move out"
        )
    return found


@dataclass(frozen=True, eq=False)
class Directions:
    """Principal components of a stream: `basis` [width, k] by falling moment, and the `moments` [k]."""

    stream: Stream
    basis: Tensor
    moments: Tensor

    def kept(self, units: int) -> Narrowing:
        """The projection from the stream to one of `units` channels, and back."""
        return narrowing(self.basis, units, centered=self.stream.centered)

    def error(self, units: int) -> float:
        """The share of the second moment that `units` channels do not carry."""
        inside = self.moments[: units - int(self.stream.centered)].sum()
        return max(0.0, float(1 - inside / self.moments.sum()))


def measure_directions(job: Job, stream: Stream) -> Directions:
    """The principal components of the stream on the calibration data."""
    with job.stages("stream moments"):
        second = hidden_width.moments(job.task.model, stream, job.calibration)
    return Directions(stream, *principal(second, centered=stream.centered))


def narrow_model(job: Job, directions: Directions, units: int) -> nn.Module:
    """A copy of the job's model with `units` channels in its stream."""
    model = copy.deepcopy(job.task.model)
    hidden_width.rewrite(model, directions.stream, directions.kept(units))
    return model


def narrow(job: Job, directions: Directions, units: int) -> Job:
    """The job with its model narrowed to `units` channels.

    Its sites are those of the job with narrower matrix products; it has a folder of its own. For a job that
    is narrow already the errors compound: `1 - (1 - before) * (1 - error)`.
    """
    stream, before, model = directions.stream, job.narrowed, narrow_model(job, directions, units)
    recorded, _ = hidden_width.recorded(model, stream)
    down, error = directions.kept(units).down, directions.error(units)
    less = Narrowed(
        wide=job.baseline,
        site=hidden_width.site_of(stream) if before is None else before.site,
        units=units,
        error=error if before is None else 1 - (1 - before.error) * (1 - error),
        down=down if before is None else down @ before.down,
        stated=not recorded,
    )
    return _narrowed_job(job, model, tuple(narrow_site(site, stream, units) for site in job.sites), less)


def from_previous(job: Job, last: Job, model: nn.Module) -> Job:
    """A job that starts from the previous member of a family; only narrower widths remain.

    Args:
        job: of the member to build, on the dense model.
        last: the job of the previous member's plan.
        model: the previous member's model, expanded to the shapes of `last`'s model.
    """
    if last.narrowed is None:
        return job.on(model)
    return _narrowed_job(job, model, last.sites, replace(last.narrowed, wide=job))


def _narrowed_job(job: Job, model: nn.Module, sites: tuple[Site, ...], less: Narrowed) -> Job:
    """The job with a narrower model, in a folder of its own."""
    task = copy.copy(job.task)
    task.model = model
    folder = less.wide.work / f"width-{less.units}"
    folder.mkdir(exist_ok=True)
    model_key = artifacts.digest(*fingerprint(model), job.recipe.shapes)
    return replace(
        job,
        task=task,
        folder=folder,
        sites=sites,
        model_key=model_key,
        key=artifacts.digest(job.key, model_key),
        narrowed=less,
    )


def narrow_site(site: Site, stream: Stream, units: int) -> Site:
    """The site with products that read and write `units` channels of the stream."""
    reads = {reader.weight for reader in stream.readers}
    writes = {part.tensor for part in stream.writers}
    matmuls = []
    for matmul in site.matmuls:
        sides = {"inner": units} if matmul.weight in reads else {}
        sides |= {"out": units} if matmul.weight in writes else {}
        matmuls.append(matmul.model_copy(update=sides))
    return site.model_copy(update={"matmuls": tuple(matmuls)})


@dataclass
class _WidthTrials:
    """The best plan so far, and the outcome of every width."""

    asked: float
    best: SearchResult | None = None
    tried: dict[int, Width] = field(default_factory=dict)
    unreachable: dict[int, OutOfReachError] = field(default_factory=dict)

    def search_width(self, width: Width, job: Job, choose: Callable[[Job], SearchResult]) -> None:
        """Search the plans of one width, that of `job`."""
        try:
            found = choose(job)
        except OutOfReachError as error:
            self.unreachable[width.units] = error
            self.tried[width.units] = width.model_copy(update={"why": REASON_TOO_SLOW})
            return
        table = found.space.table
        self.tried[width.units] = width.model_copy(
            update={
                "latency_ms": table.latency_ms(table.dense),
                "source": found.space.costs.source,
                "plan_loss": found.iteration.loss,
                "plan_speedup": found.speedup,
                "why": REASON_MISSED if found.rank(self.asked)[0] else REASON_WORSE,
            }
        )
        if self.best is None or found.rank(self.asked) < self.best.rank(self.asked):
            self.best = found

    def cannot_win(self, width: Width) -> bool:
        """Whether the loss of a width with all units exceeds that of the best plan; records the outcome."""
        if self.best is None or (False, width.loss) < self.best.rank(self.asked):
            return False
        other = self.best.iteration.loss
        why = f"loss {width.loss:.3g} with all units; the best plan of another width has {other:.3g}"
        self.tried[width.units] = width.model_copy(update={"why": why})
        return True


def search_widths(
    space: SearchSpace,
    stream: Stream,
    asked: float,
    prepare: Callable[[Job], SearchSpace],
    choose: Callable[[SearchSpace], SearchResult],
) -> tuple[SearchResult, tuple[Width, ...]]:
    """The best plan over the full width and narrower ones, and the outcome of each width.

    Args:
        space: the model at its full width.
        stream: its residual stream.
        asked: the speedup, 0 for a budget of another kind.
        prepare: builds the search space of a narrow job.
        choose: searches one space; raises OutOfReachError if no plan meets the budget.

    Raises:
        OutOfReachError: no width reaches the budget.
    """
    job, costs, trials = space.job, space.costs, _WidthTrials(asked)
    units = candidate_widths(job, stream)
    loss = 0.0 if job.narrowed is None else space.objective.of(job.task.model)
    whole = Width(units=stream.width, loss=loss, latency_ms=costs.dense_ms, source=costs.source)
    trials.search_width(whole, job, lambda _: choose(space))
    directions = measure_directions(job, stream)
    for trial in _ranked_widths(space, directions, units, trials.best):
        if not trials.cannot_win(trial):
            loss_note = f"divergence {trial.loss:.3g} with all units"
            job.stages.progress.say(f"hidden width {trial.units} of {stream.width}: {loss_note}")
            trials.search_width(trial, narrow(job, directions, trial.units), lambda own: choose(prepare(own)))
    best = trials.best
    if best is None:
        raise trials.unreachable[min(trials.unreachable)]
    less = best.space.job.narrowed
    kept = trials.tried[stream.width if less is None else less.units]
    why = REASON_FASTEST if best.rank(asked)[0] else REASON_BEST
    trials.tried[kept.units] = kept.model_copy(update={"chosen": True, "why": why})
    return best, tuple(trials.tried[one] for one in sorted(trials.tried, reverse=True))


def _ranked_widths(
    space: SearchSpace, directions: Directions, units: list[int], best: SearchResult | None
) -> list[Width]:
    """The widths with their losses, lowest estimated loss of a plan first.

    The estimate adds to the loss of the narrow model with all units the loss of pruning heads and neurons
    down to the time of the best plan at full width, from the losses of single sites there.
    """
    job, table = space.job, space.table
    limit_ms = table.latency_ms(table.cheapest()) if best is None else best.iteration.predicted_ms
    ranked: list[tuple[float, Width]] = []
    with job.stages("narrow") as tick:
        for number, width in enumerate(units, 1):
            loss, share = (
                space.objective.of(narrow_model(job, directions, width)),
                _time_share(job, directions.stream, width),
            )
            ms = share * space.costs.dense_ms
            trial = Width(units=width, loss=loss, latency_ms=ms, source="estimated")
            ranked.append((loss + _estimated_loss(table, limit_ms / share), trial))
            tick(number, len(units))
    return [trial for _, trial in sorted(ranked, key=lambda pair: pair[0])]


def estimate_widths(job: Job, stream: Stream, dense_ms: float) -> list[dict[str, object]]:
    """Latency, speedup and stream error of each width alone, estimated before anything is built."""
    directions = measure_directions(job, stream)
    rows: list[dict[str, object]] = []
    for units in candidate_widths(job, stream):
        share = _time_share(job, stream, units)
        rows.append(
            {
                "width": units,
                "latency_ms_estimate": round(share * dense_ms, 4),
                "speedup_estimate": round(1 / share, 3),
                "stream_error": round(directions.error(units), 4),
            }
        )
    return rows


def _time_share(job: Job, stream: Stream, units: int) -> float:
    """Roofline time of all sites at a width, as a share of that at the full width."""

    def total(sites: tuple[Site, ...]) -> float:
        return sum(latency_table.price(site, Option(), profile=job.profile).latency_ms for site in sites)

    return total(tuple(narrow_site(site, stream, units) for site in job.sites)) / total(job.sites)


def _estimated_loss(table: CandidateTable, limit_ms: float) -> float:
    """Summed single-site losses of the best plan at full width within a latency."""
    room = table.whole.room_ms(limit_ms)
    try:
        return knapsack.totals(table.scaled, knapsack.solve(table.scaled, room))[1]
    except knapsack.UnreachableError:
        return sum(float(site_costs.error.max()) for site_costs in table.scaled)


def add_to_report(result: Report, found: SearchResult, widths: tuple[Width, ...]) -> Report:
    """Add the residual site, if it was pruned, and the widths that were tried to the report."""
    sites, less = list(result.sites), found.space.job.narrowed
    if less is not None:
        sites.append(_site_report(less, found.space))
    ends = result.waterfall[0].ms, result.waterfall[-1].ms
    return result.model_copy(
        update={
            "sites": tuple(sites),
            "widths": widths,
            "waterfall": schema.steps(*ends, sites),
            "attribution": (*result.attribution, *map(_summary_line, widths)),
        }
    )


def _site_report(less: Narrowed, space: SearchSpace) -> SiteReport:
    """The report of the residual site; it contains all others, so its times are those of the whole model."""
    return SiteReport(
        name=less.site.name,
        kind=less.site.kind,
        option=Chosen(units=less.units, units_total=less.site.units),
        error=less.error,
        latency_ms=space.table.latency_ms(space.table.dense),
        dense_latency_ms=space.costs.dense_ms,
        source=space.costs.source,
    )


def _summary_line(width: Width) -> str:
    note = "" if width.source == "measured" else " (estimate)"
    alone = f"divergence {width.loss:.3g} and {width.latency_ms:.3g} ms{note} with all units"
    plan = ""
    if width.plan_loss is not None:
        plan = f", {width.plan_loss:.3g} at {width.plan_speedup:.2f}x with its best plan"
    what = "chosen" if width.chosen else "not chosen"
    return f"Hidden width {width.units}: {alone}{plan}; {what}: {width.why}."

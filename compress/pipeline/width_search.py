"""The hidden width in the search: a few narrower models, and in each the search for the rest of the budget.

The residual stream is one site that every other one lies in, so it cannot be one menu among theirs: what a
head costs, and what its removal does, is another thing at another width. Widths are therefore an outer
loop. Each is cut at once, by the directions that carry most (`hidden_width`), and judged with everything else
in place, which takes no search. That loss only grows when heads and neurons go as well, so a width whose
loss alone is above that of the best plan so far cannot win and is not searched. The others are, in
order of promise; the best plan that keeps the budget stays, whatever its width.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from compress import artifacts
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
REASON_FASTEST = "no width keeps the budget, and this one is the fastest"
REASON_TOO_SLOW = "the budget is out of reach at this width"


@dataclass(frozen=True)
class SearchSpace:
    """A model at one width with everything that its plans are chosen by."""

    job: Job
    costs: Costs
    table: CandidateTable
    judge: ModelObjective
    prices: Prices | None


@dataclass(frozen=True)
class SearchResult:
    """The plan to keep on a ground, and the turns that led to it."""

    space: SearchSpace
    rounds: SearchHistory
    iteration: Iteration

    def rank(self, asked: float) -> tuple[bool, float]:
        """Smaller is better: plans that keep the budget, by their loss; then the others, by their speed."""
        missed = self.iteration.timing is not None and self.iteration.speedup < asked
        return missed, -self.iteration.speedup if missed else self.iteration.loss

    @property
    def speedup(self) -> float:
        """Measured, or predicted where nothing was timed."""
        return self.iteration.speedup or self.space.costs.dense_ms / self.iteration.predicted_ms


def requested_stream(job: Job) -> Stream | None:
    """The residual stream of the job's model, None where the move was not asked for.

    Raises:
        CompressError: the width of this model cannot be cut; it says why.
    """
    if MOVE not in job.recipe.options.moves:
        return None
    if collectives.size() > 1:
        raise CompressError(
            f"--moves {MOVE} runs in one process, {collectives.size()} were started; "
            "start one, or leave it out"
        )
    try:
        return find_stream(job)
    except CompressError as error:
        rest = [move for move in job.recipe.options.moves if move != MOVE] or ["structure"]
        raise CompressError(
            f"--moves {MOVE} is not for this model: {error}.\n  Ask for --moves {','.join(rest)}"
        ) from error


def find_stream(job: Job) -> Stream:
    """The residual stream, asked for or not.

    Raises:
        CompressError: there is none whose width can be cut.
    """
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    with job.stages("find residual stream"):
        return artifacts.saved(
            job.folder / "stream.json",
            Stream,
            job.model_key,
            lambda: hidden_width.find_stream(job.task.model, example),
        )


def candidate_widths(job: Job, stream: Stream) -> list[int]:
    """The widths to try, the widest first: the recipe's fractions at multiples of the target's step.

    Fractions are of the width of the model that was asked about; where that was cut before, there may be
    none left.

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
    """What flows through a stream: its directions [width, k] by falling moment, and the moments [k]."""

    stream: Stream
    basis: Tensor
    moments: Tensor

    def kept(self, units: int) -> Narrowing:
        """From the stream to one of `units` channels, and back."""
        return narrowing(self.basis, units, centered=self.stream.centered)

    def error(self, units: int) -> float:
        """The share of all that flows which `units` channels do not carry."""
        inside = self.moments[: units - int(self.stream.centered)].sum()
        return max(0.0, float(1 - inside / self.moments.sum()))


def measure_directions(job: Job, stream: Stream) -> Directions:
    """The directions of the stream on the calibration data."""
    with job.stages("stream moments"):
        second = hidden_width.moments(job.task.model, stream, job.calibration)
    return Directions(stream, *principal(second, centered=stream.centered))


def narrow_model(job: Job, found: Directions, units: int) -> nn.Module:
    """A copy of the job's model with `units` channels in its stream."""
    model = copy.deepcopy(job.task.model)
    hidden_width.rewrite(model, found.stream, found.kept(units))
    return model


def narrow(job: Job, found: Directions, units: int) -> Job:
    """The job with its model narrowed to `units` channels, all else the same.

    Its sites are those of the job with narrower products; it works in a folder of its own. A job that is
    narrow already has lost more in the end: what was gone before, and a share of the rest.
    """
    stream, before, model = found.stream, job.narrowed, narrow_model(job, found, units)
    recorded, _ = hidden_width.recorded(model, stream)
    down, error = found.kept(units).down, found.error(units)
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
    """A job on the dense model, at what another member of its family has become.

    Args:
        job: of the member to be made.
        last: the job that the other member's plan was made for.
        model: the other member's, of the shapes of `last`'s model; where that is narrow, so is what is
            given, and only narrower widths are left to it.
    """
    if last.narrowed is None:
        return job.on(model)
    return _narrowed_job(job, model, last.sites, replace(last.narrowed, wide=job))


def _narrowed_job(job: Job, model: nn.Module, sites: tuple[Site, ...], less: Narrowed) -> Job:
    """The job with a narrower model, in a folder of its own."""
    task = copy.copy(job.task)
    task.model = model
    folder = less.wide.folder / f"width-{less.units}"
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
    """A site of heads or neurons whose products read and write `units` channels."""
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
    """The best plan so far, and what came of every width."""

    asked: float
    best: SearchResult | None = None
    tried: dict[int, Width] = field(default_factory=dict)
    unreachable: dict[int, OutOfReachError] = field(default_factory=dict)

    def search_width(self, width: Width, job: Job, choose: Callable[[Job], SearchResult]) -> None:
        """Search one width, that of `job`."""
        try:
            found = choose(job)
        except OutOfReachError as error:
            self.unreachable[width.units] = error
            self.tried[width.units] = width.model_copy(update={"why": REASON_TOO_SLOW})
            return
        menus = found.space.table
        self.tried[width.units] = width.model_copy(
            update={
                "latency_ms": menus.latency_ms(menus.dense),
                "source": found.space.costs.source,
                "plan_loss": found.iteration.loss,
                "plan_speedup": found.speedup,
                "why": REASON_MISSED if found.rank(self.asked)[0] else REASON_WORSE,
            }
        )
        if self.best is None or found.rank(self.asked) < self.best.rank(self.asked):
            self.best = found

    def cannot_win(self, width: Width) -> bool:
        """Whether a width cannot win, since nothing that is removed besides makes its loss smaller."""
        if self.best is None or (False, width.loss) < self.best.rank(self.asked):
            return False
        other = self.best.iteration.loss
        why = f"loss {width.loss:.3g} with all units; the best plan of another width has {other:.3g}"
        self.tried[width.units] = width.model_copy(update={"why": why})
        return True


def search_widths(
    ground: SearchSpace,
    stream: Stream,
    asked: float,
    prepare: Callable[[Job], SearchSpace],
    choose: Callable[[SearchSpace], SearchResult],
) -> tuple[SearchResult, tuple[Width, ...]]:
    """The best plan over the whole width and narrower ones, and what came of each width.

    Args:
        ground: the model at its whole width.
        stream: its residual stream.
        asked: the speedup, 0 for a budget of another kind.
        prepare: what plans of a narrow job are chosen by.
        choose: the best plan on one ground; raises OutOfReachError where none keeps the budget.

    Raises:
        OutOfReachError: no width reaches the budget.
    """
    job, costs, race = ground.job, ground.costs, _WidthTrials(asked)
    units = candidate_widths(job, stream)
    loss = 0.0 if job.narrowed is None else ground.judge.of(job.task.model)
    whole = Width(units=stream.width, loss=loss, latency_ms=costs.dense_ms, source=costs.source)
    race.search_width(whole, job, lambda _: choose(ground))
    seen = measure_directions(job, stream)
    for trial in _ranked_widths(ground, seen, units, race.best):
        if not race.cannot_win(trial):
            said = f"divergence {trial.loss:.3g} with all units"
            job.stages.progress.say(f"hidden width {trial.units} of {stream.width}: {said}")
            race.search_width(trial, narrow(job, seen, trial.units), lambda own: choose(prepare(own)))
    best = race.best
    if best is None:
        raise race.unreachable[min(race.unreachable)]
    less = best.space.job.narrowed
    kept = race.tried[stream.width if less is None else less.units]
    why = REASON_FASTEST if best.rank(asked)[0] else REASON_BEST
    race.tried[kept.units] = kept.model_copy(update={"chosen": True, "why": why})
    return best, tuple(race.tried[one] for one in sorted(race.tried, reverse=True))


def _ranked_widths(
    ground: SearchSpace, seen: Directions, units: list[int], best: SearchResult | None
) -> list[Width]:
    """The widths with their losses, judged with all units in place, the most promising first.

    A promise is that loss, and what the single losses of the sites at the whole width say of taking the
    rest of the time that the best plan there takes.
    """
    job, menus = ground.job, ground.table
    limit_ms = menus.latency_ms(menus.cheapest()) if best is None else best.iteration.predicted_ms
    promises: list[tuple[float, Width]] = []
    with job.stages("narrow") as tick:
        for number, width in enumerate(units, 1):
            loss, share = (
                ground.judge.of(narrow_model(job, seen, width)),
                _time_share(job, seen.stream, width),
            )
            ms = share * ground.costs.dense_ms
            trial = Width(units=width, loss=loss, latency_ms=ms, source="estimated")
            promises.append((loss + _estimated_loss(menus, limit_ms / share), trial))
            tick(number, len(units))
    return [trial for _, trial in sorted(promises, key=lambda pair: pair[0])]


def estimate_widths(job: Job, stream: Stream, dense_ms: float) -> list[dict[str, object]]:
    """What each width would take and lose by itself, before anything is built; times are estimates."""
    seen = measure_directions(job, stream)
    rows: list[dict[str, object]] = []
    for units in candidate_widths(job, stream):
        share = _time_share(job, stream, units)
        rows.append(
            {
                "width": units,
                "latency_ms_estimate": round(share * dense_ms, 4),
                "speedup_estimate": round(1 / share, 3),
                "stream_error": round(seen.error(units), 4),
            }
        )
    return rows


def _time_share(job: Job, stream: Stream, units: int) -> float:
    """The time of all sites at a width, by the roofline, as a share of what they take at the whole one."""

    def total(sites: tuple[Site, ...]) -> float:
        return sum(latency_table.price(site, Option(), profile=job.profile).latency_ms for site in sites)

    return total(tuple(narrow_site(site, stream, units) for site in job.sites)) / total(job.sites)


def _estimated_loss(menus: CandidateTable, limit_ms: float) -> float:
    """What the sites would lose, by their single losses, in a model of the whole width within a time."""
    room = menus.whole.room_ms(limit_ms)
    try:
        return knapsack.totals(menus.scaled, knapsack.solve(menus.scaled, room))[1]
    except knapsack.UnreachableError:
        return sum(float(menu.error.max()) for menu in menus.scaled)


def add_to_report(result: Report, found: SearchResult, widths: tuple[Width, ...]) -> Report:
    """The report with the residual site where it was cut, and the widths that were tried, also in words."""
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


def _site_report(less: Narrowed, ground: SearchSpace) -> SiteReport:
    """The residual site: every other one lies in it, so its times are those of the whole model."""
    return SiteReport(
        name=less.site.name,
        kind=less.site.kind,
        option=Chosen(units=less.units, units_total=less.site.units),
        error=less.error,
        latency_ms=ground.table.latency_ms(ground.table.dense),
        dense_latency_ms=ground.costs.dense_ms,
        source=ground.costs.source,
    )


def _summary_line(width: Width) -> str:
    said = "" if width.source == "measured" else " (estimate)"
    alone = f"divergence {width.loss:.3g} and {width.latency_ms:.3g} ms{said} with all units"
    plan = ""
    if width.plan_loss is not None:
        plan = f", {width.plan_loss:.3g} at {width.plan_speedup:.2f}x with its best plan"
    what = "chosen" if width.chosen else "not chosen"
    return f"Hidden width {width.units}: {alone}{plan}; {what}: {width.why}."

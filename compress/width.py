"""The hidden width in the search: a few narrower models, and in each the search for the rest of the budget.

The residual stream is one site that every other one lies in, so it cannot be one menu among theirs: what a
head costs, and what its removal does, is another thing at another width. Widths are therefore an outer
loop. Each is cut at once, by the directions that carry most (`residual`), and judged with everything else
in place, which takes no search. That loss only grows when heads and neurons go as well, so a width whose
loss alone is above that of the best plan so far cannot win and is not searched. The others are, in
order of promise; the best plan that keeps the budget stays, whatever its width.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from compress import artifact, cost, residual, search
from compress.core.rotation import Narrowing, narrowing, principal
from compress.errors import CompressError
from compress.ir import Option, Site, Width
from compress.job import Job, Narrowed, fingerprint
from compress.loop import Menus, OutOfReachError, Round, Rounds
from compress.power import Prices
from compress.pricing import Costs
from compress.report import Report
from compress.stitch import Stitched
from compress.stream import Stream

MOVE = "width"
WORSE = "another width loses less within the budget"
BEST = "no other width loses less within the budget"


@dataclass(frozen=True)
class Ground:
    """A model at one width with everything that its plans are chosen by."""

    job: Job
    costs: Costs
    menus: Menus
    judge: Stitched
    prices: Prices | None


@dataclass(frozen=True)
class Found:
    """The plan to keep on a ground, and the turns that led to it."""

    ground: Ground
    rounds: Rounds
    turn: Round

    def rank(self, asked: float) -> tuple[bool, float]:
        """Smaller is better: plans that keep the budget first, then those that lose least."""
        missed = self.turn.timing is not None and self.turn.speedup < asked
        return missed, self.turn.loss

    @property
    def speedup(self) -> float:
        """Measured, or predicted where nothing was timed."""
        return self.turn.speedup or self.ground.costs.dense_ms / self.turn.predicted_ms


def stream_of(job: Job) -> Stream | None:
    """The residual stream of the job's model, None where the move was not asked for.

    Raises:
        CompressError: the width of this model cannot be cut; it says why.
    """
    if MOVE not in job.recipe.options.moves:
        return None
    try:
        return found_stream(job)
    except CompressError as error:
        rest = [move for move in job.recipe.options.moves if move != MOVE] or ["structure"]
        raise CompressError(
            f"--moves {MOVE} is not for this model: {error}.\n  Ask for --moves {','.join(rest)}"
        ) from error


def found_stream(job: Job) -> Stream:
    """The residual stream, asked for or not.

    Raises:
        CompressError: there is none whose width can be cut.
    """
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    with job.stages("find residual stream"):
        return artifact.saved(
            job.folder / "stream.json",
            Stream,
            job.model_key,
            lambda: residual.find_stream(job.task.model, example),
        )


def levels(job: Job, stream: Stream) -> list[int]:
    """The widths to try, the widest first: the recipe's fractions at multiples of the target's step.

    Raises:
        CompressError: no multiple of the step lies below the width.
    """
    step, fractions = job.profile.align_units, job.recipe.options.widths
    near = {step * round(share * stream.width / step) for share in fractions}
    found = sorted((units for units in near if 1 < units < stream.width), reverse=True)
    if not found:
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
    basis: torch.Tensor
    moments: torch.Tensor

    def kept(self, units: int) -> Narrowing:
        """From the stream to one of `units` channels, and back."""
        return narrowing(self.basis, units, centered=self.stream.centered)

    def error(self, units: int) -> float:
        """The share of all that flows which `units` channels do not carry."""
        inside = self.moments[: units - int(self.stream.centered)].sum()
        return max(0.0, float(1 - inside / self.moments.sum()))


def directions(job: Job, stream: Stream) -> Directions:
    """The directions of the stream on the calibration data."""
    with job.stages("stream moments"):
        second = residual.moments(job.task.model, stream, job.calibration)
    return Directions(stream, *principal(second, centered=stream.centered))


def narrow(job: Job, found: Directions, units: int) -> Job:
    """The job with its model narrowed to `units` channels, all else the same.

    Its sites are those of the job with narrower products; it works in a folder of its own.
    """
    stream, made = found.stream, found.kept(units)
    task = copy.copy(job.task)
    task.model = copy.deepcopy(job.task.model)
    residual.rewrite(task.model, stream, made)
    recorded, _ = residual.recorded(task.model, stream)
    folder = job.folder / f"width-{units}"
    folder.mkdir(exist_ok=True)
    model_key = artifact.digest(*fingerprint(task.model), job.recipe.shapes)
    return replace(
        job,
        task=task,
        folder=folder,
        sites=tuple(narrow_site(site, stream, units) for site in job.sites),
        model_key=model_key,
        key=artifact.digest(job.key, model_key),
        narrowed=Narrowed(
            wide=job,
            site=residual.site_of(stream),
            units=units,
            error=found.error(units),
            down=made.down,
            stated=not recorded,
        ),
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


def search_widths(
    ground: Ground,
    stream: Stream,
    asked: float,
    prepare: Callable[[Job], Ground],
    choose: Callable[[Ground], Found],
) -> tuple[Found, tuple[Width, ...]]:
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
    job = ground.job
    units = levels(job, stream)
    tried: dict[int, Width] = {}
    best: Found | None = None
    refusals: dict[int, OutOfReachError] = {}

    def attempt(own: Job, width: Width) -> Found | None:
        say = job.stages.progress.say
        say(f"hidden width {width.units} of {stream.width}: divergence {width.loss:.3g} with all units")
        try:
            one = ground if own is job else prepare(own)
            found = choose(one)
        except OutOfReachError as error:
            refusals[width.units] = error
            tried[width.units] = width.model_copy(update={"why": "the budget is out of reach at this width"})
            return best
        tried[width.units] = width.model_copy(
            update={
                "latency_ms": one.menus.latency_ms(one.menus.dense),
                "source": one.costs.source,
                "plan_loss": found.turn.loss,
                "plan_speedup": found.speedup,
                "why": WORSE,
            }
        )
        return found if best is None or found.rank(asked) < best.rank(asked) else best

    dense_ms, source = ground.costs.dense_ms, ground.costs.source
    best = attempt(job, Width(units=stream.width, loss=0.0, latency_ms=dense_ms, source=source))
    seen = directions(job, stream)
    cheaper = {width: _share(job, stream, width) for width in units}
    waiting = {}
    with job.stages("narrow") as tick:
        for number, width in enumerate(units, 1):
            loss = ground.judge.of(narrow(job, seen, width).task.model)
            ms = cheaper[width] * dense_ms
            waiting[width] = Width(units=width, loss=loss, latency_ms=ms, source="estimated")
            tick(number, len(units))
    limit_ms = ground.menus.latency_ms(ground.menus.cheapest()) if best is None else best.turn.predicted_ms
    hopes = {
        width: trial.loss + _rest(ground.menus, limit_ms / cheaper[width]) for width, trial in waiting.items()
    }
    for width in sorted(hopes, key=hopes.__getitem__):
        trial = waiting[width]
        if best is not None and (False, trial.loss) >= best.rank(asked):
            why = f"it loses {trial.loss:.3g} with all units, more than the plan at {_units(best, stream)}"
            tried[width] = trial.model_copy(update={"why": why})
            continue
        best = attempt(narrow(job, seen, width), trial)
    if best is None:
        raise refusals[min(refusals)]
    kept = _units(best, stream)
    tried[kept] = tried[kept].model_copy(update={"chosen": True, "why": BEST})
    return best, tuple(tried[width] for width in sorted(tried, reverse=True))


def outlook(job: Job, stream: Stream, dense_ms: float) -> list[dict[str, object]]:
    """What each width would take and lose by itself, before anything is built; times are estimates."""
    seen = directions(job, stream)
    rows: list[dict[str, object]] = []
    for units in levels(job, stream):
        share = _share(job, stream, units)
        rows.append(
            {
                "width": units,
                "latency_ms_estimate": round(share * dense_ms, 4),
                "speedup_estimate": round(1 / share, 3),
                "stream_error": round(seen.error(units), 4),
            }
        )
    return rows


def _units(found: Found, stream: Stream) -> int:
    less = found.ground.job.narrowed
    return stream.width if less is None else less.units


def _share(job: Job, stream: Stream, units: int) -> float:
    """The time of all sites at a width, by the roofline, as a share of what they take at the whole one."""

    def total(sites: tuple[Site, ...]) -> float:
        return sum(cost.price(site, Option(), profile=job.profile).latency_ms for site in sites)

    return total(tuple(narrow_site(site, stream, units) for site in job.sites)) / total(job.sites)


def _rest(menus: Menus, limit_ms: float) -> float:
    """What the sites would lose, by their single losses, in a model of the whole width within a time."""
    room = menus.whole.room_ms(limit_ms)
    try:
        return search.total(menus.scaled, search.knapsack(menus.scaled, room))[1]
    except search.UnreachableError:
        return sum(float(menu.error.max()) for menu in menus.scaled)


def told(result: Report, widths: tuple[Width, ...]) -> Report:
    """The report with the widths that were tried, in figures and in words."""
    return result.model_copy(
        update={"widths": widths, "attribution": (*result.attribution, *map(_line, widths))}
    )


def _line(width: Width) -> str:
    said = "" if width.source == "measured" else " (estimate)"
    alone = f"divergence {width.loss:.3g} and {width.latency_ms:.3g} ms{said} with all units"
    plan = ""
    if width.plan_loss is not None:
        plan = f", {width.plan_loss:.3g} at {width.plan_speedup:.2f}x with its best plan"
    what = "chosen" if width.chosen else "not chosen"
    return f"Hidden width {width.units}: {alone}{plan}; {what}: {width.why}."

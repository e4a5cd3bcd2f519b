"""The closed loop: choose a plan, build it, time it, correct the budget, until the promise is kept.

Predicted and measured time differ by what tables cannot know. The loop therefore times every plan it
chooses and moves the budget by what it finds, until the measured speedup lies inside the window
`[asked, 1.05 asked]`, or the cheapest plan there is was measured and found too slow. A machine whose
timings differ by more than the window would turn it for ever: after three turns anything fast enough will do.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.errors import CompressError
from compress.ir import Document, Option, Whole
from compress.search import knapsack
from compress.search.knapsack import Choices, OptionCosts, UnreachableError

SPEEDUP_WINDOW = 1.05
ITERATIONS_BEFORE_FASTER_PLAN = 3  # turns after which a plan that is faster than the window asks for will do
MIN_LATENCY_SHARE = 1e-3  # of the dense model's time: beyond the known points, lines may come to nothing
TARGET_OVERSHOOT = 1.022  # where in the window to aim: a timer's noise on either side stays inside
Progress = Callable[[int, int], None]


class OutOfReachError(CompressError):
    """No plan keeps the budget."""


class Timing(Document):
    """A speedup that was measured, with its 95 % interval, and the latencies behind it."""

    speedup: float
    interval95: tuple[float, float]
    dense_ms: float
    measured_ms: float


class Iteration(Document):
    """One turn of the loop. `limit_ms` bounds the predicted time of the plan, `choices` are by site."""

    limit_ms: float
    predicted_ms: float
    choices: dict[str, Option]
    loss: float
    timing: Timing | None = None

    @property
    def speedup(self) -> float:
        """The measured speedup, 0 for a plan that was not timed."""
        return 0.0 if self.timing is None else self.timing.speedup


class SearchHistory(Document):
    """All turns so far, so that a killed run goes on with the next one."""

    rounds: tuple[Iteration, ...] = ()

    def chosen(self, asked: float) -> Iteration:
        """The turn to keep: the least compressed that met the request, else the fastest."""
        met = [turn for turn in self.rounds if turn.speedup >= asked]
        if met:
            return min(met, key=lambda turn: (turn.speedup > asked * SPEEDUP_WINDOW, turn.loss))
        return max(self.rounds, key=lambda turn: turn.speedup)


@dataclass(frozen=True)
class CandidateTable:
    """The options of every site with their costs, and with two views of what they damage.

    `prior[i]` holds the costs of `options[i]` with the layer error, `scaled[i]` the same costs with the
    loss of the stitched model. `whole` makes of the sum of costs the time of the model.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    options: tuple[tuple[Option, ...], ...]
    totals: tuple[int, ...]
    prior: tuple[OptionCosts, ...]
    scaled: tuple[OptionCosts, ...]
    whole: Whole

    def latency_ms(self, choices: Choices) -> float:
        """Predicted time of the whole model."""
        found = self.whole.latency_ms(knapsack.totals(self.prior, choices)[0])
        return max(found, MIN_LATENCY_SHARE * self.whole.dense_ms)

    @property
    def dense(self) -> Choices:
        """The choices that leave everything as it is."""
        return tuple(options.index(Option()) for options in self.options)

    def indices(self, choices: Mapping[str, Option]) -> Choices:
        """The choices as positions in the menus."""
        pairs = zip(self.names, self.options, strict=True)
        return tuple(options.index(choices[name]) for name, options in pairs)

    def named(self, choices: Choices) -> dict[str, Option]:
        """The chosen options by site name."""
        triples = zip(self.names, self.options, choices, strict=True)
        return {name: options[choice] for name, options, choice in triples}

    def cheapest(self) -> Choices:
        """The fastest plan there is."""
        return tuple(int(np.lexsort((menu.error, menu.cost))[0]) for menu in self.prior)


@dataclass(frozen=True)
class SearchEffort:
    """How hard `choose` tries; a `uniform` plan is the baseline without any search."""

    generations: int
    offspring: int
    seed: int
    uniform: bool = False


def search_plan(
    menus: CandidateTable,
    limit_ms: float,
    judge: Callable[[Choices], float],
    effort: SearchEffort,
    *,
    known: Sequence[Choices] = (),
    progress: Progress | None = None,
) -> tuple[Choices, float]:
    """The plan within `limit_ms` of predicted time that the judge likes best, and its loss.

    Knapsack solutions for the prior error and for the measured sensitivities, those that keep to one way
    to run products, and `known` plans that fit, are judged; the best of them starts the evolution.

    Raises:
        UnreachableError: nothing fits.
    """
    room = menus.whole.room_ms(limit_ms)
    if effort.uniform:
        shares = [
            np.array([1.0 if option.units is None else option.units / total for option in options])
            for options, total in zip(menus.options, menus.totals, strict=True)
        ]
        choices = knapsack.solve_uniform(menus.prior, shares, room)
        return choices, judge(choices)
    starts = {knapsack.solve(menus.prior, room), knapsack.solve(menus.scaled, room)}
    starts |= set(_single_method_plans(menus, room))
    starts |= {plan for plan in known if knapsack.totals(menus.prior, plan)[0] <= room}
    start = min(sorted(starts), key=judge)
    return knapsack.evolve(
        menus.scaled,
        start,
        room,
        judge,
        generations=effort.generations,
        offspring=effort.offspring,
        seed=effort.seed,
        progress=progress,
    )


def _single_method_plans(menus: CandidateTable, room: float) -> Iterator[Choices]:
    """For every way to run products, the best plan within `room` that leaves a site dense or takes that way.

    Losses of different ways are compared from few probes, so that a mix may look better than it is: with
    these among the starts, what one way alone would reach is not lost.
    """
    ways = [[_method(option) for option in row] for row in menus.options]
    for way in sorted({way for row in ways for way in row}):
        places = [
            [
                at
                for at, (own, option) in enumerate(zip(*pair, strict=True))
                if own == way or option == Option()
            ]
            for pair in zip(ways, menus.options, strict=True)
        ]
        parts = [
            OptionCosts(menu.cost[at], menu.error[at]) for menu, at in zip(menus.scaled, places, strict=True)
        ]
        try:
            chosen = knapsack.solve(parts, room)
        except UnreachableError:
            continue
        yield tuple(at[option] for at, option in zip(places, chosen, strict=True))


def _method(option: Option) -> str:
    """How products run, without the numbers: `block` for every shape and density of block."""
    return "+".join(part.partition(":")[0] for part in option.form.split("+"))


def search_until_met(
    menus: CandidateTable,
    asked: float,
    dense_ms: float,
    judge: Callable[[Choices], float],
    effort: SearchEffort,
    time_plan: Callable[[dict[str, Option]], Timing],
    *,
    rounds: int,
    stored: SearchHistory,
    keep: Callable[[SearchHistory], None],
    progress: Callable[[str], Progress],
) -> SearchHistory:
    """Turn the loop until the measured speedup is in the window, at most `rounds` times.

    Args:
        menus: the options and their predicted costs.
        asked: the speedup that was asked for; a latency budget is its ratio to the dense one.
        dense_ms: measured latency of the dense model, which the predictions refer to.
        judge: the stitched model's loss of a choice.
        effort: how hard to search; later turns search a third as long, from the last plan.
        time_plan: builds a plan (options by site name) and times it against the dense model.
        rounds: turns at most.
        stored: turns of an interrupted run.
        keep: called after every turn with all turns so far.
        progress: gives the callback for a stage of the given name.

    Raises:
        OutOfReachError: the fastest plan was measured and is too slow; it says what is reachable.
    """
    history = stored
    known = [menus.indices(turn.choices) for turn in history.rounds]
    while len(history.rounds) < rounds and not _is_met(history, asked):
        limit_ms = _limit_ms(history, asked, dense_ms)
        first = not history.rounds
        work = (
            effort
            if first
            else SearchEffort(effort.generations // 3, effort.offspring, effort.seed, effort.uniform)
        )
        ticks = progress(f"search {len(history.rounds) + 1}")
        try:
            choices, loss = search_plan(menus, limit_ms, judge, work, known=known, progress=ticks)
        except UnreachableError:
            choices = menus.cheapest()
            loss = judge(choices)
        timing = time_plan(menus.named(choices))
        turn = Iteration(
            limit_ms=limit_ms,
            predicted_ms=menus.latency_ms(choices),
            choices=menus.named(choices),
            loss=loss,
            timing=timing,
        )
        history = SearchHistory(rounds=(*history.rounds, turn))
        keep(history)
        if choices == menus.cheapest() and timing.speedup < asked:
            raise unreachable(menus, asked, dense_ms, timing)
        if choices in known:
            break
        known.append(choices)
    return history


def _is_met(history: SearchHistory, asked: float) -> bool:
    """The last plan lies in the window; or several were tried, and one of them is fast enough."""
    if not history.rounds:
        return False
    inside = asked <= history.rounds[-1].speedup <= asked * SPEEDUP_WINDOW
    tried = len(history.rounds) >= ITERATIONS_BEFORE_FASTER_PLAN
    return inside or (tried and any(turn.speedup >= asked for turn in history.rounds))


def _limit_ms(history: SearchHistory, asked: float, dense_ms: float) -> float:
    """The bound on predicted time: what was asked, moved by how far measurements were off so far.

    All of them count alike, since a single one is as noisy as the machine, and following the last one
    would swing to and fro. Times are taken relative to a dense model timed in the same minute, so that a
    machine which has become slower since the tables were made does not look like a slower plan.
    """
    off = [math.log(dense_ms / turn.speedup / turn.predicted_ms) for turn in history.rounds]
    return dense_ms / (asked * TARGET_OVERSHOOT) / math.exp(sum(off) / max(1, len(off)))


def unreachable(
    menus: CandidateTable, asked: float, dense_ms: float, timing: Timing | None
) -> OutOfReachError:
    """Why a speedup cannot be had, what can, and by which moves."""
    least_ms = menus.latency_ms(menus.cheapest())
    reach = dense_ms / least_ms if timing is None else timing.speedup
    how = "estimated" if timing is None else "measured"
    moves = []
    for kind in sorted(set(menus.kinds)):
        saved = sum(
            float(menu.cost.max() - menu.cost.min())
            for own, menu in zip(menus.kinds, menus.prior, strict=True)
            if own == kind
        )
        moves.append(f"{kind} {saved:.2f} ms")
    best = int(reach * 19) / 20
    less = "Allow more with --moves"
    if best > 1:
        less = f"Ask for --speedup {best:.2f}x or less (--latency-ms {dense_ms / best:.3g} or more)"
    return OutOfReachError(
        f"{asked:.2f}x ({dense_ms / asked:.3g} ms) is out of reach: the fastest plan there is reaches "
        f"{reach:.2f}x ({dense_ms / reach:.3g} ms, {how}).\n"
        f"  The dense model takes {dense_ms:.2f} ms, of which {menus.whole.fixed_ms:.2f} ms lie outside "
        f"every site; removing everything else would save {', '.join(moves) or 'nothing'}.\n"
        f"  {less}, or price larger inputs with --tokens or --batch."
    )

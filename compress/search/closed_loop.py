"""Closed-loop search: choose, build and time a plan, correct the budget, repeat until it is met.

Cost tables do not capture everything that decides the time of a whole model. The loop therefore times every
plan that it chooses and scales the budget by the ratio of measured to predicted time, until the measured
speedup lies in the window `[asked, 1.05 asked]`, or the cheapest plan was measured and is too slow. On a
machine whose timings vary by more than the window, any plan that is fast enough is accepted after three
iterations.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.cost.model_latency import Whole
from compress.errors import CompressError
from compress.ir import Document, Option
from compress.search import knapsack
from compress.search.knapsack import Choices, OptionCosts, UnreachableError

SPEEDUP_WINDOW = 1.05
ITERATIONS_BEFORE_FASTER_PLAN = 3  # after these, a plan above the window is accepted
MIN_LATENCY_SHARE = 1e-3  # of the dense time; linear extrapolation below the measured sizes may reach zero
TARGET_OVERSHOOT = 1.022  # speedup to search for, over that asked for: near the middle of the window
Progress = Callable[[int, int], None]


class OutOfReachError(CompressError):
    """No plan meets the budget."""


class Timing(Document):
    """A measured speedup with its 95 % interval and the two latencies."""

    speedup: float
    interval95: tuple[float, float]
    dense_ms: float
    measured_ms: float


class Iteration(Document):
    """One iteration: the bound `limit_ms` on predicted time, and the plan found, `choices` by site name."""

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
    """All iterations so far; an interrupted run continues after the last one."""

    rounds: tuple[Iteration, ...] = ()

    def chosen(self, asked: float) -> Iteration:
        """The iteration to keep: the one of least loss that meets the request, else the fastest."""
        met = [one for one in self.rounds if one.speedup >= asked]
        if met:
            return min(met, key=lambda one: (one.speedup > asked * SPEEDUP_WINDOW, one.loss))
        return max(self.rounds, key=lambda one: one.speedup)


@dataclass(frozen=True)
class CandidateTable:
    """The options of every site with their costs, and with two estimates of their damage.

    `prior[i]` holds the costs of `options[i]` with the layer error, `scaled[i]` the same costs with the
    loss of the model in which that site alone is compressed. `whole` maps the sum of costs to the
    latency of the model.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    options: tuple[tuple[Option, ...], ...]
    totals: tuple[int, ...]
    prior: tuple[OptionCosts, ...]
    scaled: tuple[OptionCosts, ...]
    whole: Whole

    def latency_ms(self, choices: Choices) -> float:
        """Predicted latency of the whole model in milliseconds."""
        predicted = self.whole.latency_ms(knapsack.totals(self.prior, choices)[0])
        return max(predicted, MIN_LATENCY_SHARE * self.whole.dense_ms)

    @property
    def dense(self) -> Choices:
        """The choices that leave every site dense."""
        return tuple(options.index(Option()) for options in self.options)

    def indices(self, choices: Mapping[str, Option]) -> Choices:
        """The position of every site's option in its row of the table."""
        pairs = zip(self.names, self.options, strict=True)
        return tuple(options.index(choices[name]) for name, options in pairs)

    def named(self, choices: Choices) -> dict[str, Option]:
        """The chosen options by site name."""
        triples = zip(self.names, self.options, choices, strict=True)
        return {name: options[choice] for name, options, choice in triples}

    def cheapest(self) -> Choices:
        """The fastest plan in the table."""
        return tuple(int(np.lexsort((row.error, row.cost))[0]) for row in self.prior)


@dataclass(frozen=True)
class SearchEffort:
    """Size of the evolutionary search; `uniform` selects the baseline that shrinks all sites alike."""

    generations: int
    offspring: int
    seed: int
    uniform: bool = False


def search_plan(
    table: CandidateTable,
    limit_ms: float,
    objective: Callable[[Choices], float],
    effort: SearchEffort,
    *,
    known: Sequence[Choices] = (),
    progress: Progress | None = None,
) -> tuple[Choices, float]:
    """The plan of lowest objective with a predicted latency of at most `limit_ms`, and its loss.

    The search starts from the best of: the knapsack solutions for layer errors and for measured losses,
    those restricted to one number format or pattern, and the `known` plans that fit.

    Raises:
        UnreachableError: no plan fits.
    """
    room = table.whole.room_ms(limit_ms)
    if effort.uniform:
        shares = [
            np.array([1.0 if option.units is None else option.units / total for option in options])
            for options, total in zip(table.options, table.totals, strict=True)
        ]
        choices = knapsack.solve_uniform(table.prior, shares, room)
        return choices, objective(choices)
    starts = {knapsack.solve(table.prior, room), knapsack.solve(table.scaled, room)}
    starts |= set(_single_method_plans(table, room))
    starts |= {plan for plan in known if knapsack.totals(table.prior, plan)[0] <= room}
    start = min(sorted(starts), key=objective)
    return knapsack.evolve(
        table.scaled,
        start,
        room,
        objective,
        generations=effort.generations,
        offspring=effort.offspring,
        seed=effort.seed,
        progress=progress,
    )


def _single_method_plans(table: CandidateTable, room: float) -> Iterator[Choices]:
    """The best plan within `room` for each method, with every site either dense or compressed by that method.

    Losses of different methods are interpolated from few measurements, so a mixed plan may be
    underestimated; with these among the starts the search is never worse than the best single method.
    """
    ways = [[_method(option) for option in row] for row in table.options]
    for way in sorted({way for row in ways for way in row}):
        places = [
            [
                at
                for at, (own, option) in enumerate(zip(*pair, strict=True))
                if own == way or option == Option()
            ]
            for pair in zip(ways, table.options, strict=True)
        ]
        parts = [
            OptionCosts(row.cost[at], row.error[at]) for row, at in zip(table.scaled, places, strict=True)
        ]
        try:
            chosen = knapsack.solve(parts, room)
        except UnreachableError:
            continue
        yield tuple(at[option] for at, option in zip(places, chosen, strict=True))


def _method(option: Option) -> str:
    """The form of an option without its parameters: `block` for all block shapes and densities."""
    return "+".join(part.partition(":")[0] for part in option.form.split("+"))


def search_until_met(
    table: CandidateTable,
    asked: float,
    dense_ms: float,
    objective: Callable[[Choices], float],
    effort: SearchEffort,
    time_plan: Callable[[dict[str, Option]], Timing],
    *,
    rounds: int,
    stored: SearchHistory,
    keep: Callable[[SearchHistory], None],
    progress: Callable[[str], Progress],
) -> SearchHistory:
    """Search, build and time plans until the measured speedup is in the window, at most `rounds` times.

    Args:
        table: the options and their predicted costs.
        asked: the required speedup; a latency budget is converted by the dense latency.
        dense_ms: measured latency of the dense model, the reference of all predictions.
        objective: the loss of the model with the given choices.
        effort: size of the search; iterations after the first use a third of the generations.
        time_plan: builds a plan (options by site name) and times it against the dense model.
        rounds: maximum number of iterations.
        stored: iterations of an interrupted run.
        keep: called after every iteration with the history.
        progress: returns the callback of a stage, by the name of the stage.

    Raises:
        OutOfReachError: the fastest plan was measured and is too slow; the message has its speedup.
    """
    history = stored
    known = [table.indices(one.choices) for one in history.rounds]
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
            choices, loss = search_plan(table, limit_ms, objective, work, known=known, progress=ticks)
        except UnreachableError:
            choices = table.cheapest()
            loss = objective(choices)
        timing = time_plan(table.named(choices))
        iteration = Iteration(
            limit_ms=limit_ms,
            predicted_ms=table.latency_ms(choices),
            choices=table.named(choices),
            loss=loss,
            timing=timing,
        )
        history = SearchHistory(rounds=(*history.rounds, iteration))
        keep(history)
        if choices == table.cheapest() and timing.speedup < asked:
            raise unreachable(table, asked, dense_ms, timing)
        if choices in known:
            break
        known.append(choices)
    return history


def _is_met(history: SearchHistory, asked: float) -> bool:
    """Whether the last plan is in the window, or enough were tried and one of them is fast enough."""
    if not history.rounds:
        return False
    inside = asked <= history.rounds[-1].speedup <= asked * SPEEDUP_WINDOW
    tried = len(history.rounds) >= ITERATIONS_BEFORE_FASTER_PLAN
    return inside or (tried and any(one.speedup >= asked for one in history.rounds))


def _limit_ms(history: SearchHistory, asked: float, dense_ms: float) -> float:
    """The bound on predicted latency: the one asked for, corrected by the mean log error of predictions.

    The mean over all iterations is used because a single measurement is noisy, and following the last one
    would oscillate. Latencies are taken relative to the dense model timed beside the plan, so that a
    machine which has become slower since the tables were measured does not count as a slower plan.
    """
    errors = [math.log(dense_ms / one.speedup / one.predicted_ms) for one in history.rounds]
    return dense_ms / (asked * TARGET_OVERSHOOT) / math.exp(sum(errors) / max(1, len(errors)))


def unreachable(
    table: CandidateTable, asked: float, dense_ms: float, timing: Timing | None
) -> OutOfReachError:
    """The error for a speedup out of reach, with the maximum and the time that each kind of site can save."""
    least_ms = table.latency_ms(table.cheapest())
    reach = dense_ms / least_ms if timing is None else timing.speedup
    how = "estimated" if timing is None else "measured"
    moves = []
    for kind in sorted(set(table.kinds)):
        saved = sum(
            float(row.cost.max() - row.cost.min())
            for own, row in zip(table.kinds, table.prior, strict=True)
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
        f"  The dense model takes {dense_ms:.2f} ms, of which {table.whole.fixed_ms:.2f} ms lie outside "
        f"every site; removing everything else would save {', '.join(moves) or 'nothing'}.\n"
        f"  {less}, or price larger inputs with --tokens or --batch."
    )

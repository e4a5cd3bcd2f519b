"""Choose one option per site under a budget: exact knapsack, then evolutionary search on the model's loss.

Each site has a row of options with a cost and an error each. `solve` is the exact solution of the
multiple-choice knapsack problem for additive errors. Layer errors are only a prior for the loss of the whole
model, so `measure_sensitivities` replaces them by finite differences of that loss, and `evolve` then
exchanges levels between sites within the budget, scored by the loss itself (Kurtic et al., ZipLM,
arXiv 2302.04089; Sieberling et al., EvoPress, arXiv 2410.14649). Without torch: the model is a function from
choices to a number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.errors import CompressError

Floats = NDArray[np.float64]
Choices = tuple[int, ...]
Fitness = Callable[[Choices], float]
Progress = Callable[[int, int], None]

RELATIVE_TOLERANCE = 1e-9  # for rounding in sums of floats; far below the resolution of any timer
PATIENCE_GENERATIONS = 6  # the search ends after so many generations without a better choice


@dataclass(frozen=True)
class OptionCosts:
    """The options of one site: `cost[i]` and `error[i]` of option i, both non-negative."""

    cost: Floats
    error: Floats

    def __post_init__(self) -> None:
        """Raise CompressError for rows that are empty, ragged or not finite."""
        if self.cost.shape != self.error.shape or self.cost.ndim != 1 or not len(self.cost):
            raise CompressError(
                "costs and errors of a site need equal lengths, at least one option, and one dimension"
            )
        if not (np.isfinite(self.cost).all() and np.isfinite(self.error).all()):
            raise CompressError("a cost or an error of a site's options is not finite")


class UnreachableError(CompressError):
    """No choice meets the budget; `least` is the smallest total cost."""

    def __init__(self, budget: float, least: float) -> None:
        """Set the message from both numbers."""
        super().__init__(f"the budget is {budget:.6g}, the cheapest choice costs {least:.6g}")
        self.budget = budget
        self.least = least


def totals(table: Sequence[OptionCosts], choices: Choices) -> tuple[float, float]:
    """Summed cost and summed error of one option per site."""
    pairs = list(zip(table, choices, strict=True))
    cost = sum(float(row.cost[option]) for row, option in pairs)
    return cost, sum(float(row.error[option]) for row, option in pairs)


def solve(table: Sequence[OptionCosts], budget: float) -> Choices:
    """The choice with the least summed error among all whose summed cost is within `budget`.

    Exact: Pareto fronts of partial sums are merged site by site, and a partial sum is dropped only
    when its error plus the linear relaxation's bound on the remaining sites exceeds the error of a
    choice already known. Ties go to the cheaper choice.

    Raises:
        UnreachableError: even the cheapest options together cost more than `budget`.

    >>> cheap = OptionCosts(np.array([4.0, 1.0]), np.array([0.0, 1.0]))
    >>> solve([cheap, cheap], 5.0) in {(0, 1), (1, 0)}
    True
    """
    limit = budget * (1 + RELATIVE_TOLERANCE)
    least = sum(float(row.cost.min()) for row in table)
    if least > limit:
        raise UnreachableError(budget, least)
    hulls = [_hull(row) for row in table]
    rest_cost = np.zeros(len(table) + 1)
    for site in range(len(table) - 1, -1, -1):
        rest_cost[site] = rest_cost[site + 1] + table[site].cost.min()
    incumbent = totals(table, _greedy(table, hulls, limit))[1]
    incumbent += RELATIVE_TOLERANCE * max(1.0, abs(incumbent))

    cost, error = np.zeros(1), np.zeros(1)
    history: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for site, row in enumerate(table):
        costs = (cost[:, None] + row.cost[None, :]).ravel()
        errors = (error[:, None] + row.error[None, :]).ravel()
        room = limit - costs
        points = _relaxation(table[site + 1 :], hulls[site + 1 :])
        hopeful = errors + np.interp(room, *points) <= incumbent
        order = np.flatnonzero(hopeful & (room >= rest_cost[site + 1] * (1 - RELATIVE_TOLERANCE)))
        order = order[np.lexsort((errors[order], costs[order]))]
        best = np.minimum.accumulate(errors[order])
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = errors[order][1:] < best[:-1]
        order = order[fresh]
        cost, error = costs[order], errors[order]
        history.append((order // len(row.cost), order % len(row.cost)))

    state = int(np.argmin(error))
    choices: list[int] = []
    for parent, option in reversed(history):
        choices.append(int(option[state]))
        state = int(parent[state])
    return tuple(reversed(choices))


def _hull(row: OptionCosts) -> list[int]:
    """Options on the lower convex hull of (cost, error), from the cheapest on."""
    order = np.lexsort((row.error, row.cost))
    hull: list[int] = []
    for option in order.tolist():
        if hull and row.error[option] >= row.error[hull[-1]]:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            rise = (row.error[b] - row.error[a]) * (row.cost[option] - row.cost[a])
            if rise < (row.error[option] - row.error[a]) * (row.cost[b] - row.cost[a]):
                break
            hull.pop()
        hull.append(option)
    return hull


def _hull_edges(table: Sequence[OptionCosts], hulls: Sequence[list[int]]) -> list[tuple[float, int, int]]:
    """Every hull edge as (error change per cost, site, position), steepest first."""
    edges: list[tuple[float, int, int]] = []
    for site, (row, hull) in enumerate(zip(table, hulls, strict=True)):
        for position in range(1, len(hull)):
            a, b = hull[position - 1], hull[position]
            slope = (row.error[b] - row.error[a]) / (row.cost[b] - row.cost[a])
            edges.append((float(slope), site, position))
    return sorted(edges)


def _greedy(table: Sequence[OptionCosts], hulls: Sequence[list[int]], limit: float) -> Choices:
    """A feasible choice: start at the cheapest options and take hull edges while they fit."""
    positions = [0] * len(table)
    spent = sum(float(row.cost[hull[0]]) for row, hull in zip(table, hulls, strict=True))
    blocked: set[int] = set()
    for _, site, position in _hull_edges(table, hulls):
        row, hull = table[site], hulls[site]
        extra = float(row.cost[hull[position]] - row.cost[hull[position - 1]])
        if site in blocked or spent + extra > limit:
            blocked.add(site)
            continue
        positions[site], spent = position, spent + extra
    return tuple(hull[position] for hull, position in zip(hulls, positions, strict=True))


def _relaxation(table: Sequence[OptionCosts], hulls: Sequence[list[int]]) -> tuple[Floats, Floats]:
    """Break points (cost, error) of the linear relaxation over all sites."""
    cost = [sum(float(row.cost[hull[0]]) for row, hull in zip(table, hulls, strict=True))]
    error = [sum(float(row.error[hull[0]]) for row, hull in zip(table, hulls, strict=True))]
    for _, site, position in _hull_edges(table, hulls):
        a, b = hulls[site][position - 1], hulls[site][position]
        cost.append(cost[-1] + float(table[site].cost[b] - table[site].cost[a]))
        error.append(error[-1] + float(table[site].error[b] - table[site].error[a]))
    return np.array(cost), np.array(error)


def pareto_front(table: Sequence[OptionCosts], budgets: Sequence[float]) -> list[Choices]:
    """The best choice within each budget that can be met, in the order of `budgets`."""
    least = sum(float(row.cost.min()) for row in table)
    return [solve(table, budget) for budget in budgets if budget * (1 + RELATIVE_TOLERANCE) >= least]


def solve_uniform(table: Sequence[OptionCosts], fractions: Sequence[Floats], budget: float) -> Choices:
    """The largest common fraction of units that meets `budget`, the baseline without a search.

    `fractions[i]` holds the share of units that each option of site i keeps. Every site takes its
    option nearest to the common fraction; the cheapest options are never mixed in.

    Raises:
        UnreachableError: even the smallest common fraction costs more than `budget`.
    """
    shares = np.unique(np.concatenate([np.asarray(share) for share in fractions]))
    for share in shares[::-1]:
        choices = tuple(int(np.argmin(np.abs(np.asarray(own) - share))) for own in fractions)
        if totals(table, choices)[0] <= budget * (1 + RELATIVE_TOLERANCE):
            return choices
    raise UnreachableError(budget, totals(table, choices)[0])


def probe_options(errors: Floats, count: int = 4) -> list[int]:
    """Options whose errors are spread evenly, in square root, between lossless and the worst.

    A site's loss is measured at these options only; `measure_sensitivities` interpolates between them.
    """
    wanted = (np.arange(1, count + 1) / count) ** 2 * float(errors.max())
    chosen = {int(np.argmin(np.abs(errors - goal))) for goal in wanted}
    return sorted(option for option in chosen if errors[option] > 0)


def measure_sensitivities(
    table: Sequence[OptionCosts],
    dense: Choices,
    fitness: Fitness,
    *,
    groups: Sequence[Sequence[str]] | None = None,
    count: int = 4,
    progress: Progress | None = None,
) -> list[OptionCosts]:
    """The table with errors replaced by the model's loss when that site alone is compressed.

    Finite differences at `count` options of each site (methods 8.2), interpolated over the layer
    error and made non-decreasing in it; an option without layer error keeps none. Where `groups` names
    one for every option, each group of a site has a curve of its own, since equal layer errors of
    different methods do not mean equal losses; groups without the dense option get half as many points.
    """
    base = fitness(dense)
    named = groups or [[""] * len(row.error) for row in table]
    curves = {
        (site, group): np.array([at for at, own in enumerate(row) if own == group])
        for site, row in enumerate(named)
        for group in dict.fromkeys(row)
    }
    asked: list[tuple[tuple[int, str], int]] = []
    for (site, group), own in curves.items():
        many = count if group == named[site][dense[site]] else max(1, count // 2)
        asked += [((site, group), int(own[at])) for at in probe_options(table[site].error[own], many)]
    losses: dict[tuple[int, str], dict[int, float]] = {key: {} for key in curves}
    for done, (key, option) in enumerate(asked, 1):
        trial = (*dense[: key[0]], option, *dense[key[0] + 1 :])
        losses[key][option] = max(fitness(trial) - base, 0.0)
        if progress is not None:
            progress(done, len(asked))
    errors = [row.error.copy() for row in table]
    for (site, group), own in curves.items():
        row = table[site]
        known = sorted((float(row.error[o]), loss) for o, loss in losses[site, group].items())
        if dense[site] in own:
            known = [(0.0, 0.0), *known]
        if not known:
            continue
        xs, ys = np.array([error for error, _ in known]), np.array([loss for _, loss in known])
        # A trace of the layer error breaks ties where the loss cannot tell two options apart.
        errors[site][own] = np.interp(row.error[own], xs, np.maximum.accumulate(ys)) + 1e-6 * row.error[own]
    return [OptionCosts(row.cost, own) for row, own in zip(table, errors, strict=True)]


def evolve(
    table: Sequence[OptionCosts],
    start: Choices,
    budget: float,
    fitness: Fitness,
    *,
    generations: int,
    offspring: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Choices, float]:
    """The best choice found by exchanging levels between sites within `budget`, and its loss.

    Each child of the best choice so far is compressed further at one or two random sites and
    relaxed at others until nothing more fits. Every choice is evaluated once; equal seeds give equal
    results. It ends early after `PATIENCE_GENERATIONS` without improvement.

    Raises:
        UnreachableError: `start` itself is over `budget`.
    """
    spent = totals(table, start)[0]
    if spent > budget * (1 + RELATIVE_TOLERANCE):
        raise UnreachableError(budget, spent)
    random = np.random.default_rng(seed)
    known = {start: fitness(start)}
    best, since = start, 0
    for generation in range(generations):
        if since == PATIENCE_GENERATIONS:
            break
        children = set()
        for _ in range(offspring * 8):
            child = _mutate(table, best, budget, random)
            if child not in known:
                children.add(child)
            if len(children) == offspring:
                break
        for child in sorted(children):
            known[child] = fitness(child)
        # Ties keep the older choice, so that an equal loss never makes the search wander.
        challenger = min(sorted(children), key=known.__getitem__, default=best)
        since += 1
        if known[challenger] < known[best]:
            best, since = challenger, 0
        if progress is not None:
            progress(generation + 1, generations)
    return best, known[best]


def _mutate(
    table: Sequence[OptionCosts], parent: Choices, budget: float, random: np.random.Generator
) -> Choices:
    """A neighbor of `parent` within `budget`: cheaper at one or two sites, more expensive at others."""
    ladders = [_pareto_options(row) for row in table]
    child = list(parent)
    squeezed = random.permutation(len(table))[: int(random.integers(1, 3))].tolist()
    for site in squeezed:
        lower = [o for o in ladders[site] if table[site].cost[o] < table[site].cost[child[site]]]
        if lower:
            reach = min(len(lower), 1 + int(random.geometric(0.5)))
            child[site] = lower[-int(random.integers(1, reach + 1))]
    spent = totals(table, tuple(child))[0]
    for site in random.permutation(len(table)).tolist():
        if site in squeezed:
            continue
        room = budget * (1 + RELATIVE_TOLERANCE) - spent + float(table[site].cost[child[site]])
        now = table[site].cost[child[site]]
        upper = [o for o in ladders[site] if now < table[site].cost[o] <= room]
        if upper:
            reach = min(len(upper), 1 + int(random.geometric(0.5)))
            option = upper[int(random.integers(0, reach))]
            spent += float(table[site].cost[option] - now)
            child[site] = option
    return tuple(child)


def _pareto_options(row: OptionCosts) -> list[int]:
    """The Pareto-optimal options by rising cost."""
    ladder: list[int] = []
    for option in np.lexsort((row.error, row.cost)).tolist():
        if not ladder or row.error[option] < row.error[ladder[-1]]:
            ladder.append(option)
    return ladder

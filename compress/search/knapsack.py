"""Candidates and a budget in, one option per site out: exact knapsack, then search on the real loss.

A *menu* lists what a site may become: a cost and an error for each of its options. `knapsack` is the
exact solution of the multiple-choice knapsack problem for additive errors. Errors of single sites are
only a prior for the loss of the whole model, so `sensitivities` re-weights them by finite differences
of the stitched model's loss, and `evolve` then swaps levels between sites while the budget holds,
judged by that loss itself (Kurtic et al., ZipLM, arXiv 2302.04089; Sieberling et al., EvoPress,
arXiv 2410.14649). No torch here: the stitched model is a function from choices to a number.
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

RELATIVE_TOLERANCE = 1e-9  # relative room for sums of floats; far below any timer's resolution
PATIENCE_GENERATIONS = 6  # generations without a better choice, after which the search ends


@dataclass(frozen=True)
class OptionCosts:
    """What one site may become: `cost[i]` and `error[i]` of its option i, both non-negative."""

    cost: Floats
    error: Floats

    def __post_init__(self) -> None:
        """Refuse menus that are empty, ragged or not finite."""
        if self.cost.shape != self.error.shape or self.cost.ndim != 1 or not len(self.cost):
            raise CompressError("a menu needs one cost and one error for each of its options")
        if not (np.isfinite(self.cost).all() and np.isfinite(self.error).all()):
            raise CompressError("a menu holds a cost or an error that is not finite")


class UnreachableError(CompressError):
    """No choice meets the budget; `least` is the smallest total cost there is."""

    def __init__(self, budget: float, least: float) -> None:
        """Say what was asked and what is there."""
        super().__init__(f"the budget is {budget:.6g}, the cheapest choice costs {least:.6g}")
        self.budget = budget
        self.least = least


def totals(menus: Sequence[OptionCosts], choices: Choices) -> tuple[float, float]:
    """Summed cost and summed error of one option per site."""
    pairs = list(zip(menus, choices, strict=True))
    cost = sum(float(menu.cost[option]) for menu, option in pairs)
    return cost, sum(float(menu.error[option]) for menu, option in pairs)


def solve(menus: Sequence[OptionCosts], budget: float) -> Choices:
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
    least = sum(float(menu.cost.min()) for menu in menus)
    if least > limit:
        raise UnreachableError(budget, least)
    hulls = [_hull(menu) for menu in menus]
    rest_cost = np.zeros(len(menus) + 1)
    for site in range(len(menus) - 1, -1, -1):
        rest_cost[site] = rest_cost[site + 1] + menus[site].cost.min()
    incumbent = totals(menus, _greedy(menus, hulls, limit))[1]
    incumbent += RELATIVE_TOLERANCE * max(1.0, abs(incumbent))

    cost, error = np.zeros(1), np.zeros(1)
    history: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
    for site, menu in enumerate(menus):
        costs = (cost[:, None] + menu.cost[None, :]).ravel()
        errors = (error[:, None] + menu.error[None, :]).ravel()
        room = limit - costs
        points = _relaxation(menus[site + 1 :], hulls[site + 1 :])
        hopeful = errors + np.interp(room, *points) <= incumbent
        order = np.flatnonzero(hopeful & (room >= rest_cost[site + 1] * (1 - RELATIVE_TOLERANCE)))
        order = order[np.lexsort((errors[order], costs[order]))]
        best = np.minimum.accumulate(errors[order])
        fresh = np.ones(len(order), dtype=bool)
        fresh[1:] = errors[order][1:] < best[:-1]
        order = order[fresh]
        cost, error = costs[order], errors[order]
        history.append((order // len(menu.cost), order % len(menu.cost)))

    state = int(np.argmin(error))
    choices: list[int] = []
    for parent, option in reversed(history):
        choices.append(int(option[state]))
        state = int(parent[state])
    return tuple(reversed(choices))


def _hull(menu: OptionCosts) -> list[int]:
    """Options on the lower convex hull of (cost, error), from the cheapest on."""
    order = np.lexsort((menu.error, menu.cost))
    hull: list[int] = []
    for option in order.tolist():
        if hull and menu.error[option] >= menu.error[hull[-1]]:
            continue
        while len(hull) >= 2:
            a, b = hull[-2], hull[-1]
            rise = (menu.error[b] - menu.error[a]) * (menu.cost[option] - menu.cost[a])
            if rise < (menu.error[option] - menu.error[a]) * (menu.cost[b] - menu.cost[a]):
                break
            hull.pop()
        hull.append(option)
    return hull


def _hull_edges(menus: Sequence[OptionCosts], hulls: Sequence[list[int]]) -> list[tuple[float, int, int]]:
    """Every hull edge as (error change per cost, site, position), the most useful first."""
    edges: list[tuple[float, int, int]] = []
    for site, (menu, hull) in enumerate(zip(menus, hulls, strict=True)):
        for position in range(1, len(hull)):
            a, b = hull[position - 1], hull[position]
            slope = (menu.error[b] - menu.error[a]) / (menu.cost[b] - menu.cost[a])
            edges.append((float(slope), site, position))
    return sorted(edges)


def _greedy(menus: Sequence[OptionCosts], hulls: Sequence[list[int]], limit: float) -> Choices:
    """A feasible choice: from the cheapest, take hull edges while there is room."""
    positions = [0] * len(menus)
    spent = sum(float(menu.cost[hull[0]]) for menu, hull in zip(menus, hulls, strict=True))
    blocked: set[int] = set()
    for _, site, position in _hull_edges(menus, hulls):
        menu, hull = menus[site], hulls[site]
        extra = float(menu.cost[hull[position]] - menu.cost[hull[position - 1]])
        if site in blocked or spent + extra > limit:
            blocked.add(site)
            continue
        positions[site], spent = position, spent + extra
    return tuple(hull[position] for hull, position in zip(hulls, positions, strict=True))


def _relaxation(menus: Sequence[OptionCosts], hulls: Sequence[list[int]]) -> tuple[Floats, Floats]:
    """Break points (cost, error) of the linear relaxation over all `menus`."""
    cost = [sum(float(menu.cost[hull[0]]) for menu, hull in zip(menus, hulls, strict=True))]
    error = [sum(float(menu.error[hull[0]]) for menu, hull in zip(menus, hulls, strict=True))]
    for _, site, position in _hull_edges(menus, hulls):
        a, b = hulls[site][position - 1], hulls[site][position]
        cost.append(cost[-1] + float(menus[site].cost[b] - menus[site].cost[a]))
        error.append(error[-1] + float(menus[site].error[b] - menus[site].error[a]))
    return np.array(cost), np.array(error)


def pareto_front(menus: Sequence[OptionCosts], budgets: Sequence[float]) -> list[Choices]:
    """The best choice within each budget that can be met, in the order of `budgets`."""
    least = sum(float(menu.cost.min()) for menu in menus)
    return [solve(menus, budget) for budget in budgets if budget * (1 + RELATIVE_TOLERANCE) >= least]


def solve_uniform(menus: Sequence[OptionCosts], fractions: Sequence[Floats], budget: float) -> Choices:
    """The largest common fraction of units that meets `budget`: the baseline without a search.

    `fractions[i]` holds the share of units that each option of site i keeps. Every site takes its
    option nearest to the common fraction; the cheapest options are never mixed in.

    Raises:
        UnreachableError: even the smallest common fraction costs more than `budget`.
    """
    shares = np.unique(np.concatenate([np.asarray(share) for share in fractions]))
    for share in shares[::-1]:
        choices = tuple(int(np.argmin(np.abs(np.asarray(own) - share))) for own in fractions)
        if totals(menus, choices)[0] <= budget * (1 + RELATIVE_TOLERANCE):
            return choices
    raise UnreachableError(budget, totals(menus, choices)[0])


def probe_options(errors: Floats, count: int = 4) -> list[int]:
    """Options whose errors are spread evenly, in square root, between lossless and the worst.

    A site's loss is measured at these few options only; `sensitivities` interpolates between them.
    """
    wanted = (np.arange(1, count + 1) / count) ** 2 * float(errors.max())
    chosen = {int(np.argmin(np.abs(errors - goal))) for goal in wanted}
    return sorted(option for option in chosen if errors[option] > 0)


def measure_sensitivities(
    menus: Sequence[OptionCosts],
    dense: Choices,
    fitness: Fitness,
    *,
    groups: Sequence[Sequence[str]] | None = None,
    count: int = 4,
    progress: Progress | None = None,
) -> list[OptionCosts]:
    """Menus whose errors are the stitched model's own loss when that site alone is changed.

    Finite differences at `count` options of each site (methods 8.2), interpolated over the layer
    error and made non-decreasing in it; an option without layer error keeps none. Where `groups` names
    one for every option, each group of a site has a curve of its own, since equal layer errors of
    different kinds are not equally bad; all but the dense option's group are asked at half as many.
    """
    base = fitness(dense)
    named = groups or [[""] * len(menu.error) for menu in menus]
    curves = {
        (site, group): np.array([at for at, own in enumerate(row) if own == group])
        for site, row in enumerate(named)
        for group in dict.fromkeys(row)
    }
    asked: list[tuple[tuple[int, str], int]] = []
    for (site, group), own in curves.items():
        many = count if group == named[site][dense[site]] else max(1, count // 2)
        asked += [((site, group), int(own[at])) for at in probe_options(menus[site].error[own], many)]
    losses: dict[tuple[int, str], dict[int, float]] = {key: {} for key in curves}
    for done, (key, option) in enumerate(asked, 1):
        trial = (*dense[: key[0]], option, *dense[key[0] + 1 :])
        losses[key][option] = max(fitness(trial) - base, 0.0)
        if progress is not None:
            progress(done, len(asked))
    errors = [menu.error.copy() for menu in menus]
    for (site, group), own in curves.items():
        menu = menus[site]
        known = sorted((float(menu.error[o]), loss) for o, loss in losses[site, group].items())
        if dense[site] in own:
            known = [(0.0, 0.0), *known]
        if not known:
            continue
        xs, ys = np.array([error for error, _ in known]), np.array([loss for _, loss in known])
        # A trace of the layer error breaks ties where the loss cannot tell two options apart.
        errors[site][own] = np.interp(menu.error[own], xs, np.maximum.accumulate(ys)) + 1e-6 * menu.error[own]
    return [OptionCosts(menu.cost, own) for menu, own in zip(menus, errors, strict=True)]


def evolve(
    menus: Sequence[OptionCosts],
    start: Choices,
    budget: float,
    fitness: Fitness,
    *,
    generations: int,
    offspring: int,
    seed: int,
    progress: Progress | None = None,
) -> tuple[Choices, float]:
    """The best choice found by swapping levels between sites, and its loss; never over `budget`.

    Each child of the best choice so far is compressed further at one or two random sites and
    relaxed at others until nothing more fits. Every choice is judged once; same seed, same result. It
    ends early when several generations in a row bring nothing better.

    Raises:
        UnreachableError: `start` itself is over `budget`.
    """
    spent = totals(menus, start)[0]
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
            child = _mutate(menus, best, budget, random)
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
    menus: Sequence[OptionCosts], parent: Choices, budget: float, random: np.random.Generator
) -> Choices:
    """A neighbour of `parent` within `budget`: cheaper at one or two sites, dearer at others."""
    ladders = [_pareto_options(menu) for menu in menus]
    child = list(parent)
    squeezed = random.permutation(len(menus))[: int(random.integers(1, 3))].tolist()
    for site in squeezed:
        lower = [o for o in ladders[site] if menus[site].cost[o] < menus[site].cost[child[site]]]
        if lower:
            reach = min(len(lower), 1 + int(random.geometric(0.5)))
            child[site] = lower[-int(random.integers(1, reach + 1))]
    spent = totals(menus, tuple(child))[0]
    for site in random.permutation(len(menus)).tolist():
        if site in squeezed:
            continue
        room = budget * (1 + RELATIVE_TOLERANCE) - spent + float(menus[site].cost[child[site]])
        now = menus[site].cost[child[site]]
        upper = [o for o in ladders[site] if now < menus[site].cost[o] <= room]
        if upper:
            reach = min(len(upper), 1 + int(random.geometric(0.5)))
            option = upper[int(random.integers(0, reach))]
            spent += float(menus[site].cost[option] - now)
            child[site] = option
    return tuple(child)


def _pareto_options(menu: OptionCosts) -> list[int]:
    """Options that no other beats in both cost and error, from the cheapest on."""
    ladder: list[int] = []
    for option in np.lexsort((menu.error, menu.cost)).tolist():
        if not ladder or menu.error[option] < menu.error[ladder[-1]]:
            ladder.append(option)
    return ladder

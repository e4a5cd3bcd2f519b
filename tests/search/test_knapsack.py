import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracles

from compress.errors import CompressError
from compress.search import knapsack as knapsack_module
from compress.search.knapsack import (
    PATIENCE_GENERATIONS,
    OptionCosts,
    UnreachableError,
    evolve,
    measure_sensitivities,
    pareto_front,
    solve,
    solve_uniform,
    totals,
)


def tables(seed: int, sites: int, options: int, integers: bool = False) -> list[OptionCosts]:
    random = np.random.default_rng(seed)
    menus = []
    for _ in range(sites):
        size = int(random.integers(1, options + 1))
        cost = random.integers(0, 20, size) if integers else random.random(size) * 3
        menus.append(OptionCosts(cost.astype(float), random.random(size)))
    return menus


@pytest.mark.parametrize("seed", range(150))
def test_knapsack_equals_brute_force_over_all_assignments(seed):
    menus = tables(seed, 1 + seed % 5, 4, integers=seed % 2 == 0)
    costs = [menu.cost.tolist() for menu in menus]
    errors = [menu.error.tolist() for menu in menus]
    budget = float(np.random.default_rng(1000 + seed).random()) * sum(map(max, costs))
    best = oracles.best_choice(costs, errors, budget)
    if best is None:
        with pytest.raises(UnreachableError) as refused:
            solve(menus, budget)
        assert refused.value.least == pytest.approx(sum(map(min, costs)))
    else:
        assert totals(menus, solve(menus, budget))[1] == pytest.approx(best, abs=1e-12)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_knapsack_never_exceeds_the_budget(seed, share):
    menus = tables(seed, 8, 6)
    budget = share * sum(float(menu.cost.max()) for menu in menus)
    if sum(float(menu.cost.min()) for menu in menus) > budget:
        with pytest.raises(UnreachableError):
            solve(menus, budget)
    else:
        assert totals(menus, solve(menus, budget))[0] <= budget * (1 + 1e-8)


def test_a_looser_budget_never_gives_a_larger_error_and_order_of_sites_changes_nothing():
    menus = tables(3, 12, 20)
    top = sum(float(menu.cost.max()) for menu in menus)
    errors = [totals(menus, choices)[1] for choices in pareto_front(menus, np.linspace(0, top, 25).tolist())]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) < 25
    assert errors[0] > errors[-1]
    turned = solve(menus[::-1], top / 2)
    assert totals(menus[::-1], turned)[1] == pytest.approx(totals(menus, solve(menus, top / 2))[1])


def test_knapsack_beats_slope_matching_on_a_staircase():
    # The hull of the first menu skips its middle option, which is the only one that fits.
    menus = [
        OptionCosts(np.array([0.0, 5.0, 10.0]), np.array([1.0, 0.9, 0.0])),
        OptionCosts(np.array([1.0]), np.array([0.0])),
    ]
    assert solve(menus, 7.0) == (1, 0)


def slopes_matched(menus, budget):
    """LPViT's allocation: one slope for all sites, each takes its option of least `error + slope * cost`.

    The slope is bisected on its logarithm until the budget is kept; ties go to the cheaper option.
    """

    def at(slope):
        return tuple(
            min(range(len(m.cost)), key=lambda i, m=m: (m.error[i] + slope * m.cost[i], m.cost[i]))
            for m in menus
        )

    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if totals(menus, at(2.0**middle))[0] <= budget else (middle, high)
    return at(2.0**high)


def test_on_convex_curves_one_slope_for_all_is_the_best_there_is():
    random = np.random.default_rng(2)
    for _ in range(10):
        menus = []
        for _ in range(4):
            steps = np.sort(random.random(5) + 0.1)  # each equal step of cost loses more than the one before
            menus.append(OptionCosts(np.arange(5, -1, -1.0), np.append(0.0, np.cumsum(steps))))
        for budget in (3.0, 8.0, 13.0, 19.0):  # slopes differ, so every whole budget is a matched one
            matched = slopes_matched(menus, budget)
            best = oracles.best_choice(
                [m.cost.tolist() for m in menus], [m.error.tolist() for m in menus], budget
            )
            assert totals(menus, matched) == pytest.approx((budget, best))
            assert totals(menus, solve(menus, budget))[1] == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_on_staircases_the_knapsack_never_loses_to_slope_matching_and_wins_somewhere(seed):
    menus = staircases(seed, 6, 8)
    wins = 0
    for share in (0.2, 0.4, 0.6, 0.8):
        budget = share * sum(float(menu.cost.max()) for menu in menus)
        matched, own = slopes_matched(menus, budget), solve(menus, budget)
        assert totals(menus, matched)[0] <= budget
        assert totals(menus, own)[1] <= totals(menus, matched)[1] + 1e-9
        wins += totals(menus, own)[1] < totals(menus, matched)[1] - 1e-9
    assert wins


def test_knapsack_is_quick_on_the_size_of_a_large_model():
    random = np.random.default_rng(0)
    menus = []
    for _ in range(64):
        kept = np.linspace(1, 0, 40)
        menus.append(OptionCosts(kept + 0.02 * random.random(40), (1 - kept) ** 2 * random.random()))
    choices = solve(menus, 20.0)
    assert totals(menus, choices)[0] <= 20.0
    assert totals(menus, choices)[0] > 19.9


def staircases(seed: int, sites: int, options: int) -> list[OptionCosts]:
    """Sites whose every step down costs less and loses more, down to nothing."""
    random = np.random.default_rng(seed)
    menus = []
    for _ in range(sites):
        cost = np.sort(random.random(options))[::-1] * 3
        menus.append(OptionCosts(np.append(cost, 0.0), np.append(np.sort(random.random(options)), 1.0)))
    return menus


def test_menus_that_are_not_numbers_are_refused():
    with pytest.raises(CompressError, match="not finite"):
        OptionCosts(np.array([1.0]), np.array([np.nan]))
    with pytest.raises(CompressError, match="need equal lengths"):
        OptionCosts(np.array([1.0, 2.0]), np.array([0.0]))


def test_uniform_takes_the_largest_common_share_that_fits():
    share = np.array([1.0, 0.5, 0.25])
    menus = [OptionCosts(np.array([4.0, 2.0, 1.0]), 1 - share)] * 3
    assert solve_uniform(menus, [share] * 3, 6.5) == (1, 1, 1)
    assert solve_uniform(menus, [share] * 3, 12.0) == (0, 0, 0)
    with pytest.raises(UnreachableError):
        solve_uniform(menus, [share] * 3, 2.9)


def coupled(menus, weights):
    """A loss that is not additive: what two neighbours lose together counts double."""

    def fitness(choices):
        lost = [w * m.error[c] for w, m, c in zip(weights, menus, choices, strict=True)]
        return float(sum(lost) + 2 * sum(a * b for a, b in itertools.pairwise(lost)))

    return fitness


def test_sensitivities_find_the_sites_that_matter():
    kept = np.linspace(1, 0, 9)
    menus = [OptionCosts(kept.copy(), (1 - kept) ** 2) for _ in range(6)]
    weights = [8.0, 1.0, 1.0, 1.0, 1.0, 0.1]
    scaled = measure_sensitivities(menus, (0,) * 6, coupled(menus, weights))
    assert [float(menu.error[-1]) for menu in scaled] == pytest.approx(weights, rel=1e-3)
    assert all(menu.error[0] == 0 for menu in scaled)
    choices = solve(scaled, 3.0)
    assert choices[0] < min(choices[1:5]) <= max(choices[1:5]) < choices[5]


def test_a_group_has_a_curve_of_its_own():
    """Two forms of one layer error, one of them harmless: only a curve a group can tell."""
    error = np.array([0.0, 0.25, 1.0, 0.25, 1.0])
    menu = OptionCosts(np.array([5.0, 3.0, 1.0, 2.5, 0.5]), error)
    harm = np.array([0.0, 0.5, 2.0, 0.01, 0.04])
    groups = [["units", "units", "units", "codes", "codes"]]
    (scaled,) = measure_sensitivities([menu], (0,), lambda choices: float(harm[choices[0]]), groups=groups)
    assert np.allclose(scaled.error, harm, atol=1e-5)
    (mixed,) = measure_sensitivities([menu], (0,), lambda choices: float(harm[choices[0]]))
    assert not np.allclose(mixed.error, harm, atol=1e-2)


def test_a_group_without_a_lossless_option_promises_none():
    menu = OptionCosts(np.array([5.0, 3.0, 2.0]), np.array([0.0, 0.5, 0.1]))
    losses = [0.0, 1.0, 0.8]
    groups = [["units", "units", "codes"]]
    (scaled,) = measure_sensitivities([menu], (0,), lambda choices: losses[choices[0]], groups=groups)
    assert scaled.error[2] == pytest.approx(0.8, abs=1e-5)


def test_sensitivities_never_fall_when_the_layer_error_rises():
    menus = [OptionCosts(np.linspace(1, 0, 9), np.linspace(0, 1, 9))]
    scaled = measure_sensitivities(menus, (0,), lambda choices: float(np.sin(choices[0])))
    assert (np.diff(scaled[0].error) > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_evolution_improves_on_its_start_within_the_budget_and_repeats_itself(seed):
    menus = staircases(seed, 10, 12)
    budget = 0.5 * sum(float(menu.cost.max()) for menu in menus)
    fitness = coupled(menus, np.random.default_rng(seed).random(10) * 3)
    start = solve(menus, budget)
    runs = [evolve(menus, start, budget, fitness, generations=30, offspring=6, seed=7) for _ in range(2)]
    best, loss = runs[0]
    assert runs[0] == runs[1]
    assert totals(menus, best)[0] <= budget * (1 + 1e-8)
    assert loss == fitness(best)
    assert loss < fitness(start)


def test_evolution_judges_no_choice_twice_and_refuses_a_start_over_budget():
    menus = staircases(1, 6, 5)
    budget = 0.6 * sum(float(menu.cost.max()) for menu in menus)
    seen = []

    def fitness(choices):
        seen.append(choices)
        return totals(menus, choices)[1]

    evolve(menus, solve(menus, budget), budget, fitness, generations=20, offspring=4, seed=0)
    assert len(seen) == len(set(seen)) > 20
    dear = tuple(int(np.argmax(menu.cost)) for menu in menus)
    with pytest.raises(UnreachableError):
        evolve(menus, dear, budget, fitness, generations=1, offspring=1, seed=0)


def test_every_mutation_stays_within_the_budget_and_changes_something():
    menus = staircases(5, 8, 6)
    budget = 0.5 * sum(float(menu.cost.max()) for menu in menus)
    parent = solve(menus, budget)
    random = np.random.default_rng(0)
    children = [knapsack_module._mutate(menus, parent, budget, random) for _ in range(200)]
    assert all(totals(menus, child)[0] <= budget * (1 + 1e-8) for child in children)
    assert len(set(children) - {parent}) > 20


def test_a_search_that_finds_nothing_better_ends_early():
    """At the optimum of the very loss that judges, no generation can improve."""
    menus = [OptionCosts(np.array([4.0, 3.0, 2.0, 1.0, 0.5]), np.array([0.0, 1.0, 3.0, 7.0, 9.0]))] * 6
    judged = []

    def fitness(choices):
        judged.append(choices)
        return totals(menus, choices)[1]

    evolve(menus, solve(menus, 12.0), 12.0, fitness, generations=500, offspring=4, seed=0)
    assert len(judged) <= 1 + 4 * PATIENCE_GENERATIONS


def test_evolution_keeps_its_start_where_no_other_choice_is_better():
    menus = staircases(2, 6, 5)
    budget = 0.6 * sum(float(menu.cost.max()) for menu in menus)
    start = solve(menus, budget)
    found = evolve(menus, start, budget, lambda choices: 1.0, generations=10, offspring=4, seed=0)
    assert found == (start, 1.0)


def test_a_mutation_squeezes_one_or_two_sites_and_never_relaxes_these():
    menus = staircases(3, 8, 6)
    parent = (3,) * 8
    budget = 2 * totals(menus, parent)[0]
    random = np.random.default_rng(0)
    for _ in range(100):
        child = knapsack_module._mutate(menus, parent, budget, random)
        cheaper = sum(m.cost[new] < m.cost[old] for m, new, old in zip(menus, child, parent, strict=True))
        assert 1 <= cheaper <= 2

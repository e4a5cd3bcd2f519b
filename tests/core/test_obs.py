import itertools
import math

import numpy as np
import pytest
import torch
from support import oracles
from support.linear_data import EXACT, data, moments, near, sound

from compress.core import factorization, obs, scores
from compress.errors import CompressError


def solve(x, weight, levels, **keywords):
    """The levels, by units kept."""
    found = obs.solve(torch.from_numpy(weight), *moments(x), levels, **{"group": 0.0, **keywords})
    return {len(level.kept): level for level in found}


def variance(x, weight):
    return float((((x - x.mean(0)) @ weight.T) ** 2).sum(1).mean())


# One removal


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_score_is_what_least_squares_loses_without_the_unit(width, damping):
    x, weight = data()
    damped = sound(x, damping)
    found = obs.unit_scores(torch.from_numpy(weight), factorization.invert(damped), width)
    units = range(8 // width)
    expected = [
        oracles.objective(
            x, weight, oracles.owned([u for u in units if u != out], width), damped.added.numpy()
        )
        for out in units
    ]
    assert near(found, expected)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_removal_is_the_least_squares_refit_and_leaves_the_inverse_of_what_stays(width):
    x, weight = data(1)
    damped = sound(x)
    sweep = obs._Sweep(torch.from_numpy(weight), factorization.invert(damped), width)
    (gone,) = sweep.step(1).tolist()
    stay = oracles.owned([u for u in range(8 // width) if u != gone], width)
    cut = oracles.owned([gone], width)
    if not bool(sweep.gone.any()):  # compacted away
        assert sweep.weight.shape == (5, len(stay))
        kept_weight, kept_inverse = sweep.weight, sweep.inverse
    else:
        assert (sweep.weight[:, cut] == 0).all()
        assert (sweep.inverse[cut][:, stay] == 0).all()
        kept_weight, kept_inverse = sweep.weight[:, stay], sweep.inverse[stay][:, stay]
    assert near(kept_weight, oracles.refitted(x, weight, stay)[0])
    assert near(kept_inverse, torch.linalg.inv(damped.matrix[stay][:, stay]))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("width", [1, 2])
def test_the_first_removal_is_the_best_there_is(seed, width):
    x, weight = data(seed)
    damped = sound(x, 1e-2)
    units = 8 // width
    (level,) = solve(x, weight, [units - 1], width=width).values()
    assert (
        tuple(level.kept.tolist())
        == oracles.best_subset(x, weight, units - 1, width, damped.added.numpy())[1]
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_order_is_that_of_a_greedy_that_solves_every_subset_anew(seed, width):
    x, weight = data(seed, inputs=12)
    damped = sound(x, 1e-2)
    units = 12 // width
    order = obs.removal_order(
        torch.from_numpy(weight), factorization.invert(damped), range(units), width=width, group=0.0
    )
    greedy = oracles.greedy_removals(x, weight, width, damped.added.numpy())
    assert order.flip(0).tolist() == greedy


def test_greedy_loses_little_against_every_subset_and_never_wins():
    gaps = []
    for seed in range(6):
        x, weight = data(seed, inputs=9)
        pull = sound(x, 1e-2).added.numpy()
        for units in (6, 3):
            kept = solve(x, weight, [units])[units].kept.tolist()
            best = oracles.best_subset(x, weight, units, 1, pull)[0]
            gaps.append(oracles.objective(x, weight, kept, pull) / best - 1)
    assert min(gaps) >= -EXACT
    assert sum(gaps) / len(gaps) < 0.05


def test_greedy_is_exhaustive_where_inputs_do_not_interact():
    weight = np.random.default_rng(0).standard_normal((3, 7))
    second = torch.linspace(0.5, 2.0, 7, dtype=torch.float64)
    score = scores.wanda(torch.from_numpy(weight), second, 1)
    for level in obs.solve(torch.from_numpy(weight), torch.diag(second), torch.zeros(7), range(8)):
        assert level.kept.tolist() == scores.best(score, len(level.kept)).tolist()
        assert near(level.weight, weight[:, level.kept.tolist()])
        gone = score.sum() - score[level.kept].sum()
        assert level.error == pytest.approx(float(gone / score.sum()), rel=1e-9, abs=1e-12)


# Whole levels


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("damping", [0.0, 1e-2, 0.5])
def test_every_level_is_least_squares_with_a_constant_on_what_it_keeps(width, damping):
    x, weight = data(2)
    pull = sound(x, damping).added.numpy()
    levels = solve(x, weight, range(8 // width + 1), width=width, damping=damping)
    assert list(levels) == list(range(8 // width + 1))
    for level in levels.values():
        kept = oracles.owned(level.kept.tolist(), width)
        expected, shift, error = oracles.refitted(x, weight, kept, pull)
        assert level.weight.dtype == level.shift.dtype == torch.float64
        assert near(level.weight, expected)
        assert near(level.shift, shift)
        assert level.error == pytest.approx(error / variance(x, weight), rel=1e-8, abs=1e-12)
        # What the model will compute is centered where the dense one is.
        gap = x @ weight.T - (x[:, kept] @ level.weight.numpy().T + level.shift.numpy())
        assert np.abs(gap.mean(0)).max() < 1e-10


def test_centering_is_a_constant_input():
    x, weight = data(3, mean=4.0)
    level = solve(x, weight, [5], damping=0.0)[5]
    kept = level.kept.tolist()
    design = np.concatenate([x[:, kept], np.ones((len(x), 1))], 1)
    found = np.linalg.lstsq(design, x @ weight.T, rcond=None)[0].T
    assert near(level.weight, found[:, :-1])
    assert near(level.shift, found[:, -1])


def test_levels_are_nested_and_their_errors_fall_from_one_to_zero():
    x, weight = data(4, inputs=24, samples=200)
    levels = solve(x, weight, range(25), damping=0.0)
    for fewer, more in itertools.pairwise(range(25)):
        assert set(levels[fewer].kept.tolist()) < set(levels[more].kept.tolist())
        assert levels[more].error <= levels[fewer].error
    assert levels[0].error == 1.0
    assert levels[24].error == 0.0


def test_dropping_everything_leaves_the_mean():
    x, weight = data(5)
    level = solve(x, weight, [0], width=2)[0]
    assert level.weight.shape == (5, 0)
    assert level.kept.tolist() == []
    assert near(level.shift, (x @ weight.T).mean(0))
    assert level.error == 1.0


def test_keeping_everything_changes_nothing_whatever_the_damping():
    x, weight = data(6)
    level = solve(x, weight, [8], damping=10.0)[8]
    assert level.kept.tolist() == list(range(8))
    assert near(level.weight, weight)
    assert near(level.shift, np.zeros(5))
    assert level.error == 0.0


def test_levels_do_not_depend_on_what_else_is_asked_for():
    x, weight = data(7, inputs=24, samples=200)
    alone = solve(x, weight, [10])[10]
    among = solve(x, weight, [24, 3, 10, 10, 17])
    assert sorted(among) == [3, 10, 17, 24]
    assert alone.kept.tolist() == among[10].kept.tolist()
    assert near(alone.weight, among[10].weight)
    assert alone.error == pytest.approx(among[10].error, rel=1e-9)


def test_a_rescaled_input_changes_only_its_own_column():
    x, weight = data(8)
    factor = np.array([1, 1e3, 1, 1e-3, 1, 1, 50, 1])
    plain = solve(x, weight, [5])[5]
    scaled = solve(x * factor, weight / factor, [5])[5]
    assert plain.kept.tolist() == scaled.kept.tolist()
    assert near(scaled.weight * torch.from_numpy(factor[plain.kept]), plain.weight, 1e-7)
    assert near(scaled.shift, plain.shift, 1e-7)


def test_float32_is_taken_and_solved_in_float64():
    x, weight = data(9)
    second, mean = moments(x)
    levels = obs.solve(torch.from_numpy(weight).float(), second.float(), mean.float(), [4])
    assert near(next(levels).weight, solve(x, weight, [4])[4].weight, 1e-4)


def test_a_weight_of_zeros_has_no_error():
    x, _ = data()
    assert [level.error for level in solve(x, np.zeros((2, 8)), [0, 4]).values()] == [0.0, 0.0]


def test_wrong_widths_and_levels_are_refused():
    x, weight = data()
    with pytest.raises(CompressError, match="8 inputs and second moments of 8 do not divide into units of 3"):
        solve(x, weight, [1], width=3)
    with pytest.raises(CompressError, match="7 inputs and second moments of 8"):
        solve(x, weight[:, :7], [1])
    for wrong in (-1, 5):
        with pytest.raises(CompressError, match="between 0 and 4 units"):
            solve(x, weight, [wrong], width=2)


# Groups and compaction


@pytest.mark.parametrize("seed", range(3))
def test_groups_lose_next_to_nothing_against_one_at_a_time(seed):
    x, weight = data(seed, inputs=192, out=48, samples=800, factors=40, outliers=4)
    levels = [96, 24]
    one = solve(x, weight, levels)
    for group, most in ((obs.GROUP, 1.002), (0.1, 1.03)):
        many = solve(x, weight, levels, group=group)
        for level in levels:
            assert many[level].error <= most * one[level].error
    # The control: all at once, by the scores of the dense model.
    damped = sound(x, 1e-2)
    score = obs.unit_scores(torch.from_numpy(weight), factorization.invert(damped), 1)
    for level, least in ((96, 1.03), (24, 1.2)):
        kept = scores.best(score, level).tolist()
        assert oracles.refitted(x, weight, kept)[2] / variance(x, weight) > least * one[level].error


def test_a_group_never_crosses_a_level_and_takes_more_than_one():
    x, weight = data(0, inputs=64, samples=300, factors=20)
    inverse = factorization.invert(sound(x, 1e-2))
    taken = []
    step = obs._Sweep.step

    def watch(self, most):
        names = step(self, most)
        taken.append((most, len(names)))
        return names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obs._Sweep, "step", watch)
        order = obs.removal_order(torch.from_numpy(weight), inverse, [40, 17], group=0.2)
    assert sorted(order.tolist()) == list(range(64))
    removed = list(itertools.accumulate(count for _, count in taken))
    assert {64 - 40, 64 - 17} <= set(removed)
    assert removed[-1] == 64 - 17
    assert all(1 <= count <= most for most, count in taken)
    assert max(count for _, count in taken) > 3
    assert order[:17].tolist() == sorted(order[:17].tolist())


@pytest.mark.parametrize("bound", [math.inf, 0.6, 0.0])
def test_the_choice_inside_a_group_is_exact_and_ends_at_the_bound(bound):
    x, weight = data(3)
    damped = sound(x)
    inverse = factorization.invert(damped)
    pull = np.zeros(8)
    expected = oracles.greedy_removals(x, weight, 1, pull)[:5]
    lost = [
        0.0,
        *(oracles.objective(x, weight, sorted({*range(8)} - {*expected[:k]}), pull) for k in range(1, 6)),
    ]
    steps = np.diff(lost)
    limit = float(np.quantile(steps, bound)) * (1 + EXACT) if bound <= 1 else bound
    until = next((k for k in range(1, 5) if steps[k] > limit), 5)
    signal = torch.from_numpy(weight)
    gram = signal.T @ signal
    assert obs._choose(gram, inverse, 5, limit) == expected[:until]
    stay = sorted({*range(8)} - {*expected[:until]})
    left = torch.from_numpy(oracles.refitted(x, weight, stay)[0])
    assert near(gram[stay][:, stay], left.T @ left)
    assert near(inverse[stay][:, stay], torch.linalg.inv(damped.matrix[stay][:, stay]))


@pytest.mark.parametrize("width", [1, 3])
def test_compaction_changes_nothing(width, monkeypatch):
    x, weight = data(1, inputs=48, samples=300, factors=12)
    inverse = factorization.invert(sound(x, 1e-2))
    orders, sizes = [], []
    compact = obs._Sweep._compact

    def watch(self):
        compact(self)
        sizes.append(len(self.inverse))
        assert not bool(self.gone.any())

    monkeypatch.setattr(obs._Sweep, "_compact", watch)
    for share in (2.0, obs.COMPACT, 0.0):
        monkeypatch.setattr(obs, "COMPACT", share)
        sizes.clear()
        order = obs.removal_order(torch.from_numpy(weight), inverse, [1], width=width, group=0.0)
        orders.append(order.tolist())
        assert bool(sizes) is (share < 1)
        assert sizes == sorted(sizes, reverse=True)
    assert orders[0] == orders[1] == orders[2]


def test_equal_units_leave_from_the_lowest_on_with_and_without_groups():
    weight = torch.ones(1, 40, dtype=torch.float64)
    for group in (0.0, 0.2):
        order = obs.removal_order(weight, torch.eye(40, dtype=torch.float64), [30, 1], group=group)
        assert order.flip(0).tolist() == list(range(40))


def test_columns_follow_the_order_of_the_units():
    assert obs.columns(torch.tensor([3, 1]), 2).tolist() == [6, 7, 2, 3]
    assert obs.columns(torch.tensor([], dtype=torch.int64), 4).tolist() == []


# Moments that are nearly or quite singular


@pytest.mark.parametrize("damping", [0.0, 1e-2])
@pytest.mark.parametrize("case", ["duplicated", "fewer samples than inputs"])
def test_singular_moments_give_ridge_regression_with_what_was_added(damping, case):
    x, weight = data(2, samples=6 if case.startswith("fewer") else 64)
    if case == "duplicated":
        x[:, 5] = x[:, 2]
    damped = sound(x, damping)
    assert float(damped.added.min()) > 0
    for level in solve(x, weight, range(9), damping=damping).values():
        expected, shift, error = oracles.refitted(x, weight, level.kept.tolist(), damped.added.numpy())
        assert near(level.weight, expected, 1e-6)
        assert near(level.shift, shift, 1e-6)
        assert level.error == pytest.approx(error / variance(x, weight), rel=1e-5, abs=1e-9)


def test_of_two_equal_inputs_one_goes_first_and_the_other_takes_over():
    x, weight = data(3, mean=0.5)
    x[:, 6] = x[:, 1]
    level = solve(x, weight, [7])[7]
    assert len({1, 6} - set(level.kept.tolist())) == 1
    assert level.error < 1e-4
    left = level.kept.tolist().index(*({1, 6} & set(level.kept.tolist())))
    assert near(level.weight[:, left], weight[:, 1] + weight[:, 6], 0.05)


def test_an_input_that_never_varies_goes_first_and_lives_on_in_the_bias():
    x, weight = data(4)
    x[:, 2] = 3.0
    x[:, 5] = 0.0
    damped = sound(x, 1e-2)
    assert damped.live.tolist() == [column not in (2, 5) for column in range(8)]
    assert damped.matrix[2].tolist() == damped.matrix[:, 2].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]
    levels = solve(x, weight, [6, 8])
    assert levels[6].kept.tolist() == [0, 1, 3, 4, 6, 7]
    assert levels[6].error == 0.0
    assert near(levels[6].weight, weight[:, [0, 1, 3, 4, 6, 7]])
    assert near(levels[6].shift, 3.0 * weight[:, 2])
    assert near(levels[8].weight[:, [2, 5]], np.zeros((5, 2)))
    assert near(levels[8].shift, 3.0 * weight[:, 2])


# Controls: what the method must beat


@pytest.mark.parametrize("seed", range(3))
def test_without_refit_centering_or_cross_terms_more_is_lost(seed):
    x, weight = data(seed, inputs=48, out=24, samples=400, factors=10, mean=1.0)
    whole = variance(x, weight)
    level = solve(x, weight, [24])[24]
    kept = level.kept.tolist()
    signal = torch.from_numpy(weight)

    def error(columns, refit=True):
        if refit:
            return oracles.refitted(x, weight, columns)[2] / whole
        lost = np.delete(x - x.mean(0), columns, 1) @ np.delete(weight, columns, 1).T
        return float((lost**2).sum(1).mean()) / whole

    assert error(kept, refit=False) > 4 * level.error
    by_size = scores.best(scores.magnitude(signal, 1), 24).tolist()
    assert error(by_size) > 1.1 * level.error
    without_cross_terms = scores.best(scores.wanda(signal, torch.from_numpy(x.var(0)), 1), 24).tolist()
    assert error(without_cross_terms) > 1.1 * level.error
    uncentered = np.linalg.lstsq(x[:, kept], x @ weight.T, rcond=None)[0].T
    plain = float(((x @ weight.T - x[:, kept] @ uncentered.T) ** 2).sum(1).mean()) / whole
    assert plain > error(kept)


# Refit to inputs that have changed


def changed(seed=0, samples=64):
    """Inputs, wanted outputs that depend on more, and a prior."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((samples, 6)) @ random.standard_normal((6, 6)) + 2.0
    y = x @ random.standard_normal((6, 4)) + random.standard_normal((samples, 4)) + 1.0
    return x, y, random.standard_normal((4, 6))


def refit(x, y, prior, damping):
    second, mean = moments(x)
    cross = torch.from_numpy(y.T @ x / len(x))
    return obs.refit(
        second, cross, mean, torch.from_numpy(y.mean(0)), torch.from_numpy(prior), damping=damping
    )


@pytest.mark.parametrize("damping", [0.0, 1e-2, 3.0])
def test_a_refit_is_ridge_regression_towards_the_prior(damping):
    x, y, prior = changed()
    weight, bias = refit(x, y, prior, damping)
    root = np.sqrt(damping * x.var(0))
    middle = (x - x.mean(0)) / math.sqrt(len(x))
    rows = np.concatenate([middle, np.diag(root)])
    goal = np.concatenate([(y - y.mean(0)) / math.sqrt(len(x)), root[:, None] * prior.T])
    expected = np.linalg.lstsq(rows, goal, rcond=None)[0].T
    assert near(weight, expected)
    assert near(x.mean(0) @ weight.numpy().T + bias.numpy(), y.mean(0))


def test_a_refit_with_a_strong_pull_keeps_the_prior_and_the_mean():
    x, y, prior = changed(1)
    weight, bias = refit(x, y, prior, 1e9)
    assert near(weight, prior, 1e-6)
    assert near(bias, y.mean(0) - x.mean(0) @ prior.T, 1e-6)


def test_a_refit_leaves_the_columns_of_constant_inputs_alone():
    x, y, prior = changed(2)
    x[:, 3] = 5.0
    weight, bias = refit(x, y, prior, 1e-2)
    assert near(weight[:, 3], prior[:, 3])
    assert near((x @ weight.numpy().T + bias.numpy()).mean(0), y.mean(0))
    without = [column for column in range(6) if column != 3]
    alone, _ = refit(x[:, without], y, prior[:, without], 1e-2)
    assert near(weight[:, without], alone)


def test_a_refit_of_singular_inputs_stays_finite_and_near_the_best():
    x, y, prior = changed(3)
    x[:, 5] = x[:, 0] - x[:, 1]
    weight, bias = refit(x, y, prior, 0.0)
    left = float(((x @ weight.numpy().T + bias.numpy() - y) ** 2).sum(1).mean())
    design = np.concatenate([x, np.ones((len(x), 1))], 1)
    least = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert left <= 1.01 * float((least**2).sum(1).mean())
    assert float(weight.abs().max()) < 100

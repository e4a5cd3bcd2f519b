import itertools

import numpy as np
import pytest
import torch
from support import oracles
from support.samples import layer, moments, near, variance

from compress.core import support
from compress.errors import CompressError


def prepared(x, weight, damping=1e-2):
    return support.prepare(torch.from_numpy(weight), *moments(x), damping)


# Errors and shifts


def test_the_error_is_the_lost_variance_of_the_output_and_the_shift_keeps_its_mean():
    x, weight = layer(0)
    values = weight + 0.1 * np.random.default_rng(9).standard_normal(weight.shape)
    made = prepared(x, weight)
    lost = variance(x, weight - values) / variance(x, weight)
    assert made.error(torch.from_numpy(values)) == pytest.approx(lost, rel=1e-9)
    shift = made.shift(torch.from_numpy(values)).numpy()
    assert np.abs((x @ values.T + shift - x @ weight.T).mean(0)).max() < 1e-12


def test_nothing_changed_is_lossless_and_all_gone_is_one():
    x, weight = layer(1)
    made = prepared(x, weight)
    assert made.error(torch.from_numpy(weight)) == 0.0
    assert made.error(torch.zeros(8, 16, dtype=torch.float64)) == pytest.approx(1.0, abs=1e-12)
    assert support.prepare(torch.zeros(2, 16), *moments(x)).error(torch.zeros(2, 16)) == 0.0


def test_an_input_that_never_varies_is_no_signal_and_lives_on_in_the_shift():
    x, weight = layer(2)
    x[:, 3] = 5.0
    made = prepared(x, weight)
    assert near(made.signal[:, 3], np.zeros(8))
    assert near(made.shift(made.signal), 5.0 * weight[:, 3])


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(CompressError, match=r"weight \[2, 3\], second moments \[4, 4\]"):
        support.prepare(torch.zeros(2, 3), torch.eye(4), torch.zeros(4))
    with pytest.raises(CompressError, match=r"a mean \[2\]"):
        support.prepare(torch.zeros(2, 3), torch.eye(3), torch.zeros(2))


# Patterns


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (4, 8), (4, 4)])
def test_nm_keeps_the_best_of_all_choices_in_every_group(n, m):
    score = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    mask = support.NM(n, m).mask(score)
    for row in range(3):
        for start in range(0, 16, m):
            part = score[row, start : start + m].tolist()
            most = max(sum(part[i] for i in some) for some in itertools.combinations(range(m), n))
            inside = mask[row, start : start + m]
            assert int(inside.sum()) == n
            assert float(score[row, start : start + m][inside].sum()) == pytest.approx(most)


def test_ties_in_nm_keep_exactly_n_from_the_left():
    assert support.NM().mask(torch.zeros(2, 8)).tolist() == [[True, True, False, False] * 2] * 2


def test_what_is_no_pattern_or_does_not_fit_is_refused():
    with pytest.raises(CompressError, match=r"groups of 4, but this weight is \[2, 6\]"):
        support.NM().mask(torch.zeros(2, 6))
    with pytest.raises(CompressError, match="5:4 is no pattern"):
        support.NM(5, 4).mask(torch.zeros(2, 8))
    with pytest.raises(CompressError, match=r"\[7, 12\]: it leaves 3 rows and 2 columns"):
        support.grid((7, 12), (4, 5))
    for density in (0.01, 1.2, 0.0, -1.0):
        with pytest.raises(CompressError, match="keeps"):
            support.quota(10, density)


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75, 1.0])
def test_blocks_are_balanced_and_the_best_of_their_group(density):
    score = torch.rand(6, 16, generator=torch.Generator().manual_seed(1))
    mask = support.Block(3, 4, density).mask(score)
    assert mask.shape == (2, 16)
    for group in range(2):
        sums = [
            float(sum(score[group * 3 + r, b * 4 + c] for r in range(3) for c in range(4))) for b in range(4)
        ]
        kept = sorted(sorted(range(4), key=lambda b: -sums[b])[: round(4 * density)])
        assert mask[group].tolist() == [column // 4 in kept for column in range(16)]


@pytest.mark.parametrize(("density", "count"), [(0.5, 20), (0.26, 10), (0.3125, 13), (1.0, 40)])
def test_free_weights_are_the_best_of_the_whole_layer(density, count):
    score = torch.rand(5, 8, generator=torch.Generator().manual_seed(2))
    mask = support.Free(density).mask(score)
    assert int(mask.sum()) == count
    assert count == 40 or float(score[mask].min()) > float(score[~mask].max())


def test_quotas_round_halves_up():
    assert [support.quota(count, 0.5) for count in (1, 2, 3, 4, 5)] == [1, 1, 2, 2, 3]


def test_equal_scores_keep_the_lowest_of_many():
    assert support.best(torch.zeros(2, 300), 3).tolist() == [[0, 1, 2]] * 2
    assert support.Free(0.01).mask(torch.zeros(2, 300)).nonzero().tolist() == [[0, c] for c in range(6)]


# Least squares on a support


def problem(seed, height=1):
    x, weight = layer(seed)
    made = prepared(x, weight)
    mask = torch.rand(8 // height, 16, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0] = False  # a row that keeps nothing
    return x, weight, made, mask


@pytest.mark.parametrize("height", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_refit_is_least_squares_row_by_row_and_its_gradient_vanishes(seed, height):
    x, weight, made, mask = problem(seed, height)
    found = support.restricted(made.signal, made.damped.matrix, mask)
    inputs = [mask[row // height].nonzero()[:, 0].tolist() for row in range(8)]
    expected = oracles.supported(x, weight, inputs, made.damped.added.numpy())
    assert near(found, expected[0])
    assert near(made.shift(found), expected[1])
    assert made.error(found) == pytest.approx(expected[2] / variance(x, weight), rel=1e-8)
    gradient = ((found - made.signal) @ made.damped.matrix)[support.spread(mask, 8)]
    assert float(gradient.abs().max()) < 1e-9
    assert bool((found[~support.spread(mask, 8)] == 0).all())


@pytest.mark.parametrize("height", [1, 2])
def test_conjugate_gradients_come_near_the_refit_and_never_lose(height):
    _, _, made, mask = problem(5, height)
    size = made.damped.matrix.diagonal().sqrt()
    metric, target = made.damped.matrix / torch.outer(size, size), made.signal * size
    exact = support.restricted(target, metric, mask)

    def lost(values):
        return float((((target - values) @ metric) * (target - values)).sum())

    start = torch.where(support.spread(mask, 8), target, 0.0)
    errors = [
        lost(support.approached(target, metric, mask, start, steps)) for steps in (0, 1, 2, 4, 8, 16, 60)
    ]
    assert errors[0] == lost(start)
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(errors))
    assert near(support.approached(target, metric, mask, start, 60), exact, 1e-7)
    assert errors[-1] == pytest.approx(lost(exact), rel=1e-9)
    done = support.approached(target, metric, mask, exact, 3)
    assert near(done, exact)
    assert bool((done[~support.spread(mask, 8)] == 0).all())


def test_a_refit_is_affordable_by_its_operations():
    mask = torch.ones(4, 30, dtype=torch.bool)
    assert support.affordable(mask, 4 * 30**3 / 3)
    assert not support.affordable(mask, 4 * 30**3 / 3 - 1)

import itertools

import numpy as np
import pytest
import torch
from support import oracles
from support.samples import layer, moments, near, variance

from compress.core import lowrank, support
from compress.errors import CompressError

PATTERNS = [support.NM(2, 4), support.Free(0.5), support.Block(4, 4, 0.5), support.Free(0.25)]


def prepared(x, weight, damping=1e-2):
    return support.prepare(torch.from_numpy(weight), *moments(x), damping)


def lost(made, change):
    """What the solvers minimize: damped squared output error."""
    return float(((change @ made.damped.matrix) * change).sum())


def tail(made, rest, rank):
    """The squared singular values beyond the rank, by numpy."""
    root = np.linalg.cholesky(made.damped.matrix.numpy())
    return float((np.linalg.svd(rest.numpy() @ root, compute_uv=False)[rank:] ** 2).sum())


def pruned(made, pattern):
    """Wanda's support, refitted: a sparse part to start from."""
    mask = pattern.mask(made.signal.square() * made.damped.matrix.diagonal())
    return support.restricted(made.signal, made.damped.matrix, mask), mask


# The closed form


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (12, 12)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_closed_form_loses_exactly_the_tail_of_singular_values(shape, rank):
    x, weight = layer(0, out=shape[0], inputs=shape[1])
    made = prepared(x, weight)
    split = lowrank.factor(made, rank)
    assert split.left.shape == (shape[0], rank)
    assert split.right.shape == (rank, shape[1])
    assert near(split.left.T @ split.left, np.eye(rank))
    assert bool((split.values == 0).all())
    assert lost(made, made.signal - split.merged) == pytest.approx(tail(made, made.signal, rank), rel=1e-9)


def alternated(x, weight, rank, start, pull):
    """Least squares on each factor in turn, by numpy, on the damped data."""
    middle = np.concatenate([(x - x.mean(0)) / np.sqrt(len(x)), np.diag(np.sqrt(pull))])
    wanted = middle @ weight.T
    right = start
    for _ in range(30):
        left = np.linalg.lstsq(middle @ right.T, wanted, rcond=None)[0].T
        right = np.linalg.lstsq(middle, wanted @ np.linalg.pinv(left).T, rcond=None)[0].T
    return float(((wanted - middle @ right.T @ left.T) ** 2).sum())


def test_no_alternating_least_squares_from_any_start_comes_lower():
    x, weight = layer(1, out=6, inputs=8)
    made = prepared(x, weight)
    own = lost(made, made.signal - lowrank.factor(made, 2).merged)
    random = np.random.default_rng(0)
    found = [
        alternated(x, weight, 2, random.standard_normal((2, 8)), made.damped.added.numpy()) for _ in range(50)
    ]
    assert own <= min(found) * (1 + 1e-9)
    assert own == pytest.approx(min(found), rel=1e-3)


@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_full_rank_is_lossless_and_rank_none_is_all_gone(shape):
    x, weight = layer(2, out=shape[0], inputs=shape[1])
    made = prepared(x, weight)
    for rank in (8, 50):
        split = lowrank.factor(made, rank)
        assert near(split.merged, weight)
        assert split.error == pytest.approx(0.0, abs=1e-15)
        assert split.left.shape[1] == 8
    nothing = lowrank.factor(made, 0)
    assert nothing.error == pytest.approx(1.0, abs=1e-12)
    assert near(nothing.shift, weight @ x.mean(0))
    with pytest.raises(CompressError, match="a rank of -1"):
        lowrank.factor(made, -1)


def test_more_rank_never_loses_more_and_the_error_is_that_of_the_output():
    x, weight = layer(3)
    made = prepared(x, weight, 0.0)
    errors = []
    for rank in range(9):
        split = lowrank.factor(made, rank)
        output = x @ weight.T - (x @ split.merged.numpy().T + split.shift.numpy())
        assert np.abs(output.mean(0)).max() < 1e-10
        assert split.error == pytest.approx(
            float((output**2).sum(1).mean()) / variance(x, weight), rel=1e-6, abs=1e-12
        )
        errors.append(split.error)
    assert all(more <= fewer + 1e-12 for fewer, more in itertools.pairwise(errors))


def test_moments_of_fewer_samples_than_inputs_are_damped_and_solved():
    x, weight = layer(4, samples=6)
    made = prepared(x, weight)
    split = lowrank.factor(made, 4)
    assert lost(made, made.signal - split.merged) == pytest.approx(tail(made, made.signal, 4), rel=1e-6)
    assert split.error < 0.1


def test_factors_that_know_the_inputs_beat_those_of_the_weight_alone():
    for seed in range(5):
        x, weight = layer(seed, inputs=24, outliers=3)
        made = prepared(x, weight)
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        blind = made.error(torch.from_numpy((u[:, :4] * s[:4]) @ v[:4]))
        assert lowrank.factor(made, 4).error < 0.5 * blind


# Correction of what a pruner left


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_correction_leaves_the_sparse_part_and_takes_the_best_of_the_rest(pattern):
    x, weight = layer(5, inputs=24)
    made = prepared(x, weight)
    values, mask = pruned(made, pattern)
    split = lowrank.correct(made, values, mask, 3)
    assert torch.equal(split.values, values)
    assert lost(made, made.signal - split.merged) == pytest.approx(
        tail(made, made.signal - values, 3), rel=1e-9
    )
    assert split.error < made.error(values)
    assert near(split.shift, (weight - split.merged.numpy()) @ x.mean(0))


# Polish


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_round_of_polish_loses_and_the_support_holds(pattern, exact):
    x, weight = layer(6, inputs=24)
    made = prepared(x, weight)
    split = lowrank.correct(made, *pruned(made, pattern), 2)
    first = lost(made, made.signal - split.merged)
    before = first
    for _ in range(4):
        split = lowrank.polish(made, split, 1, exact=exact)
        assert bool((split.values[~support.spread(split.mask, 8)] == 0).all())
        now = lost(made, made.signal - split.merged)
        assert now <= before * (1 + 1e-9)
        before = now
    assert before < 0.9 * first


def test_a_round_is_least_squares_on_the_support_and_then_the_best_factors():
    x, weight = layer(7, inputs=24)
    made = prepared(x, weight)
    first = lowrank.correct(made, *pruned(made, support.NM()), 2)
    split = lowrank.polish(made, first, 1, exact=True)
    inputs = [row.nonzero()[:, 0].tolist() for row in split.mask]
    rest = weight - (first.left @ first.right).numpy()
    assert near(split.values, oracles.supported(x, rest, inputs, made.damped.added.numpy())[0])
    assert lost(made, made.signal - split.merged) == pytest.approx(
        tail(made, made.signal - split.values, 2), rel=1e-9
    )


# Support and factors together


def state(made, pattern, rank, iterations, **keywords):
    size = made.damped.matrix.diagonal().sqrt()
    admm = lowrank._Admm(made.signal * size, made.damped.matrix / torch.outer(size, size), pattern, rank)
    admm.run(iterations, **keywords)
    return admm


def test_one_iteration_is_the_three_blocks_as_published():
    x, weight = layer(8, inputs=24)
    made = prepared(x, weight)
    admm = state(made, support.NM(), 2, 3)
    w, g, rho = admm.weight.numpy(), admm.metric.numpy(), admm.rho
    d, v = admm.sparse.numpy(), admm.price.numpy()
    product = (admm.left @ admm.right).numpy()
    admm._step()
    dense = ((w - product) @ g - v + rho * d) @ np.linalg.inv(g + rho * np.eye(24))
    assert near(admm.dense, dense)
    both = dense + v / rho
    for row, group in itertools.product(range(8), range(6)):
        part = both[row, 4 * group : 4 * group + 4]
        small = np.argsort(np.abs(part))[:2]
        part[small] = 0
    assert near(admm.sparse, both)
    assert near(admm.price, v + rho * (dense - both))
    rest = torch.from_numpy(w - dense)
    best = tail_of(rest, admm.metric, 2)
    change = rest - admm.left @ admm.right
    assert float(((change @ admm.metric) * change).sum()) == pytest.approx(best, rel=0.02)


def tail_of(rest, metric, rank):
    root = np.linalg.cholesky(metric.numpy())
    return float((np.linalg.svd(rest.numpy() @ root, compute_uv=False)[rank:] ** 2).sum())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_at_convergence_both_copies_agree_and_the_pattern_is_exact(pattern):
    x, weight = layer(9, inputs=24)
    made = prepared(x, weight)
    admm = state(made, pattern, 2, 400, ramp=(0.1, 1e5))
    assert float((admm.dense - admm.sparse).norm() / admm.dense.norm()) < 1e-3
    split = lowrank.decompose(made, pattern, 2)
    assert int((split.values != 0).sum()) <= int(support.spread(split.mask, 8).sum())
    assert int(support.spread(split.mask, 8).sum()) == round(
        8 * 24 * (0.25 if pattern == support.Free(0.25) else 0.5)
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_together_beats_a_correction_and_an_alternation_without_hessian(pattern):
    wins, ratios = 0, []
    for seed in range(20):
        x, weight = layer(seed, out=16, inputs=32, samples=400, factors=10, outliers=2)
        made = prepared(x, weight)
        own = lowrank.decompose(made, pattern, 3).error
        eora = lowrank.correct(made, *pruned(made, pattern), 3).error
        wins += own <= min(eora, lowrank.oats(made, pattern, 3).error)
        ratios.append(own / eora)
    assert wins >= 19
    assert np.median(ratios) < 0.7


def test_more_iterations_help_and_the_polish_pays_for_an_early_stop():
    early, raw, late = [], [], []
    for seed in range(4):
        x, weight = layer(seed, out=24, inputs=48, samples=600, factors=12, outliers=2)
        made = prepared(x, weight)
        early.append(lowrank.decompose(made, support.NM(), 4, iterations=20).error)
        raw.append(lowrank.decompose(made, support.NM(), 4, iterations=20, rounds=0).error)
        late.append(lowrank.decompose(made, support.NM(), 4, iterations=400).error)
    assert sum(early) < 0.95 * sum(raw)
    assert sum(late) < sum(early) < 1.6 * sum(late)


def test_a_planted_sum_is_found():
    random = np.random.default_rng(0)
    x = random.standard_normal((400, 32)) + 1.0
    sparse = random.standard_normal((24, 32)) * (random.random((24, 32)) < 0.1)
    weight = sparse + random.standard_normal((24, 2)) @ random.standard_normal((2, 32))
    made = prepared(x, weight)
    split = lowrank.decompose(made, support.Free(float((sparse != 0).mean())), 2, iterations=400)
    assert split.error < 1e-6
    assert lowrank.decompose(made, support.Free(0.05), 2, iterations=400).error > 1e-3


def test_rank_none_is_pruning_that_beats_a_refit_of_the_largest():
    for seed in range(4):
        x, weight = layer(seed, out=16, inputs=32, factors=10)
        made = prepared(x, weight)
        split = lowrank.decompose(made, support.NM(), 0)
        assert split.left.shape == (16, 0)
        assert torch.equal(split.merged, split.values)
        assert split.error < made.error(pruned(made, support.NM())[0])


@pytest.mark.parametrize("pattern", [support.NM(4, 4), support.Free(1.0), support.Block(4, 4, 1.0)])
def test_keeping_everything_is_lossless(pattern):
    x, weight = layer(10)
    split = lowrank.decompose(prepared(x, weight), pattern, 1)
    assert split.error < 1e-15
    assert near(split.merged, weight, 1e-7)


def test_a_weight_of_zeros_and_a_constant_input_are_no_obstacle():
    x, weight = layer(11)
    x[:, 3] = 2.0
    assert lowrank.decompose(prepared(x, weight), support.NM(), 2).error < 0.5
    assert lowrank.decompose(prepared(x, 0 * weight), support.NM(), 2).error == 0.0

import itertools

import numpy as np
import pytest
import torch
from support import oracles
from support.samples import layer, moments, near, variance

from compress.core import block, obs, support
from compress.errors import CompressError


def solve(x, weight, shape, density, **keywords):
    return block.solve(torch.from_numpy(weight), *moments(x), shape, density, **keywords)


def inputs(found, shape, out):
    """The inputs that each row keeps, as lists."""
    return [oracles.owned(found.kept[row // shape[0]].tolist(), shape[1]) for row in range(out)]


def pull_of(x, weight, damping=1e-2):
    return support.prepare(torch.from_numpy(weight), *moments(x), damping).damped.added.numpy()


# Removal with compensation


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (4, 2), (8, 4), (1, 8)])
@pytest.mark.parametrize("damping", [0.0, 1e-2, 0.5])
def test_every_group_is_least_squares_with_a_constant_on_the_blocks_it_keeps(shape, damping):
    x, weight = layer(0)
    pull = pull_of(x, weight, damping)
    found = solve(x, weight, shape, 0.5, damping=damping)
    values, shift, error = oracles.supported(x, weight, inputs(found, shape, 8), pull)
    assert found.values.dtype == found.shift.dtype == torch.float64
    assert near(found.values, values)
    assert near(found.shift, shift)
    assert found.error == pytest.approx(error / variance(x, weight), rel=1e-8)
    gap = x @ weight.T - (x @ found.values.numpy().T + found.shift.numpy())
    assert np.abs(gap.mean(0)).max() < 1e-10


@pytest.mark.parametrize("shape", [(2, 2), (4, 4), (8, 2)])
def test_blocks_leave_a_group_in_the_order_of_a_greedy_that_solves_every_subset_anew(shape):
    x, weight = layer(1)
    pull = pull_of(x, weight)
    blocks = 16 // shape[1]
    levels = {
        found.kept.shape[1]: found
        for found in block.sweep(
            torch.from_numpy(weight), *moments(x), shape, [k / blocks for k in range(1, blocks + 1)]
        )
    }
    for group in range(8 // shape[0]):
        rows = weight[group * shape[0] : (group + 1) * shape[0]]
        gone = oracles.greedy_removals(x, rows, shape[1], pull)
        for kept, found in levels.items():
            assert found.kept[group].tolist() == sorted(gone[blocks - kept :])


@pytest.mark.parametrize("seed", range(6))
def test_the_first_block_to_go_is_the_best_there_is_and_greedy_never_beats_every_subset(seed):
    x, weight = layer(seed, out=4)
    pull = pull_of(x, weight)
    for density in (0.75, 0.5, 0.25):
        found = solve(x, weight, (4, 4), density)
        least, kept = oracles.best_subset(x, weight, round(4 * density), 4, pull)
        own = oracles.objective(x, weight, oracles.owned(found.kept[0].tolist(), 4), pull)
        assert own >= least * (1 - 1e-9)
        assert density < 0.75 or found.kept[0].tolist() == list(kept)


def test_one_removal_is_the_closed_form_of_its_row_group():
    x, weight = layer(2)
    made = support.prepare(torch.from_numpy(weight), *moments(x), 0.0)
    found = solve(x, weight, (4, 4), 0.75, damping=0.0)
    inverse = torch.linalg.inv(made.damped.matrix)
    for group in range(2):
        rows = slice(4 * group, 4 * group + 4)
        (gone,) = {0, 1, 2, 3} - set(found.kept[group].tolist())
        cut = list(range(4 * gone, 4 * gone + 4))
        step = torch.linalg.solve(inverse[cut][:, cut], inverse[cut])
        expected = made.signal[rows] - made.signal[rows][:, cut] @ step
        expected[:, cut] = 0
        assert near(found.values[rows], expected)


def test_densities_are_counts_of_whole_blocks_nested_and_better_with_more():
    x, weight = layer(3, inputs=32)
    asked = [1.0, 0.125, 0.5, 0.52, 0.25]
    levels = list(block.sweep(torch.from_numpy(weight), *moments(x), (2, 4), asked))
    assert [level.kept.shape for level in levels] == [(4, 1), (4, 2), (4, 4), (4, 8)]
    for level in levels:
        tiles = level.values.reshape(4, 2, 8, 4).abs().sum((1, 3))
        assert ((tiles != 0).sum(1) == level.kept.shape[1]).all()
    for fewer, more in itertools.pairwise(levels):
        assert more.error < fewer.error
        assert all(
            set(few) < set(many) for few, many in zip(fewer.kept.tolist(), more.kept.tolist(), strict=True)
        )
    assert levels[-1].error == pytest.approx(0.0, abs=1e-15)
    assert near(levels[-1].values, weight)
    alone = solve(x, weight, (2, 4), 0.5)
    assert alone.kept.tolist() == levels[2].kept.tolist()
    assert near(alone.values, levels[2].values)


def test_blocks_as_high_as_the_weight_are_removal_of_units():
    x, weight = layer(4)
    found = solve(x, weight, (8, 2), 0.5)
    (level,) = obs.solve(torch.from_numpy(weight), *moments(x), [4], width=2, group=0.0)
    assert found.kept[0].tolist() == level.kept.tolist()
    assert near(found.values[:, obs.columns(level.kept, 2)], level.weight)
    assert found.error == pytest.approx(level.error, rel=1e-9)
    assert near(found.shift, level.shift)


def test_an_input_that_never_varies_is_not_kept_for_its_mean():
    x, weight = layer(5)
    x[:, 4:8] = 3.0
    found = solve(x, weight, (8, 4), 0.75)
    assert found.kept.tolist() == [[0, 2, 3]]
    assert found.error == pytest.approx(0.0, abs=1e-12)
    assert near(found.shift, 3.0 * weight[:, 4:8].sum(1))


def test_a_cut_has_no_weights_on_an_input_that_never_varies():
    x, weight = layer(5)
    x[:, 5] = 3.0
    kept = torch.tensor([[0, 1]] * 4)
    found = block.cut(torch.from_numpy(weight), *moments(x), (2, 4), kept)
    assert bool((found.values[:, 5] == 0).all())
    assert near(found.values[:, [0, 1, 2, 3, 4, 6, 7]], weight[:, [0, 1, 2, 3, 4, 6, 7]])
    assert near(found.shift, (weight - found.values.numpy()) @ x.mean(0))


def test_singular_moments_stay_finite():
    x, weight = layer(6, samples=5)
    found = solve(x, weight, (2, 4), 0.5)
    assert bool(torch.isfinite(found.values).all())
    assert 0 <= found.error < 1


# Controls: what removal with compensation must beat


@pytest.mark.parametrize("seed", range(5))
def test_without_refit_or_second_order_more_is_lost(seed):
    x, weight = layer(seed, out=16, inputs=48, samples=600, factors=10, outliers=2)
    signal, (second, mean) = torch.from_numpy(weight), moments(x)
    shape = (4, 4)
    own = solve(x, weight, shape, 0.5)
    errors = {}
    for name, score in (
        ("magnitude", block.magnitude(signal, shape)),
        ("wanda", block.wanda(signal, (second - torch.outer(mean, mean)).diagonal(), shape)),
    ):
        kept = block.choose(score, 0.5)
        errors[name] = block.cut(signal, second, mean, shape, kept).error
        refitted = block.fit(signal, second, mean, shape, kept).error
        assert own.error < refitted < errors[name]
    assert errors["wanda"] < errors["magnitude"]
    plain = block.cut(signal, second, mean, shape, own.kept)
    assert plain.error > 2 * own.error


def test_a_fit_of_the_blocks_that_the_sweep_kept_is_the_sweep():
    x, weight = layer(7)
    own = solve(x, weight, (2, 4), 0.5)
    again = block.fit(torch.from_numpy(weight), *moments(x), (2, 4), own.kept)
    assert near(again.values, own.values)
    assert near(again.shift, own.shift)
    assert again.error == pytest.approx(own.error, rel=1e-9)


# Scores


def test_scores_equal_loops_over_blocks():
    x, weight = layer(8, out=6, inputs=12)
    energy = x.var(0)
    gradients = np.random.default_rng(0).standard_normal((5, 6, 12))
    shape = (3, 4)
    size, carried, fisher = np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 3))
    for group, place in itertools.product(range(2), range(3)):
        sums = np.zeros(5)
        for row, column in itertools.product(range(3), range(4)):
            r, c = group * 3 + row, place * 4 + column
            size[group, place] += weight[r, c] ** 2
            carried[group, place] += weight[r, c] ** 2 * energy[c]
            sums += weight[r, c] * gradients[:, r, c]
        fisher[group, place] = 0.5 * (sums**2).mean()
    signal = torch.from_numpy(weight)
    assert near(block.magnitude(signal, shape), size)
    assert near(block.wanda(signal, torch.from_numpy(energy), shape), carried)
    assert near(block.fisher(signal, iter(torch.from_numpy(gradients)), shape), fisher)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75])
def test_exactly_the_asked_share_of_blocks_is_zero(alpha):
    x, weight = layer(9, out=8, inputs=32)
    kept = block.choose(block.magnitude(torch.from_numpy(weight), (2, 4)), 1 - alpha)
    values = block.cut(torch.from_numpy(weight), *moments(x), (2, 4), kept).values
    zeros = sum(
        bool((values[2 * g : 2 * g + 2, 4 * b : 4 * b + 4] == 0).all()) for g in range(4) for b in range(8)
    )
    assert zeros == round(alpha * 32)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_lpvits_tiled_quadratic_form_is_one_product_a_sample(size):
    # Its code sums tiles of the matrix F = g g^T + floor I over i >= j, twice off the diagonal.
    random = np.random.default_rng(size)
    change, gradient, floor = random.standard_normal(64), random.standard_normal(64), 0.3
    total = 0.0
    for i in range(0, 64, size):
        for j in range(0, i + 1, size):
            first, second = slice(i, i + size), slice(j, j + size)
            matrix = np.outer(gradient[first], gradient[second])
            if i == j:
                matrix = matrix + floor * np.eye(len(matrix))
            total += (1 if i == j else 2) * change[first] @ matrix @ change[second]
    found = block.loss_change(torch.from_numpy(change), [torch.from_numpy(gradient)], floor)
    assert found == pytest.approx(0.5 * total, rel=1e-12)


def softmax_gradients(samples=4000):
    """Per-sample gradients of a linear softmax model at labels drawn from it, its input and weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    chances = torch.softmax(x @ weight.detach().T, 1)
    labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
    gradients = []
    for row, label in zip(x, labels, strict=True):
        loss = torch.nn.functional.cross_entropy((row @ weight.T)[None], label[None])
        gradients.append(torch.autograd.grad(loss, weight)[0])
    return x, weight.detach(), chances, gradients


def test_the_fisher_score_is_that_of_the_models_own_fisher_matrix():
    x, weight, chances, gradients = softmax_gradients()
    exact = torch.zeros(12, 12, dtype=torch.float64)
    for row, chance in zip(x, chances, strict=True):
        curvature = torch.diag(chance) - torch.outer(chance, chance)
        exact += torch.kron(curvature, torch.outer(row, row)) / len(x)
    score = block.fisher(weight, gradients, (3, 2))
    for place in range(2):
        change = torch.zeros(3, 4, dtype=torch.float64)
        change[:, 2 * place : 2 * place + 2] = weight[:, 2 * place : 2 * place + 2]
        flat = change.flatten()
        expected = 0.5 * float(flat @ exact @ flat)
        assert float(score[0, place]) == pytest.approx(expected, rel=0.08)  # labels are a sample
        assert block.loss_change(change, gradients, 0.0) == pytest.approx(float(score[0, place]), rel=1e-12)
    # The control: with the gradients averaged first, as LPViT's code has them, almost nothing is left.
    mean = torch.stack(gradients).mean(0)
    assert float(block.fisher(weight, [mean], (3, 2)).max()) < 0.05 * float(score.min())


def test_a_score_of_no_samples_is_zero():
    assert block.fisher(torch.ones(2, 2), [], (1, 1)).tolist() == [[0.0, 0.0]] * 2
    assert block.loss_change(torch.ones(2), [], floor=1.0) == 1.0


# The form that runs


@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 4), (4, 16)])
def test_packed_blocks_give_the_same_product_and_the_same_weight(shape):
    x, weight = layer(10, out=8, inputs=32)
    found = solve(x, weight, shape, 0.5)
    packed = block.pack(found.values, found.kept, shape)
    assert packed.shape == (8 // shape[0], shape[0], 16)
    assert torch.equal(block.unpack(packed, found.kept, 32), found.values)
    rows = torch.from_numpy(x)
    assert near(block.product(rows, packed, found.kept), rows @ found.values.T, 1e-12)


def test_fewer_blocks_take_fewer_bytes():
    sizes = [
        block.stored_bytes(torch.zeros(4, kept, dtype=torch.int64), (32, 128), 2) for kept in (1, 2, 3, 4)
    ]
    assert sizes == [4 * kept * (32 * 128 * 2 + 4) for kept in (1, 2, 3, 4)]


# Requests that cannot be met


def test_blocks_that_do_not_tile_and_densities_that_keep_nothing_are_refused():
    x, weight = layer()
    with pytest.raises(CompressError, match=r"blocks of 3x4 do not tile a weight of \[8, 16\]"):
        solve(x, weight, (3, 4), 0.5)
    with pytest.raises(CompressError, match=r"blocks of 2x5 .* leaves 0 rows and 1 columns"):
        solve(x, weight, (2, 5), 0.5)
    with pytest.raises(CompressError, match=r"density of 0\.1 keeps 0 of 4"):
        solve(x, weight, (2, 4), 0.1)
    signal, (second, mean) = torch.from_numpy(weight), moments(x)
    for kept in (torch.tensor([[4]] * 4), torch.tensor([[0]] * 3)):
        with pytest.raises(CompressError, match="make 4 groups of 4"):
            block.fit(signal, second, mean, (2, 4), kept)

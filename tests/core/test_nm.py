import itertools

import numpy as np
import pytest
import torch
from support import oracles
from support.samples import layer, moments, near, variance

from compress.core import nm, support
from compress.errors import CompressError


def prepared(x, weight, damping=1e-2):
    return support.prepare(torch.from_numpy(weight), *moments(x), damping)


def lost(made, values):
    change = values - made.signal
    return float(((change @ made.damped.matrix) * change).sum())


def at_most(values, n, m):
    return bool(((values.reshape(len(values), -1, m) != 0).sum(2) <= n).all())


# The sweep


def test_the_factor_gives_the_inverse_and_those_of_what_is_to_the_right():
    made = prepared(*layer(0))
    factor = nm.upper(made.damped)
    assert torch.equal(factor, factor.triu())
    for start in (0, 5, 12):
        inverse = torch.linalg.inv(made.damped.matrix[start:, start:])
        assert near(factor[start:, start:].T @ factor[start:, start:], inverse)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 4), (1, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("damping", [0.0, 1e-2, 0.3])
def test_what_the_choices_add_up_to_is_the_error_of_the_result(n, m, damping):
    x, weight = layer(1)
    made = prepared(x, weight, damping)
    values, mask, total = nm.sweep(made, support.NM(n, m))
    assert at_most(values, n, m)
    assert bool(((values != 0) <= mask).all())
    assert int(mask.sum()) == 8 * 16 * n // m
    assert total == pytest.approx(lost(made, values), rel=1e-6)
    expected = oracles.penalized(x, weight - values.numpy(), made.damped.added.numpy())
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4)])
def test_a_row_of_one_group_gets_the_best_of_all_choices_with_its_exact_refit(seed, n, m):
    x, weight = layer(seed, inputs=4)
    made = prepared(x, weight)
    pull = made.damped.added.numpy()
    found = nm.solve(made, support.NM(n, m))
    swept, _, _ = nm.sweep(made, support.NM(n, m))
    for row in range(8):
        _, kept = oracles.best_subset(x, weight[[row]], n, 1, pull)
        assert found.mask[row].nonzero()[:, 0].tolist() == list(kept)
        expected = oracles.refitted(x, weight[[row]], list(kept), pull)[0][0]
        assert near(found.values[row, list(kept)], expected)
        assert near(swept[row], found.values[row])  # nothing is left to refit


def test_the_first_group_is_decided_with_all_others_free():
    x, weight = layer(2, inputs=8)
    made = prepared(x, weight)
    pull = made.damped.added.numpy()
    _, mask, _ = nm.sweep(made, support.NM())
    for row in range(8):
        costs = {}
        for gone in itertools.combinations(range(4), 2):
            kept = [column for column in range(8) if column not in gone]
            costs[gone] = oracles.objective(x, weight[[row]], kept, pull)
        gone = min(costs, key=costs.get)
        assert (~mask[row, :4]).nonzero()[:, 0].tolist() == list(gone)


def test_the_refit_is_least_squares_on_the_support_and_only_helps():
    x, weight = layer(3)
    made = prepared(x, weight)
    plain, found = nm.solve(made, refit=False), nm.solve(made, refit=True)
    assert torch.equal(plain.mask, found.mask)
    inputs = [row.nonzero()[:, 0].tolist() for row in found.mask]
    values, shift, error = oracles.supported(x, weight, inputs, made.damped.added.numpy())
    assert near(found.values, values)
    assert near(found.shift, shift)
    assert found.error == pytest.approx(error / variance(x, weight), rel=1e-8)
    assert found.error < plain.error
    assert torch.equal(nm.solve(made).values, found.values)


# SparseGPT as published, and the others


@pytest.mark.parametrize("pattern", [support.NM(), support.Free(0.5)])
def test_sparsegpt_equals_a_sweep_with_the_inverse_downdated_column_by_column(pattern, monkeypatch):
    monkeypatch.setattr(nm, "BLOCK", 8)
    x, weight = layer(4)
    made = prepared(x, weight)
    found = nm.sparsegpt(made, pattern)
    w, inverse = made.signal.numpy().copy(), np.linalg.inv(made.damped.matrix.numpy())
    step = 4 if isinstance(pattern, support.NM) else 8
    diagonals, downdated = [], [inverse]
    for column in range(16):
        diagonals.append(inverse[column, column])
        inverse = inverse - np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        downdated.append(inverse)
    for start in range(0, 16, step):
        score = torch.from_numpy(w[:, start : start + step] ** 2 / np.array(diagonals)[start : start + step])
        mask = pattern.mask(score).numpy()
        for column in range(start, start + step):
            now = downdated[column]
            gone = np.where(mask[:, column - start], 0.0, w[:, column]) / now[column, column]
            w[:, column:] -= np.outer(gone, now[column, column:])
    assert near(found.values, w)
    assert found.error == pytest.approx(made.error(torch.from_numpy(w)), rel=1e-9)


def test_baselines_keep_the_largest_by_their_own_measure():
    x, weight = layer(5, outliers=2)
    made = prepared(x, weight)
    by_size, by_output = nm.magnitude(made, support.NM()), nm.wanda(made, support.NM())
    scale = np.sqrt(x.var(0) * 1.01)
    for found, score in ((by_size, np.abs(weight)), (by_output, np.abs(weight) * scale)):
        for row, group in itertools.product(range(8), range(4)):
            part = score[row, 4 * group : 4 * group + 4]
            kept = sorted(np.argsort(-part)[:2])
            assert found.mask[row, 4 * group : 4 * group + 4].nonzero()[:, 0].tolist() == kept
        assert torch.equal(found.values, torch.where(found.mask, made.signal, 0.0))
        assert near(found.shift, (weight - found.values.numpy()) @ x.mean(0))


def test_second_order_beats_the_baselines_and_the_exact_choice_beats_sparsegpt():
    errors = {"magnitude": [], "wanda": [], "sparsegpt": [], "swept": [], "solved": []}
    for seed in range(20):
        x, weight = layer(seed, out=16, inputs=32, samples=400, factors=8)
        made = prepared(x, weight)
        errors["magnitude"].append(nm.magnitude(made, support.NM()).error)
        errors["wanda"].append(nm.wanda(made, support.NM()).error)
        errors["sparsegpt"].append(nm.sparsegpt(made, support.NM()).error)
        errors["swept"].append(nm.solve(made, refit=False).error)
        errors["solved"].append(nm.solve(made).error)

    def wins(first, second):
        return sum(a < b for a, b in zip(errors[first], errors[second], strict=True))

    assert wins("sparsegpt", "magnitude") >= 19
    assert wins("sparsegpt", "wanda") >= 19
    assert wins("swept", "sparsegpt") >= 17
    assert wins("solved", "swept") == 20
    assert sum(errors["solved"]) < 0.7 * sum(errors["sparsegpt"])


def test_a_width_that_is_no_multiple_is_refused():
    x, weight = layer(6, inputs=6)
    with pytest.raises(CompressError, match=r"groups of 4, but this weight is \[1, 6\]"):
        nm.solve(prepared(x, weight))


# Masks in training


def test_masked_weights_hold_the_pattern_after_every_step_of_adamw():
    x, weight = layer(7)
    found = nm.solve(prepared(x, weight))
    trained = torch.nn.Parameter(found.values.clone())
    optimizer = torch.optim.AdamW([trained], lr=0.05, weight_decay=0.1)
    rows = torch.from_numpy(x)
    free = torch.nn.Parameter(found.values.clone())
    loose = torch.optim.AdamW([free], lr=0.05, weight_decay=0.1)
    for _ in range(6):
        for one, own in ((trained, optimizer), (free, loose)):
            own.zero_grad()
            ((rows @ one.T - rows @ torch.from_numpy(weight).T) ** 2).mean().backward()
            if one is trained:
                one.grad.mul_(found.mask)
            own.step()
        assert at_most(trained.detach(), 2, 4)
    assert not at_most(free.detach(), 2, 4)  # the control: without the mask they come back


# The packed form


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_packing_keeps_every_value_and_its_place(dtype):
    generator = torch.Generator().manual_seed(0)
    dense = torch.randint(-9, 10, (5, 32), generator=generator).to(dtype)
    sparse = dense * support.NM().mask(torch.rand(5, 32, generator=generator)).to(dtype)
    packed, positions = nm.pack(sparse)
    assert packed.dtype == dtype
    assert positions.dtype == torch.uint8
    assert torch.equal(nm.unpack(packed, positions), sparse)
    assert packed.nbytes + positions.nbytes == nm.stored_bytes((5, 32), dtype.itemsize)


def test_the_bits_of_a_group_are_the_two_columns_it_keeps():
    for first, second in itertools.combinations(range(4), 2):
        for group in (0, 1):
            values = torch.zeros(1, 8)
            values[0, 4 * group + first], values[0, 4 * group + second] = 1.0, 2.0
            packed, positions = nm.pack(values)
            bits = int(positions[0, 0]) >> 4 * group & 15
            assert (bits & 3, bits >> 2) == (first, second)
            assert packed[0, 2 * group : 2 * group + 2].tolist() == [1.0, 2.0]


def test_groups_with_fewer_than_two_survive_and_with_more_are_refused():
    for kept in (0, 1, 2, 3):
        values = torch.zeros(1, 8)
        values[0, kept] = 3.0
        assert torch.equal(nm.unpack(*nm.pack(values)), values)
    with pytest.raises(CompressError, match="holds 3 non-zeros"):
        nm.pack(torch.tensor([[1.0, 1.0, 1.0, 0, 0, 0, 0, 0]]))
    with pytest.raises(CompressError, match=r"8 inputs at a time, but the weight is \[1, 4\]"):
        nm.pack(torch.zeros(1, 4))


@pytest.mark.parametrize(("item_bytes", "share"), [(2, 36 / 64), (1, 20 / 32)])
def test_what_is_stored_is_the_published_share_of_dense(item_bytes, share):
    assert nm.stored_bytes((64, 64), item_bytes) == share * 64 * 64 * item_bytes

import itertools

import numpy as np
import pytest
import torch

from compress.core import factorization, fakequant, gptq
from compress.core.fakequant import Grid, grid_of
from compress.errors import CompressError

GRIDS_TRIED = [
    Grid(-127, 127),
    Grid(-127, 127, paired=True),
    Grid(-8, 7, block=16),
    Grid(-2, 1),
    Grid(-448, 448, floating=True),
]


def problem(seed=0, inputs=48, out=12, samples=400, factors=6, mean=0.0):
    """Correlated inputs [samples, in] and a weight [out, in]."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((samples, factors)) @ random.standard_normal((factors, inputs))
    x += 0.3 * random.standard_normal((samples, inputs)) + mean * random.standard_normal(inputs)
    return torch.from_numpy(x), torch.from_numpy(random.standard_normal((out, inputs)))


def damped(x, damping=1e-2):
    second = x.T @ x / len(x)
    return factorization.damp(second, damping, second.diagonal())


def row_errors(weight, codes, step, matrix, grid):
    lost = weight - codes * fakequant.spread(step.double(), weight.shape[1], grid.block)
    return torch.tensor([float(row @ matrix @ row) for row in lost])


@pytest.mark.parametrize("grid", GRIDS_TRIED)
@pytest.mark.parametrize("seed", range(5))
def test_no_row_is_worse_than_by_plain_rounding_and_most_are_much_better(grid, seed):
    x, weight = problem(seed)
    step, moment = fakequant.weight_step(weight, grid), damped(x)
    codes = gptq.round_codes(weight, step, moment, grid)
    near = fakequant.weight_codes(weight, step.double(), grid)
    mine, plain = (row_errors(weight, one, step, moment.matrix, grid) for one in (codes, near))
    assert bool((mine <= plain * (1 + 1e-9)).all())
    assert float(mine.sum()) < 0.5 * float(plain.sum())


def test_steps_weigh_each_column_by_how_much_its_input_varies():
    x, weight = problem(3, mean=1.0)
    x[:, ::4] *= 30.0
    mean = x.mean(0)
    found = gptq.quantize(weight, x.T @ x / len(x), mean, "int4").quantized.step
    varies = x.var(0, correction=0)
    assert torch.allclose(found, fakequant.weight_step(weight, grid_of("int4"), varies))
    assert not torch.allclose(found, fakequant.weight_step(weight, grid_of("int4")))


def allowed(grid, columns):
    """Every row of codes, paired or not."""
    for codes in itertools.product(range(grid.low, grid.high + 1), repeat=columns):
        pairs = zip(codes[::2], codes[1::2], strict=False)
        if not grid.paired or all(a * b <= 0 or abs(a + b) <= 128 for a, b in pairs):
            yield codes


def test_tiny_problems_come_out_as_by_trying_everything():
    grid, equal, total = Grid(-2, 1), 0, torch.zeros(2)
    for seed in range(12):
        x, weight = problem(seed, inputs=5, out=6, factors=2)
        step, moment = fakequant.weight_step(weight, grid), damped(x)
        codes = gptq.round_codes(weight, step, moment, grid)
        everything = torch.tensor(list(allowed(grid, 5)), dtype=torch.float64)
        for row, found, size in zip(weight, codes, step.double(), strict=True):
            lost = row - everything * size
            best = float(((lost @ moment.matrix) * lost).sum(1).min())
            mine = float((row - found * size) @ moment.matrix @ (row - found * size))
            assert mine >= best * (1 - 1e-9)
            equal += mine <= best * (1 + 1e-9)
            total += torch.tensor([mine, best])
    assert equal >= 0.6 * 72  # two bits and strong correlation are the hard case
    assert float(total[0]) < 1.25 * float(total[1])


def test_a_pair_of_bytes_comes_out_nearly_as_by_trying_everything():
    weight = torch.tensor([[120.3, 44.9], [-90.2, -70.4], [100.0, -120.2]], dtype=torch.float64)
    grid = Grid(-127, 127, paired=True)
    moment = factorization.damp(torch.tensor([[2.0, -0.9], [-0.9, 1.0]], dtype=torch.float64), 0.0)
    codes = gptq.round_codes(weight, torch.ones(3, 1), moment, grid, passes=20)
    everything = torch.tensor(list(allowed(grid, 2)), dtype=torch.float64)
    for row, found in zip(weight, codes, strict=True):
        assert found.tolist() in everything.tolist()
        lost = row - everything
        best = float(((lost @ moment.matrix) * lost).sum(1).min())
        mine = float((row - found) @ moment.matrix @ (row - found))
        assert mine <= 1.25 * best  # one code at a time cannot walk along the bound


def test_independent_inputs_are_rounded_to_the_nearest():
    _, weight = problem(3)
    moment = factorization.damp(torch.diag(torch.rand(48, dtype=torch.float64) + 0.1), 0.0)
    for grid in (Grid(-127, 127), Grid(-8, 7, block=16)):
        step = fakequant.weight_step(weight, grid)
        codes = gptq.round_codes(weight, step, moment, grid)
        assert torch.equal(codes, fakequant.weight_codes(weight, step.double(), grid))


@pytest.mark.parametrize("grid", GRIDS_TRIED)
def test_the_width_of_the_blocks_changes_nothing(grid):
    x, weight = problem(4)
    step, moment = fakequant.weight_step(weight, grid), damped(x)
    codes = [gptq.round_codes(weight, step, moment, grid, block=block) for block in (1, 7, 48, 500)]
    assert all(torch.equal(codes[0], other) for other in codes[1:])


def test_rows_do_not_know_of_each_other():
    x, weight = problem(5)
    grid = Grid(-8, 7)
    step, moment = fakequant.weight_step(weight, grid), damped(x)
    codes = gptq.round_codes(weight, step, moment, grid)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
    assert torch.equal(gptq.round_codes(weight[order], step[order], moment, grid), codes[order])


def test_the_first_stage_is_the_published_recursion():
    x, weight = problem(6, inputs=10, out=4)
    grid = Grid(-8, 7)
    step, moment = fakequant.weight_step(weight, grid), damped(x)
    inverse = torch.linalg.inv(moment.matrix)
    left, expected = weight.clone(), torch.zeros_like(weight)
    for j in range(10):  # the columns that are done leave the inverse, one at a time
        expected[:, j] = (left[:, j] / step[:, 0].double()).round().clamp(-8, 7)
        wrong = (left[:, j] - expected[:, j] * step[:, 0].double()) / inverse[j, j]
        left -= torch.outer(wrong, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    upper = torch.linalg.cholesky(factorization.invert(moment), upper=True)
    state = gptq._Rounding(weight.T, step.double().expand(4, 10).T, grid)
    assert torch.equal(state.pass_on(upper, 3).T, expected)


@pytest.mark.parametrize("grid", GRIDS_TRIED[1:])
def test_moving_single_codes_never_makes_a_row_worse(grid):
    x, weight = problem(7)
    step, moment = fakequant.weight_step(weight, grid), damped(x)
    state = gptq._Rounding(weight.T, fakequant.spread(step.double(), 48, grid.block).T, grid)
    codes = fakequant.weight_codes(weight, step.double(), grid)
    before = row_errors(weight, codes, step, moment.matrix, grid)
    for _ in range(4):
        codes = state.settle(codes.T, moment.matrix, 16).T
        after = row_errors(weight, codes, step, moment.matrix, grid)
        assert bool((after <= before * (1 + 1e-9)).all())
        before = after


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static", "int4", "fp8"])
def test_codes_stay_on_the_grid_and_zeros_stay_zeros(precision):
    x, weight = problem(8, inputs=50)
    weight = weight * (torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5)
    span = (-2.0, 3.0) if precision in ("int8-static", "fp8") else None
    found = gptq.quantize(weight, x.T @ x / len(x), x.mean(0), precision, span=span).quantized
    grid = grid_of(precision)
    stored = torch.float8_e4m3fn if precision == "fp8" else torch.int8
    assert (found.precision, found.codes.dtype) == (precision, stored)
    assert (found.input_step is None) == (span is None)
    codes = found.codes.float()
    assert grid.low <= float(codes.min()) <= float(codes.max()) <= grid.high
    assert bool((codes[weight == 0] == 0).all())
    assert float((codes[weight != 0] != 0).float().mean()) > 0.7
    if grid.paired:
        first, second = codes[:, 0::2], codes[:, 1::2]
        assert int(torch.where(first * second > 0, (first + second).abs(), 0).max()) <= 128


def test_the_error_is_that_of_the_outputs_and_the_bias_carries_the_mean():
    x, weight = problem(9, mean=3.0)
    found = gptq.quantize(weight, x.T @ x / len(x), x.mean(0), "int4")
    dense = x @ weight.T
    now = x @ found.quantized.weight().double().T + found.shift
    assert torch.allclose(now.mean(0), dense.mean(0))
    variance = (dense - dense.mean(0)).square().sum(1).mean()
    assert found.error == pytest.approx(float((now - dense).square().sum(1).mean() / variance), rel=1e-6)
    fixed = gptq.quantize(weight, x.T @ x / len(x), None, "int4")
    now = x @ fixed.quantized.weight().double().T
    assert bool((fixed.shift == 0).all())
    assert fixed.error == pytest.approx(
        float((now - dense).square().sum(1).mean() / dense.square().sum(1).mean())
    )


def test_inputs_that_never_vary_cost_nothing():
    x, weight = problem(10)
    x[:, 3], x[:, 4] = 0.0, 7.0
    found = gptq.quantize(weight, x.T @ x / len(x), x.mean(0), "int8-dynamic")
    dense, now = x @ weight.T, x @ found.quantized.weight().double().T + found.shift
    assert float((now - dense).square().sum() / dense.square().sum()) < 1e-3


def test_less_is_lost_with_more_bits():
    x, weight = problem(11)
    moments = x.T @ x / len(x), x.mean(0)
    four, eight = (gptq.quantize(weight, *moments, one).error for one in ("int4", "int8-dynamic"))
    assert 0 < eight < four / 30


def test_what_does_not_belong_together_is_refused():
    x, weight = problem(12)
    with pytest.raises(CompressError, match="48 inputs and second moments of 47"):
        gptq.quantize(weight, torch.eye(47), None, "int4")
    for precision, span in (("int8-static", None), ("int4", (0.0, 1.0))):
        with pytest.raises(CompressError, match=f"{precision} with an input range"):
            gptq.quantize(weight, x.T @ x, None, precision, span=span)

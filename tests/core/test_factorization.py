import math

import numpy as np
import pytest
import torch
from support.linear_data import data, near, sound

from compress.core import factorization
from compress.errors import CompressError


@pytest.mark.parametrize("block", [1, 3, 256])
def test_inverses_by_halves_are_inverses(block, monkeypatch):
    monkeypatch.setattr(factorization, "BLOCK", block)
    x, _ = data(0, inputs=11)
    damped = sound(x)
    assert near(damped.factor @ damped.factor.T, damped.matrix)
    inverse = factorization.invert_lower(damped.factor)
    assert near(inverse, torch.linalg.inv(damped.factor))
    assert torch.equal(inverse, inverse.tril())
    found = factorization.invert(damped)
    assert near(found, torch.linalg.inv(damped.matrix))
    assert near(found, found.T, 1e-15)


@pytest.mark.parametrize("seed", range(4))
def test_the_condition_number_is_estimated_within_the_bound_of_row_sums(seed):
    random = np.random.default_rng(seed)
    turn = np.linalg.qr(random.standard_normal((10, 10)))[0]
    size = 10.0 ** random.uniform(-3, 3, 10)
    matrix = (turn * np.logspace(0, -seed * 2 - 1, 10)) @ turn.T
    diagonal = np.sqrt(np.diag(matrix))
    true = np.linalg.cond(matrix / np.outer(diagonal, diagonal))
    scaled = torch.from_numpy(matrix * np.outer(size, size))
    found = factorization._condition(scaled, torch.linalg.cholesky(scaled))
    assert 0.5 * true <= found <= 10 * true


def test_damping_is_relative_to_each_diagonal_entry():
    x, _ = data(outliers=2)
    damped = sound(x, 0.25)
    spread = x.var(0)
    assert near(damped.added, 0.25 * spread)
    assert near(damped.matrix, np.cov(x.T, bias=True) + np.diag(0.25 * spread))
    assert damped.live.all()


@pytest.mark.parametrize(("noise", "steps"), [(1e-1, 0), (1e-6, 1), (0.0, 1)])
def test_a_singular_moment_climbs_the_ladder_until_it_is_sound(noise, steps):
    x, _ = data(0)
    x[:, 7] = x[:, 0] + noise * np.random.default_rng(1).standard_normal(len(x))
    damped = sound(x)
    assert near(damped.added, np.full(8, factorization.LADDER[steps] * x.var(0).mean()))
    size = damped.matrix.diagonal().sqrt()
    assert np.linalg.cond((damped.matrix / torch.outer(size, size)).numpy()) <= factorization.CONDITION


def test_the_ladder_has_further_rungs_and_an_end():
    x, _ = data(0)
    covariance = torch.from_numpy(np.cov(x.T, bias=True))
    mean = float(covariance.diagonal().mean())
    least = float(torch.linalg.eigvalsh(covariance)[0])
    eye = torch.eye(8, dtype=torch.float64)
    for rung in (1, 2, 3):
        # Negative by half of what the rung adds: rounding in a sum of many, or not positive at all.
        shifted = covariance - (least + 0.5 * factorization.LADDER[rung] * mean) * eye
        damped = factorization.damp(shifted, 0.0)
        assert near(damped.added, np.full(8, factorization.LADDER[rung] * float(shifted.diagonal().mean())))
    with pytest.raises(
        CompressError, match=r"moments of 8 inputs are not positive semidefinite, even with 0\.1"
    ):
        factorization.damp(covariance - (least + 0.3 * mean) * eye, 0.0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_moments_that_are_not_finite_are_refused(wrong):
    moment = torch.eye(3, dtype=torch.float64)
    moment[1, 2] = wrong
    with pytest.raises(CompressError, match="NaN or infinity"):
        factorization.damp(moment, 0.1)


def test_a_variance_that_is_rounding_of_a_large_mean_is_no_signal():
    moment = torch.diag(torch.tensor([1e-14, 1e-10, 1.0], dtype=torch.float64))
    scale = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    assert factorization.damp(moment, 0.0, scale).live.tolist() == [False, True, True]
    assert factorization.damp(moment, 0.0).live.tolist() == [True, True, True]

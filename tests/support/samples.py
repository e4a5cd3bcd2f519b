"""Layers for the tests of patterns: correlated inputs with a mean, a weight, their moments."""

import numpy as np
import torch


def layer(seed=0, *, out=8, inputs=16, samples=200, factors=6, mean=1.0, outliers=0):
    """Inputs [samples, in] with heavy correlation and a weight [out, in], as arrays."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((samples, factors)) @ random.standard_normal((factors, inputs))
    x += random.standard_normal((samples, inputs)) * random.uniform(0.2, 1.0, inputs)
    x[:, :outliers] *= 20
    return x + mean * random.standard_normal(inputs), random.standard_normal((out, inputs))


def moments(x):
    """`E[x x^T]` and `E[x]`."""
    x = torch.from_numpy(x)
    return x.T @ x / len(x), x.mean(0)


def variance(x, weight):
    """The mean squared output about its mean."""
    return float((((x - x.mean(0)) @ weight.T) ** 2).sum(1).mean())


def near(found, expected, tolerance=1e-9):
    """Equality of tensors, relative to the size of what is expected."""
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    assert found.shape == expected.shape
    return bool((found - expected).norm() <= tolerance * max(1.0, float(expected.norm())))

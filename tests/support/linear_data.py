"""Correlated inputs of a linear layer, their moments, and comparison of matrices."""

import numpy as np
import torch

from compress.core import factorization

EXACT = 1e-9  # float64 algebra, relative


def data(seed=0, *, inputs=8, out=5, samples=64, factors=3, mean=2.0, outliers=0):
    """Correlated inputs with a mean [samples, in] and a weight [out, in]; some inputs are loud."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((samples, factors)) @ random.standard_normal((factors, inputs))
    x += random.standard_normal((samples, inputs)) * random.uniform(0.2, 1.0, inputs)
    x[:, :outliers] *= 20
    return x + mean * random.standard_normal(inputs), random.standard_normal((out, inputs))


def moments(x):
    """`E[x x^T]` and `E[x]`."""
    x = torch.from_numpy(x)
    return x.T @ x / len(x), x.mean(0)


def sound(x, damping=0.0):
    """The damped, centered moment of the data."""
    second, mean = moments(x)
    return factorization.damp(second - torch.outer(mean, mean), damping, second.diagonal())


def near(found, expected, tolerance=EXACT):
    found, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    return bool((found - expected).norm() <= tolerance * max(1.0, float(expected.norm())))

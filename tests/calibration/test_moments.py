import torch

from compress.calibration.moments import Moments


def test_a_large_mean_costs_no_digits():
    own = Moments()
    rows = torch.randn(4096, 3, generator=torch.Generator().manual_seed(0)) + 1000
    for part in rows.split(100):
        own.add(part)
    found = own.tensors()
    centered = found["second"] - torch.outer(found["mean"], found["mean"])
    exact = torch.cov(rows.double().T, correction=0)
    assert torch.allclose(centered, exact, atol=1e-4)

from itertools import pairwise

import pytest
import torch

from compress.core.budget import annealed, cooled, hard_mask, identity_loss, soft_mask


def scores(count=11, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [3.0, 0.3, 0.01])
@pytest.mark.parametrize("active", [0.5, 4.0, 7.3, 10.9])
def test_the_soft_mask_adds_up_to_its_budget_and_follows_the_scores(temperature, active):
    given = scores()
    mask = soft_mask(given, active, temperature)
    assert abs(float(mask.sum()) - active) < 1e-9
    order = given.argsort()
    assert bool((mask[order].diff() >= 0).all())
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1


def test_the_budget_holds_in_float32():
    mask = soft_mask(scores(400).float(), 300.0, 0.05)
    assert abs(float(mask.sum()) - 300) < 1e-2


def test_the_gradient_is_that_of_the_whole_function():
    given = scores().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_mask(s, 6.5, 0.4), (given,))
    # Raising all scores alike moves nothing.
    total = torch.autograd.grad((soft_mask(given, 6.5, 0.4) * torch.arange(11)).sum(), given)[0].sum()
    assert abs(float(total)) < 1e-12


def test_a_cold_mask_is_the_hard_mask_and_the_ends_are_constant():
    given = scores()
    assert torch.allclose(soft_mask(given, 4.0, 1e-4), hard_mask(given, 4), atol=1e-9)
    assert soft_mask(given, 11, 0.3).tolist() == [1.0] * 11
    assert soft_mask(given, 0, 0.3).tolist() == [0.0] * 11
    for temperature in (1e-8, 1e-3):
        leaf = scores().requires_grad_()
        soft_mask(leaf, 4.0, temperature).square().sum().backward()
        assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("active", [0, 1, 5, 11])
def test_the_hard_mask_keeps_exactly_the_best(active):
    given = scores()
    mask = hard_mask(given, active)
    assert int(mask.sum()) == active
    assert set(mask.tolist()) <= {0.0, 1.0}
    if 0 < active < 11:
        assert given[mask == 1].min() > given[mask == 0].max()
    assert hard_mask(torch.zeros(5), 2).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_schedules_start_end_and_fall():
    budgets = [annealed(p / 10, 40.0, 30.0) for p in range(11)]
    heats = [cooled(p / 10, 0.5, 0.005) for p in range(11)]
    for row, start, end in ((budgets, 40.0, 30.0), (heats, 0.5, 0.005)):
        assert (row[0], row[-1]) == (start, pytest.approx(end))
        assert all(a > b for a, b in pairwise(row))
    assert budgets[1] - 30 == pytest.approx(10 * 0.9**3)
    ratios = [b / a for a, b in pairwise(heats)]
    assert ratios == pytest.approx([ratios[0]] * 10)


def test_the_identity_loss_is_zero_for_orthonormal_parts_alone_and_its_gradient_is_exact():
    generator = torch.Generator().manual_seed(3)
    inward = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64)).Q.T.contiguous()
    outward = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64)).Q
    assert float(identity_loss(inward, outward)) < 1e-25
    assert float(identity_loss(2 * inward, outward)) == pytest.approx(27.0)  # 3 x (4 - 1)^2
    assert float(identity_loss(inward, 2 * outward)) == pytest.approx(27.0)
    leaves = [(inward + 0.1).requires_grad_(), (outward - 0.2).requires_grad_()]
    assert torch.autograd.gradcheck(identity_loss, leaves)
    still = [inward.clone().requires_grad_(), outward.clone().requires_grad_()]
    for gradient in torch.autograd.grad(identity_loss(*still), still):
        assert bool(gradient.isfinite().all())

import itertools

import pytest
import torch
from support import oracles

from compress.core import scores


def test_scores_equal_loops_over_units():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator)
    second = torch.rand(12, generator=generator)
    ones = torch.ones(12)
    expected = torch.tensor(oracles.unit_energy(weight.tolist(), second.tolist(), 3))
    assert torch.allclose(scores.wanda(weight, second, 3), expected)
    plain = torch.tensor(oracles.unit_energy(weight.tolist(), ones.tolist(), 3))
    assert torch.allclose(scores.magnitude(weight, 3), plain)
    assert torch.allclose(scores.taylor(second, 4), second.reshape(3, 4).sum(1))


def test_wanda_is_the_output_that_a_unit_carries_alone():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    x = torch.randn(64, 8, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 8)
    carried = [float((x[:, [u]] @ weight[:, [u]].T).square().sum(1).mean()) for u in range(8)]
    assert scores.wanda(weight, x.square().mean(0), 1).tolist() == pytest.approx(carried)


def test_taylor_ranks_units_by_the_loss_that_zeroing_their_inputs_costs():
    # A linear loss, where the first order is all there is.
    generator = torch.Generator().manual_seed(2)
    slope = torch.randn(6, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    (x @ slope).sum().backward()
    gradient = (x.detach() * x.grad).square().mean(0)
    costs = []
    for unit in range(6):
        without = x.detach().clone()
        without[:, unit] = 0
        costs.append(float(((x.detach() - without) @ slope).square().mean()))
    assert scores.taylor(gradient, 1).tolist() == pytest.approx(costs)


def test_size_alone_misjudges_a_loud_input_and_wanda_does_not():
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    second = torch.tensor([100.0, 4.0, 1.0])
    assert scores.best(scores.magnitude(weight, 1), 1).tolist() == [2]
    assert scores.best(scores.wanda(weight, second, 1), 1).tolist() == [0]


def test_best_keeps_the_largest_in_order_and_nothing_when_none_is_wanted():
    score = torch.tensor([0.5, 3.0, 3.0, 1.0])
    assert scores.best(score, 3).tolist() == [1, 2, 3]
    assert scores.best(score, 1).tolist() == [1]
    assert scores.best(score, 0).tolist() == []
    assert scores.best(score, 4).tolist() == [0, 1, 2, 3]


def test_best_is_the_set_of_the_largest_sum_and_grows_by_one():
    score = torch.rand(8, generator=torch.Generator().manual_seed(3))
    for count in range(8):
        kept = scores.best(score, count).tolist()
        most = max(sum(score[list(some)].tolist()) for some in itertools.combinations(range(8), count))
        assert sum(score[kept].tolist()) == pytest.approx(most)
        assert set(kept) < set(scores.best(score, count + 1).tolist())


def test_equal_scores_keep_the_lowest_units():
    assert scores.best(torch.zeros(500), 7).tolist() == list(range(7))

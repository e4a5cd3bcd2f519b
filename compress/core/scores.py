"""Importance of units without second order: the baselines that removal with compensation must beat.

Shapes: a writer's weight is [out, units * width]; a score is [units], and larger scores are kept.
"""

from torch import Tensor


def magnitude(weight: Tensor, width: int) -> Tensor:
    """Squared norm of the columns of every unit.

    >>> magnitude(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), 1).tolist()
    [25.0, 1.0]
    """
    return _per_unit(weight.square().sum(0), width)


def wanda(weight: Tensor, second: Tensor, width: int) -> Tensor:
    """Squared columns times the second moment [in] of their inputs (Sun et al., arXiv 2306.11695).

    >>> wanda(torch.tensor([[1.0, 2.0]]), torch.tensor([9.0, 1.0]), 1).tolist()
    [9.0, 4.0]
    """
    return _per_unit(weight.square().sum(0) * second, width)


def taylor(gradient: Tensor, width: int) -> Tensor:
    """Mean squared first-order change of the loss when an input is zeroed (Molchanov et al., 1906.10771).

    `gradient` [in] is the mean over samples of `(sum over tokens of x dL/dx)^2`; the columns of one
    unit are summed.

    >>> taylor(torch.tensor([1.0, 2.0, 3.0, 4.0]), 2).tolist()
    [3.0, 7.0]
    """
    return _per_unit(gradient, width)


def _per_unit(columns: Tensor, width: int) -> Tensor:
    return columns.reshape(-1, width).sum(1)


def best(score: Tensor, count: int) -> Tensor:
    """The `count` units with the highest scores, ascending; ties go to the lower unit.

    >>> best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist()
    [1, 3]
    """
    return score.argsort(descending=True, stable=True)[:count].sort().values

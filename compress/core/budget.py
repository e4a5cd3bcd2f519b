"""A soft mask with an exact budget, its schedule, and the loss that keeps a hybrid identity a rotation.

Pruning-aware tuning (PAT, arXiv 2408.14721) lets a penalty pull the number of open channels to its target,
which it may miss. Here the sigmoid's threshold is solved for, so that the mask adds up to the budget at
every step; the gradient passes through the threshold as through any implicit function.
"""

import torch
from torch import Tensor

HALVINGS = 60
SATURATED = 40.0  # a sigmoid is 0 or 1 to the last digit of a double this far out


def soft_mask(scores: Tensor, active: float, temperature: float) -> Tensor:
    """[k] in [0, 1], `sigmoid((scores - t) / temperature)` with t such that the sum is `active`.

    Args:
        scores: [k]; a higher score opens a channel earlier.
        active: between 0 and k; at either end the mask is constant and has no gradient.
        temperature: positive; toward 0 the mask becomes `hard_mask`.

    >>> soft_mask(torch.tensor([1.0, 1.0, 1.0, 1.0]), 3.0, 0.5).tolist()
    [0.75, 0.75, 0.75, 0.75]
    """
    if active >= len(scores):
        return torch.ones_like(scores)
    if active <= 0:
        return torch.zeros_like(scores)
    fixed = scores.detach().double()
    low = fixed.min() - SATURATED * temperature
    high = fixed.max() + SATURATED * temperature
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = torch.sigmoid((fixed - middle) / temperature).sum() > active
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    threshold = ((low + high) / 2).to(scores.dtype)
    # One Newton step: it moves the value by rounding alone, and gives the derivative of the root.
    mask = torch.sigmoid((scores - threshold) / temperature)
    slope = (mask * (1 - mask)).sum().detach() / temperature
    root = threshold + (mask.sum() - active) / slope.clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.sigmoid((scores - root) / temperature)


def hard_mask(scores: Tensor, active: int) -> Tensor:
    """[k] of 0 and 1: the `active` channels of highest score; of equal ones the first.

    >>> hard_mask(torch.tensor([0.0, 2.0, 0.0]), 2).tolist()
    [1.0, 1.0, 0.0]
    """
    order = scores.detach().sort(descending=True, stable=True).indices
    mask = torch.zeros_like(scores)
    mask[order[:active]] = 1
    return mask.detach()


def annealed(progress: float, start: float, end: float) -> float:
    """From `start` to `end` as `progress` goes from 0 to 1: fast at first, cubic (arXiv 1710.01878).

    >>> annealed(0.0, 8.0, 6.0), annealed(0.5, 8.0, 6.0), annealed(1.0, 8.0, 6.0)
    (8.0, 6.25, 6.0)
    """
    return end + (start - end) * (1 - progress) ** 3


def cooled(progress: float, start: float, end: float) -> float:
    """A temperature that falls by the same factor in every step.

    >>> cooled(0.0, 1.0, 0.01), cooled(0.5, 1.0, 0.01)
    (1.0, 0.1)
    """
    return float(start * (end / start) ** progress)


def identity_loss(inward: Tensor, outward: Tensor) -> Tensor:
    """How far the rows of `inward` [r, k] and the columns of `outward` [k, r] are from orthonormal.

    The squared Frobenius norms: the norm itself, as in the paper, has no gradient where it is 0, which is
    where training starts.
    """
    own = torch.eye(len(inward), dtype=inward.dtype, device=inward.device)
    rows, columns = inward @ inward.T - own, outward.T @ outward - own
    return rows.square().sum() + columns.square().sum()

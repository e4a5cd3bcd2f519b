"""Damped second moments: a Cholesky factor that is accurate enough, and the inverse from it.

Everything is float64. A diagonal entry is damped relative to itself; if the factor is singular or badly
conditioned, shares of the mean diagonal are added until it is not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError

RESOLUTION = 1e-12  # variance over second moment below which an input is a constant, not a signal
CONDITION = 1e8  # above it half of float64's digits are gone
LADDER = (0.0, 1e-4, 1e-2, 1e-1)  # of the mean diagonal, added in turn until the factor is sound
BLOCK = 256  # triangles up to this size are inverted by substitution


@dataclass(frozen=True)
class Damped:
    """A second moment that can be factorized: `matrix = factor factor^T`, lower triangular.

    `added` [in] is what the diagonal gained; `live` [in] is False where the input never varies:
    such a column of the matrix is that of the identity.
    """

    matrix: Tensor
    factor: Tensor
    added: Tensor
    live: Tensor


def _condition(matrix: Tensor, factor: Tensor) -> float:
    """An estimate of the condition number, inputs rescaled to one size (scaling costs no digits).

    The largest eigenvalue is bounded by the largest row sum, the smallest approached by inverse
    iteration from a fixed start.
    """
    size = matrix.diagonal().sqrt()
    largest = float(((matrix.abs() @ (1 / size)) / size).max())
    probe = torch.linspace(1, 2, len(size), dtype=matrix.dtype).cos()[:, None]
    growth = 1.0
    for _ in range(6):
        probe = probe / probe.norm()
        probe = size[:, None] * torch.cholesky_solve(size[:, None] * probe, factor)
        growth = float(probe.norm())
    return largest * growth


def damp(moment: Tensor, damping: float, scale: Tensor | None = None) -> Damped:
    """Make a second moment safely invertible.

    `damping * diag` is added, then more of the mean diagonal until the factorization holds and the
    condition number is at most 1e8. An input that never varies gets 1 on the diagonal.

    Args:
        moment: [in, in], symmetric, positive semidefinite up to rounding.
        damping: relative to each diagonal entry.
        scale: [in] second moments about zero; a variance of 1e-12 of them is rounding, not signal.

    Raises:
        CompressError: the moment is not finite, or is no second moment.

    >>> damp(torch.tensor([[4.0, 0.0], [0.0, 0.0]], dtype=torch.float64), 0.5).matrix.tolist()
    [[6.0, 0.0], [0.0, 1.0]]
    """
    diagonal = moment.diagonal()
    if not bool(torch.isfinite(moment).all()):
        raise CompressError(
            "the second moments of the inputs hold NaN or infinity; check the model on this data"
        )
    live = diagonal > RESOLUTION * (diagonal if scale is None else scale)
    spread = torch.where(live, diagonal, 0.0)
    mean = float(spread.sum() / live.sum().clamp(min=1))
    for share in LADDER:
        added = torch.where(live, damping * diagonal + share * mean, 0.0)
        matrix = torch.where(live[:, None] & live, moment, 0.0)
        matrix.diagonal().copy_(torch.where(live, diagonal + added, 1.0))
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) == 0 and _condition(matrix, factor) <= CONDITION:
            return Damped(matrix, factor, added, live)
    raise CompressError(
        f"the second moments of {len(diagonal)} inputs are not positive semidefinite, even with "
        f"{LADDER[-1]:g} of their mean on the diagonal; collect the statistics again"
    )


def invert_lower(factor: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, by halves: mostly matrix products.

    >>> invert_lower(torch.tensor([[2.0, 0.0], [1.0, 4.0]])).tolist()
    [[0.5, 0.0], [-0.125, 0.25]]
    """
    size = len(factor)
    if size <= BLOCK:
        small: Tensor = torch.linalg.solve_triangular(
            factor, torch.eye(size, dtype=factor.dtype), upper=False
        )
        return small
    half = size // 2
    inverse = torch.zeros_like(factor)
    inverse[:half, :half] = invert_lower(factor[:half, :half])
    inverse[half:, half:] = invert_lower(factor[half:, half:])
    inverse[half:, :half] = inverse[half:, half:] @ (factor[half:, :half] @ inverse[:half, :half])
    inverse[half:, :half].neg_()
    return inverse


def _gram(lower: Tensor) -> Tensor:
    """`lower^T lower` of a lower triangular matrix, by halves: a third of the plain product."""
    size = len(lower)
    if size <= BLOCK:
        return lower.T @ lower
    half = size // 2
    below, right = lower[half:, :half], lower[half:, half:]
    product = torch.empty_like(lower)
    product[:half, :half] = _gram(lower[:half, :half]).addmm_(below.T, below)
    product[half:, :half] = right.T @ below
    product[:half, half:] = product[half:, :half].T
    product[half:, half:] = _gram(right)
    return product


def invert(damped: Damped) -> Tensor:
    """The inverse of a damped second moment [in, in], symmetric to the last digits."""
    return _gram(invert_lower(damped.factor))

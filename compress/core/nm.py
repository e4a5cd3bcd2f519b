"""N:M sparsity, 2:4 above all: second-order masks, weights that make up for them, and the packed form.

A sweep over the columns, as in SparseGPT: with `H^-1 = U^T U` (U upper triangular) the inverse of what is
right of column j is `U[j:, j:]^T U[j:, j:]`, so that one factor serves every row whatever it removed.
SparseGPT ranks the weights of a group by `w^2 / U_jj^2` and lets only later columns make up. `solve`
weighs every choice of a group exactly, `w_P ((H^-1)_PP)^-1 w_P^T` (six of them at 2:4), and lets the kept
weights of the group move too. The compensated weights are kept, and where it is affordable each row is
refitted on its support at the end.

References: Frantar, Alistarh, "SparseGPT", arXiv 2301.00774; Sun et al., "Wanda", arXiv 2306.11695; Mishra et
al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378.
"""

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from compress.core import factorization
from compress.core.support import NM, Free, Layer, affordable, restricted
from compress.errors import CompressError

BLOCK = 128  # columns that a sweep without groups decides on at once


@dataclass(frozen=True)
class Sparse:
    """A weight with zeros in place.

    Attributes:
        values: [out, in] float64.
        mask: [out, in] bool, what may differ from zero.
        shift: [out] what to add to the bias.
        error: added squared output error, relative to the dense output about its mean.
    """

    values: Tensor
    mask: Tensor
    shift: Tensor
    error: float


def judged(layer: Layer, values: Tensor, mask: Tensor) -> Sparse:
    """A solution with its shift and its error."""
    return Sparse(values, mask, layer.shift(values), layer.error(values))


# Masks without compensation: the baselines


def magnitude(layer: Layer, pattern: NM | Free) -> Sparse:
    """The largest weights as they are."""
    mask = pattern.mask(layer.signal.square())
    return judged(layer, torch.where(mask, layer.signal, 0.0), mask)


def wanda(layer: Layer, pattern: NM | Free) -> Sparse:
    """The weights that carry most output each, as they are."""
    mask = pattern.mask(layer.signal.square() * layer.damped.matrix.diagonal())
    return judged(layer, torch.where(mask, layer.signal, 0.0), mask)


# Sweeps with compensation


def upper(damped: factorization.Damped) -> Tensor:
    """U, upper triangular, with `U^T U` the inverse of the damped second moment [in, in]."""
    reverse: Tensor = torch.linalg.cholesky(damped.matrix.flip(0, 1))
    return factorization.invert_lower(reverse).flip(0, 1)


def sparsegpt(layer: Layer, pattern: NM | Free) -> Sparse:
    """SparseGPT as published: `w^2 / U_jj^2` decides, later columns make up.

    With single weights anywhere (`Free`) it decides on 128 columns of all rows at once.
    """
    factor = upper(layer.damped)
    values = layer.signal.clone()
    width = values.shape[1]
    step = pattern.m if isinstance(pattern, NM) else BLOCK
    masks = []
    for start in range(0, width, step):
        end = min(start + step, width)
        mask = pattern.mask(values[:, start:end].square() / factor.diagonal()[start:end].square())
        errors = torch.zeros_like(values[:, start:end])
        for column in range(start, end):
            lost = torch.where(mask[:, column - start], 0.0, values[:, column]) / factor[column, column]
            values[:, column:end].addr_(lost, factor[column, column:end], alpha=-1)
            errors[:, column - start] = lost
        values[:, start:end].masked_fill_(~mask, 0.0)
        values[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
        masks.append(mask)
    return judged(layer, values, torch.cat(masks, 1))


def solve(layer: Layer, pattern: NM = NM(), *, refit: bool | None = None) -> Sparse:  # noqa: B008
    """Second-order N:M: the exact choice in every group, all that is not decided yet makes up.

    Args:
        layer: what is matched (`core.support.prepare`).
        pattern: how many of how many adjacent inputs stay.
        refit: solve every row on its support at the end; None where that is affordable.

    >>> from compress.core.support import prepare
    >>> layer = prepare(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), torch.eye(4), torch.zeros(4))
    >>> solve(layer).values.round(decimals=9).tolist()
    [[0.0, 4.0, 3.0, 0.0]]
    """
    values, mask, _ = sweep(layer, pattern)
    if refit or (refit is None and affordable(mask)):
        values = restricted(layer.signal, layer.damped.matrix, mask)
    return judged(layer, values, mask)


def sweep(layer: Layer, pattern: NM) -> tuple[Tensor, Tensor, float]:
    """Compensated weight, mask, and the damped squared error that the choices added up to."""
    factor = upper(layer.damped)
    values = layer.signal.clone()
    mask = torch.zeros_like(values, dtype=torch.bool)
    pattern.mask(values[:1])  # refuses what is no pattern of this width
    choices = list(combinations(range(pattern.m), pattern.m - pattern.n))
    total = 0.0
    for start in range(0, values.shape[1], pattern.m):
        end = start + pattern.m
        own = factor[start:end, start:end]
        pushed, keep, cost = _decide(values[:, start:end], own.T @ own, choices)
        total += cost
        values[:, start:].addmm_(pushed @ own.T, factor[start:end, start:], alpha=-1)
        values[:, start:end].masked_fill_(~keep, 0.0)
        mask[:, start:end] = keep
    return values, mask, total


def _decide(group: Tensor, inverse: Tensor, choices: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, float]:
    """The cheapest removal in one group [out, m], of the `choices` of columns, for every row.

    Returns `w_P ((H^-1)_PP)^-1` [out, m] in place, what stays [out, m] bool, and the summed cost.
    """
    pushed = torch.zeros(len(choices), *group.shape, dtype=group.dtype)
    costs = torch.zeros(len(choices), len(group), dtype=group.dtype)
    keeps = torch.ones(len(choices), group.shape[1], dtype=torch.bool)
    for number, choice in enumerate(choices):
        gone = list(choice)
        part = group[:, gone]
        solved = torch.linalg.solve(inverse[gone][:, gone], part.T).T
        pushed[number][:, gone] = solved
        costs[number] = (solved * part).sum(1)
        keeps[number, gone] = False
    least, chosen = costs.min(0)
    return pushed[chosen, torch.arange(len(group))], keeps[chosen], float(least.sum())


# The packed form of 2:4


def pack(values: Tensor) -> tuple[Tensor, Tensor]:
    """2:4 weights as stored: the kept values [out, in / 2] and two bits of position for each.

    The positions [out, in / 8] are uint8: four bits a group, the even group in the low half, in each
    the lower column in the low bits. A group with fewer than two non-zeros stores zeros.

    Raises:
        CompressError: a group has more than two non-zeros, or `in` is not a multiple of 8.

    >>> packed, positions = pack(torch.tensor([[0.0, 5.0, 0.0, 6.0, 7.0, 0.0, 0.0, 0.0]]))
    >>> packed.tolist(), [f"{byte:08b}" for byte in positions[0].tolist()]
    ([[5.0, 6.0, 7.0, 0.0]], ['01001101'])
    """
    rows, columns = values.shape
    if columns % 8:
        raise CompressError(f"2:4 is packed 8 inputs at a time, but the weight is [{rows}, {columns}]")
    groups = values.reshape(rows, columns // 4, 4)
    most = int((groups != 0).sum(2).max()) if values.numel() else 0
    if most > 2:
        raise CompressError(f"a group of 4 holds {most} non-zeros; 2:4 allows 2, so prune the weight first")
    place = (groups == 0).to(torch.uint8).argsort(dim=2, stable=True)[..., :2].sort(dim=2).values
    kept = groups.gather(2, place).reshape(rows, columns // 2)
    code = place[..., 0] | place[..., 1] << 2  # four bits a group
    return kept, (code[:, 0::2] | code[:, 1::2] << 4).to(torch.uint8)


def unpack(packed: Tensor, positions: Tensor) -> Tensor:
    """The weight [out, in] with zeros in place, from its packed form."""
    rows, half = packed.shape
    code = torch.stack([positions & 15, positions >> 4], 2).reshape(rows, half // 2).long()
    place = torch.stack([code & 3, code >> 2], 2)  # [out, in / 4, 2]
    full = packed.new_zeros(rows, half // 2, 4)
    return full.scatter_(2, place, packed.reshape(rows, half // 2, 2)).reshape(rows, 2 * half)


def stored_bytes(shape: tuple[int, int], item_bytes: int) -> int:
    """Bytes of a 2:4 weight [out, in]: half the values and half a byte for every group of four.

    >>> stored_bytes((1, 64), 2), 1 * 64 * 2
    (72, 128)
    """
    weights = shape[0] * shape[1]
    return weights // 2 * item_bytes + weights // 8

"""What every pattern of zeros shares: the layer to be matched, which weights may stay, the refit on them.

A layer is `y = W x + b` with `W` [out, in], judged by `tr(D H D^T)`: `D` is the change of `W`, `H` the
centered second moment of `x`; the mean goes into the bias. As in `core.obs`, damping is relative to
each diagonal entry and pulls towards the original weights, so that changing nothing costs nothing, and
the error that is stated is undamped and relative: 0 is lossless, 1 is all gone with the mean kept.

A support is `mask` [groups, in]: the rows of one group (`out / groups` adjacent rows) keep the same
inputs. A pattern of single weights has groups of one row, blocks have as many rows as a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core import factorization
from compress.errors import CompressError

STEPS = 10  # of conjugate gradients, where that replaces a factorization a row
TINY = 1e-300  # keeps 0/0 out of a row that has converged


@dataclass(frozen=True)
class Layer:
    """One linear map and the moments of its inputs, float64, ready to be matched.

    Attributes:
        original: [out, in] the weight.
        signal: the weight with zeros where an input never varies: those live on in the bias alone.
        mean: [in] `E[x]`.
        centered: [in, in] `E[(x - mu)(x - mu)^T]`.
        damped: the same made safely invertible: the metric that solutions minimize.
        energy: squared output about its mean, the unit of `error`.
    """

    original: Tensor
    signal: Tensor
    mean: Tensor
    centered: Tensor
    damped: factorization.Damped
    energy: float

    def error(self, values: Tensor) -> float:
        """The added squared output error of `values` [out, in], relative to the dense output."""
        change = values - self.signal
        lost = float(((change @ self.centered) * change).sum())
        return max(0.0, lost) / self.energy if self.energy > 0 else 0.0

    def shift(self, values: Tensor) -> Tensor:
        """What to add to the bias [out], so that the mean output stays."""
        return (self.original - values) @ self.mean


def prepare(weight: Tensor, second: Tensor, mean: Tensor, damping: float = 1e-2) -> Layer:
    """A layer from its weight [out, in] and the moments `E[x x^T]` [in, in] and `E[x]` [in].

    Raises:
        CompressError: the shapes do not belong together, or the moments are none.

    >>> layer = prepare(torch.tensor([[3.0, 4.0]]), torch.eye(2), torch.zeros(2))
    >>> round(layer.error(torch.tensor([[0.0, 4.0]])), 9)
    0.36
    """
    if weight.ndim != 2 or second.shape != (weight.shape[1],) * 2 or mean.shape != weight.shape[1:]:
        raise CompressError(
            f"a weight {list(weight.shape)}, second moments {list(second.shape)} and a mean "
            f"{list(mean.shape)} are not of one layer; this is a mistake in the site"
        )
    full, mean = weight.double(), mean.double()
    centered = second.double() - torch.outer(mean, mean)
    damped = factorization.damp(centered, damping, second.double().diagonal())
    signal = torch.where(damped.live, full, 0.0)
    energy = float(((signal @ centered) * signal).sum())
    return Layer(full, signal, mean, centered, damped, energy)


# Patterns: which weights may stay, by a score that adds up over what a unit of the pattern holds


@dataclass(frozen=True)
class NM:
    """At most `n` weights in every `m` adjacent inputs of each row; 2:4 is what hardware runs."""

    n: int = 2
    m: int = 4

    def mask(self, score: Tensor) -> Tensor:
        """[out, in] bool: the `n` best of every `m`; ties go to the lower column.

        >>> NM(2, 4).mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]])).tolist()
        [[False, True, True, False]]
        """
        if not 1 <= self.n <= self.m:
            raise CompressError(f"{self.n}:{self.m} is no pattern: need 1 <= n <= m, for example 2:4")
        rows, columns = score.shape
        if columns % self.m:
            raise CompressError(
                f"{self.n}:{self.m} needs inputs in groups of {self.m}, but this weight is "
                f"[{rows}, {columns}]; leave the layer dense"
            )
        groups = score.reshape(rows, columns // self.m, self.m)
        order = groups.argsort(dim=-1, descending=True, stable=True)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., : self.n], True)
        return keep.reshape(rows, columns)


@dataclass(frozen=True)
class Block:
    """Every group of `rows` rows keeps the same number of blocks of `columns` inputs: balanced blocks."""

    rows: int
    columns: int
    density: float

    def mask(self, score: Tensor) -> Tensor:
        """[out / rows, in] bool: the best blocks of each group by summed score."""
        groups, blocks = grid(score.shape, (self.rows, self.columns))
        total = score.reshape(groups, self.rows, blocks, self.columns).sum((1, 3))
        chosen = best(total, quota(blocks, self.density))
        keep = torch.zeros(groups, blocks, dtype=torch.bool).scatter_(1, chosen, True)
        return keep.repeat_interleave(self.columns, 1)


@dataclass(frozen=True)
class Free:
    """Single weights anywhere: `round(density * out * in)` of them, the best of the whole layer."""

    density: float

    def mask(self, score: Tensor) -> Tensor:
        """[out, in] bool; ties go to the earlier weight."""
        keep = torch.zeros(score.numel(), dtype=torch.bool)
        keep[score.flatten().argsort(descending=True, stable=True)[: quota(len(keep), self.density)]] = True
        return keep.reshape(score.shape)


Pattern = NM | Block | Free


def grid(weight: Sequence[int], shape: tuple[int, int]) -> tuple[int, int]:
    """How many groups of rows and blocks of columns a weight of shape [out, in] divides into.

    Raises:
        CompressError: the block does not divide the weight.

    >>> grid((64, 384), (32, 128))
    (2, 3)
    """
    (out, inner), (rows, columns) = weight, shape
    if rows < 1 or columns < 1 or out % rows or inner % columns:
        raise CompressError(
            f"blocks of {rows}x{columns} do not tile a weight of [{out}, {inner}]: it leaves "
            f"{out % max(rows, 1)} rows and {inner % max(columns, 1)} columns; choose divisors of both"
        )
    return out // rows, inner // columns


def quota(count: int, density: float) -> int:
    """How many of `count` stay: the nearest whole number, halves up.

    Raises:
        CompressError: nothing would stay, or more than all.

    >>> quota(10, 0.25)
    3
    """
    kept = math.floor(density * count + 0.5)
    if not 1 <= kept <= count:
        raise CompressError(
            f"a density of {density:g} keeps {kept} of {count}; it must keep at least one and at most all"
        )
    return kept


def best(score: Tensor, count: int) -> Tensor:
    """The `count` best of every row of `score` [groups, n], ascending; ties go to the lower one.

    >>> best(torch.tensor([[1.0, 3.0, 2.0]]), 2).tolist()
    [[1, 2]]
    """
    return score.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


def spread(mask: Tensor, out: int) -> Tensor:
    """The support [out, in] of every row, from that of its group [groups, in]."""
    return mask.repeat_interleave(out // len(mask), 0)


# Least squares on a support


def restricted(target: Tensor, metric: Tensor, mask: Tensor) -> Tensor:
    """The exact minimum of `tr((T - S) H (T - S)^T)` over `S` [out, in] that is zero off the support.

    One factorization for every group of rows: the cost is a third of the cube of what a row keeps,
    for every group.

    Args:
        target: [out, in] T.
        metric: [in, in] H, positive definite.
        mask: [groups, in] bool.

    >>> metric = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> restricted(torch.tensor([[1.0, 1.0]]), metric, torch.tensor([[True, False]])).tolist()
    [[1.5, 0.0]]
    """
    found = torch.zeros_like(target)
    height = len(target) // len(mask)
    wanted = target @ metric
    for group, inside in enumerate(mask):
        kept = inside.nonzero()[:, 0]
        if len(kept):
            rows = slice(group * height, (group + 1) * height)
            factor = torch.linalg.cholesky(metric[kept][:, kept])
            found[rows, kept] = torch.cholesky_solve(wanted[rows, kept].T, factor).T
    return found


def affordable(mask: Tensor, most: float = 1e11) -> bool:
    """Whether a factorization for every group of a support takes at most `most` operations."""
    return float(mask.sum(1).double().pow(3).sum()) / 3 <= most


def approached(target: Tensor, metric: Tensor, mask: Tensor, start: Tensor, steps: int = STEPS) -> Tensor:
    """`restricted` by conjugate gradients from `start`: never worse than it, near the exact minimum.

    All rows step at once, so the cost is `steps` products with `metric`: what is affordable where
    a factorization for every row is not. `mask` is [groups, in], `start` zero off the support. The metric
    should have a diagonal near one.
    """
    inside = spread(mask, len(target)).to(target.dtype)
    found = start.clone()
    residual = ((target - found) @ metric) * inside
    direction = residual.clone()
    size = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ metric) * inside
        length = size / (direction * image).sum(1, keepdim=True).clamp(min=TINY)
        found += length * direction
        residual -= length * image
        now = residual.square().sum(1, keepdim=True)
        direction = residual + (now / size.clamp(min=TINY)) * direction
        size = now
    return found

"""Block sparsity: whole blocks of a weight go, the rest of their rows makes up for it.

A weight [out, in] is tiled into blocks of `shape = (R, C)`. Every group of R rows keeps the same number
of blocks ("balanced"), so that the layer runs as one gather of inputs and one batched product of
`[groups, R, kept * C]`, without a sparse kernel.

Rows of different groups share no zeros, and the output error is a sum over rows. So each group is a
problem of its own: ZipLM's removal of units (`core.obs`) with the C columns of a block as the unit and
the R rows of the group as the map. For the removed columns S of group r the others change by
`-W_r,S ((H^-1)_SS)^-1 (H^-1)_S,:`. Blocks leave one at a time, cheapest first; what is kept is refitted
exactly at the end, for all densities from one factorization of each group.

LPViT ranks blocks by a Taylor expansion of the loss instead. `fisher` is that saliency as its paper means it,
with what its code gets wrong put right: a gradient for every sample (averaged gradients of opposite
sign cancel), of the loss and not of the output's energy, first and second order in one unit, and used for
the ranking. `fit` refits the blocks that any such score keeps.

References: Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", arXiv 2407.02068;
Kurtic, Frantar, Alistarh, "ZipLM", arXiv 2302.04089.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core import factorization, obs
from compress.core.support import Layer, best, grid, prepare, quota, restricted
from compress.errors import CompressError

INDEX_BYTES = 4  # of a block's position, int32

Shape = tuple[int, int]


@dataclass(frozen=True)
class Blocks:
    """A weight with blocks of zeros in place.

    Attributes:
        values: [out, in] float64, zero where a block is gone.
        kept: [groups, kept] int64, ascending: which blocks of inputs each group of rows still reads.
        shift: [out] what to add to the bias.
        error: added squared output error, relative to the dense output about its mean.
    """

    values: Tensor
    kept: Tensor
    shift: Tensor
    error: float


# Selection with compensation


def sweep(
    weight: Tensor,
    second: Tensor,
    mean: Tensor,
    shape: Shape,
    densities: Sequence[float],
    *,
    damping: float = 1e-2,
) -> Iterator[Blocks]:
    """Every density asked for, ascending, from one sweep; kept blocks are nested.

    Args:
        weight: [out, in].
        second: [in, in] `E[x x^T]`, not centered.
        mean: [in] `E[x]`.
        shape: rows and columns of a block; they divide `out` and `in`.
        densities: shares of the blocks that stay, of each group the nearest whole number.
        damping: relative to each diagonal entry of the centered second moment.

    Raises:
        CompressError: blocks do not tile the weight, or a density keeps no block.
    """
    layer = prepare(weight, second, mean, damping)
    groups, blocks = grid(weight.shape, shape)
    counts = sorted({quota(blocks, density) for density in densities})
    values = [torch.zeros_like(layer.original) for _ in counts]
    chosen: list[list[Tensor]] = [[] for _ in counts]
    inverse = factorization.invert(layer.damped)
    for group in range(groups):
        rows = slice(group * shape[0], (group + 1) * shape[0])
        part = layer.signal[rows]
        order = obs.removal_order(part, inverse, counts, width=shape[1], group=0.0)
        levels = obs.resolve(part, layer.damped, order, counts, shape[1])
        for level, (kept, fitted, _) in enumerate(levels):
            values[level][rows, obs.columns(kept, shape[1])] = fitted
            chosen[level].append(kept)
    for fitted, places in zip(values, chosen, strict=True):
        yield Blocks(fitted, torch.stack(places), layer.shift(fitted), layer.error(fitted))


def solve(
    weight: Tensor,
    second: Tensor,
    mean: Tensor,
    shape: Shape,
    density: float,
    *,
    damping: float = 1e-2,
) -> Blocks:
    """Second-order removal of blocks at one density; see `sweep` for several at the price of one.

    >>> eye = torch.eye(4, dtype=torch.float64)
    >>> found = solve(torch.tensor([[1.0, 1.0, 2.0, 0.0]]), eye, torch.zeros(4), (1, 2), 0.5)
    >>> found.kept.tolist(), found.values.tolist(), round(found.error, 9)
    ([[1]], [[0.0, 0.0, 2.0, 0.0]], 0.333333333)
    """
    return next(sweep(weight, second, mean, shape, [density], damping=damping))


def fit(
    weight: Tensor, second: Tensor, mean: Tensor, shape: Shape, kept: Tensor, *, damping: float = 1e-2
) -> Blocks:
    """The exact refit of blocks that were chosen otherwise, `kept` [groups, count] ascending."""
    layer = prepare(weight, second, mean, damping)
    return _judged(layer, restricted(layer.signal, layer.damped.matrix, _columns(layer, shape, kept)), kept)


def cut(weight: Tensor, second: Tensor, mean: Tensor, shape: Shape, kept: Tensor) -> Blocks:
    """The blocks in `kept` as they are, all others zero, only the mean made up for: the baseline."""
    layer = prepare(weight, second, mean)
    mask = _columns(layer, shape, kept).repeat_interleave(shape[0], 0)
    return _judged(layer, torch.where(mask, layer.signal, 0.0), kept)


def _judged(layer: Layer, values: Tensor, kept: Tensor) -> Blocks:
    return Blocks(values, kept, layer.shift(values), layer.error(values))


def _columns(layer: Layer, shape: Shape, kept: Tensor) -> Tensor:
    """[groups, in] bool: the columns of the kept blocks."""
    groups, blocks = grid(layer.original.shape, shape)
    if len(kept) != groups or not 0 <= int(kept.min()) <= int(kept.max()) < blocks:
        raise CompressError(
            f"kept blocks {list(kept.shape)} up to {int(kept.max())} are asked for, but blocks of "
            f"{shape[0]}x{shape[1]} make {groups} groups of {blocks}"
        )
    mask = torch.zeros(groups, blocks, dtype=torch.bool).scatter_(1, kept, True)
    return mask.repeat_interleave(shape[1], 1)


# Scores without compensation: [groups, blocks], larger is kept


def magnitude(weight: Tensor, shape: Shape) -> Tensor:
    """Squared norm of every block.

    >>> magnitude(torch.tensor([[1.0, 2.0, 3.0, 0.0]]), (1, 2)).tolist()
    [[5.0, 9.0]]
    """
    return _tiles(weight.square(), shape).sum((1, 3))


def wanda(weight: Tensor, second: Tensor, shape: Shape) -> Tensor:
    """Squared weights times the second moment [in] of their inputs, summed over every block."""
    return _tiles(weight.square() * second, shape).sum((1, 3))


def fisher(weight: Tensor, gradients: Iterable[Tensor], shape: Shape) -> Tensor:
    """What the loss is expected to gain when a block goes: `1/2 E[(g_B . w_B)^2]` over samples.

    This is `1/2 w_B^T F_BB w_B` with the exact diagonal block of the empirical Fisher matrix.
    `gradients` are those of one sample's loss with respect to the weight [out, in], one after another.

    >>> gradients = [torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 2.0]])]
    >>> fisher(torch.tensor([[2.0, 1.0]]), gradients, (1, 1)).tolist()
    [[2.0, 1.0]]
    """
    each = [effects(weight, gradient, shape) for gradient in gradients]
    return pooled(torch.stack(each), (1, 1)) if each else torch.zeros(grid(weight.shape, shape)).double()


def effects(weight: Tensor, gradient: Tensor, tile: Shape) -> Tensor:
    """To first order what a loss loses when a tile goes: the sum of `g w` over it, [out / R, in / C] float64.

    >>> effects(torch.tensor([[2.0, 1.0]]), torch.tensor([[-1.0, 2.0]]), (1, 2)).tolist()
    [[0.0]]
    """
    return _tiles(weight.double() * gradient.double(), tile).sum((1, 3))


def pooled(each: Tensor, shape: Shape) -> Tensor:
    """`fisher` from the `effects` [samples, rows, columns] of every sample; a block is `shape` tiles.

    >>> pooled(torch.tensor([[[1.0, 1.0]], [[3.0, -1.0]]]), (1, 2)).tolist()
    [[2.0]]
    """
    groups, blocks = grid(each.shape[1:], shape)
    whole = each.double().reshape(len(each), groups, shape[0], blocks, shape[1]).sum((2, 4))
    return whole.square().mean(0) / 2


def loss_change(change: Tensor, gradients: Iterable[Tensor], floor: float = 1e-7) -> float:
    """The second-order estimate for a whole change of a weight: `1/2 (E[(g . d)^2] + floor |d|^2)`.

    LPViT's quadratic form with `F = E[g g^T] + floor I`, which needs no tiles: a product a sample.

    >>> loss_change(torch.tensor([1.0, -1.0]), [torch.tensor([3.0, 1.0])], floor=1.0)
    3.0
    """
    squares = [float((gradient.double() * change.double()).sum()) ** 2 for gradient in gradients]
    curvature = sum(squares) / max(len(squares), 1)
    return 0.5 * (curvature + floor * float(change.double().square().sum()))


def choose(score: Tensor, density: float) -> Tensor:
    """The best blocks of each group, [groups, kept] ascending, from scores [groups, blocks]."""
    return best(score, quota(score.shape[1], density))


def _tiles(values: Tensor, shape: Shape) -> Tensor:
    """[groups, R, blocks, C]."""
    groups, blocks = grid(values.shape, shape)
    return values.reshape(groups, shape[0], blocks, shape[1])


# The form that runs


def pack(values: Tensor, kept: Tensor, shape: Shape) -> Tensor:
    """The kept blocks alone: [groups, R, kept * C], group g reads the inputs `inputs_of(kept, C)[g]`.

    >>> pack(torch.tensor([[0.0, 0.0, 5.0, 6.0]]), torch.tensor([[1]]), (1, 2)).tolist()
    [[[5.0, 6.0]]]
    """
    grouped = values.reshape(len(kept), shape[0], -1)
    index = inputs_of(kept, shape[1])[:, None].expand(-1, shape[0], -1)
    return grouped.gather(2, index)


def unpack(packed: Tensor, kept: Tensor, inner: int) -> Tensor:
    """The weight [out, inner] with zeros in place, from its packed form."""
    groups, rows, width = packed.shape
    index = inputs_of(kept, width // kept.shape[1])[:, None].expand(-1, rows, -1)
    return packed.new_zeros(groups, rows, inner).scatter_(2, index, packed).reshape(-1, inner)


def inputs_of(kept: Tensor, columns: int) -> Tensor:
    """[groups, kept * C]: the inputs that each group of rows reads.

    >>> inputs_of(torch.tensor([[0, 2]]), 2).tolist()
    [[0, 1, 4, 5]]
    """
    return (kept[:, :, None] * columns + torch.arange(columns)).flatten(1)


def product(x: Tensor, packed: Tensor, kept: Tensor) -> Tensor:
    """`x W^T` [rows, out] by gather and one batched product: what an exported layer computes."""
    columns = packed.shape[2] // kept.shape[1]
    gathered = x.T[inputs_of(kept, columns)]  # [groups, kept * C, rows]
    return torch.bmm(packed, gathered).flatten(0, 1).T


def stored_bytes(kept: Tensor, shape: Shape, item_bytes: int = 4) -> int:
    """Bytes of the packed weight: values, and one int32 for each block.

    >>> stored_bytes(torch.tensor([[0], [1]]), (2, 4))
    72
    """
    return kept.numel() * (shape[0] * shape[1] * item_bytes + INDEX_BYTES)

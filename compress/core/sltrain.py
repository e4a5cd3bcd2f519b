"""A weight that is trained as `scale * B A + S`: two thin factors and a sparse part on a fixed support.

What is trained and kept is `rank * (out + in)` numbers for the factors and one for each place of the
support, instead of `out * in`; gradients and optimizer states shrink alike. The product materializes
the dense weight only a few rows at a time, forward and backward, and so the dense gradient too, of which
nothing but the entries on the support is read: with G = dY^T X,

    dB = dY^T (X A^T)    dA = (dY B)^T X    dv = G on the support    dX = dY W

Training may also begin at a given weight W, which stays: `W + scale * B A + S`. Where W is pruned, the
factors may be held to its zeros, M = [W != 0]: `W + M * (scale * B A) + S`, with dB = (M * G) A^T and
dA = B^T (M * G), a few rows at a time too.

Places are stored as compressed rows with 16-bit columns where they suffice: 2 bytes for a value
instead of the 8 of one flat int64 position.

Reference: Han et al., "SLTrain", arXiv 2406.02214.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

from compress.core.support import Free
from compress.errors import CompressError

CHUNK = 2**20  # numbers of the dense weight that exist at once
SHORT = 2**15  # columns that fit into int16


@dataclass(frozen=True)
class Places:
    """A fixed support as compressed rows: `columns` [count], ascending in each row, int16 or int32.

    `pointers` [out + 1] int64: the places of row i are `pointers[i]` to `pointers[i + 1]`.
    """

    pointers: Tensor
    columns: Tensor


def places_of(mask: Tensor) -> Places:
    """The places of a mask [out, in], row by row.

    >>> found = places_of(torch.tensor([[False, True], [True, True]]))
    >>> found.pointers.tolist(), found.columns.tolist()
    ([0, 1, 3], [1, 0, 1])
    """
    pointers = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    kind = torch.int16 if mask.shape[1] <= SHORT else torch.int32
    return Places(pointers, mask.nonzero()[:, 1].to(kind))


def count(out: int, inner: int, density: float) -> int:
    """How many places a support has: `floor(density * out * in)`, at least one."""
    if not 0 < density <= 1:
        raise CompressError(f"a density of {density:g} is asked for; it must be above 0 and at most 1")
    return max(1, int(density * out * inner))


def random_mask(out: int, inner: int, density: float, generator: torch.Generator | None = None) -> Tensor:
    """[out, in] bool with `count` places anywhere, as SLTrain draws them."""
    chosen = torch.randperm(out * inner, generator=generator)[: count(out, inner, density)]
    mask = torch.zeros(out * inner, dtype=torch.bool)
    mask[chosen] = True
    return mask.reshape(out, inner)


def chosen_mask(score: Tensor, density: float) -> Tensor:
    """[out, in] bool with the same number of places, the best by a score: a support from data."""
    number = count(score.shape[0], score.shape[1], density)
    return Free(number / score.numel()).mask(score)


def initial(
    out: int, inner: int, rank: int, places: Places, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Where training from scratch starts: left [out, rank] of zeros, right [rank, in], values.

    The last two are uniform within `1 / sqrt(in)`.
    """
    bound = inner**-0.5
    right = torch.empty(rank, inner).uniform_(-bound, bound, generator=generator)
    values = torch.empty(len(places.columns)).uniform_(-bound, bound, generator=generator)
    return torch.zeros(out, rank), right, values


def merged(
    left: Tensor,
    right: Tensor,
    values: Tensor,
    places: Places,
    base: Tensor | None = None,
    *,
    hold: bool = False,
) -> Tensor:
    """The dense weight [out, in] that computes the same; a scale belongs into `right`."""
    (only,) = _pieces(left, right, values, places, len(left), base, hold)
    return only.weight


@dataclass(frozen=True)
class _Piece:
    """Some rows of the dense weight; `row` and `column` are where its sparse values stand.

    `open` is where the factors count, None for everywhere.
    """

    rows: slice
    weight: Tensor
    inside: slice
    row: Tensor
    column: Tensor
    open: Tensor | None


def _pieces(
    left: Tensor,
    right: Tensor,
    values: Tensor,
    places: Places,
    height: int,
    base: Tensor | None,
    hold: bool,
) -> Iterator[_Piece]:
    for start in range(0, len(left), height):
        rows = slice(start, min(start + height, len(left)))
        bounds = places.pointers[rows.start : rows.stop + 1]
        inside = slice(int(bounds[0]), int(bounds[-1]))
        row = torch.repeat_interleave(bounds.diff())
        column = places.columns[inside].long()
        weight = left[rows] @ right
        kept = base[rows] != 0 if base is not None and hold else None
        if kept is not None:
            weight *= kept
        if base is not None:
            weight += base[rows]
        weight[row, column] += values[inside]
        yield _Piece(rows, weight, inside, row, column, kept)


def _height(inner: int) -> int:
    return max(1, CHUNK // inner)


class _Product(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        values: Tensor,
        pointers: Tensor,
        columns: Tensor,
        base: Tensor | None,
        hold: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, left, right, values, pointers, columns, cast(Tensor, base))
        ctx.hold = hold  # type: ignore[attr-defined]
        found = x.new_empty(*x.shape[:-1], len(left))
        places, height = Places(pointers, columns), _height(right.shape[1])
        for piece in _pieces(left, right, values, places, height, base, hold):
            found[..., piece.rows] = x @ piece.weight.T
        return found

    @staticmethod
    @once_differentiable  # type: ignore[misc, no-untyped-call, unused-ignore]
    def backward(ctx: BackwardCFunction, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = cast(tuple[Tensor, ...], ctx.saved_tensors)
        x, left, right, values, pointers, columns = saved[:6]
        base, hold = cast(Tensor | None, saved[6]), cast(bool, ctx.hold)  # type: ignore[attr-defined]
        needed = cast(tuple[bool, ...], ctx.needs_input_grad)
        inputs = x.reshape(-1, x.shape[-1])
        outputs = gradients[0].reshape(-1, len(left))
        back = torch.zeros_like(inputs) if needed[0] else None
        sparse = torch.empty_like(values) if needed[3] else None
        thin = (torch.empty_like(left), torch.zeros_like(right)) if hold else None
        places, height = Places(pointers, columns), _height(right.shape[1])
        for piece in _pieces(left, right, values, places, height, base, hold):
            part = outputs[:, piece.rows]
            if back is not None:
                back.addmm_(part, piece.weight)
            if sparse is not None or thin is not None:
                dense = part.T @ inputs
                if sparse is not None:
                    sparse[piece.inside] = dense[piece.row, piece.column]
                if thin is not None and piece.open is not None:
                    dense *= piece.open
                    thin[0][piece.rows] = dense @ right.T
                    thin[1].addmm_(left[piece.rows].T, dense)
        if thin is None:
            thin = outputs.T @ (inputs @ right.T), (outputs @ left).T @ inputs
        return (
            back.reshape(x.shape) if back is not None else None,
            thin[0] if needed[1] else None,
            thin[1] if needed[2] else None,
            sparse,
            None,
            None,
            None,
            None,
        )


def product(
    x: Tensor,
    left: Tensor,
    right: Tensor,
    values: Tensor,
    places: Places,
    base: Tensor | None = None,
    *,
    hold: bool = False,
) -> Tensor:
    """`x (base + left right + S)^T` [..., out], differentiable once in x, left, right and values.

    Saved for the backward pass are the arguments alone.

    Args:
        x: [..., in].
        left: [out, rank].
        right: [rank, in].
        values: one for every place.
        places: where they are added.
        base: [out, in], to which all is added and which stays.
        hold: the factors count only where the base is not zero.

    >>> places = places_of(torch.tensor([[True, False]]))
    >>> x, left, right = torch.tensor([[1.0, 2.0]]), torch.ones(1, 1), torch.ones(1, 2)
    >>> product(x, left, right, torch.tensor([3.0]), places).tolist()
    [[6.0]]
    """
    found: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        x, left, right, values, places.pointers, places.columns, base, hold
    )
    return found


# Memory


@dataclass(frozen=True)
class Account:
    """What training one weight holds, in bytes; `parameters` is a count.

    `temporary_bytes` is what exists for a moment beside it: dense rows of weight and gradient.
    """

    parameters: int
    weight_bytes: int
    index_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    temporary_bytes: int

    @property
    def held_bytes(self) -> int:
        """All that lasts from step to step."""
        return self.weight_bytes + self.index_bytes + self.gradient_bytes + self.optimizer_bytes


def dense_account(out: int, inner: int, *, item_bytes: int = 4, state_bytes: int = 4) -> Account:
    """A dense weight under Adam, which holds two states for each parameter.

    >>> dense_account(4, 8).held_bytes
    512
    """
    size = out * inner
    return Account(size, size * item_bytes, 0, size * item_bytes, 2 * size * state_bytes, 0)


def account(
    out: int, inner: int, rank: int, density: float, *, item_bytes: int = 4, state_bytes: int = 4
) -> Account:
    """The same for factors of a rank and a support of a density; 0 is none.

    >>> account(64, 64, 4, 0.03).parameters
    634
    """
    places = count(out, inner, density) if density > 0 else 0
    size = rank * (out + inner) + places
    index = places * (2 if inner <= SHORT else 4) + 8 * (out + 1) if places else 0
    rows = min(out, _height(inner)) * inner
    return Account(
        size, size * item_bytes, index, size * item_bytes, 2 * size * state_bytes, 2 * rows * item_bytes
    )

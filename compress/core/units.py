"""Units and the tensors they own: where a unit lies in a tensor, and the tensor without some units.

A fused tensor (query, key and value rows in one matrix) holds several slices side by side, and may hold
parts that no unit owns; everything outside the slices stays where it is.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.ir import Slice


def index_of(part: Slice, kept: Tensor) -> Tensor:
    """Indices along `part.dim` that the `kept` units own, in the order of `kept`.

    >>> index_of(Slice(tensor="w", dim=0, width=2, start=4), torch.tensor([0, 2])).tolist()
    [4, 5, 8, 9]
    """
    inside = torch.arange(part.width, device=kept.device)
    return (part.start + kept[:, None] * part.width + inside).flatten()


def remaining(parts: Iterable[Slice], kept: Tensor, *, units: int, length: int) -> Tensor:
    """Indices that stay along one dimension of `length`, when only the `kept` of `units` units do.

    `parts` are the slices of one tensor along one dimension. What none of them owns stays in place;
    inside a part the kept units follow in the order of `kept`.

    >>> both = [Slice(tensor="w", dim=0, width=1, start=s) for s in (0, 3)]
    >>> remaining(both, torch.tensor([1]), units=2, length=6).tolist()
    [1, 2, 4, 5]
    """
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < units:
        raise CompressError(
            f"units {int(kept.min())} to {int(kept.max())} are asked for, but there are only {units}"
        )
    pieces: list[Tensor] = []
    position = 0
    for part in sorted(parts, key=lambda part: part.start):
        end = part.start + units * part.width
        if part.start < position or end > length:
            raise CompressError(
                f"{part.tensor}: units own [{part.start}, {end}) of dimension {part.dim}, which holds "
                f"{length} and is taken up to {position}; the slices overlap or belong to another tensor"
            )
        pieces += [torch.arange(position, part.start, device=kept.device), index_of(part, kept)]
        position = end
    pieces.append(torch.arange(position, length, device=kept.device))
    return torch.cat(pieces)


def cut(tensor: Tensor, parts: Iterable[Slice], kept: Tensor, *, units: int) -> Tensor:
    """A contiguous copy of `tensor` without the units that are not in `kept` (int64).

    `parts` are the slices of this one tensor; units in none of `kept` lose what they own.

    >>> part = Slice(tensor="w", dim=1, width=2)
    >>> cut(torch.arange(8).reshape(2, 4), [part], torch.tensor([1]), units=2).tolist()
    [[2, 3], [6, 7]]
    """
    by_dim: dict[int, list[Slice]] = {}
    for part in parts:
        by_dim.setdefault(part.dim, []).append(part)
    for dim, own in by_dim.items():
        stay = remaining(own, kept, units=units, length=tensor.shape[dim]).to(tensor.device)
        tensor = tensor.index_select(dim, stay)
    return tensor.contiguous() if by_dim else tensor.clone()

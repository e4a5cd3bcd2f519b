"""Which inputs share a group of four: an order of columns in which 2:4 keeps more.

2:4 keeps the two best of every four neighbours, so the order of the inputs decides what is lost, and
where a dimension is only passed between two products its order is free (neurons of a feed-forward
network, value channels of one head, the residual width of a whole model). The tensors that own such
a dimension follow with `core.units.cut`, whose `kept` may be any order. Query and key channels are free
too, but no weight reads them, so no 2:4 group runs along them.

`search` improves an order in two ways until neither helps, and never loses:

* Swaps. With t1 >= t2 the best of the other three of a group, the group keeps `t1 + max(t2, x)` when x joins
  them. So one table [columns, columns] holds what every column would bring to the place of every
  other; swaps between different groups are exact together, and many are made at once.
* Pairs of groups. The eight columns of two groups split into two fours in 35 ways; all are tried.
  Groups are paired as in a tournament, so that all pairs of one round are solved together.

References: Pool, Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021.
"""

from itertools import combinations

import torch
from torch import Tensor

from compress.errors import CompressError

GROUP = 4
CHUNK = 32  # columns of the table of swaps that are worked on at once
SPLITS = [(0, *three) for three in combinations(range(1, 8), 3)]  # the half with column 0
OTHERS = [tuple(sorted({*range(8)} - {*half})) for half in SPLITS]
GAIN = 1e-9  # relative, below which a change is rounding


def retained(score: Tensor, order: Tensor | None = None) -> float:
    """What 2:4 keeps of a score [rows, columns], with the columns in `order`.

    >>> score = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    >>> retained(score), retained(score, torch.tensor([0, 1, 4, 5, 2, 3, 6, 7]))
    (7.0, 10.0)
    """
    placed = score if order is None else score[:, order]
    return float(_kept(placed.reshape(len(placed), -1, GROUP)).sum())


def search(score: Tensor, *, rounds: int = 64, passes: int = 100) -> Tensor:
    """An order of the columns [columns] in which 2:4 keeps more of the score.

    Args:
        score: [rows, columns] non-negative importance of each weight; all matrices that read
            the dimension, one below the other.
        rounds: of the tournament at most; it ends earlier when every pair was met without a gain.
        passes: of swaps at most.

    Raises:
        CompressError: the columns do not come in groups of four.
    """
    rows, columns = score.shape
    if columns % GROUP or not columns:
        raise CompressError(f"2:4 groups 4 inputs, but the score is [{rows}, {columns}]; leave it dense")
    score = score.double()
    order = torch.arange(columns)
    for _ in range(passes):
        better = _swap(score, order)
        if better is None:
            break
        order = better
    return _tournament(score, order, rounds)


def _kept(groups: Tensor) -> Tensor:
    """The sum of the two best of the last dimension's four."""
    a, b, c, d = groups.unbind(-1)
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    upper, lower = torch.maximum(c, d), torch.minimum(c, d)
    second = torch.maximum(torch.minimum(high, upper), torch.maximum(low, lower))
    return torch.maximum(high, upper) + second


def _table(placed: Tensor) -> Tensor:
    """[columns, columns]: what the group of place i keeps when column j stands there instead."""
    rows, columns = placed.shape
    groups = placed.reshape(rows, -1, GROUP)
    best = []
    for place in range(GROUP):
        rest = [other for other in range(GROUP) if other != place]
        best.append(groups[..., rest].topk(2, dim=2).values)
    pair = torch.stack(best, 2).reshape(rows, columns, 2)
    first, second = pair[..., 0], pair[..., 1]
    table = first.sum(0)[:, None].repeat(1, columns)
    for start in range(0, columns, CHUNK):
        part = torch.maximum(second[:, start : start + CHUNK, None], placed[:, None, :])
        table[start : start + CHUNK] += part.sum(0)
    return table


def _swap(score: Tensor, order: Tensor) -> Tensor | None:
    """The order after the best swaps that share no group; None when no swap helps."""
    placed = score[:, order]
    now = _kept(placed.reshape(len(placed), -1, GROUP)).sum(0)
    table = _table(placed)
    group = torch.arange(len(order)) // GROUP
    gain = table + table.T - now[group][:, None] - now[group]
    gain[group[:, None] == group] = 0.0
    least = GAIN * float(now.sum())
    best, partner = gain.max(1)
    used: set[int] = set()
    found = order.clone()
    for place in best.argsort(descending=True, stable=True).tolist():
        other = int(partner[place])
        if float(best[place]) <= least:
            break
        pair = {int(group[place]), int(group[other])}
        if not pair & used:
            used |= pair
            found[[place, other]] = found[[other, place]]
    return found if used else None


def _tournament(score: Tensor, order: Tensor, rounds: int) -> Tensor:
    """Pairs of groups split in the best of 35 ways, every group meeting every other in turn."""
    groups = order.reshape(-1, GROUP).clone()
    count = len(groups) + len(groups) % 2  # an odd one sits out
    ring = list(range(1, count))
    idle = 0
    for _ in range(rounds):
        if idle >= count - 1:
            break
        seats = [0, *ring]
        pairs = [(seats[i], seats[-1 - i]) for i in range(count // 2)]
        pairs = [pair for pair in pairs if max(pair) < len(groups)]
        ring = ring[-1:] + ring[:-1]
        idle = 0 if pairs and _split(score, groups, torch.tensor(pairs)) else idle + 1
    return groups.flatten()


def _split(score: Tensor, groups: Tensor, pairs: Tensor) -> bool:
    """Split every pair of groups anew, in place; whether anything was gained."""
    eight = groups[pairs].reshape(len(pairs), 2 * GROUP)
    values = score[:, eight]  # [rows, pairs, 8]
    kept = [
        (_kept(values[..., list(half)]) + _kept(values[..., list(rest)])).sum(0)
        for half, rest in zip(SPLITS, OTHERS, strict=True)
    ]
    total = torch.stack(kept, 1)  # [pairs, 35]; the first split is the one at hand
    best, chosen = total.max(1)
    better = best > total[:, 0] * (1 + GAIN)
    halves, rests = torch.tensor(SPLITS)[chosen], torch.tensor(OTHERS)[chosen]
    first, second = eight.gather(1, halves), eight.gather(1, rests)
    groups[pairs[better, 0]] = first[better]
    groups[pairs[better, 1]] = second[better]
    return bool(better.any())

"""ZipLM's structured removal: which inputs of a linear map to drop, and how the rest make up for it.

The map `y = W x + b` has `W` [out, in]; its inputs come in units of `width` adjacent columns (one
neuron, one head). `H = E[(x - mu)(x - mu)^T]` is the centered second moment of its input. Removing
the columns S and refitting the others costs `tr(W_S B W_S^T)` of output error with
`B = ((H^-1)_SS)^-1`, changes the rest by `-W_S B (H^-1)_S,:` and leaves the inverse
`H^-1 - (H^-1)_:,S B (H^-1)_S,:`. One sweep of such removals serves every level of a site.

What differs from the published procedure, and why:

* The mean is moved into the bias, `b + W mu - W_hat mu_K`: least squares with a constant input.
* Damping is relative to each diagonal entry, so that rescaling an input changes nothing, and it
  pulls towards the original weights: nothing removed means nothing changed.
* Columns leave in small groups, so that the work is matrix-matrix. Inside a group the choice is
  still one at a time and exact, on the few candidates with the lowest scores, and a group ends as
  soon as an outsider would score lower.
* Nothing of the sweep but the order is used. Kept sets are nested, so in reverse order of removal
  `H = L L^T` holds the factor of every kept set as a leading block, and so does `L^-1`. With
  `Z = W L` the refit on the first k columns is `Z[:, :k] (L^-1)[:k, :k]` and its damped error is
  `|Z[:, k:]|^2`: one factorization, exact, for all levels at the price of one.

Everything is float64. Downdates in float32 were tried: they change the order slightly on badly
conditioned sites and save less than a fifth of the time of a site.

Reference: Kurtic, Frantar, Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language Models",
arXiv 2302.04089.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.factorization import Damped, damp, invert, invert_lower
from compress.errors import CompressError

GROUP = 0.02  # share of the remaining columns that may leave in one step
POOL = 2  # candidates looked at per column that may leave
COMPACT = 0.125  # share of the columns that is gone when the matrices are made smaller


@dataclass(frozen=True)
class Level:
    """One number of units kept: which (ascending), the refitted weight, the change of the bias.

    `weight` is [out, units * width] and `shift` [out], float64. `error` is the added squared output
    error relative to the dense output about its mean: 0 is lossless, 1 is nothing kept.
    """

    kept: Tensor
    weight: Tensor
    shift: Tensor
    error: float


def columns(units: Tensor, width: int) -> Tensor:
    """The columns that `units` own, in the order of the units.

    >>> columns(torch.tensor([2, 0]), 2).tolist()
    [4, 5, 0, 1]
    """
    return (units[:, None] * width + torch.arange(width)).reshape(-1)


def unit_scores(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """The output error that removing each unit alone would add: `tr(W_S B W_S^T)`, [units].

    >>> unit_scores(torch.tensor([[1.0, 2.0]]), torch.eye(2), 1).tolist()
    [1.0, 4.0]
    """
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    units = len(inverse) // width
    blocks = inverse.reshape(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factor = torch.linalg.cholesky(blocks)  # [units, width, width]
    parts = weight.reshape(-1, units, width).permute(1, 2, 0)  # [units, width, out]
    whitened: Tensor = torch.linalg.solve_triangular(factor, parts, upper=False)
    return whitened.square().sum((1, 2))


def _choose(gram: Tensor, inverse: Tensor, count: int, bound: float) -> list[int]:
    """Exact greedy removal of single columns among candidates, given `W^T W` and `H^-1` on them.

    Both are consumed. Stops at `count`, or as soon as the lowest score is above `bound`, the
    lowest score outside the candidates (the first is always taken).
    """
    chosen: list[int] = []
    while len(chosen) < count:
        score = gram.diagonal() / inverse.diagonal()
        score[chosen] = torch.inf
        lowest = int(score.argmin())
        if chosen and float(score[lowest]) > bound:
            break
        chosen.append(lowest)
        row = inverse[lowest] / inverse[lowest, lowest]
        cross = gram[lowest] - 0.5 * gram[lowest, lowest] * row
        gram.addr_(row, cross, alpha=-1).addr_(cross, row, alpha=-1)
        inverse.addr_(row, inverse[lowest].clone(), alpha=-1)
    return chosen


class _Sweep:
    """The state of one sweep: updated weight and inverse over the columns not yet compacted away.

    `alive` names the unit at each place, `gone` marks the places that were removed since the last
    compaction.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, width: int) -> None:
        self.weight = weight.clone()
        self.inverse = inverse.clone()
        self.width = width
        self.alive = torch.arange(len(inverse) // width)
        self.gone = torch.zeros(len(self.alive), dtype=torch.bool)

    def step(self, most: int) -> Tensor:
        """Remove up to `most` units; returns their names in order of removal."""
        score = unit_scores(self.weight, self.inverse, self.width)
        score[self.gone] = torch.inf
        places = self._pick(score, most)
        self._remove(places)
        names = self.alive[places]
        if int(self.gone.sum()) > COMPACT * len(self.gone):
            self._compact()
        return names

    def _pick(self, score: Tensor, most: int) -> Tensor:
        if most == 1 or self.width > 1:
            return score.argmin()[None]
        size = min(POOL * most, int(score.isfinite().sum()))
        lowest, ranked = score.sort(stable=True)
        bound = float(lowest[size]) if len(lowest) > size else torch.inf
        pool = ranked[:size].sort().values  # ties go to the lower column, as one at a time
        part = self.weight[:, pool]
        chosen = _choose(part.T @ part, self.inverse[pool][:, pool], most, bound)
        return pool[chosen]

    def _remove(self, places: Tensor) -> None:
        cut = columns(places, self.width)
        factor = torch.linalg.cholesky(self.inverse[cut][:, cut])
        rows = torch.linalg.solve_triangular(factor, self.inverse[cut], upper=False)
        part = torch.linalg.solve_triangular(factor, self.weight[:, cut].T, upper=False)
        self.weight.addmm_(part.T, rows, alpha=-1)
        self.inverse.addmm_(rows.T, rows, alpha=-1)
        self.weight[:, cut] = 0  # rounding must not revive them
        self.inverse[cut] = 0
        self.inverse[:, cut] = 0
        self.inverse[cut, cut] = 1  # keeps the blocks of whole units invertible
        self.gone[places] = True

    def _compact(self) -> None:
        stay = (~self.gone).nonzero()[:, 0]
        keep = columns(stay, self.width)
        self.weight = self.weight[:, keep]
        self.inverse = self.inverse[keep][:, keep]
        self.alive = self.alive[stay]
        self.gone = self.gone[stay]


def removal_order(
    weight: Tensor, inverse: Tensor, levels: Sequence[int], *, width: int = 1, group: float = GROUP
) -> Tensor:
    """All units, first the one that is removed last: the first k are those kept at level k.

    Args:
        weight: [out, in].
        inverse: [in, in] inverse of the damped second moment.
        levels: units kept that are asked for; a group never crosses one, and below the lowest
            positive one nothing is removed any more (the remaining units are listed ascending).
        width: columns per unit.
        group: share of the remaining units that may leave at once; 0 is one at a time.
    """
    units = len(inverse) // width
    stops = sorted({level for level in levels if 0 < level < units}, reverse=True)
    sweep = _Sweep(weight, inverse, width)
    removed: list[Tensor] = []
    remaining = units
    for stop in stops:
        while remaining > stop:
            names = sweep.step(min(max(1, int(group * remaining)), remaining - stop))
            removed.append(names)
            remaining -= len(names)
    gone = torch.cat([*removed, torch.empty(0, dtype=torch.int64)])
    stay = torch.ones(units, dtype=torch.bool)
    stay[gone] = False
    return torch.cat([stay.nonzero()[:, 0], gone.flip(0)])


def resolve(
    weight: Tensor, damped: Damped, order: Tensor, levels: Sequence[int], width: int = 1
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The exact refit for every level, ascending: kept units, weight, undamped squared error.

    `weight` [out, in] is zero on inputs that are not live. The error is `tr(D H D^T)` with H before
    damping and D the difference to `weight`: the damped error is a tail of `|Z|^2`, and damping is
    diagonal, so its share is subtracted exactly.
    """
    place = columns(order, width)
    original = weight[:, place]
    added = damped.added[place]
    factor = torch.linalg.cholesky(damped.matrix[place][:, place])
    parts = original @ factor  # Z [out, in]
    tail = parts.square().sum(0).flip(0).cumsum(0).flip(0)  # [in], damped error by columns kept
    inverse = invert_lower(factor)
    fitted = torch.zeros_like(original)
    done = 0
    for units in sorted(set(levels)):
        size = units * width
        fitted[:, :size].addmm_(parts[:, done:size], inverse[done:size, :size])
        done = size
        penalty = (original - fitted).square().sum(0) @ added
        error = max(0.0, float(tail[size] - penalty)) if size < len(place) else 0.0
        kept, rank = order[:units].sort()
        yield kept, fitted[:, columns(rank, width)], error


def solve(
    weight: Tensor,
    second: Tensor,
    mean: Tensor,
    levels: Sequence[int],
    *,
    width: int = 1,
    damping: float = 1e-2,
    group: float = GROUP,
) -> Iterator[Level]:
    """One sweep over a site: every requested level, ascending, refitted and with its error.

    Args:
        weight: [out, in].
        second: [in, in] `E[x x^T]`, not centered.
        mean: [in] `E[x]`.
        levels: units kept, each between 0 (drop the module) and all.
        width: columns per unit; `in` is a multiple of it.
        damping: relative to each diagonal entry of the centered second moment.
        group: share of the remaining units that may leave at once; 0 is one at a time.

    >>> eye = torch.eye(2, dtype=torch.float64)
    >>> levels = solve(torch.tensor([[3.0, 4.0]]), eye, torch.zeros(2), [1])
    >>> [(level.kept.tolist(), level.weight.tolist(), round(level.error, 9)) for level in levels]
    [([1], [[4.0]], 0.36)]
    """
    units = len(second) // width
    if len(second) % width or weight.shape[1] != len(second):
        raise CompressError(
            f"a weight with {weight.shape[1]} inputs and second moments of {len(second)} do not "
            f"divide into units of {width}; this is a mistake in the site"
        )
    if not all(0 <= level <= units for level in levels):
        raise CompressError(f"levels {list(levels)} must lie between 0 and {units} units")
    full, mean = weight.double(), mean.double()
    centered = second.double() - torch.outer(mean, mean)
    damped = damp(centered, damping, second.double().diagonal())
    signal = torch.where(damped.live, full, 0.0)  # constant inputs live on in the bias alone
    order = removal_order(signal, invert(damped), levels, width=width, group=group)
    total = float(((signal @ centered) * signal).sum())
    for kept, fitted, error in resolve(signal, damped, order, levels, width):
        shift = full @ mean - fitted @ mean[columns(kept, width)]
        yield Level(kept, fitted, shift, error / total if total > 0 else 0.0)


def refit(
    second: Tensor,
    cross: Tensor,
    mean_in: Tensor,
    mean_out: Tensor,
    prior: Tensor,
    damping: float = 1e-2,
) -> tuple[Tensor, Tensor]:
    """Refit a map to inputs that have changed: `min |W x + b - y|^2 + |(W - prior) d^(1/2)|^2`.

    The ridge `d` is `damping` times the variance of each input (more, where the moments are
    singular), so few samples move the prior little.

    Args:
        second: [in, in] `E[x x^T]` of the new inputs.
        cross: [out, in] `E[y x^T]` of the wanted outputs with the new inputs.
        mean_in: [in] `E[x]`.
        mean_out: [out] `E[y]`.
        prior: [out, in] the weight to stay near.
        damping: strength of that pull.

    Returns:
        weight [out, in] and bias [out], float64; the mean output is exactly `mean_out`.

    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> refit(one * 2, one * 6, torch.zeros(1), torch.ones(1), one, damping=1.0)
    (tensor([[2.]], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """
    mean_in, mean_out, prior = mean_in.double(), mean_out.double(), prior.double()
    centered = second.double() - torch.outer(mean_in, mean_in)
    damped = damp(centered, damping, second.double().diagonal())
    gain = cross.double() - torch.outer(mean_out, mean_in)
    wanted = torch.where(damped.live, gain + prior * damped.added, prior)
    weight = torch.cholesky_solve(wanted.T, damped.factor).T
    return weight, mean_out - weight @ mean_in

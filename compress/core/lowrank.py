"""Low rank, and sparse plus low rank: `W` becomes `S + L R`, matched on what the layer really sees.

The error is `|(W - S - L R) X|^2 = tr(D H D^T)`. Two facts carry everything:

* For fixed S the best `L R` of rank r is known: with `H = C C^T` and U the r leading left singular
  vectors of `(W - S) C`, it is `L = U`, `R = U^T (W - S)`, and what is lost is the sum of the
  remaining squared singular values. No inverse is needed.
* For fixed `L R` and a fixed support, S is a small least squares problem for every row.

`factor` is the first fact alone; `correct` applies it to what some pruner left (EoRA). `decompose`
finds support and factors together by the three-block ADMM of 3BASiL, on inputs scaled to one size (G is
H so scaled, T = W - L R):

    B <- T - (V + rho (T - D)) (G + rho)^-1      the dense copy of S
    D <- the pattern's best of B + V / rho        the sparse copy
    V <- V + rho (B - D)                          the price of their difference
    L R <- the closed form for W - B

With `G (G + rho)^-1 = 1 - rho (G + rho)^-1` an iteration costs one product of the size of the
weight with an [in, in] matrix, and the factors follow by one step of subspace iteration from the
last ones. Few iterations and a *polish* (both facts in turn, which can only improve) do the work of
hundreds. The published rho follows the changes of the support, which suits a run to convergence; within
40 iterations it hardly rises: a query projection of MiniLM at 2:4 and rank 8 then loses 1.7 times
what it loses with rho on a ramp from 0.1 to 1, the schedule here.

`oats` is the alternation that knows only the size of each input: the baseline.

References: EoRA, arXiv 2410.21271; Makni et al., "3BASiL", arXiv 2603.01376; Zhang, Papyan, "OATS",
arXiv 2409.13652; Saha et al., "CALDERA", arXiv 2405.18886 (the closed form).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core.support import Layer, Pattern, affordable, approached, restricted, spread
from compress.errors import CompressError

ITERATIONS = 40  # of the ADMM before the polish
ROUNDS = 5  # of the polish
EVERY = 4  # iterations with one rho, which is what an inverse is good for
RAMP = (0.1, 1.0)  # of rho, in units of the diagonal
ROUNDED = 1e-5  # of the largest weight: what a float32 sum may lose
SPARE = 5  # directions that the subspace iteration carries beyond the rank


@dataclass(frozen=True)
class Split:
    """A weight as a sparse part plus two thin factors: `values + left @ right`, all float64.

    Attributes:
        values: [out, in] the sparse part, zero where the pattern removed a weight.
        mask: [groups, in] bool, the support of the sparse part (`core.support`).
        left: [out, rank].
        right: [rank, in].
        shift: [out] what to add to the bias.
        error: added squared output error, relative to the dense output about its mean.
    """

    values: Tensor
    mask: Tensor
    left: Tensor
    right: Tensor
    shift: Tensor
    error: float

    @property
    def merged(self) -> Tensor:
        """The one dense weight [out, in] that computes the same."""
        return self.values + self.left @ self.right


def _split(layer: Layer, values: Tensor, mask: Tensor, left: Tensor, right: Tensor) -> Split:
    merged = values + left @ right
    return Split(values, mask, left, right, layer.shift(merged), layer.error(merged))


# The closed form


def leading(rest: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors of `rest` [out, in] under `tr(D H D^T)`: left [out, rank], right [rank, in].

    The columns of `left` are orthonormal. A rank of `min(out, in)` or more gives `rest` itself.

    >>> left, right = leading(torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.diag(torch.tensor([1.0, 9.0])), 1)
    >>> (left @ right).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    out, inner = rest.shape
    if rank < 0:
        raise CompressError(f"a rank of {rank} is asked for; it must be 0 or more")
    if rank == 0:
        return rest.new_zeros(out, 0), rest.new_zeros(0, inner)
    if rank >= min(out, inner):
        eye = torch.eye(min(out, inner), dtype=rest.dtype)
        return (eye, rest.clone()) if out <= inner else (rest.clone(), eye)
    if out <= inner:
        _, vectors = torch.linalg.eigh(rest @ metric @ rest.T)
        left = vectors[:, out - rank :].flip(1)
    else:
        whitened = rest @ torch.linalg.cholesky(metric)
        _, vectors = torch.linalg.eigh(whitened.T @ whitened)  # the smaller side again
        left = torch.linalg.qr(whitened @ vectors[:, inner - rank :].flip(1))[0]
    return left, left.T @ rest


def apart(merged: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sparse part [out, in] of `sparse + left @ right`, with exact zeros where it had zeros.

    What the sum has rounded away is no part of it: it is taken for zero below 1e-5 of the largest weight.

    >>> one = torch.tensor([[0.1], [0.2]])
    >>> apart(one @ one.T + torch.tensor([[0.0, 3.0], [0.0, 0.0]]), one, one.T).tolist()
    [[0.0, 3.0], [0.0, 0.0]]
    """
    rest = merged - left @ right
    return torch.where(rest.abs() > ROUNDED * merged.abs().max(), rest, 0.0)


def factor(layer: Layer, rank: int) -> Split:
    """The best approximation of a whole layer by two thin factors: reduced-rank regression."""
    left, right = leading(layer.signal, layer.damped.matrix, rank)
    nothing = torch.zeros_like(layer.signal)
    return _split(layer, nothing, torch.zeros(1, nothing.shape[1], dtype=torch.bool), left, right)


def correct(layer: Layer, values: Tensor, mask: Tensor, rank: int) -> Split:
    """The best factors beside a sparse part [out, in] that stays as it is (EoRA)."""
    left, right = leading(layer.signal - values, layer.damped.matrix, rank)
    return _split(layer, values, mask, left, right)


# Alternation: exact on each side, so the error never rises


def polish(layer: Layer, split: Split, rounds: int = ROUNDS, *, exact: bool = False) -> Split:
    """Refit the sparse part on its support and the factors in turn, `rounds` times.

    Args:
        layer: what is matched.
        split: where to start from.
        rounds: of both steps.
        exact: a factorization for every row and round; otherwise conjugate gradients, and only the
            last refit exact where it is cheap (`affordable`).
    """
    size = layer.damped.matrix.diagonal().sqrt()
    metric = layer.damped.matrix / torch.outer(size, size)
    weight, values = layer.signal * size, split.values * size
    left, right = split.left, split.right * size
    rank = left.shape[1]
    direct = exact or affordable(split.mask)
    for number in range(rounds):
        target = weight - left @ right
        if exact or (direct and number == rounds - 1):
            values = restricted(target, metric, split.mask)
        else:
            values = approached(target, metric, split.mask, values)
        left, right = leading(weight - values, metric, rank)
    return _split(layer, values / size, split.mask, left, right / size)


# Support and factors together


class _Admm:
    """The three blocks of 3BASiL on inputs scaled to one size: `metric` has a diagonal of ones.

    `dense` is B, `sparse` D, `price` V; `left @ right` are the factors, `basis` the subspace that the
    next ones start from.
    """

    def __init__(self, weight: Tensor, metric: Tensor, pattern: Pattern, rank: int) -> None:
        self.weight = weight
        self.metric = metric
        self.pattern = pattern
        self.rank = rank
        self.dense = weight
        self.price = torch.zeros_like(weight)
        out, inner = weight.shape
        self.left = weight.new_zeros(out, 0)
        self.right = weight.new_zeros(0, inner)
        width = min(rank + SPARE, out) if rank else 0
        start = torch.linspace(1, 2, out * width, dtype=weight.dtype).mul(1e4).cos()
        self.basis = torch.linalg.qr(start.reshape(out, width))[0]
        self._project(weight)

    def run(self, iterations: int, ramp: tuple[float, float] = RAMP) -> None:
        """So many iterations, rho rising evenly (in its logarithm) from one end of `ramp` to the other."""
        self.rho = ramp[0]
        growth = (ramp[1] / ramp[0]) ** (EVERY / max(iterations, EVERY))
        for done in range(iterations):
            if done % EVERY == 0:
                self._invert()
            self._step()
            if done % EVERY == EVERY - 1:
                self.rho *= growth

    def _invert(self) -> None:
        shifted = self.metric.clone()
        shifted.diagonal().add_(self.rho)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))

    def _project(self, values: Tensor) -> None:
        self.mask = self.pattern.mask(values.square())
        self.sparse = torch.where(spread(self.mask, len(values)), values, 0.0)

    def _step(self) -> None:
        target = self.weight - self.left @ self.right
        pull = torch.add(self.price, target - self.sparse, alpha=self.rho)
        away = pull @ self.inverse  # T - B
        self.dense = target - away
        self._project(torch.add(self.dense, self.price, alpha=1 / self.rho))
        self.price = torch.add(self.price, self.dense - self.sparse, alpha=self.rho)
        if self.rank:
            self._factors(self.weight - self.dense, torch.add(pull, away, alpha=-self.rho))

    def _factors(self, rest: Tensor, away: Tensor) -> None:
        """The leading factors of `rest` = W - B; `away` is `(T - B) G`, which came for free."""
        weighted = away + self.left @ (self.right @ self.metric)  # rest @ metric
        self.basis = torch.linalg.qr(weighted @ (rest.T @ self.basis))[0]
        small = (self.basis.T @ weighted) @ (rest.T @ self.basis)
        _, vectors = torch.linalg.eigh((small + small.T) / 2)
        self.left = self.basis @ vectors[:, -self.rank :]
        self.right = self.left.T @ rest


def decompose(
    layer: Layer,
    pattern: Pattern,
    rank: int,
    *,
    iterations: int = ITERATIONS,
    rounds: int = ROUNDS,
    exact: bool = False,
) -> Split:
    """Support, values and factors together (3BASiL), stopped early and polished.

    Args:
        layer: what is matched (`core.support.prepare`).
        pattern: `NM(2, 4)`, `Block(rows, columns, density)` or `Free(density)`.
        rank: of the factors; 0 is pruning alone.
        iterations: of the ADMM; more are better, slowly.
        rounds: of the polish that follows.
        exact: a factorization for every row in every round of the polish.
    """
    size = layer.damped.matrix.diagonal().sqrt()
    metric = layer.damped.matrix / torch.outer(size, size)
    admm = _Admm(layer.signal * size, metric, pattern, min(rank, *layer.signal.shape))
    admm.run(iterations)
    values = torch.where(spread(admm.mask, len(layer.signal)), admm.dense, 0.0) / size
    return polish(layer, correct(layer, values, admm.mask, rank), rounds, exact=exact)


def oats(layer: Layer, pattern: Pattern, rank: int, iterations: int = 80) -> Split:
    """Alternate a threshold and a truncated SVD on inputs scaled to one size (OATS): the baseline.

    Only the diagonal of the second moments is known to it. The pattern is the caller's; for single
    weights the paper's threshold takes the same number from every row, `Free` takes them anywhere.
    """
    size = layer.damped.matrix.diagonal().sqrt()
    weight = layer.signal * size
    eye = torch.eye(weight.shape[1], dtype=weight.dtype)
    values = torch.zeros_like(weight)
    mask = pattern.mask(values)
    for _ in range(iterations):
        left, right = leading(weight - values, eye, rank)
        mask = pattern.mask((weight - left @ right).square())
        values = torch.where(spread(mask, len(weight)), weight - left @ right, 0.0)
    left, right = leading(weight - values, eye, rank)
    return _split(layer, values / size, mask, left, right / size)

"""Rounding a weight so that the outputs change least, not the weights: GPTQ, then one code at a time.

For rows `w` with codes `q` and steps `t` the loss is `(w - t q) H (w - t q)^T`, `H` the centered second
moment of the input; the mean goes into the bias, as in `obs`. Columns are rounded from left to right and
each rounding error is passed on to the columns that are still free, `w_j' -= (w_j - t q_j) / U_jj U_j,:`
with `H^-1 = U^T U`. Afterwards every code in turn moves to where it is best while all others stand still,
which never makes a row worse. The same is done with the nearest codes, and every row takes the better of
the two. Weights that are exactly zero stay zero: they are the pattern of a site.

Reference: Frantar et al., "GPTQ", arXiv 2210.17323; the second stage is coordinate descent, as in Zhang
et al., "QuantEase", arXiv 2309.01885.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.core import factorization, fakequant
from compress.core.fakequant import PAIR, Grid, Quantized, grid_of
from compress.errors import CompressError

BLOCK = 128  # columns between two updates of everything to their right
PASSES = 2


@dataclass(frozen=True)
class Rounded:
    """A quantized weight, what its bias gains [out], and the error: 0 is lossless, 1 is no output."""

    quantized: Quantized
    shift: Tensor
    error: float


def quantize(
    weight: Tensor,
    second: Tensor,
    mean: Tensor | None,
    precision: str,
    *,
    span: tuple[float, float] | None = None,
    damping: float = 1e-2,
) -> Rounded:
    """The codes of least output error, for inputs with these moments.

    Args:
        weight: [out, in]; exact zeros stay.
        second: [in, in] `E[x x^T]`, not centered.
        mean: [in] `E[x]`; None where no bias may change, and the loss is then about zero.
        precision: says which codes and how many steps.
        span: the range of the input, for int8-static and fp8.
        damping: relative to each diagonal entry, as in `obs.solve`.

    Raises:
        CompressError: sizes do not fit, or int8-static or fp8 comes without a range.
    """
    if second.shape != (weight.shape[1], weight.shape[1]):
        raise CompressError(
            f"a weight with {weight.shape[1]} inputs and second moments of {len(second)} do not belong "
            "together; this is a mistake in the site"
        )
    full, second = weight.double(), second.double()
    centered = second if mean is None else second - torch.outer(mean.double(), mean.double())
    damped = factorization.damp(centered, damping, second.diagonal())
    step = fakequant.weight_step(full, grid_of(precision), damped.matrix.diagonal())
    codes = round_codes(full, step, damped, grid_of(precision))
    found = fakequant.packed(precision, codes, step, span)
    lost = full - found.weight().double()
    total = float(((full @ centered) * full).sum())
    error = float(((lost @ centered) * lost).sum())
    shift = torch.zeros(len(full), dtype=full.dtype) if mean is None else lost @ mean.double()
    return Rounded(found, shift, max(0.0, error) / total if total > 0 else 0.0)


def round_codes(
    weight: Tensor,
    step: Tensor,
    damped: factorization.Damped,
    grid: Grid,
    *,
    block: int = BLOCK,
    passes: int = PASSES,
) -> Tensor:
    """Codes [out, in], float64, never worse than the nearest ones in any row.

    Args:
        weight: [out, in] float64.
        step: [out, blocks].
        damped: the second moment of the input.
        grid: the codes that are allowed.
        block: columns between two updates of the rest; it changes the time, not the result.
        passes: of moving single codes afterwards.
    """
    step = step.double()
    near = fakequant.weight_codes(weight, step, grid).T
    # Columns are rows in here: whatever is done to one of them is done to numbers that lie side by side.
    across, spread = weight.T.contiguous(), fakequant.spread(step, weight.shape[1], grid.block).T.contiguous()
    upper = torch.linalg.cholesky(factorization.invert(damped), upper=True)
    passed = _Rounding(across, spread, grid).pass_on(upper, block)
    codes = torch.cat([passed, near], 1)
    both = _Rounding(torch.cat([across, across], 1), torch.cat([spread, spread], 1), grid)
    for _ in range(passes):
        codes = both.settle(codes, damped.matrix, block)
    passed, near = codes.chunk(2, 1)
    errors = [_errors((across - codes * spread).T, damped.matrix) for codes in (passed, near)]
    return torch.where(errors[0] <= errors[1], passed, near).T.contiguous()


def _errors(lost: Tensor, matrix: Tensor) -> Tensor:
    """The loss of every row, [out]."""
    return ((lost @ matrix) * lost).sum(1)


class _Rounding:
    """One weight and its steps, both [in, out] float64."""

    def __init__(self, weight: Tensor, step: Tensor, grid: Grid) -> None:
        self.weight, self.step, self.grid = weight, step, grid
        self.zero = weight == 0

    def column(self, values: Tensor, column: int, codes: Tensor) -> Tensor:
        """The nearest codes allowed for one column of values, given the codes of its neighbor."""
        scaled = values / self.step[column]
        other = column ^ 1
        if self.grid.paired and other < len(codes):
            low = (-PAIR - codes[other].clamp(max=0)).clamp_(min=self.grid.low)
            high = (PAIR - codes[other].clamp(min=0)).clamp_(max=self.grid.high)
            scaled = scaled.clamp_(low, high)  # bounds are codes themselves
        else:
            scaled = scaled.clamp_(self.grid.low, self.grid.high)
        wanted = fakequant.on_grid(scaled, floating=self.grid.floating)
        return wanted.masked_fill_(self.zero[column], 0.0)

    def pass_on(self, upper: Tensor, block: int) -> Tensor:
        """Round from left to right; errors go to the columns on the right. `upper` is U of H^-1 = U^T U."""
        left = self.weight.clone()
        codes = torch.zeros_like(left)
        inner, diagonal = len(left), upper.diagonal().tolist()
        for start in range(0, inner, block):
            end = min(start + block, inner)
            errors = torch.zeros(end - start, left.shape[1], dtype=left.dtype)
            for j in range(start, end):
                # The second of a pair finds the code of the first; the first finds zero.
                codes[j] = self.column(left[j], j, codes)
                errors[j - start] = (left[j] - codes[j] * self.step[j]) / diagonal[j]
                left[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j - start], alpha=-1)
            left[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        return codes

    def settle(self, codes: Tensor, matrix: Tensor, block: int) -> Tensor:
        """Move every code in turn to where it is best while the others stand still."""
        codes = codes.clone()
        slope = matrix @ (self.weight - codes * self.step)  # what each column would like to gain
        inner, diagonal = len(codes), matrix.diagonal().tolist()
        for start in range(0, inner, block):
            end = min(start + block, inner)
            moves = torch.zeros(end - start, codes.shape[1], dtype=codes.dtype)
            for j in range(start, end):
                now = codes[j] * self.step[j]
                codes[j] = self.column(now + slope[j] / diagonal[j], j, codes)
                moves[j - start] = codes[j] * self.step[j] - now
                slope[j:end].addr_(matrix[j, j:end], moves[j - start], alpha=-1)
            slope[end:].addmm_(matrix[start:end, end:].T, moves, alpha=-1)
        return codes

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

from compress.core import fakequant, obs
from compress.core.fakequant import GRIDS, PAIR, Grid, Precision, Quantized
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
    precision: Precision,
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
    damped = obs.damp(centered, damping, second.diagonal())
    step = fakequant.weight_step(full, GRIDS[precision], damped.matrix.diagonal())
    codes = round_codes(full, step, damped, GRIDS[precision])
    found = fakequant.packed(precision, codes, step, span)
    lost = full - found.weight().double()
    total = float(((full @ centered) * full).sum())
    error = float(((lost @ centered) * lost).sum())
    shift = torch.zeros(len(full), dtype=full.dtype) if mean is None else lost @ mean.double()
    return Rounded(found, shift, max(0.0, error) / total if total > 0 else 0.0)


def round_codes(
    weight: Tensor, step: Tensor, damped: obs.Damped, grid: Grid, *, block: int = BLOCK, passes: int = PASSES
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
    state = _Rounding(weight, fakequant.spread(step.double(), weight.shape[1], grid.block), grid)
    near = fakequant.weight_codes(weight, step.double(), grid)
    passed = state.pass_on(torch.linalg.cholesky(obs.invert(damped), upper=True), block)
    for _ in range(passes):
        passed, near = (state.settle(codes, damped.matrix, block) for codes in (passed, near))
    errors = [_errors(weight - codes * state.step, damped.matrix) for codes in (passed, near)]
    return torch.where((errors[0] <= errors[1])[:, None], passed, near)


def _errors(lost: Tensor, matrix: Tensor) -> Tensor:
    """The loss of every row, [out]."""
    return ((lost @ matrix) * lost).sum(1)


@dataclass(frozen=True)
class _Rounding:
    """One weight and its steps, both [out, in] float64."""

    weight: Tensor
    step: Tensor
    grid: Grid

    def column(self, values: Tensor, column: int, neighbor: Tensor | None) -> Tensor:
        """The nearest codes allowed for one column of values, given the codes of its neighbor."""
        low = torch.full_like(values, self.grid.low)
        high = torch.full_like(values, self.grid.high)
        if neighbor is not None:
            low = torch.maximum(low, -PAIR - neighbor.clamp(max=0))
            high = torch.minimum(high, PAIR - neighbor.clamp(min=0))
        scaled = (values / self.step[:, column]).clamp(low, high)  # bounds are codes themselves
        wanted = fakequant.on_grid(scaled, floating=self.grid.floating)
        return torch.where(self.weight[:, column] == 0, 0.0, wanted)

    def neighbor(self, codes: Tensor, column: int) -> Tensor | None:
        """The codes with which a column shares its bound."""
        other = column ^ 1
        return codes[:, other] if self.grid.paired and other < codes.shape[1] else None

    def pass_on(self, upper: Tensor, block: int) -> Tensor:
        """Round from left to right; errors go to the columns on the right. `upper` is U of H^-1 = U^T U."""
        left = self.weight.clone()
        codes = torch.zeros_like(left)
        inner = left.shape[1]
        for start in range(0, inner, block):
            end = min(start + block, inner)
            errors = torch.zeros(len(left), end - start, dtype=left.dtype)
            for j in range(start, end):
                # The second of a pair finds the code of the first; the first finds zero.
                codes[:, j] = self.column(left[:, j], j, self.neighbor(codes, j))
                errors[:, j - start] = (left[:, j] - codes[:, j] * self.step[:, j]) / upper[j, j]
                left[:, j + 1 : end].addr_(errors[:, j - start], upper[j, j + 1 : end], alpha=-1)
            left[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
        return codes

    def settle(self, codes: Tensor, matrix: Tensor, block: int) -> Tensor:
        """Move every code in turn to where it is best while the others stand still."""
        codes = codes.clone()
        slope = (self.weight - codes * self.step) @ matrix  # what each column would like to gain
        inner = codes.shape[1]
        for start in range(0, inner, block):
            end = min(start + block, inner)
            moves = torch.zeros(len(codes), end - start, dtype=codes.dtype)
            for j in range(start, end):
                now = codes[:, j] * self.step[:, j]
                wanted = self.column(now + slope[:, j] / matrix[j, j], j, self.neighbor(codes, j))
                moves[:, j - start] = wanted * self.step[:, j] - now
                codes[:, j] = wanted
                slope[:, j:end].addr_(moves[:, j - start], matrix[j, j:end], alpha=-1)
            slope[:, end:].addmm_(moves, matrix[start:end, end:], alpha=-1)
        return codes

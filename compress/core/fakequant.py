"""Numbers on 8 or 4 bits as float tensors: exactly what a low-precision runtime computes, with gradients.

A weight [out, in] becomes whole numbers times a positive step, one step a row or a block of columns; an
input becomes bytes with one step and one zero point for the whole tensor. Real zero is a whole number in
both, so every pattern of zeros survives. With codes `x / s - z` and `w / t` rounded, a linear map is

    y = (sum of products of codes) * (s * t) + b,

whose sum is exact in integers, and exact in float32 as well while it stays below 2^24.

Two details decide whether a runtime gives the same bits. Products of bytes with signed bytes are added
in pairs of neighboring columns, in 16 bits, on processors with AVX2 but without VNNI: the sum saturates
when two neighbors of one sign exceed 128 together (255 * 129 > 2^15 - 1). The usual remedy gives away a
whole bit of every weight; here only the sum of two neighbors is held (`Grid.paired`), and most rows
lose less than half a bit. And rounding is to even, as in `torch.round`.

Gradients pass rounding unchanged and stop where a code is clipped. Since a step both divides the input
and multiplies the sum, ordinary differentiation then gives the gradient of learned step sizes:
`round(v) - v` inside and the bound outside.

On `fp8` codes are no whole numbers but those of e4m3: four bits of exponent and three of mantissa, up to
448, so that their relative error is the same over four decades and a range need not be tight. Weight and
input have one step each, products are summed in float.

References: ONNX DynamicQuantizeLinear; Esser et al., "Learned Step Size Quantization", arXiv 1902.08153;
Micikevicius et al., "FP8 Formats for Deep Learning", arXiv 2209.05433.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats import number_format

PAIR = 128  # two neighbors of one sign, together
BYTE = 255
SHRINK = 0.4  # how far below the largest weight a step may aim
TRIALS = 25


@dataclass(frozen=True)
class Grid:
    """The codes that a weight may have: from `low` to `high`, one step for `block` columns of a row.

    `block` 0 is one step for the whole row. With `paired`, columns 2k and 2k + 1 of one sign add up to
    at most 128. A `floating` one holds the numbers of e4m3, with one step for the whole weight.
    """

    low: int
    high: int
    block: int = 0
    paired: bool = False
    floating: bool = False


def grid_of(precision: str) -> Grid:
    """The codes of a number format, by its name."""
    found = number_format(precision)
    return Grid(found.low, found.high, found.group, paired=found.paired, floating=found.floating)


@dataclass(frozen=True)
class Quantized:
    """A weight in low precision: `codes` [out, in], int8 or float8, times `step` [out, blocks] float32.

    `input_step` and `input_zero` say which bytes its input becomes, for int8-static and fp8 alone.
    """

    precision: str
    codes: Tensor
    step: Tensor
    input_step: float | None = None
    input_zero: int = 0

    @property
    def block(self) -> int:
        """Columns that share a step, 0 for all."""
        return grid_of(self.precision).block

    def weight(self) -> Tensor:
        """The float32 weight that the codes stand for, [out, in]."""
        return self.codes.float() * spread(self.step, self.codes.shape[1], self.block)

    def weight_bytes(self) -> int:
        """Bytes of codes and steps in a file; 4-bit codes lie two to a byte, in whole blocks."""
        out, inner = self.codes.shape
        steps = 4 if grid_of(self.precision).floating else 4 * self.step.numel()
        return (
            out * inner + steps
            if not self.block
            else out * blocks(inner, self.block) * self.block // 2 + steps
        )


def on_grid(values: Tensor, *, floating: bool) -> Tensor:
    """Values as the nearest whole numbers or, within 448, numbers of e4m3; without a gradient."""
    return values.float().to(torch.float8_e4m3fn).to(values.dtype) if floating else values.round()


class _Round(torch.autograd.Function):
    """Rounding to even, to whole numbers or to those of e4m3, whose gradient is that of the identity."""

    @staticmethod
    def forward(_context: object, values: Tensor, floating: bool) -> Tensor:
        return on_grid(values, floating=floating)

    @staticmethod
    def backward(_context: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(context: torch.autograd.function.FunctionCtx, values: Tensor, factor: float) -> Tensor:
        context.factor = factor  # type: ignore[attr-defined]
        return values.view_as(values)

    @staticmethod
    def backward(context: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * context.factor, None  # type: ignore[attr-defined]


def rounded(values: Tensor, *, floating: bool = False) -> Tensor:
    """Whole numbers, or those of e4m3 (of values within 448); the gradient passes straight through.

    >>> rounded(torch.tensor([0.5, 1.5, -0.7])).tolist()
    [0.0, 2.0, -1.0]
    >>> rounded(torch.tensor([17.0, 19.0, -100.0]), floating=True).tolist()
    [16.0, 20.0, -96.0]
    """
    found: Tensor = _Round.apply(values, floating)  # type: ignore[no-untyped-call]
    return found


def damped_step(step: Tensor, elements: int, high: int) -> Tensor:
    """A step that learns at the pace of what it divides: its gradient over `sqrt(elements * high)`.

    Reference: arXiv 1902.08153, section 2.2.
    """
    found: Tensor = _ScaledGradient.apply(step, (elements * high) ** -0.5)  # type: ignore[no-untyped-call]
    return found


def blocks(inner: int, block: int) -> int:
    """How many blocks cover `inner` columns; the last one may be padded."""
    return -(-inner // block) if block else 1


def spread(step: Tensor, inner: int, block: int) -> Tensor:
    """Steps [out, blocks] so that they multiply a weight [out, inner].

    >>> spread(torch.tensor([[1.0, 2.0]]), 3, 2).tolist()
    [[1.0, 1.0, 2.0]]
    """
    return step.repeat_interleave(block, 1)[:, :inner] if block else step.expand(-1, inner)


def weight_codes(weight: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """Codes of a weight by rounding to the nearest, [out, in] in the weight's own float type.

    The gradient is one inside of the grid and zero where a code is clipped.

    >>> weight_codes(torch.tensor([[0.9, -0.2]]), torch.tensor([[0.1]]), Grid(-7, 7)).tolist()
    [[7.0, -2.0]]
    """
    scaled = weight / spread(step, weight.shape[1], grid.block)
    codes = rounded(scaled.clamp(grid.low, grid.high), floating=grid.floating)
    return _fit_pairs(codes, scaled) if grid.paired else codes


def _fit_pairs(codes: Tensor, scaled: Tensor) -> Tensor:
    """Codes of which two neighbors of one sign add up to at most 128: both give up half of the rest."""
    with torch.no_grad():
        whole = codes.shape[1] // 2 * 2
        first, second = codes[:, 0:whole:2], codes[:, 1:whole:2]
        excess = torch.where(first * second > 0, first.abs() + second.abs() - PAIR, 0.0).clamp(min=0)
        nearer = first.abs() - scaled[:, 0:whole:2].abs() < second.abs() - scaled[:, 1:whole:2].abs()
        less = torch.where(nearer, (excess / 2).floor(), (excess / 2).ceil())
        bound = torch.full_like(codes, torch.inf)
        bound[:, 0:whole:2] = torch.where(excess > 0, first.abs() - less, torch.inf)
        bound[:, 1:whole:2] = torch.where(excess > 0, second.abs() - (excess - less), torch.inf)
    return codes.clamp(-bound, bound)


def weight_step(weight: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """Steps [out, blocks] with the least squared rounding error, float32, never 0.

    Between the step that clips nothing and 0.4 of it, 25 are tried for every row or block. Of a floating
    grid it is the step that clips nothing, the same for all rows.

    Args:
        weight: [out, in].
        grid: the codes.
        importance: [in], how much an error of each column counts; all the same by default.
    """
    padded = _in_blocks(weight.detach().abs(), grid)
    if grid.floating:
        largest = padded.amax() / grid.high
        return torch.where(largest > 0, largest, 1.0).to(torch.float32).expand(len(weight), 1).clone()
    full = padded.amax(-1) / grid.high  # [out, blocks]
    if grid.paired:
        signs = weight.detach()
        full = torch.maximum(full, _largest_pair(signs.clamp(min=0), -signs.clamp(max=0))[:, None] / PAIR)
    full = torch.where(full > 0, full, 1.0).to(torch.float32)
    best, least = full, torch.full_like(full, torch.inf)
    for trial in torch.linspace(1, SHRINK, TRIALS).tolist():
        step = full * trial
        lost = (
            weight_codes(weight, step, grid) * spread(step, weight.shape[1], grid.block) - weight
        ).square()
        error = _in_blocks(lost if importance is None else lost * importance, grid).sum(-1)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error.to(least.dtype), least)
    return best


def _in_blocks(values: Tensor, grid: Grid) -> Tensor:
    """[out, in] as [out, blocks, columns of a block], zeros behind the end."""
    out, inner = values.shape
    size = grid.block or inner
    padded = torch.nn.functional.pad(values, (0, blocks(inner, grid.block) * size - inner))
    return padded.reshape(out, -1, size)


def _largest_pair(*parts: Tensor) -> Tensor:
    """The largest sum of columns 2k and 2k + 1 over the parts, [out]."""
    sums = []
    for part in parts:
        even = torch.nn.functional.pad(part, (0, part.shape[1] % 2))
        sums.append(even.reshape(len(part), -1, 2).sum(2))
    return torch.stack(sums).amax((0, 2))


def nearest(weight: Tensor, precision: str, span: tuple[float, float] | None = None) -> Quantized:
    """A weight by rounding to the nearest, with the steps of least error.

    Raises:
        CompressError: int8-static or fp8 without the range of the input.
    """
    grid = grid_of(precision)
    step = weight_step(weight, grid)
    return packed(precision, weight_codes(weight.detach(), step, grid), step, span)


def packed(precision: str, codes: Tensor, step: Tensor, span: tuple[float, float] | None) -> Quantized:
    """Codes and steps with the bytes of the input, whose range `span` int8-static and fp8 alone have.

    Raises:
        CompressError: a range is missing, or not wanted.
    """
    if (precision in ("int8-static", "fp8")) != (span is not None):
        raise CompressError(
            f"{precision} with an input range of {span}: int8-static and fp8 need one, others none"
        )
    if span is not None and grid_of(precision).floating:
        largest = max(abs(end) for end in span)
        read = torch.tensor(largest / grid_of(precision).high if largest else 1.0)
        return Quantized(precision, codes.float().to(torch.float8_e4m3fn), step, float(read))
    if span is None:
        return Quantized(precision, codes.to(torch.int8), step)
    input_step, zero = affine(torch.tensor(span[0]), torch.tensor(span[1]))
    return Quantized(precision, codes.to(torch.int8), step, float(input_step), int(zero))


def dynamic_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero point (float32 scalars) of a whole tensor, as ONNX DynamicQuantizeLinear defines them.

    >>> [float(part) for part in dynamic_range(torch.tensor([-1.0, 0.0, 254.0]))]
    [1.0, 1.0]
    """
    low, high = torch.aminmax(values.detach())
    return affine(low, high)


def affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Step and zero point of bytes that cover [low, high] and zero."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / BYTE
    step = torch.where(step > 0, step, torch.ones_like(step))
    return step, (-low / step).clamp(0, BYTE).round()


def input_codes(values: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    """Codes of an input less their zero point: whole numbers between `-zero` and `255 - zero`.

    The gradient is one inside and zero where a value is clipped.
    """
    return rounded((values / step).clamp(-zero, BYTE - zero))


def float_codes(values: Tensor, step: Tensor) -> Tensor:
    """Codes of an input in e4m3; the gradient is one inside and zero where a value is clipped.

    >>> float_codes(torch.tensor([0.3, 1e4]), torch.tensor(0.25)).tolist()
    [1.25, 448.0]
    """
    grid = grid_of("fp8")
    return rounded((values / step).clamp(grid.low, grid.high), floating=True)


def block_codes(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Signed bytes of an input with one step for `block` columns of a row, as int4 products read it.

    Returns:
        codes [rows, blocks, block], zeros behind the end, and steps [rows, blocks, 1].
    """
    apart = _in_blocks(values, Grid(-127, 127, block))
    step = apart.detach().abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(step > 0, 1 / step, torch.zeros_like(step))
    return rounded(apart * inverse), step


def integer_product(codes: Tensor, weight: Tensor) -> Tensor:
    """The sum of products as an integer runtime has it, [rows, out] int32, exact for any codes.

    Args:
        codes: [rows, in] input codes less their zero point.
        weight: [out, in] codes.

    >>> integer_product(torch.tensor([[2.0, -3.0]]), torch.tensor([[5, 7]])).tolist()
    [[-11]]
    """
    return (codes.double() @ weight.double().T).to(torch.int32)

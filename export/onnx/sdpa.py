"""Attention of torch as operators of the ONNX standard, without the guard against rows that see nothing."""

import onnx_ir as ir
from onnxscript import opset20 as op

from compress.errors import CompressError

SMALLEST = -3.4028234663852886e38  # finite, so that a row that is masked throughout stays a number


def attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:
    """The ONNX form of `scaled_dot_product_attention`; arguments and shapes are torch's."""
    width = _length(query, -1)
    rank = len(_shape(key))
    if enable_gqa:
        times = _length(query, -3) // _length(key, -3)
        key, value = (_repeated(part, times) for part in (key, value))
    scores = op.MatMul(query, op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2]))
    factor = width**-0.5 if scale is None else scale
    scores = op.Mul(scores, op.Constant(value_float=float(factor)))
    if is_causal:
        sides = [op.Shape(part, start=-2, end=-1) for part in (query, key)]
        square = op.Expand(op.Constant(value_float=1.0), op.Concat(*sides, axis=0))
        attn_mask = op.Cast(op.Trilu(square, upper=0), to=ir.DataType.BOOL.value)
    if attn_mask is not None:
        if is_causal or attn_mask.dtype == ir.DataType.BOOL:
            zero, never = (op.Constant(value_float=number) for number in (0.0, SMALLEST))
            attn_mask = op.Where(attn_mask, zero, never)
        scores = op.Add(scores, attn_mask)
    context: ir.Value = op.MatMul(op.Softmax(scores, axis=-1), value)
    return context


def _repeated(part: ir.Value, times: int) -> ir.Value:
    """[batch, groups, tokens, width] -> [batch, groups * times, tokens, width]."""
    wide = op.Unsqueeze(part, op.Constant(value_ints=[2]))
    wide = op.Expand(wide, op.Constant(value_ints=[1, 1, times, 1, 1]))
    ends = [op.Shape(part, start=0, end=1), op.Shape(part, start=2, end=4)]
    heads = op.Constant(value_ints=[_length(part, 1) * times])
    repeated: ir.Value = op.Reshape(wide, op.Concat(ends[0], heads, ends[1], axis=0))
    return repeated


def _shape(value: ir.Value) -> ir.Shape:
    if value.shape is None:
        raise CompressError("an attention of unknown shape cannot be written as ONNX")
    return value.shape


def _length(value: ir.Value, dim: int) -> int:
    """A size that is a number: heads and features, never batch or tokens."""
    size = _shape(value)[dim]
    if not isinstance(size, int):
        raise CompressError(
            f"an attention with {size} heads or features cannot be written as ONNX; only batch and tokens "
            "may be free"
        )
    return size

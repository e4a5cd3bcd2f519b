"""4-bit weights in groups of 32 columns: onnxruntime's MatMulNBits, which reads inputs in blocks of bytes."""

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from compress import formats
from compress.core.fakequant import Quantized, blocks
from compress.export.onnx.block_sparse import Array
from compress.methods.int8 import Rounding

if TYPE_CHECKING:
    from compress.export.onnx.quantized import GraphWriter

MICROSOFT = "com.microsoft"
INT8_INPUTS = 4  # MatMulNBits reads its input as signed bytes


class Int4(Rounding):
    """4-bit weights, inputs in blocks of 8 bits."""

    format = formats.INT4

    def write(self, graph: "GraphWriter", node: ir.Node, name: str, codes: Quantized) -> ir.Value:
        """One MatMulNBits."""
        out, inner = codes.codes.shape
        graph.model.opset_imports[MICROSOFT] = 1
        attributes = [
            ir.AttrInt64("K", inner),
            ir.AttrInt64("N", out),
            ir.AttrInt64("bits", self.format.bits),
            ir.AttrInt64("block_size", codes.block),
            ir.AttrInt64("accuracy_level", INT8_INPUTS),
        ]
        operands: list[ir.Value | None] = [
            graph.input(node),
            graph.weight(f"{name}_codes", packed(codes)),
            graph.weight(f"{name}_step", codes.step.numpy().reshape(-1)),
        ]
        bias = graph.bias(node)
        if bias is not None:
            operands += [None, None, bias]
        return graph.add(node, "MatMulNBits", operands, attributes, domain=MICROSOFT)[0]


def packed(found: Quantized) -> Array:
    """Codes of 4 bits, two to a byte with the lower column in the lower half, [out, blocks, bytes].

    They are stored 8 higher, as MatMulNBits reads them; columns behind the end hold the code of zero.
    """
    out, inner = found.codes.shape
    count = blocks(inner, found.block)
    raised = np.full((out, count * found.block), 8, dtype=np.uint8)
    raised[:, :inner] = (found.codes.numpy().astype(np.int16) + 8).astype(np.uint8)
    apart = raised.reshape(out, count, found.block)
    return np.asarray(apart[..., 0::2] | (apart[..., 1::2] << 4), dtype=np.uint8)


MOVE = Int4()

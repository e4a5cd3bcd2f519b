"""A move that the product does not know: 8-bit weights in groups of 16 columns, inputs in float."""

import numpy as np
import onnx_ir as ir
import torch.nn.functional as F

from compress.core import fakequant
from compress.formats import MoveFacts, NumberFormat
from compress.methods.int8 import Rounding
from compress.methods.quantized_layers import QuantizedLinear

GROUP = 16
FORMAT = NumberFormat(
    name="w8-group16", kernel="int8", bits=8, low=-127, high=127, group=GROUP, range="none", trainable=False
)
FACTS = MoveFacts(
    description="8-bit weights in groups of 16 columns",
    implementation="support.toy_move",
    formats=(FORMAT,),
)


class GroupedLinear(QuantizedLinear):
    """Products in float with weights from their codes."""

    def forward(self, input):
        values, codes = input, self.fixed
        if self.columns is not None:
            values = values[..., self.columns]
        return F.linear(values, codes * fakequant.spread(self.step, codes.shape[1], GROUP), self.bias)


class GroupedWeights(Rounding):
    """Weights are stored as codes and steps, and dequantized in front of the same Gemm."""

    format = FORMAT

    def layer(self, dense, place, *, learn):
        return GroupedLinear(dense, place, learn=learn)

    def write(self, graph, node, name, codes):
        out, inner = codes.codes.shape
        groups = fakequant.blocks(inner, GROUP)
        padded = np.zeros((out, groups * GROUP), dtype=np.int8)
        padded[:, :inner] = codes.codes.numpy()
        rows = [
            graph.weight(f"{name}_codes", padded.reshape(-1, GROUP)),
            graph.weight(f"{name}_step", codes.step.numpy().reshape(-1)),
        ]
        values = graph.add(node, "DequantizeLinear", rows, [ir.AttrInt64("axis", 0)])[0]
        shape = graph.weight(f"{name}_shape", np.array([out, groups * GROUP]))
        whole = graph.add(node, "Reshape", [values, shape])[0]
        ends = [
            graph.weight(f"{name}_{end}", np.array([at]))
            for end, at in (("first", 0), ("last", inner), ("axis", 1))
        ]
        weight = graph.add(node, "Slice", [whole, *ends])[0]
        bias = graph.bias(node)
        operands = [graph.input(node), weight, *([] if bias is None else [bias])]
        return graph.add(node, "Gemm", operands, [ir.AttrInt64("transB", 1)])[0]


MOVE = GroupedWeights()

"""8-bit floating-point products (e4m3): QuantizeLinear and DequantizeLinear with float8 around a Gemm."""

from typing import TYPE_CHECKING

import ml_dtypes
import onnx_ir as ir
import torch
from torch import nn

from compress import formats
from compress.core import fakequant
from compress.core.fakequant import Quantized
from compress.export.backends.torch_kernels import TIMED_SPAN, Fp8Linear, Kernel
from compress.ir import Option
from compress.methods.int8 import Rounding
from compress.methods.move import InputStatistics

if TYPE_CHECKING:
    from compress.export.onnx.quantized import GraphWriter

LARGEST_INPUT_RMS = 16.0  # end of the input range, in root mean squares of the input's largest feature


class Fp8(Rounding):
    """8-bit floating-point weights and inputs, one step each."""

    format = formats.FP8

    def input_range(self, inputs: InputStatistics) -> tuple[float, float]:
        """Far enough that nothing is clipped: small numbers lose nothing by it."""
        most = LARGEST_INPUT_RMS * float(inputs.second.diagonal().max().clamp(min=0).sqrt())
        return -most, most

    def write(self, graph: "GraphWriter", node: ir.Node, name: str, codes: Quantized) -> ir.Value:
        """A Gemm between dequantized float8 numbers, with the bias in float."""
        numbers = codes.codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        step = graph.weight(f"{name}_step", codes.step[0, 0].numpy())
        weight = graph.add(node, "DequantizeLinear", [graph.weight(f"{name}_codes", numbers), step])[0]
        operands = [graph.fixed_codes(node, name, codes), weight]
        bias = graph.bias(node)
        if bias is not None:
            operands.append(bias)
        return graph.add(node, "Gemm", operands, [ir.AttrInt64("transB", 1)])[0]

    def torch_kernel(self, option: Option) -> Kernel:
        """Torch's scaled product of float8, whose sizes are multiples of 16."""

        def deploy(codes: Quantized, layer: nn.Linear) -> nn.Module:
            assert codes.input_step is not None
            numbers = codes.codes.to(layer.weight.device)
            return Fp8Linear(numbers, float(codes.step[0, 0]), codes.input_step, layer.bias)

        def timed(layer: nn.Linear) -> nn.Module:
            weight = layer.weight.detach().float()
            return deploy(fakequant.nearest(weight, self.format.name, TIMED_SPAN), layer)

        return Kernel(16, 16, timed, deploy)


MOVE = Fp8()

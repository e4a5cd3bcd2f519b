"""8-bit products whose input range is found in every run: DynamicQuantizeLinear and MatMulInteger.

Weights are rounded by GPTQ with one step a row (Frantar et al., "GPTQ", arXiv 2210.17323).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from torch import nn

from compress import formats
from compress.core import fakequant, gptq
from compress.core.fakequant import Quantized
from compress.export.backends.backend import Capabilities
from compress.export.backends.torch_kernels import Int8Linear, Kernel
from compress.formats import NumberFormat
from compress.ir import Option, Site
from compress.methods.move import InputStatistics, Move, WeightUnderOption

if TYPE_CHECKING:
    from compress.export.onnx.quantized import GraphWriter


class Rounding(Move):
    """Weights rounded to a number format so that outputs change least."""

    format: NumberFormat

    def options(self, site: Site, runtime: Capabilities, blocks: Sequence[str]) -> list[Option]:
        """The format itself."""
        return [Option(precision=self.format.name)]

    def applies(self, option: Option) -> bool:
        """Whether the products run in the format."""
        return option.precision == self.format.name

    def solve(self, option: Option, made: WeightUnderOption, inputs: InputStatistics) -> WeightUnderOption:
        """The matrix rounded; zeros stay zero."""
        rounded = gptq.quantize(
            made.values,
            inputs.second,
            inputs.mean,
            self.format.name,
            span=self.input_range(inputs),
            damping=inputs.damping,
        )
        return WeightUnderOption(
            rounded.quantized.weight().double(),
            made.shift + rounded.shift,
            made.error_with(rounded.error),
            codes=rounded.quantized,
        )

    def input_range(self, inputs: InputStatistics) -> tuple[float, float] | None:
        """The range of inputs that follows from their moments, where the format needs one."""
        return None


class Int8(Rounding):
    """8-bit weights and inputs."""

    format = formats.INT8

    def write(self, graph: "GraphWriter", node: ir.Node, name: str, codes: Quantized) -> ir.Value:
        """The sum of products of codes, scaled afterwards; inputs are quantized once for all readers."""
        read, step, zero = graph.dynamic_codes(node)
        weight = graph.weight(f"{name}_codes", np.ascontiguousarray(codes.codes.numpy().T))
        steps = graph.weight(f"{name}_step", codes.step[:, 0].numpy())
        summed = graph.add(node, "MatMulInteger", [read, weight, zero])[0]
        real = graph.add(node, "Cast", [summed], [ir.AttrInt64("to", ir.DataType.FLOAT.value)])[0]
        scaled = graph.add(node, "Mul", [real, graph.add(node, "Mul", [step, steps])[0]])[0]
        bias = graph.bias(node)
        return scaled if bias is None else graph.add(node, "Add", [scaled, bias])[0]

    def torch_kernel(self, option: Option) -> Kernel:
        """Torch's product of signed bytes, whose sizes are multiples of 8."""

        def deploy(codes: Quantized, layer: nn.Linear) -> nn.Module:
            device = layer.weight.device
            return Int8Linear(codes.codes.to(device), codes.step[:, 0].to(device), layer.bias)

        def timed(layer: nn.Linear) -> nn.Module:
            return deploy(fakequant.nearest(layer.weight.detach().float(), self.format.name), layer)

        return Kernel(8, 8, timed, deploy)


MOVE = Int8()

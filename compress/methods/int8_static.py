"""8-bit products whose input range comes from calibration: a Gemm between dequantized codes."""

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from compress import formats
from compress.calibration.activation_statistics import Statistics
from compress.core import fakequant, obs
from compress.core.fakequant import Quantized
from compress.errors import CompressError
from compress.export.onnx.quantized import integer_bias
from compress.ir import Option, Site
from compress.methods.int8 import Rounding
from compress.sites.prune import Removal

if TYPE_CHECKING:
    from compress.export.onnx.quantized import GraphWriter


class Int8Static(Rounding):
    """8-bit weights and inputs, with the codes of `int8` and ranges that are fixed."""

    format = formats.INT8_STATIC

    def from_twin(self, site: Site, twin: Removal, statistics: Statistics) -> Removal:
        """The same codes, for inputs whose ranges are fixed.

        Raises:
            CompressError: the statistics hold no ranges.
        """
        if statistics.range is None or statistics.reader_span is None:
            raise CompressError(f"{site.name}: no ranges of its inputs; calibrate with spans = true")
        own = statistics.range.of(obs.columns(twin.kept, site.column.width))
        made = copy.deepcopy(twin)  # a file stores no tensor twice under two names
        codes = {
            name: fakequant.packed(
                self.format.name,
                found.codes,
                found.step,
                own if name == site.writer else statistics.reader_span,
            )
            for name, found in made.codes.items()
        }
        option = Option.of(twin.form, None).model_copy(update={"precision": self.format.name})
        return replace(made, form=option.form, codes=codes)

    def write(self, graph: "GraphWriter", node: ir.Node, name: str, codes: Quantized) -> ir.Value:
        """A Gemm between dequantized codes, of which onnxruntime makes one kernel of integers."""
        assert codes.input_step is not None
        by_row = [ir.AttrInt64("axis", 0)]
        steps = codes.step[:, 0].numpy()
        # onnxruntime takes the product for one of integers only where every zero point is written out.
        zeros = graph.weight(f"{name}_zero", np.zeros(len(steps), dtype=np.int8))
        parts = [
            graph.weight(f"{name}_codes", codes.codes.numpy()),
            graph.weight(f"{name}_step", steps),
            zeros,
        ]
        operands = [
            graph.fixed_codes(node, name, codes),
            graph.add(node, "DequantizeLinear", parts, by_row)[0],
        ]
        bias = graph.bias(node)
        step = np.float32(codes.input_step) * steps
        whole = None if bias is None or graph.signed else integer_bias(name, bias, step)
        if bias is not None and graph.signed:
            operands.append(bias)
        elif whole is not None:
            biases = [
                graph.weight(f"{name}_bias", whole),
                graph.weight(f"{name}_bias_step", step),
                graph.weight(f"{name}_bias_zero", np.zeros(len(steps), dtype=np.int32)),
            ]
            operands.append(graph.add(node, "DequantizeLinear", biases, by_row)[0])
        made = graph.add(node, "Gemm", operands, [ir.AttrInt64("transB", 1)])[0]
        left = bias is not None and len(operands) == 2
        return graph.add(node, "Add", [made, bias])[0] if left else made


MOVE = Int8Static()

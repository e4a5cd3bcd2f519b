"""Products of an ONNX file in low precision, in the forms that onnxruntime runs fastest.

Every linear layer of a file is `Gemm(x [rows, in], W, b, transB=1)`; `lower` finds it by the name of its
weight, and the move of its number format (`methods.int8`, `int8_static`, `int4`, `fp8`) writes what stands
in its place: products of integers, or codes that are dequantized around the same Gemm.

Measured with one thread on AVX2 without VNNI, against float32, 128 rows: dynamic and static 1.8 to 2.1
times as fast, int4 0.84 to 0.99; with 8 rows 1.7 to 2.8, and int4 1.0 to 1.5. Weights as unsigned bytes,
which never saturate, would be a quarter slower than signed ones; `core.fakequant` keeps those in bounds.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch

from compress import formats
from compress.core.fakequant import Quantized, blocks, grid_of
from compress.errors import CompressError
from compress.export.onnx.block_sparse import Array

CHAIN_SPAN = (0.03, 128)  # step and zero point of inputs about one in size


def lower(model: ir.Model, products: Mapping[str, Quantized], *, signed: bool = False) -> None:
    """Rewrite the products of these weights, in place.

    Args:
        model: as `writer` writes it; weights are what the codes stand for, biases are used as they are.
        products: codes by the name of the weight.
        signed: for TensorRT, where inputs are signed bytes about zero and biases stay in float; ranges of
            int8-static must then be symmetric, which is a zero point of 128.

    Raises:
        CompressError: a weight is read by no Gemm, or has another shape than its codes, or the form
            cannot be `signed`.
    """
    gemms = [node for node in model.graph if node.op_type == "Gemm" and _weight_name(node) in products]
    for name, found in products.items():
        _check(model, name, found, [node for node in gemms if _weight_name(node) == name])
    writer = GraphWriter(model, signed=signed)
    for node in gemms:  # in the order of the graph, so that what is shared stands before all its readers
        name = _weight_name(node)
        writer.product(node, name, products[name])
    passes.RemoveUnusedNodesPass()(model)


def lower_chain(file: bytes, precision: str) -> bytes:
    """A chain of `onnx_chain` with every product in low precision, to be timed: its codes are random."""
    model = ir.serde.deserialize_model(onnx.load_from_string(file))
    random = np.random.default_rng(0)
    products = {}
    for name in product_weights(model):
        weight = model.graph.initializers[name].const_value
        assert weight is not None
        out, inner = weight.shape.numpy()
        products[name] = _made_up(precision, out, inner, random)
    lower(model, products)
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def product_weights(model: ir.Model) -> list[str]:
    """The names of the weights that products read, in the order of the graph, each once."""
    names = dict.fromkeys(_weight_name(node) for node in model.graph if node.op_type == "Gemm")
    return [name for name in names if name in model.graph.initializers]


def _made_up(precision: str, out: int, inner: int, random: np.random.Generator) -> Quantized:
    """Codes that no kernel can tell from real ones."""
    grid = grid_of(precision)
    largest = min(grid.high, 63)
    codes = random.integers(-largest, largest + 1, (out, inner), dtype=np.int8)
    step = torch.full((out, blocks(inner, grid.block)), 1e-3)
    if grid.floating:
        floats = torch.from_numpy(codes).float().to(torch.float8_e4m3fn)
        return Quantized(precision, floats, step, CHAIN_SPAN[0])
    static = CHAIN_SPAN if formats.number_format(precision).range == "calibrated" else (None, 0)
    return Quantized(precision, torch.from_numpy(codes), step, *static)


def _check(model: ir.Model, name: str, found: Quantized, readers: list[ir.Node]) -> None:
    weight = model.graph.initializers.get(name)
    if weight is None or weight.const_value is None or not readers:
        few = ", ".join(product_weights(model)[:3])
        raise CompressError(
            f"{name} is read by no product of the file, which has {few or 'none'} and so on; a plan and a "
            "file of different models cannot be combined"
        )
    shape, codes = list(weight.const_value.shape.numpy()), list(found.codes.shape)
    if shape != codes:
        raise CompressError(
            f"{name} is {shape} in the file, but its codes are {codes}; export the model again"
        )
    for node in readers:
        flags = [node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)]
        scales = [node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)]
        if flags != [0, 1] or scales != [1.0, 1.0]:
            raise CompressError(
                f"{name} is read by a Gemm with transA, transB = {flags} and factors {scales}"
            )


class GraphWriter:
    """Adds nodes and weights to a graph; remembers inputs that are bytes already."""

    def __init__(self, model: ir.Model, *, signed: bool) -> None:
        self.model = model
        self.signed = signed
        self.graph = model.graph
        self.dynamic: dict[ir.Value, list[ir.Value]] = {}
        self.static: dict[tuple[ir.Value, str, float, int], ir.Value] = {}

    def product(self, node: ir.Node, name: str, found: Quantized) -> None:
        """Write one product in place of a Gemm, as the move of its format does; redirect its readers."""
        made = formats.move_of_format(found.precision).write(self, node, name, found)
        old = node.outputs[0]
        made.shape, made.type = old.shape, old.type
        if old.is_graph_output():
            made.name, old.name = old.name, f"{old.name}_before"
        old.replace_all_uses_with(made, replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def input(self, node: ir.Node) -> ir.Value:
        """What the Gemm reads, [rows, in]."""
        return _input(node, 0)

    def bias(self, node: ir.Node) -> ir.Value | None:
        """The bias of the Gemm, [out]."""
        return node.inputs[2] if len(node.inputs) > 2 else None

    def dynamic_codes(self, node: ir.Node) -> list[ir.Value]:
        """Codes, step and zero point of a Gemm's input by DynamicQuantizeLinear, once for all readers."""
        source = _input(node, 0)
        if source not in self.dynamic:
            self.dynamic[source] = self.add(node, "DynamicQuantizeLinear", [source], outputs=3)
        return self.dynamic[source]

    def fixed_codes(self, node: ir.Node, name: str, found: Quantized) -> ir.Value:
        """The input of a product as bytes and back, once for all products with the same range."""
        source, step, zero = _input(node, 0), found.input_step, found.input_zero
        assert step is not None
        if grid_of(found.precision).floating:
            source = self._without_relu(source)
        key = (source, found.precision, step, zero)
        if key not in self.static:
            origin = self._origin(name, found)
            given = [
                self.weight(f"{name}_input_step", np.array(step, dtype=np.float32)),
                self.weight(f"{name}_input_zero", origin),
            ]
            codes = self.add(node, "QuantizeLinear", [source, *given])[0]
            self.static[key] = self.add(node, "DequantizeLinear", [codes, *given])[0]
        return self.static[key]

    def _without_relu(self, source: ir.Value) -> ir.Value:
        """The input with its Relu written as `max(x, 0)`, where one made it.

        Before bytes whose lowest code is that of zero a Relu does nothing, and onnxruntime drops it; it
        takes the code 0 of e4m3 for the lowest, too.
        """
        relu = source.producer()
        if relu is None or relu.op_type != "Relu":
            return source
        floor = self.weight("relu_floor", np.zeros((), dtype=np.float32))
        spelled = self.add(relu, "Max", [_input(relu, 0), floor])[0]
        spelled.shape, spelled.type = source.shape, source.type
        source.replace_all_uses_with(spelled)
        self.graph.remove(relu, safe=True)
        return spelled

    def _origin(self, name: str, found: Quantized) -> Array:
        """The code of real zero, whose type says what an input becomes."""
        if grid_of(found.precision).floating:
            return np.zeros((), dtype=ml_dtypes.float8_e4m3fn)
        if not self.signed:
            return np.array(found.input_zero, dtype=np.uint8)
        if found.input_zero != 128:
            raise CompressError(
                f"{name}: signed bytes need a symmetric range, not a zero point of {found.input_zero}"
            )
        return np.array(0, dtype=np.int8)

    def add(
        self,
        before: ir.Node,
        operator: str,
        inputs: list[ir.Value | None] | list[ir.Value],
        attributes: list[ir.Attr] | None = None,
        *,
        outputs: int = 1,
        domain: str = "",
    ) -> list[ir.Value]:
        """A node in front of another; gives its outputs."""
        made = ir.Node(domain, operator, list(inputs), attributes or [], num_outputs=outputs)
        self.graph.insert_before(before, made)
        return list(made.outputs)

    def weight(self, name: str, values: Array) -> ir.Value:
        """A stored tensor; one of the same name is the same."""
        known = self.graph.initializers.get(name)
        if known is not None and known.const_value is not None:
            if not np.array_equal(known.const_value.numpy(), values):
                raise CompressError(f"{name} would have two values: products share a weight and nothing else")
            return known
        tensor = ir.tensor(values, name=name)
        made = ir.Value(
            name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(made)
        return made


def integer_bias(name: str, bias: ir.Value, step: Array) -> Array | None:
    """A bias in whole numbers of the steps of its product, [out] int32; None where 32 bits are too few."""
    if bias.const_value is None:
        raise CompressError(f"{name}: its bias is computed in the file, so it cannot be a whole number")
    whole = np.round(bias.const_value.numpy() / step)
    return whole.astype(np.int32) if np.abs(whole).max() < 2**31 else None


def _weight_name(node: ir.Node) -> str:
    return str(_input(node, 1).name)


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value

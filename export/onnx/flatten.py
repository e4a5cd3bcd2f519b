"""Rows instead of sentences: everything that works position by position runs on `[rows, features]`.

Exporters write a linear layer on `[batch, tokens, features]` as MatMul and Add. A runtime is faster with
one Gemm on `[batch * tokens, features]`, whose bias costs nothing, and onnxruntime's fusions of the
other form (SkipLayerNormalization, BiasGelu) take longer on a CPU than their parts. `linear` translates
a layer into Reshape, Gemm, Reshape; `flatten` then moves all row-wise operations in between, so that
the Reshapes meet and cancel. Only operators of the ONNX standard are used.
"""

from dataclasses import dataclass

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import opset20 as op

ELEMENTWISE = frozenset(
    (
        *("Abs", "Add", "Cast", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid"),
        *("HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "Pow"),
        *("Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Tanh"),
        *("ThresholdedRelu", "Where"),
    )
)
LAST_AXIS = {"LayerNormalization": -1, "RMSNormalization": -1, "Softmax": -1, "Split": 0}  # defaults
REDUCTIONS = frozenset(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"))
Dimensions = tuple[int | str, ...]


@dataclass(frozen=True)
class _Rows:
    """`value` [rows, features] stands for a tensor `[*lead, features]`; `shape` computes the lead."""

    value: ir.Value
    lead: Dimensions
    shape: ir.Value


def linear(hidden: ir.Value, weight: ir.Value, bias: ir.Value | None = None) -> ir.Value:
    """The ONNX form of `torch.nn.functional.linear`: one Gemm that reads the weight as stored."""
    out, inner = _dimensions(weight) or (0, 0)
    operands = (weight,) if bias is None else (weight, bias)
    if len(_dimensions(hidden) or ()) == 2:
        plain: ir.Value = op.Gemm(hidden, *operands, transB=1)
        return plain
    rows = op.Reshape(hidden, op.Constant(value_ints=[-1, inner]))
    product = op.Gemm(rows, *operands, transB=1)
    lead = op.Shape(hidden, start=0, end=-1)
    whole: ir.Value = op.Reshape(product, op.Concat(lead, op.Constant(value_ints=[out]), axis=0))
    return whole


def flatten(model: ir.Model) -> int:
    """Move row-wise operations onto `[rows, features]` in place; how many were moved."""
    walk = _Walk(model.graph)
    for node in list(model.graph):
        walk.visit(node)
    passes.RemoveUnusedNodesPass()(model)
    return walk.moved


class _Walk:
    """One pass over the nodes in their order; `rows` knows the flat twin of every value so far."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.rows: dict[ir.Value, _Rows] = {}
        self.moved = 0

    def visit(self, node: ir.Node) -> None:
        """Let the node work on rows, if it works row by row on something that has a flat twin."""
        if node.domain not in ("", "ai.onnx"):
            return
        if node.op_type == "Reshape":
            self._reshape(node)
        elif _is_row_wise(node) and any(value in self.rows for value in node.inputs if value):
            self._move(node)

    def _reshape(self, node: ir.Node) -> None:
        source, shape = node.inputs[0], node.inputs[1]
        result = node.outputs[0]
        if source is None or shape is None:
            return
        joins = _joins_rows(source, result, shape)
        if source in self.rows:
            flat = self.rows[source].value
            if joins:
                result.replace_all_uses_with(flat, replace_graph_outputs=True)
            elif not _copies_a_dimension(node):
                node.replace_input_with(0, flat)
        elif joins:
            lead = (_dimensions(source) or ())[:-1]
            if lead:
                self.rows[source] = _Rows(result, lead, self._lead_of(source, node))
            before = source.producer()
            if before is not None and before.op_type == "Reshape":
                node.replace_input_with(0, before.inputs[0])
        elif _splits_rows(source, result):
            lead = (_dimensions(result) or ())[:-1]
            cut = [self._constant([number], node) for number in (0, -1)]
            self.rows[result] = _Rows(source, lead, self._add("Slice", [shape, *cut], node))

    def _move(self, node: ir.Node) -> None:
        known = next(self.rows[value] for value in node.inputs if value in self.rows)
        inputs: list[ir.Value | None] = []
        for value in node.inputs:
            flat = None if value is None else self._operand(value, known.lead, node)
            if value is not None and flat is None:
                return
            inputs.append(flat)
        attributes = [
            ir.AttrInt64("axis", -1) if attribute.name == "axis" else attribute
            for attribute in node.attributes.values()
        ]
        twin = ir.Node("", node.op_type, inputs, attributes, num_outputs=len(node.outputs))
        self.graph.insert_before(node, twin)
        self.moved += 1
        # Readers that cannot do with rows get the old form; it is removed where nobody reads it.
        shape = self._add("Concat", [known.shape, self._constant([-1], node)], node, axis=0)
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            back = self._add("Reshape", [new, shape], node)
            back.shape, back.type, new.type = old.shape, old.type, old.type
            if old.is_graph_output():
                back.name, old.name = old.name, f"{old.name}_before"
            old.replace_all_uses_with(back, replace_graph_outputs=True)
            self.rows[back] = _Rows(new, known.lead, known.shape)

    def _operand(self, value: ir.Value, lead: Dimensions, node: ir.Node) -> ir.Value | None:
        """What the moved node reads instead of `value`; None when rows cannot express it."""
        if value in self.rows:
            return self.rows[value].value if self.rows[value].lead == lead else None
        dimensions = _dimensions(value)
        if dimensions is None:
            return None
        if len(dimensions) <= 1:
            return value
        if dimensions[:-1] != lead:
            return None
        before = value.producer()
        if before is not None and before.op_type == "Expand" and before.inputs[0] is not None:
            row = _dimensions(before.inputs[0])
            if row is not None and len(row) <= 1:
                return before.inputs[0]
        if not isinstance(dimensions[-1], int):
            return None
        flat = self._add("Reshape", [value, self._constant([-1, dimensions[-1]], node)], node)
        self.rows[value] = _Rows(flat, lead, self._lead_of(value, node))
        return flat

    def _lead_of(self, value: ir.Value, node: ir.Node) -> ir.Value:
        return self._add("Shape", [value], node, start=0, end=-1)

    def _constant(self, numbers: list[int], node: ir.Node) -> ir.Value:
        made = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", numbers)])
        self.graph.insert_before(node, made)
        made.outputs[0].shape = ir.Shape([len(numbers)])
        made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        return made.outputs[0]

    def _add(self, operator: str, inputs: list[ir.Value], node: ir.Node, **numbers: int) -> ir.Value:
        attributes = [ir.AttrInt64(name, number) for name, number in numbers.items()]
        made = ir.Node("", operator, inputs, attributes)
        self.graph.insert_before(node, made)
        return made.outputs[0]


def _dimensions(value: ir.Value) -> Dimensions | None:
    """The shape with symbols as texts; None where anything is unknown."""
    if value.shape is None:
        return None
    found = [size if isinstance(size, int) else size.value for size in value.shape]
    return None if None in found else tuple(size for size in found if size is not None)


def _numbers(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant, or None."""
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return None if constant is None else [int(number) for number in constant.numpy().reshape(-1)]


def _is_row_wise(node: ir.Node) -> bool:
    """Does every row of the output depend on the same row of the inputs alone?"""
    if node.op_type in ELEMENTWISE:
        return True
    if node.op_type in LAST_AXIS and node.inputs[0] is not None:
        rank = len(_dimensions(node.inputs[0]) or ())
        axis = node.attributes.get_int("axis", LAST_AXIS[node.op_type])
        return axis == -1 or axis == rank - 1 > 0
    if node.op_type in REDUCTIONS and len(node.inputs) > 1:
        return _numbers(node.inputs[1]) == [-1] and node.attributes.get_int("keepdims", 1) == 1
    return False


def _joins_rows(source: ir.Value, result: ir.Value, shape: ir.Value) -> bool:
    """Is this `[*lead, features]` -> `[rows, features]`?"""
    before, after = _dimensions(source), _dimensions(result)
    if before is None or len(before) < 3 or not isinstance(before[-1], int):
        return False
    if after is not None:
        return len(after) == 2 and after[-1] == before[-1]
    return _numbers(shape) == [-1, before[-1]]


def _splits_rows(source: ir.Value, result: ir.Value) -> bool:
    """Is this the result of a Gemm, `[rows, features]` -> `[*lead, features]`?"""
    maker, after = source.producer(), _dimensions(result)
    if maker is None or maker.op_type != "Gemm" or after is None or len(after) < 3:
        return False
    weight = _dimensions(maker.inputs[1]) if maker.inputs[1] is not None else None
    if weight is None:
        return False
    return after[-1] == weight[0 if maker.attributes.get_int("transB", 0) else 1]


def _copies_a_dimension(node: ir.Node) -> bool:
    """Would a 0 in the shape copy a dimension, so that the input's own shape matters?"""
    if node.attributes.get_int("allowzero", 0) == 1:
        return False
    numbers = _numbers(node.inputs[1])
    if numbers is not None:
        return 0 in numbers
    maker = node.inputs[1].producer() if node.inputs[1] is not None else None
    if maker is None or maker.op_type != "Concat":
        return True
    return any(0 in (_numbers(part) or []) for part in maker.inputs)

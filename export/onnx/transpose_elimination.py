"""Between two lowered products: what is joined and cut again, or turned and turned back, is left apart.

A product in blocks ends by joining its groups, and the next one begins by cutting the same columns. With
only an activation between them, it can work on the pieces. The same holds for two that work on turned rows.
"""

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as passes

from compress.export.onnx.flatten import ELEMENTWISE

MOST_OPERATORS = 3  # each costs a launch a piece; an activation of more is cheaper on the whole
Leaf = Callable[[ir.Value], list[ir.Value] | None]


def open_seams(model: ir.Model) -> int:
    """Let pieces flow through elementwise operators in place; the Splits and Transposes saved."""
    saved = 0
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or node.op_type not in ("Split", "Transpose"):
            continue
        parts = _Walk(node).parts(source)
        if parts is not None:
            for old, new in zip(node.outputs, parts, strict=True):
                old.replace_all_uses_with(new)
            saved += 1
    passes.RemoveUnusedNodesPass()(model)
    return saved


class _Walk:
    """The way from a Split or Transpose back to what undoes it."""

    def __init__(self, end: ir.Node) -> None:
        self.end = end
        self.widths = _widths(end)
        self.operators = 0

    def parts(self, value: ir.Value) -> list[ir.Value] | None:
        """`value` as the outputs of `end` would be; None when something on the way forbids it."""
        maker = value.producer()
        if maker is None or any(out.is_graph_output() for out in self.end.outputs):
            return None
        if maker.op_type == "Transpose" and self.end.op_type == "Transpose":
            return [_first(maker)] if _turns(maker) and _turns(self.end) else None
        if maker.op_type == "Concat" and self.end.op_type == "Split":
            parts = [part for part in maker.inputs if part is not None]
            return parts if self.widths == [_width(part) for part in parts] else None
        self.operators += 1
        if maker.op_type not in ELEMENTWISE or self.operators > MOST_OPERATORS or value.is_graph_output():
            return None
        if {reader for reader, _ in value.uses()} - {self.end} and self.operators == 1:
            return None  # it is needed whole as well
        operands = [self._operand(part) for part in maker.inputs if part is not None]
        found = [operand for operand in operands if operand is not None]
        return _twins(maker, found, self.end) if found and len(found) == len(operands) else None

    def _operand(self, value: ir.Value) -> list[ir.Value] | None:
        constant = ir.convenience.get_const_tensor(value)
        if constant is None:
            return self.parts(value)
        return [value] * len(self.end.outputs) if constant.size == 1 else None


def _twins(maker: ir.Node, operands: list[list[ir.Value]], end: ir.Node) -> list[ir.Value]:
    """The operator once for every piece."""
    graph = end.graph
    assert graph is not None
    made = []
    for inputs in zip(*operands, strict=True):
        twin = ir.Node(maker.domain, maker.op_type, inputs, list(maker.attributes.values()))
        graph.insert_before(end, twin)
        made.append(twin.outputs[0])
    return made


def _first(node: ir.Node) -> ir.Value:
    assert node.inputs[0] is not None
    return node.inputs[0]


def _turns(node: ir.Node) -> bool:
    """Does it exchange rows and columns?"""
    return list(node.attributes.get_ints("perm", [])) == [1, 0]


def _widths(node: ir.Node) -> list[int] | None:
    """The columns of every output of a Split along columns."""
    if node.op_type != "Split" or node.attributes.get_int("axis", 0) != 1 or len(node.inputs) < 2:
        return None
    sizes = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
    return None if sizes is None else [int(size) for size in sizes.numpy()]


def _width(value: ir.Value) -> int | None:
    """The columns that a Gemm gives, None of anything else."""
    maker = value.producer()
    weight = None if maker is None or maker.op_type != "Gemm" else maker.inputs[1]
    if maker is None or weight is None or weight.shape is None:
        return None
    size = weight.shape[0 if maker.attributes.get_int("transB", 0) else 1]
    return size if isinstance(size, int) else None

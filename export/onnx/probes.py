"""A copy of a file that also gives what its products in low precision read and what they answer.

Rounding is not continuous: where one number differs by its last bit, a value between two bytes becomes
the other one, every later product reads other bytes, and the answer of the whole file is that of another
draw of rounding errors. What a product makes of what it has read is exact, and can be compared.
"""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from compress.errors import CompressError
from compress.export.onnx.writer import save

SUFFIX = "_codes"  # as `quantized` names the bytes of a weight


@dataclass(frozen=True)
class Watched:
    """One product: the name of its weight, and the outputs that say what it reads and what it answers."""

    weight: str
    reads: str
    answers: str


def watch(path: Path, target: Path) -> tuple[Watched, ...]:
    """Write the copy to `target`; gives its products in low precision in the order of the graph.

    Raises:
        CompressError: a product of bytes is not one that `quantized` writes.
    """
    model = ir.load(path)
    found: list[Watched] = []
    for node in list(model.graph):
        product = _product(node)
        if product is None:
            continue
        weight, read, answered = product
        number = len(found)
        outputs = [
            _shown(model, node, read, f"reads_{number}"),
            _shown(model, node, answered, f"answers_{number}"),
        ]
        found.append(Watched(weight, *outputs))
    save(model, target)
    return tuple(found)


def _product(node: ir.Node) -> tuple[str, ir.Value, ir.Value] | None:
    """Weight, input and answer of a product in low precision; None for any other node."""
    if node.op_type == "MatMulInteger":
        scaled = _next(_next(node.outputs[0], "Cast"), "Mul")
        return _weight(node, 1), _operand(_producer(node, 0), 0), _biased(scaled)
    if node.op_type == "MatMulNBits":
        return _weight(node, 1), _operand(node, 0), node.outputs[0]
    if node.op_type == "Gemm":
        reader, writer = (_operand(node, index).producer() for index in (0, 1))
        if writer is None or writer.op_type != "DequantizeLinear":
            return None
        if reader is None or reader.op_type != "DequantizeLinear":
            raise CompressError(f"{node.name}: a weight in bytes meets an input that is none")
        answer = node.outputs[0] if len(node.inputs) > 2 else _biased(node.outputs[0])
        return _weight(writer, 0), _operand(_producer(reader, 0), 0), answer
    return None


def _weight(node: ir.Node, index: int) -> str:
    name = str(_operand(node, index).name)
    if not name.endswith(SUFFIX):
        raise CompressError(f"{name}: bytes that no weight of this program is called; export the model again")
    return name.removesuffix(SUFFIX)


def _biased(value: ir.Value) -> ir.Value:
    """A value with the stored bias that is added to it, if one is."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return value
    other = uses[0].node.inputs[1 - uses[0].idx]
    return uses[0].node.outputs[0] if other is not None and other.const_value is not None else value


def _next(value: ir.Value, operator: str) -> ir.Value:
    users = [use.node for use in value.uses()]
    if [user.op_type for user in users] != [operator]:
        kinds = ", ".join(user.op_type for user in users) or "nothing"
        raise CompressError(f"{value.name} is read by {kinds}, not by one {operator}; export the model again")
    return users[0].outputs[0]


def _producer(node: ir.Node, index: int) -> ir.Node:
    found = _operand(node, index).producer()
    if found is None:
        raise CompressError(f"{node.name}: its bytes are made by nothing in the file")
    return found


def _operand(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _shown(model: ir.Model, node: ir.Node, value: ir.Value, name: str) -> str:
    """Make a value, in one row, an output of the file under a name of its own."""
    flat = ir.Node("", "Flatten", [value], [ir.AttrInt64("axis", 0)], num_outputs=1)  # [1, all]
    made = flat.outputs[0]
    made.name, made.type = name, ir.TensorType(ir.DataType.FLOAT)
    made.shape = ir.Shape((1, None))
    producer = value.producer()
    if producer is None:
        model.graph.insert_before(node, flat)
    else:
        model.graph.insert_after(producer, flat)
    model.graph.outputs.append(made)
    return name

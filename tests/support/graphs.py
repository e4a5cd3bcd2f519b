"""Small files of Gemms, and what they answer in onnxruntime."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

HIDDEN = 12


def values(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph(nodes, weights, outputs=("y",), inner=HIDDEN):
    """A file with input `x` [rows, inner] and a free number of rows."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inner])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", None]) for name in outputs]
    stored = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()]
    made = helper.make_graph(nodes, "g", inputs, ends, stored)
    file = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return ir.serde.deserialize_model(file)


def gemm(x, weight, bias, y, **attributes):
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return helper.make_node("Gemm", inputs, [y], **{"transB": 1, **attributes})


def linear(weight, bias=None):
    """`y = x W + b`: one Gemm."""
    weights = {"w": weight} if bias is None else {"w": weight, "b": bias}
    return graph([gemm("x", "w", None if bias is None else "b", "y")], weights, inner=weight.shape[1])


def file_of(model):
    """The file, checked."""
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def answers(model, x):
    """Every output, in plain onnxruntime."""
    session = ort.InferenceSession(file_of(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


def operators(model):
    return [node.op_type for node in model.graph]


def stored_bytes(model, but=("b",)):
    """Float weights and 64-bit indices that are no shapes: everything but biases and short lists."""
    return sum(
        value.const_value.nbytes
        for name, value in model.graph.initializers.items()
        if name.split(".")[0] not in but and not name.startswith("ints_")
    )

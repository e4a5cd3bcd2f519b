from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.export.onnx.flatten import flatten

FEATURES = 4
LEAD = ["b", "t"]
RESHAPES_OF_A_LAYER = 2


class Net:
    """A graph over `x` [b, t, 4] that is written as the exporter writes one: linear layers on rows."""

    def __init__(self):
        self.nodes, self.weights, self.values = [], [], []
        self.random = np.random.default_rng(0)

    def node(self, operator, *inputs, shape=None, domain="", outputs=1, **attributes):
        names = [f"v{len(self.nodes)}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, domain=domain, **attributes))
        if shape is not None:
            self.values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
        return names[0] if outputs == 1 else names

    def ints(self, *numbers):
        name = self.node("Constant", value_ints=numbers)
        self.values.append(helper.make_tensor_value_info(name, TensorProto.INT64, [len(numbers)]))
        return name

    def weight(self, *shape):
        name = f"w{len(self.weights)}"
        values = self.random.standard_normal(shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def linear(self, x, inner, out):
        rows = self.node("Reshape", x, self.ints(-1, inner))
        product = self.node("Gemm", rows, self.weight(out, inner), self.weight(out), transB=1)
        lead = self.node("Shape", x, start=0, end=-1)
        whole = self.node("Concat", lead, self.ints(out), axis=0)
        return self.node("Reshape", product, whole, shape=[*LEAD, out])

    def model(self, output, shape):
        value = next((v for v in self.values if v.name == output), None)
        values = [v for v in self.values if v is not value]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*LEAD, FEATURES])]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)]
        graph = helper.make_graph(self.nodes, "g", inputs, outputs, self.weights, value_info=values)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def answers(model, shape):
    x = np.random.default_rng(1).standard_normal((*shape, FEATURES)).astype(np.float32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    return found


def flattened(net, output, shape=(*LEAD, 6)):
    """The graph after `flatten`, once it is sure that it computes the same; and how many were moved."""
    before = net.model(output, list(shape))
    graph = ir.serde.deserialize_model(before)
    moved = flatten(graph)
    after = ir.serde.serialize_model(graph)
    onnx.checker.check_model(after)
    assert [value.name for value in after.graph.output] == [output]
    for lead in ((2, 5), (1, 1), (3, 2)):
        assert answers(after, lead) == pytest.approx(answers(before, lead), abs=1e-5)
    return after, moved


def operators(model):
    return Counter(node.op_type for node in model.graph.node)


def test_a_feed_forward_with_its_sum_and_norm_runs_on_rows_throughout():
    net = Net()
    up = net.linear("x", FEATURES, 6)
    inside = net.node("Gelu", up, shape=[*LEAD, 6])
    down = net.linear(inside, 6, FEATURES)
    total = net.node("Add", down, "x", shape=[*LEAD, FEATURES])
    norm = net.node("LayerNormalization", total, net.weight(FEATURES), axis=-1, shape=[*LEAD, FEATURES])
    assert operators(net.model(norm, [*LEAD, FEATURES]))["Reshape"] == 2 * RESHAPES_OF_A_LAYER
    after, moved = flattened(net, norm, (*LEAD, FEATURES))
    assert moved == 3
    found = operators(after)
    assert (found["Gemm"], found["Gelu"], found["Add"], found["LayerNormalization"]) == (2, 1, 1, 1)
    assert found["Reshape"] <= 3  # x for the product, x for the sum, and the answer
    makers = {output: node.op_type for node in after.graph.node for output in node.output}
    activation = next(node for node in after.graph.node if node.op_type == "Gelu")
    assert makers[activation.input[0]] == "Gemm"


def moved_after_a_layer(operator, *more, outputs=1, out=6, shape=None, **attributes):
    """How many are moved when one operator follows a linear layer."""
    net = Net()
    y = net.linear("x", FEATURES, 6)
    inputs = [net.weight(*part) if isinstance(part, tuple) else net.ints(*part) for part in more]
    shape = shape or [*LEAD, out]
    found = net.node(operator, y, *inputs, shape=shape, outputs=outputs, **attributes)
    return flattened(net, found if outputs == 1 else found[-1], shape)[1]


ROW_WISE = {
    "an activation": (("Relu",), {}),
    "a vector": (("Mul", (6,)), {}),
    "a number": (("Mul", ()), {}),
    "softmax over features": (("Softmax",), {"axis": -1}),
    "softmax by default": (("Softmax",), {}),
    "softmax over the last axis by number": (("Softmax",), {"axis": 2}),
    "norm": (("LayerNormalization", (6,)), {}),
    "norm over the last axis by number": (("LayerNormalization", (6,)), {"axis": 2}),
    "mean": (("ReduceMean", [-1]), {"out": 1, "keepdims": 1}),
    "sum that keeps by default": (("ReduceSum", [-1]), {"out": 1}),
    "split": (("Split",), {"axis": -1, "num_outputs": 2, "outputs": 2, "out": 3}),
}


@pytest.mark.parametrize("case", ROW_WISE)
def test_what_works_row_by_row_is_moved(case):
    words, keywords = ROW_WISE[case]
    assert moved_after_a_layer(*words, **keywords) == 1


NOT_ROW_WISE = {
    "softmax over tokens": (("Softmax",), {"axis": 1}),
    "softmax over the batch": (("Softmax",), {"axis": 0}),
    "mean over tokens": (("ReduceMean", [1]), {"shape": ["b", 1, 6]}),
    "mean over features and tokens": (("ReduceMean", [1, 2]), {"shape": ["b", 1, 1]}),
    "mean that drops the axis": (("ReduceMean", [-1]), {"shape": LEAD, "keepdims": 0}),
    "mean of everything": (("ReduceMean",), {"shape": [1, 1, 1]}),
    "running sum": (("CumSum", [1]), {}),
}


@pytest.mark.parametrize("case", NOT_ROW_WISE)
def test_what_mixes_rows_is_left_alone(case):
    words, keywords = NOT_ROW_WISE[case]
    assert moved_after_a_layer(*words, **keywords) == 0


def test_a_split_of_the_batch_is_left_alone():
    net = Net()
    y = net.linear("x", FEATURES, 6)
    both = net.node("Concat", y, y, axis=0, shape=["b2", "t", 6])
    first = net.node("Split", both, num_outputs=2, outputs=2, shape=[*LEAD, 6])[0]
    assert flattened(net, first)[1] == 0


@pytest.mark.parametrize("operand", [(1, 6), (1, 1, 6), (1, 1, 1)])
def test_an_operand_that_is_spread_over_rows_is_left_alone(operand):
    assert moved_after_a_layer("Add", operand) == 0


def test_an_operand_of_another_lead_is_left_alone():
    net = Net()
    y = net.linear("x", FEATURES, 6)
    one = net.node("ReduceMean", y, net.ints(1), shape=["b", 1, 6])
    assert flattened(net, net.node("Sub", y, one, shape=[*LEAD, 6]))[1] == 0


def test_an_operand_of_the_same_lead_is_flattened_once():
    net = Net()
    y = net.linear("x", FEATURES, FEATURES)
    shape = [*LEAD, FEATURES]
    first = net.node("Add", y, "x", shape=shape)
    second = net.node("Mul", first, "x", shape=shape)
    after, moved = flattened(net, second, shape)
    assert moved == 2
    assert sum(node.op_type == "Reshape" and node.input[0] == "x" for node in after.graph.node) <= 2


def test_a_vector_that_was_spread_over_rows_is_taken_as_it_was():
    net = Net()
    y = net.linear("x", FEATURES, 6)
    wide = net.node("Shape", y)
    spread = net.node("Expand", net.weight(6), wide, shape=[*LEAD, 6])
    after, moved = flattened(net, net.node("Add", y, spread, shape=[*LEAD, 6]))
    assert moved == 1
    assert operators(after)["Expand"] == 0


def test_readers_that_cannot_do_with_rows_get_the_old_form():
    net = Net()
    y = net.node("Relu", net.linear("x", FEATURES, 6), shape=[*LEAD, 6])
    turned = net.node("Transpose", y, perm=[0, 2, 1], shape=["b", 6, "t"])
    assert flattened(net, turned, ("b", 6, "t"))[1] == 1


@pytest.mark.parametrize("heads", [(0, 0, 2, 3), (0, -1, 2, 3)])
def test_a_shape_that_copies_a_size_keeps_the_input_that_it_copies_from(heads):
    net = Net()
    y = net.node("Relu", net.linear("x", FEATURES, 6), shape=[*LEAD, 6])
    apart = net.node("Reshape", y, net.ints(*heads), shape=[*LEAD, 2, 3])
    assert flattened(net, apart, (*LEAD, 2, 3))[1] == 1


def test_a_shape_that_copies_nothing_reads_the_rows():
    net = Net()
    y = net.node("Relu", net.linear("x", FEATURES, 6), shape=[*LEAD, 6])
    lead = net.node("Shape", "x", start=0, end=2)
    heads = net.node("Concat", lead, net.ints(2, 3), axis=0)
    apart = net.node("Reshape", y, heads, shape=[*LEAD, 2, 3])
    after, moved = flattened(net, apart, (*LEAD, 2, 3))
    assert moved == 1
    makers = {output: node.op_type for node in after.graph.node for output in node.output}
    last = next(node for node in after.graph.node if node.output[0] == apart)
    assert makers[last.input[0]] == "Relu"


def test_operators_of_other_domains_and_graphs_without_layers_are_left_alone():
    net = Net()
    found = net.node("Relu", "x", shape=[*LEAD, FEATURES])
    after, moved = flattened(net, found, (*LEAD, FEATURES))
    assert (moved, operators(after)) == (0, {"Relu": 1})
    net = Net()
    y = net.linear("x", FEATURES, 6)
    found = net.node("Relu", y, domain="somebody", shape=[*LEAD, 6])
    graph = ir.serde.deserialize_model(net.model(found, [*LEAD, 6]))
    assert flatten(graph) == 0


def test_rows_are_taken_from_before_an_earlier_change_of_shape():
    net = Net()
    apart = net.node("Reshape", "x", net.ints(0, 0, 2, 2), shape=[*LEAD, 2, 2])
    together = net.node("Reshape", apart, net.ints(0, 0, FEATURES), shape=[*LEAD, FEATURES])
    rows = net.node("Reshape", together, net.ints(-1, FEATURES))
    found = net.node("Gemm", rows, net.weight(6, FEATURES), transB=1, shape=["rows", 6])
    after, _ = flattened(net, found, ("rows", 6))
    assert together not in {name for node in after.graph.node for name in node.input}

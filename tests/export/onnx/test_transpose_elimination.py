"""Pieces that flow from one lowered product into the next, through what lies between."""

import numpy as np
import pytest
from onnx import helper
from support.graphs import HIDDEN, answers, gemm, graph, operators, values

from compress.export.onnx.block_sparse import Blocks, find
from compress.export.onnx.linear_lowering import Lowering, lower
from compress.export.onnx.transpose_elimination import open_seams

WIDE = 16
UP = Blocks(4, 3, ((0, 2), (1, 3), (0, 3), (1, 2)))
DOWN = Blocks(3, 4, ((0, 2), (1, 3), (0, 3), (1, 2)))
X = values((5, HIDDEN), 5)


def weight(blocks, out, inner, seed):
    return (values((out, inner), seed) * blocks.mask(out, inner)).astype(np.float32)


FIRST, GATE = weight(UP, WIDE, HIDDEN, 1), weight(UP, WIDE, HIDDEN, 2)
SECOND = weight(DOWN, HIDDEN, WIDE, 3)
ONE, TWO = np.array(1.5, dtype=np.float32), np.array([0.5], dtype=np.float32)
STORED = {"up": FIRST, "gate": GATE, "down": SECOND, "one": ONE, "two": TWO, "row": values(WIDE, 8)}


def node(operator, *names):
    *inputs, output = names
    return helper.make_node(operator, inputs, [output])


BETWEEN = {
    "none": ([node("Identity", "h", "m")], lambda h, g: h),
    "relu": ([node("Relu", "h", "m")], lambda h, g: np.maximum(h, 0)),
    "scaled": (
        [node("Mul", "h", "one", "s"), node("Relu", "s", "r"), node("Add", "r", "two", "m")],
        lambda h, g: np.maximum(h * 1.5, 0) + 0.5,
    ),
    "gated": ([node("Relu", "h", "r"), node("Mul", "r", "g", "m")], lambda h, g: np.maximum(h, 0) * g),
}
WHOLE = {
    "four": [node("Relu", "h", "a"), node("Abs", "a", "c"), node("Abs", "c", "d"), node("Abs", "d", "m")],
    "row": [node("Add", "h", "row", "m")],
    "softmax": [node("Softmax", "h", "m")],
}


def built(between, form, outputs=("y",), down=DOWN):
    gated = any("g" in part.input for part in between)
    nodes = [gemm("x", "up", None, "h"), *([gemm("x", "gate", None, "g")] if gated else []), *between]
    nodes.append(gemm("m", "down", None, "y"))
    used = {name for part in nodes for name in part.input}
    second = weight(down, HIDDEN, WIDE, 3)
    stored = {name: array for name, array in STORED.items() if name in used} | {"down": second}
    model = graph(nodes, stored, outputs)
    wanted = {"up": Lowering(UP, form), "down": Lowering(down, form)}
    lower(model, wanted | ({"gate": Lowering(UP, form)} if gated else {}))
    return model, second


@pytest.mark.parametrize("name", BETWEEN)
@pytest.mark.parametrize("form", ["concat", "sum", "batched", "conv"])
def test_an_activation_works_on_what_the_products_give(name, form):
    between, means = BETWEEN[name]
    model, second = built(between, form)
    hidden, gate = X @ FIRST.T, X @ GATE.T
    assert np.abs(answers(model, X)[0] - means(hidden, gate) @ second.T).max() < 1e-5
    if form in ("concat", "sum"):
        assert operators(model).count("Split") == 1  # of x
    else:
        assert operators(model).count("Transpose") == 2  # of x, and back at the end


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("form", ["concat", "conv"])
def test_what_needs_the_whole_row_or_would_take_many_launches_stays_whole(name, form):
    model, _ = built(WHOLE[name], form)
    before = operators(model)
    assert before.count("Split" if form == "concat" else "Transpose") == (2 if form == "concat" else 4)
    assert open_seams(model) == 0
    assert operators(model) == before


@pytest.mark.parametrize("form", ["concat", "conv"])
def test_an_activation_that_others_read_stays_whole(form):
    model, second = built([node("Relu", "h", "m")], form, ("y", "m"))
    found = answers(model, X)
    hidden = np.maximum(X @ FIRST.T, 0)
    assert np.abs(found[0] - hidden @ second.T).max() < 1e-5
    assert np.abs(found[1] - hidden).max() < 1e-5
    assert operators(model).count("Relu") == 1


def test_pieces_of_other_widths_are_joined_and_cut():
    down = Blocks(3, 8, ((0,), (1,), (0,), (1,)))
    model, second = built([node("Relu", "h", "m")], "concat", down=down)
    assert find(second, 3, 8) == down
    assert operators(model).count("Split") == 2
    assert np.abs(answers(model, X)[0] - np.maximum(X @ FIRST.T, 0) @ second.T).max() < 1e-5


def test_a_graph_without_anything_to_save_is_left_alone():
    model = graph([gemm("x", "up", None, "y")], {"up": FIRST})
    assert open_seams(model) == 0
    assert operators(model) == ["Gemm"]

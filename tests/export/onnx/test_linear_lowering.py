import numpy as np
import pytest
import torch
from onnx import helper
from support.graphs import HIDDEN, answers, gemm, graph, linear, operators, stored_bytes, values
from torch import nn

from compress.errors import CompressError
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.onnx.block_sparse import LAYOUTS, Blocks, find
from compress.export.onnx.linear_lowering import Lowered, Lowering, lower
from compress.export.onnx.writer import export

OUT, RANK = 8, 3
BLOCKS = Blocks(4, 3, ((0, 2), (1, 3)))
W, B = values((OUT, HIDDEN)), values(OUT, 1)
L, R, S = values((OUT, RANK), 2), values((RANK, HIDDEN), 3), values((OUT, HIDDEN), 4)
S_BLOCKS = (S * BLOCKS.mask(OUT, HIDDEN)).astype(np.float32)
X = values((5, HIDDEN), 5)
FACTORS = {"left": L, "right": R}


def differs(model, *expected):
    """How far the outputs are from what they should be, relative to the largest answer."""
    found = answers(model, X)
    assert len(found) == len(expected)
    return max(np.abs(one - two).max() / np.abs(two).max() for one, two in zip(found, expected, strict=True))


@pytest.mark.parametrize("bias", [None, B])
def test_low_rank_is_two_products_and_its_bias_is_kept(bias):
    model = linear(W, bias)
    report = lower(model, {"w": Lowering(**FACTORS)})
    assert operators(model) == ["Gemm", "Gemm"]
    assert differs(model, X @ R.T @ L.T + (0 if bias is None else bias)) < 1e-5
    assert report == {"w": Lowered(layout="none", rank=3, weight_bytes=4 * 3 * 20, dense_bytes=4 * 96)}
    assert stored_bytes(model) == 4 * 3 * 20


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [None, B])
def test_blocks_and_low_rank_are_summed_in_every_form(layout, bias):
    model = linear(W, bias)
    wanted = Lowering(BLOCKS, layout, sparse=S_BLOCKS, **FACTORS)
    report = lower(model, {"w": wanted})["w"]
    assert differs(model, X @ (S_BLOCKS + L @ R).T + (0 if bias is None else bias)) < 1e-5
    assert (report.layout, report.rank) == (layout, 3)
    assert report.weight_bytes == stored_bytes(model) == wanted.weight_bytes(OUT, HIDDEN)


@pytest.mark.parametrize("bias", [None, B])
def test_a_sparse_part_without_blocks_stays_one_product(bias):
    model = linear(W, bias)
    report = lower(model, {"w": Lowering(sparse=S, **FACTORS)})["w"]
    assert operators(model) == ["Gemm"] * 3
    assert differs(model, X @ (S + L @ R).T + (0 if bias is None else bias)) < 1e-5
    assert (report.layout, report.weight_bytes) == ("dense", stored_bytes(model))


def test_nothing_asked_changes_nothing():
    model = linear(W, B)
    report = lower(model, {"w": Lowering()})["w"]
    assert report == Lowered(layout="dense", rank=0, weight_bytes=4 * 96, dense_bytes=4 * 96)
    assert operators(model) == ["Gemm"]
    assert differs(model, X @ W.T + B) < 1e-6


def test_a_weight_that_is_stored_as_in_by_out_is_read_as_out_by_in():
    for lowering, weight in (
        (Lowering(BLOCKS, "concat"), S_BLOCKS),
        (Lowering(), W),
        (Lowering(sparse=S, **FACTORS), S + L @ R),
    ):
        model = graph(
            [gemm("x", "w", "b", "y", transB=0)], {"w": (S_BLOCKS if weight is S_BLOCKS else W).T, "b": B}
        )
        lower(model, {"w": lowering})
        assert differs(model, X @ weight.T + B) < 1e-5


def test_a_wrong_factor_breaks_parity():
    model = linear(W, B)
    lower(model, {"w": Lowering(left=L, right=R[::-1].copy())})
    assert differs(model, X @ R.T @ L.T + B) > 1e-2


# Several products


def three(rights, sparse=None):
    """Query, key and value on one x, lowered with these first factors."""
    nodes = [gemm("x", f"w{k}", f"b{k}", f"y{k}") for k in range(3)]
    weights = {f"w{k}": values((OUT, HIDDEN), k) for k in range(3)} | {
        f"b{k}": values(OUT, 9 + k) for k in range(3)
    }
    model = graph(nodes, weights, ("y0", "y1", "y2"))
    lefts = [values((OUT, len(right)), 20 + k) for k, right in enumerate(rights)]
    wanted = {
        f"w{k}": Lowering(None if sparse is None else BLOCKS, left=lefts[k], right=rights[k], sparse=sparse)
        for k in (2, 0, 1)  # the order of asking does not matter
    }
    rest = 0 if sparse is None else sparse
    expected = [X @ (lefts[k] @ rights[k] + rest).T + values(OUT, 9 + k) for k in range(3)]
    return model, lower(model, wanted), expected


@pytest.mark.parametrize("sparse", [None, S_BLOCKS])
def test_one_first_factor_of_three_is_computed_and_stored_once(sparse):
    model, report, expected = three([R, R.copy(), R], sparse)
    firsts = [node for node in model.graph if node.op_type == "Gemm" and node.inputs[0].name == "x"]
    assert len(firsts) == 1
    assert differs(model, *expected) < 1e-5
    assert sum(one.weight_bytes for one in report.values()) == stored_bytes(model, ("b0", "b1", "b2"))


def test_first_factors_that_differ_are_one_product_that_is_cut():
    rights = [R, values((2, HIDDEN), 7), values((4, HIDDEN), 8)]
    model, report, expected = three(rights)
    assert operators(model) == ["Gemm", "Split", "Gemm", "Gemm", "Gemm"]
    assert model.graph.initializers["w0+w1+w2.right"].shape == (9, HIDDEN)
    assert differs(model, *expected) < 1e-5
    assert sum(one.weight_bytes for one in report.values()) == stored_bytes(model, ("b0", "b1", "b2"))


def test_two_equal_first_factors_of_three_are_one_part():
    model, report, expected = three([R, values((2, HIDDEN), 7), R])
    assert model.graph.initializers["w0+w1.right"].shape == (5, HIDDEN)
    assert differs(model, *expected) < 1e-5
    assert [report[name].weight_bytes for name in ("w0", "w1", "w2")] == [4 * 60, 4 * 40, 4 * 24]


def test_products_on_one_input_cut_it_once():
    nodes = [gemm("x", "w", None, "y"), gemm("x", "v", None, "z")]
    other = (values((OUT, HIDDEN), 6) * BLOCKS.mask(OUT, HIDDEN)).astype(np.float32)
    model = graph(nodes, {"w": S_BLOCKS, "v": other}, ("y", "z"))
    lower(model, {"w": Lowering(BLOCKS), "v": Lowering(BLOCKS)})
    assert operators(model).count("Split") == 1
    assert operators(model).count("Concat") == 2 + 2  # both read the same inputs
    assert differs(model, X @ S_BLOCKS.T, X @ other.T) < 1e-5


def test_a_weight_that_two_products_read_is_lowered_in_both():
    square = (
        values((HIDDEN, HIDDEN), 6) * Blocks(4, 3, ((0, 2), (1, 3), (0, 1))).mask(HIDDEN, HIDDEN)
    ).astype(np.float32)
    nodes = [gemm("x", "w", None, "h"), helper.make_node("Relu", ["h"], ["r"]), gemm("r", "w", None, "y")]
    model = graph(nodes, {"w": square})
    report = lower(model, {"w": Lowering(find(square, 4, 3))})["w"]
    assert differs(model, np.maximum(X @ square.T, 0) @ square.T) < 1e-5
    assert report.weight_bytes == stored_bytes(model)


def test_a_tied_weight_stays_for_its_other_readers():
    nodes = [gemm("x", "w", None, "y"), helper.make_node("Transpose", ["w"], ["z"], perm=[1, 0])]
    model = graph(nodes, {"w": S_BLOCKS}, ("y", "z"))
    lower(model, {"w": Lowering(BLOCKS)})
    assert differs(model, X @ S_BLOCKS.T, S_BLOCKS.T) < 1e-5


# What is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v", "stores no weight 'v'"),
        ("ww", r"stores no weight 'ww'; did you mean 'w'\?"),
        ("b", "b: read by Gemm, not by a Gemm"),
    ],
)
def test_a_name_that_is_no_product_is_refused(name, message):
    with pytest.raises(CompressError, match=message.replace("read by Gemm, not by a Gemm", "read by Gemm")):
        lower(linear(W, B), {name: Lowering(**FACTORS)})


@pytest.mark.parametrize("attributes", [{"alpha": 2.0}, {"beta": 0.5}, {"transA": 1}])
def test_a_gemm_that_is_no_linear_layer_is_refused(attributes):
    model = graph([gemm("x", "w", "b", "y", **attributes)], {"w": W, "b": B})
    with pytest.raises(CompressError, match="w: its Gemm turns or scales its operands"):
        lower(model, {"w": Lowering(**FACTORS)})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"right": R}, r"left is missing, but a weight \[8, 12\] at rank 3 needs \[8, 3\]"),
        ({"right": R, "left": L[:, :2]}, r"left is \[8, 2\].* needs \[8, 3\]"),
        ({"right": R[:, 1:], "left": L}, r"right is \[3, 11\].* needs \[3, 12\]"),
        ({"left": L}, r"left is \[8, 3\].* rank 0 needs \[8, 0\]"),
        ({"sparse": S.T}, r"sparse is \[12, 8\].* needs \[8, 12\]"),
    ],
)
def test_factors_of_another_weight_are_refused(parts, message):
    with pytest.raises(CompressError, match=message):
        lower(linear(W, B), {"w": Lowering(**parts)})


# The exporter


class Block(nn.Module):
    """A feed-forward block on `[batch, tokens, 12]`, as models have it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_exported_model_says_the_same_at_every_batch_and_length(tmp_path, layout):
    torch.manual_seed(0)
    model = Block().eval()
    blocks = {
        "up.weight": Blocks(6, 4, ((0, 1), (1, 2), (0, 2), (0, 1))),
        "down.weight": Blocks(4, 6, ((0, 3), (1, 2), (2, 3))),
    }
    for name, kept in blocks.items():
        weight = model.get_parameter(name)
        weight.data.mul_(torch.from_numpy(kept.mask(*weight.shape)))
    wanted = {name: Lowering(kept, layout) for name, kept in blocks.items()}
    example = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    path = tmp_path / "model.onnx"
    export(model, example, path, outputs=("y",), lower=lambda graph: lower(graph, wanted))
    with OrtRunner(path, 1) as runner:
        assert runner.inputs()["input_ids"][1] == ("batch", "tokens")
        for batch, tokens in ((1, 1), (2, 5), (3, 9)):
            ids = torch.arange(batch * tokens).reshape(batch, tokens) % 20
            found = runner.infer({"input_ids": ids.numpy()})["y"]
            with torch.no_grad():
                assert np.abs(found - model(ids).numpy()).max() < 1e-5
    first = path.read_bytes()
    export(model, example, path, outputs=("y",), lower=lambda graph: lower(graph, wanted))
    assert path.read_bytes() == first

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from support.graphs import answers, file_of, linear, operators, stored_bytes, values

from compress.errors import CompressError
from compress.export.onnx import block_sparse
from compress.export.onnx.block_sparse import LAYOUTS, Blocks
from compress.export.onnx.linear_lowering import Lowering, lower

PARITY = 1e-5  # float32 sums in another order


def masked(out, inner, blocks, seed=0):
    """A weight with zeros outside of the blocks, by loops."""
    weight = values((out, inner), seed)
    for row, column in itertools.product(range(out), range(inner)):
        if column // blocks.columns not in blocks.kept[row // blocks.rows]:
            weight[row, column] = 0.0
    return weight


def balanced(out, inner, rows, columns, kept, seed=0):
    generator = np.random.default_rng(seed)
    across = -(-inner // columns)
    chosen = (sorted(generator.choice(across, kept, replace=False).tolist()) for _ in range(-(-out // rows)))
    return Blocks(rows, columns, tuple(map(tuple, chosen)))


def apart(weight, blocks, layout, bias=None, rows=7):
    """The largest difference to the dense product, relative to the largest answer."""
    model = linear(weight, bias)
    lower(model, {"w": Lowering(blocks, layout)})
    x = values((rows, weight.shape[1]), 3)
    expected = x.astype(float) @ weight.T.astype(float) + (0 if bias is None else bias)
    (found,) = answers(model, x)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


WHOLE = [
    (12, 20, 4, 5, 2),
    (6, 14, 3, 7, 1),
    (9, 21, 9, 3, 4),
    (15, 10, 5, 1, 6),
    (4, 6, 1, 2, 2),
    (8, 8, 2, 4, 2),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", WHOLE, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_a_form_gives_what_the_masked_dense_product_gives(layout, shape, biased):
    out, inner, rows, columns, kept = shape
    blocks = balanced(out, inner, rows, columns, kept)
    bias = values(out, 9) if biased else None
    assert apart(masked(out, inner, blocks), blocks, layout, bias) < PARITY


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_may_keep_unlike_numbers_of_blocks(layout):
    blocks = Blocks(3, 4, ((0, 1, 2), (1,), (0, 2)))
    assert apart(masked(9, 12, blocks), blocks, layout, values(9, 1)) < PARITY


@pytest.mark.parametrize("layout", ["concat", "sum"])
@pytest.mark.parametrize(("out", "inner", "rows", "columns"), [(10, 13, 4, 5), (7, 12, 3, 5), (5, 11, 8, 16)])
def test_ragged_edges_are_handled_where_the_form_can(layout, out, inner, rows, columns):
    blocks = balanced(out, inner, rows, columns, min(2, -(-inner // columns)), seed=4)
    assert apart(masked(out, inner, blocks), blocks, layout, values(out, 2)) < PARITY


def test_ragged_outputs_are_handled_by_gather_as_well():
    blocks = balanced(10, 12, 4, 3, 2)
    assert apart(masked(10, 12, blocks), blocks, "gather") < PARITY


@pytest.mark.parametrize(
    ("layout", "out", "inner"),
    [("gather", 8, 13), ("batched", 8, 13), ("batched", 9, 12), ("conv", 9, 12), ("conv", 8, 13)],
)
def test_ragged_edges_are_refused_by_name_where_the_form_cannot(layout, out, inner):
    blocks = balanced(out, inner, 4, 4, 2)
    assert not block_sparse.fits(layout, out, inner, 4, 4)
    with pytest.raises(
        CompressError, match=rf"w: layout '{layout}' needs whole blocks, but 4x4 .*\[{out}, {inner}\]"
    ):
        apart(masked(out, inner, blocks), blocks, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_number_of_rows_stays_free(layout):
    blocks = balanced(12, 12, 4, 3, 2)
    weight = masked(12, 12, blocks)
    model = linear(weight)
    lower(model, {"w": Lowering(blocks, layout)})
    shape = file_of(model).graph.input[0].type.tensor_type.shape
    assert [size.dim_param or size.dim_value for size in shape.dim] == ["rows", 12]
    for rows in (1, 2, 5, 32):
        x = values((rows, 12), rows)
        (found,) = answers(model, x)
        assert np.allclose(found, x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_blocks_kept_is_the_dense_product(layout):
    blocks = Blocks(4, 4, ((0, 1, 2), (0, 1, 2)))
    weight = values((8, 12))
    assert apart(weight, blocks, layout, values(8, 1)) < PARITY
    model = linear(weight)
    lower(model, {"w": Lowering(blocks, layout)})
    assert layout not in ("concat", "gather") or operators(model) == ["Gemm"]


def test_neighbors_that_keep_the_same_become_one_product():
    blocks = Blocks(2, 4, ((0, 2), (0, 2), (1, 2), (0, 2)))
    weight = masked(8, 12, blocks)
    model = linear(weight)
    lower(model, {"w": Lowering(blocks, "concat")})
    assert operators(model).count("Gemm") == 3
    assert operators(model).count("Concat") == 3  # two sets of inputs, one set of outputs
    assert apart(weight, blocks, "concat") < PARITY


def test_the_inputs_are_cut_once_and_only_kept_weights_are_stored():
    blocks = balanced(12, 20, 4, 5, 2)
    model = linear(masked(12, 20, blocks), values(12, 1))
    lower(model, {"w": Lowering(blocks, "concat")})
    assert operators(model).count("Split") == 1
    assert set(operators(model)) == {"Split", "Concat", "Gemm"}
    floats = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT]
    assert sum(value.const_value.size for value in floats) == 12 * 10 + 12


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kept", [((0, 1), (2, 3), (1, 4)), ((0, 1, 2), (4,), (1, 3))])
def test_bytes_are_those_that_the_file_holds(layout, kept):
    blocks = Blocks(4, 4, kept)
    model = linear(masked(12, 20, blocks), values(12, 1))
    report = lower(model, {"w": Lowering(blocks, layout)})["w"]
    stored = stored_bytes(model)
    assert report.weight_bytes == stored == Lowering(blocks, layout).weight_bytes(12, 20)
    assert report.dense_bytes == 12 * 20 * 4
    widest = max(map(len, kept))
    every = 3 * widest * (16 * 4 + 8) if layout in ("batched", "conv") else sum(map(len, kept)) * 16 * 4
    assert stored == every


# Negative controls


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_wrong_kept_block_breaks_parity(layout):
    blocks = balanced(8, 12, 4, 3, 2)
    weight = masked(8, 12, blocks)
    model = linear(weight)
    lower(model, {"w": Lowering(blocks, layout)})
    x = values((5, 12), 3)
    assert np.abs(answers(model, x)[0] - x @ weight.T).max() < 1e-5
    damaged = next(node for node in model.graph if node.op_type in ("Gather", "Split"))
    if damaged.op_type == "Split":  # the two first pieces in each other's place
        first, second = damaged.outputs[:2]
        readers = [(node, place) for node, place in first.uses()]
        second.replace_all_uses_with(first)
        for node, place in readers:
            node.replace_input_with(place, second)
    else:
        places = damaged.inputs[1]
        moved = (places.const_value.numpy() + 1) % 4
        places.const_value = ir.tensor(moved, name=places.name)
    assert np.abs(answers(model, x)[0] - x @ weight.T).max() > 1e-2


def test_blocks_that_would_lose_a_weight_are_refused_with_the_number_of_weights():
    weight = values((8, 12))
    blocks = Blocks(4, 3, ((0, 1), (2, 3)))
    with pytest.raises(CompressError, match="w: 48 weights outside of the kept 4x3 blocks are not zero"):
        lower(linear(weight), {"w": Lowering(blocks, "concat")})


@pytest.mark.parametrize(
    "kept", [((0,),), ((0,), (4,)), ((1, 0), (2, 3)), ((0, 0), (1, 2)), ((), (1,)), ((-1,), (0,))]
)
def test_blocks_of_another_weight_are_refused(kept):
    with pytest.raises(
        CompressError, match=r"w: \d groups of 4x3 blocks do not belong to a weight \[8, 12\]"
    ):
        lower(linear(values((8, 12))), {"w": Lowering(Blocks(4, 3, kept), "concat")})


def test_an_unknown_form_is_refused():
    with pytest.raises(CompressError, match="w: no layout is called 'csr'; known: concat, gather, sum"):
        apart(values((8, 12)), Blocks(8, 12, ((0,),)), "csr")


# Patterns


@pytest.mark.parametrize(
    ("out", "inner", "rows", "columns"), [(12, 20, 4, 5), (10, 13, 4, 5), (3, 3, 8, 8), (9, 4, 1, 1)]
)
def test_find_sees_exactly_the_blocks_that_hold_something(out, inner, rows, columns):
    for seed in range(5):
        weight = np.where(values((out, inner), seed) > 1.2, 1.0, 0.0)
        found = block_sparse.find(weight, rows, columns)
        for group, kept in enumerate(found.kept):
            alive = {
                column // columns
                for row, column in zip(*np.nonzero(weight), strict=True)
                if row // rows == group
            }
            assert set(kept) == (alive or {0})
        assert found.covers(out, inner)
        assert not weight[~found.mask(out, inner)].any()


def test_find_is_the_inverse_of_the_mask():
    blocks = balanced(12, 20, 4, 5, 3)
    assert block_sparse.find(blocks.mask(12, 20), 4, 5) == blocks


def test_padding_makes_every_group_as_wide_as_the_widest_and_drops_nothing():
    blocks = Blocks(2, 3, ((1,), (0, 2, 3), (3,)))
    padded = blocks.padded(12)
    assert padded.kept == ((0, 1, 2), (0, 2, 3), (0, 1, 3))
    assert padded.covers(6, 12)


@pytest.mark.parametrize(
    ("density", "kept"),
    [("0.25", 3), ("0.5", 6), ("0.3", 4), (".08", 1), ("0.01", 1), ("1", 12), ("1.0", 12)],
)
def test_random_blocks_are_balanced_at_the_density(density, kept):
    blocks = block_sparse.random(f"block:64x64@{density}", 200, 768, np.random.default_rng(1))
    assert [len(row) for row in blocks.kept] == [kept] * 4
    assert blocks.covers(200, 768)
    assert blocks == block_sparse.random(f"block:64x64@{density}", 200, 768, np.random.default_rng(1))


@pytest.mark.parametrize(
    "pattern",
    ["2:4", "dense", "block:64@0.5", "block:0x4@0.5", "block:4x4@0", "block:4x4@1.5", "block:4x4@.0"],
)
def test_what_is_no_block_pattern_is_refused(pattern):
    with pytest.raises(CompressError, match=r"is no block pattern; write block:ROWSxCOLUMNS@DENSITY"):
        block_sparse.parsed(pattern)


def test_tensors_are_named_after_their_weight():
    blocks = Blocks(4, 3, ((0, 1), (2, 3)))
    model = linear(masked(8, 12, blocks), values(8))
    lower(model, {"w": Lowering(blocks, "concat")})
    names = {tensor.name: numpy_helper.to_array(tensor).shape for tensor in file_of(model).graph.initializer}
    assert names == {"w.0": (4, 6), "w.4": (4, 6), "b.0": (4,), "b.4": (4,), "ints_3_3_3_3": (4,)}


def test_a_computed_weight_is_refused():
    model = linear(values((8, 12)))
    with pytest.raises(CompressError, match="y is computed in the file"):
        block_sparse.values(model.graph.outputs[0])

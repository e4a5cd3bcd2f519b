import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from support.graphs import answers, linear, values

from compress.core import support
from compress.cost import latency_table
from compress.errors import CompressError
from compress.export.backends import block_layouts, ort_chains
from compress.export.backends.block_layouts import Shape
from compress.export.microbench import site_timing as sites
from compress.export.onnx import block_sparse
from compress.export.onnx.block_sparse import Blocks
from compress.export.onnx.linear_lowering import lower

SHAPE = Shape(rows=5, out=8, inner=12, height=4, width=3, kept=2)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def timed(monkeypatch):
    """Times by layout in place of measurements; the shapes that were asked for."""
    asked = []
    times = {"dense": 2.0, "concat": 1.0, "gather": 0.8, "sum": 1.1, "batched": 0.5, "conv": 0.9}

    def measured(shape, threads):
        asked.append(shape)
        return {layout: times[layout] * shape.kept for layout in shape.contenders}

    monkeypatch.setattr(block_layouts, "measure_layouts", measured)
    return asked


def test_a_shape_keeps_as_many_blocks_as_the_solver_does():
    for across in range(1, 14):
        for density in (0.25, 0.3, 0.5, 1.0):
            if 2 * density * across >= 1:
                shape = block_layouts.shape_of(5, 8, 3 * across, f"block:4x3@{density}")
                assert shape.kept == support.quota(across, density)


def test_only_forms_that_fit_are_timed():
    assert SHAPE.layouts == ("dense", "concat", "gather", "sum", "batched", "conv")
    assert SHAPE._replace(out=9).layouts == ("dense", "concat", "gather", "sum")
    assert SHAPE._replace(inner=13).layouts == ("dense", "concat", "sum")
    assert SHAPE.contenders == ("dense", "concat", "gather", "batched", "conv")


def test_the_fastest_form_is_picked_from_what_was_timed(cache, timed):
    ragged = SHAPE._replace(inner=13)
    table = block_layouts.table([SHAPE, ragged])
    assert block_layouts.fastest_layout(table, SHAPE) == ("batched", 4.0)
    assert block_layouts.fastest_layout(table, ragged) == ("concat", 2.0)
    assert table.rows[SHAPE.key("dense")] == {2: 4.0}


def test_a_shape_is_timed_once_and_then_read_from_the_cache(cache, timed):
    first = block_layouts.table([SHAPE, SHAPE])
    more = SHAPE._replace(kept=3)
    seen = []
    second = block_layouts.table([SHAPE, more], progress=lambda done, work: seen.append((done, work)))
    assert timed == [SHAPE, more]
    assert seen == [(1, 1)]
    assert second.rows[SHAPE.key("conv")] == {2: 1.8, 3: 2.7}
    assert first.rows.keys() == second.rows.keys()


def test_products_share_the_file_of_the_sites_and_leave_their_rows(cache, timed):
    mine = {"f": {4: 1.0}}
    latency_table.measure_missing(ort_chains.empty_table(1), {"f": [4]}, lambda missing: mine)
    block_layouts.table([SHAPE])
    whole = latency_table.measure_missing(ort_chains.empty_table(1), {"f": [4]}, lambda missing: {})
    assert whole.rows["f"] == {4: 1.0}
    assert SHAPE.key("batched") in whole.rows


def test_a_shape_that_was_not_timed_is_refused(cache, timed):
    with pytest.raises(CompressError, match="was not timed"):
        block_layouts.fastest_layout(block_layouts.table([SHAPE]), SHAPE._replace(kept=3))


def test_a_product_gets_the_form_of_the_nearest_timed_shape():
    small, large = SHAPE, Shape(5, 80, 120, 4, 3, 20)
    choose = block_layouts.layout_chooser({small: "sum", large: "conv"})
    assert choose(8, 12, Blocks(4, 3, ((0, 1), (1, 2)))) == "sum"
    assert choose(12, 15, Blocks(4, 3, ((0, 1), (1, 2), (0, 3)))) == "sum"
    many = tuple(range(18))
    assert choose(72, 108, Blocks(4, 3, (many,) * 18)) == "conv"
    # Another block shape was not timed, and whole blocks are what the nearest layout needs.
    assert choose(72, 108, Blocks(8, 3, (many,) * 9)) == "concat"
    assert choose(73, 108, Blocks(4, 3, (many,) * 19)) == "concat"


@pytest.mark.parametrize("layout", SHAPE.layouts)
def test_a_timed_file_holds_its_copies_in_the_form_that_is_named(layout):
    file = onnx.load_from_string(block_layouts.product(SHAPE, layout, 2))
    onnx.checker.check_model(file, full_check=True)
    kinds = {node.op_type for node in file.graph.node}
    mark = {
        "dense": "Gemm",
        "concat": "Split",
        "gather": "Gather",
        "sum": "Split",
        "batched": "MatMul",
        "conv": "Conv",
    }
    assert mark[layout] in kinds
    assert [value.name for value in file.graph.input] == ["x0", "x1"]
    floats = [numpy_helper.to_array(w) for w in file.graph.initializer if w.data_type == 1]
    assert sum(array.size for array in floats) == 2 * (8 * 12 if layout == "dense" else 4 * 12) + 2 * 8
    session = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    x = values((5, 12))
    one, two = session.run(None, {"x0": x, "x1": x})
    assert one.shape == (5, 8)
    assert not np.allclose(one, two)
    block_layouts.runner(file.SerializeToString(), SHAPE, 1)()


def test_times_are_those_of_one_product_and_ratios_are_paired(monkeypatch):
    now, cost_ms = [0.0], {layout: 2.0 + k for k, layout in enumerate(SHAPE.contenders)}
    monkeypatch.setattr(sites, "CYCLE_LIMITS", (4, 4))
    monkeypatch.setattr(block_layouts, "product", lambda shape, layout, copies: (layout, copies))

    def runner(file, shape, threads):
        def call():
            now[0] += file[1] * cost_ms[file[0]] / 1e3

        return call

    monkeypatch.setattr(block_layouts, "runner", runner)
    assert block_layouts.measure_layouts(SHAPE, clock=lambda: now[0]) == pytest.approx(cost_ms)


def test_a_masked_weight_becomes_a_lowering_in_the_chosen_form():
    blocks = block_sparse.random("block:4x3@0.5", 8, 12, np.random.default_rng(0))
    weight = (values((8, 12)) * blocks.mask(8, 12)).astype(np.float32)
    found = block_layouts.lowering(
        weight, "block:4x3@0.5", lambda out, inner, blocks: "gather" if out == 8 else "sum"
    )
    assert (found.blocks, found.layout) == (blocks, "gather")
    model = linear(weight)
    lower(model, {"w": found})
    x = values((3, 12), 1)
    assert np.abs(answers(model, x)[0] - x @ weight.T).max() < 1e-5

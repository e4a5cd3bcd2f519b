"""Chains against the file that is exported; what they compute is held in test_blocks.py."""

import functools
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from support import families

from compress.errors import CompressError
from compress.export.backends import ort_chains
from compress.export.microbench import onnx_chain
from compress.export.onnx.writer import export
from compress.sites.discovery import find_sites


@functools.cache
def sites_of(name):
    model, example = families.build(name)
    return model, example, find_sites(model, example).sites


def operators(file):
    return Counter(node.op_type for node in file.graph.node)


def test_a_chain_has_the_costly_operators_that_the_exported_model_has_for_the_site(tmp_path):
    model, example, sites = sites_of("fused")
    export(model, example, tmp_path / "model.onnx", outputs=("logits",))
    whole = operators(onnx.load(tmp_path / "model.onnx"))
    found = Counter()
    for site in sites:
        found += operators(onnx.load_from_string(onnx_chain.chain(site, site.units, 1)))
    # The head of the model is one product; its first norm has no chain, the residual sums all have.
    whole["Gemm"] -= 1
    for operator in ("Gemm", "MatMul", "Softmax", "Gelu", "LayerNormalization"):
        assert found[operator] == whole[operator], operator
    assert set(found) <= set(whole) | {"Mul", "Split"}  # this model divides where others multiply


def test_scores_are_scaled_once_and_carry_no_guard():
    _, _, sites = sites_of("fused")
    heads = next(site for site in sites if site.kind == "heads")
    found = operators(onnx.load_from_string(onnx_chain.chain(heads, heads.units, 1)))
    assert (found["Mul"], found["Softmax"], found["MatMul"]) == (1, 1, 2)
    assert found["IsNaN"] == found["Where"] == 0


def test_a_chain_is_the_same_every_time_and_differs_between_units():
    _, _, sites = sites_of("llama")
    for site in sites[:2]:
        files = [onnx_chain.chain(site, units, 2) for units in (2, 2, 1)]
        assert files[0] == files[1] != files[2]


def test_sizes_are_free_and_the_format_is_the_one_that_is_stated():
    _, _, sites = sites_of("llama")
    heads, ffn = sites[:2]
    for site, shapes in ((heads, [["rows", 24], ["batch", 1, "tokens", "tokens"]]), (ffn, [["rows", 24]])):
        file = onnx.load_from_string(onnx_chain.chain(site, 1, 1))
        assert (file.opset_import[0].version, file.ir_version) == (onnx_chain.OPSET, onnx_chain.IR_VERSION)
        found = [
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            for value in file.graph.input
        ]
        assert found == shapes
        assert [w.name for w in file.graph.initializer if w.data_type == TensorProto.DOUBLE] == []


def test_weights_are_stored_as_out_by_in_and_numbers_once():
    _, _, sites = sites_of("fused")
    heads = sites[0]
    file = onnx.load_from_string(onnx_chain.chain(heads, 3, 2))
    weights = {w.name: numpy_helper.to_array(w) for w in file.graph.initializer}
    gemms = [node for node in file.graph.node if node.op_type == "Gemm"]
    assert [weights[node.input[1]].shape for node in gemms] == [(54, 20), (20, 18)] * 2
    assert all(node.attribute[0].name == "transB" for node in gemms)
    numbers = [tuple(w.tolist()) for w in weights.values() if w.dtype == np.int64]
    assert len(numbers) == len(set(numbers))


def test_readers_of_another_hidden_width_are_refused():
    _, _, sites = sites_of("fused")
    site = sites[0]
    first, *rest = site.matmuls
    odd = site.model_copy(update={"matmuls": (first.model_copy(update={"inner": 21}), *rest)})
    with pytest.raises(CompressError, match="different hidden widths"):
        onnx_chain.chain(odd, 2, 1)


# Lowered products


def floats(file):
    """Numbers that the weights of a chain hold, without vectors and scalars."""
    return sum(numpy_helper.to_array(w).size for w in file.graph.initializer if len(w.dims) == 2)


@pytest.mark.parametrize("name", ["fused", "llama"])
def test_a_chain_in_blocks_holds_what_the_pattern_keeps_and_runs(name):
    _, _, sites = sites_of(name)
    for site in sites[:2]:
        dense = onnx.load_from_string(onnx_chain.chain(site, site.units, 2))
        lowered = onnx_chain.chain(site, site.units, 2, pattern="block:4x2@0.5")
        file = onnx.load_from_string(lowered)
        onnx.checker.check_model(file, full_check=True)
        inner = [dims for w in dense.graph.initializer if len(dims := list(w.dims)) == 2]
        kept = sum(out * 2 * max(1, round(0.5 * inner / 2)) for out, inner in inner)
        assert floats(file) == kept < floats(dense)
        assert [value.name for value in file.graph.input] == [value.name for value in dense.graph.input]
        assert ort_chains.open_session(lowered, site, 1)()[0].shape == (
            site.matmuls[0].rows,
            site.matmuls[0].inner,
        )
        assert onnx_chain.chain(site, site.units, 2, pattern="block:4x2@0.5") == lowered


@pytest.mark.parametrize("units", [4, 3])
def test_a_chain_of_low_rank_holds_two_factors_and_runs(units):
    _, _, sites = sites_of("fused")
    for site in sites[:2]:
        count = min(units, site.units)
        lowered = onnx_chain.chain(site, count, 1, rank=3)
        file = onnx.load_from_string(lowered)
        assert floats(file) == sum(3 * sum(m.features(count)) for m in site.matmuls)
        both = onnx.load_from_string(onnx_chain.chain(site, count, 1, pattern="block:4x2@0.5", rank=3))
        alone = onnx.load_from_string(onnx_chain.chain(site, count, 1, pattern="block:4x2@0.5"))
        assert floats(both) == floats(alone) + floats(file)
        ort_chains.open_session(both.SerializeToString(), site, 1)()


def test_first_factors_of_query_key_and_value_are_one_product_in_a_chain():
    _, _, sites = sites_of("llama")
    heads = sites[0]
    found = operators(onnx.load_from_string(onnx_chain.chain(heads, heads.units, 1, rank=2)))
    assert found["Gemm"] == 1 + 3 + 2  # the first factors, three second ones, the writer's two


def test_the_form_is_asked_for_with_the_product_and_its_blocks():
    _, _, sites = sites_of("fused")
    ffn = sites[1]
    seen = []

    def choose(out, inner, kept):
        seen.append((out, inner, kept.rows, kept.columns, kept.widest))
        return "sum"

    file = onnx.load_from_string(onnx_chain.chain(ffn, ffn.units, 1, pattern="block:2x2@0.5", choose=choose))
    assert seen == [(36, 20, 2, 2, 5), (20, 36, 2, 2, 9)]
    assert "Concat" in operators(file)
    assert operators(file)["Gemm"] == 18 * 5 + 10 * 9


def test_a_pattern_that_cannot_be_lowered_is_refused():
    _, _, sites = sites_of("fused")
    with pytest.raises(CompressError, match="pattern '2:4' is no block pattern"):
        onnx_chain.chain(sites[1], 4, 1, pattern="2:4")

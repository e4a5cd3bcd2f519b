import functools
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from support import families
from support.classifier import Padded
from torch import nn

from compress.core import fakequant, ranges
from compress.core.fakequant import Quantized
from compress.errors import CompressError
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.microbench import onnx_chain
from compress.export.onnx import quantized
from compress.export.onnx.writer import export, save
from compress.measure import timing
from compress.methods import quantized_layers
from compress.sites.discovery import find_sites

PRECISIONS = ("int8-dynamic", "int8-static", "int4", "fp8")
FLOAT = 2e-6  # float32 sums in another order, relative to the largest answer


class Products(nn.Module):
    """Three products of one input, one without a bias; a product of their sum; columns in odd numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(37, 50), nn.Linear(37, 50)
        self.c, self.d = nn.Linear(37, 50, bias=False), nn.Linear(50, 9)

    def forward(self, x):
        return self.d(nn.functional.gelu(self.a(x) + self.b(x) * self.c(x)))


NAMES = ("a.weight", "b.weight", "c.weight", "d.weight")


def lower_file(path, products, target):
    """Quantize the products of a file and write the result to `target`, as a compilation does."""
    model = ir.load(path)
    quantized.lower(model, products)
    assert save(model, target) == (target.name,)


@functools.cache
def exported():
    """The file of the model in float32."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        free = {"x": {0: "batch", 1: "tokens"}}
        export(Products(), {"x": values()}, Path(folder) / "m.onnx", outputs=("y",), dynamic=free)
        return (Path(folder) / "m.onnx").read_bytes()


def values(rows=(3, 5), seed=0, scale=1.0):
    return torch.randn(*rows, 37, generator=torch.Generator().manual_seed(seed)) * scale


def loaded():
    return ir.serde.deserialize_model(onnx.load_from_string(exported()))


def codes_of(model, precision, names=NAMES):
    spans = {"d.weight": (-0.3, 4.0)}
    return {
        name: fakequant.nearest(
            model.get_parameter(name).detach(),
            precision,
            spans.get(name, (-3.0, 2.5)) if precision in ("int8-static", "fp8") else None,
        )
        for name in names
    }


def lowered(products):
    """The rewritten file and its protobuf."""
    model = loaded()
    quantized.lower(model, products)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    return proto


def session(proto):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def operators(proto):
    return Counter(node.op_type for node in proto.graph.node)


def inserted(products):
    model = Products().eval()
    quantized_layers.insert(model, {name: quantized_layers.Place(found) for name, found in products.items()})
    return model


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", [(1, 1), (3, 5), (2, 70)])
def test_a_file_answers_as_the_layers_in_torch_do(precision, rows):
    products = codes_of(Products(), precision)
    run = session(lowered(products))
    x = values(rows, seed=1)
    expected = inserted(products)(x).detach().numpy()
    apart = np.abs(run.run(None, {"x": x.numpy()})[0] - expected).max(-1) / np.abs(expected).max()
    # A value that lies between two bytes may fall to either side, which moves its row by a step.
    assert float(np.quantile(apart, 0.95)) <= 10 * FLOAT
    assert float(apart.max()) < 5e-3
    dense = Products()(x).detach().numpy()
    assert float(np.median(np.abs(dense - expected))) > 100 * FLOAT * np.abs(expected).max()


def test_one_product_may_be_different_from_the_next():
    model = Products()
    products = codes_of(model, "int8-dynamic", ("a.weight",)) | codes_of(model, "int4", ("d.weight",))
    proto = lowered(products)
    count = operators(proto)
    assert (count["MatMulInteger"], count["MatMulNBits"], count["Gemm"]) == (1, 1, 2)
    x = values(seed=2)
    expected = inserted(products)(x).detach().numpy()
    assert np.allclose(session(proto).run(None, {"x": x.numpy()})[0], expected, atol=1e-4)


def test_an_input_becomes_bytes_once_for_all_its_readers_in_any_order():
    for precision, operator in (("int8-dynamic", "DynamicQuantizeLinear"), ("int8-static", "QuantizeLinear")):
        products = codes_of(Products(), precision, NAMES[::-1])
        proto = lowered(products)
        assert operators(proto)[operator] == 2
        session(proto)


def test_ranges_of_one_step_about_other_zeros_are_other_bytes():
    model = Products()
    products = {
        name: fakequant.nearest(model.get_parameter(name).detach(), "int8-static", span)
        for name, span in (("a.weight", (-1.0, 4.0)), ("b.weight", (-4.0, 1.0)))
    }
    assert products["a.weight"].input_step == products["b.weight"].input_step
    proto = lowered(products)
    assert operators(proto)["QuantizeLinear"] == 2
    x = values(seed=4)
    expected = inserted(products)(x).detach().numpy()
    assert np.allclose(session(proto).run(None, {"x": x.numpy()})[0], expected, atol=1e-4)


def test_what_is_no_longer_read_leaves_the_file():
    before = {w.name for w in onnx.load_from_string(exported()).graph.initializer}
    assert set(NAMES) <= before
    sizes = {}
    for precision in PRECISIONS:
        products = codes_of(Products(), precision)
        proto = lowered(products)
        stored = {w.name: w for w in proto.graph.initializer}
        assert not set(NAMES) & set(stored)
        weights = [w for name, w in stored.items() if name.endswith(("_codes", ".weight_step"))]
        sizes[precision] = sum(len(w.raw_data) for w in weights)
        assert sizes[precision] == sum(found.weight_bytes() for found in products.values())
    full = 4 * (3 * 37 * 50 + 50 * 9)
    assert sizes["int4"] < 0.3 * full
    assert sizes["int8-dynamic"] < 0.3 * full


def optimized(proto, path):
    """The operators that onnxruntime runs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path)
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return operators(onnx.load(path))


def test_onnxruntime_makes_one_kernel_of_every_product(tmp_path):
    dynamic = optimized(lowered(codes_of(Products(), "int8-dynamic")), tmp_path / "d.onnx")
    assert dynamic["MatMulIntegerToFloat"] + dynamic["DynamicQuantizeMatMul"] == 4
    assert dynamic["MatMulInteger"] == dynamic["Cast"] == 0
    static = optimized(lowered(codes_of(Products(), "int8-static")), tmp_path / "s.onnx")
    assert (static["QGemm"], static["Gemm"], static["DequantizeLinear"]) == (4, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_model_agrees_on_padded_batches(precision, tmp_path):
    """Between products the file and torch differ by float rounding, which a byte may amplify to one step."""
    task = Padded()
    batches = list(task.batches("test", 16))
    layers = {n: m for n, m in task.model.named_modules() if isinstance(m, nn.Linear)}
    names = [f"{name}.weight" for name in layers]
    seen = quantized_layers.observe(task, names, batches)
    places = {}
    for name, layer in zip(names, layers.values(), strict=True):
        histogram = seen[name].histogram
        span = (histogram.low, histogram.high) if precision in ("int8-static", "fp8") else None
        places[name], _ = quantized_layers.round_linear(
            layer, precision, seen[name].second, seen[name].mean, span=span
        )
    dense = [task.model(**batch.inputs).logits.detach() for batch in batches]
    quantized_layers.insert(task.model, places)
    expected = [task.model(**batch.inputs).logits.detach() for batch in batches]
    products = quantized_layers.finalize(task.model)
    example = {name: value.contiguous() for name, value in task.example(2, 9).items()}
    export(task.model, example, tmp_path / "m.onnx", outputs=("logits",))
    lower_file(tmp_path / "m.onnx", products, tmp_path / "m.onnx")
    with OrtRunner(tmp_path / "m.onnx", 1) as runner:
        found = [
            runner.infer({name: value.numpy() for name, value in batch.inputs.items()})["logits"]
            for batch in batches
        ]
    apart = np.abs(np.concatenate(found) - torch.cat(expected).numpy())
    rounding = (torch.cat(dense) - torch.cat(expected)).abs().numpy()
    assert float(np.median(apart)) < 1e-4
    assert float(apart.max()) < 0.3 * float(rounding.max())


def test_signed_bytes_compute_the_same_with_the_bias_in_float():
    random = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(9, 40, generator=random), torch.randn(9, generator=random)
    found = fakequant.nearest(weight, "int8-static", ranges.symmetric((-2.0, 2.0)))
    assert found.input_zero == 128
    x = torch.randn(21, 40, generator=random) * 1.3  # some are clipped
    step, zero = torch.tensor(found.input_step), torch.tensor(128.0)
    codes = fakequant.input_codes(x, step, zero)
    assert (float(codes.min()), float(codes.max())) == (-128, 127)
    expected = (codes * step) @ found.weight().T + bias
    given = gemm(found.weight(), bias)
    quantized.lower(given, {"w": found}, signed=True)
    proto = ir.serde.serialize_model(given)
    kinds = {w.name: w.data_type for w in proto.graph.initializer}
    assert kinds["w_input_zero"] == TensorProto.INT8
    assert TensorProto.INT32 not in kinds.values()
    assert np.allclose(session(proto).run(None, {"x": x.numpy()})[0], expected, atol=1e-4)
    with pytest.raises(CompressError, match="symmetric range, not a zero point of 85"):
        quantized.lower(
            gemm(weight, bias), {"w": fakequant.nearest(weight, "int8-static", (-1, 2))}, signed=True
        )


def test_a_bias_beyond_32_bits_is_added_in_float():
    weight, bias = torch.full((2, 8), 1e-9), torch.ones(2)
    weight[1] = 1.0
    found = fakequant.nearest(weight, "int8-static", (0.0, 1.0))
    given = gemm(weight, bias)
    quantized.lower(given, {"w": found})
    proto = ir.serde.serialize_model(given)
    assert [node.op_type for node in proto.graph.node][-2:] == ["Gemm", "Add"]
    x = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([torch.ones(5), x.sum(1) + 1], 1)
    assert np.allclose(session(proto).run(None, {"x": x.numpy()})[0], expected, atol=0.02)


# Integers


def single(precision, codes, step, bias=None, span=(0.0, 1.0)):
    """One product as a file and the same as a layer."""
    static = (span[1] / 255, 0) if precision == "int8-static" else (None, 0)
    found = Quantized(precision, codes, step, *static)
    model = gemm(found.weight(), bias)
    quantized.lower(model, {"w": found})
    return ir.serde.serialize_model(model), found


def gemm(weight, bias):
    """One product as a graph."""
    stored = [onnx.numpy_helper.from_array(weight.numpy(), "w")]
    stored += [] if bias is None else [onnx.numpy_helper.from_array(bias.numpy(), "b")]
    given, answer = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", weight.shape[1]), ("y", weight.shape[0]))
    )
    node = helper.make_node("Gemm", ["x", *[one.name for one in stored]], ["y"], transB=1)
    graph = helper.make_graph([node], "g", [given], [answer], stored)
    opset = [helper.make_opsetid("", 20)]
    return ir.serde.deserialize_model(helper.make_model(graph, opset_imports=opset, ir_version=10))


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("inner", [4, 61, 384, 1500])
@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static"])
def test_the_integers_are_exact_where_they_are_largest(rows, inner, precision):
    """Bytes of 255 against the largest weights: where 16 bits would overflow."""
    random = torch.Generator().manual_seed(inner)
    weight = torch.randn(33, inner, generator=random) ** 3
    weight[:4] = weight[:4].abs() + 5  # neighbors of one sign, all large
    codes = fakequant.nearest(weight, "int8-dynamic").codes
    proto, _ = single(precision, codes, torch.ones(33, 1))
    x = (torch.rand(rows, inner, generator=random) > 0.2).float()
    x[0] = 1
    found = session(proto).run(None, {"x": x.numpy()})[0]
    step, zero = fakequant.affine(torch.tensor(0.0), torch.tensor(1.0))
    expected = fakequant.integer_product(fakequant.input_codes(x, step, zero), codes)
    assert int(expected.abs().max()) > 255 * inner * 10
    assert np.array_equal(np.round(found.astype(np.float64) * 255), expected.numpy())


def test_without_holding_pairs_old_processors_would_be_wrong():
    flags = str(timing.environment()["flags"])
    if "vnni" in flags or "avx2" not in flags:
        pytest.skip("this processor adds in 32 bits")
    proto, _ = single("int8-dynamic", torch.full((8, 64), 127, dtype=torch.int8), torch.ones(8, 1))
    found = session(proto).run(None, {"x": np.ones((2, 64), np.float32)})[0]
    assert float(np.abs(found - 127 * 64).min()) > 100


@pytest.mark.parametrize("seed", range(4))
def test_every_integer_of_a_dynamic_product_is_the_one_of_the_reference(seed):
    """The accumulators themselves, as outputs of the file."""
    random = torch.Generator().manual_seed(seed)
    found = fakequant.nearest(torch.randn(20, 90, generator=random), "int8-dynamic")
    proto, _ = single("int8-dynamic", found.codes, found.step)
    product = next(node for node in proto.graph.node if node.op_type == "MatMulInteger")
    proto.graph.output.append(helper.make_tensor_value_info(product.output[0], TensorProto.INT32, None))
    x = torch.randn(31, 90, generator=random) * 10.0 ** (seed - 2) + 0.3
    _, sums = session(proto).run(None, {"x": x.numpy()})
    step, zero = fakequant.dynamic_range(x)
    assert np.array_equal(sums, fakequant.integer_product(fakequant.input_codes(x, step, zero), found.codes))


@pytest.mark.parametrize("biased", [True, False])
def test_scale_and_bias_in_float_follow_the_integers(biased):
    random = torch.Generator().manual_seed(0)
    found = fakequant.nearest(torch.randn(20, 90, generator=random), "int8-dynamic")
    bias = torch.randn(20, generator=random) if biased else None
    proto, _ = single("int8-dynamic", found.codes, found.step, bias)
    x = torch.randn(11, 90, generator=random)
    step, zero = fakequant.dynamic_range(x)
    sums = fakequant.integer_product(fakequant.input_codes(x, step, zero), found.codes)
    expected = sums * (step * found.step[:, 0]) + (0 if bias is None else bias)
    assert np.allclose(session(proto).run(None, {"x": x.numpy()})[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inner", [32, 50, 96, 130])
def test_four_bits_are_packed_as_they_are_read(inner):
    random = torch.Generator().manual_seed(inner)
    found = fakequant.nearest(torch.randn(6, inner, generator=random), "int4")
    proto, _ = single("int4", found.codes, found.step, torch.arange(6.0))
    # Inputs that are whole multiples of their own step lose nothing, so the answer shows the codes.
    for column in range(inner):
        x = torch.zeros(1, inner)
        x[0, column] = 127
        got = session(proto).run(None, {"x": x.numpy()})[0][0]
        expected = 127 * found.weight()[:, column] + torch.arange(6.0)
        assert np.allclose(got, expected, rtol=1e-5, atol=1e-4)


# Chains


def test_a_chain_is_lowered_whole_and_keeps_what_is_around():
    model, example = families.build("fused")
    for site in find_sites(model, example).sites[:2]:
        file = onnx_chain.chain(site, site.units, 2)
        before = operators(onnx.load_from_string(file))
        for precision, operator in (
            ("int8-dynamic", "MatMulInteger"), ("int8-static", "QuantizeLinear"), ("int4", "MatMulNBits"),
        ):  # fmt: skip
            proto = onnx.load_from_string(quantized.lower_chain(file, precision))
            onnx.checker.check_model(proto)
            after = operators(proto)
            assert after[operator] == before["Gemm"]
            kept = ("MatMul", "Softmax", "Gelu", "LayerNormalization", "Reshape", "Transpose")
            assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
            inputs = {"x": np.zeros((14, 20), np.float32)}
            if len(proto.graph.input) > 1:
                inputs["mask"] = np.zeros((2, 1, 7, 7), np.float32)
            assert np.isfinite(session(proto).run(None, inputs)[0]).all()
            assert quantized.lower_chain(file, precision) == quantized.lower_chain(file, precision)


# Files


def test_a_file_is_rewritten_in_place_or_beside_and_always_the_same(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(exported())
    products = codes_of(Products(), "int8-dynamic")
    lower_file(path, products, tmp_path / "low.onnx")
    assert path.read_bytes() == exported()
    lower_file(path, products, path)
    assert path.read_bytes() == (tmp_path / "low.onnx").read_bytes()
    assert len(path.read_bytes()) < 0.5 * len(exported())
    with OrtRunner(path, 1) as runner:
        found = runner.infer({"x": values().numpy()})["y"]
    assert np.allclose(found, inserted(products)(values()).detach().numpy(), atol=1e-4)


def test_settled_layers_export_and_lower_to_what_they_computed(tmp_path):
    model = inserted(codes_of(Products(), "int8-static"))
    x = values(seed=5)
    expected = model(x).detach().numpy()
    products = quantized_layers.finalize(model)
    export(model, {"x": x}, tmp_path / "m.onnx", outputs=("y",))
    lower_file(tmp_path / "m.onnx", products, tmp_path / "m.onnx")
    with OrtRunner(tmp_path / "m.onnx", 1) as runner:
        assert np.allclose(runner.infer({"x": x.numpy()})["y"], expected, atol=1e-4)


def test_names_and_shapes_that_do_not_belong_to_the_file_are_refused():
    found = codes_of(Products(), "int8-dynamic")
    with pytest.raises(
        CompressError, match=r"e\.weight is read by no product of the file, which has a\.weight"
    ):
        lowered({"e.weight": found["a.weight"]})
    with pytest.raises(
        CompressError, match=r"d\.weight is \[9, 50\] in the file, but its codes are \[50, 37\]"
    ):
        lowered({"d.weight": found["a.weight"]})
    with pytest.raises(CompressError, match=r"a\.bias is read by no product"):
        lowered({"a.bias": found["a.weight"]})

"""Half precision where it holds: products are halved, what would overflow is not, and answers stay."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.transformers.float16 import convert_float_to_float16
from support.outputs import write_output
from support.reports import A100

from compress.cli import main
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.delivery import fp16
from compress.export.edge import bundle
from compress.report import metrics_table, schema

WIDTH, ROWS, HEADS = 64, 40, 4
NORM, SCALE = 1e3, 0.25  # of the residual stream, and of scores


def array(name, values):
    return numpy_helper.from_array(np.asarray(values), name)


def block(path, size=NORM, poison=1.0):
    """A pre-norm block with RMS norm, masked attention and a gate; `size` is that of its residual stream."""
    random = np.random.default_rng(0)

    def weight(name, *shape, gain=1.0):
        return array(name, (gain * random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    weights = [weight("table", ROWS, WIDTH, gain=size * np.sqrt(ROWS))]
    weights += [weight(name, WIDTH, WIDTH) for name in ("q", "k", "v", "o", "head")]
    weights += [weight("gate", WIDTH, 2 * WIDTH), weight("up", WIDTH, 2 * WIDTH)]
    weights += [weight("down", 2 * WIDTH, WIDTH, gain=poison)]
    weights += [
        array("two", np.float32(2)), array("eps", np.float32(1e-6)), array("scale", np.float32(SCALE)),
        array("least", np.float32(np.finfo(np.float32).min)), array("one", np.float32(1)),
        array("bias", (0.1 * random.standard_normal(WIDTH)).astype(np.float32)),
        array("last", np.array([-1])), array("middle", np.array([1])),
    ]  # fmt: skip
    node = helper.make_node
    nodes = [node("Gather", ["table", "input_ids"], ["x"])]

    def norm(source, made):
        return [
            node("Pow", [source, "two"], [f"{made}.square"]),
            node("ReduceMean", [f"{made}.square", "last"], [f"{made}.mean"]),
            node("Add", [f"{made}.mean", "eps"], [f"{made}.safe"]),
            node("Sqrt", [f"{made}.safe"], [f"{made}.root"]),
            node("Div", [source, f"{made}.root"], [made]),
        ]

    nodes += norm("x", "n1")
    nodes += [node("MatMul", ["n1", name], [f"{name}.out"]) for name in "qkv"]
    nodes += [
        node("Transpose", ["k.out"], ["k.turned"], perm=[0, 2, 1]),
        node("MatMul", ["q.out", "k.turned"], ["raw"]),
        node("Mul", ["raw", "scale"], ["scores"]),
        node("Cast", ["attention_mask"], ["real"], to=TensorProto.FLOAT),
        node("Sub", ["one", "real"], ["gone"]),
        node("Mul", ["gone", "least"], ["flat"]),
        node("Unsqueeze", ["flat", "middle"], ["masked"]),
        node("Add", ["scores", "masked"], ["seen"]),
        node("Softmax", ["seen"], ["share"], axis=-1),
        node("MatMul", ["share", "v.out"], ["mixed"]),
        node("MatMul", ["mixed", "o"], ["o.plain"]),
        node("Add", ["o.plain", "bias"], ["o.out"]),
        node("Add", ["x", "o.out"], ["x1"]),
        *norm("x1", "n2"),
        node("MatMul", ["n2", "gate"], ["gate.out"]),
        node("Gelu", ["gate.out"], ["bent"]),
        node("MatMul", ["n2", "up"], ["up.out"]),
        node("Mul", ["bent", "up.out"], ["gated"]),
        node("MatMul", ["gated", "down"], ["down.out"]),
        node("Add", ["x1", "down.out"], ["x2"]),
        *norm("x2", "n3"),
        node("MatMul", ["n3", "head"], ["logits"]),
    ]
    ids, mask = (
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "tokens"])
        for name in ("input_ids", "attention_mask")
    )
    answer = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", WIDTH])
    graph = helper.make_graph(nodes, "block", [ids, mask], [answer], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def inputs():
    random = np.random.default_rng(1)
    made = []
    for tokens in (7, 12):
        mask = np.ones((3, tokens), dtype=np.int64)
        mask[1, 4:] = 0
        made.append({"input_ids": random.integers(0, ROWS, (3, tokens)), "attention_mask": mask})
    return made


def answers(path):
    return fp16.emulated_outputs(path, inputs())


def exact(path):
    """What the operators of ONNX say, computed by numpy in the very types of the file."""
    reference = ReferenceEvaluator(str(path))
    with np.errstate(all="ignore"):
        return [{"logits": reference.run(None, given)[0]} for given in inputs()]


def types(path):
    """The type of every value, as onnxruntime infers it."""
    model = onnx.load(path)
    names = [name for node in model.graph.node for name in node.output]
    shown = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in shown)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return {value.name: value.type for value in session.get_outputs()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The block, the same in half precision, and what was said of it."""
    folder = tmp_path_factory.mktemp("half")
    plain = block(folder / "plain.onnx")
    return plain, folder / "half.onnx", fp16.convert(plain, folder / "half.onnx", inputs())


def test_products_are_halved_and_norms_softmax_and_the_stream_are_not(made):
    _, halved, said = made
    assert said.kept == ()
    assert set(said.halved) == {"q", "k", "v", "o", "gate", "up", "down", "head", "raw", "mixed"}
    found = types(halved)
    model = onnx.load(halved)
    for node in model.graph.node:
        kinds = {found[name] for name in node.output}
        if node.op_type in ("MatMul", "Gelu", "Transpose"):
            assert kinds == {"tensor(float16)"}
        elif node.op_type in ("Pow", "ReduceMean", "Sqrt", "Div", "Softmax"):
            assert kinds == {"tensor(float)"}
    sums = {node.output[0]: found[node.output[0]] for node in model.graph.node if node.op_type == "Add"}
    assert {name for name, kind in sums.items() if kind == "tensor(float16)"} == {"o.out"}
    assert found["gated"] == found["scores"] == "tensor(float16)"
    assert found["x2"] == found["logits"] == "tensor(float)"
    assert {value.name for value in model.graph.output} == {"logits"}
    # A value is cast once for all that read it, and nothing is cast to and fro.
    casts = [tuple(node.input) for node in model.graph.node if node.op_type == "Cast"]
    assert len(casts) == len(set(casts))
    assert casts.count(("n1",)) == casts.count(("n2",)) == 1


def test_answers_are_those_of_float32_and_no_product_with_all_digits_was_rounded_to_nothing(made):
    plain, halved, _ = made
    apart = fp16.distance(answers(plain), answers(halved))
    assert 1e-5 < apart < 3e-3 < fp16.TOLERANCE  # below, nothing would have been rounded at all
    assert fp16.distance(exact(halved), answers(halved)) < 1e-3  # numpy adds up in float16
    with OrtRunner(halved, threads=1) as runner:
        assert fp16.distance(answers(plain), [runner.infer(given) for given in inputs()]) < fp16.TOLERANCE


def test_everything_in_half_loses_where_activations_are_large(made, tmp_path):
    plain, _, _ = made
    whole = convert_float_to_float16(onnx.load(plain), keep_io_types=True, op_block_list=[])
    onnx.save(whole, tmp_path / "whole.onnx")
    # Squares of a thousand are no numbers of float16: what is normed by them is gone.
    assert fp16.distance(answers(plain), answers(tmp_path / "whole.onnx")) > 0.5
    assert fp16.distance(answers(plain), exact(tmp_path / "whole.onnx")) > 0.5
    # onnxruntime as it comes hides that: it computes all of it in float32.
    with OrtRunner(tmp_path / "whole.onnx", threads=1) as runner:
        assert fp16.distance(answers(plain), [runner.infer(given) for given in inputs()]) < fp16.TOLERANCE


def test_weights_take_half_of_the_bytes_and_are_the_nearest_numbers(made):
    plain, halved, _ = made
    before = {one.name: numpy_helper.to_array(one) for one in onnx.load(plain).graph.initializer}
    after = {one.name: numpy_helper.to_array(one) for one in onnx.load(halved).graph.initializer}
    assert set(after) == set(before)  # under their own names, and none of them twice
    for name in ("q", "gate", "down", "table", "bias"):
        assert after[name].dtype == np.float16
        assert np.array_equal(after[name], before[name].astype(np.float16))
    assert after["eps"].dtype == after["least"].dtype == np.float32
    stored = sum(value.nbytes for value in after.values())
    assert fp16.weight_bytes(halved) == stored
    assert 0.5 < stored / fp16.weight_bytes(plain) < 0.51


def test_a_product_that_may_overflow_stays_and_so_does_its_weight(tmp_path, monkeypatch):
    plain = block(tmp_path / "plain.onnx", poison=4e4)
    said = fp16.convert(plain, tmp_path / "half.onnx", inputs())
    assert said.kept == ("down",)
    stored = {
        one.name: numpy_helper.to_array(one) for one in onnx.load(tmp_path / "half.onnx").graph.initializer
    }
    assert stored["down"].dtype == np.float32
    assert fp16.distance(answers(plain), answers(tmp_path / "half.onnx")) < fp16.TOLERANCE
    # Had nobody looked at the values, its answer would be infinite.
    monkeypatch.setattr(fp16, "MAX_MAGNITUDE", np.inf)
    assert fp16.convert(plain, tmp_path / "wrong.onnx", inputs()).kept == ()
    assert fp16.distance(answers(plain), answers(tmp_path / "wrong.onnx")) > 0.5


def test_small_weights_stay_and_a_weight_with_two_readers_is_stored_for_both(tmp_path):
    random = np.random.default_rng(0)
    small = (1e-7 * random.standard_normal((8, 8))).astype(np.float32)
    shared = random.standard_normal((8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "small"], ["a"]),
        helper.make_node("MatMul", ["x", "shared"], ["b"]),
        helper.make_node("ReduceSum", ["shared"], ["c"], keepdims=0),
        helper.make_node("Transpose", ["b"], ["turned"], perm=[1, 0]),
        helper.make_node("Exp", ["b"], ["d"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])
    sizes = {"a": ["n", 8], "b": ["n", 8], "c": [], "d": ["n", 8], "turned": [8, "n"]}
    outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in sizes.items()]
    graph = helper.make_graph(nodes, "g", [x], outs, [array("small", small), array("shared", shared)])
    file = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    given = {"x": random.standard_normal((4, 8)).astype(np.float32)}
    said = fp16.convert(file, tmp_path / "h.onnx", [given])
    assert (said.halved, said.kept) == (("shared",), ("small",))
    with OrtRunner(file, threads=1) as plain, OrtRunner(tmp_path / "h.onnx", threads=1) as made:
        expected, found = plain.infer(given), made.infer(given)
    assert {value.dtype for value in found.values()} == {np.dtype(np.float32)}
    assert fp16.distance([expected], [found]) < fp16.TOLERANCE
    assert np.array_equal(expected["c"], found["c"])  # read in float32, as before
    assert np.abs(found["a"] - expected["a"]).max() < 1e-6 * np.abs(expected["a"]).max() + 1e-12


def test_products_of_codes_keep_what_they_read(tmp_path):
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "step"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 8]) for name in "xy")
    codes = np.random.default_rng(0).integers(-127, 127, (8, 8)).astype(np.int8)
    graph = helper.make_graph(nodes, "g", [x], [y], [array("codes", codes), array("step", np.float32(0.01))])
    file = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    said = fp16.convert(file, tmp_path / "h.onnx", [{"x": np.ones((2, 8), np.float32)}])
    assert (said.halved, said.kept) == ((), ("y",))
    assert [node.op_type for node in onnx.load(tmp_path / "h.onnx").graph.node] == [
        "DequantizeLinear",
        "MatMul",
    ]


@pytest.fixture
def out(tmp_path):
    target = A100.model_copy(update={"shapes": {"batch": 1, "tokens": 16}})
    write_output(tmp_path / "out", target=target)
    return tmp_path / "out"


def test_a_target_that_computes_in_fp16_gets_such_a_file_and_a_report_of_its_bytes(out, capfd):
    assert main.perform(["export", str(out), "--to", "onnx-fp16"]) == 0
    file = out / "onnx-fp16" / "model.onnx"
    assert bundle.precision_of(file) == "fp16"
    assert bundle.precision_of(out / "model.onnx") == "fp32"  # what was proven is what it was
    found = schema.read(out).half
    assert (found.weight_bytes, found.file_bytes) == (fp16.weight_bytes(file), file.stat().st_size)
    assert (found.halved, found.kept) == (2, ())
    assert found.distance <= found.tolerance == fp16.TOLERANCE
    row = next(row for row in metrics_table.rows(schema.read(out)) if row.label == "file in fp16")
    assert "2 of 2 products" in row.change
    assert "file in fp16" in (out / "compression" / "report.md").read_text()


def test_a_target_without_fp16_is_told_so(tmp_path, capfd):
    write_output(tmp_path / "out")
    assert main.perform(["export", str(tmp_path / "out"), "--to", "onnx-fp16"]) == 2
    assert "rpi5 computes in fp32, int8; a file in fp16 would be cast back" in capfd.readouterr().err
    assert not (tmp_path / "out" / "onnx-fp16").exists()


def test_a_file_whose_answers_are_lost_is_not_delivered(out, monkeypatch, capfd):
    monkeypatch.setattr(fp16, "TOLERANCE", 1e-9)
    assert main.perform(["export", str(out), "--to", "onnx-fp16"]) == 2
    assert "of the largest one (tolerance 1e-09)" in capfd.readouterr().err
    assert schema.read(out).half is None
    assert not (out / "onnx-fp16").exists()


def test_an_answer_that_is_no_number_is_infinitely_far():
    one, nan = {"y": np.ones(2)}, {"y": np.array([1.0, np.nan])}
    assert fp16.distance([one], [nan]) == np.inf
    assert fp16.distance([one], [{"y": np.array([1.0, 1.5])}]) == 0.5

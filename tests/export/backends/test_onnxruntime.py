import hashlib

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compress.errors import CompressError
from compress.export.backends import onnxruntime as ort_backend
from compress.export.backends.onnxruntime import OrtRunner, TorchRunner


def write(path, kind=TensorProto.FLOAT):
    """`y = x @ w`, with a free batch, and an input in another type."""
    weight = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(3, 2), "w")
    nodes = [
        helper.make_node("Cast", ["add"], ["more"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "more"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3]),
        helper.make_tensor_value_info("add", kind, [1]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph(nodes, "g", inputs, [output], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "model.onnx", TensorProto.INT64)


def feed(batch=2):
    x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
    return {"x": x, "add": np.array([1]), "unused": np.array(["text"])}


def test_answers_come_by_name_for_every_batch_size(file):
    with OrtRunner(file, 1) as runner:
        for batch in (1, 4):
            found = runner.infer(feed(batch))
            assert list(found) == ["y"]
            weight = np.arange(6).reshape(3, 2)
            assert np.array_equal(found["y"], feed(batch)["x"] @ weight + 1)


def test_inputs_are_told_with_types_and_free_sizes(tmp_path):
    for kind, expected in (
        (TensorProto.INT64, np.int64), (TensorProto.INT32, np.int32), (TensorProto.BOOL, np.bool_),
        (TensorProto.FLOAT16, np.float16), (TensorProto.DOUBLE, np.float64), (TensorProto.UINT8, np.uint8),
        (TensorProto.INT8, np.int8),
    ):  # fmt: skip
        with OrtRunner(write(tmp_path / "m.onnx", kind), 1) as runner:
            assert runner.inputs() == {
                "x": (np.dtype(np.float32), ("batch", 3)),
                "add": (np.dtype(expected), (1,)),
            }


def test_the_timed_call_computes_what_infer_does(file, monkeypatch):
    bound = []
    runner = OrtRunner(file, 1)
    session = runner._session

    class Watched:
        def __getattr__(self, name):
            return getattr(session, name)

        def io_binding(self):
            bound.append(session.io_binding())
            return bound[-1]

    runner._session = Watched()
    inputs = {"x": np.asfortranarray(feed(4)["x"]), "add": feed()["add"]}
    call = runner.timed(inputs)
    call()
    assert np.array_equal(bound[0].copy_outputs_to_cpu()[0], runner.infer(inputs)["y"])
    with runner:
        pass
    call()  # the session outlives its runner


def test_what_the_file_does_not_accept_is_refused_with_shape_and_type(file):
    with OrtRunner(file, 1) as runner:
        for use in (runner.infer, runner.timed):
            with pytest.raises(CompressError, match=r"model.onnx needs input add; given: x"):
                use({"x": feed()["x"]})
            with pytest.raises(CompressError, match=r"needs input x, add; given: none"):
                use({})
            wrong = {**feed(), "x": np.ones((2, 4), np.float32)}
            with pytest.raises(
                CompressError, match=r"model.onnx refuses x \(2, 4\) float32, add \(1,\) int64: "
            ):
                use(wrong)
            with pytest.raises(CompressError, match=r"refuses x \(2, 3\) float64"):
                use({**feed(), "x": np.ones((2, 3))})


def test_a_closed_runner_says_so(file):
    with OrtRunner(file, 1) as runner:
        pass
    for use in (runner.inputs, lambda: runner.infer(feed()), lambda: runner.timed(feed())):
        with pytest.raises(CompressError, match=r"model.onnx is closed; use it inside its `with`"):
            use()


def test_a_missing_file_and_a_missing_provider_are_refused(file, tmp_path):
    with pytest.raises(CompressError, match=r"none.onnx does not exist; export the model first"):
        OrtRunner(tmp_path / "none.onnx", 1)
    with pytest.raises(CompressError, match=r"does not exist"):
        OrtRunner(tmp_path, 1)
    with pytest.raises(CompressError, match=r"here has no MoonProvider; it has .*CPUExecutionProvider"):
        OrtRunner(file, 1, "MoonProvider")


def test_a_damaged_file_is_refused_with_its_size(file):
    whole = file.read_bytes()
    for damaged in (b"", b"not an ONNX file at all", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(CompressError, match=rf"\({len(damaged)} bytes\)[\s\S]*damaged .*export it again"):
            OrtRunner(file, 1)


def test_an_operator_that_this_runtime_does_not_know_is_refused(file):
    model = onnx.load(file)
    model.graph.node[1].op_type = "Unheard"
    onnx.save(model, file)
    with pytest.raises(CompressError, match="cannot load"):
        OrtRunner(file, 1)


def test_the_facts_are_those_of_the_session(file):
    with OrtRunner(file, 2) as runner:
        facts = runner.facts()
        options = runner._session.get_session_options()
    assert facts == {**ort_backend.facts(), "provider": ort_backend.CPU, "threads": 2}
    assert facts["version"] == onnxruntime.__version__
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.get_session_config_entry("session.disable_prepacking") == "0"


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return {"logits": self.drop(2 * x)}


def test_the_torch_runner_answers_in_evaluation_mode_and_puts_every_mode_back():
    model = Doubling().train()
    model.drop.eval()
    x = np.ones((2, 3), np.float32)[:, ::-1]
    with TorchRunner(model, lambda output: {"scores": output["logits"]}) as runner:
        assert not model.training
        found = runner.infer({"x": x})
        assert list(found) == ["scores"]
        assert np.array_equal(found["scores"], 2 * x)
        call = runner.timed({"x": x})
        before = model.calls
        call()
        assert model.calls == before + 1
        assert runner.facts() == {
            "runtime": "torch",
            "version": torch.__version__,
            "provider": "cpu",
            "threads": torch.get_num_threads(),
        }
    assert (model.training, model.drop.training) == (True, False)


def test_the_hash_is_that_of_the_file_and_of_the_weights_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"graph" * 10)
    alone = ort_backend.sha256(path)
    assert alone == hashlib.sha256(b"graph" * 10).hexdigest()
    beside = tmp_path / "model.onnx.data"
    beside.write_bytes(b"weights")
    both = ort_backend.sha256(path)
    assert both == hashlib.sha256(b"graph" * 10 + b"weights").hexdigest()
    monkeypatch.setattr(ort_backend, "CHUNK_BYTES", 3)
    assert ort_backend.sha256(path) == both
    beside.write_bytes(b"weightz")
    assert ort_backend.sha256(path) != both

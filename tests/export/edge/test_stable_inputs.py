"""Inputs whose answers hold still where a file rounds."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.export.backends.onnxruntime import OrtRunner
from compress.export.edge import bundle, stable_inputs

STEP = 0.1


def rounding(folder, *, digits=True):
    """A file that gives the code of ten times its input, times 100: far apart on both sides of a border."""
    stored = [
        numpy_helper.from_array(np.full(2, 10, np.float32), "scale"),
        numpy_helper.from_array(np.array(STEP, np.float32), "step"),
        numpy_helper.from_array(np.array(128, np.uint8), "zero"),
        numpy_helper.from_array(np.array(100, np.float32), "much"),
    ]
    middle = [
        helper.make_node("QuantizeLinear", ["scaled", "step", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "step", "zero"], ["back"]),
    ]
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["scaled"]),
        *(middle if digits else []),
        helper.make_node("Mul", ["back" if digits else "scaled", "much"], ["logits"]),
    ]
    given, answer = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in ("x", "logits")
    )
    graph = helper.make_graph(nodes, "g", [given], [answer], stored)
    opset = [helper.make_opsetid("", 20)]
    path = folder / f"m{int(digits)}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def test_only_files_with_bytes_made_while_they_run_round(tmp_path):
    assert stable_inputs.quantizes(rounding(tmp_path))
    assert not stable_inputs.quantizes(rounding(tmp_path, digits=False))


def test_the_input_at_a_border_is_not_taken(tmp_path):
    path = rounding(tmp_path)
    border, inside = np.full((1, 2), 0.045, np.float32), np.full((1, 2), 0.041, np.float32)
    with OrtRunner(path, 1) as runner, stable_inputs.perturbed(path, 1) as others:
        assert len(others) == stable_inputs.PERTURBED_COPIES
        found, apart = stable_inputs.most_stable(
            runner, others, [{"x": border}, {"x": inside}, {"x": border}]
        )
        assert found["x"] is inside
        assert apart == pytest.approx(0.0, abs=1e-5)
        _, moved = stable_inputs.most_stable(runner, others, [{"x": border}])
    assert moved > 0.1  # a whole step of the answer, which the tolerance of no device covers


def test_files_are_changed_by_what_float_sums_may_differ(tmp_path):
    path = rounding(tmp_path, digits=False)
    x = {"x": np.ones((1, 2), np.float32)}
    with OrtRunner(path, 1) as runner, stable_inputs.perturbed(path, 1) as others:
        answers = [other.infer(x)["logits"] for other in others]
        expected = runner.infer(x)["logits"]
    assert all(np.allclose(answer, expected, rtol=2e-5) for answer in answers)
    assert any(not np.array_equal(answer, expected) for answer in answers)
    assert any(not np.array_equal(answer, answers[0]) for answer in answers[1:])


def test_a_file_that_rounds_is_bundled_with_its_steadiest_inputs(tmp_path, monkeypatch):
    path, plain = rounding(tmp_path), rounding(tmp_path, digits=False)
    asked = []
    chosen = stable_inputs.most_stable

    def steadiest(runner, others, inputs):
        asked.append(len(inputs))
        return chosen(runner, others, inputs)

    monkeypatch.setattr(stable_inputs, "most_stable", steadiest)
    with OrtRunner(path, 1) as runner, OrtRunner(plain, 1) as other:
        found = list(bundle.examples(path, runner, {"batch": 1, "tokens": 2}, runner))
        assert asked == [stable_inputs.DRAWS] * 3
        assert [len(one["x"]) for one in found] == [1, 3, 3]
        asked.clear()
        first = list(bundle.examples(plain, other, {"batch": 1, "tokens": 2}, other))
        again = list(bundle.examples(plain, other, {"batch": 1, "tokens": 2}, other))
    assert asked == []
    assert all(np.array_equal(a["x"], b["x"]) for a, b in zip(first, again, strict=True))

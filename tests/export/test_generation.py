"""Decoding by hand: a file whose next token is the sum of all tokens so far, so that a lost one shows."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.errors import CompressError
from compress.export import generation
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.onnx.kv_cache import IDS, MASK, PAST, POSITIONS

LABELS = 11
NAME = f"{PAST}0.key"


@pytest.fixture
def runner(tmp_path):
    """`present.0.key` holds all ids so far; the logits of every token name their sum."""
    numbers = {
        "three": [1, 3], "one": [1], "labels": LABELS, "off_on": [0.0, 1.0],
    }  # fmt: skip
    weights = [
        numpy_helper.from_array(np.array(value, np.float32 if name == "off_on" else np.int64), name)
        for name, value in numbers.items()
    ]
    weights.append(numpy_helper.from_array(np.array(LABELS, np.float32), "modulus"))
    nodes = [
        helper.make_node("Cast", [IDS], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["real", "three"], ["new"]),  # [batch, 1, tokens, 1]
        helper.make_node("Concat", [NAME, "new"], ["present.0.key"], axis=2),
        helper.make_node("CumSum", ["present.0.key", "axis"], ["sums"]),
        helper.make_node("Shape", [IDS], ["sizes"]),
        helper.make_node("Slice", ["sizes", "one", "two"], ["tokens"]),
        helper.make_node("Neg", ["tokens"], ["start"]),
        helper.make_node("Slice", ["sums", "start", "most", "axes"], ["last"]),
        helper.make_node("Mod", ["last", "modulus"], ["rest"], fmod=1),
        helper.make_node("Squeeze", ["rest", "three"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["label"], to=TensorProto.INT64),
        helper.make_node("OneHot", ["label", "labels", "off_on"], ["logits"], axis=-1),
        helper.make_node("Add", [MASK, "one"], ["seen"]),
        helper.make_node("Add", [POSITIONS, "one"], ["counted"]),
    ]
    more = {"axis": 2, "two": [2], "most": [2**31], "axes": [2]}
    weights += [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in more.items()]

    def value(name, *shape, kind=TensorProto.INT64):
        return helper.make_tensor_value_info(name, kind, shape)

    real = {"kind": TensorProto.FLOAT}
    graph = helper.make_graph(
        nodes, "sums",
        [
            value(IDS, "batch", "tokens"), value(MASK, "batch", "whole"), value(POSITIONS, "batch", "tokens"),
            value(NAME, "batch", 1, "past", 1, **real),
        ],
        [
            value("logits", "batch", "tokens", LABELS, **real),
            value("present.0.key", "batch", 1, "whole", 1, **real),
            value("seen", "batch", "whole"), value("counted", "batch", "tokens"),
        ],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "sums.onnx")
    with OrtRunner(tmp_path / "sums.onnx", 1) as opened:
        yield opened


def prompt(*rows):
    ids = np.array(rows)
    return {IDS: ids, MASK: np.ones_like(ids)}


def test_a_prompt_alone_is_completed_by_the_runner(runner):
    answers = runner.infer(prompt([1, 2, 3], [4, 5, 6]))
    assert answers["logits"].argmax(-1).tolist() == [[1, 3, 6], [4, 9, 4]]
    assert answers["present.0.key"].shape == (2, 1, 3, 1)
    assert answers["counted"].tolist() == [[1, 2, 3]] * 2
    with pytest.raises(
        CompressError, match=r"needs input attention_mask, position_ids, past_key_values.0.key"
    ):
        runner.infer({IDS: np.array([[1]])})


def test_step_by_step_gives_what_one_run_gives(runner):
    for tokens in (1, 2, 7):
        inputs = prompt(list(range(tokens)), list(range(3, 3 + tokens)))
        found = generation.Stepwise(runner).infer(inputs)
        assert list(found) == ["logits"]
        assert np.array_equal(found["logits"], runner.infer(inputs)["logits"])


def test_every_step_sees_the_whole_mask_and_its_own_position(runner):
    seen = []

    class Watched:
        inputs, outputs = runner.inputs, runner.outputs

        def infer(self, inputs):
            answers = runner.infer(inputs)
            seen.append((inputs[IDS].tolist(), answers["seen"].tolist(), answers["counted"].tolist()))
            return answers

    inputs = {IDS: np.array([[9, 5, 6, 7]]), MASK: np.array([[0, 1, 1, 1]])}
    generation.Stepwise(Watched()).infer(inputs)
    assert seen == [
        ([[9, 5]], [[1, 2]], [[1, 1]]),
        ([[6]], [[1, 2, 2]], [[2]]),
        ([[7]], [[1, 2, 2, 2]], [[3]]),
    ]


def test_generation_goes_on_from_all_tokens_so_far(runner):
    inputs = prompt([1, 2, 3], [4, 5, 6])
    expected = []
    for row in inputs[IDS].tolist():
        made = list(row)
        for _ in range(9):
            made.append(sum(made) % LABELS)
        expected.append(made[3:])
    assert generation.generate(runner, inputs, 9).tolist() == expected


def test_a_prompt_that_ends_in_padding_is_not_continued(runner):
    inputs = {IDS: np.array([[1, 2], [1, 0]]), MASK: np.array([[1, 1], [1, 0]])}
    with pytest.raises(CompressError, match="pad them on the left"):
        generation.generate(runner, inputs, 2)


def test_a_phase_is_a_prompt_or_one_token_after_it(runner):
    inputs = prompt([1, 2, 3, 4], [5, 6, 7, 8])
    whole = generation.inputs_of(runner, inputs, "prefill")
    assert {name: value.shape for name, value in whole.items()} == {
        IDS: (2, 4), MASK: (2, 4), POSITIONS: (2, 4), NAME: (2, 1, 0, 1),
    }  # fmt: skip
    step = generation.inputs_of(runner, inputs, "decode")
    assert {name: value.shape for name, value in step.items()} == {
        IDS: (2, 1), MASK: (2, 5), POSITIONS: (2, 1), NAME: (2, 1, 4, 1),
    }  # fmt: skip
    assert step[IDS].tolist() == [[4], [8]]
    assert step[POSITIONS].tolist() == [[4], [4]]
    assert runner.infer(step)["present.0.key"].shape == (2, 1, 5, 1)


def test_both_phases_are_timed_in_turn(runner):
    shapes = {}

    class Watched:
        inputs, outputs = runner.inputs, runner.outputs

        def __init__(self, name):
            self.name = name

        def timed(self, inputs):
            shapes[self.name] = inputs[IDS].shape, inputs[NAME].shape
            return runner.timed(inputs)

    done = []
    for phase, expected in (("prefill", ((1, 4), (1, 1, 0, 1))), ("decode", ((1, 1), (1, 1, 4, 1)))):
        found = generation.compare(
            {"dense": Watched("dense"), "compressed": Watched("compressed")},
            prompt([1, 2, 3, 4]), phase, blocks=30, block_ms=0.05, threads=1,
            progress=lambda *told: done.append(told),
        )  # fmt: skip
        assert shapes == {"dense": expected, "compressed": expected}
        assert found.baseline == "dense"
        assert found.latency("compressed").runs >= 90
        assert 0.2 < found.ratio("compressed").value < 5
    assert done[-1][0] == done[-1][1]

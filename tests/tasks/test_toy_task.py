"""A new task is one module and one line: two outputs, a metric of its own, through a whole compilation."""

import json

import pytest
from pydantic import ValidationError
from support.toy_task import OUTPUTS, SPEC, USAGE, Spans
from transformers import BertConfig

from compress.errors import CompressError
from compress.export.backends.onnxruntime import OrtRunner
from compress.ir import Budget
from compress.pipeline import compilation
from compress.recipe import Bench, Calibration, Recipe, Search
from compress.report import schema
from compress.report.progress import Quiet
from compress.task_specs import TASKS
from compress.tasks import loading, pretrained


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(TASKS, SPEC.name, SPEC)


def asked(**changes):
    return Recipe(target="cpu", budget=Budget(speedup=2.0), **changes)


def test_without_the_line_the_name_is_refused_and_its_head_is_not_known():
    with pytest.raises(ValidationError, match="must be one of 'text-classification'"):
        asked(task=SPEC.name)
    config = BertConfig(architectures=["BertForQuestionAnswering"])
    assert pretrained.task_of(config) == "feature-extraction"


def test_with_the_line_recipes_and_checkpoints_know_it(known):
    assert asked(task=SPEC.name).task == SPEC.name
    config = BertConfig(architectures=["BertForQuestionAnswering"])
    assert pretrained.task_of(config) == SPEC.name
    assert pretrained._model_class(config, SPEC.name).__name__ == "BertForQuestionAnswering"
    assert loading.implementation(SPEC) is Spans


def test_a_whole_compilation_reports_its_metric_writes_its_outputs_and_shows_its_usage(known, tmp_path):
    dense = sum(value.numel() for value in Spans().model.parameters()) * 4e-6
    out = tmp_path / "out"
    recipe = Recipe(
        model="support.toy_task:task", target="cpu", budget=Budget(size_mb=0.9 * dense), out=str(out),
        calibration=Calibration(samples=32), search=Search(samples=32, generations=2),
        bench=Bench(blocks=30, block_ms=1.0),
    )  # fmt: skip
    report = compilation.run(recipe, Quiet())
    assert schema.read(out) == report
    assert (report.task, report.score.metric) == (SPEC.name, "exact_match")
    assert report.baseline.score == 1.0
    assert 0 <= report.compressed.score <= 1
    assert report.parity.max_abs_difference <= report.parity.tolerance
    with OrtRunner(out / "model.onnx", 1) as file:
        assert tuple(file.outputs()) == OUTPUTS
        score = Spans().score(lambda inputs: Spans().join(file.infer(inputs)))
    assert score == pytest.approx(report.compressed.score)
    card = (out / "README.md").read_text()
    assert f"```python\n{USAGE}\n```" in card
    assert json.loads((out / "compression" / "report.json").read_text())["score"]["metric"] == "exact_match"


def test_a_model_without_one_of_the_outputs_is_explained():
    with pytest.raises(CompressError, match="returns tuple without 'end_logits'; override Task"):
        Spans().logits((Spans().ids.float(),))

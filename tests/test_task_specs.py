import pytest
import transformers

from compress.task_specs import TASKS, task_of_architectures
from compress.tasks import loading, text_generation
from compress.tasks.task import Pretrained


@pytest.mark.parametrize("name", list(TASKS))
def test_the_data_and_the_class_of_a_task_agree(name):
    spec = TASKS[name]
    kind = loading.implementation(spec)
    assert issubclass(kind, Pretrained)
    assert (spec.name, spec.outputs, spec.metric) == (name, kind.outputs, kind.metric)
    assert kind.name == name
    assert kind.__module__ == "compress.tasks." + name.replace("-", "_")
    assert hasattr(getattr(transformers, spec.auto_class), "from_pretrained")
    compile(spec.usage, name, "exec")


def test_one_task_alone_takes_checkpoints_without_a_known_head():
    assert [spec.name for spec in TASKS.values() if spec.fallback] == ["feature-extraction"]
    assert task_of_architectures(("Unknown", "GPT2LMHeadModel")) == text_generation.TextGeneration.name
    assert task_of_architectures(()) == "feature-extraction"


@pytest.mark.parametrize("name", list(TASKS))
def test_every_column_rule_names_an_option_and_lower_case_names(name):
    for rule in TASKS[name].columns:
        assert rule.option in ("--text", "--label")
        assert rule.names == tuple(word.lower() for word in rule.names)
        assert rule.otherwise

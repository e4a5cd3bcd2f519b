import importlib
import sys

import numpy as np
import pytest
import torch
from support import tiny
from torch import nn

from compress.errors import CompressError
from compress.tasks import loading as tasks
from compress.tasks.loading import Batch, Task, load_example, load_task
from compress.tasks.task import lost_between

ROWS = "text,intent\n" + "red cat,off\nblue dog sees,on\n" * 10


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.classifier(tmp_path_factory.mktemp("models") / "classifier"))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "a.csv").write_text(ROWS)
    return str(tmp_path / "a.csv")


OWN = """
import torch
from compress.errors import CompressError
from compress.tasks.loading import Batch, Task

class Own(Task):
    def __init__(self):
        self.model = torch.nn.Linear(4, 3).double().train()
    def example(self, batch, tokens):
        return {"input": torch.ones(batch, 4)}
    def batches(self, split, size, limit=None):
        yield Batch({"input": torch.eye(4)}, torch.tensor([0, 1, 2, 0]))

def task():
    return Own()
def wrong():
    return 3
def bare():
    return Task()
def broken():
    raise KeyError("lost")
def refused():
    raise CompressError("own words")
def infinite():
    own = Own()
    own.model.weight.data[0, 0] = float("inf")
    return own
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_task.py").write_text(OWN)
    (tmp_path / "faulty_module.py").write_text("1 / 0")
    importlib.invalidate_caches()
    yield "own_task"
    sys.modules.pop("own_task", None)


def test_a_factory_gives_a_task_with_the_defaults_of_a_classifier(own):
    task = load_task("own_task:task", None)
    assert not task.model.training
    assert task.model.weight.dtype == torch.float32
    assert (task.metric, task.higher_is_better, task.labelled) == ("accuracy", True, True)
    (batch,) = task.batches("test", 4)
    answers = np.eye(3)[[0, 1, 0, 0]]
    assert task.score(lambda inputs: answers) == 0.75
    assert task.logits(task.model(**batch.inputs)).shape == (4, 3)
    logits = torch.zeros(4, 3)
    assert task.loss(logits, batch).item() == pytest.approx(np.log(3))
    assert task.divergence(logits, logits, batch).item() == 0
    assert type(load_example("own_task:task", 1, 1)[0]) is nn.Linear


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("no_module:task", r"no_module cannot be imported from .*ModuleNotFoundError"),
        ("faulty_module:task", r"faulty_module cannot be imported.*ZeroDivisionError"),
        ("own_task:tusk", r"own_task has no function 'tusk'; it has .*task"),
        ("own_task:torch", r"own_task has no function 'torch'"),
        ("own_task:wrong", r"own_task:wrong returned int; return an instance of a subclass"),
        ("own_task:bare", r"returned a Task without a model"),
        ("own_task:broken", r"own_task:broken failed: KeyError: 'lost'"),
        ("own_task:refused", r"^own words$"),
        ("own_task:infinite", r"own_task:infinite: weight holds 1 NaN or infinite"),
    ],
)
def test_a_factory_that_gives_no_task_is_explained(own, words, message):
    with pytest.raises(CompressError, match=message):
        load_task(words, None)


def test_a_factory_brings_its_own_data(own):
    with pytest.raises(CompressError, match=r"brings its own data; leave out --data, --label"):
        load_task("own_task:task", "a.csv", label="y")


def test_data_without_labels_has_no_loss_and_no_accuracy():
    class Unlabelled(Task):
        def batches(self, split, size, limit=None):
            yield Batch({"x": torch.zeros(2, 2)})

    task = Unlabelled()
    with pytest.raises(CompressError, match=r"no labels here, so there is no loss"):
        task.loss(torch.zeros(2, 2), Batch({}))
    with pytest.raises(CompressError, match=r"no labels here, so there is no accuracy"):
        task.score(lambda inputs: inputs["x"])


def test_logits_are_found_in_every_form_of_output():
    class Output:
        logits = torch.ones(1)

    task = Task()
    for output in (torch.ones(1), (torch.ones(1), None), [Output()], Output()):
        assert torch.equal(task.logits(output), torch.ones(1))
    with pytest.raises(CompressError, match=r"returns dict without 'logits'; override Task.logits"):
        task.logits({})


def test_a_task_that_lacks_a_method_says_which():
    with pytest.raises(CompressError, match=r"Task does not define example\(batch, tokens\)"):
        Task().example(1, 2)
    with pytest.raises(CompressError, match=r"Task does not define batches\(split"):
        Task().batches("test", 1)
    assert Task().outputs == ("logits",)


def test_a_directory_and_its_data_become_a_task(directory, data, tmp_path):
    task = load_task(directory, data)
    assert task.name == "text-classification"
    assert task.origin["test"] == "a.csv, a random 1/5, held out"
    whole = load_task(directory, data, test=data, seed=1)
    assert whole.samples["test"] == 20
    assert whole.origin["test"] == "a.csv, whole"
    example = task.example(2, 6)
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == {
        "input_ids": (2, 6),
        "attention_mask": (2, 6),
    }
    (tmp_path / "out").mkdir()
    task.save_files(tmp_path / "out")
    assert {item.name for item in (tmp_path / "out").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    task.save_files(task.directory)
    assert (task.directory / "tokenizer.json").read_text().startswith("{")


def test_columns_can_be_named(directory, tmp_path):
    lines = "".join(f"red,blue cat,on,{('off', 'on')[at % 3 % 2]}\n" for at in range(20))
    (tmp_path / "a.csv").write_text("text,other,label,truth\n" + lines)
    task = load_task(directory, str(tmp_path / "a.csv"), text="other", label="truth")
    assert task.rows["test"][0] == ("blue cat",)
    assert set(torch.cat(list(task.labels.values())).tolist()) == {0, 1}
    with pytest.raises(CompressError, match=r"no column 'truht'; did you mean 'truth'"):
        load_task(directory, str(tmp_path / "a.csv"), label="truht")


def test_a_model_that_was_loaded_elsewhere_is_taken_as_it_is(directory, data):
    model = load_example(directory, 1, 4)[0].half().train()
    task = load_task(directory, data, model_module=model)
    assert task.model is model
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32


def test_the_task_can_be_named(directory, data):
    task = load_task(directory, data, task="feature-extraction")
    assert (task.name, type(task.model).__name__) == ("feature-extraction", "BertModel")
    with pytest.raises(CompressError, match=r"takes input_ids, but image-classification here feeds pixel"):
        load_task(directory, data, task="image-classification", model_module=load_example(directory, 1, 4)[0])


def test_a_model_without_data_says_what_to_add(directory):
    with pytest.raises(CompressError, match=r"no data was given for .*; add --data"):
        load_task(directory, None)


def test_a_label_outside_the_model_is_named_with_its_line(directory, tmp_path):
    (tmp_path / "a.csv").write_text(ROWS + "red,maybe\n")
    with pytest.raises(CompressError, match=r"a.csv line 22 has label 'maybe'"):
        load_task(directory, str(tmp_path / "a.csv"))


def test_faults_of_the_data_are_told_before_the_model_is_loaded(directory, monkeypatch):
    monkeypatch.setattr(tasks.pretrained, "load_weights", lambda *_: pytest.fail("loaded"))
    with pytest.raises(CompressError, match=r"nothing.csv does not exist"):
        load_task(directory, "nothing.csv")


def test_without_a_model_the_demo_is_taken_with_its_own_data(tmp_path, monkeypatch):
    demo = tiny.classifier(tmp_path / "demo")
    for name, rows in (("train", 12), ("validation", 4), ("test", 6)):
        (demo / f"{name}.csv").write_text("\n".join(ROWS.split("\n")[: rows + 1]) + "\n")
    (demo / "LICENSE.md").write_text("credit")
    monkeypatch.setattr(tasks.importlib.resources, "files", lambda package: demo)
    task = tasks.demo()
    assert task.samples == {"calibration": 12, "validation": 4, "test": 6}
    assert task.origin["test"] == "test.csv, whole"
    (tmp_path / "own.csv").write_text(ROWS)
    assert load_task(None, str(tmp_path / "own.csv")).samples["test"] == 4


def rights(seed, share, n=2000):
    return (
        torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < share
    ).numpy()


def test_the_interval_of_a_lost_score_is_that_of_paired_differences():
    before = rights(0, 0.9).astype(float)
    after = np.where(rights(1, 0.03), 1 - before, before)  # 3 % of the answers turn
    low, high = lost_between(Task(), before, after)
    apart = (before - after)[:, 0]
    half = 1.96 * apart.std() / len(apart) ** 0.5
    assert (low, high) == pytest.approx((apart.mean() - half, apart.mean() + half), abs=0.1 * half)
    # Without pairing it would be three times as wide.
    alone = 1.96 * (before.var() + after.var()) ** 0.5 / len(before) ** 0.5
    assert high - low < 0.5 * 2 * alone
    assert lost_between(Task(), before, before) == (0.0, 0.0)
    assert lost_between(Task(), after, before) == pytest.approx((-high, -low), abs=0.1 * half)


def test_of_a_score_that_is_better_when_lower_more_is_lost():
    class Lower(Task):
        higher_is_better = False

    before, after = np.full((40, 1), 0.25), np.full((40, 1), 0.5)
    assert lost_between(Lower(), before, after) == (0.25, 0.25)
    assert lost_between(Task(), before, after) == (-0.25, -0.25)


@pytest.mark.slow
def test_the_interval_covers_what_it_says():
    held = 0
    for seed in range(200):
        before = rights(3 * seed, 0.9, 500).astype(float)
        after = np.where(rights(3 * seed + 1, 0.05, 500), 0.0, before)
        low, high = lost_between(Task(), before, after, seed)
        held += low <= 0.9 * 0.05 <= high
    assert 0.9 <= held / 200 <= 0.99

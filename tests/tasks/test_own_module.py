"""Tasks made of a module, example inputs and a data loader."""

import numpy as np
import pytest
import torch
from torch import nn

from compress.errors import CompressError
from compress.tasks.own_module import ModuleTask

ROWS = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
LABELS = (ROWS[:, 0] > 0).long()


class Two(nn.Module):
    """Two named inputs and two classes, right on `LABELS` when the first input decides."""

    def forward(self, a, b=None):
        return torch.stack([-a[:, 0], a[:, 0]], -1) * (1 if b is None else b[:, :1].exp())

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def run(inputs):
    with torch.no_grad():
        return Two()(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()


@pytest.mark.parametrize(
    "item",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: ([x], y),
        lambda x, y: {"a": x, "labels": y},
        lambda x, y: ({"a": x}, y),
    ],
)
def test_labels_of_a_loader_in_any_usual_layout_give_accuracy(item):
    data = [item(x, y) for x, y in zip(ROWS.split(16), LABELS.split(16), strict=True)]
    task = ModuleTask(Two(), ROWS[:1], data)
    assert (task.metric, task.samples) == ("accuracy", {"calibration": 20, "validation": 10, "test": 10})
    assert task.outcomes(run).mean() == 1
    assert task.outcomes(lambda inputs: -run(inputs)).mean() == 0


def test_splits_are_the_rows_in_their_order_and_share_none():
    task = ModuleTask(Two(), ROWS[:1], [(ROWS, LABELS)])
    found = [batch for split in ("calibration", "validation", "test") for batch in task.batches(split, 7)]
    assert torch.equal(torch.cat([batch.inputs["a"] for batch in found]), ROWS)
    assert torch.equal(torch.cat([batch.labels for batch in found]), LABELS)
    assert [len(batch.inputs["a"]) for batch in task.batches("calibration", 7, 9)] == [7, 2]


def test_without_labels_the_score_is_the_cosine_to_the_dense_output():
    task = ModuleTask(Two(), ROWS[:1], ROWS.split(16))
    assert task.metric == "cosine"
    np.testing.assert_allclose(task.outcomes(run), 1, rtol=1e-6)
    np.testing.assert_allclose(task.outcomes(lambda inputs: -run(inputs)), -1, rtol=1e-6)
    batch = next(iter(task.batches("test", 4)))
    output = torch.from_numpy(run({name: value.numpy() for name, value in batch.inputs.items()}))
    assert task.divergence(2 * output, output, batch) == pytest.approx(0, abs=1e-6)
    assert task.divergence(-output, output, batch) == pytest.approx(2)


def test_labels_that_are_numbers_are_no_classes():
    assert ModuleTask(Two(), ROWS[:1], [(ROWS, ROWS[:, 0])]).metric == "cosine"


def test_several_inputs_go_by_order_or_name_and_the_example_is_repeated():
    task = ModuleTask(Two(), (ROWS[:2], ROWS[2:4]), [(ROWS, ROWS, LABELS)])
    example = task.example(3, 0)
    assert list(example) == ["a", "b"]
    assert torch.equal(example["b"], ROWS[[2, 3, 2]])
    assert ModuleTask.example_of(Two(), {"b": ROWS[:1], "a": ROWS[1:2]}, 2)["a"].shape == (2, 3)


def test_the_given_module_is_copied_and_real_inputs_become_float32():
    model = Two().double().train()
    task = ModuleTask(model, ROWS[:1].double(), [(ROWS.double(), LABELS)])
    assert model.training
    assert model.weight.dtype == torch.float64
    assert not task.model.training
    assert task.model.weight.dtype == task.example(1, 0)["a"].dtype == torch.float32


@pytest.mark.parametrize(
    ("example", "data", "message"),
    [
        (ROWS[:1], [(ROWS[:5], LABELS[:5])], "holds 5 rows; at least 8 are needed"),
        (ROWS[:1], [], "the data loader gives nothing, the example inputs are a"),
        ((ROWS[:1], ROWS[:1]), [ROWS], "both must hold the same arguments"),
        ((ROWS, ROWS, ROWS), [], "3 inputs were given, but Two.forward takes a, b"),
        ({"c": ROWS}, [], r"input 'c' is no argument of Two.forward; it takes a, b"),
        ([[1.0]], [], "input 'a' is a list; give tensors with a batch dimension"),
        (ROWS[:1], [ROWS, ROWS[:, :2]], "batches of the data loader differ in shape"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(example, data, message):
    with pytest.raises(CompressError, match=message):
        ModuleTask(Two(), example, data)

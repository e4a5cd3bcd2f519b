"""Accuracy of a dense and a compressed classifier per class, from the classes that they predict."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.tasks.task import SCORE_BATCH, Task

Classes = NDArray[np.int64]


class ClassAccuracy(NamedTuple):
    """The share of one class's test inputs that each model gets right."""

    name: str
    samples: int
    dense: float
    compressed: float


def predicted(task: Task, logits: Sequence[NDArray[Any]], inputs: int) -> Classes | None:
    """[inputs] the class with the largest logit, None where a task does not score one class per input.

    Args:
        task: what the logits are for.
        logits: [batch, classes] of every batch, in the order of the split.
        inputs: how many inputs were scored.
    """
    if task.metric != "accuracy" or any(batch.ndim != 2 for batch in logits):
        return None
    found = np.concatenate([batch.argmax(-1) for batch in logits])
    return found if len(found) == inputs else None


def agreement(dense: Classes | None, compressed: Classes | None) -> float | None:
    """The share of inputs that both models give the same class, None where there are no classes."""
    if dense is None or compressed is None:
        return None
    return float((dense == compressed).mean())


def by_class(task: Task, dense: Classes | None, compressed: Classes | None) -> list[ClassAccuracy]:
    """The accuracy of both models per class of the test split, the largest losses first."""
    if dense is None or compressed is None:
        return []
    labels = [batch.labels.numpy() for batch in task.batches("test", SCORE_BATCH) if batch.labels is not None]
    truth = np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)
    if truth.shape != dense.shape:
        return []
    found = []
    for label in np.unique(truth).tolist():
        own = truth == label
        name = str(task.id2label.get(label, label))
        rights = (float((classes[own] == label).mean()) for classes in (dense, compressed))
        found.append(ClassAccuracy(name, int(own.sum()), *rights))
    return sorted(found, key=lambda one: (one.compressed - one.dense, one.name))

"""Batch and Task: what a compilation must know about a model — inputs, data, loss and score.

A user with a model that is none of transformers' own writes a subclass of `Task`: `model`, `example`
and `batches` are all it needs when the model returns `[batch, labels]` logits.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.errors import CompressError
from compress.measure.intervals import paired_difference
from compress.tasks import pretrained
from compress.tasks.datasets import Splits

Split = Literal["calibration", "validation", "test"]
Run = Callable[[dict[str, NDArray[Any]]], NDArray[Any]]

SCORE_BATCH = 32
# What makes a saved directory reload everywhere; weights and config.json are written elsewhere.
COMPANIONS = (
    *pretrained.VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


@dataclass(frozen=True)
class Batch:
    """Inputs by the model's argument names; `real` [batch, tokens] is False at padding."""

    inputs: dict[str, Tensor]
    labels: Tensor | None = None
    real: Tensor | None = None


class Task:
    """A model, its data, and how good an answer is; the defaults suit any classifier.

    Attributes:
        model: the dense model, in float32 and evaluation mode; never changed.
        samples: how many inputs each split has, and `origin`: in words, where they came from.
        labelled: whether `loss` can be asked; `divergence` needs no labels.
        output_name: the name of the output that carries the quality, here and in the exported file.
    """

    name: str = "classification"
    metric: str = "accuracy"
    higher_is_better: bool = True
    labelled: bool = True
    output_name: str = "logits"
    samples: Mapping[str, int] = MappingProxyType({})
    origin: Mapping[str, str] = MappingProxyType({})
    id2label: Mapping[int, str] = MappingProxyType({})
    model: nn.Module

    def example(self, batch: int, tokens: int) -> dict[str, Tensor]:
        """Inputs of one shape without padding, the same every time; images ignore `tokens`."""
        raise CompressError(f"{type(self).__name__} does not define example(batch, tokens)")

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """The split in batches of `size`, in an order that never changes, `limit` inputs at most."""
        raise CompressError(f"{type(self).__name__} does not define batches(split, size, limit)")

    def save_files(self, directory: Path) -> None:
        """Writes what reloads the model besides its weights: tokenizer, image processor."""

    def logits(self, output: object) -> Tensor:
        """The tensor in the model's output that carries its quality."""
        if isinstance(output, (tuple, list)):
            output = output[0]
        found = output if isinstance(output, Tensor) else getattr(output, self.output_name, None)
        if not isinstance(found, Tensor):
            raise CompressError(
                f"the model returns {type(output).__name__} without {self.output_name!r}; "
                "override Task.logits to say which tensor carries its quality"
            )
        return found

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy against the labels."""
        if batch.labels is None:
            raise CompressError(f"{self.name} data has no labels here, so there is no loss")
        return F.cross_entropy(logits, batch.labels)

    def divergence(self, logits: Tensor, dense: Tensor, batch: Batch) -> Tensor:
        """How far an answer is from the dense model's: mean KL(dense || logits), in nats."""
        return kl(logits, dense).mean()

    def outcomes(self, run: Run, split: Split = "test", limit: int | None = None) -> NDArray[Any]:
        """[inputs, columns] what `run` makes of every input of a split: 1 where it gets the label right."""
        right = []
        for batch in self.batches(split, SCORE_BATCH, limit):
            if batch.labels is None:
                raise CompressError(f"{self.name} data has no labels here, so there is no accuracy")
            right.append(answer(run, batch).argmax(-1) == batch.labels.numpy())
        return np.concatenate(right)[:, None].astype(np.float64)

    def scored(self, outcomes: NDArray[Any]) -> float:
        """The score of these inputs: the fraction of labels that is right."""
        return float(outcomes.mean())

    def score(self, run: Run, split: Split = "test", limit: int | None = None) -> float:
        """The quality of `run` on a split."""
        return self.scored(self.outcomes(run, split, limit))


def lost_between(task: Task, before: NDArray[Any], after: NDArray[Any], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of how much worse a score is, from outcomes of the same inputs."""
    sign = 1 if task.higher_is_better else -1
    return paired_difference(lambda outcomes: sign * task.scored(outcomes), before, after, seed).interval.ends


def kl(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || logits) over the last dimension."""
    against, truth = F.log_softmax(logits, -1), F.log_softmax(dense, -1)
    return F.kl_div(against, truth, reduction="none", log_target=True).sum(-1)


def answer(run: Run, batch: Batch) -> NDArray[Any]:
    """What `run` says to a batch; NaN would score as some label, so it is refused."""
    found = run({name: tensor.numpy() for name, tensor in batch.inputs.items()})
    if not np.isfinite(found).all():
        raise CompressError("the model answers NaN or infinity on valid data; keep a higher precision")
    return found


@dataclass(frozen=True)
class Request:
    """What the built-in tasks are made from."""

    model: nn.Module
    directory: Path
    splits: Splits
    text: str | None
    label: str | None
    tokens: int | None


class Pretrained(Task):
    """A task whose model lies in a Hugging Face directory."""

    def __init__(self, request: Request) -> None:
        self.model = request.model
        self.directory = request.directory
        self.origin = request.splits.origin
        self.samples = {split: len(table) for split, table in request.splits.tables.items()}
        self.id2label = getattr(self.model.config, "id2label", None) or {}

    def example(self, batch: int, tokens: int) -> dict[str, Tensor]:
        """Random ids or pixels, from the model's configuration alone."""
        return pretrained.example_inputs(self.model, batch, tokens)

    def save_files(self, directory: Path) -> None:
        """Copies the tokenizer and image processor files as they are."""
        for name in COMPANIONS:
            source, copy = self.directory / name, directory / name
            if source.is_file() and not (copy.exists() and copy.samefile(source)):
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)

    def check_head(self) -> None:
        """Accuracy needs one answer among two labels or more."""
        kind = getattr(self.model.config, "problem_type", None)
        if len(self.id2label) < 2 or kind in ("regression", "multi_label_classification"):
            raise CompressError(
                f"{self.directory} has {len(self.id2label)} output(s) for {kind or 'one number'}; only "
                "single-label classifiers are scored here, others through package.module:factory"
            )

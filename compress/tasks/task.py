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
import torch
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
        outputs: names of the outputs that carry the quality, in the model's result and in the exported file.
    """

    name: str = "classification"
    metric: str = "accuracy"
    higher_is_better: bool = True
    labelled: bool = True
    outputs: tuple[str, ...] = ("logits",)
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
        """The tensor that loss and divergence take, of what the model returns.

        That is its one output; several, of one shape, are stacked on a new last axis in their order.

        Raises:
            CompressError: the model returns no such tensor.
        """
        if len(self.outputs) > 1:
            return torch.stack(tuple(self.output_tensors(output).values()), -1)
        if isinstance(output, (tuple, list)):
            output = output[0]
        return self._tensor(output, output, self.outputs[0])

    def output_tensors(self, output: object) -> dict[str, Tensor]:
        """The outputs of the exported file by name, of what the model returns.

        Several are read by name from an object or mapping, by position from a tuple.

        Raises:
            CompressError: the model lacks one of them.
        """
        if len(self.outputs) == 1:
            return {self.outputs[0]: self.logits(output)}
        if isinstance(output, (tuple, list)):
            by_name = dict(zip(self.outputs, output, strict=False))
        else:
            known = output if isinstance(output, Mapping) else vars(output)
            by_name = {name: known.get(name) for name in self.outputs}
        return {name: self._tensor(by_name.get(name), output, name) for name in self.outputs}

    def join(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The array that the score takes, of the outputs of a file: as `logits` makes it of tensors."""
        found = [arrays[name] for name in self.outputs]
        return found[0] if len(found) == 1 else np.stack(found, -1)

    def _tensor(self, found: object, output: object, name: str) -> Tensor:
        """The tensor itself, or the attribute `name` of an object."""
        tensor = found if isinstance(found, Tensor) else getattr(found, name, None)
        if not isinstance(tensor, Tensor):
            raise CompressError(
                f"the model returns {type(output).__name__} without {name!r}; "
                "override Task.logits to say which tensor carries its quality"
            )
        return tensor

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

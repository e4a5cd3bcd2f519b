"""From the words of a request to a `Task`: a Hugging Face model with data, or a user's own factory.

`Task` and `Batch`, which a user's own task is made of, are importable from here.
"""

import importlib
import importlib.resources
import re
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from compress.errors import CompressError
from compress.recipe import TaskName
from compress.task_specs import TASKS, TaskSpec
from compress.tasks import pretrained
from compress.tasks.datasets import read_splits
from compress.tasks.pretrained import check_finite, example_inputs
from compress.tasks.task import Batch, Request, Run, Split, Task

__all__ = ["Batch", "Run", "Split", "Task", "demo", "example_inputs", "load_example", "load_task"]

FACTORY = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"


def load_task(
    model: str | None,
    data: str | None,
    *,
    test: str | None = None,
    task: TaskName | None = None,
    text: str | None = None,
    label: str | None = None,
    tokens: int | None = None,
    seed: int = 0,
    model_module: nn.Module | None = None,
) -> Task:
    """The task that a request describes.

    Args:
        model: a Hugging Face directory or hub id, `package.module:factory`, or None for the demo.
        data: a file, or a directory with train, validation and test files or images by class.
        test: a file that only the score is computed on; without it, a part of `data` is held out.
        task: what the model is for; found in its config when None.
        text: the column of text, two joined by a comma for pairs; found when None.
        label: the column of labels, or of scores for sentence pairs; found when None.
        tokens: the longest input in tokens (the block length of running text).
        seed: fixes the order and the split of the data.
        model_module: the model itself, when it was loaded by other means.

    Raises:
        CompressError: anything about the model or the data is missing, damaged or does not fit.
    """
    if model is not None and _is_factory(model):
        given = {"data": data, "test": test, "task": task, "text": text, "label": label}
        words = [f"--{name}" for name, value in given.items() if value is not None]
        if words:
            raise CompressError(f"{model} brings its own data; leave out {', '.join(words)}")
        return _from_factory(model)
    directory = _demo_directory() if model is None else pretrained.resolve(model)
    data = str(directory) if data is None and model is None else data
    if data is None:
        raise CompressError(
            f"no data was given for {model}; add --data with a file or directory of inputs like those "
            "it will see (.csv .tsv .jsonl .json .parquet .txt .npz, or images by class)"
        )
    config = pretrained.read_config(directory)
    name = task or pretrained.task_of(config)
    spec = TASKS[name]
    splits = read_splits(data, test, seed=seed, shuffle=spec.shuffled)
    if model_module is None:
        model_module = pretrained.load_weights(directory, config, name)
    module = model_module.float().eval()
    takes = getattr(module, "main_input_name", "input_ids")
    if takes != spec.main_input:
        raise CompressError(
            f"{directory} takes {takes}, but {name} here feeds {spec.main_input}; name another --task, "
            "or give package.module:factory"
        )
    return implementation(spec)(Request(module, directory, splits, text, label, tokens))


def implementation(spec: TaskSpec) -> Callable[[Request], Task]:
    """The class that makes a task of this kind from a request."""
    place, _, name = spec.implementation.partition(":")
    found: Callable[[Request], Task] = getattr(importlib.import_module(place), name)
    return found


def demo() -> Task:
    """The embedded default: a small intent classifier with its data."""
    return load_task(None, None)


def load_example(model: str | None, batch: int, tokens: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model alone and example inputs of one shape: no data and no tokenizer are needed.

    Args:
        model: as for `load_task`.
        batch: inputs in one batch.
        tokens: their length, where the model reads text.
    """
    if model is not None and _is_factory(model):
        task = _from_factory(model)
        return task.model, task.example(batch, tokens)
    directory = _demo_directory() if model is None else pretrained.resolve(model)
    config = pretrained.read_config(directory)
    module = pretrained.load_weights(directory, config, pretrained.task_of(config))
    return module, example_inputs(module, batch, tokens)


def _demo_directory() -> Path:
    """Where the package keeps its demo."""
    return Path(str(importlib.resources.files("compress.demo")))


def _is_factory(model: str) -> bool:
    return re.fullmatch(FACTORY, model) is not None and not Path(model).exists()


def _from_factory(words: str) -> Task:
    """Imports `package.module`, with the current directory in reach, and calls its factory."""
    place, name = words.split(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(place)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise CompressError(
            f"{place} cannot be imported from {here}: {type(error).__name__}: {error}"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise CompressError(f"{place} has no function {name!r}; it has {', '.join(names) or 'none'}")
    try:
        task = factory()
    except CompressError:
        raise
    except Exception as error:  # as above
        raise CompressError(f"{words} failed: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise CompressError(
            f"{words} returned {type(task).__name__}; return an instance of a subclass of compress.Task"
        )
    if not isinstance(getattr(task, "model", None), nn.Module):
        raise CompressError(f"{words} returned a Task without a model; set self.model to an nn.Module")
    check_finite(task.model, words)
    task.model.float().eval()
    return task

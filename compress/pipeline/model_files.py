"""A model of a job as the file that is timed, and the inputs that it is timed on.

Decoders are written with their key-value cache, all other models as they are. One run is the phase that
was asked for: a prompt of the recipe's length, or one token after a past of that length.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from compress.export import generation
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.backends.torch_cuda import CudaRunner
from compress.export.onnx import decoder, writer
from compress.export.onnx.writer import Exported, Lower
from compress.export.place import Place, Timed
from compress.measure import timing
from compress.methods import torch_layers
from compress.pipeline.job import Job
from compress.recipe import Phase
from compress.sites.prune import Removal


def write(job: Job, model: nn.Module, path: Path, *, lower: Lower | None = None) -> Exported:
    """Export one model of the job, dense or shrunk, to `path`; `lower` changes the finished graph.

    Raises:
        CompressError: the model cannot be exported.
    """
    if job.decodes:
        return decoder.export(model, path, output_name=job.task.output_name, lower=lower)
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    return writer.export(
        model, example, path, output_name=job.task.output_name, logits=job.task.logits, lower=lower
    )


def inputs(job: Job, runner: OrtRunner, phase: Phase | None = None) -> dict[str, NDArray[np.generic]]:
    """What one run of a file takes, in the phase asked for unless another is named."""
    prompt = job.prompt
    return generation.inputs_of(runner, prompt, phase or job.recipe.shapes.phase) if job.decodes else prompt


def opened(job: Job, place: Place, model: nn.Module, file: Path) -> Timed:
    """The model as it is timed at a place: its file, or the module itself on a GPU."""
    return place.runner(model, file, job.task.logits, job.task.output_name, torch_layers.settle)


def in_forms(job: Job, model: nn.Module, removals: Mapping[str, Removal]) -> nn.Module:
    """A shrunk model as it is opened where torch runs it: its products say their forms; a file has them."""
    if job.place is None or job.place.by_file:
        return model
    return torch_layers.formed(model, job.sites, removals)


def timed(job: Job, runner: Timed, phase: Phase | None = None) -> timing.Runner:
    """One run of a model, ready to be measured."""
    if isinstance(runner, OrtRunner):
        return runner.timed(inputs(job, runner, phase))
    if isinstance(runner, CudaRunner) and (phase or job.recipe.shapes.phase) == "decode":
        return runner.timed_step(job.prompt)
    return runner.timed(job.prompt)

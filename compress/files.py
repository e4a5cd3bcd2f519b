"""A model of a job as the file that is timed, and the inputs that it is timed on.

Decoders are written with their key-value cache, all other models as they are. One run is the phase that
was asked for: a prompt of the recipe's length, or one token after a past of that length.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from compress import bench
from compress.export import decode, decoder, onnx
from compress.export.onnx import Exported, Lower
from compress.export.runners import OrtRunner
from compress.job import Job
from compress.recipe import Phase


def write(job: Job, model: nn.Module, path: Path, *, lower: Lower | None = None) -> Exported:
    """Export one model of the job, dense or shrunk, to `path`; `lower` changes the finished graph.

    Raises:
        CompressError: the model cannot be exported.
    """
    if job.decodes:
        return decoder.export(model, path, output_name=job.task.output_name, lower=lower)
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    return onnx.export(
        model, example, path, output_name=job.task.output_name, logits=job.task.logits, lower=lower
    )


def inputs(job: Job, runner: OrtRunner, phase: Phase | None = None) -> dict[str, NDArray[np.generic]]:
    """What one run of a file takes, in the phase asked for unless another is named."""
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    prompt = {name: tensor.numpy() for name, tensor in example.items()}
    return decode.inputs_of(runner, prompt, phase or job.recipe.shapes.phase) if job.decodes else prompt


def timed(job: Job, runner: OrtRunner, phase: Phase | None = None) -> bench.Runner:
    """One run of a file, ready to be measured."""
    return runner.timed(inputs(job, runner, phase))

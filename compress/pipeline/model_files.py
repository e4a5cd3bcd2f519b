"""Write a model of a job as the file that is timed, and prepare the inputs for timing.

Decoders are exported with their key-value cache, other models as they are. For a decoder one timed run is the
requested phase: prefill of a prompt of the recipe's length, or one decode step after a past of that length.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from compress.export import generation
from compress.export.backends.backend import Backend, OpenRunner
from compress.export.backends.onnxruntime import OrtRunner
from compress.export.onnx import decoder, writer
from compress.export.onnx.writer import Exported, Lower
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
        return decoder.export(model, path, output_name=job.task.outputs[0], lower=lower)
    example = job.task.example(job.recipe.shapes.batch, job.recipe.shapes.tokens)
    return writer.export(
        model, example, path, outputs=job.task.outputs, tensors=job.task.output_tensors, lower=lower
    )


def inputs(job: Job, runner: OrtRunner, phase: Phase | None = None) -> dict[str, NDArray[np.generic]]:
    """The inputs of one run of a file, in `phase` or by default the recipe's."""
    prompt = job.prompt
    return generation.inputs_of(runner, prompt, phase or job.recipe.shapes.phase) if job.decodes else prompt


def opened(job: Job, backend: Backend, model: nn.Module, file: Path) -> OpenRunner:
    """Open a model, built by the job's backend, for timing."""
    return backend.open(model, file, job.task.output_tensors, torch_layers.deploy_kernels)


def deployed(job: Job, model: nn.Module, removals: Mapping[str, Removal]) -> nn.Module:
    """A shrunk model, whose file exists, prepared for `opened` by the job's backend."""
    if job.backend is None:
        return model
    return job.backend.build(model, deploy=lambda: torch_layers.with_placeholders(model, job.sites, removals))


def timed(job: Job, runner: OpenRunner, phase: Phase | None = None) -> timing.Runner:
    """A callable for one timed run; for a decoder one run of `phase`, by default the recipe's."""
    if job.decodes:
        return runner.timed_phase(job.prompt, phase or job.recipe.shapes.phase)
    return runner.timed(job.prompt)

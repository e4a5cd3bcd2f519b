"""Jobs on toy families whose residual stream can be cut, for tests of the hidden width."""

import families
import torch

from compress import artifact, profiles
from compress.analyze import find_sites
from compress.console import Quiet
from compress.ir import Budget
from compress.job import Job, Stages
from compress.quality import kl
from compress.recipe import Options, Recipe, Shapes
from compress.residual import find_stream
from compress.task import Batch, Task


class Sample(Task):
    """A toy family with seeded inputs; the writers of its stream span few directions, so width is cheap."""

    def __init__(self, family, rank=None):
        self.model, example = families.build(family)
        self.name = "classification" if family in ("bert", "vit") else "text-generation"
        self.inputs = example
        if rank is not None:
            flatten(self.model, example, rank)

    def example(self, batch, tokens):
        return dict(self.inputs)

    def batches(self, split, size, limit=None):
        make = families.pixels if "pixel_values" in self.inputs else families.tokens
        for seed in range(4):
            yield Batch(make(seed))

    def divergence(self, logits, dense, batch):
        return kl(logits, dense).mean()


def flatten(model, example, rank):
    """Leave a stream of `rank` directions: every writer is projected on them."""
    stream = find_stream(model, example)
    basis = torch.randn(stream.width, rank, generator=torch.Generator().manual_seed(3))
    if stream.centered:
        basis = basis - basis.mean(0)
    basis = torch.linalg.qr(basis).Q
    with torch.no_grad():
        for part in stream.writers:
            value = model.get_parameter(part.tensor)
            value.copy_((value.movedim(part.dim, -1) @ basis @ basis.T).movedim(-1, part.dim))


def job_of(family, folder, rank=None, **changes):
    task = Sample(family, rank)
    recipe = Recipe(
        target="cpu", budget=Budget(speedup=2.0), out=str(folder), shapes=Shapes(batch=2, tokens=7),
        options=Options(moves=("structure", "width"), widths=(0.7, 0.33)), **changes,
    )  # fmt: skip
    found = find_sites(task.model, task.example(2, 7))
    batches = tuple(task.batches("calibration", 2))
    return Job(
        recipe, task, profiles.load("cpu"), artifact.claim(folder), Stages(Quiet()), "m", "k", found,
        found.sites, batches,
    )  # fmt: skip


def logits(task, model, inputs):
    with torch.no_grad():
        return task.logits(model(**inputs))

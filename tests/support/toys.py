"""Jobs on toy families whose residual stream can be cut, for tests of the hidden width."""

import torch

from compress import artifacts, profiles
from compress.ir import Budget
from compress.methods.hidden_width import find_stream
from compress.pipeline.job import Job, Stages
from compress.recipe import Options, Recipe, Shapes
from compress.report.progress import Quiet
from compress.sites.discovery import find_sites
from compress.tasks.loading import Batch, Task
from compress.tasks.task import kl
from support import families


def lively(model):
    """Scales, shifts and biases that matter, so that one that is forgotten shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator).to(value)
            if value.ndim > 1:
                value.copy_(noise / value.shape[-1] ** 0.5)
            else:
                value.copy_(0.3 * noise + ("bias" not in name))
    return model.eval()


class Sample(Task):
    """A toy family with seeded inputs; with a `rank` its stream has so many directions."""

    def __init__(self, family, rank=None):
        model, example = families.build(family)
        self.model, self.pictures = lively(model), "pixel_values" in example
        self.name = "classification" if family in ("bert", "vit") else "text-generation"
        if rank is not None:
            flatten(self.model, example, rank)

    def example(self, batch, tokens):
        if self.pictures:
            generator = torch.Generator().manual_seed(5)
            return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator)}
        return families.tokens(5, batch=batch, length=tokens)

    def batches(self, split, size, limit=None):
        for seed in range(4):
            yield Batch(families.pixels(seed) if self.pictures else families.tokens(seed))

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
        recipe, task, profiles.load("cpu"), artifacts.claim(folder), Stages(Quiet()), "m", "k", found,
        found.sites, batches,
    )  # fmt: skip


def logits(task, model, inputs):
    with torch.no_grad():
        return task.logits(model(**inputs))

"""Recovery of a plan with a smaller hidden width by pruning-aware tuning: the width falls during training.

A plan that was searched at a smaller width lost all removed directions at once. Here only the units of the
plan are removed from the dense model, its writers are refitted, and the width is reduced gradually while the
model is distilled (`training.pruning_aware`). The result has the shapes of the plan's model, so neither graph
nor latency change. Its weights are used only if the validation score improves; plain distillation then
continues from the better weights.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from compress import artifacts
from compress.core.units import index_of
from compress.errors import CompressError
from compress.methods import hidden_width
from compress.methods.sequential_refit import refit
from compress.pipeline import recovery
from compress.pipeline.job import Job, fingerprint
from compress.sites import prune
from compress.sites.prune import Removal
from compress.tasks.sampler import shuffled
from compress.tasks.task import Batch
from compress.training import distillation, pruning_aware
from compress.training.distillation import HiddenState

WEIGHTS_FILE = "aware.safetensors"


def recover(job: Job, model: nn.Module, removals: Mapping[str, Removal]) -> list[str]:
    """Load the weights of pruning-aware tuning into a narrow plan's `model` if they score better; notes.

    It is not possible if the plan has sparse, quantized or low-rank sites, whose parameters belong to the
    narrow model, or if no residual stream is found after units were removed. Then `model` is unchanged and
    the note gives the reason.
    """
    less = job.narrowed
    if less is None:
        return []
    formed = [name for name, one in removals.items() if one.form != "dense"]
    if formed:
        return [f"No pruning-aware tuning: {formed[0]} is compressed as {removals[formed[0]].form}."]
    path, made_from = (
        job.work / WEIGHTS_FILE,
        artifacts.digest(job.key, job.recipe.recovery, *fingerprint(model)),
    )
    weights = _load_weights(path, made_from)
    if weights is None:
        try:
            weights = _tune(job, less.units, removals)
        except CompressError as error:
            return [f"No pruning-aware tuning: {error}"]
        whole = {name: value.contiguous().clone() for name, value in weights.items()}
        save_file(whole, path, metadata={"made_from": made_from})
    judge = recovery.Validator(job)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = judge(model)
    model.load_state_dict(weights)
    second = judge(model)
    note = f"Pruning-aware tuning: {judge.name} {judge.format_score(first)} -> {judge.format_score(second)}"
    if second >= first:
        return [note]
    model.load_state_dict(before)
    return [f"{note}; not used"]


def _tune(job: Job, units: int, removals: Mapping[str, Removal]) -> dict[str, Tensor]:
    """The state dict of the plan's model after tuning while the width fell to `units`."""
    wide, wanted = job.baseline, job.recipe.recovery
    cut = prune_wide(wide, removals)
    for module in cut.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(False)
    shapes = job.recipe.shapes
    stream = hidden_width.find_stream(cut, job.task.example(shapes.batch, shapes.tokens))
    second = hidden_width.moments(cut, stream, job.calibration)
    count = sum(1 for _ in _training_batches(job))
    settings = pruning_aware.Settings(
        steps=wanted.epochs * count,
        learning_rate=wanted.rate,
        warmup=min(wanted.warmup, 0.99),
        decay=wanted.decay,
        clip=wanted.clip,
        seed=wanted.seed,
    )
    pruner = pruning_aware.Pruner(cut, stream, second, units, settings)
    at = distillation.hidden_states(wide.task.model, wide.sites)
    inside = tuple(HiddenState(f"model.{place.name}", place.output) for place in at)

    def loss(net: nn.Module, batch: Batch) -> Tensor:
        net.eval()  # no dropout, as everywhere in recovery
        with torch.no_grad():
            goal = distillation.run_model(job.task, wide.task.model, batch, at)
        outputs = distillation.run_model(job.task, net, batch, inside)
        return distillation.loss(job.task, batch, outputs, goal, wanted)

    with job.stages("pruning-aware tuning") as tick:
        merged = pruning_aware.tune(pruner, _shuffled_epochs(job), loss, tick)
    return merged.state_dict()


def prune_wide(wide: Job, removals: Mapping[str, Removal]) -> nn.Module:
    """The dense model without the units of a plan, its writers refitted at the full width."""
    dense = wide.task.model
    start: dict[str, Removal] = {}
    for site in wide.sites:
        if site.name in removals:
            kept = removals[site.name].kept
            columns, bias = prune.writer_columns(dense, site), prune.take_snapshot(dense, site).bias
            stay = columns[:, index_of(site.column, kept)].clone()
            start[site.name] = Removal(kept, stay, torch.zeros(len(stay)) if bias is None else bias)
    wanted = wide.recipe.calibration
    with wide.stages("refit at the full width") as tick:
        better = refit(
            dense,
            wide.sites,
            start,
            wide.calibration,
            damping=wanted.damping,
            memory_mb=wanted.memory_mb,
            progress=tick,
        )
    return prune.shrink(dense, wide.sites, better)


def _training_batches(job: Job) -> Iterator[Batch]:
    wanted = job.recipe.recovery
    return job.task.batches("calibration", wanted.batch, wanted.samples)


def _shuffled_epochs(job: Job) -> Iterator[Batch]:
    """The batches of all epochs, shuffled anew in each."""
    wanted = job.recipe.recovery
    for epoch in range(wanted.epochs):
        for _, batch in shuffled(_training_batches(job), (wanted.seed, epoch)):
            yield batch


def _load_weights(path: Path, made_from: str) -> dict[str, Tensor] | None:
    """Stored weights made from the same inputs, else None."""
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata()["made_from"] != made_from:
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError):
        return None

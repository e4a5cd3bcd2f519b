"""A chosen plan's writers, solved again block by block on the compressed model's own inputs.

The database fits every site to inputs of the dense model. Once the plan is fixed, the sites before a
site are compressed too, and its inputs are no longer those: each writer is therefore solved again,
in order, so that it gives the dense model's output from the inputs it will really see (methods
1(f)3; sequential statistics, 0.2.2). Only weights change, so neither the plan nor its time does.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress import surgery
from compress.calibrate import real_rows
from compress.core import obs
from compress.ir import Site
from compress.surgery import Removal
from compress.task import Batch


class _ReachedError(Exception):
    """The forward pass arrived at the wanted module; what follows is not needed."""


def refit(
    model: nn.Module,
    sites: Sequence[Site],
    removals: Mapping[str, Removal],
    batches: Sequence[Batch],
    *,
    damping: float,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Removal]:
    """The same removals with writers refitted to the inputs of the compressed prefix.

    Args:
        model: the dense model, left untouched.
        sites: in the order in which the model runs them.
        removals: what the plan removes; sites without one stay dense.
        batches: calibration inputs; padding never enters.
        damping: ridge toward the stored solution, relative to each diagonal entry.
        progress: called with sites done and sites in all.
    """
    compressed = surgery.mask(model, sites, {})
    result: dict[str, Removal] = {}
    for done, site in enumerate(sites, 1):
        removal = removals.get(site.name)
        if removal is not None:
            if len(removal.kept) and removal.form == "dense":  # a form's zeros and codes are not to be lost
                removal = _refit_site(model, compressed, site, removal, batches, damping)
            surgery.stitch(compressed, site, removal)
            result[site.name] = removal
        if progress is not None:
            progress(done, len(sites))
    return result


def _refit_site(
    model: nn.Module,
    compressed: nn.Module,
    site: Site,
    removal: Removal,
    batches: Sequence[Batch],
    damping: float,
) -> Removal:
    """One writer, least squares from the compressed model's inputs to the dense model's outputs."""
    width = site.column.width
    columns = (removal.kept[:, None] * width + torch.arange(width)).reshape(-1)
    name = site.writer.rpartition(".")[0]
    count, sum_x, sum_y = 0, torch.zeros(0), torch.zeros(0)
    second, cross = torch.zeros(0), torch.zeros(0)
    for batch in batches:
        y = real_rows(_arrive(model, name, batch, output=True), batch).double()
        x = real_rows(_arrive(compressed, name, batch, output=False), batch)[:, columns].double()
        if not count:
            sum_x, sum_y = x.new_zeros(x.shape[1]), y.new_zeros(y.shape[1])
            second, cross = x.new_zeros(x.shape[1], x.shape[1]), y.new_zeros(y.shape[1], x.shape[1])
        count += len(x)
        sum_x += x.sum(0)
        sum_y += y.sum(0)
        second += x.T @ x
        cross += y.T @ x
    if removal.weight is None:
        return removal
    weight, bias = obs.refit(
        second / count, cross / count, sum_x / count, sum_y / count, removal.weight, damping
    )
    return Removal(kept=removal.kept, weight=weight.float(), bias=bias.float())


def _arrive(model: nn.Module, name: str, batch: Batch, *, output: bool) -> Tensor:
    """The input or the output of the module `name`; the forward pass ends there."""
    caught: list[Tensor] = []

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])
        raise _ReachedError

    def after(_: nn.Module, __: tuple[Tensor, ...], result: Tensor) -> None:
        caught.append(result)
        raise _ReachedError

    module = model.get_submodule(name)
    hook = module.register_forward_hook(after) if output else module.register_forward_pre_hook(before)
    try:
        with contextlib.suppress(_ReachedError), torch.inference_mode():
            model(**batch.inputs)
    finally:
        hook.remove()
    return caught[0]

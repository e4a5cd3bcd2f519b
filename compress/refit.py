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
    memory_mb: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Removal]:
    """The same removals with writers refitted to the inputs of the compressed prefix.

    Args:
        model: the dense model, left untouched.
        sites: in the order in which the model runs them.
        removals: what the plan removes; sites without one stay dense.
        batches: calibration inputs; padding never enters.
        damping: ridge toward the stored solution, relative to each diagonal entry.
        memory_mb: what the dense model's outputs that are held at a time may take.
        progress: called with sites done and sites in all.
    """
    compressed = surgery.mask(model, sites, {})
    fitted = [
        site.writer
        for site in sites
        if site.name in removals and len(removals[site.name].kept) and removals[site.name].form == "dense"
    ]
    goals = _Goals(model, fitted, batches, memory_mb * 1e6)
    result: dict[str, Removal] = {}
    for done, site in enumerate(sites, 1):
        removal = removals.get(site.name)
        if removal is not None:
            if site.writer in fitted:  # not those in a form: its zeros and codes are not to be lost
                removal = _refit_site(goals, compressed, site, removal, batches, damping)
            surgery.stitch(compressed, site, removal)
            result[site.name] = removal
        if progress is not None:
            progress(done, len(sites))
    return result


class _Goals:
    """What the dense model's writers give, for as many of them at a time as there is room for."""

    def __init__(
        self, model: nn.Module, writers: Sequence[str], batches: Sequence[Batch], room: float
    ) -> None:
        self.model = model
        self.writers = list(writers)
        self.batches = batches
        self.room = room
        self.held: dict[str, list[Tensor]] = {}

    def of(self, writer: str) -> list[Tensor]:
        """Real rows [rows, out] of every batch, once; writers are asked for in the order of the model."""
        if writer not in self.held:
            self._collect(self.writers[self.writers.index(writer) :])
        return self.held.pop(writer)

    def _collect(self, wanted: list[str]) -> None:
        """One pass over the data for the first of `wanted`; the last ones go where room runs out."""
        self.held = {name: [] for name in wanted}
        for batch in self.batches:
            modules = [name.rpartition(".")[0] for name in self.held]
            for name, values in zip(self.held, _outputs(self.model, modules, batch), strict=True):
                self.held[name].append(real_rows(values, batch))
            while len(self.held) > 1 and self._bytes() > self.room:
                self.held.popitem()

    def _bytes(self) -> int:
        return sum(rows.numel() * rows.element_size() for kept in self.held.values() for rows in kept)


def _refit_site(
    goals: _Goals,
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
    for batch, goal in zip(batches, goals.of(site.writer), strict=True):
        y = goal.double()
        x = real_rows(_input(compressed, name, batch), batch)[:, columns].double()
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


def _input(model: nn.Module, name: str, batch: Batch) -> Tensor:
    """The input of the module `name`; the forward pass ends there."""
    caught: list[Tensor] = []

    def before(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        caught.append(arguments[0])
        raise _ReachedError

    hook = model.get_submodule(name).register_forward_pre_hook(before)
    try:
        with contextlib.suppress(_ReachedError), torch.inference_mode():
            model(**batch.inputs)
    finally:
        hook.remove()
    return caught[0]


def _outputs(model: nn.Module, names: Sequence[str], batch: Batch) -> list[Tensor]:
    """The outputs of the modules `names`, in their order; the forward pass ends at the last of them."""
    caught: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def after(_: nn.Module, __: tuple[Tensor, ...], result: Tensor) -> None:
            caught[name] = result
            if len(caught) == len(names):
                raise _ReachedError

        return after

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        with contextlib.suppress(_ReachedError), torch.inference_mode():
            model(**batch.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return [caught[name] for name in names]

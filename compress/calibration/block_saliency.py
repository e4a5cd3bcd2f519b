"""LPViT's saliency: what every sample's loss feels of every tile of a site's matrices, to rank blocks by.

To first order a sample's loss changes by the sum of `g w` over the weights that go, `g` the gradient of
that sample alone. These sums add up over tiles, so they are kept for each sample, fine along the units of
a site and coarse along its other dimension: whatever units stay, the blocks of what is left are whole tiles,
and `core.block.pooled` squares their sums and takes the mean over samples.

Reference: Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers", arXiv 2407.02068.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.calibration import activation_statistics
from compress.core import block
from compress.distributed import collectives
from compress.errors import CompressError
from compress.ir import Site
from compress.sites.modeling import owner
from compress.sites.prune import readers, writer_columns
from compress.tasks.task import Batch, Task

MAX_SAMPLES = 128  # of the calibration data; each is a forward and a backward pass of its own
FLOAT32_BYTES = 4  # bytes
Tile = tuple[int, int]


def collect(
    task: Task,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    directory: Path,
    tile: Tile,
    *,
    samples: int = MAX_SAMPLES,
    memory_mb: int = 2048,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `directory/<index>.safetensors` for every site that has no whole file there yet.

    Args:
        task: the model, and its loss.
        sites: whose matrices are watched.
        batches: calibration inputs, of which the first `samples` are taken.
        directory: holds one file a site, named by its index.
        tile: rows and columns that divide those of every block that will be asked for.
        samples: at most.
        memory_mb: what one pass over the samples may hold; more sites take more passes.
        progress: called with samples done and samples in all, over all passes.

    Raises:
        CompressError: there are no labels, or several processes were started.
    """
    if collectives.size() > 1:
        raise CompressError(
            f'blocks = "fisher" runs in one process, {collectives.size()} were started; '
            'start one, or set "obs"'
        )
    taken = list(islice(_single_samples(batches), samples))
    missing = [index for index in range(len(sites)) if not _whole(directory, index, len(taken))]
    passes = _passes(task.model, sites, missing, tile, memory_mb * 1e6 / (FLOAT32_BYTES * max(1, len(taken))))
    for number, group in enumerate(passes):

        def tick(done: int, before: int = number) -> None:
            if progress is not None:
                progress(before * len(taken) + done, len(passes) * len(taken))

        found = _observe(task, [sites[index] for index in group], taken, tile, tick)
        for index, tensors in zip(group, found, strict=True):
            activation_statistics.write(_path(directory, index), tensors)


def read(directory: Path, index: int) -> dict[str, Tensor]:
    """What was collected of one site: [samples, rows, columns] by the name of a matrix.

    Raises:
        CompressError: the file is missing or damaged.
    """
    path = _path(directory, index)
    try:
        found: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CompressError(f"{path} is missing or damaged ({error}); run again to rebuild it") from error
    return found


def matrices(model: nn.Module, site: Site, tile: Tile) -> dict[str, tuple[Tensor, Tile]]:
    """The matrices of a site that blocks can tile, [out, in] each, and the tile of what is kept of it.

    Units own columns of the writer and rows of the readers, which are therefore told apart.
    """
    found = {site.writer: (writer_columns(model, site).detach(), (tile[0], 1))}
    for name in readers(site):
        across = next(part.dim for part in site.slices if part.tensor == name) == 1
        stored = model.get_parameter(name).detach()
        found[name] = (stored.T if across else stored, (1, tile[1]))
    return {
        name: (weight, own)
        for name, (weight, own) in found.items()
        if weight.shape[0] % own[0] == 0 and weight.shape[1] % own[1] == 0
    }


def _observe(
    task: Task, sites: Sequence[Site], samples: Sequence[Batch], tile: Tile, tick: Callable[[int], None]
) -> list[dict[str, Tensor]]:
    """Each sample alone through the model and back, with hooks on the matrices of `sites`."""
    watched = [matrices(task.model, site, tile) for site in sites]
    found: list[dict[str, list[Tensor]]] = [{name: [] for name in each} for each in watched]

    def watch(name: str, weight: Tensor, own: Tile, kept: list[Tensor]) -> RemovableHandle:
        def after(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = arguments[0].detach().reshape(-1, weight.shape[1])

            def back(gradient: Tensor) -> None:
                whole = gradient.reshape(-1, len(weight)).T @ inputs
                kept.append(block.effects(weight, whole, own).float().cpu())

            output.register_hook(back)  # type: ignore[no-untyped-call]

        return task.model.get_submodule(owner(name)).register_forward_hook(after)

    handles = [
        watch(name, weight, own, found[place][name])
        for place, each in enumerate(watched)
        for name, (weight, own) in each.items()
    ]
    try:
        for done, sample in enumerate(samples, 1):
            with torch.enable_grad():
                torch.autograd.backward(task.loss(task.logits(task.model(**sample.inputs)), sample))
            task.model.zero_grad(set_to_none=True)
            tick(done)
    finally:
        for handle in handles:
            handle.remove()
    return [{name: torch.stack(kept) for name, kept in each.items()} for each in found]


def _single_samples(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Every sample as a batch of its own."""
    for batch in batches:
        count = len(next(iter(batch.inputs.values())))
        for place in range(count):
            own = slice(place, place + 1)
            inputs = {
                name: value[own] if value.shape[:1] == (count,) else value
                for name, value in batch.inputs.items()
            }
            labels = None if batch.labels is None else batch.labels[own]
            yield Batch(inputs, labels, None if batch.real is None else batch.real[own])


def _passes(
    model: nn.Module, sites: Sequence[Site], missing: Sequence[int], tile: Tile, room: float
) -> list[list[int]]:
    """Sites grouped so that what one sample leaves of a group is at most `room` numbers (one always fits)."""

    def size(index: int) -> float:
        found = matrices(model, sites[index], tile).values()
        return sum(weight.numel() / (own[0] * own[1]) for weight, own in found)

    return activation_statistics.group_by_memory(((index, size(index)) for index in missing), room)


def _path(directory: Path, index: int) -> Path:
    return directory / f"{index:03d}.safetensors"


def _whole(directory: Path, index: int, samples: int) -> bool:
    """Whether a file is there with as many samples."""
    try:
        with safe_open(_path(directory, index), framework="pt") as file:
            shapes: Mapping[str, list[int]] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return False
    return all(shape[0] == samples for shape in shapes.values())

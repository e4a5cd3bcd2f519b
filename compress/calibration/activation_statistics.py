"""One pass over data: second moments of every writer's inputs, streamed to one file a site.

Products are taken in float32 within a batch, about a fixed shift near the mean, and added up in
float64, so that neither many batches nor a large mean cost digits; padding never enters. When the
matrices of all sites do not fit into the memory allowed, the data is passed several times. Several
processes take a share of the batches each, and add up what they have found.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.calibration.moments import Moments
from compress.core.ranges import Histogram, Range, Span
from compress.distributed import collectives
from compress.errors import CompressError
from compress.ir import Site
from compress.tasks.loading import Batch, Task

FLOAT64_BYTES = 8


@dataclass(frozen=True)
class Statistics:
    """Moments of one writer's inputs, float64, over all real tokens.

    Attributes:
        count: rows seen.
        mean: [in] `E[x]`.
        second: [in, in] `E[x x^T]`, not centered.
        taylor: [in] mean over samples of `(sum over tokens of x dL/dx)^2`, None when not asked for.
        reader: [hidden, hidden] `E[x x^T]` of what the site's readers see, None when not asked for.
        range: what bytes should cover of the writer's inputs, None when not asked for.
        reader_span: the same of what the readers see.
        saliency: `block_saliency.read`, where blocks are to be ranked by it.
    """

    count: int
    mean: Tensor
    second: Tensor
    taylor: Tensor | None = None
    reader: Tensor | None = None
    range: Range | None = None
    reader_span: Span | None = None
    saliency: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Wanted:
    """What is collected besides the moments of the writers."""

    taylor: bool
    readers: bool
    spans: bool

    def found(self, statistics: Statistics) -> bool:
        """Whether it is all there."""
        return not (
            (self.taylor and statistics.taylor is None)
            or (self.readers and statistics.reader is None)
            or (self.spans and (statistics.range is None or statistics.reader_span is None))
        )


def collect(
    task: Task,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    directory: Path,
    *,
    memory_mb: int = 2048,
    taylor: bool = False,
    readers: bool = False,
    spans: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `directory/<index>.safetensors` for every site that has no valid file there yet.

    Args:
        task: the model, and its loss when `taylor` scores are wanted.
        sites: whose writers are watched.
        batches: calibration inputs.
        directory: holds one file a site, named by its index.
        memory_mb: what the float64 matrices of one pass may take.
        taylor: also collect first-order scores, by a backward pass for every batch.
        readers: also collect the second moments of what the readers see.
        spans: also find the ranges that bytes should cover, of the writers' inputs and the readers'.
        progress: called with batches done and batches in all, over all passes.

    Raises:
        CompressError: there are no rows, or an activation is NaN or infinite (with its site).
    """
    if not batches:
        raise CompressError("there is no calibration data; give some with --data")
    if spans and collectives.size() > 1:
        raise CompressError(
            f"ranges of inputs, for int8-static, are found by one process; there are {collectives.size()}. "
            "Start one, or leave int8-static out of --moves"
        )
    wanted = _Wanted(taylor, readers or spans, spans)
    missing = [i for i, site in enumerate(sites) if not _valid(directory, i, site, wanted)]
    passes = _passes([(i, sites[i]) for i in missing], memory_mb * 1e6, wanted.readers)
    for number, group in enumerate(passes):

        def tick(done: int, before: int = number) -> None:
            if progress is not None:
                progress(before * len(batches) + done, len(passes) * len(batches))

        watched = [sites[i] for i in group]
        dumped = [site.model_dump(mode="json") for site in watched]
        collectives.send_command("calibrate", {"sites": dumped, "taylor": taylor, "readers": wanted.readers})

        def keep(place: int, tensors: dict[str, Tensor], group: list[int] = group) -> None:
            write(directory / f"{group[place]:03d}.safetensors", tensors)

        observe(task, watched, batches, keep, tick, taylor=taylor, readers=wanted.readers, spans=spans)


def observe(
    task: Task,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    keep: Callable[[int, dict[str, Tensor]], None],
    tick: Callable[[int], None],
    *,
    taylor: bool,
    readers: bool,
    spans: bool = False,
) -> None:
    """One pass over the data; what `read` reads of each site is given to `keep`, with the site's place.

    Of several processes each calls this with all batches, and takes its share of them.
    """
    with collectives.synchronized():
        collectives.check_identical("calibration data", collectives.batch_bytes(batches))
        collectives.broadcast_model(task.model)
        moments, seen = _pass(task, sites, batches, _Wanted(taylor, readers, spans), tick)
        for place, (site, own, read_by) in enumerate(zip(sites, moments, seen, strict=True)):
            found = own.over_all(writer_width(site))
            if not found:
                raise CompressError("no real token reached a site; the calibration data is all padding")
            if readers:
                of_readers = read_by.over_all(reader_width(site))
                found["reader"] = of_readers["second"]
                found |= {"reader_span": of_readers["span"]} if spans else {}
            keep(place, found)


def read(directory: Path, index: int) -> Statistics:
    """The statistics of one site.

    Raises:
        CompressError: the file is missing or damaged.
    """
    path = directory / f"{index:03d}.safetensors"
    try:
        found = load_file(path)
        return Statistics(
            int(found["count"]),
            found["mean"],
            found["second"],
            found.get("taylor"),
            found.get("reader"),
            Range(_to_span(found["span"]), found["low"], found["high"]) if "span" in found else None,
            _to_span(found["reader_span"]) if "reader_span" in found else None,
        )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CompressError(f"{path} is missing or damaged ({error}); run again to rebuild it") from error


def _to_span(ends: Tensor) -> Span:
    low, high = ends.tolist()
    return low, high


def writer_width(site: Site) -> int:
    """How many inputs the writer has."""
    return site.units * site.column.width


def reader(site: Site) -> str:
    """The weight of one product that reads what all readers of a site read."""
    return next(m.weight for m in site.matmuls if m.weight != site.writer)


def reader_width(site: Site) -> int:
    """How many inputs the readers have."""
    return next(m.inner for m in site.matmuls if m.weight != site.writer)


def _valid(directory: Path, index: int, site: Site, wanted: _Wanted) -> bool:
    try:
        found = read(directory, index)
    except CompressError:
        return False
    width = writer_width(site)
    whole = found.mean.shape == (width,) and found.second.shape == (width, width)
    return whole and found.count > 0 and wanted.found(found)


def _passes(sites: Sequence[tuple[int, Site]], room: float, readers: bool) -> list[list[int]]:
    """Sites grouped so that the matrices of one pass fit into `room` bytes (one always fits)."""
    return group_by_memory(
        (
            (index, FLOAT64_BYTES * (writer_width(site) ** 2 + (reader_width(site) ** 2 if readers else 0)))
            for index, site in sites
        ),
        room,
    )


def group_by_memory(sizes: Iterable[tuple[int, float]], room: float) -> list[list[int]]:
    """Neighbors in groups whose sizes add up to at most `room`; one that is larger is a group of its own.

    >>> group_by_memory([(7, 2.0), (8, 3.0), (9, 1.0)], 4.0)
    [[7], [8, 9]]
    """
    groups: list[list[int]] = []
    used = 0.0
    for index, size in sizes:
        if not groups or used + size > room:
            groups.append([])
            used = 0.0
        groups[-1].append(index)
        used += size
    return groups


def _pass(
    task: Task,
    sites: Sequence[Site],
    batches: Sequence[Batch],
    wanted: _Wanted,
    tick: Callable[[int], None],
) -> tuple[list[Moments], list[Moments]]:
    """This process's batches through the model, with hooks on the writers, and on a reader, of `sites`."""
    moments, seen = ([Moments(Histogram() if wanted.spans else None) for _ in sites] for _ in range(2))
    current: list[Batch] = []
    mine = collectives.share(batches)
    aiming = collectives.rank() > 0

    def watch(site: Site, own: Moments, taylor: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            values = arguments[0]
            rows = finite_rows(site, values, current[-1])
            if aiming:
                own.aim(rows)
                return
            own.add(rows)
            if taylor:
                # torch leaves this one method without types.
                values.register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: _first_order(own, values, gradient, current[-1])
                )

        return hook

    watched = [(site.writer, site, own, wanted.taylor) for site, own in zip(sites, moments, strict=True)]
    if wanted.readers:
        watched += [(reader(site), site, own, False) for site, own in zip(sites, seen, strict=True)]
    hooks = [
        task.model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(watch(site, own, first))
        for name, site, own, first in watched
    ]
    try:
        if aiming:  # one shift for all processes, since rounding depends on it
            current.append(batches[0])
            with torch.no_grad():
                task.model(**batches[0].inputs)
            aiming = False
        for done, batch in enumerate(mine, 1):
            current.append(batch)
            if wanted.taylor:
                with torch.enable_grad():
                    torch.autograd.backward(task.loss(task.logits(task.model(**batch.inputs)), batch))
                task.model.zero_grad(set_to_none=True)
            else:
                with torch.inference_mode():
                    task.model(**batch.inputs)
            tick(min(len(batches), done * collectives.size()))
    finally:
        for handle in hooks:
            handle.remove()
    return moments, seen


def _first_order(own: Moments, values: Tensor, gradient: Tensor, batch: Batch) -> None:
    """Add one batch's `sum over tokens of x dL/dx` for every sample; the loss is a mean over samples."""
    product = (values.detach() * gradient).reshape(
        len(next(iter(batch.inputs.values()))), -1, values.shape[-1]
    )
    if batch.real is not None:
        product = product * batch.real.reshape(len(product), -1, 1)
    own.add_taylor(product.sum(1) * len(product))


def finite_rows(site: Site, values: Tensor, batch: Batch) -> Tensor:
    """[rows, features] in float32: what the writer of a site reads at real tokens.

    Raises:
        CompressError: there is NaN or infinity among it.
    """
    rows = real_rows(values.detach(), batch).float()
    if not bool(torch.isfinite(rows).all()):
        raise CompressError(
            f"{site.name}: its inputs hold NaN or infinity on calibration data; check the "
            "model's weights and the data"
        )
    return rows


def real_rows(values: Tensor, batch: Batch) -> Tensor:
    """[rows, features]: the tokens of an activation that are not padding."""
    flat = values.reshape(-1, values.shape[-1])
    if batch.real is None or batch.real.numel() != len(flat):
        return flat
    return flat[batch.real.reshape(-1)]


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Store the statistics of one site; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_suffix(".part")
    save_file(tensors, half)
    half.replace(path)
